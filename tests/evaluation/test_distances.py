"""Frechet and kernel distance against closed forms, brute force and torchmetrics."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from numerics import assert_detects, assert_matches
from sana.errors import NumericsError, RequestError
from sana.evaluation.distances import (
    Moments,
    frechet_distance,
    frechet_interval,
    kernel_distance,
    load_moments,
    moments,
    save_moments,
)


def features(count: int, width: int = 8, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, width, generator=generator) @ mixing + shift


def gaussian(mean: list[float], deviations: list[float]) -> Moments:
    return Moments(
        mean=torch.tensor(mean, dtype=torch.float64),
        covariance=torch.tensor(deviations, dtype=torch.float64).square().diag(),
    )


def test_frechet_distance_of_gaussians_by_hand() -> None:
    first, second = gaussian([0, 0], [1, 2]), gaussian([3, 4], [2, 5])
    # 9 + 16 + (1 - 2)^2 + (2 - 5)^2
    assert frechet_distance(first, second) == pytest.approx(35)
    assert frechet_distance(second, second) == pytest.approx(0, abs=1e-9)
    # Turned axes: C2 is [[2, 1], [1, 2]] with roots 3 and 1 of its eigenvalues, C1 the identity.
    turned = Moments(
        mean=torch.zeros(2, dtype=torch.float64),
        covariance=torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64),
    )
    expected = 2 + 4 - 2 * (math.sqrt(3) + 1)
    assert frechet_distance(gaussian([0, 0], [1, 1]), turned) == pytest.approx(expected)


class Given(nn.Module):
    """Features are given instead of pictures."""

    num_features = 8

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_equal_to_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd

    real, drawn = features(300), features(200, seed=1, shift=0.2)
    theirs = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    theirs.update(real.double(), real=True)
    theirs.update(drawn.double(), real=False)
    expected = theirs.compute()

    def check(given: Tensor) -> None:
        # Floor 2e-16.
        got = torch.tensor(frechet_distance(moments(real), moments(given)), dtype=expected.dtype)
        assert_matches(expected, got, 1e-12)

    check(drawn)
    assert_detects(check, drawn * 1.001)
    share, _ = kernel_distance(real[:200], drawn, subset=200, subsets=1)
    assert share.value == pytest.approx(poly_mmd(real[:200].double(), drawn.double()).item())


def test_kernel_distance_by_brute_force() -> None:
    x, y = features(5, 3).double(), features(5, 3, seed=4).double()

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    same = [
        sum(kernel(s[i], s[j]) for i in range(5) for j in range(5) if i != j) / 20 for s in (x, y)
    ]
    expected = sum(same) - 2 * sum(kernel(a, b) for a in x for b in y) / 25
    share, deviation = kernel_distance(x, y, subset=5, subsets=3)
    assert share.value == pytest.approx(expected) and deviation == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
def test_intervals_hold_what_other_draws_give(kind: str) -> None:
    """Of 40 draws from the same source, most fall in the interval of any one of them."""
    reference = features(2000, seed=7)
    known = moments(reference)

    def distance(seed: int) -> tuple[float, float, float]:
        drawn = features(400, seed=seed, shift=0.3)
        if kind == "frechet":
            share = frechet_interval(known, drawn)
        else:
            share, _ = kernel_distance(reference, drawn, subset=200, subsets=20)
        return share.low, share.value, share.high

    found = [distance(seed) for seed in range(40)]
    centre = float(np.mean([value for _, value, _ in found]))
    covered = np.mean([low <= centre <= high for low, _, high in found])
    assert covered > 0.8
    assert all(low < value < high for low, value, high in found)


def test_statistics_files(tmp_path: Path) -> None:
    known = moments(features(50))
    save_moments(tmp_path / "a.npz", known)
    again = load_moments(tmp_path / "a.npz", 8)
    assert_matches(known.covariance, again.covariance, 0)
    assert again.count == 50
    # As pytorch-fid writes it, without a count.
    np.savez(tmp_path / "b.npz", mu=known.mean.numpy(), sigma=known.covariance.numpy())
    assert load_moments(tmp_path / "b.npz", 8).count is None
    with pytest.raises(RequestError, match="network gives 9 features"):
        load_moments(tmp_path / "b.npz", 9)
    (tmp_path / "c.npz").write_bytes(b"no")
    with pytest.raises(RequestError, match="holds no statistics"):
        load_moments(tmp_path / "c.npz", 8)


def test_nan_is_refused() -> None:
    broken = features(10)
    broken[3, 2] = math.nan
    with pytest.raises(NumericsError, match="NaN features"):
        moments(broken)
