"""Losses and schedules against closed forms, each with a fault that must be caught."""

import math

import pytest
import torch

from sana.training import losses
from sana.training.config import OptimizerConfig
from sana.training.optim import Average, make_adamw, rate_factor
from tests.numerics import assert_detects, assert_matches


def draw_times(shift: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return losses.logit_normal_times(
        200_000, shift=shift, generator=generator, device=torch.device("cpu")
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_are_logit_normal_around_ln_shift(shift: float) -> None:
    def check(times: torch.Tensor) -> None:
        logits = torch.logit(times.double())
        # Standard errors of mean and deviation of 200,000 draws are 0.0022 and 0.0016.
        assert abs(logits.mean().item() - math.log(shift)) < 0.01
        assert abs(logits.std().item() - 1) < 0.01

    check(draw_times(shift))
    assert_detects(check, draw_times(shift * 1.05))


def test_noise_path_and_velocity_agree() -> None:
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(3, 2, 3, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 2, 3, 3, generator=generator, dtype=torch.float64)
    time = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    step = 1e-6
    moved = losses.add_noise(clean, noise, time + step)
    slope = (moved - losses.add_noise(clean, noise, time)) / step
    velocity = losses.flow_velocity(clean, noise)

    def check(got: torch.Tensor) -> None:
        assert_matches(velocity, got, 1e-8)  # floor 2e-10

    check(slope)
    assert_detects(check, slope * 1.01)
    assert torch.equal(losses.add_noise(clean, noise, time)[0], clean[0])
    assert torch.equal(losses.add_noise(clean, noise, time)[2], noise[2])


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert losses.hinge_critic(real, fake).item() == pytest.approx(0.25 + 0.75)
    assert losses.hinge_generator(fake).item() == pytest.approx(0.75)


def test_what_no_file_can_hold_is_no_error_and_is_called_back() -> None:
    drawn = torch.tensor([1.3, 1.3, -0.5, -1.2], requires_grad=True)
    wanted = torch.tensor([1.0, 0.9, -0.4, -1.0])

    def check(seen: torch.Tensor) -> None:
        (slope,) = torch.autograd.grad((seen - wanted).square().sum(), drawn)
        assert seen.tolist() == pytest.approx([1.0, 1.0, -0.5, -1.0])
        assert slope.tolist() == pytest.approx([0.0, 0.2, -0.2, 0.0], abs=1e-6)

    check(losses.as_seen(drawn))
    assert_detects(check, drawn.clamp(-1, 1))


def test_rate_warms_up_holds_and_decays_to_zero() -> None:
    config = OptimizerConfig(warmup=10, decay=0.5)
    factors = [rate_factor(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[10] == 1 and factors[50] == 1
    assert factors[75] == pytest.approx(0.5) and factors[99] == pytest.approx(0.02)
    assert all(later <= earlier for earlier, later in zip(factors[50:], factors[51:], strict=False))


def test_average_follows_the_weights() -> None:
    module = torch.nn.Linear(3, 2)
    average = Average(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for _ in range(200):
        average.update(module)
    assert_matches(module.weight.detach(), average.shadow["weight"], 1e-5)  # floor 3e-9


def test_only_matrices_decay() -> None:
    module = torch.nn.Linear(3, 2)
    groups = make_adamw(list(module.parameters()), OptimizerConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [1, 1]
    assert groups[0]["weight_decay"] > 0 and groups[1]["weight_decay"] == 0
