"""PSNR by hand, SSIM against its formula written as a loop over windows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.models.metrics import psnr, ssim


def test_psnr_by_hand() -> None:
    black = torch.full((2, 3, 4, 4), -1.0)
    other = black.clone()
    other[1] += 0.2  # a tenth of the range
    expected = torch.tensor([120.0, 20.0])
    assert_matches(expected, psnr(black, other), 1e-6)
    assert_detects(lambda got: assert_matches(expected, got, 1e-6), psnr(black, other * 1.01))


# Floor measured 2026-11: 4e-7.
@pytest.mark.parametrize("bound", [4e-6])
def test_ssim_is_the_formula(bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2, 3, 13, 15, generator=generator) * 2 - 1
    second = (first + 0.3 * torch.randn(first.shape, generator=generator)).clamp(-1, 1)
    expected = _ssim_by_windows(first.double(), second.double()).float()

    def check(got: Tensor) -> None:
        assert_matches(expected, got, bound)

    check(ssim(first, second))
    assert_detects(check, ssim(first, second * 1.01))
    assert_matches(torch.ones(2), ssim(first, first), 1e-6)


def _ssim_by_windows(first: Tensor, second: Tensor) -> Tensor:
    a, b = (first + 1) / 2, (second + 1) / 2
    weights = torch.tensor(
        [[math.exp(-(x * x + y * y) / 4.5) for x in range(-5, 6)] for y in range(-5, 6)],
        dtype=torch.float64,
    )
    weights /= weights.sum()
    values = []
    for top in range(a.shape[2] - 10):
        for left in range(a.shape[3] - 10):
            p, q = (x[:, :, top : top + 11, left : left + 11] for x in (a, b))
            mean_p, mean_q = (weights * p).sum((2, 3)), (weights * q).sum((2, 3))
            var_p = (weights * (p - mean_p[..., None, None]) ** 2).sum((2, 3))
            var_q = (weights * (q - mean_q[..., None, None]) ** 2).sum((2, 3))
            both = (weights * p * q).sum((2, 3)) - mean_p * mean_q
            values.append(
                (2 * mean_p * mean_q + 1e-4)
                * (2 * both + 9e-4)
                / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4))
            )
    return torch.stack(values).mean((0, 2))
