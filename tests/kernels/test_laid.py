"""A text laid out once and attention to it against torch's own in fp64, interpreted or on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.config import DiTConfig
from sana.kernels import laid, ops
from sana.models.dit import LinearDiT
from sana.models.layers import mask_bias
from sana.presets import preset

fast = pytest.importorskip("sana.kernels.laid_attention", reason="triton is for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(tokens: int, text: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Views of products, as the network makes them; sample 1 has half of the text, 2 none."""
    generator = torch.Generator().manual_seed(tokens)
    lengths = (tokens, text, text)
    q, k, v = (torch.randn(3, length, 3 * dim, generator=generator) for length in lengths)
    mask = torch.ones(3, text, dtype=torch.bool)
    mask[1, text // 2 :] = False
    mask[1, 0] = False
    mask[1, 1] = True
    mask[2] = False
    heads = [x.to(DEVICE, dtype).unflatten(-1, (3, dim)).transpose(1, 2) for x in (q, k, v)]
    return *heads, mask.to(DEVICE)


def triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with ops.force("triton"), ops.trying("laid_text"):
        made = laid.lay([(k, v)], mask_bias(mask, k.dtype), mask)
    assert made is not None
    [(keys, values)], counts = made
    assert laid.is_laid(q, keys)
    return laid.attend(q, keys, values, counts)


# The interpreter has no bf16 products.
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float16, 2e-3),  # floor 4.2e-4
        pytest.param(torch.bfloat16, 1.2e-2, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(("tokens", "text", "dim"), [(1, 2, 16), (5, 3, 24), (140, 70, 8)])
def test_equals_torchs_own(
    tokens: int, text: int, dim: int, dtype: torch.dtype, bound: float
) -> None:
    q, k, v, mask = draw(tokens, text, dim, dtype)
    bias = mask_bias(mask, torch.float64)
    exact = ops.cross_attention(q.double(), k.double(), v.double(), bias).to(dtype)

    def check(k: Tensor, mask: Tensor) -> None:
        got = triton(q, k, v, mask)
        assert got.transpose(1, 2).is_contiguous(), "heads are joined without a copy"
        assert_matches(exact, got, bound)

    check(k, mask)
    other = mask.clone()
    other[1, 0] = True
    assert_detects(lambda mask: check(k, mask), other)
    assert_detects(lambda k: check(k, mask), k * 1.1)


def test_without_a_mask_and_queries_of_any_memory() -> None:
    q, k, v, mask = draw(5, 3, 16, torch.float16)
    everything = torch.ones_like(mask)
    expected = triton(q, k, v, everything)
    assert torch.equal(triton(q, k, v, None), expected)
    apart = torch.zeros(*q.shape[:3], 19, dtype=q.dtype, device=q.device)[..., :16]
    assert torch.equal(triton(apart.copy_(q), k, v, None), expected)


def test_the_loop_ends_after_the_last_token_that_counts() -> None:
    """What is behind may be anything: it is in tiles that nobody reads."""
    q, k, v, mask = draw(5, 70, 16, torch.float16)
    mask[:, 20:] = False
    mask[:, 19] = True
    expected = triton(q, k, v, mask)
    k[:, :, 32:] = float("nan")
    assert torch.equal(triton(q, k, v, mask), expected)
    k[:, :, 31] = float("nan")
    assert not torch.equal(triton(q, k, v, mask), expected)


def test_other_inputs_are_not_laid_out() -> None:
    _, k, v, mask = draw(3, 4, 16, torch.float16)

    def lay(k: Tensor, v: Tensor, *ways: Any, dtype: torch.dtype = torch.float16) -> bool:
        without: Any = () if ways else ("laid_text",)
        with ops.force("triton"), ops.trying(*ways, without=without):
            return laid.lay([(k, v)], mask_bias(mask, dtype), mask) is not None

    assert lay(k, v, "laid_text")
    assert not lay(k, v)
    assert not lay(k.float(), v.float(), "laid_text")
    assert not lay(k, v, "laid_text", dtype=torch.float32)
    assert not lay(k[..., :12], v[..., :12], "laid_text")
    assert not lay(k.clone().requires_grad_(), v, "laid_text")


def network(config: DiTConfig) -> LinearDiT:
    torch.manual_seed(0)
    made = LinearDiT(config).to(DEVICE, torch.float16)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.parametrize("way", ["laid_text", "lone_rows"])
def test_a_network_with_it_is_the_same(way: Any) -> None:
    """Two samples with guidance, the first with an empty text, as a picture has them."""
    config = preset("tiny").config.dit
    config = replace(config, depth=2, cross_heads=config.width // 8)
    made = network(config)
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, config.latent_channels, 2, 3, generator=generator).to(DEVICE)
    text = torch.randn(2, 5, config.width, generator=generator).half().to(DEVICE)
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool, device=DEVICE)
    time = torch.tensor([0.7, 0.7], device=DEVICE)

    def run(backend: Any, *ways: Any, mask: Tensor = mask) -> Tensor:
        with torch.inference_mode(), ops.force(backend), ops.trying(*ways):
            return made.denoise(latent, time, made.prepare(text, mask), None)

    expected = run("reference")

    def check(mask: Tensor) -> None:
        assert_matches(expected, run("triton", way, mask=mask), 5e-3)

    check(mask)
    assert_detects(check, mask.roll(1, 0))
