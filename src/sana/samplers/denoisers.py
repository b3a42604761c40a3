"""From a network and its texts to a velocity: guidance lives here.

A denoiser closes over any callable network(latent, time, text, mask); the samplers see only
velocities. Guidance w gives v = v_u + w (v_c - v_u) (papers.md 2.4); perturbed-attention guidance
(arXiv 2403.17377) adds p (v_c - v_p), where v_p comes from a network whose self-attention is
switched off in some blocks. All parts go in one call of the network, unconditional first, perturbed
last, their texts padded to one length, and joined (and prepared, where the network can) once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from sana.samplers.query import Denoiser
from sana.samplers.schedule import truncated

Network: TypeAlias = Callable[..., Tensor]
"""(latent [B,C,h,w], time [B], text [B,T,W], mask [B,T]) -> velocity [B,C,h,w].

With perturbation it also takes `perturbed`, how many samples at the end to perturb, and for Sprint
`guidance` [B]. It takes what its `Prepare` made in place of the text.
"""
Prepare: TypeAlias = Callable[[Tensor, Tensor], Any]
"""(text [B,T,W], mask [B,T]) -> what the network makes of them at every step alike.

The mask is where the `Text` has it; a network that is given the text itself has it beside that.
"""

Joined: TypeAlias = Callable[[int], tuple[Any, Tensor]]
"""Number of latents -> the text that the network takes for them, and its mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Encoded text that the network is conditioned on; a leading 1 stands for any batch size."""

    states: Tensor  # [1 or B, T, W]
    mask: Tensor  # [1 or B, T], True where a token counts; best on the CPU, as that never waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How strongly, and at which times, a velocity is pushed away from worse ones."""

    scale: float = 4.5
    """Away from the unconditional one; 1 is off."""
    perturbation: float = 0.0
    """Away from the one with perturbed self-attention (PAG); 0 is off."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times, both ends included, outside of which the conditional velocity is used alone."""

    @property
    def is_off(self) -> bool:
        return self.scale == 1 and self.perturbation == 0

    def is_inside(self, times: Tensor) -> Tensor | None:
        """Which of `times` are in the interval; None, without a look at them, if all can be."""
        low, high = self.interval
        return None if low <= 0 and high >= 1 else (times >= low) & (times <= high)


def guided(
    network: Network,
    conditional: Text,
    unconditional: Text | None,
    guidance: Guidance | float,
    *,
    integer_times: bool = False,
    prepare: Prepare | None = None,
) -> Denoiser:
    """A denoiser with classifier-free and perturbed-attention guidance.

    With `integer_times` the network is told trunc(1000 t) / 1000; the sampler's own times stay
    exact. `unconditional` may be None only when the scale is 1. Times come on any device and reach
    the network there; `run` gives them on the CPU.
    """
    how = guidance if isinstance(guidance, Guidance) else Guidance(scale=guidance)
    if how.scale != 1 and unconditional is None:
        raise ValueError(f"guidance is {how.scale} and there is no unconditional text to use")
    parts = [unconditional] if how.scale != 1 and unconditional is not None else []
    parts += [conditional, conditional] if how.perturbation else [conditional]
    length = max(part.mask.shape[1] for part in parts)
    parts = [padded(part, length) for part in parts]
    together = _joined(parts, prepare)
    alone = _joined([conditional], prepare)

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        told = truncated(times) if integer_times else times
        is_inside = how.is_inside(times)
        if how.is_off or (is_inside is not None and not bool(is_inside.any())):
            return _ask(network, latents, told, alone, 0)[0]
        velocities = _ask(network, latents, told, together, int(how.perturbation != 0))
        pushed, with_text = _combine(velocities, how)
        if is_inside is None:
            return pushed
        return torch.where(is_inside[:, None, None, None].to(pushed.device), pushed, with_text)

    return denoise


def _joined(texts: Sequence[Text], prepare: Prepare | None) -> Joined:
    """All of `texts` as one batch for so many latents, made when first asked for."""

    @cache
    def joined(count: int) -> tuple[Any, Tensor]:
        rows = [_for_batch(text, count) for text in texts]
        states = torch.cat([row.states for row in rows])
        mask = torch.cat([row.mask for row in rows])
        if prepare is None:
            return states, mask.to(states.device)
        return prepare(states, mask), mask

    return joined


def _ask(
    network: Network, latents: Tensor, told: Tensor, joined: Joined, perturbed: int
) -> list[Tensor]:
    """The velocity for each joined text, in one call; the last `perturbed` of them perturbed."""
    count = len(latents)
    text, mask = joined(count)
    copies = len(mask) // count
    options = {"perturbed": perturbed * count} if perturbed else {}
    velocity = network(latents.repeat(copies, 1, 1, 1), told.repeat(copies), text, mask, **options)
    return list(velocity.to(latents.dtype).split(count))


def _combine(velocities: list[Tensor], how: Guidance) -> tuple[Tensor, Tensor]:
    """v_u + w (v_c - v_u) + p (v_c - v_p), and v_c; what is off is not among `velocities`."""
    perturbed = velocities.pop() if how.perturbation else None
    with_text = velocities.pop()
    pushed = with_text
    if velocities:
        pushed = velocities[0] + how.scale * (with_text - velocities[0])
    if perturbed is not None:
        pushed = pushed + how.perturbation * (with_text - perturbed)
    return pushed, with_text


def distilled(
    network: Network, text: Text, guidance: float, *, prepare: Prepare | None = None
) -> Denoiser:
    """A denoiser for networks that take the guidance scale as an input (Sprint): one evaluation."""
    joined = _joined([text], prepare)

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        scale = torch.full_like(times, guidance)
        velocity = network(latents, times, *joined(len(latents)), guidance=scale)
        return velocity.to(latents.dtype)

    return denoise


def borrow_mask(unconditional: Text, conditional: Text) -> Text:
    """NVIDIA's convention: the unconditional states, seen through the prompt's own mask.

    States behind that mask may be of padding, which then counts, so the encoder must have made as
    many as the prompt has; more are cut.
    """
    length = conditional.mask.shape[1]
    if unconditional.states.shape[1] < length:
        raise ValueError(
            f"the unconditional text has {unconditional.states.shape[1]} states and the prompt's "
            f"mask {length}; encode it with its padding, up to the prompt's length"
        )
    return Text(states=unconditional.states[:, :length], mask=conditional.mask)


def padded(text: Text, length: int) -> Text:
    """The same text with hidden tokens behind it, up to `length`."""
    missing = length - text.mask.shape[1]
    return Text(states=pad(text.states, (0, 0, 0, missing)), mask=pad(text.mask, (0, missing)))


def in_groups(denoiser: Denoiser, size: int) -> Denoiser:
    """The same denoiser, asked about at most `size` latents at a time.

    A matrix product's last bits depend on how many rows it has, so groups of one are what makes a
    picture independent of the batch around it, bit for bit; larger ones use a large device better.
    """

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        pairs = zip(latents.split(size), times.split(size), strict=True)
        return torch.cat([denoiser(latent, time) for latent, time in pairs])

    return denoise


def _for_batch(text: Text, count: int) -> Text:
    if len(text.mask) == count:
        return text
    return Text(states=text.states.expand(count, -1, -1), mask=text.mask.expand(count, -1))
