"""The shared parts against their formulas, written out in fp64 with other operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from numerics import assert_detects, assert_matches
from sana.config import DiTConfig
from sana.kernels.reference import modulate
from sana.models.layers import (
    HALF_MAX,
    CrossAttention,
    GLUMBConv,
    LinearSelfAttention,
    PatchEmbed,
    RMSNorm,
    TimeEmbedding,
    mask_bias,
    position_table,
    sinusoids,
)

CPU = torch.device("cpu")
CONFIG = DiTConfig(width=24, depth=1, cross_heads=3, text_dim=4, head_dim=8)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(module: nn.Module) -> nn.Module:
    """The module in fp64 with all weights drawn, so that none is a neutral one or zero."""
    module = module.double()
    for index, parameter in enumerate(module.parameters()):
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data = draw(*parameter.shape, seed=100 + index) / fan**0.5
    return module.eval()


def scaled(module: nn.Module, name: str) -> nn.Module:
    """A planted fault: one weight is one percent larger."""
    with torch.no_grad():
        module.get_parameter(name).view(-1)[0].mul_(1.01)
    return module


def test_rms_norm_is_its_formula() -> None:
    x = draw(3, 5, 24)
    weight = randomized(RMSNorm(24)).weight

    def check(norm: nn.Module) -> None:
        expected = x / (x.pow(2).sum(-1, keepdim=True) / 24 + 1e-5).sqrt() * weight
        assert_matches(expected, norm(x), 7e-16)  # floor 7.1e-17

    check(randomized(RMSNorm(24)))
    assert_detects(check, scaled(randomized(RMSNorm(24)), "weight"))
    assert_detects(check, randomized(RMSNorm(24, eps=1e-3)))
    assert torch.equal(RMSNorm(4, scale=0.01).weight, torch.full((4,), 0.01))


def test_rms_norm_takes_its_statistics_in_fp32() -> None:
    x = (1000 * draw(2, 4096)).to(torch.float16)  # the sum of squares overflows fp16
    out = RMSNorm(4096).half()(x)
    assert_matches(RMSNorm(4096).double()(x.double()).half(), out, 0.0)  # floor 0


def test_sinusoids_are_cosines_then_sines() -> None:
    values = [0.0, 1.0, 17.25, 999.0]

    def check(got: Tensor) -> None:
        rows = []
        for value in values:
            angles = [value * 10000 ** (-i / 128) for i in range(128)]
            rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        assert_matches(torch.tensor(rows), got, 4e-5)  # floor 4.2e-6: fp32 angles near 1000

    got = sinusoids(torch.tensor(values))
    check(got)
    assert_detects(check, got.roll(128, dims=-1))
    assert_detects(check, sinusoids(torch.tensor(values) * 1.001))


def test_time_embedding_is_an_mlp_of_the_sinusoids() -> None:
    module = randomized(TimeEmbedding(6))
    time = torch.tensor([0.0, 500.0])
    waves = sinusoids(time).double()
    hidden = waves @ module.input.weight.T + module.input.bias
    expected = hidden * hidden.sigmoid() @ module.output.weight.T + module.output.bias

    def check(candidate: nn.Module) -> None:
        assert_matches(expected, candidate(time), 5e-16)  # floor 5.7e-17

    check(module)
    assert_detects(check, scaled(randomized(TimeEmbedding(6)), "output.weight"))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patch_embedding_is_a_strided_convolution(patch_size: int) -> None:
    latent = draw(2, 3, 8, 12)
    module = randomized(PatchEmbed(3, 5, patch_size))
    kernel = module.projection.weight.detach().clone().view(5, 3, patch_size, patch_size)
    bias = module.projection.bias.detach().clone()
    expected = F.conv2d(latent, kernel, bias, stride=patch_size).permute(0, 2, 3, 1)

    def check(candidate: nn.Module) -> None:
        assert_matches(expected, candidate(latent), 1e-15)  # floor 0 here, one rounding elsewhere

    check(module)
    assert_detects(check, scaled(module, "projection.weight"))


@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (7, 9)])
def test_mix_ffn_is_three_convolutions_and_a_gate(grid: tuple[int, int]) -> None:
    x = draw(2, *grid, 6)
    module = randomized(GLUMBConv(6, 10))
    expand, project = module.expand.weight.detach().clone(), module.project.weight.detach().clone()
    y = F.conv2d(x.permute(0, 3, 1, 2), expand[:, :, None, None], module.expand.bias)
    y = F.conv2d(
        y * y.sigmoid(), module.depthwise.weight, module.depthwise.bias, padding=1, groups=20
    )
    value, gate = y[:, :10], y[:, 10:]
    y = F.conv2d(value * gate * gate.sigmoid(), project[:, :, None, None])
    expected = y.permute(0, 2, 3, 1).detach()

    def check(candidate: nn.Module) -> None:
        assert_matches(expected, candidate(x), 4e-15)  # floor 4.1e-16

    check(module)
    assert_detects(check, scaled(module, "project.weight"))
    swapped = randomized(GLUMBConv(6, 10))
    with torch.no_grad():  # gate and value change places
        swapped.depthwise.weight.copy_(swapped.depthwise.weight.roll(10, dims=0))
        swapped.depthwise.bias.copy_(swapped.depthwise.bias.roll(10, dims=0))
        swapped.expand.weight.copy_(swapped.expand.weight.roll(10, dims=0))
        swapped.expand.bias.copy_(swapped.expand.bias.roll(10, dims=0))
    assert_detects(check, swapped)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 63, 100])
def test_self_attention_is_linear_attention_by_head(tokens: int, qk_norm: bool) -> None:
    def build() -> LinearSelfAttention:
        module = randomized(LinearSelfAttention(replace(CONFIG, qk_norm=qk_norm)))
        assert isinstance(module, LinearSelfAttention)
        return module

    x = draw(2, tokens, 24)
    module = build()
    q, k, v = (x @ part.T for part in module.qkv.weight.split(24))
    if qk_norm:
        q = F.rms_norm(q, (24,), module.query_norm.weight, 1e-5)
        k = F.rms_norm(k, (24,), module.key_norm.weight, 1e-5)
    heads = []
    for h in range(3):
        columns = slice(8 * h, 8 * h + 8)
        scores = q[..., columns].relu() @ k[..., columns].relu().mT
        heads.append(scores @ v[..., columns] / (scores.sum(-1, keepdim=True) + 1e-15))
    expected = torch.cat(heads, -1) @ module.output.weight.T + module.output.bias

    def check(candidate: nn.Module) -> None:
        assert_matches(expected, candidate(x), 1.8e-15)  # floor 1.8e-16

    check(module)
    assert_detects(check, scaled(build(), "output.weight"))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_perturbed_samples_pass_their_own_values(qk_norm: bool) -> None:
    module = randomized(LinearSelfAttention(replace(CONFIG, qk_norm=qk_norm)))
    x = draw(3, 5, 24)
    value = x @ module.qkv.weight[48:].T
    alone = value @ module.output.weight.T + module.output.bias

    def check(perturbed: int) -> None:
        expected = torch.cat([module(x)[:1], alone[1:]])
        assert_matches(expected, module(x, perturbed), 1.5e-15)  # floor 1.5e-16

    check(2)
    assert_detects(check, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_clipped_where_fp16_would_have_overflowed(dtype: torch.dtype) -> None:
    x = draw(1, 4, 24).to(dtype)
    for clamps in (True, False):
        module = randomized(LinearSelfAttention(replace(CONFIG, clamps=clamps))).to(dtype)
        module.output.bias.data[:2] = torch.tensor([6e4, -6e4])
        module.output.weight.data[:2] *= 1e5 if dtype != torch.float16 else 6e4
        largest = module(x).abs().max().item()
        is_clipped = clamps or dtype == torch.float16
        assert largest <= torch.tensor(HALF_MAX).to(dtype) if is_clipped else largest > 7e4


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 63])
def test_cross_attention_is_softmax_over_the_unmasked_text(tokens: int, qk_norm: bool) -> None:
    def build() -> CrossAttention:
        module = randomized(CrossAttention(24, 3, qk_norm=qk_norm, norm_eps=1e-5))
        assert isinstance(module, CrossAttention)
        return module

    x, text = draw(2, tokens, 24), draw(2, 7, 24, seed=1)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    mask[1, 1:] = False
    module = build()
    results = []
    for row in range(2):
        states = text[row][mask[row]]
        q = x[row] @ module.query.weight.T + module.query.bias
        k, v = (states @ module.key_value.weight.T + module.key_value.bias).split(24, dim=-1)
        if qk_norm:
            q = F.rms_norm(q, (24,), module.query_norm.weight, 1e-5)
            k = F.rms_norm(k, (24,), module.key_norm.weight, 1e-5)
        heads = []
        for h in range(3):
            columns = slice(8 * h, 8 * h + 8)
            weights = (q[:, columns] @ k[:, columns].T / 8**0.5).softmax(-1)
            heads.append(weights @ v[:, columns])
        results.append(torch.cat(heads, -1) @ module.output.weight.T + module.output.bias)
    expected = torch.stack(results)

    def check(candidate: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        got = candidate(x, text, mask_bias(mask, torch.float64))
        assert_matches(expected, got, 2.4e-15)  # floor 2.4e-16

    check(module)
    assert_detects(check, scaled(build(), "key_value.weight"))
    assert_detects(check, lambda x, text, bias: module(x, text, None))


def test_a_row_without_any_text_attends_to_all_of_it() -> None:
    module = randomized(CrossAttention(24, 3, qk_norm=False, norm_eps=1e-5))
    x, text = draw(1, 4, 24), draw(1, 7, 24, seed=1)
    none = torch.zeros(1, 7, dtype=torch.bool)
    got = module(x, text, mask_bias(none, torch.float64))
    assert_matches(module(x, text, None), got, 1.8e-12)  # floor 1.8e-13: scores beside -10000
    assert mask_bias(None, torch.float32) is None


def test_modulate_is_layer_norm_with_given_affine() -> None:
    x, shift, scale = draw(2, 5, 8), draw(2, 1, 8, seed=1), draw(2, 1, 8, seed=2)
    centered = x - x.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def check(offset: float) -> None:
        assert_matches(
            normed * (offset + scale) + shift, modulate(x, shift, scale), 1.4e-15
        )  # floor 1.4e-16

    check(1.0)
    assert_detects(check, 1.001)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (8, 8), (16, 4)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_position_table_is_its_formula(height: int, width: int, scale: float) -> None:
    def expected(base: int) -> Tensor:
        table = torch.empty(height, width, 8, dtype=torch.float64)
        for i in range(height):
            for j in range(width):
                x, y = j * base / width / scale, i * base / height / scale
                for place, value in ((0, x), (4, y)):
                    for f in range(2):
                        angle = value / 10000 ** (f / 2)
                        table[i, j, place + f] = math.sin(angle)
                        table[i, j, place + 2 + f] = math.cos(angle)
        return table.float()

    got = position_table(height, width, 8, base=8, scale=scale, device=CPU)

    def check(table: Tensor) -> None:
        assert_matches(table, got, 1e-7)  # floor 0

    check(expected(8))
    if (height, width) != (1, 1):
        assert_detects(check, expected(9))
        assert_detects(check, expected(8).roll(4, dims=-1))
