"""From a network and two texts to a velocity: classifier-free guidance lives here.

A denoiser closes over any callable network(latent, time, text, mask); the samplers see only
velocities. Guidance w gives v = v_u + w (v_c - v_u) (papers.md 2.4), both halves in one call of the
network, unconditional first, their texts padded to one length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from sana.samplers.query import Denoiser
from sana.samplers.schedule import truncated

Network: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(latent [B,C,h,w], time [B], text [B,T,W], mask [B,T]) -> velocity [B,C,h,w]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Encoded text that the network is conditioned on; a leading 1 stands for any batch size."""

    states: Tensor  # [1 or B, T, W]
    mask: Tensor  # [1 or B, T], True where a token counts


def guided(
    network: Network,
    conditional: Text,
    unconditional: Text | None,
    guidance: float,
    *,
    integer_times: bool = False,
) -> Denoiser:
    """A denoiser with classifier-free guidance; guidance 1 runs the conditional half alone.

    With `integer_times` the network is told trunc(1000 t) / 1000; the sampler's own times stay
    exact. `unconditional` may be None only when guidance is 1.
    """
    if guidance == 1:
        text = conditional
    elif unconditional is None:
        raise ValueError(f"guidance is {guidance} and there is no unconditional text to guide from")
    else:
        unconditional, conditional = _same_length(unconditional, conditional)

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        told = truncated(times) if integer_times else times
        count = len(latents)
        if guidance == 1:
            one = _for_batch(text, count)
            return network(latents, told, one.states, one.mask).to(latents.dtype)
        assert unconditional is not None
        both = _joined(_for_batch(unconditional, count), _for_batch(conditional, count))
        velocity = network(latents.repeat(2, 1, 1, 1), told.repeat(2), both.states, both.mask)
        without, with_text = velocity.to(latents.dtype).chunk(2)
        return without + guidance * (with_text - without)

    return denoise


def one_by_one(denoiser: Denoiser) -> Denoiser:
    """The same denoiser, asked about one latent at a time.

    A matrix product's last bits depend on how many rows it has, so this is what makes a picture
    independent of the batch around it, bit for bit.
    """

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        pairs = zip(latents.split(1), times.split(1), strict=True)
        return torch.cat([denoiser(latent, time) for latent, time in pairs])

    return denoise


def _same_length(first: Text, second: Text) -> tuple[Text, Text]:
    length = max(first.mask.shape[1], second.mask.shape[1])
    return _padded(first, length), _padded(second, length)


def _padded(text: Text, length: int) -> Text:
    missing = length - text.mask.shape[1]
    return Text(states=pad(text.states, (0, 0, 0, missing)), mask=pad(text.mask, (0, missing)))


def _for_batch(text: Text, count: int) -> Text:
    if len(text.mask) == count:
        return text
    return Text(states=text.states.expand(count, -1, -1), mask=text.mask.expand(count, -1))


def _joined(first: Text, second: Text) -> Text:
    return Text(
        states=torch.cat([first.states, second.states]), mask=torch.cat([first.mask, second.mask])
    )
