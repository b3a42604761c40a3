"""DC-AE: every official kind in small, its shortcuts alone, and its parts against torch's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from live_bytes import peak_bytes
from numerics import assert_detects, assert_matches
from sana.config import DCAEConfig, StageConfig
from sana.errors import CheckpointError
from sana.kernels import ops
from sana.kernels.proven import UNPROVEN
from sana.models import dcae, maps
from sana.models.dcae import DCAE, EViTBlock, MultiScaleAttention, ResBlock
from sana.models.maps import ACTIVATIONS, ChannelRMSNorm
from sana.models.resampling import (
    average_channels,
    channels_last,
    product_by_groups,
    repeat_channels,
    shuffle,
    transposed,
    unshuffle,
    windows,
)
from sana.presets import AUTOENCODERS, PRESETS

# One of each architecture.
NAMES = [
    "dc-ae-f32c32-sana-1.1",
    "dc-ae-lite-f32c32-sana-1.1",
    "dc-ae-f32c32-in-1.0",
    "dc-ae-f64c128-in-1.0",
    "dc-ae-f128c512-in-1.0",
    "tiny",
]


def small(name: str) -> DCAEConfig:
    """The named kind with widths and head width cut, and one block for each non-empty stage."""
    if name in PRESETS:
        return PRESETS[name].config.autoencoder
    config = AUTOENCODERS[name].config

    def cut(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        return tuple(replace(s, width=s.width // 32, depth=min(s.depth, 1)) for s in stages)

    return replace(
        config,
        latent_channels=config.latent_channels // 16,
        encoder=cut(config.encoder),
        decoder=cut(config.decoder),
        head_dim=4,
    )


def build(config: DCAEConfig) -> DCAE:
    torch.manual_seed(0)
    return DCAE(config).double().eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_encodes_decodes_and_learns(name: str) -> None:
    config = small(name)
    network = build(config)
    factor = config.factor
    assert f"-f{factor}c" in name or (name, factor) == ("tiny", 32)
    latent = network.encode(draw(2, 3, factor, 2 * factor))
    assert latent.shape == (2, config.latent_channels, 1, 2)
    image = network.decode(latent)
    assert image.shape == (2, 3, factor, 2 * factor)
    assert image.is_contiguous(memory_format=torch.channels_last)
    image.square().sum().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_with_zeroed_branches_only_the_shortcuts_remain(name: str) -> None:
    """Stem and head kept; everything between is unshuffle-average or repeat-shuffle."""
    network = build(small(name))
    silence(network)
    config, factor = network.config, network.config.factor
    images, latent = draw(1, 3, factor, factor), draw(1, config.latent_channels, 2, 1)

    def check(candidate: DCAE) -> None:
        x = network.encoder.stem(images)
        for stage in config.encoder[1:] if config.encoder[0].depth else config.encoder[2:]:
            x = F.pixel_unshuffle(x, 2).unflatten(1, (stage.width, -1)).mean(2)
        expected = x.unflatten(1, (config.latent_channels, -1)).mean(2)
        assert_matches(expected, candidate.encode(images), 2e-15)  # floor 3.2e-16
        y = latent.repeat_interleave(config.decoder[-1].width // config.latent_channels, 1)
        for stage in reversed(config.decoder[not config.decoder[0].depth : -1]):
            y = F.pixel_shuffle(y.repeat_interleave(4 * stage.width // y.shape[1], 1), 2)
        decoder = network.decoder
        expected = decoder.head(ACTIVATIONS[decoder.activation](decoder.norm(y)))
        assert_matches(expected, candidate.decode(latent), 2e-15)  # floor 3.2e-16

    check(network)
    faulty = build(small(name))
    silence(faulty)
    with torch.no_grad():
        faulty.encoder.stages[-1][-1].norm.bias[0] = 0.01
    assert_detects(check, faulty)


def silence(network: DCAE) -> None:
    """Zero what every branch and every resampling adds to its shortcut."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (ResBlock, EViTBlock, MultiScaleAttention)):
                module.norm.weight.zero_()
                module.norm.bias.zero_()
        for side in (network.encoder, network.decoder):
            convolutions = [m.conv for stage in side.stages for m in stage if hasattr(m, "conv")]
            last = side.head if side is network.encoder else side.stem
            for convolution in [*convolutions, last]:
                convolution.weight.zero_()
                convolution.bias.zero_()


def test_shuffles_are_torchs_in_channels_last() -> None:
    x = channels_last(draw(2, 8, 6, 4))
    assert torch.equal(unshuffle(x), F.pixel_unshuffle(x, 2))
    assert torch.equal(shuffle(x), F.pixel_shuffle(x, 2))
    assert torch.equal(shuffle(unshuffle(x)), x)
    assert torch.equal(repeat_channels(x, 24), x.repeat_interleave(3, 1))
    assert torch.equal(average_channels(repeat_channels(x, 16), 8), x)
    for y in (unshuffle(x), shuffle(x), repeat_channels(x, 24), average_channels(x, 2)):
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_equal_widths_upsample_to_the_nearest() -> None:
    x = draw(1, 4, 3, 5)
    assert torch.equal(shuffle(repeat_channels(x, 16)), F.interpolate(x, scale_factor=2))


