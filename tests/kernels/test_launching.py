"""Kernels are launched without torch's op machinery, which only compilers and autograd need."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from sana.kernels.launching import Op, asks_gradient, op


def double(x: Tensor, by: float) -> Tensor:
    return x * by


def test_without_a_gradient_the_function_itself_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = Op("test_double", double, ())
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(doubled, "known", lambda *inputs: asked.append(inputs))
    x = torch.ones(2)
    assert torch.equal(doubled(x, 2.0), 2 * x) and not asked
    wanted = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(doubled(wanted, 2.0), 2 * x) and not asked
    assert doubled(wanted, 2.0) is None and len(asked) == 1


def test_a_gradient_passes_through_the_op() -> None:
    tripled = op("test_triple")(double)

    def differentiate(ctx: object, g: Tensor) -> tuple[Tensor, None]:
        return 3 * g, None

    tripled.register_autograd(differentiate)
    x = torch.ones(2, requires_grad=True)
    tripled(x, 3.0).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 3.0))


def test_a_gradient_is_seen_in_a_list_of_tensors() -> None:
    wanted = torch.ones(2, requires_grad=True)
    assert asks_gradient((torch.ones(2), [torch.ones(2), wanted], [], 1.0))
    assert not asks_gradient((torch.ones(2), [wanted.detach()], None))
    with torch.no_grad():
        assert not asks_gradient(([wanted],))


def weigh(x: Tensor, weights: list[Tensor], by: float) -> tuple[Tensor, Tensor]:
    return x * sum(weights) * by, x.new_empty(0)


def test_a_gradient_goes_around_the_op_and_into_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = Op("test_weigh", weigh, ())
    tripled = Op("test_triple_inside", double, ())

    def keep(ctx: Any, inputs: tuple[Any, ...], _: object) -> None:
        x, weights, ctx.by = inputs
        ctx.save_for_backward(x, *weights)

    def differentiate(ctx: Any, g: Tensor, _: object) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        triple = tripled.behind(ctx)
        return triple(g, ctx.by) * sum(weights), [triple(g, ctx.by) * x for _ in weights], None

    weighed.register_autograd(differentiate, setup_context=keep)
    leaves = [torch.rand(3, requires_grad=True) for _ in range(3)]
    x, *weights = leaves
    expected = torch.autograd.grad((x * (weights[0] + weights[1]) * 2).sum(), leaves)
    for op_ in (weighed, tripled):
        monkeypatch.setattr(op_, "known", None)  # nobody calls it
    got = torch.autograd.grad(weighed(x, weights, 2.0)[0].sum(), leaves)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_first_launch_imports_no_compiler() -> None:
    pytest.importorskip("triton", reason="triton is made for Linux only")
    program = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
from sana.kernels import ops
with ops.force("triton"), torch.inference_mode():
    ops.rms_norm(torch.ones(1, 2, 16), torch.ones(16), eps=1e-5)
assert "sana.kernels.norms" in sys.modules
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
