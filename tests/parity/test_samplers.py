"""Samplers against diffusers' schedulers: times, and whole ways over the same velocity function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from parity.pairs import draw
from sana.samplers import dpm, euler, euler_times, flow_times, run, scm, scm_times, truncated

pytestmark = [
    pytest.mark.parity,
    # diffusers' DPM-Solver passes tensors to numpy in a way that numpy 2 deprecates.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"),
]

LATENT = draw(2, 3, 4, 5, seed=0)
NOISES = [draw(2, 3, 4, 5, seed=seed) for seed in range(1, 6)]
COUNTS = pytest.mark.parametrize("steps", [1, 2, 3, 14, 20, 50])
# Not 1: in three steps its last time is 333 exactly, which the peer's fp64 makes 332.
SHIFTS = pytest.mark.parametrize("shift", [1.5, 3.0, 4.0, 6.0])


def velocity(latents: Tensor, times: Tensor) -> Tensor:
    """Any smooth function of latent and time."""
    return (1.3 * latents).sin() + times.reshape(-1, 1, 1, 1) * latents.roll(1, -1)


def at(latents: Tensor, time: float) -> Tensor:
    return velocity(latents, torch.full((len(latents),), time))


@COUNTS
@SHIFTS
def test_dpm(steps: int, shift: float) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    scheduler.set_timesteps(steps)
    latents = LATENT
    for t in scheduler.timesteps:
        latents = scheduler.step(at(latents, t.item() / 1000), t, latents).prev_sample

    def told(x: Tensor, times: Tensor) -> Tensor:
        return velocity(x, truncated(times))

    def check(times: Tensor) -> None:
        *_, last = run(dpm(LATENT, times), told)
        assert_matches(latents, last.latent, 1e-6)  # floor 8.8e-7, after 50 steps

    times = flow_times(steps, shift)
    assert_matches(scheduler.sigmas, times, 1e-7)  # floor 1e-8
    assert torch.equal((truncated(times[:-1]) * 1000).round().long(), scheduler.timesteps)
    check(times)
    assert_detects(check, torch.cat([times[:1] * 0.99, times[1:]]))
    if steps > 2:  # of order 2, unlike Euler on the same grid
        *_, first_order = run(dpm(LATENT, times, order=1), told)
        assert_detects(lambda x: assert_matches(latents, x, 1e-6), first_order.latent)


@COUNTS
@SHIFTS
def test_euler(steps: int, shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    latents = LATENT
    for t in scheduler.timesteps:
        latents = scheduler.step(at(latents, t.item() / 1000), t, latents).prev_sample

    def check(times: Tensor) -> None:
        *_, last = run(euler(LATENT, times), velocity)
        assert_matches(latents, last.latent, 6e-7)  # floor 6.3e-8

    times = euler_times(steps, shift)
    assert_matches(scheduler.sigmas, times, 3e-7)  # floor 4e-8
    check(times)
    assert_detects(check, torch.cat([times[:1] * 0.99, times[1:]]))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_scm(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The peer's loop around its scheduler, with its changes of variables; ours needs none."""
    scheduler = diffusers.SCMScheduler()
    scheduler.set_timesteps(
        steps, max_timesteps=1.57080, intermediate_timesteps=1.3 if steps == 2 else None
    )
    noises = iter(NOISES)
    from diffusers.schedulers import scheduling_scm

    monkeypatch.setattr(scheduling_scm, "randn_tensor", lambda *a, **k: next(noises))
    x = LATENT * 0.5
    for angle in scheduler.timesteps[:-1]:
        u = (angle.sin() / (angle.cos() + angle.sin())).item()
        root = (u**2 + (1 - u) ** 2) ** 0.5
        z = x / 0.5 * root
        out = 0.5 * ((1 - 2 * u) * z + (1 - 2 * u + 2 * u**2) * at(z, u)) / root
        x, clean = scheduler.step(out, angle, x, return_dict=False)
    expected = clean / 0.5

    def fresh() -> Iterator[Tensor]:
        yield from NOISES

    def check(start: float) -> None:
        source: Any = fresh()
        times = scm_times(steps)
        *_, last = run(scm(LATENT * start, times, lambda: next(source)), velocity)
        assert_matches(expected, last.latent, 1e-6)  # floor 1.6e-7

    # Noise on the circle has the radius 0.5 also where its angle is just over a right one.
    first = scm_times(steps)[0].item()
    check(first)
    assert_detects(check, first * 1.001)