def test_channel_norm_is_rms_norm_of_each_pixel() -> None:
    norm = ChannelRMSNorm(6).double()
    with torch.no_grad():
        norm.weight.copy_(draw(6, seed=1))
        norm.bias.copy_(draw(6, seed=2))
    x = draw(2, 6, 3, 5)
    expected = F.rms_norm(x.movedim(1, -1), (6,), norm.weight, 1e-5) + norm.bias

    def check(candidate: nn.Module) -> None:
        assert_matches(
            expected.movedim(-1, 1), candidate(x), 1e-15
        )  # floor 0 here, one rounding elsewhere

    check(norm)
    shifted = ChannelRMSNorm(6, eps=1e-3).double()
    shifted.load_state_dict(norm.state_dict())
    assert_detects(check, shifted)


@pytest.mark.parametrize("scales", [(), (5,), (3, 5)])
@pytest.mark.parametrize("grid", [(1, 1), (2, 4), (3, 3), (7, 5)])
def test_attention_regroups_its_channels_in_runs(
    scales: tuple[int, ...], grid: tuple[int, int]
) -> None:
    """Below and above head_dim tokens, where the quadratic form gives way to the linear one."""
    x, norm = draw(2, 16, *grid), nn.Identity()
    torch.manual_seed(1)
    module = MultiScaleAttention(16, 8, scales, "rms").double()
    module.norm = norm
    with torch.no_grad():  # away from queries that nothing answers
        module.qkv.weight.add_(0.1)
    x = x + 1
    maps = F.conv2d(x, module.qkv.weight[:, :, None, None])
    runs = [maps]
    for scale, size in zip(module.scales, scales, strict=True):
        y = F.conv2d(maps, scale.depthwise.weight, padding=size // 2, groups=48)
        runs.append(F.conv2d(y, scale.pointwise.weight, groups=6))
    mixed = []
    for run in torch.cat(runs, 1).flatten(2).split(24, dim=1):
        q, k, v = run.split(8, dim=1)  # (B, 8, N)
        scores = k.relu().mT @ q.relu()  # (B, keys, queries)
        mixed.append(v @ (scores / (scores.sum(1, keepdim=True) + 1e-15)))
    expected = F.conv2d(
        torch.cat(mixed, 1).unflatten(2, grid), module.output.weight[:, :, None, None]
    )

    def check(candidate: nn.Module) -> None:
        assert_matches(expected, candidate(x), 3.6e-15)  # floor 3.6e-16

    check(module)
    with torch.no_grad():  # as if the thirds of all channels were query, key and value
        runs_first = module.qkv.weight.unflatten(0, (2, 3, 8))
        module.qkv.weight.copy_(runs_first.transpose(0, 1).flatten(0, 2))
    assert_detects(check, module)


def test_normalizing_gives_unit_statistics_and_inverts() -> None:
    mean, scale = tuple(range(8)), tuple(1.0 + i for i in range(8))
    config = replace(small("tiny"), latent_mean=mean, latent_scale=scale)
    network = build(config)
    latent = draw(2, 8, 3, 3)
    expected = torch.stack([(latent[:, c] - mean[c]) * scale[c] for c in range(8)], 1)

    def check(got: Tensor) -> None:
        assert_matches(expected, got, 1e-15)  # floor 0

    check(network.normalize(latent))
    assert_detects(check, network.normalize(latent * 1.01))
    assert_matches(latent, network.denormalize(network.normalize(latent)), 2e-15)  # floor 2.1e-16
    assert network.normalize(latent.bfloat16()).dtype is torch.float32


def test_autocast_and_bf16_weights_stay_near_fp64() -> None:
    for name in ("tiny", "dc-ae-f32c32-sana-1.1"):
        config, images = small(name), draw(1, 3, 64, 64)
        expected = build(config)(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = build(config).float()(images.float())
        assert_matches(expected.float(), got.float(), 0.1)  # floor 0.023
        got = build(config).bfloat16()(images.float())
        assert_matches(expected.float(), got.float(), 0.1)  # floor 0.023


def test_sides_must_be_multiples_of_the_factor() -> None:
    with pytest.raises(ValueError, match="64 x 33; the autoencoder needs multiples of 32: resize"):
        build(small("tiny")).encode(draw(1, 3, 33, 64))


def test_widths_that_no_shortcut_joins_are_refused() -> None:
    config = small("tiny")
    for side in ("encoder", "decoder"):
        stages = getattr(config, side)
        odd = replace(stages[-2], width=24)
        changed = replace(config, **{side: (*stages[:-2], odd, stages[-1])})
        with pytest.raises(CheckpointError, match="must be a multiple of the second: change the"):
            DCAE(changed)
    with pytest.raises(CheckpointError, match="joins 32 and 5 channels"):
        DCAE(replace(config, latent_channels=5))


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_the_bits_are_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build(small(name)).float()
    factor = network.config.factor
    images = draw(1, 3, 3 * factor, 2 * factor).float()
    kept = images.clone()
    with_gradients = network(images).detach()
    monkeypatch.setattr(maps, "NORM_VALUES", 1000)

    def check(network: DCAE) -> None:
        with torch.no_grad():
            assert torch.equal(network(images), with_gradients)

    check(network)
    monkeypatch.setattr(dcae, "STRIP_VALUES", 4000)
    with torch.no_grad():  # in strips a convolution's last bits may differ
        assert_matches(with_gradients, network(images), 2e-6)
    monkeypatch.undo()
    assert torch.equal(images, kept), "nothing is written into what the caller holds"
    for parameter in network.decoder.head.parameters():
        parameter.data.mul_(1.01)
    assert_detects(check, network)


def test_the_official_decoder_makes_1024_px_in_less_than_a_gibibyte() -> None:
    """Which is what lets the 1.6B model stay in 9.5 GiB; plain residuals took 2.1 GiB."""
    config = AUTOENCODERS["dc-ae-f32c32-sana-1.1"].config
    with torch.device("meta"):
        network = DCAE(config).to(torch.bfloat16).eval().to(memory_format=torch.channels_last)
    latent = torch.empty(1, 32, 32, 32, device="meta")
    assert 0.5 < peak_bytes(lambda: network.decode(latent)) / 2**30 < 0.8  # measured 0.79


def test_the_kernels_compute_the_same_decoder() -> None:
    """In triton's interpreter, or on a GPU: norms, activations and the middle of the mix-FFN."""
    pytest.importorskip("triton", reason="triton is made for Linux only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = [{"width": 8}, {"width": 16}, {"width": 16, "block": "efficientvit", "scales": (5,)}]
    stages = tuple(StageConfig(depth=1, **kind) for kind in kinds)  # type: ignore[arg-type]
    config = DCAEConfig(latent_channels=2, encoder=stages, decoder=stages, head_dim=16)
    network = build(config)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    latent = draw(1, 2, 2, 3)
    with torch.inference_mode():
        expected = network.decode(latent).float()
    network.float().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def check(network: DCAE) -> None:
        assert_matches(
            expected, network.decode(latent.float().to(device)).cpu(), 1.6e-6
        )  # floor 1.6e-7

    with torch.inference_mode(), ops.force("triton"):
        check(network)
        with ops.trying(*UNPROVEN):
            check(network)
        network.decoder.stages[0][1].first.bias.data.mul_(1.05)
        assert_detects(check, network)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5)])
