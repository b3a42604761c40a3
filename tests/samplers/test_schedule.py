"""The grids, to every digit that family-spec.md 6.1, 6.2 and papers.md 2.5 print."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.samplers import euler_times, flow_times, truncated
from sana.samplers.schedule import shifted

WHOLE = {
    3.0: "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136",
    6.0: "999 991 981 971 959 947 933 917 899 879 856 830 799 763 719 666 599 513 399 239",
}


@pytest.mark.parametrize("shift", WHOLE)
def test_network_sees_the_printed_times(shift: float) -> None:
    expected = [float(word) for word in WHOLE[shift].split()]

    def check(times: Tensor) -> None:
        assert (truncated(times)[:-1] * 1000).round().tolist() == expected

    check(flow_times(20, shift))
    assert_detects(check, flow_times(20, shift * 1.01))
    assert_detects(check, flow_times(21, shift)[1:])


def test_flow_times_are_the_printed_sigmas() -> None:
    times = flow_times(20, 3.0)
    assert times.dtype == torch.float32
    assert times.shape == (21,)
    printed = [0.999666, 0.982420, 0.963941, 0.944094, 0.345888, 0.249792, 0.136240, 0.0]
    picked = torch.cat([times[:4], times[-4:]])
    assert torch.allclose(picked, torch.tensor(printed), atol=6e-7, rtol=0)


def test_euler_times_are_the_printed_ones() -> None:
    printed = torch.tensor([1000, 981.875, 962.386, 266.330, 149.787, 8.929, 0])

    def check(times: Tensor) -> None:
        picked = 1000 * torch.cat([times[:3], times[-4:]])
        assert torch.allclose(picked, printed, atol=6e-4, rtol=0)

    check(euler_times(20, 3.0))
    assert_detects(check, euler_times(20, 3.01))
    assert_detects(check, shifted(torch.linspace(1, 0, 21), 3.0))


@pytest.mark.parametrize("grid", [flow_times, euler_times])
@pytest.mark.parametrize("steps", [1, 2, 3, 63, 100, 200])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_times_fall_from_noise_to_zero(grid, steps: int, shift: float) -> None:  # type: ignore[no-untyped-def]
    times = grid(steps, shift)
    assert times.shape == (steps + 1,)
    assert times[-1] == 0
    assert 0.99 < times[0] <= 1
    assert bool((times.diff() < 0).all())


def test_shift_keeps_the_ends_and_inverts() -> None:
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    there = shifted(times, 3.0)
    assert there[0] == 0
    assert there[-1] == 1
    assert_matches(times, shifted(there, 1 / 3), 1e-15)  # floor 1.1e-16
    assert_detects(lambda s: assert_matches(times, shifted(there, s), 1e-15), 1 / 3.0001)


def test_truncated_is_whole_thousandths_at_or_below() -> None:
    every = torch.arange(1000, dtype=torch.float64) / 1000
    assert torch.equal(truncated(every.float()), every.float())
    between = torch.tensor([0.9996663, 0.5004999, 0.0009])
    assert truncated(between).tolist() == torch.tensor([0.999, 0.5, 0.0]).tolist()
    assert truncated(between).dtype == between.dtype


@pytest.mark.parametrize("steps, shift", [(0, 3.0), (-1, 3.0), (20, 0.0), (20, float("nan"))])
@pytest.mark.parametrize("grid", [flow_times, euler_times])
def test_impossible_grids_are_refused(grid, steps: int, shift: float) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="steps is|shift is"):
        grid(steps, shift)
