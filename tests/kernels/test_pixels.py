"""The end of the DC-AE's decoder by kernels, against norm, activation and convolution in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.config import Activation, DCAEConfig, StageConfig
from sana.kernels import ops
from sana.models.dcae import DCAE
from sana.models.maps import ACTIVATIONS

fast = pytest.importorskip("sana.kernels.pixels", reason="triton is made for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5

Inputs = dict[str, Tensor]


def draw(batch: int, height: int, width: int, channels: int) -> Inputs:
    """The map (B, H, W, C), the norm's weight and bias, the convolution's."""
    generator = torch.Generator().manual_seed(channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "x": 3 * normal(batch, height, width, channels),
        "norm": 1 + normal(channels) / 4,
        "shift": normal(channels),
        "weight": normal(3, channels, 3, 3) / (9 * channels) ** 0.5,
        "bias": normal(3),
    }


def exact(inputs: Inputs, activation: Activation) -> Tensor:
    x, norm, shift, weight, bias = inputs.values()
    normed = F.rms_norm(x, norm.shape, norm, EPS) + shift
    maps = ACTIVATIONS[activation](normed).permute(0, 3, 1, 2)
    return F.conv2d(maps, weight, bias, padding=1).permute(0, 2, 3, 1)


def by_kernels(inputs: Inputs, activation: Activation, dtype: torch.dtype) -> Tensor:
    own = [part.to(DEVICE, dtype) for part in inputs.values()]
    assert fast.supports(*own)
    torch.use_deterministic_algorithms(True)  # and memory that nobody has written holds NaN
    try:
        assert own[0].new_empty(1).isnan()
        made: Tensor = fast.make_pixels(*own, EPS, ops.KINDS[activation])
    finally:
        torch.use_deterministic_algorithms(False)
    return made.cpu()


def assert_same(
    inputs: Inputs, activation: Activation, dtype: torch.dtype = torch.float32, bound: float = 8e-7
) -> None:
    """The kernels are right, and wrong where rows are taken the other way round."""
    expected = exact(inputs, activation).to(dtype)

    def check(inputs: Inputs) -> None:
        assert_matches(expected, by_kernels(inputs, activation, dtype), bound)

    check(inputs)
    assert_detects(check, {**inputs, "weight": inputs["weight"].flip(2)})


# The interpreter has no bf16 products.
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float32, 8e-7),  # floor 1.1e-7
        (torch.float16, 2e-3),  # floor 5.5e-4
        pytest.param(torch.bfloat16, 1.2e-2, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(
    ("batch", "height", "width", "channels"),
    [(1, 2, 3, 8), (2, 3, 5, 16), (2, 9, 33, 24), (1, 20, 30, 128)],
)
def test_equals_norm_activation_and_convolution(
    batch: int,
    height: int,
    width: int,
    channels: int,
    activation: Activation,
    dtype: torch.dtype,
    bound: float,
) -> None:
    assert_same(draw(batch, height, width, channels), activation, dtype, bound)


def test_one_pixel_has_no_neighbors() -> None:
    inputs = draw(2, 1, 1, 16)
    expected = exact(inputs, "relu").float()
    assert_matches(expected, by_kernels(inputs, "relu", torch.float32), 5e-7)  # floor 5e-8


@pytest.mark.parametrize("name", ["x", "norm", "shift", "weight", "bias"])
def test_every_input_counts(name: str) -> None:
    inputs = draw(1, 3, 4, 16)
    expected = exact(inputs, "silu").float()

    def check(fault: Tensor) -> None:
        got = by_kernels({**inputs, name: fault}, "silu", torch.float32)
        assert_matches(expected, got, 8e-7)  # floor 9e-8

    own = inputs[name]
    check(own)
    assert torch.equal(*(by_kernels(inputs, "silu", torch.float32) for _ in range(2)))
    # A norm takes no notice of a factor.
    assert_detects(check, own.roll(1, 2) if name == "x" else own * 1.01)
    if name == "weight":
        assert_detects(check, own.flip(3))
        assert_detects(check, own.roll(1, 0))


@pytest.mark.parametrize("rows", [3, 4, 5, 9, 15])
def test_bands_make_the_same_picture(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass sees so many rows at a time, of 14 in all."""
    bands: list[int] = []
    launch = fast._launch_products

    def noted(cells: Tensor, weights: Any, z: Tensor, *others: Any) -> None:
        assert z.numel() <= fast.BAND_VALUES and len(cells) <= z.shape[1]
        bands.append(len(cells))
        launch(cells, weights, z, *others)

    monkeypatch.setattr(fast, "BAND_VALUES", 27 * 6 * rows + 5)
    monkeypatch.setattr(fast, "_launch_products", noted)
    inputs = draw(2, 7, 6, 16)
    by_kernels(inputs, "relu", torch.float32)
    assert len(bands) == -(-14 // (rows - 2))
    assert_same(inputs, "relu")


def test_no_more_than_three_rows_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "BAND_VALUES", 1)
    assert_same(draw(2, 3, 5, 16), "relu")


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_nan_stays_and_reaches_its_neighbors_alone(activation: Activation) -> None:
    inputs = draw(2, 5, 6, 16)
    inputs["x"][1, 0, 3, 7] = float("nan")
    got = by_kernels(inputs, activation, torch.float32)
    reached = torch.zeros(2, 5, 6, 3, dtype=torch.bool)
    reached[1, :2, 2:5] = True
    assert torch.equal(got.isnan(), reached)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_may_be_in_any_memory(layout: torch.memory_format) -> None:
    inputs = draw(1, 3, 4, 16)
    inputs["weight"] = inputs["weight"].contiguous(memory_format=layout)
    assert_same(inputs, "relu")


