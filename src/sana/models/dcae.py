"""DC-AE, the deep-compression autoencoder (arXiv 2410.10733), all official kinds from one config.

Attributes: `encoder.{stem,stages,head}` and `decoder.{stem,stages,norm,head}`. `stages[i]` is a
Sequential at resolution 2^-i: in the encoder its blocks and then `Down` to stage i + 1, in the
decoder `Up` from stage i + 1 and then its blocks, run from last to first. `encoder.head` and
`decoder.stem` touch the latent, `decoder.head` (after `decoder.norm`) makes the pixels.
Blocks: `ResBlock.{first,second,norm}`, `EViTBlock.{attention,feed_forward,norm}`.

Shape letters: B batch, C channels, H W pixels or grid, N = H W. Maps keep channels-last memory
throughout (the shuffles write it), which the convolutions on GPU and CPU prefer.

Full-resolution maps decide the memory of a picture, so without gradients nothing holds one longer
than needed: sums and activations are written in place, and norms go through a map in pieces.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.config import Activation, DCAEConfig, NormKind, StageConfig
from sana.errors import CheckpointError
from sana.kernels import ops
from sana.kernels.ops import linear_attention
from sana.kernels.reference import quadratic_attention
from sana.models.layers import GLUMBConv, split_heads
from sana.models.maps import ChannelRMSNorm, add, convolve, make_norm, normed_sum
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
from sana.models.rounding import Product, product_dtype, rounded
from sana.models.sending import sent

ATTENTION_EPS = 1e-15
STRIP_VALUES = 2**26
"""The enlarged map that a convolution is about to read holds at most this many values."""


class DCAE(nn.Module):
    """Images (B, 3, H, W) in -1..1 <-> latents (B, C, H / factor, W / factor), without sampling."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruction of images, not clamped."""
        return self.decode(self.encode(images))

    def encode(self, images: Tensor) -> Tensor:
        """Images in -1..1 -> raw latent; ValueError unless both sides are multiples of `factor`."""
        factor = self.config.factor
        height, width = images.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(
                f"the image is {width} x {height}; the autoencoder needs multiples of {factor}: "
                "resize or crop it"
            )
        latent: Tensor = self.encoder(images.to(self.encoder.head.weight.dtype))
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Raw latent -> images, about -1..1 but not clamped."""
        images: Tensor = self.decoder(latent.to(self.decoder.stem.weight.dtype))
        return images

    def normalize(self, latent: Tensor) -> Tensor:
        """Raw latent -> what the diffusion model sees, in at least fp32."""
        mean, scale = self._statistics(latent)
        return (latent - mean) * scale

    def denormalize(self, latent: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, scale = self._statistics(latent)
        return latent / scale + mean

    def _statistics(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(latent.dtype, torch.float32)
        values = (self.config.latent_mean, self.config.latent_scale)
        mean, scale = (torch.tensor(v, dtype=dtype)[:, None, None] for v in values)
        return sent(mean, latent.device), sent(scale, latent.device)


class Encoder(nn.Module):
    """Stem, stages from full resolution down, and a head with a channel-averaging shortcut."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        stages = config.encoder
        first = stages[0].width if stages[0].depth else stages[1].width
        self.stem: nn.Module = nn.Conv2d(3, first, 3, padding=1)
        if not stages[0].depth:
            self.stem = Down(3, first, config.down, has_shortcut=False)
        self.stages = nn.ModuleList()
        for index, stage in enumerate(stages):
            layers = [make_block(stage, config.head_dim) for _ in range(stage.depth)]
            if index + 1 < len(stages) and (index or stage.depth):
                layers.append(Down(stage.width, stages[index + 1].width, config.down))
            self.stages.append(nn.Sequential(*layers))
        check_shortcut(stages[-1].width, config.latent_channels)
        self.head = nn.Conv2d(stages[-1].width, config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(channels_last(images))
        for stage in self.stages:
            for layer in stage.children():
                x = layer(x)
        latent: Tensor = self.head(x)
        return latent + average_channels(x, latent.shape[1])


class Decoder(nn.Module):
    """Stem with a channel-repeating shortcut, stages up to full resolution, norm, and head."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        stages = config.decoder
        first = stages[0].width if stages[0].depth else stages[1].width
        self.activation = config.out_activation
        check_shortcut(stages[-1].width, config.latent_channels)
        self.stem = nn.Conv2d(config.latent_channels, stages[-1].width, 3, padding=1)
        self.stages = nn.ModuleList()
        for index, stage in enumerate(stages):
            layers: list[nn.Module] = []
            if index + 1 < len(stages) and (index or stage.depth):
                layers.append(Up(stages[index + 1].width, stage.width, config.up))
            layers += [make_block(stage, config.head_dim) for _ in range(stage.depth)]
            self.stages.append(nn.Sequential(*layers))
        self.norm = ChannelRMSNorm(first)
        self.head: nn.Module = nn.Conv2d(first, 3, 3, padding=1)
        if not stages[0].depth:
            self.head = Up(first, 3, config.up, has_shortcut=False)

    def forward(self, latent: Tensor) -> Tensor:
        latent = channels_last(latent)
        x = self.stem(latent)
        x = x + repeat_channels(latent, x.shape[1])
        wide, narrow = x.dtype, product_dtype(self.stages)
        x = rounded(x, narrow)
        for stage in reversed(list(self.stages)):
            for layer in stage.children():
                x = layer(x)
        x = x.to(wide) if narrow.itemsize < wide.itemsize else x
        images = self._pixels_at_once(x)
        if images is None:
            images = self.head(self.norm.activated(x, self.activation))
        return images

    def _pixels_at_once(self, x: Tensor) -> Tensor | None:
        """Norm, activation and head without a map between; None where kernels do not take that."""
        head, rows = self.head, x.permute(0, 2, 3, 1)
        if not (ops.allows("pixels") and isinstance(head, nn.Conv2d) and head.bias is not None):
            return None
        parts = (rows, self.norm.weight, self.norm.bias, head.weight, head.bias)
        if not ops.fuses(*parts):
            return None
        from sana.kernels import pixels

        if not pixels.supports(*parts):
            return None
        made: Tensor = pixels.make_pixels(*parts, self.norm.eps, ops.KINDS[self.activation])
        return made.permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x))))."""

    def __init__(self, dim: int, norm: NormKind, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.first = nn.Conv2d(dim, dim, 3, padding=1)
        self.second = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = make_norm(norm, dim)

    def forward(self, x: Tensor) -> Tensor:
        return normed_sum(self.norm, self.second(convolve(self.first, x, self.activation)), x)


class EViTBlock(nn.Module):
    """EfficientViT: multi-scale linear attention and a GLUMBConv of 4 C, both with residual."""

    def __init__(self, dim: int, head_dim: int, scales: tuple[int, ...], norm: NormKind) -> None:
        super().__init__()
        self.attention = MultiScaleAttention(dim, head_dim, scales, norm)
        self.feed_forward = GLUMBConv(dim, 4 * dim)
        self.norm = ChannelRMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = normed_sum(self.attention.norm, self.attention.mix(x), x)
        branch: Tensor = self.feed_forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed_sum(self.norm, branch, x)


class MultiScaleAttention(nn.Module):
    """ReLU linear attention over the map and its depthwise-filtered copies, one per scale.

    `qkv` does not make a query, a key and a value: its 3 C channels, and those of every scale after
    them, are regrouped in runs of 3 x head_dim, whose thirds are query, key and value.
    """

    def __init__(self, dim: int, head_dim: int, scales: tuple[int, ...], norm: NormKind) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.scales = nn.ModuleList(Aggregate(3 * dim, head_dim, scale) for scale in scales)
        self.output = Product((1 + len(scales)) * dim, dim, bias=False)
        self.norm = make_norm(norm, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), without the residual."""
        normed: Tensor = self.norm(self.mix(x))
        return normed

    def mix(self, x: Tensor) -> Tensor:
        """`forward` without the norm."""
        height, width = x.shape[-2:]
        qkv = self._all_scales(x.permute(0, 2, 3, 1))
        heads = split_heads(qkv.flatten(1, 2), 3 * self.head_dim)
        q, k, v = heads.chunk(3, dim=-1)  # each (B, heads, N, head_dim)
        is_short = height * width <= self.head_dim
        attend = quadratic_attention if is_short else linear_attention
        mixed = attend(q, k, v, eps=ATTENTION_EPS).transpose(1, 2).flatten(2)
        out = torch.unflatten(self.output(mixed), 1, (height, width))
        return out.permute(0, 3, 1, 2)

    def _all_scales(self, rows: Tensor) -> Tensor:
        """Queries, keys and values (B, H, W, 3 C S) of rows (B, H, W, C), S - 1 times filtered."""
        if ops.allows("aggregate") and self.scales:
            joined = self._all_at_once(rows)
            if joined is not None:
                return joined
        qkv: Tensor = self.qkv(rows)
        if not self.scales:
            return qkv
        maps = qkv.permute(0, 3, 1, 2)
        filtered = [scale(maps).permute(0, 2, 3, 1) for scale in self.scales]
        return torch.cat([qkv, *filtered], dim=-1)

    def _all_at_once(self, rows: Tensor) -> Tensor | None:
        """The same, each written where it stays; None where kernels do not take that."""
        weight, rows = self.qkv.weight, rows.contiguous()
        if not (ops.is_inference(rows, weight) and ops.uses_triton(rows)):
            return None
        if rows.dtype != weight.dtype:
            return None
        width = len(weight)
        wide = rows.new_empty((*rows.shape[:3], width * (1 + len(self.scales))))
        torch.mm(rows.flatten(0, 2), weight.mT, out=wide.flatten(0, 2)[:, :width])
        for place, scale in enumerate(self.scales, start=1):
            assert isinstance(scale, Aggregate)
            taps, product = scale.depthwise.weight, scale.pointwise.weight
            if not ops.aggregate_(wide, taps, product, place * width):
                return None
        return wide


class Aggregate(nn.Module):
    """One scale: depthwise `size` x `size`, then 1x1 within each run of `head_dim` channels."""

    def __init__(self, dim: int, head_dim: int, size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, bias=False)
        self.pointwise = nn.Conv2d(dim, dim, 1, groups=dim // head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.depthwise(x), self.pointwise.weight
        # cuDNN would cut the convolution into one for each group, and x into copies for them.
        if ops.is_inference(x, weight) and ops.uses_triton(x) and x.dtype == weight.dtype:
            return product_by_groups(x, weight)
        filtered: Tensor = self.pointwise(x)
        return filtered


class Down(nn.Module):
    """Halves the resolution: strided convolution or pixel unshuffle; adds averaged channels."""

    def __init__(self, dim: int, out: int, kind: str, *, has_shortcut: bool = True) -> None:
        super().__init__()
        self.unshuffles = kind == "pixel_unshuffle"
        self.has_shortcut = has_shortcut
        if has_shortcut:
            check_shortcut(4 * dim, out)
        width, stride = (out // 4, 1) if self.unshuffles else (out, 2)
        self.conv = nn.Conv2d(dim, width, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        main: Tensor = self.conv(x)
        if self.unshuffles:
            main = unshuffle(main)
        if self.has_shortcut:
            main = add(main, average_channels(unshuffle(x), main.shape[1]))
        return main


class Up(nn.Module):
    """Doubles the resolution: nearest and convolution, or pixel shuffle; adds repeated channels."""

    def __init__(self, dim: int, out: int, kind: str, *, has_shortcut: bool = True) -> None:
        super().__init__()
        self.out = out
        self.shuffles = kind == "pixel_shuffle"
        self.has_shortcut = has_shortcut
        if has_shortcut:
            check_shortcut(4 * out, dim)
        self.conv = nn.Conv2d(dim, 4 * out if self.shuffles else out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.shuffles:
            main = shuffle(self.conv(x))
        elif (result := self._enlarge_by_windows(x)) is not None:
            return result
        elif self._is_one_convolution(x):
            return self._enlarge_at_once(x)
        elif torch.is_grad_enabled() or 4 * x.numel() <= STRIP_VALUES:
            main = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        else:
            main = self._enlarge_in_strips(x)
        return self._add_shortcut(main, x) if self.has_shortcut else main

    def _enlarge_by_windows(self, x: Tensor) -> Tensor | None:
        """Nearest and convolution as one of 2x2 taps; None where kernels do not take that."""
        bias, is_free = self.conv.bias, ops.is_inference(x, self.conv.weight)
        results = 4 * (x.shape[-2] + 1) * (x.shape[-1] + 1) * len(x) * self.out
        if not (ops.allows("windows") and is_free and ops.uses_triton(x) and results < 2**31):
            return None
        if bias is None or not self.has_shortcut:
            return None
        places = F.conv2d(x, windows(self.conv.weight), padding=1).permute(0, 2, 3, 1)
        result = ops.spread(places, x.permute(0, 2, 3, 1), bias)
        return None if result is None else result.permute(0, 3, 1, 2)

    def _is_one_convolution(self, x: Tensor) -> bool:
        """On a GPU without gradients, and where cuDNN can count the result's values."""
        results = 4 * x.numel() // x.shape[1] * self.out
        is_free = ops.is_inference(x, self.conv.weight)
        return ops.allows("doubling") and is_free and ops.uses_triton(x) and results < 2**31

    def _enlarge_at_once(self, x: Tensor) -> Tensor:
        """Nearest and convolution as one transposed convolution, which needs no enlarged map."""
        bias = self.conv.bias
        assert bias is not None
        main = F.conv_transpose2d(x, transposed(self.conv.weight), stride=2, padding=1)
        rows = main.permute(0, 2, 3, 1)
        if self.has_shortcut and ops.add_repeated_(rows, x.permute(0, 2, 3, 1), bias):
            return main
        main = main.add_(bias[:, None, None])
        return self._add_shortcut(main, x) if self.has_shortcut else main

    def _enlarge_in_strips(self, x: Tensor) -> Tensor:
        """Nearest and convolution, some rows at a time, each with the rows around it."""
        rows = max(1, STRIP_VALUES * x.shape[-2] // (4 * x.numel()))
        padded = F.pad(x, (0, 0, 1, 1))
        height, width = (2 * side for side in x.shape[-2:])
        result = x.new_empty((len(x), height, width, self.out)).permute(0, 3, 1, 2)
        for start in range(0, x.shape[-2], rows):
            result[..., 2 * start : 2 * (start + rows), :] = self._enlarge_strip(
                padded[..., start : start + rows + 2, :]
            )
        return result

    def _enlarge_strip(self, part: Tensor) -> Tensor:
        large = F.interpolate(part, scale_factor=2, mode="nearest")[..., 1:-1, :]
        return F.conv2d(large, self.conv.weight, self.conv.bias, padding=(0, 1))

    def _add_shortcut(self, main: Tensor, x: Tensor) -> Tensor:
        repeats = 4 * self.out // x.shape[1]
        if torch.is_grad_enabled() or repeats > 4:
            return add(main, shuffle(repeat_channels(x, 4 * self.out)))
        for place in range(4):  # the same, without making it first
            part = x[:, place // repeats :: 4 // repeats]
            main[..., place // 2 :: 2, place % 2 :: 2].add_(part)
        return main


def make_block(stage: StageConfig, head_dim: int) -> nn.Module:
    """One block of the stage's kind."""
    if stage.block == "efficientvit":
        return EViTBlock(stage.width, head_dim, stage.scales, stage.norm)
    return ResBlock(stage.width, stage.norm, stage.activation)


def check_shortcut(many: int, few: int) -> None:
    """CheckpointError unless `many` channels average into `few`, or `few` repeat into `many`."""
    if many % few:
        raise CheckpointError(
            f"a shortcut joins {many} and {few} channels; the first must be a multiple of the "
            "second: change the stage widths or the latent channels"
        )
