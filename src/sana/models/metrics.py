"""How close one picture is to another: PSNR, and SSIM after Wang et al. 2004, eq. 13.

Both take pictures in -1..1 and give one number for each picture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 11
SIGMA = 1.5
# (0.01 L)^2 and (0.03 L)^2 for a range L of 1: the paper's guards against division by zero.
C1, C2 = 0.01**2, 0.03**2


def psnr(reference: Tensor, got: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (B, 3, H, W) -> (B,); at most 120."""
    error = (reference.float() - got.float()).div(2).pow(2).flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-12))


def ssim(reference: Tensor, got: Tensor) -> Tensor:
    """Structural similarity of each picture, (B, 3, H, W) -> (B,), Gaussian window with sigma 1.5.

    Borders without a full window are left out, so both sides are at least 11.
    """
    first, second = (reference.float() + 1) / 2, (got.float() + 1) / 2
    line = _window(first.device)
    mean_a, mean_b = _blur(first, line), _blur(second, line)
    var_a = _blur(first * first, line) - mean_a**2
    var_b = _blur(second * second, line) - mean_b**2
    covariance = _blur(first * second, line) - mean_a * mean_b
    score = ((2 * mean_a * mean_b + C1) * (2 * covariance + C2)) / (
        (mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2)
    )
    return score.flatten(1).mean(1)


def _window(device: torch.device) -> Tensor:
    offsets = torch.arange(WINDOW, device=device, dtype=torch.float32) - WINDOW // 2
    line = torch.exp(-offsets.pow(2) / (2 * SIGMA**2))
    return line / line.sum()


def _blur(images: Tensor, line: Tensor) -> Tensor:
    channels = images.shape[1]
    rows = F.conv2d(images, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
