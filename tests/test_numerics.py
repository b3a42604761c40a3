"""The helper that judges every other number must itself be right."""

from __future__ import annotations

import pytest
import torch

from numerics import assert_detects, assert_matches, rel_rms


def test_rel_rms_is_the_ratio_of_rms_values() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert rel_rms(reference, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert rel_rms(reference, reference) == 0.0


def test_rel_rms_of_a_zero_reference() -> None:
    zeros = torch.zeros(3)
    assert rel_rms(zeros, zeros) == 0.0
    assert rel_rms(zeros, torch.ones(3)) == float("inf")
    assert rel_rms(torch.zeros(0), torch.zeros(0)) == 0.0


def test_rel_rms_works_in_fp64() -> None:
    reference = torch.ones(2, dtype=torch.float64)
    assert rel_rms(reference, reference + 1e-12) == pytest.approx(1e-12, rel=1e-3)


def test_matches_accepts_within_the_bound() -> None:
    assert_matches(torch.ones(63), torch.ones(63) * 1.001, 1.1e-3)


@pytest.mark.parametrize(
    "fault",
    [
        torch.ones(63) * 1.01,
        torch.ones(63, dtype=torch.float64),
        torch.ones(1, 63),
        torch.full((63,), float("nan")),
        torch.full((63,), float("inf")),
    ],
    ids=["value", "dtype", "shape", "nan", "inf"],
)
def test_matches_refuses(fault: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_matches(torch.ones(63), fault, 1e-3)


def test_matches_refuses_a_reference_of_nan() -> None:
    nans = torch.full((3,), float("nan"))
    with pytest.raises(AssertionError, match="reference"):
        assert_matches(nans, nans, 1.0)


def test_detects_is_quiet_about_a_check_that_fails_on_the_fault() -> None:
    assert_detects(lambda got: assert_matches(torch.ones(3), got, 1e-3), torch.ones(3) * 1.01)


def test_detects_refuses_a_check_that_passes_everything() -> None:
    with pytest.raises(AssertionError, match="planted fault"):
        assert_detects(lambda got: None, torch.ones(3))


def test_detects_lets_other_errors_through() -> None:
    def broken(got: torch.Tensor) -> None:
        raise KeyError("a fault of the test, not a detection")

    with pytest.raises(KeyError):
        assert_detects(broken, torch.ones(3))
