"""Muon against its formula written out, who gets which parameter, and steps that are skipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from numerics import assert_detects, assert_matches
from sana.training.config import OptimizerConfig
from sana.training.optim import Muon, is_hidden_matrix, make_optimizers, orthogonalize


def newton_schulz(matrix: Tensor) -> Tensor:
    """The iteration as in its paper, one matrix at a time, in fp64."""
    x = matrix.double() / matrix.double().norm()
    if x.shape[0] > x.shape[1]:
        return newton_schulz(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (4, 30), (30, 4)])
def test_singular_values_come_near_one(rows: int, columns: int) -> None:
    matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.3 and values.max() < 1.3
    assert torch.linalg.svdvals(matrices).max() > 2  # they did not start there

    def check(changed: Tensor) -> None:
        for matrix, got in zip(changed, orthogonalize(matrices), strict=True):
            assert_matches(newton_schulz(matrix).float(), got, 1e-5)  # floor 1.1e-6

    check(matrices)
    # A scale alone would cancel: one entry is changed.
    fault = matrices.clone()
    fault[:, 0, 0] *= 1.1
    assert_detects(check, fault)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6, 3, 3)])
def test_muon_takes_the_step_of_its_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    start, *gradients = torch.randn(4, *shape, generator=generator)
    weight = nn.Parameter(start.clone())
    other = nn.Parameter(2 * start)
    muon = Muon([weight, other], rate=0.1, momentum=0.9, weight_decay=0.01)
    expected, momentum = start.double(), torch.zeros_like(start).double()
    for gradient in gradients:
        weight.grad, other.grad = gradient.clone(), -gradient
        muon.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        update = newton_schulz((0.1 * gradient + 0.9 * momentum).flatten(1)).view(shape)
        longest = max(shape[0], math.prod(shape[1:]))
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * 0.2 * longest**0.5 * update

    def check(value: Tensor) -> None:
        assert_matches(value.float(), weight.detach(), 1e-5)  # floor 4e-7

    check(expected)
    assert_detects(check, expected + 0.001 * start)


def test_a_bad_step_changes_nothing() -> None:
    weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(2)))
    muon = Muon([weight], rate=0.1, momentum=0.9, weight_decay=0.01)
    weight.grad = torch.ones(3, 4)
    muon.step()
    before, state = weight.detach().clone(), muon.state[weight]["momentum"].clone()
    weight.grad = torch.full((3, 4), torch.nan)
    muon.found_inf = torch.ones(())
    muon.step()
    assert torch.equal(weight.detach(), before)
    assert torch.equal(muon.state[weight]["momentum"], state)
    muon.found_inf = torch.zeros(())
    weight.grad = torch.ones(3, 4)
    muon.step()
    assert torch.isfinite(weight).all() and not torch.equal(weight.detach(), before)


def test_hidden_matrices_go_to_muon_and_the_rest_to_adamw() -> None:
    module = nn.Module()
    module.first = nn.Linear(4, 8)
    module.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3, groups=8))])
    config = OptimizerConfig(kind="muon")
    adamw, muon = make_optimizers(module, config)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in module.named_parameters() if id(p) in taken}
    assert names == {"blocks.0.0.weight"}
    (alone,) = make_optimizers(module, OptimizerConfig())
    assert sum(len(group["params"]) for group in alone.param_groups) == 6


def test_what_counts_as_a_hidden_matrix() -> None:
    matrix, kernel = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4, 3, 3))
    depthwise, vector = nn.Parameter(torch.zeros(4, 1, 3, 3)), nn.Parameter(torch.zeros(4))
    assert is_hidden_matrix("blocks.2.output.weight", matrix)
    assert is_hidden_matrix("stages.0.1.first.weight", kernel)
    assert not is_hidden_matrix("blocks.2.depthwise.weight", depthwise)
    assert not is_hidden_matrix("blocks.2.norm.weight", vector)
    assert not is_hidden_matrix("output.weight", matrix)
