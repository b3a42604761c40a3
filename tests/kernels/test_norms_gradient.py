"""Gradients of residuals and norms by kernels, in triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.kernels import ops
from sana.kernels.reference import Branch, Row

gradient = pytest.importorskip("sana.kernels.norms_gradient", reason="triton is for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Floors 3e-7 and 4e-3; in bf16 the interpreter cuts where a GPU rounds.
FP32, MIXED = 2e-6, 1e-2


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Case:
    """Tokens, a branch and three rows, the tables in fp32 and the time's as the branch."""

    def __init__(self, tokens: int, width: int, samples: int, kinds: Sequence[torch.dtype]) -> None:
        wide, narrow = kinds
        self.inputs = [
            (draw(2, tokens, width, seed=0) + 0.5).to(wide),
            draw(2, tokens, width, seed=1).to(narrow),
            draw(3, width, seed=2),
            draw(samples, 3, width, seed=3).to(narrow),
        ]
        self.g = [draw(2, tokens, width, seed=4 + index) for index in range(2)]

    def gradients(
        self,
        call: Callable[..., Sequence[Tensor]],
        kind: torch.dtype | None = None,
        *,
        is_compiled: bool = False,
    ) -> list[Tensor]:
        """Results and gradients of x, branch, table and time, all in `kind` if there is one."""
        whole = over_rows(call)
        if is_compiled:
            whole = torch.compile(whole, backend="aot_eager", fullgraph=True)
        own = [(x if kind is None else x.to(kind)).requires_grad_() for x in self.inputs]
        own = [x.detach().clone().requires_grad_() for x in own]
        results = whole(*own)
        grads = [g.to(result.dtype) for g, result in zip(self.g, results, strict=False)]
        found = torch.autograd.grad(list(results), own, grads, allow_unused=True)
        return [*results, *(x for x in found if x is not None)]


def over_rows(call: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    """`call` of x, branch, table and time."""

    def whole(x: Tensor, branch: Tensor, table: Tensor, time: Tensor) -> Sequence[Tensor]:
        return call(x, branch, *map(Row, table, time.unbind(1)))

    return whole


def both(x: Tensor, branch: Tensor, gate: Row, shift: Row, scale: Row) -> tuple[Tensor, ...]:
    return ops.add_and_modulate(x, Branch(branch, gate), shift, scale)


def clipped(x: Tensor, branch: Tensor, gate: Row, shift: Row, scale: Row) -> tuple[Tensor, ...]:
    return ops.add_and_modulate(x, Branch(branch, gate, 0.7), shift, scale)


def ungated(x: Tensor, branch: Tensor, _: Row, shift: Row, scale: Row) -> tuple[Tensor, ...]:
    return ops.add_and_modulate(x, Branch(branch), shift, scale)


def last(x: Tensor, branch: Tensor, gate: Row, shift: Row, scale: Row) -> tuple[Tensor, ...]:
    return (ops.add_and_modulate(x, Branch(branch, gate), shift, scale)[1],)


def alone(x: Tensor, _: Tensor, __: Row, shift: Row, scale: Row) -> tuple[Tensor, ...]:
    return (ops.modulate(x, shift, scale),)


def gated(x: Tensor, branch: Tensor, gate: Row, *_: Row) -> tuple[Tensor, ...]:
    return (ops.add_branch(x, Branch(branch, gate)),)


def rounded(x: Tensor, branch: Tensor, gate: Row, *_: Row) -> tuple[Tensor, ...]:
    return ops.add_and_round(x, Branch(branch, gate))


CALLS = [both, clipped, ungated, last, alone, gated, rounded]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("tokens", "width", "samples", "kinds", "bound"),
    [
        (3, 20, 2, (torch.float32, torch.float32), FP32),
        (18, 5, 1, (torch.float32, torch.bfloat16), MIXED),
    ],
)
def test_gradients_equal_the_references(
    call: Callable[..., Sequence[Tensor]],
    tokens: int,
    width: int,
    samples: int,
    kinds: tuple[torch.dtype, torch.dtype],
    bound: float,
) -> None:
    case = Case(tokens, width, samples, kinds)
    with ops.force("reference"):
        exact = case.gradients(call, torch.float64)

    def check(case: Case) -> None:
        with ops.force("triton"):
            got = case.gradients(call)
        for expected, found in zip(exact, got, strict=True):
            assert_matches(expected.to(found.dtype), found, bound)

    check(case)
    case.g[0][0, 0] *= 1.5
    assert_detects(check, case)


def test_results_are_as_wide_as_their_parts_and_as_narrow_as_products() -> None:
    x, branch, table, time = Case(2, 8, 2, (torch.bfloat16, torch.bfloat16)).inputs
    rows = [
        Row(own.requires_grad_(), part) for own, part in zip(table, time.unbind(1), strict=True)
    ]
    with ops.force("triton"):
        total, normed = ops.add_and_modulate(x, Branch(branch, rows[0]), rows[1], rows[2])
        summed, narrow = ops.add_and_round(x, Branch(branch, rows[0]))
    assert total.dtype == summed.dtype == torch.float32
    assert normed.dtype == narrow.dtype == torch.bfloat16
    assert torch.equal(summed, total)


def test_a_compiler_makes_its_own() -> None:
    case = Case(3, 16, 2, (torch.float32, torch.bfloat16))
    with ops.force("triton"):
        eager, compiled = case.gradients(both), case.gradients(both, is_compiled=True)
    for one, other in zip(eager, compiled, strict=True):
        assert_matches(one.float(), other.float(), MIXED)
