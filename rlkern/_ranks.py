"""Processes that torchrun has started: who has which part, and what they put together.

Each has a part of what there is to do, and of the parameters, gradients and optimiser state of a
model that is cut among them (FSDP2). In a process that stands alone each function gives back what
it gets.
"""

import os
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")
FAILED = "rlkern/failed"  # in torchrun's store: how many processes have met an error
store: dist.Store | None = None


def start() -> None:
    """Meets the other processes, where torchrun has started several."""
    global store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or store is not None:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    met, number, count = next(iter(dist.rendezvous("env://")))
    # torchrun may keep its store, and in it the addresses of those who have died, when it restarts
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), met)
    dist.init_process_group(backend, store=store, rank=number, world_size=count)


def rank() -> int:
    return 0 if store is None else dist.get_rank()


def size() -> int:
    return 1 if store is None else dist.get_world_size()


def failed() -> bool:
    """Whether an error has ended one of the processes."""
    return store is not None and store.check([FAILED])


def is_first_failure() -> bool:
    """Whether this process is the one to tell; the others end because it does."""
    return store is None or store.add(FAILED, 1) == 1


def part(count: int) -> slice:
    """This process's part of so many things in a row."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def of_first(make: Callable[[], T]) -> T:
    """What the first process makes, for all."""
    value = [make() if rank() == 0 else None]
    if size() > 1:
        dist.broadcast_object_list(value)
    return value[0]


def everyone(value: T) -> list[T]:
    """What each process has, in order. Tensors in it had better be on the CPU."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def whole(tensor: Tensor) -> Tensor:
    """Every process takes part where the tensor is cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `other` of the same shape is cut."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    where = other.device_mesh, other.placements
    return distribute_tensor(tensor.to(other.device), *where, src_data_rank=None)


def shard(model: nn.Module) -> nn.Module:
    """Cuts parameters among the processes: a unit of each layer, and one of the rest."""
    if size() > 1:
        mesh = dist.init_device_mesh(model.device.type, (size(),))
        how = {"mesh": mesh, "mp_policy": fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)}
        names = getattr(model, "_no_split_modules", None) or ()
        for module in (*(m for m in model.modules() if type(m).__name__ in names), model):
            fsdp.fully_shard(module, **how)
            # sums, not means: losses have the denominators of all processes
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        model.run = MethodType(
            lambda own, function, *args, **how: function(own, *args, **how), model
        )
        fsdp.register_fsdp_forward_method(model, "run")
    return model


def call(function: Callable[..., Any], model: Any, *args: Any, **how: Any) -> Any:
    """function(model, ...) as a forward of the model, so that it finds the head's weight whole."""
    if isinstance(model, fsdp.FSDPModule):
        return model.run(function, *args, **how)
    return function(model, *args, **how)