def test_a_compiled_caller_goes_through_the_kernels() -> None:
    own = [part.float().to(DEVICE) for part in draw(2, 3, 5, 16).values()]
    compiled = torch.compile(fast.make_pixels, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*own, EPS, 1), fast.make_pixels(*own, EPS, 1))


def test_other_inputs_are_not_taken() -> None:
    x, *parts = (part.float() for part in draw(1, 2, 2, 16).values())
    assert fast.supports(x, *parts)
    assert not fast.supports(x.half(), *parts)
    assert not fast.supports(x.double(), *(part.double() for part in parts))
    assert not fast.supports(x.transpose(1, 2).expand(2, 2, 2, 16), *parts)
    four = torch.cat([parts[2], parts[2][:1]])
    assert not fast.supports(x, parts[0], parts[1], four, parts[3])
    wide = [part.float() for part in draw(1, 1, 1, 2 * fast.WIDEST).values()]
    assert not fast.supports(*wide)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_decoder_with_it_makes_the_same_picture(
    activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    launch = fast.make_pixels

    def noted(x: Tensor, *others: Any) -> Tensor:
        made.append(tuple(x.shape))
        return launch(x, *others)

    monkeypatch.setattr(fast, "make_pixels", noted)
    network = decoder(activation)
    latent = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def decode(*ways: Any, backend: Any = "triton") -> Tensor:
        without: Any = () if ways else ("pixels",)
        with ops.force(backend), ops.trying(*ways, without=without):
            return network.decode(latent)

    with torch.inference_mode():
        expected = decode()
        assert not made

        def check(network: DCAE) -> None:
            got = decode("pixels")
            assert got.stride() == expected.stride()
            assert_matches(expected, got, 1.6e-6)  # floor 1.7e-7

        check(network)
        assert made == [(2, 12, 20, 8)]
        decode("pixels", backend="reference")
        assert len(made) == 1
        network.decoder.norm.bias.data.mul_(1.05)
        assert_detects(check, network)
    made.clear()
    decode("pixels").sum().backward()
    assert not made, "gradients are torch's"


def decoder(activation: Activation) -> DCAE:
    stages = tuple(StageConfig(width=width, depth=1) for width in (8, 8, 16))
    config = DCAEConfig(
        latent_channels=2, encoder=stages, decoder=stages, head_dim=4, out_activation=activation
    )
    torch.manual_seed(0)
    network = DCAE(config).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network
