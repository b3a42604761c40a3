"""A quick look at a latent without its decoder: a linear projection of each cell to 4 x 4 colours.

The coefficients are fitted to an autoencoder by least squares, on smooth pictures that it encodes,
when they are first wanted: the same pictures every time, so the same coefficients, and none to go
stale beside replaced weights. Start reading at `fit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

DETAIL = 4
"""Preview pixels along each side of a latent cell."""
PICTURES = 16
CELLS = 8
SHAPES = 8
RIDGE = 1e-4
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """From latent channels to the colours of a cell: [C + 1, 3 D D], the last row for a 1."""

    weight: Tensor

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, D h, D w] in about -1..1 of normalized latents [B, C, h, w]."""
        weight = self.weight.to(latents.device)
        cells = _with_one(latents) @ weight
        return F.pixel_shuffle(cells.permute(0, 3, 1, 2), DETAIL)


def fit(encode: Callable[[Tensor], Tensor], factor: int) -> Projection:
    """The projection for `encode`, pixels [1,3,H,W] -> latent; takes sixteen small encodings."""
    generator = torch.Generator().manual_seed(SEED)
    inputs, wanted = [], []
    for _ in range(PICTURES):
        pixels = smooth_picture(CELLS * factor, generator)
        small = F.adaptive_avg_pool2d(pixels, CELLS * DETAIL)
        wanted.append(F.pixel_unshuffle(small, DETAIL).permute(0, 2, 3, 1).flatten(0, 2))
        inputs.append(_with_one(encode(pixels).float().cpu()).flatten(0, 2))
    x, y = torch.cat(inputs).double(), torch.cat(wanted).double()
    ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    ridge[-1, -1] = 1e-9  # the mean is not held back
    return Projection(weight=torch.linalg.solve(x.T @ x + ridge, x.T @ y).float())


def smooth_picture(side: int, generator: torch.Generator) -> Tensor:
    """Pixels [1,3,S,S] in -1..1: a soft field of colours, and ellipses with soft rims on it."""
    field = torch.rand(1, 3, 3, 3, generator=generator)
    picture = F.interpolate(field, size=(side, side), mode="bicubic")
    axis = torch.linspace(-1, 1, side)
    for _ in range(SHAPES):
        color = torch.rand(3, 1, 1, generator=generator)
        x, y = (2 * torch.rand(2, generator=generator) - 1).tolist()
        wide, high = (0.05 + 0.4 * torch.rand(2, generator=generator)).tolist()
        across, down = ((axis - x) / wide).square(), ((axis - y) / high).square()
        cover = (8 * (1 - across[None, :] - down[:, None])).clamp(0, 1)
        picture = torch.lerp(picture, color, cover)
    return 2 * picture.clamp(0, 1) - 1


def _with_one(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h, w, C + 1]."""
    return F.pad(latents.float().permute(0, 2, 3, 1), (0, 1), value=1.0)
