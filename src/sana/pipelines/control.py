"""The control picture: edges of a photograph by HED or Canny, white on black, or ready as given.

Canny (IEEE PAMI 8(6), 1986) is written out here: blur, gradient, thinning across the edge, two
thresholds joined by hysteresis. Start reading at `control_pixels`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sana.weights.hed import load_hed

BLUR = 1.4
LOW, HIGH = 0.02, 0.05
"""Slopes after the blur, 1 being black to white in one pixel: kept if joined, kept in any case."""
_LUMA = (0.299, 0.587, 0.114)


def control_pixels(pixels: Tensor, detector: str) -> Tensor:
    """Pixels [1,3,H,W] in -1..1 -> the control picture in the same form.

    Raises `MissingExtra` for `hed` where its file has not been made.
    """
    if detector == "none":
        return pixels
    edges = load_hed()(pixels) if detector == "hed" else canny(pixels)
    return (2 * edges - 1).expand(-1, 3, -1, -1)


def canny(pixels: Tensor) -> Tensor:
    """Edges [B,1,H,W], 0 or 1 and one pixel wide, of pixels [B,3,H,W] in -1..1."""
    grey = (pixels.float() * torch.tensor(_LUMA)[:, None, None]).sum(1, keepdim=True) / 2
    slope = _slope(_blurred(grey))
    size = slope.square().sum(1, keepdim=True).sqrt()
    thin = size * _is_crest(size, slope)
    edges, strong = torch.zeros_like(thin), (thin >= HIGH).float()
    weak = (thin >= LOW).float()
    while not torch.equal(edges, strong):
        edges = strong
        strong = F.max_pool2d(edges, 3, stride=1, padding=1) * weak
    return edges


def _blurred(grey: Tensor) -> Tensor:
    places = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-places.square() / (2 * BLUR**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(grey, (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])


def _slope(grey: Tensor) -> Tensor:
    """Sobel's gradient [B,2,H,W], x and y, scaled so that a slope of 1 a pixel is 1."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    return F.conv2d(
        F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.stack([across, across.T])[:, None]
    )


def _is_crest(size: Tensor, slope: Tensor) -> Tensor:
    """Whether the slope is steepest here, among its two neighbours across the edge."""
    x, y = slope.split(1, dim=1)
    # Eighths of a turn: 0 along x, 2 along y, 1 and 3 the diagonals.
    way = (torch.atan2(y, x) / (torch.pi / 4)).round().long() % 4
    padded = F.pad(size, (1, 1, 1, 1))
    height, width = size.shape[-2:]

    def shifted(down: int, right: int) -> Tensor:
        return padded[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    crest = torch.zeros_like(size, dtype=torch.bool)
    for number, (down, right) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        # Strict on one side alone, so that of two equal neighbours one stays.
        is_top = (size > shifted(down, right)) & (size >= shifted(-down, -right))
        crest |= (way == number) & is_top
    return crest
