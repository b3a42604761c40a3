"""Guidance, padding, the time convention, independence of the batch, on recording networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.samplers import Guidance, Text, borrow_mask, distilled, guided, in_groups

LATENTS = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
PERTURBATION = 0.25
TIMES = torch.tensor([0.9996663, 0.5, 0.25])


def text(length: int, seed: int) -> Text:
    states = torch.randn(1, length, 5, generator=torch.Generator().manual_seed(seed))
    return Text(states=states, mask=torch.ones(1, length, dtype=torch.bool))


class Network:
    """A velocity that depends on everything, and a record of what was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(
        self,
        latent: Tensor,
        time: Tensor,
        states: Tensor,
        mask: Tensor,
        *,
        perturbed: int = 0,
        guidance: Tensor | None = None,
    ) -> Tensor:
        self.calls.append((latent, time, states, mask))
        pooled = (states * mask[..., None]).sum((1, 2))
        if guidance is not None:
            pooled = pooled * guidance
        velocity = latent.sin() * time[:, None, None, None] + pooled[:, None, None, None]
        velocity[len(latent) - perturbed :] += PERTURBATION
        return velocity


def alone(conditioning: Text, times: Tensor = TIMES) -> Tensor:
    count = len(LATENTS)
    states = conditioning.states.expand(count, -1, -1)
    return Network()(LATENTS, times, states, conditioning.mask.expand(count, -1))


@pytest.mark.parametrize("lengths", [(7, 3), (3, 7), (5, 5)])
def test_guidance_is_the_formula(lengths: tuple[int, int]) -> None:
    conditional, unconditional = text(lengths[0], 1), text(lengths[1], 2)
    v_c, v_u = alone(conditional), alone(unconditional)

    def check(guidance: float) -> None:
        got = guided(Network(), conditional, unconditional, guidance)(LATENTS, TIMES)
        assert_matches(v_u + 4.5 * (v_c - v_u), got, 7e-7)  # floor 8e-8

    check(4.5)
    assert_detects(check, 4.51)


def test_both_halves_in_one_call_unconditional_first() -> None:
    network = Network()
    conditional, unconditional = text(7, 1), text(3, 2)
    guided(network, conditional, unconditional, 2.0)(LATENTS, TIMES)
    [(latent, time, states, mask)] = network.calls
    assert torch.equal(latent, torch.cat([LATENTS, LATENTS]))
    assert torch.equal(time, torch.cat([TIMES, TIMES]))
    assert states.shape == (6, 7, 5)
    assert mask.sum(1).tolist() == [3, 3, 3, 7, 7, 7]
    assert torch.equal(states[3], conditional.states[0])
    assert torch.equal(states[0, :3], unconditional.states[0])
    assert not states[0, 3:].any()


@pytest.mark.parametrize("unconditional", [None, text(9, 2)])
def test_guidance_one_runs_the_conditional_half_alone(unconditional: Text | None) -> None:
    network = Network()
    got = guided(network, text(7, 1), unconditional, 1.0)(LATENTS, TIMES)
    assert len(network.calls[0][0]) == len(LATENTS)
    assert torch.equal(got, alone(text(7, 1)))