def test_enlarging_and_convolving_is_one_transposed_convolution(height: int, width: int) -> None:
    x, weight = draw(2, 4, height, width), draw(3, 4, 3, 3, seed=1)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)

    def check(kernel: Tensor) -> None:
        got = F.conv_transpose2d(x, kernel, stride=2, padding=1)
        assert_matches(expected, got, 2e-15)  # floor 2e-16

    check(transposed(weight))
    assert_detects(check, transposed(weight).flip(2))


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 3, 5)])
def test_a_grouped_convolution_is_one_batched_product(batch: int, height: int, width: int) -> None:
    x = channels_last(draw(batch, 12, height, width))
    weight = draw(6, 4, 1, 1, seed=1)
    expected = F.conv2d(x, weight, groups=3)

    def check(weight: Tensor) -> None:
        with torch.inference_mode():
            got = product_by_groups(x, weight)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_matches(expected, got, 1e-15)  # floor 0 here; sums may run in another order

    check(weight)
    swapped = weight.clone()
    swapped[:2], swapped[2:4] = weight[2:4], weight[:2]
    assert_detects(check, swapped)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5)])
def test_enlarging_and_convolving_is_one_convolution_of_windows(height: int, width: int) -> None:
    x, weight = draw(2, 4, height, width), draw(3, 4, 3, 3, seed=1)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)

    def check(kernel: Tensor) -> None:
        places = F.conv2d(x, kernel, padding=1).unflatten(1, (2, 2, -1))  # (B, a, b, out, ., .)
        got = torch.empty_like(expected)
        for a in (0, 1):
            for b in (0, 1):
                got[..., a::2, b::2] = places[:, a, b, :, a : a + height, b : b + width]
        assert_matches(expected, got, 2e-15)  # floor 2e-16

    check(windows(weight))
    assert_detects(check, windows(weight).flip(2))
