"""Several processes that torchrun has started, and one model.

Every process holds the rollouts, rewards and log-probs of a step, samples its part of the
questions, judges and trains its part of the sequences. Parameters, gradients and the optimiser's
state are cut among them (FSDP2). In a process that stands alone each function here gives back what it gets.
"""

import os
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rlkern.train import TrainError
from rlkern.train.config import Config

T = TypeVar("T")
FAILED = "rlkern/failed"  # in torchrun's store: how many processes have met an error
store: dist.Store | None = None


def start() -> None:
    """Meets the other processes, where torchrun has started this one."""
    global store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or store is not None:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, number, count = next(iter(dist.rendezvous("env://")))
    dist.init_process_group(backend, store=store, rank=number, world_size=count)


def rank() -> int:
    return dist.get_rank() if store else 0


def size() -> int:
    return dist.get_world_size() if store else 1


def failed() -> bool:
    """Whether an error has ended one of the processes."""
    return store is not None and store.check([FAILED])


def is_first_failure() -> bool:
    """Whether this process is the one to tell; the others end because it does."""
    return store is None or store.add(FAILED, 1) == 1


def part(count: int) -> range:
    """This process's part of so many things in a row."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


def of_first(make: Callable[[], T]) -> T:
    """What the first process makes, for all."""
    value = [make() if rank() == 0 else None]
    if size() > 1:
        dist.broadcast_object_list(value)
    return value[0]


def everyone(value: T) -> list[T]:
    """What each process has, in order; on the CPU."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def shard(model: PreTrainedModel) -> None:
    """Cuts parameters among the processes, one unit a layer and one for the rest; gradients add up.

    The head belongs to the rest: `call` runs the loss where its weight is whole.
    """
    if size() == 1:
        return
    mesh = dist.init_device_mesh(model.device.type, (size(),))
    how = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for module in (*blocks, model):
        fully_shard(module, **how)
        module.set_gradient_divide_factor(1.0)  # losses have the denominators of all processes
        module.set_force_sum_reduction_for_comms(True)
    model.run = MethodType(
        lambda own, function, *args, **kwargs: function(own, *args, **kwargs), model
    )
    register_fsdp_forward_method(model, "run")


def call(function: Callable[..., T], model: Any, *args: Any, **kwargs: Any) -> T:
    """function(model, ...), which is a forward of the model and finds whole weights there."""
    if isinstance(model, FSDPModule):
        return model.run(function, *args, **kwargs)
    return function(model, *args, **kwargs)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `parameter` is cut."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    where = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), *where, src_data_rank=None)


def check(cfg: Config, heldout: int) -> None:
    """Refuses what several processes cannot do."""
    if size() == 1:
        return
    reasons = {
        "precision = fp8-unified: its layers keep codes of weights that are whole": cfg.precision
        == "fp8-unified",
        "rollout.engine = vllm: it makes a process group of its own": cfg.rollout.engine == "vllm",
        "rollout.strategy = april: its groups go on in the process that began them": cfg.rollout.strategy
        == "april",
    }
    for reason, met in reasons.items():
        if met:
            raise TrainError(f"{size()} processes do not go with {reason}")
    counts = {"rollout.prompts": cfg.rollout.prompts, "held-out questions": heldout}
    counts |= {"warmup.batch_size": cfg.warmup.batch_size}
    for name, count in counts.items():
        if count < size():
            raise TrainError(f"{name}: {count} is less than the {size()} processes")


class Silence:
    """The log of a process that is not the first."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None
