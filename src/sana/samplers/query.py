"""What a sampler asks for, what a caller sees, and the driver between the two.

A sampler is a coroutine: it yields a `Query`, is sent the velocity at that point, and returns the
last latent. It knows no network. `run` drives one sampler with one denoiser; a server can drive
many samplers at once, since every query carries its own time. Start reading at `run`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One evaluation wanted: the velocity of `latent` [B,C,h,w] at `time` in [0, 1] (1 = noise)."""

    index: int
    count: int
    latent: Tensor
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Step `index` of `count` is done: the latent after it, and the estimate of the clean one."""

    index: int
    count: int
    latent: Tensor
    clean: Tensor


Sampler: TypeAlias = Generator[Query, Tensor, Tensor]


class Denoiser(Protocol):
    """Velocity [B,C,h,w] of `latents` [B,C,h,w] at `times` [B]."""

    def __call__(self, latents: Tensor, times: Tensor, /) -> Tensor: ...


def run(sampler: Sampler, denoiser: Denoiser) -> Iterator[Step]:
    """Drive `sampler` to its end, one `Step` for each evaluation; stop pulling to cancel.

    `clean` is x - t v (papers.md 2.4) at the point that was evaluated; the last step's `latent` is
    what the sampler returned.
    """
    query = next(sampler)
    while True:
        times = torch.full(
            (len(query.latent),), query.time, dtype=query.latent.dtype, device=query.latent.device
        )
        velocity = denoiser(query.latent, times)
        clean = query.latent - query.time * velocity
        try:
            following = sampler.send(velocity)
        except StopIteration as finished:
            yield Step(index=query.index, count=query.count, latent=finished.value, clean=clean)
            return
        yield Step(index=query.index, count=query.count, latent=following.latent, clean=clean)
        query = following
