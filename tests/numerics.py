"""How numbers are compared in this project's tests: one distance, one check, one planted fault.

A bound is at most ten times the floor measured on the day it was written, and the floor stands
beside it in the test's parameter list. A check that passes a planted fault proves nothing, so
every numeric test also calls `assert_detects`. Start reading at `assert_matches`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def rel_rms(reference: Tensor, got: Tensor) -> float:
    """RMS of the difference over RMS of the reference, in fp64; 0 for two empty tensors.

    A reference of zeros gives 0 when `got` is zero too and infinity otherwise.
    """
    wide = reference.detach().to("cpu", torch.float64)
    difference = got.detach().to("cpu", torch.float64) - wide
    if wide.numel() == 0:
        return 0.0
    size = wide.square().mean().sqrt().item()
    error = difference.square().mean().sqrt().item()
    if size == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / size


def assert_matches(reference: Tensor, got: Tensor, bound: float) -> None:
    """Fail on NaN or infinity, on another shape or dtype, and on `rel_rms` over `bound`.

    The measured value is printed, so that a passing run (`pytest -s`) shows the floor.
    """
    if reference.shape != got.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, expected {tuple(reference.shape)}")
    if reference.dtype != got.dtype:
        raise AssertionError(f"dtype {got.dtype}, expected {reference.dtype}")
    for name, tensor in (("reference", reference), ("result", got)):
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise AssertionError(f"{name} has {bad} of {tensor.numel()} values not finite")
    measured = rel_rms(reference, got)
    print(f"rel_rms {measured:.3e} (bound {bound:.1e})")
    if measured > bound:
        raise AssertionError(f"rel_rms {measured:.3e} is over the bound {bound:.1e}")


def assert_detects(check: Callable[[T], object], fault: T) -> None:
    """Run `check` on a planted `fault` and fail if the check still passes.

    `check` is what the test asserts, as a function of the thing under test; `fault` is that
    thing with one small mistake (one weight scaled by 1.01, one gate dropped, one time shifted).
    Only an AssertionError counts as detection: any other exception is a fault of the test.
    """
    try:
        check(fault)
    except AssertionError:
        return
    raise AssertionError("the check passed a planted fault: it proves nothing")
