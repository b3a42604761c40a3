"""Attention to a short text against torch's own in fp64, in triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.kernels import ops

cross = pytest.importorskip("sana.kernels.cross_attention", reason="triton is for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(tokens: int, text: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Views of products, as the network makes them; the last text token of sample 1 is hidden."""
    generator = torch.Generator().manual_seed(tokens)
    lengths = (tokens, text, text)
    q, k, v = (torch.randn(2, length, 3 * dim, generator=generator) for length in lengths)
    bias = torch.zeros(2, 1, 1, text)
    bias[1, ..., -1] = -10000.0
    heads = [x.to(DEVICE, dtype).unflatten(-1, (3, dim)).transpose(1, 2) for x in (q, k, v)]
    return *heads, bias.to(DEVICE, dtype)


def triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    with ops.force("triton"), ops.trying("cross_attention"):
        return ops.cross_attention(q, k, v, bias)


# The interpreter has no bf16 products.
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float16, 2e-3),  # floor 4.2e-4
        pytest.param(torch.bfloat16, 1.2e-2, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(("tokens", "text", "dim"), [(1, 2, 16), (5, 3, 28), (140, 70, 8)])
def test_equals_torchs_own(
    tokens: int, text: int, dim: int, dtype: torch.dtype, bound: float
) -> None:
    q, k, v, bias = draw(tokens, text, dim, dtype)
    exact = ops.cross_attention(q.double(), k.double(), v.double(), bias.double()).to(dtype)

    def check(bias: Tensor) -> None:
        got = triton(q, k, v, bias)
        assert got.transpose(1, 2).is_contiguous(), "heads are joined without a copy"
        assert_matches(exact, got, bound)

    check(bias)
    assert_detects(check, bias + 0.2 * torch.arange(text).to(bias))


def test_without_a_bias_and_with_all_hidden() -> None:
    q, k, v, _ = draw(3, 4, 16, torch.float16)
    mean = v.float().mean(2, keepdim=True).expand(-1, -1, 3, -1).half()
    hidden = torch.full((2, 1, 1, 4), -10000.0, device=DEVICE, dtype=torch.float16)
    assert_matches(mean, triton(torch.zeros_like(q), k, v, None), 2e-3)  # floor 3e-4
    assert_matches(mean, triton(torch.zeros_like(q), k, v, hidden), 2e-3)


def test_other_inputs_go_to_torch() -> None:
    q, k, v, bias = draw(3, 4, 16, torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert torch.equal(triton(q, k, v, bias), expected)
    assert triton(q.requires_grad_(), k, v, bias).requires_grad
    whole = torch.zeros(2, 1, 3, 4, device=DEVICE, dtype=torch.float16)
    assert not cross.supports(*(x.half() for x in (q, k, v)), whole)
