"""Sampler claims on a trained model: how far from the exact solution after so many steps?

All schedules and samplers solve one equation, so one reference, second order in many steps, serves
them all; the distance to it is an error of the solver alone. Sana's claim: Flow-DPM-Solver needs 14
to 20 steps where Euler needs 28 to 50.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sana.data.stickers.prompts import held_out_prompts
from sana.data.stickers.world import World
from sana.evaluation.sample import Settings, draw_latents
from sana.weights.load import Components

REFERENCE_STEPS = 100
CASE_SEED = 11
"""Chooses the prompts; not those of the graded list."""


class Setting(NamedTuple):
    """One way to draw."""

    sampler: str
    shift: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """Relative RMS distances of one setting's latents from the reference, one for each picture."""

    setting: Setting
    errors: tuple[float, ...]


SOLVERS = tuple(
    Setting(sampler, shift, steps)
    for shift in (3.0, 1.0)
    for steps in (4, 6, 10, 20, 50)
    for sampler in ("dpm", "euler")
    if steps < 50 or shift == 3.0
)
SHIFTS = tuple(
    Setting("dpm", shift, steps) for steps in (6, 10, 20) for shift in (1.0, 2.0, 3.0, 4.0)
)


def prompts_of(world: World, count: int) -> list[str]:
    """The first prompts of a list that nothing else uses, all six kinds in turn."""
    return [case.prompt for case in held_out_prompts(world, count, CASE_SEED)]


def measure(
    components: Components,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sequence[Setting],
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[Distance]:
    """The distance of every setting, each as soon as it is known; prompts and seeds go in pairs."""

    def draw(setting: Setting) -> Tensor:
        how = Settings(sampler=setting.sampler, shift=setting.shift, steps=setting.steps)
        return draw_latents(components, how, prompts, seeds, is_exact=True).float()

    shift = components.config.sampling.shift
    exact = draw(Setting("dpm", shift, REFERENCE_STEPS))
    report(f"reference: dpm, shift {shift:g}, {REFERENCE_STEPS} steps")
    for setting in dict.fromkeys(settings):
        errors = relative_errors(exact, draw(setting))
        report(
            f"{setting.sampler}, shift {setting.shift:g}, {setting.steps} steps: "
            + " ".join(f"{error:.4f}" for error in errors)
        )
        yield Distance(setting=setting, errors=tuple(errors))


def relative_errors(exact: Tensor, got: Tensor) -> list[float]:
    """RMS of the difference over RMS of the reference, for each of [B, C, h, w]."""
    parts = ((got - exact).flatten(1), exact.flatten(1))
    difference, size = (part.double().square().mean(1).sqrt() for part in parts)
    errors: list[float] = torch.where(size > 0, difference / size, difference).tolist()
    return errors
