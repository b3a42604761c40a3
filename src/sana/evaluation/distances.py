"""How far two sets of pictures are apart, by their features: Frechet and kernel distance.

Frechet (Heusel et al. 2017, eq. 6) compares means and covariances, kernel (Binkowski et al. 2018,
eq. 4) is an unbiased squared maximum mean discrepancy. With Inception's features of 2015 these are
FID and KID; with any others they must not be called so. Written here rather than taken from
torchmetrics, which the tests compare with, because the intervals need each many times.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sana.errors import NumericsError, RequestError
from sana.evaluation.report import Share

ROUNDS = 20
"""Resamples of a Frechet distance; each takes seconds at 2048 features."""
SUBSETS, SUBSET = 100, 1000
"""KID as published: the mean over so many subsets of so many pictures."""
NORMAL = 1.96


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Mean (D,) and unbiased covariance (D, D) in fp64."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    """How many pictures; None where a file does not say."""


def moments(features: Tensor) -> Moments:
    """Of features (N, D); `NumericsError` if any is NaN."""
    if not bool(torch.isfinite(features).all()):
        raise NumericsError(
            "the network gave NaN features; look at its weights, or compute on the CPU"
        )
    wide = features.double()
    mean = wide.mean(0)
    centred = wide - mean
    covariance = centred.T @ centred / (len(wide) - 1)
    return Moments(mean=mean, covariance=covariance, count=len(wide))


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the root by way of C1^(1/2) C2 C1^(1/2)."""
    return _distance_to(first, _root(first.covariance), second)


def frechet_interval(reference: Moments, features: Tensor, *, seed: int = 0) -> Share:
    """The distance of features (N, D) with an interval of 1.96 deviations over resampled pictures.

    Resampling repeats pictures, which shrinks the covariance and raises every resampled distance
    alike; so only their spread is used, around the distance itself.
    """
    root = _root(reference.covariance)
    value = _distance_to(reference, root, moments(features))
    random = np.random.default_rng(seed)
    again = []
    for _ in range(ROUNDS):
        picks = torch.from_numpy(random.integers(0, len(features), len(features)))
        again.append(_distance_to(reference, root, moments(features[picks.to(features.device)])))
    half = NORMAL * float(np.std(again, ddof=1))
    return Share(value=value, low=max(0.0, value - half), high=value + half, count=len(features))


def kernel_distance(
    reference: Tensor,
    features: Tensor,
    *,
    subset: int = SUBSET,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> tuple[Share, float]:
    """Mean over random subsets of both, with its interval; and the deviation between subsets.

    The interval resamples the drawn pictures' own contributions to the distance of all pictures,
    h(x) = mean k(x, x') - mean k(x, y), of which a mean counts twice in the distance.
    """
    least = min(len(reference), len(features))
    assert least >= subset, "checked by the caller"
    random = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        picks = [random.choice(len(x), subset, replace=False) for x in (reference, features)]
        x, y = (f[torch.from_numpy(p)] for f, p in zip((reference, features), picks, strict=True))
        values.append(_mmd(x.double(), y.double()))
    value = float(np.mean(values))
    parts = _contributions(reference, features).numpy()
    rounds = parts[random.integers(0, len(parts), (2000, len(parts)))].mean(1) - parts.mean()
    low, high = np.quantile(2 * rounds, (0.025, 0.975))
    share = Share(value=value, low=value + float(low), high=value + float(high), count=len(parts))
    return share, float(np.std(values))


def save_moments(path: Path, known: Moments) -> None:
    """Write them as pytorch-fid does, `mu` and `sigma`, with the count beside."""
    count = -1 if known.count is None else known.count
    with path.open("wb") as file:
        np.savez(file, mu=known.mean.numpy(), sigma=known.covariance.numpy(), count=count)


def load_moments(path: Path, width: int) -> Moments:
    """Read a file of `mu` and `sigma` of so many features; raises `RequestError`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
            count = int(file["count"]) if "count" in file else -1
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise RequestError(
            f"{path} holds no statistics ({error}); give a folder of pictures, or an .npz with mu "
            "and sigma as pytorch-fid writes it"
        ) from None
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise RequestError(
            f"{path} has mu of {tuple(mean.shape)} and the network gives {width} features; take "
            "statistics of the same network, or give the folder of pictures"
        )
    return Moments(mean=mean, covariance=covariance, count=count if count > 0 else None)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _distance_to(reference: Moments, root: Tensor, other: Moments) -> float:
    product = root @ other.covariance.to(root.device) @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    gap = (reference.mean - other.mean).square().sum()
    traces = reference.covariance.trace() + other.covariance.trace()
    return max(0.0, float(gap + traces - 2 * shared))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x y / D + 1)^3, as published."""
    kernel: Tensor = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def _mmd(x: Tensor, y: Tensor) -> float:
    n, m = len(x), len(y)
    within_x, within_y = _kernel(x, x), _kernel(y, y)
    first = (within_x.sum() - within_x.trace()) / (n * (n - 1))
    second = (within_y.sum() - within_y.trace()) / (m * (m - 1))
    return float(first + second - 2 * _kernel(x, y).mean())


def _contributions(reference: Tensor, features: Tensor, block: int = 1000) -> Tensor:
    """h of each drawn picture; the kernel is made a block at a time."""
    found = []
    for start in range(0, len(features), block):
        part = features[start : start + block].double()
        within = torch.zeros(len(part), dtype=torch.float64)
        across = torch.zeros(len(part), dtype=torch.float64)
        for other in features.split(block):
            within += _kernel(part, other.double()).sum(1)
        for other in reference.split(block):
            across += _kernel(part, other.double()).sum(1)
        within -= (part.square().sum(1) / part.shape[1] + 1) ** 3
        found.append(within / (len(features) - 1) - across / len(reference))
    return torch.cat(found)
