"""The Triton kernels against the reference, in triton's interpreter on a CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from numerics import assert_detects, assert_matches
from sana.kernels import ops, reference

pytest.importorskip("triton", reason="triton is made for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-15
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@contextmanager
def parts_of(tokens: int) -> Iterator[None]:
    """Sums over several parts, which otherwise only long sequences have."""
    from sana.kernels import linear_attention as fast

    before, fast.TOKENS_OF_A_PART = fast.TOKENS_OF_A_PART, tokens
    try:
        yield
    finally:
        fast.TOKENS_OF_A_PART = before


def draw(tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v as views of one (B, N, 3 H D) product, as the network makes them, and a gradient."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(2, tokens, 3 * 3 * dim, generator=generator) + 0.5
    g = torch.randn(2, 3, tokens, dim, generator=generator)
    heads = [x.unflatten(-1, (3, dim)).transpose(1, 2) for x in qkv.to(DEVICE, dtype).chunk(3, -1)]
    return *heads, g.to(DEVICE, dtype)


def both_ways(attend: Attend, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of q, k and v."""
    *qkv, g = inputs
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


def triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with ops.force("triton"):
        return ops.linear_attention(q, k, v, eps=EPS)


def with_a_louder_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = torch.ones_like(k)
    scale[..., 0] = 1.01
    return triton(q, k * scale, v)


# Floors: 1.3e-6 in fp32 (the gradient of q cancels); in bf16 the interpreter cuts where a GPU
# rounds, which doubles the error of 1.7e-3 that the output's own digits leave.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 7e-3)])
@pytest.mark.parametrize(("tokens", "dim"), [(3, 32), (63, 16), (100, 64), (200, 32)])
def test_equals_the_reference(tokens: int, dim: int, dtype: torch.dtype, bound: float) -> None:
    inputs = draw(tokens, dim, dtype)
    exact = both_ways(
        lambda q, k, v: reference.linear_attention(q, k, v, eps=EPS), *(x.double() for x in inputs)
    )

    def check(attend: Attend) -> None:
        for expected, got in zip(exact, both_ways(attend, *inputs), strict=True):
            assert_matches(expected.to(dtype), got, bound)

    check(triton)
    if dtype == torch.float32:
        assert_detects(check, with_a_louder_key)


def test_thirds_of_a_product_give_the_same() -> None:
    *heads, g = draw(70, 32, torch.float32)
    qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in heads], dim=-1)
    expected = both_ways(triton, *heads, g)

    def check(qkv: Tensor) -> None:
        own = qkv.clone().requires_grad_()
        with ops.force("triton"):
            out = ops.packed_linear_attention(own, 32, eps=EPS)
        (got,) = torch.autograd.grad(out, own, g.transpose(1, 2).flatten(2))
        assert torch.equal(out, expected[0].transpose(1, 2).flatten(2))
        thirds = [x.unflatten(-1, (3, 32)).transpose(1, 2) for x in got.chunk(3, -1)]
        for one, other in zip(expected[1:], thirds, strict=True):
            assert_matches(one, other, 1e-6)  # floor 0

    check(qkv)
    assert_detects(check, qkv.roll(1, dims=-1))


def test_parts_are_summed() -> None:
    inputs = draw(150, 32, torch.float32)
    whole = both_ways(triton, *inputs)
    with parts_of(64):
        pieces = both_ways(triton, *inputs)
    for expected, got in zip(whole, pieces, strict=True):
        assert_matches(expected, got, 5e-6)  # floor 7e-7


def test_one_token_gives_its_value() -> None:
    q, k, v, _ = draw(1, 32, torch.float32)
    assert_matches(v, triton(q.abs() + 1, k.abs() + 1, v), 1e-6)  # floor 1e-7


def test_heads_are_joined_without_a_copy() -> None:
    q, k, v, _ = draw(5, 32, torch.float32)
    out = triton(q, k, v)
    assert out.shape == v.shape and out.transpose(1, 2).is_contiguous()


def test_shapes_that_the_kernels_do_not_know_go_to_the_reference() -> None:
    q = torch.rand(1, 2, 4, 24)
    double = torch.rand(1, 2, 4, 32, dtype=torch.float64)
    for x in (q, double):
        assert torch.equal(triton(x, x, x), reference.linear_attention(x, x, x, eps=EPS))


