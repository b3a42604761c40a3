"""SCM against the formulas on the circle, its angles, and where its noise comes from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.samplers import draw_noise, first_step, run, scm, scm_times

SIGMA = 0.5
ANGLES = {n: torch.linspace(1.5708, 0, n + 1, dtype=torch.float64).tolist() for n in (1, 2, 4)}
ANGLES[2][1] = 1.3


def network(latents: Tensor, times: Tensor) -> Tensor:
    """Any function of a latent and its time will do."""
    return (latents * 1.7).sin() + times[:, None, None, None] * latents.roll(1, -1)


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)


def on_the_circle(angles: list[float], noises: list[Tensor]) -> Tensor:
    """Family-spec 6.3, as it stands there: x on the circle, the network between changes."""
    x = SIGMA * noises[0]
    for t, following, noise in zip(angles[:-1], angles[1:], noises[1:], strict=True):
        u = torch.tensor(math.sin(t) / (math.cos(t) + math.sin(t)), dtype=torch.float64)
        root = torch.sqrt(u**2 + (1 - u) ** 2)
        z = x / SIGMA * root
        out = SIGMA * ((1 - 2 * u) * z + (1 - 2 * u + 2 * u**2) * network(z, u.expand(2))) / root
        clean = math.cos(t) * x - math.sin(t) * out
        x = math.cos(following) * clean + math.sin(following) * SIGMA * noise
    return clean / SIGMA


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_equals_the_formulas_on_the_circle(steps: int) -> None:
    noises = [draw(seed) for seed in range(steps + 1)]
    expected = on_the_circle(ANGLES[steps], noises)

    def check(middle: float) -> None:
        times = scm_times(steps).double()
        if steps > 1:
            times[1] = times[1] + middle
        rest = iter(noises[1:])
        start = noises[0] * times[0]  # 0.5 noise on the circle: its radius is just over 1 here
        *_, last = run(scm(start, times, lambda: next(rest)), network)
        assert_matches(expected, last.latent, 3e-7)  # floor 7.9e-8, from times in fp32

    check(0.0)
    if steps > 1:
        assert_detects(check, 1e-4)


def test_angles_are_sprints() -> None:
    for steps, angles in ANGLES.items():
        expected = [math.sin(a) / (math.cos(a) + math.sin(a)) for a in angles]
        assert scm_times(steps).tolist() == pytest.approx(expected, abs=2e-6)
    assert scm_times(2)[0].item() == pytest.approx(1.0000037, abs=1e-7)
    assert scm_times(2)[1].item() == pytest.approx(0.782708, abs=1e-6)
    assert scm_times(3).diff().lt(0).all()


def test_a_shift_is_refused() -> None:
    with pytest.raises(ValueError, match="shift is 3"):
        scm_times(2, 3.0)


def test_noise_is_asked_for_between_steps_only() -> None:
    asked: list[int] = []

    def fresh() -> Tensor:
        asked.append(1)
        return draw(9)

    for steps in (1, 2, 4):
        asked.clear()
        taken = list(run(scm(draw(0), scm_times(steps), fresh), network))
        assert len(asked) == steps - 1 and len(taken) == steps
        assert torch.equal(taken[-1].latent, taken[-1].clean)
    *_, alone = run(scm(draw(0), scm_times(1)), network)
    assert alone.latent.isfinite().all()
    with pytest.raises(ValueError, match="2 steps draw noise"):
        next(scm(draw(0), scm_times(2)))


def test_a_picture_does_not_depend_on_its_batch() -> None:
    def picture(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latent = draw_noise((3, 4, 5), generators)
        sampler = scm(latent, scm_times(4), lambda: draw_noise((3, 4, 5), generators))
        *_, last = run(sampler, network)
        return last.latent

    assert torch.equal(picture([4, 7, 9])[1], picture([7])[0])
    assert not torch.equal(picture([4, 7, 9])[1], picture([8])[0])


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [(2, 0.6, 0), (2, 0.5, 1), (20, 0.6, 8), (20, 1.0, 0), (20, 0.0, 20), (4, 0.3, 2), (1, 0.2, 0)],
)
def test_strength_chooses_the_first_step(steps: int, strength: float, first: int) -> None:
    assert first_step(steps, strength) == first


def test_a_strength_over_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strength is 1\.2"):
        first_step(20, 1.2)
