"""The kernels around norms against their reference, in triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.kernels import ops, reference
from sana.kernels.reference import Branch, Lone, Row
from sana.models.layers import LinearSelfAttention
from sana.presets import preset

norms = pytest.importorskip("sana.kernels.norms", reason="triton is made for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In bf16 the interpreter cuts where a GPU rounds, which doubles the error of 1.7e-3 that the
# output's own digits leave.
BOUNDS = [(torch.float32, 1.5e-6), (torch.bfloat16, 7e-3)]  # floors 1.5e-7 and 3.4e-3
EPS = 1e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Case:
    """Tokens, a branch and the rows of a block, as views of wider tensors as in the network."""

    def __init__(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.x = (draw(2, tokens, width) + 0.5).to(dtype)
        self.branch = draw(2, tokens, width, seed=1).to(dtype)
        self.table = draw(6, width, seed=2).to(dtype)
        self.time = draw(2, 6, width, seed=3).to(dtype)

    def rows(self, dtype: torch.dtype) -> list[Row]:
        return [
            Row(own, time)
            for own, time in zip(self.table.to(dtype), self.time.to(dtype).unbind(1), strict=True)
        ]

    def results(
        self, kind: torch.dtype, gate: Callable[[Row], Row] = lambda row: row
    ) -> list[Tensor]:
        """Sums and norms, with the gate and without; `gate` may plant a fault."""
        x, value = self.x.to(kind), self.branch.to(kind)
        shift, scale, third, *_ = self.rows(kind)
        gated = Branch(value, gate(third), 1.5)
        total, normed = ops.add_and_modulate(x, gated, shift, scale)
        plain = ops.add_and_modulate(x, Branch(value), shift, scale)
        return [total, normed, *plain, ops.add_branch(x, gated), ops.modulate(x, shift, scale)]


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 3), (3, 100), (5, 64), (2, 1100), (1, 2240)])
def test_residual_and_norm_equal_the_reference(
    tokens: int, width: int, dtype: torch.dtype, bound: float
) -> None:
    """In one part, and of 1024 and 76 columns, and of 2048 and 192."""
    case = Case(tokens, width, dtype)

    exact = [result.to(dtype) for result in case.results(torch.float64)]

    def check(gate: Callable[[Row], Row]) -> None:
        with ops.force("triton"):
            for expected, got in zip(exact, case.results(dtype, gate), strict=True):
                assert_matches(expected, got, bound)

    check(lambda row: row)
    assert_detects(check, lambda row: Row(row.table, row.time + 0.05))


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 3), (3, 100), (63, 8)])
def test_rms_norm_reads_slices_of_wider_rows(
    tokens: int, width: int, dtype: torch.dtype, bound: float
) -> None:
    both = draw(2, tokens, 3 * width).to(dtype)
    weight = draw(width, seed=1).to(dtype)
    key = both.chunk(3, dim=-1)[1]
    exact = reference.rms_norm(key.double(), weight.double(), eps=EPS).to(dtype)

    def check(weight: Tensor) -> None:
        with ops.force("triton"):
            got = ops.rms_norm(key, weight, eps=EPS)
        assert got.is_contiguous()
        assert_matches(exact, got, bound)

    check(weight)
    assert_detects(check, weight * torch.linspace(1, 1.05, width).to(weight))


def test_a_gradient_or_another_dtype_is_left_to_the_reference() -> None:
    x, weight = draw(1, 2, 4), draw(4, seed=1).requires_grad_()
    with ops.force("triton"):
        assert ops.rms_norm(x, weight, eps=EPS).requires_grad
        mixed = ops.rms_norm(x.double(), weight, eps=EPS)
    assert torch.equal(mixed, reference.rms_norm(x.double(), weight, eps=EPS))


def test_a_compiled_caller_goes_through_the_kernels() -> None:
    case = Case(3, 16, torch.float32)
    shift, scale, gate, *_ = case.rows(torch.float32)

    def call(x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        with ops.force("triton"):
            return ops.add_and_modulate(x, Branch(value, gate), shift, scale)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for expected, got in zip(
            call(case.x, case.branch), compiled(case.x, case.branch), strict=True
        ):
            assert torch.equal(expected, got)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("tokens", "width", "lone"), [(1, 3, 1), (4, 1100, 1), (3, 64, 2)])
def test_a_lone_texts_row_is_added_to_all_of_its_tokens(
    tokens: int, width: int, lone: int, dtype: torch.dtype, bound: float
) -> None:
    shapes = [(3, tokens, width)] * 2 + [(3 - lone, tokens, width)] * 2 + [(lone, 1, width)]
    x, before, seen, value, row = (draw(*shape, seed=i) for i, shape in enumerate(shapes))
    gate, shift, scale = (Row(draw(width, seed=i), draw(3, width, seed=3 * i)) for i in (6, 7, 8))

    def run(kind: torch.dtype, row: Tensor, limit: float = 1.5) -> list[Tensor]:
        def cast(part: Tensor) -> Tensor:
            return part.to(dtype).to(kind)

        gated, *rows = (Row(*map(cast, pair)) for pair in (gate, shift, scale))
        own = Lone(cast(row), Branch(cast(before), gated, limit), cast(seen))
        return [*ops.add_and_modulate(cast(x), Branch(cast(value), lone=own), *rows)]

    exact = [result.to(dtype) for result in run(torch.float64, row)]

    def check(row: Tensor, limit: float = 1.5) -> None:
        with ops.force("triton"):
            for expected, got in zip(exact, run(dtype, row, limit), strict=True):
                assert_matches(expected, got, bound)

    check(row)
    assert_detects(check, row + 0.1)
    assert_detects(lambda limit: check(row, limit), 0.2)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_query_and_key_are_normed_in_their_memory(dtype: torch.dtype, bound: float) -> None:
    rows = draw(2, 3, 3 * 20, seed=1).to(dtype)
    first, second = (draw(20, seed=seed).to(dtype) for seed in (2, 3))
    wide = [part.double() for part in (rows, first, second)]
    exact = wide[0].clone()
    exact[..., :20] = reference.rms_norm(wide[0][..., :20], wide[1], eps=1e-5)
    exact[..., 20:40] = reference.rms_norm(wide[0][..., 20:40], wide[2], eps=1e-5)

    def check(second: Tensor) -> None:
        own = rows.clone()
        with ops.force("triton"), torch.no_grad():
            assert ops.rms_norm_pair_(own, first, second, eps=1e-5)
        assert_matches(exact.to(dtype), own, bound)
        assert torch.equal(own[..., 40:], rows[..., 40:])

    check(second)
    assert_detects(check, first)


def test_attention_with_norms_is_the_same_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, used = norms.rms_norm_pair_, []

    def noted(*inputs: Any) -> None:
        used.append(1)
        kernel(*inputs)

    monkeypatch.setattr(norms, "rms_norm_pair_", noted)
    config = replace(preset("tiny").config.dit, qk_norm=True)
    layer = LinearSelfAttention(config).to(DEVICE)
    with torch.no_grad():
        layer.query_norm.weight.copy_(draw(config.width, seed=5))
        layer.key_norm.weight.copy_(draw(config.width, seed=6))
    x = draw(3, 4, config.width, seed=1)
    expected = layer(x).detach()
    with ops.force("triton"):
        assert_matches(expected, layer(x).detach(), 3e-6)
    assert not used, "with a gradient each is a pass of its own"

    def check(x: Tensor) -> None:
        with ops.force("triton"), torch.no_grad():
            for perturbed in (0, 1):
                got = layer(x, perturbed)
                assert_matches(expected[: 3 - perturbed], got[: 3 - perturbed], 3e-6)

    check(x)
    assert len(used) == 2
    assert_detects(check, x * 1.1)


def test_activations_keep_nan() -> None:
    """A broken picture would look like a whole one."""
    x = draw(2, 3, 8, seed=1).clamp(-1, 1)
    one, none = torch.ones(8, device=x.device), torch.zeros(8, device=x.device)
    for activation in ("relu", "silu"):
        own = x.clone()
        own[0, 0, 0] = float("nan")
        with ops.force("triton"), torch.no_grad():
            assert ops.bias_act_(own, none, activation)
            assert own[0, 0, 0].isnan() and own.isnan().sum() == 1
            own[0, 0, 1:] = 0
            assert ops.rms_norm_(own, one, none, eps=1e-5, activation=activation)
        assert own[0, 0].isnan().all() and own.isnan().sum() == 8
