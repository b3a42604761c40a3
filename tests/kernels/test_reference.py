"""Linear attention against a five-line loop in fp64, by its symmetries, and in its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.kernels.reference import linear_attention, quadratic_attention

EPS = 1e-15
Attend = Callable[..., Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


def draw(tokens: int, dim: int = 32, dtype: torch.dtype = torch.float64, batch: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, batch, 3, tokens, dim, generator=generator, dtype=torch.float64)
    # The shift keeps denominators away from zero, where every formula is ill-conditioned.
    return (q + 0.5).to(dtype), (k + 0.5).to(dtype), v.to(dtype)


def loop(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
    q, k, v = q.double().relu(), k.double().relu(), v.double()
    rows = []
    for i in range(q.shape[-2]):
        weights = (q[..., i : i + 1, :] * k).sum(-1)
        rows.append((weights[..., None] * v).sum(-2) / (weights.sum(-1)[..., None] + eps))
    return torch.stack(rows, dim=-2)


def without_relu(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
    return linear_attention(q, k.abs(), v, eps=eps)


def unequal_value(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
    v = v.clone()
    v[..., 0] *= 1.01
    return linear_attention(q, k, v, eps=eps)


@pytest.mark.parametrize("attend", [linear_attention, quadratic_attention])
@pytest.mark.parametrize("tokens", [1, 3, 63, 100])
def test_equals_the_loop(attend: Attend, tokens: int) -> None:
    def check(function: Attend, dtype: torch.dtype, bound: float) -> None:
        inputs = draw(tokens, dtype=dtype)
        expected = loop(*inputs, eps=EPS).to(dtype)
        assert_matches(expected, function(*inputs, eps=EPS), bound)

    check(attend, torch.float64, 4e-15)  # floor 4.3e-16
    check(attend, torch.float32, 2e-6)  # floor 2.1e-7
    check(attend, torch.bfloat16, 1.3e-6)  # floor 1.3e-7: both round the same sums
    assert_detects(lambda f: check(f, torch.float64, 4e-15), unequal_value)
    if tokens > 1:  # one token's weight cancels, whatever it is
        assert_detects(lambda f: check(f, torch.float64, 4e-15), without_relu)


@pytest.mark.parametrize("tokens", [1, 3, 63, 100])
def test_gradients_equal_those_of_the_quadratic_form(tokens: int) -> None:
    def gradients(function: Attend, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.requires_grad_() for x in draw(tokens, dtype=dtype)]
        weight = torch.randn(
            inputs[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
        )
        out = function(*inputs, eps=EPS)
        return list(torch.autograd.grad((out * weight.to(dtype)).sum(), inputs))

    def check(function: Attend, dtype: torch.dtype, bound: float) -> None:
        # With one token the weights cancel, and the gradients of q and k are rounding noise.
        pairs = zip(gradients(loop, torch.float64), gradients(function, dtype), strict=True)
        for expected, got in list(pairs)[2 if tokens == 1 else 0 :]:
            assert_matches(expected.to(dtype), got, bound)

    check(linear_attention, torch.float64, 6e-15)  # floor 6.6e-16
    check(linear_attention, torch.float32, 3e-6)  # floor 3.0e-7
    assert_detects(lambda f: check(f, torch.float64, 6e-15), unequal_value)


def test_order_of_tokens_does_not_matter() -> None:
    q, k, v = draw(63)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    expected = linear_attention(q, k, v, eps=EPS)

    def check(order_of_values: Tensor) -> None:
        got = linear_attention(q, k[:, :, order], v[:, :, order_of_values], eps=EPS)
        assert_matches(expected, got, 2e-15)  # floor 2.0e-16

    check(order)
    swapped = order.clone()
    swapped[:2] = order[:2].flip(0)
    assert_detects(check, swapped)


def test_scale_of_queries_and_keys_does_not_matter() -> None:
    q, k, v = draw(100)
    expected = linear_attention(q, k, v, eps=EPS)

    def check(scale: Tensor) -> None:
        got = linear_attention(q * scale, 0.3 * k, v, eps=EPS)
        assert_matches(expected, got, 2.8e-15)  # floor 2.8e-16

    check(torch.rand(100, 1, dtype=torch.float64) + 0.5)  # a scale for each query
    assert_detects(check, 1 + 0.1 * torch.rand(100, 32, dtype=torch.float64))


def test_results_lie_between_the_values() -> None:
    q, k, v = draw(100)
    out = linear_attention(q, k, v, eps=EPS)
    assert (out <= v.amax(-2, keepdim=True) + 1e-12).all()
    assert (out >= v.amin(-2, keepdim=True) - 1e-12).all()


def test_sums_stay_in_fp32_under_autocast() -> None:
    inputs = draw(1000, dtype=torch.float32)

    def check(function: Attend) -> None:
        expected = function(*inputs, eps=EPS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(function(*inputs, eps=EPS), expected)

    def careless(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
        return (q.relu() @ (k.relu().mT @ v)).float()

    check(linear_attention)
    check(quadratic_attention)
    assert_detects(check, careless)


def test_a_query_that_nothing_answers_gives_zero() -> None:
    q, k, v = draw(5)
    out = linear_attention(-q.abs(), k, v, eps=EPS)
    assert torch.equal(out, torch.zeros_like(out))


def test_memory_grows_linearly() -> None:
    def saved(function: Attend, tokens: int) -> int:
        seen: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return x

        inputs = [x.requires_grad_() for x in draw(tokens, dtype=torch.float32, batch=1)]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            function(*inputs, eps=EPS)
        return sum(seen.values())

    def check(function: Attend) -> None:
        assert saved(function, 1024) < 2.1 * saved(function, 512)

    check(linear_attention)
    assert_detects(check, quadratic_attention)
