"""The refiner starts as the identity, learns, sees order, and never reads masked tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.config import RefinerConfig
from sana.models.refiner import Refiner

CONFIG = RefinerConfig(depth=2, heads=2, max_tokens=9)


def build(gate: float = 0.0) -> Refiner:
    torch.manual_seed(0)
    refiner = Refiner(CONFIG, 16)
    with torch.no_grad():
        refiner.positions.mul_(50)
        for layer in refiner.layers:
            layer.attention_gate.fill_(gate)
            layer.mlp_gate.fill_(gate)
    return refiner


def draw(tokens: int) -> Tensor:
    return torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_a_new_refiner_changes_nothing(tokens: int) -> None:
    states = draw(tokens)

    def check(gate: float) -> None:
        assert torch.equal(build(gate)(states, None), states)

    check(0.0)
    assert_detects(check, 0.01)


def test_gates_learn_first_and_then_everything() -> None:
    for gate, learning in ((0.0, {"attention_gate", "mlp_gate"}), (0.1, None)):
        refiner = build(gate)
        refiner(draw(9), None).square().sum().backward()
        for name, parameter in refiner.named_parameters():
            assert parameter.grad is not None, name
            expected = learning is None or name.rsplit(".", 1)[-1] in learning
            assert bool(parameter.grad.abs().max() > 0) == expected, (name, gate)


def test_masked_tokens_are_not_read() -> None:
    refiner, states = build(1.0), draw(7)
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] + [False] * 6])
    changed = torch.where(mask[..., None], states, states + 1)

    def check(mask_given: Tensor | None) -> None:
        expected = refiner(states, mask_given)[mask]
        assert_matches(expected, refiner(changed, mask_given)[mask], 0.0)  # floor 0

    check(mask)
    assert_detects(check, None)


def test_padding_changes_nothing() -> None:
    refiner, states = build(1.0), draw(7)
    mask = torch.arange(7)[None].expand(2, -1) < 4
    got = refiner(states, mask)[:, :4]
    assert_matches(refiner(states[:, :4], None), got, 1e-6)  # floor 0 here, fp32 rounding elsewhere


def test_a_row_without_tokens_gives_no_nan() -> None:
    out = build(1.0)(draw(3), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.isfinite(out).all()


def test_order_matters() -> None:
    refiner, states = build(1.0), draw(9)
    flipped = refiner(states.flip(1), None).flip(1)
    assert not torch.allclose(flipped, refiner(states, None), atol=0.05)
    with torch.no_grad():  # and only through the positions
        refiner.positions.zero_()
    flipped = refiner(states.flip(1), None).flip(1)
    assert_matches(refiner(states, None), flipped, 1.2e-6)  # floor 1.2e-7


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens; the refiner reads at most 9: shorten"):
        build()(draw(10), None)
