"""Data-parallel training under torchrun; the only file that reads torchrun's variables.

`session()` opens the process group and closes it again; `wrap` puts DistributedDataParallel around
a module when there is more than one process; `equalize` and `average_gradients` do the same for a
captured step. Everything works unchanged in a single process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this process stands: its rank, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def session(device: str = "auto") -> Iterator[Place]:
    """Join torchrun's process group (NCCL on CUDA, gloo on a CPU) and leave it at the end.

    `device` is "auto", "cpu" or "cuda". Without torchrun this is one process and opens nothing.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    place_device = torch.device("cpu")
    if use_cuda:
        place_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place_device)
    if world > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    try:
        yield Place(rank=rank, world=world, device=place_device)
    finally:
        if world > 1:
            dist.destroy_process_group()


def wrap(module: nn.Module, place: Place) -> nn.Module:
    """`module` itself in one process, else DistributedDataParallel around it."""
    if place.world == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    ids = [place.device.index] if place.device.type == "cuda" else None
    parallel = nn.parallel.DistributedDataParallel(
        module, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
    )
    if place.device.type == "cuda":
        # Half the bytes between GPUs; each process still accumulates in fp32.
        parallel.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return parallel


def equalize(module: nn.Module, place: Place) -> None:
    """Give every process the parameters and buffers of the first, as `wrap` does."""
    if place.world > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def average_gradients(row: Tensor, place: Place) -> None:
    """Average a row of gradients over all processes, in place; with the same rounding as `wrap`."""
    if place.world == 1:
        return
    sent = row.bfloat16() if place.device.type == "cuda" else row
    dist.all_reduce(sent.div_(place.world))
    if sent is not row:
        row.copy_(sent)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside `wrap`, and inside torch.compile."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    return getattr(module, "_orig_mod", module)


def mean_over_processes(values: Tensor, place: Place) -> Tensor:
    """Average a small tensor over all processes."""
    if place.world > 1:
        dist.all_reduce(values)
        values = values / place.world
    return values


def any_process(*, holds: bool, place: Place) -> bool:
    """Whether the condition holds in at least one process (all get the same answer)."""
    if place.world == 1:
        return holds
    flag = torch.tensor(float(holds), device=place.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def gather(thing: Any, place: Place) -> list[Any]:
    """What each process holds, in the order of their ranks; all get the whole list."""
    if place.world == 1:
        return [thing]
    found: list[Any] = [None] * place.world
    dist.all_gather_object(found, thing)
    return found


def barrier(place: Place) -> None:
    """Wait for all processes."""
    if place.world > 1:
        dist.barrier()
