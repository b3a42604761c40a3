"""Times at which a sampler evaluates the flow: from almost pure noise (1) down to the picture (0).

The shift f maps a time t to f t / (1 + (f - 1) t), Stable Diffusion 3's correction for resolution.
`flow_times` is Flow-DPM-Solver's grid, `euler_times` that of the flow Euler scheduler, `scm_times`
Sprint's; they follow family-spec.md 6.1 to 6.3 to the last digit that is printed there. Computed in
fp64 on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRAIN_STEPS = 1000
"""Noise levels of the training table; a time that the network is told is a multiple of 1/1000."""

LARGEST_ANGLE = 1.57080
MIDDLE_ANGLE = 1.3
"""Of Sprint, in TrigFlow; a right angle is pure noise."""


def shifted(times: Tensor, shift: float) -> Tensor:
    """f t / (1 + (f - 1) t); 0 and 1 stay, shift > 1 moves all else towards noise."""
    return shift * times / (1 + (shift - 1) * times)


def flow_times(steps: int, shift: float) -> Tensor:
    """Flow-DPM-Solver's grid (papers.md 2.5): fp32 [steps + 1], from just under 1 down to 0.

    The first time is below 1, where the log signal-to-noise ratio would be infinite.
    """
    _check(steps, shift)
    uniform = 1 - torch.linspace(1, 1 / TRAIN_STEPS, steps + 1, dtype=torch.float64)
    descending = shifted(uniform, shift).flip(0)[:-1]
    return torch.cat([descending, descending.new_zeros(1)]).float()


def euler_times(steps: int, shift: float) -> Tensor:
    """The flow Euler grid (family-spec.md 6.2): fp32 [steps + 1], from exactly 1 down to 0.

    The shift acts twice, as in the official scheduler: once on the training table, whose ends bound
    the grid, and once more on the grid.
    """
    _check(steps, shift)
    table = torch.tensor([1.0, 1 / TRAIN_STEPS], dtype=torch.float64)
    highest, lowest = shifted(table, shift).tolist()
    grid = shifted(torch.linspace(highest, lowest, steps, dtype=torch.float64), shift)
    return torch.cat([grid, grid.new_zeros(1)]).float()


def scm_times(steps: int, shift: float = 1.0) -> Tensor:
    """Sprint's grid (family-spec.md 6.3): fp32 [steps + 1], angles as times of the flow, down to 0.

    Two steps have a middle angle of their own, other counts divide the range evenly. The first time
    is just over 1, because the largest angle is just over a right one. A shift is refused.
    """
    _check(steps, shift)
    if shift != 1:
        raise ValueError(f"shift is {shift}; Sprint's angles take no shift: leave it at 1")
    angles = torch.linspace(LARGEST_ANGLE, 0, steps + 1, dtype=torch.float64)
    if steps == 2:
        angles[1] = MIDDLE_ANGLE
    return torch.tensor([_time_of(angle) for angle in angles.tolist()])


def first_step(steps: int, strength: float) -> int:
    """Where image-to-image enters a grid of `steps`: at times[first_step], so for strength 1 at 0.

    A strength too small for one step gives `steps`, the end of the grid (family-spec.md 5).
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it goes from 0 to 1")
    return int(steps - steps * strength)


def truncated(times: Tensor) -> Tensor:
    """trunc(1000 t) / 1000: the time that a network trained on integer times is told.

    Times are fp32, whose rounding reaches 3e-5 after the multiplication; the nudge keeps a time
    that stands for a whole number from falling to the one below.
    """
    whole = torch.floor(times.double() * TRAIN_STEPS + 1e-4)
    return (whole / TRAIN_STEPS).to(times.dtype)


def _check(steps: int, shift: float) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; a schedule takes at least 1")
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be positive, and 1 means no shift")


def _time_of(angle: float) -> float:
    """u = sin t / (cos t + sin t), the flow's time with the signal-to-noise ratio of the angle."""
    return math.sin(angle) / (math.cos(angle) + math.sin(angle))
