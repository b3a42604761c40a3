"""What an ablation's networks compute, against their formulas, and that they still train."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sana.models.dcae import DCAE
from sana.models.layers import GLUMBConv
from sana.presets import preset
from sana.reproduction.training import small_model
from sana.reproduction.variants import (
    DIT,
    PointwiseFFN,
    SoftmaxSelfAttention,
    without_convolution,
    without_shortcuts,
)
from tests.numerics import assert_detects, assert_matches

TINY = preset("tiny").config
DIT_CONFIG = small_model(TINY).dit


@pytest.mark.parametrize("bound", [3e-6])  # floor 3.3e-7
def test_softmax_attention_against_a_loop(bound: float) -> None:
    torch.manual_seed(0)
    layer = SoftmaxSelfAttention(DIT_CONFIG)
    x = torch.randn(2, 5, DIT_CONFIG.width)
    q, k, v = (part.unflatten(-1, (-1, DIT_CONFIG.head_dim)) for part in zip_qkv(layer, x))
    mixed = torch.zeros_like(q)
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head].mT / DIT_CONFIG.head_dim**0.5
        mixed[:, :, head] = scores.softmax(-1) @ v[:, :, head]

    def check(got: Tensor) -> None:
        assert_matches(layer.output(mixed.flatten(2)), got, bound)

    with torch.no_grad():
        check(layer(x))
        layer.qkv.weight[0] *= 1.1
        assert_detects(check, layer(x))


def zip_qkv(layer: SoftmaxSelfAttention, x: Tensor) -> tuple[Tensor, ...]:
    query, key, value = layer.qkv(x).chunk(3, -1)
    parts: tuple[Tensor, ...] = (layer.query_norm(query), layer.key_norm(key), value)
    return tuple(part.detach() for part in parts)


def test_a_pointwise_ffn_sees_one_token_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 8)
    moved = x.clone()
    moved[0, 1, 1] += 1

    def check(layer: torch.nn.Module) -> None:
        changed = (layer(x) != layer(moved)).any(-1)[0]
        assert changed.sum() == 1 and changed[1, 1]

    check(PointwiseFFN(8, 16))
    assert_detects(check, GLUMBConv(8, 16))


def test_without_positions_or_convolution_tokens_can_be_shuffled() -> None:
    """The network that should fail at placing things: it cannot know where a token is."""
    torch.manual_seed(0)
    side = 4
    latent = torch.randn(1, DIT_CONFIG.latent_channels, side, side)
    text, mask = torch.randn(1, 3, DIT_CONFIG.text_dim), torch.ones(1, 3, dtype=torch.bool)
    order = torch.randperm(side**2)

    def shuffle(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].unflatten(2, (side, side))

    def check(name: str) -> None:
        torch.manual_seed(1)
        network = DIT["positions"][name](DIT_CONFIG).eval()
        torch.nn.init.normal_(network.output.weight)
        with torch.no_grad():
            time = torch.tensor([0.3])
            straight = network(latent, time, text, mask)
            shuffled = network(shuffle(latent), time, text, mask)
        assert_matches(shuffle(straight), shuffled, 1e-5)  # floor 6e-7

    check("no convolution, no positions")
    for name in DIT["positions"]:
        if name != "no convolution, no positions":
            assert_detects(check, name)


@pytest.mark.parametrize("row", sorted(DIT))
def test_variants_take_a_step(row: str) -> None:
    for name, change in DIT[row].items():
        torch.manual_seed(0)
        network = change(DIT_CONFIG)
        assert not network.output.weight.any(), name
        latent = torch.randn(2, DIT_CONFIG.latent_channels, 4, 4)
        text = torch.randn(2, 3, DIT_CONFIG.text_dim)
        time, mask = torch.tensor([0.1, 0.9]), torch.ones(2, 3, dtype=torch.bool)
        torch.nn.init.normal_(network.output.weight)
        network(latent, time, text, mask).square().mean().backward()
        grads = [p.grad for n, p in network.named_parameters() if "table" not in n]
        assert all(g is not None and g.isfinite().all() for g in grads), name


def test_parameters_differ_by_the_convolution_alone() -> None:
    def count(row: str, name: str) -> int:
        return sum(p.numel() for p in DIT[row][name](DIT_CONFIG).parameters())

    convolution = DIT_CONFIG.depth * 2 * DIT_CONFIG.mlp_width * (9 + 1)
    plain = count("attention", "linear, mix-FFN")
    assert plain - count("attention", "linear, pointwise FFN") == convolution
    assert plain - count("attention", "softmax, pointwise FFN") == convolution
    assert count("positions", "no convolution, positions") == sum(
        p.numel() for p in without_convolution(DIT_CONFIG).parameters()
    )


def test_without_shortcuts_zero_weights_give_zeros() -> None:
    """With them, a network whose every weight is zero still passes a picture's means on."""
    picture = torch.rand(1, 3, 64, 64)

    def check(has_shortcuts: bool) -> None:
        network = DCAE(TINY.autoencoder)
        if not has_shortcuts:
            without_shortcuts(network)
        module = next(m for m in network.modules() if getattr(m, "has_shortcut", None) is not None)
        flags = [m.has_shortcut for m in network.modules() if hasattr(m, "has_shortcut")]
        assert not any(flags), module
        assert network(picture).shape == picture.shape

    check(False)
    assert_detects(check, True)