def test_guidance_without_something_to_guide_from_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance is 2"):
        guided(Network(), text(7, 1), None, 2.0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_integer_times_reach_the_network_only(guidance: float) -> None:
    network = Network()
    guided(network, text(4, 1), text(4, 2), guidance, integer_times=True)(LATENTS, TIMES)
    told = network.calls[0][1][:3]
    assert told.tolist() == torch.tensor([0.999, 0.5, 0.25]).tolist()
    network = Network()
    guided(network, text(4, 1), text(4, 2), guidance)(LATENTS, TIMES)
    assert torch.equal(network.calls[0][1][:3], TIMES)


def test_velocity_has_the_latents_dtype() -> None:
    def half(latent: Tensor, time: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return latent.bfloat16()

    for guidance in (1.0, 2.0):
        got = guided(half, text(4, 1), text(4, 2), guidance)(LATENTS, TIMES)
        assert got.dtype == torch.float32


def test_text_for_each_latent_is_taken_as_it_is() -> None:
    per_latent = Text(states=torch.randn(3, 4, 5), mask=torch.ones(3, 4, dtype=torch.bool))
    network = Network()
    guided(network, per_latent, None, 1.0)(LATENTS, TIMES)
    assert torch.equal(network.calls[0][2], per_latent.states)


@pytest.mark.parametrize(("size", "calls"), [(1, [1, 1, 1]), (2, [2, 1]), (5, [3])])
def test_groups_are_asked_about_one_after_the_other(size: int, calls: list[int]) -> None:
    network = Network()
    whole = guided(network, text(4, 1), None, 1.0)
    got = in_groups(whole, size)(LATENTS, TIMES)
    assert [len(call[0]) for call in network.calls] == calls
    assert torch.equal(whole(LATENTS, TIMES), got)


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_perturbed_attention_guidance_is_the_formula(scale: float) -> None:
    conditional, unconditional = text(7, 1), text(3, 2)
    v_c, v_u = alone(conditional), alone(unconditional)
    network = Network()

    def check(perturbation: float) -> None:
        how = Guidance(scale=scale, perturbation=perturbation)
        got = guided(network, conditional, unconditional, how)(LATENTS, TIMES)
        expected = v_u + scale * (v_c - v_u) - 3.0 * PERTURBATION
        assert_matches(expected, got, 1e-6)  # floor 1.2e-7

    check(3.0)
    assert len(network.calls) == 1
    assert len(network.calls[0][0]) == len(LATENTS) * (2 if scale == 1 else 3)
    assert_detects(check, 3.01)
    assert_detects(check, 0.0)


def test_outside_the_interval_the_conditional_velocity_is_used_alone() -> None:
    conditional, unconditional = text(7, 1), text(3, 2)
    v_c, v_u = alone(conditional), alone(unconditional)
    pushed = v_u + 4.5 * (v_c - v_u)
    network = Network()

    def check(interval: tuple[float, float]) -> None:
        how = Guidance(scale=4.5, interval=interval)
        got = guided(network, conditional, unconditional, how)(LATENTS, TIMES)
        expected = torch.cat([v_c[:1], pushed[1:2], v_c[2:]])
        assert_matches(expected, got, 7e-7)  # floor 8e-8

    check((0.5, 0.9))
    assert_detects(check, (0.2, 0.9))
    assert_detects(check, (0.0, 1.0))
    network.calls.clear()
    how = Guidance(scale=4.5, interval=(0.6, 0.9))
    got = guided(network, conditional, unconditional, how)(LATENTS, TIMES)
    assert [len(call[0]) for call in network.calls] == [3], "nobody inside: half the work"
    assert torch.equal(got, v_c)


def test_an_embedded_scale_takes_one_evaluation() -> None:
    network = Network()
    got = distilled(network, text(7, 1), 4.5)(LATENTS, TIMES)
    states = text(7, 1).states.expand(3, -1, -1)
    mask = torch.ones(3, 7, dtype=torch.bool)
    expected = Network()(LATENTS, TIMES, states, mask, guidance=torch.full((3,), 4.5))
    assert torch.equal(got, expected) and len(network.calls) == 1
    assert torch.equal(network.calls[0][1], TIMES), "Sprint is told exact times"


def test_the_prompts_mask_can_be_put_on_the_unconditional_states() -> None:
    conditional, unconditional = text(4, 1), text(7, 2)
    conditional.mask[0, 3] = False
    borrowed = borrow_mask(unconditional, conditional)
    assert torch.equal(borrowed.mask, conditional.mask)
    assert torch.equal(borrowed.states, unconditional.states[:, :4])
    network = Network()
    guided(network, conditional, borrowed, 2.0)(LATENTS, TIMES)
    assert network.calls[0][3].sum(1).tolist() == [3] * 6
    with pytest.raises(ValueError, match="has 3 states and the prompt's mask 7"):
        borrow_mask(text(3, 1), text(7, 2))


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.4, 0.9)])
def test_texts_are_prepared_once_for_all_steps(interval: tuple[float, float]) -> None:
    made: list[int] = []

    def prepare(states: Tensor, mask: Tensor) -> Tensor:
        made.append(len(mask))
        return states.clone()

    how = Guidance(scale=3.0, interval=interval)
    plain = guided(Network(), text(4, 1), text(2, 2), how)
    prepared = guided(Network(), text(4, 1), text(2, 2), how, prepare=prepare)
    for time in TIMES:
        times = time.expand(len(LATENTS))
        assert torch.equal(prepared(LATENTS, times), plain(LATENTS, times))
    assert made == ([6] if interval == (0.0, 1.0) else [3, 6])


def test_sprint_prepares_once() -> None:
    made: list[int] = []

    def prepare(states: Tensor, mask: Tensor) -> Tensor:
        made.append(len(mask))
        return states

    denoiser = distilled(Network(), text(4, 1), 4.5, prepare=prepare)
    for time in TIMES:
        denoiser(LATENTS, time.expand(len(LATENTS)))
    assert made == [3]