def test_force_is_undone() -> None:
    with pytest.raises(KeyError), ops.force("triton"):
        assert ops.uses_triton(torch.zeros(1))
        raise KeyError
    assert not ops.uses_triton(torch.zeros(1))


def test_a_compiled_caller_differentiates_through_the_kernels() -> None:
    inputs = draw(20, 32, torch.float32)
    compiled = torch.compile(triton, backend="aot_eager", fullgraph=True)
    for expected, got in zip(both_ways(triton, *inputs), both_ways(compiled, *inputs), strict=True):
        assert_matches(expected, got, 1e-6)  # floor 0


@pytest.mark.parametrize(("tokens", "dim"), [(3, 32), (150, 16)])
def test_narrow_products_give_the_same_result(tokens: int, dim: int) -> None:
    """In fp16, whose range these sums do not leave; the interpreter has no products in bf16."""
    from sana.kernels.linear_attention import linear_attention

    q, k, v, _ = draw(tokens, dim, torch.float16)
    exact = reference.linear_attention(q.double(), k.double(), v.double(), eps=EPS).half()

    def check(k: Tensor) -> None:
        with torch.no_grad(), parts_of(64):
            assert_matches(exact, linear_attention(q, k, v, EPS, True)[0], 1e-3)  # floor 3e-4

    check(k)
    assert_detects(check, k.roll(1, dims=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "dim"), [(3, 32), (64, 32), (150, 16)])
def test_whole_heads_give_the_same_result(
    tokens: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sana.kernels import whole_heads

    q, k, v, _ = draw(tokens, dim, dtype)
    exact = reference.linear_attention(q.double(), k.double(), v.double(), eps=EPS).to(dtype)

    def check(k: Tensor) -> None:
        with torch.no_grad(), ops.force("triton"), ops.trying("whole_heads"):
            got = ops.linear_attention(q, k, v, eps=EPS)
            assert got.transpose(1, 2).is_contiguous()
            # Floors 3e-7 and 3e-4.
            assert_matches(exact, got, 1e-6 if dtype == torch.float32 else 1e-3)
            narrow = whole_heads.whole_heads(q, k, v, EPS, True)
            assert_matches(exact, narrow, 1e-6 if dtype == torch.float32 else 1e-3)

    check(k)  # with too few heads for it
    monkeypatch.setattr(whole_heads, "FEWEST", 6)
    check(k)
    assert_detects(check, k.roll(1, dims=-1))


def test_whole_heads_are_for_many_heads_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from sana.kernels import whole_heads

    def refuse(*_: object) -> None:
        raise AssertionError

    q, k, v, _ = draw(3, 32, torch.float32)
    monkeypatch.setattr(whole_heads, "whole_heads", refuse)
    with ops.trying("whole_heads"):
        triton(q, k, v)
        monkeypatch.setattr(whole_heads, "FEWEST", 6)
        triton(q.clone().requires_grad_(), k, v)
        with pytest.raises(AssertionError):
            triton(q, k, v)


def test_a_compiler_can_trace_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled training traces the backward with tensors that hold nothing."""
    from sana.kernels import linear_attention as fast

    def trace() -> torch.Size:
        with FakeTensorMode():
            q, k, v = (torch.empty(2, 3, 70, 32, requires_grad=True) for _ in range(3))
            fast.linear_attention.known(q, k, v, EPS, False)[0].sum().backward()
            return q.grad.shape

    assert trace() == (2, 3, 70, 32)
    # As if it were launched directly, which is what a plain call without a gradient does.
    monkeypatch.setattr(
        fast.linear_attention_backward, "known", fast.linear_attention_backward.launch
    )
    with pytest.raises(Exception, match="data pointer|storage|fake|Fake"):
        trace()


def test_many_heads_are_summed_in_half_as_many_parts() -> None:
    from sana.kernels.linear_attention import _parts

    expected = {
        (16384, 140): (4, 4096),
        (16384, 70): (8, 2048),
        (1024, 140): (4, 256),
        (100, 1): (1, 128),
    }
    for (tokens, heads), parts in expected.items():
        assert _parts(tokens, heads) == parts
