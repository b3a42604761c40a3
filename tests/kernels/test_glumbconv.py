"""The middle of the mix-FFN against its reference, in triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.kernels import ops, reference

glumbconv = pytest.importorskip("sana.kernels.glumbconv", reason="triton is made for Linux only")
gradient = pytest.importorskip("sana.kernels.glumbconv_gradient")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(
    batch: int, height: int, width: int, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(height * width)
    shapes = ((batch, height, width, 2 * hidden), (2 * hidden, 1, 3, 3), (2 * hidden,))
    return tuple(torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)


def triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with ops.force("triton"):
        return ops.glu_depthwise(x, weight, bias)


# In bf16 the interpreter cuts where a GPU rounds, which doubles the error of 1.7e-3 that the
# output's own digits leave.
@pytest.mark.parametrize(
    ("shape", "dtype", "bound"),
    [
        ((1, 1, 1, 3), torch.float32, 1.5e-6),
        ((2, 3, 2, 5), torch.float32, 1.5e-6),
        ((1, 6, 3, 300), torch.float32, 1.5e-6),
        ((1, 3, 4, 20), torch.bfloat16, 7e-3),
    ],
)
def test_equals_the_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype, bound: float
) -> None:
    x, weight, bias = draw(*shape, dtype)
    wide = (part.double() for part in (x, weight, bias))
    exact = reference.glu_depthwise(*wide).to(dtype)

    def check(weight: Tensor) -> None:
        got = triton(x.clone(), weight, bias)
        assert got.is_contiguous()
        assert_matches(exact, got, bound)

    check(weight)
    louder = weight.clone()
    louder[:, :, 1, 1] *= 1.05
    assert_detects(check, louder)


def test_a_row_longer_than_a_segment_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(1, 1, 5, 6, torch.float32)
    whole = triton(*inputs)
    for name, enough in (("SEGMENT", 0), ("SHORTER", 1000)):
        with monkeypatch.context() as patch:
            patch.setattr(glumbconv, name, 2)
            patch.setattr(glumbconv, "ENOUGH", enough)
            assert torch.equal(whole, triton(*inputs))


def test_reading_gates_ahead_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(2, 3, 5, 6, torch.float32)
    expected = triton(*inputs)
    monkeypatch.setattr(glumbconv, "BOTH_AHEAD", False)

    def check(x: Tensor) -> None:
        got = triton(x.clone(), *inputs[1:])
        assert torch.equal(expected, got) and bool(got.isfinite().all())

    check(inputs[0])
    assert_detects(check, inputs[0] * 1.01)


def test_a_compiled_caller_goes_through_the_kernel() -> None:
    inputs = draw(1, 2, 3, 4, torch.float32)
    compiled = torch.compile(triton, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(triton(*inputs), compiled(*inputs))


@pytest.mark.parametrize("shape", [(2, 3, 2, 5), (1, 1, 1, 3), (1, 4, 3, 70), (1, 3, 33, 3)])
def test_gradients_equal_the_references(shape: tuple[int, int, int, int]) -> None:
    inputs = draw(*shape, torch.float32)
    generator = torch.Generator().manual_seed(7)
    g = torch.randn((*shape[:3], shape[3]), generator=generator).to(DEVICE)
    wide = [part.double().requires_grad_() for part in inputs]
    exact = torch.autograd.grad(reference.glu_depthwise(*wide), wide, g.double())

    def check(g: Tensor) -> None:
        own = [part.clone().requires_grad_() for part in inputs]
        with ops.force("triton"):
            got = torch.autograd.grad(ops.glu_depthwise(*own), own, g)
        for expected, found in zip(exact, got, strict=True):
            assert_matches(expected.float(), found, 1.5e-6)

    check(g)
    louder = g.clone()
    louder[:, 0, 0] *= 1.05
    assert_detects(check, louder)


def test_a_program_of_several_rows_gives_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = draw(1, 5, 2, 3, torch.float32)

    def gradients(rows_of_sums: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(gradient, "ROWS_OF_SUMS", rows_of_sums)
        own = [part.clone().requires_grad_() for part in inputs]
        with ops.force("triton"):
            return torch.autograd.grad(ops.glu_depthwise(*own).square().sum(), own)

    for many, one in zip(gradients(64), gradients(1), strict=True):
        assert_matches(many, one, 1e-6)  # floor 1e-7


def test_weights_may_be_wider_than_the_map() -> None:
    x, weight, bias = draw(1, 3, 2, 3, torch.float32)
    narrow = x.bfloat16()
    wide = [part.double().requires_grad_() for part in (narrow, weight, bias)]
    exact = torch.autograd.grad(reference.glu_depthwise(*wide).square().sum(), wide)
    own = [part.detach().requires_grad_() for part in (narrow, weight, bias)]
    with ops.force("triton"):
        out = ops.glu_depthwise(*own)
        found = torch.autograd.grad(out.float().square().sum(), own)
    assert out.dtype == torch.bfloat16 and found[1].dtype == torch.float32
    for expected, got in zip(exact, found, strict=True):
        assert_matches(
            expected.to(got.dtype), got, 2e-2
        )  # floors 1e-2 and 4e-3: digits of out and d
