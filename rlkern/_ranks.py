"""Processes that torchrun has started: who has which part, and what they put together.

In a process that stands alone each function gives back what it gets.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
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
