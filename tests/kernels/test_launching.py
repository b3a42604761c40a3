"""Kernels are launched without torch's op machinery, which only compilers and autograd need."""

from __future__ import annotations

import subprocess
import sys

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
