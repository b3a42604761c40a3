"""What a sampler asks for, what a caller sees, and the driver between the two.

A sampler is a coroutine: it yields a `Query`, is sent the velocity at that point, and returns the
last latent. It knows no network. `run` drives one sampler with one denoiser; a server can drive
many samplers at once, since every query carries its own time. Start reading at `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
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
Fresh: TypeAlias = Callable[[], Tensor]
"""New unit noise [B,C,h,w] at every call, for samplers that draw some on their way."""


class Denoiser(Protocol):
    """Velocity [B,C,h,w] of `latents` [B,C,h,w] at `times` [B], which are on the CPU."""

    def __call__(self, latents: Tensor, times: Tensor, /) -> Tensor: ...


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Unit noise [B, *shape] in fp32 on the CPU, each picture's from its own CPU generator.

    So a picture does not depend on the device or on its neighbours; call it again with the same
    generators for the noise that a sampler draws on its way.
    """
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def run(sampler: Sampler, denoiser: Denoiser) -> Iterator[Step]:
    """Drive `sampler` to its end, one `Step` for each evaluation; stop pulling to cancel.

    `clean` is x - t v (papers.md 2.4) at the point that was evaluated; the last step's `latent` is
    what the sampler returned.
    """
    query = next(sampler)
    while True:
        # On the CPU, where they can be read without waiting for the device.
        times = torch.full((len(query.latent),), query.time, dtype=query.latent.dtype)
        velocity = denoiser(query.latent, times)
        clean = query.latent - query.time * velocity
        try:
            following = sampler.send(velocity)
        except StopIteration as finished:
            yield Step(index=query.index, count=query.count, latent=finished.value, clean=clean)
            return
        yield Step(index=query.index, count=query.count, latent=following.latent, clean=clean)
        query = following
