"""How well an autoencoder keeps pictures that it was not trained on: PSNR and SSIM by kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sana.data.stickers.scene import KINDS, Kind
from sana.data.stickers.stream import Studio
from sana.models.metrics import psnr, ssim

BATCH = 16
SEED = 0x7E57
"""Of the draws; training runs use small seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Means over `count` pictures; `worst` is the lowest PSNR, of draw number `worst_index`."""

    psnr: float
    ssim: float
    worst: float
    worst_index: int
    count: int


def autoencoder_quality(
    round_trip: Callable[[Tensor], Tensor],
    studio: Studio,
    *,
    count: int = 64,
    size: int = 512,
) -> dict[str, Quality]:
    """Quality of `round_trip` on `count` held-out draws of each kind, and over "all" of them."""
    found = rebuilt_values(round_trip, studio, count=count, size=size)
    qualities = {kind: _quality(*values) for kind, values in found.items()}
    first, second = zip(*found.values(), strict=True)
    return qualities | {"all": _quality(torch.cat(first), torch.cat(second))}


@torch.inference_mode()
def rebuilt_values(
    round_trip: Callable[[Tensor], Tensor], studio: Studio, *, count: int, size: int
) -> dict[Kind, tuple[Tensor, Tensor]]:
    """PSNR and SSIM of each of `count` held-out draws, by kind.

    `round_trip` takes and gives pictures (B, 3, size, size) in -1..1 on the renderer's device; what
    it gives is clamped to that range and rounded to 8 bits, as a saved picture is.
    """
    found: dict[Kind, tuple[Tensor, Tensor]] = {}
    for kind in KINDS:
        pairs = []
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            scenes = [
                studio.composer.draw(i, seed=SEED, split="held_out", kind=kind) for i in numbers
            ]
            images = studio.renderer.render(scenes, size).contiguous()
            rebuilt = _rounded(round_trip(images).float())
            pairs.append((psnr(images, rebuilt), ssim(images, rebuilt)))
        first, second = zip(*pairs, strict=True)
        found[kind] = torch.cat(first), torch.cat(second)
    return found


def _rounded(pictures: Tensor) -> Tensor:
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def _quality(decibels: Tensor, similarity: Tensor) -> Quality:
    worst = int(decibels.argmin())
    return Quality(
        psnr=decibels.mean().item(),
        ssim=similarity.mean().item(),
        worst=decibels[worst].item(),
        worst_index=worst,
        count=len(decibels),
    )
