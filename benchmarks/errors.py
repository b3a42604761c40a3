"""How far results of benchmarks are from exact ones."""

from __future__ import annotations

from torch import Tensor


def rel_rms(exact: Tensor, got: Tensor) -> float:
    """RMS of the difference over RMS of the reference; NaN where anything is."""
    exact = exact.double()
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
