"""Products in bf16 between fp32: what is rounded, by how much results differ, and that it loads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from numerics import assert_detects, assert_matches
from sana.config import DiTConfig
from sana.kernels.reference import modulate
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.models.rounding import Mixed, Product, narrow, narrow_names, product_dtype, rounded
from sana.weights.load import Where, load
from tests.models.test_dit import EVERY, PLAIN, Inputs, build

FP32, BF16 = torch.float32, torch.bfloat16


def mixed(network: LinearDiT) -> LinearDiT:
    other = copy.deepcopy(network)
    narrow(other, BF16)
    return other


@EVERY
def test_a_mixed_network_is_near_the_same_in_fp32(config: DiTConfig) -> None:
    network, inputs = build(config, dtype=FP32), Inputs(config)
    with torch.inference_mode():
        reference = inputs.run(network)

        def check(own: LinearDiT) -> None:
            assert_matches(reference, inputs.run(own), 1.5e-2)  # floor 1.6e-3 to 6.1e-3

        check(mixed(network))
        fault = mixed(network)
        fault.blocks[0].feed_forward.project.weight.mul_(1.5)
        assert_detects(check, fault)


def test_one_row_for_all_samples_goes_into_the_norm() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 20, 64, generator=generator)
    shift, scale = torch.randn(2, 1, 1, 64, generator=generator)
    separate = modulate(x, shift, scale)

    def check(dtype: torch.dtype, bound: float, factor: float = 1.0) -> None:
        got = modulate(x, shift * factor, scale, dtype=dtype)
        assert got.dtype == dtype
        assert_matches(separate, got.float(), bound)

    check(FP32, 0.0)
    check(BF16, 3e-3)  # floor 1.6e-3, that of rounding
    assert_detects(lambda factor: check(BF16, 3e-3, factor), 1.01)
    each = modulate(x, shift.expand(3, -1, -1), scale, dtype=BF16)
    assert torch.equal(each, separate.to(BF16))


def test_only_products_of_blocks_and_stages_are_narrow() -> None:
    network = mixed(build(PLAIN, dtype=FP32))
    narrow_ones = {name for name, value in network.named_parameters() if value.dtype == BF16}
    assert narrow_ones == narrow_names(network, torch.bfloat16)
    first = {name for name in narrow_ones if name.startswith("blocks.0.")}
    layers = {name.rpartition(".")[0].removeprefix("blocks.0.") for name in first}
    assert layers == {
        *("attention.qkv", "attention.output", "feed_forward.expand", "feed_forward.depthwise"),
        *("cross_attention.query", "cross_attention.key_value", "cross_attention.output"),
        "feed_forward.project",
    }
    assert (network.output.weight.dtype, network.products) == (FP32, BF16)
    assert product_dtype(build(PLAIN, dtype=FP32).blocks) == FP32


def test_a_product_rounds_what_is_wider_and_nothing_else() -> None:
    layer = Product(8, 8).to(BF16)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), nn.Linear.forward(layer, x.to(BF16)))
    assert rounded(x, FP32) is x
    assert rounded(x.to(BF16), FP32).dtype == BF16


@pytest.fixture(scope="module")
def shipped() -> tuple[LinearDiT, DCAE]:
    whole = load("sticker-512")
    return whole.dit, whole.autoencoder


def test_files_are_read_as_if_rounded_afterwards(shipped: tuple[LinearDiT, DCAE]) -> None:
    both = Mixed(FP32, BF16)
    where = Where(device="cpu", dit=both, autoencoder=both, text=FP32)
    got = load("sticker-512", where=lambda config: where)
    for network, other in zip(shipped, (got.dit, got.autoencoder), strict=True):
        expected = copy.deepcopy(network)
        narrow(expected, BF16)
        state = other.state_dict()
        assert {value.dtype for value in state.values()} == {FP32, BF16}
        for name, value in expected.state_dict().items():
            assert torch.equal(state[name], value), name


def test_a_decoder_with_mixed_stages_gives_nearly_the_same_pixels(
    shipped: tuple[LinearDiT, DCAE],
) -> None:
    whole = shipped[1]
    other = copy.deepcopy(whole)
    narrow(other, BF16)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.inference_mode():
        latent = whole.encode(images)
        assert torch.equal(other.encode(images), latent)
        pixels = whole.decode(latent)

        def check(own: DCAE) -> None:
            assert_matches(pixels, own.decode(latent), 3e-2)  # floor 1.5e-2

        check(other)
        other.decoder.stages[2][0].conv.weight.mul_(2)
        assert_detects(check, other)
