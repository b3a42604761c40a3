"""Many prompts to many pictures, batched on the model's device: every benchmark starts here.

The pipeline draws one picture at a time so that it is bit-equal in any company; here whole batches
go through the networks, in mixed precision on a GPU. Noise is still drawn on the CPU, from one seed
for each picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sana.errors import NumericsError
from sana.samplers import METHODS, Text, guided, run
from sana.weights.load import Components

Draw: TypeAlias = Callable[[Sequence[str], Sequence[int]], Tensor]
"""(prompts, one seed each) -> pictures [B, 3, H, W] in -1..1."""

DECODED = 16
"""Pictures that are decoded at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How pictures are drawn; None stands for the model's default."""

    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    sampler: str | None = None
    size: int | None = None
    batch: int = 100


def drawer(components: Components, settings: Settings) -> Draw:
    """A function that draws prompts with `components` in batches; pictures come on the CPU."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        parts = []
        for start in range(0, len(prompts), settings.batch):
            part = slice(start, start + settings.batch)
            parts.append(_draw(components, settings, prompts[part], seeds[part]).cpu())
        return torch.cat(parts)

    return draw


@torch.inference_mode()
def draw_latents(
    components: Components,
    settings: Settings,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    is_exact: bool = False,
) -> Tensor:
    """The normalized latents [B, C, h, w] that the pictures are decoded from, in one batch.

    `is_exact` draws in fp32 on a GPU too.
    """
    defaults = components.config.sampling
    method = METHODS[settings.sampler or defaults.sampler]
    times = method.times(settings.steps or defaults.steps, settings.shift or defaults.shift)
    noise = _noise(components, settings, seeds)
    with exact() if is_exact else mixed(noise.device):
        sampler = method.start(noise, times)
        whole = method.takes_integer_times and defaults.integer_times
        denoiser = guided(
            components.dit.denoise,
            _embed(components, prompts),
            _embed(components, [""]),
            defaults.guidance if settings.guidance is None else settings.guidance,
            integer_times=whole,
        )
        latent = noise
        for step in run(sampler, denoiser):
            latent = step.latent
    return latent


@torch.inference_mode()
def rebuild(components: Components, images: Tensor, *, is_exact: bool = False) -> Tensor:
    """Pictures (B, 3, H, W) in -1..1 through the autoencoder and back, as `drawer` decodes.

    `is_exact` computes in fp32 on a GPU too, without TensorFloat-32.
    """
    autoencoder = components.autoencoder
    with exact() if is_exact else mixed(images.device):
        parts = [
            autoencoder.decode(autoencoder.encode(part)).float() for part in images.split(DECODED)
        ]
    return torch.cat(parts).clamp(-1, 1)


@torch.inference_mode()
def _draw(
    components: Components, settings: Settings, prompts: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    latent = draw_latents(components, settings, prompts, seeds)
    with mixed(latent.device):
        latent = components.autoencoder.denormalize(latent)
        pictures = torch.cat(
            [components.autoencoder.decode(z).float().clamp(-1, 1) for z in latent.split(DECODED)]
        )
    if not bool(torch.isfinite(pictures).all()):
        raise NumericsError(
            f"some of {len(pictures)} pictures have NaN pixels; every stage must stay finite, so "
            "look at the weights, or draw in float32"
        )
    return pictures


def _embed(components: Components, prompts: Sequence[str]) -> Text:
    device = next(components.dit.parameters()).device
    encoded = components.text.encode(prompts)
    states, mask = encoded.states.to(device), encoded.mask.to(device)
    return Text(states=components.dit.embed_text(states, mask), mask=mask)


def _noise(components: Components, settings: Settings, seeds: Sequence[int]) -> Tensor:
    config = components.config
    side = (settings.size or config.pixels) // config.autoencoder.factor
    shape = (config.dit.latent_channels, side, side)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(noise).to(next(components.dit.parameters()).device)


def mixed(device: torch.device) -> Any:
    """bf16 autocast on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def exact() -> Any:
    """Convolutions without TensorFloat-32, which torch allows them unasked."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
