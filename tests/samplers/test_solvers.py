"""Solvers on a flow with a closed form: x0 ~ N(mean, spread^2), so x_t is Gaussian at every time.

The velocity E[noise - x0 | x_t] and the solution of dx/dt = v are exact, so the error is the
solver's alone and its order can be read off by halving the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.samplers import METHODS, Sampler, dpm, euler, flow_times, run
from sana.samplers.schedule import shifted

Solver = Callable[[Tensor, Tensor], Sampler]


class Gaussian:
    """The flow from N(mean, spread^2) to unit noise; everything in fp64."""

    def __init__(self, mean: float, spread: float) -> None:
        self.mean, self.spread = mean, spread

    def velocity(self, latents: Tensor, times: Tensor) -> Tensor:
        t = times.reshape(-1, 1, 1, 1)
        slope = (t - (1 - t) * self.spread**2) / self.variance(t)
        return slope * (latents - (1 - t) * self.mean) - self.mean

    def solution(self, latent: Tensor, start: Tensor, end: float) -> Tensor:
        """Where the flow carries `latent` from time `start` to `end`."""
        ratio = math.sqrt(self.variance(end) / self.variance(start))
        return (1 - end) * self.mean + ratio * (latent - (1 - start) * self.mean)

    def variance(self, t):  # type: ignore[no-untyped-def]
        return ((1 - t) * self.spread) ** 2 + t**2


FLOW = Gaussian(0.7, 0.5)


def solve(solver: Solver, times: Tensor, flow: Gaussian = FLOW) -> tuple[Tensor, Tensor]:
    """(exact, got) at time 0, from the same noise."""
    latent = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    steps = list(run(solver(latent, times), flow.velocity))
    return flow.solution(latent, times[0], 0.0), steps[-1].latent


def error(solver: Solver, steps: int) -> float:
    """Error at time 0.1: near 0 the steps in log signal-to-noise do not shrink with their count."""
    times = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
    latent = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    [*_, last] = run(solver(latent, times), FLOW.velocity)
    exact = FLOW.solution(latent, times[0], 0.1)
    return (last.latent - exact).square().mean().sqrt().item()


def order_one(latent: Tensor, times: Tensor) -> Sampler:
    return dpm(latent, times, order=1)


@pytest.mark.parametrize("solver, order", [(euler, 1), (dpm, 2), (order_one, 1)])
def test_observed_order(solver: Solver, order: int) -> None:
    def check(candidate: Solver) -> None:
        observed = [math.log2(error(candidate, n) / error(candidate, 2 * n)) for n in (40, 80, 160)]
        print(observed)
        assert all(abs(value - order) < 0.05 for value in observed)

    check(solver)
    assert_detects(check, late_by_one_in_a_hundred(solver))


def late_by_one_in_a_hundred(solver: Solver) -> Solver:
    """The fault: every time the network is asked about is 1 % off."""

    def faulty(latent: Tensor, times: Tensor) -> Sampler:
        good = solver(latent, times)
        query = next(good)
        while True:
            wrong = type(query)(
                index=query.index, count=query.count, latent=query.latent, time=query.time * 0.99
            )
            try:
                query = good.send((yield wrong))
            except StopIteration as finished:
                return finished.value

    return faulty


def test_order_one_is_euler() -> None:
    times = flow_times(20, 3.0).double()

    def check(candidate: Solver) -> None:
        assert_matches(solve(euler, times)[1], solve(candidate, times)[1], 2e-15)  # floor 2.5e-16

    check(order_one)
    assert_detects(check, dpm)
    assert_detects(check, late_by_one_in_a_hundred(order_one))


def test_second_order_is_the_published_formula() -> None:
    times = flow_times(5, 3.0).double()
    grid = times.tolist()
    flow = FLOW
    start = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(1)).double()

    def lam(s: float) -> float:
        return math.log((1 - s) / s)

    def by_hand(x: Tensor) -> Tensor:
        estimates: list[Tensor] = []
        for i, (s, s_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
            estimates.append(x - s * flow.velocity(x, torch.full((1,), s, dtype=torch.float64)))
            if s_next == 0:
                return estimates[-1]
            h = lam(s_next) - lam(s)
            x = s_next / s * x - (1 - s_next) * (math.exp(-h) - 1) * estimates[-1]
            if i > 0:
                r = (lam(s) - lam(grid[i - 1])) / h
                first = estimates[-1] - estimates[-2]
                x = x - (1 - s_next) * (math.exp(-h) - 1) * first / (2 * r)
        raise AssertionError

    def check(candidate: Solver) -> None:
        [*_, last] = run(candidate(start, times), flow.velocity)
        assert_matches(by_hand(start), last.latent, 6e-16)  # floor 7e-17

    check(dpm)
    assert_detects(check, order_one)


def test_second_order_beats_first_where_it_should() -> None:
    """papers.md 2.5: at shift 1, ten second-order steps are worth many Euler steps."""
    times = flow_times(10, 1.0).double()
    exact, second = solve(dpm, times)
    first = solve(euler, flow_times(28, 1.0).double())[1]
    assert (second - exact).abs().mean() < (first - exact).abs().mean()


@pytest.mark.parametrize("solver", [euler, dpm])
def test_a_point_mass_is_reached_exactly(solver: Solver) -> None:
    exact, got = solve(solver, flow_times(3, 3.0).double(), Gaussian(0.7, 0.0))
    assert_matches(exact, got, 1e-15)  # floor 1.2e-16


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_last_step_returns_the_clean_estimate(name: str, steps: int) -> None:
    method = METHODS[name]
    latent = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    times = method.times(steps, 1.0 if method.draws else 3.0)
    taken = list(run(method.start(latent, times, lambda: latent), FLOW.velocity))
    assert [step.index for step in taken] == list(range(steps))
    assert all(step.count == steps for step in taken)
    assert all(step.latent.dtype == torch.float32 for step in taken)
    assert torch.equal(taken[-1].clean, taken[-1].latent)


def test_a_first_time_of_one_is_finite() -> None:
    grid = shifted(torch.linspace(1, 0, 11, dtype=torch.float64), 3.0)
    exact, got = solve(dpm, grid)
    assert_matches(exact, got, 0.2)  # floor 0.11


def test_step_latents_are_what_the_next_query_holds() -> None:
    latent = torch.randn(1, 1, 2, 2).double()
    times = flow_times(4, 3.0)
    asked: list[Tensor] = []

    def denoiser(latents: Tensor, at: Tensor) -> Tensor:
        asked.append(latents)
        assert at.shape == (1,)
        return FLOW.velocity(latents, at)

    steps = list(run(dpm(latent, times), denoiser))
    assert all(torch.equal(s.latent, a) for s, a in zip(steps[:-1], asked[1:], strict=True))


def test_stopping_early_evaluates_no_more() -> None:
    calls = 0

    def denoiser(latents: Tensor, times: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return latents

    steps = run(euler(torch.zeros(1, 1, 1, 1), flow_times(20, 3.0)), denoiser)
    next(steps)
    next(steps)
    del steps
    assert calls == 2


def test_unwritten_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="order is 3"):
        next(dpm(torch.zeros(1, 1, 1, 1), flow_times(3, 3.0), order=3))
