"""What the DC-AE's kernels make of its maps, against torch's own: resampling, and a scale's mix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.kernels import ops
from sana.models.resampling import repeat_channels, shuffle, windows

pytest.importorskip("triton", reason="triton is made for Linux only")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dim", "out"), [(8, 8), (8, 4), (8, 2)])
def test_the_kernel_of_the_shortcut_is_the_shuffle(dim: int, out: int) -> None:
    own, x, bias = draw(2, out, 4, 6).float(), draw(2, dim, 2, 3, seed=1).float(), draw(out).float()
    expected = own + bias[:, None, None] + shuffle(repeat_channels(x, 4 * out))

    def check(x: Tensor) -> None:
        rows = own.permute(0, 2, 3, 1).contiguous()
        with ops.force("triton"), torch.inference_mode():
            assert ops.add_repeated_(rows, x.permute(0, 2, 3, 1).contiguous(), bias)
        assert_matches(expected, rows.permute(0, 3, 1, 2), 1e-6)  # floor 5e-8

    check(x)
    assert_detects(check, x.roll(1, dims=1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_kernel_sums_taps_as_the_product_does(layout: torch.memory_format) -> None:
    weight = draw(3, 5, 3, 3).float()
    expected = windows(weight)

    def check(weight: Tensor) -> None:
        with ops.force("triton"), torch.inference_mode():
            got = windows(weight.contiguous(memory_format=layout))
        assert got.shape == expected.shape
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_matches(expected, got, 2e-7)  # floor 4e-8: sums run in another order

    check(weight)
    assert_detects(check, weight.flip(2))
    assert_detects(check, weight.flip(3))


@pytest.mark.parametrize(("dim", "out"), [(8, 8), (8, 4), (8, 2)])
def test_windows_are_spread_with_bias_and_shortcut(dim: int, out: int) -> None:
    x, weight, bias = draw(2, dim, 2, 3), draw(out, dim, 3, 3, seed=1), draw(out)
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    expected = F.conv2d(large, weight, bias, padding=1) + shuffle(repeat_channels(x, 4 * out))
    z = F.conv2d(x, windows(weight), padding=1).permute(0, 2, 3, 1).float().contiguous()

    def check(x: Tensor) -> None:
        with ops.force("triton"), torch.inference_mode():
            got = ops.spread(z, x.permute(0, 2, 3, 1).float().contiguous(), bias.float())
        assert got is not None
        assert_matches(expected.float(), got.permute(0, 3, 1, 2), 1e-6)

    check(x)
    assert_detects(check, x.roll(1, dims=1))


@pytest.mark.parametrize(("height", "width"), [(2, 3), (3, 33)])
def test_a_scale_is_filtered_and_mixed_beside_its_map(height: int, width: int) -> None:
    x = draw(2, 32, height, width)
    taps, product = draw(32, 1, 5, 5, seed=1), draw(32, 16, 1, 1, seed=2)
    filtered = F.conv2d(x, taps, padding=2, groups=32)
    expected = F.conv2d(filtered, product, groups=2).float()

    def check(product: Tensor) -> None:
        wide = torch.zeros(2, height, width, 70)
        wide[..., :32] = x.permute(0, 2, 3, 1)
        with ops.force("triton"), torch.inference_mode():
            assert ops.aggregate_(wide, taps.float(), product.float(), 35)
        assert_matches(expected, wide[..., 35:67].permute(0, 3, 1, 2), 2e-6)
        assert torch.equal(wide[..., :32], x.permute(0, 2, 3, 1).float())
        assert not wide[..., 32:35].any() and not wide[..., 67:].any()

    check(product)
    assert_detects(check, product.flip(0))
    x = x.flip(2)
    assert_detects(check, product)
