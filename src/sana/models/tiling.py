"""DC-AE over overlapping tiles, so that memory follows the tile and not the picture.

All tiles of a call have one shape (the last is shifted back, not cut), neighbors share at least a
quarter of a tile, and a raised-cosine window joins them: the weights at every pixel sum to one.
DC-AE's linear attention is global, so tiles differ from the whole picture in plain areas; large
tiles (1024 px and up) keep that invisible. One image at a time, one row of tiles at a time: the
finished rows leave before the next ones are computed. Start reading at `decode_bands`.

Shape letters: B batch, C channels, H W pixels, h w latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sana.models.dcae import DCAE

LEAST_OVERLAP = 0.25
BEST_TILE = 1024
"""Smaller tiles show in skies and walls; see `docs/memory.md`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Equal tiles along one side, in latent cells."""

    length: int
    tile: int
    starts: tuple[int, ...]

    @property
    def places(self) -> list[slice]:
        """The cells of each tile."""
        return [slice(start, start + self.tile) for start in self.starts]


def decode_tiled(
    autoencoder: DCAE,
    latent: Tensor,
    *,
    tile: int | tuple[int, int] = BEST_TILE,
    overlap: float = LEAST_OVERLAP,
    device: torch.device | str | None = None,
) -> Tensor:
    """Raw latents (B, C, h, w) -> images (B, 3, H, W) in the weights' dtype, on `device`.

    `tile` is in pixels, a side or height and width, `overlap` the least shared part of a tile. One
    tile gives the very result of `autoencoder.decode`. ValueError for tiles that cannot be.
    """
    weight = autoencoder.decoder.stem.weight
    factor = autoencoder.config.factor
    images = torch.empty(
        (len(latent), 3, latent.shape[-2] * factor, latent.shape[-1] * factor),
        dtype=weight.dtype,
        device=latent.device if device is None else device,
    )
    for image, one in zip(images, latent.split(1), strict=True):
        row = 0
        for band in decode_bands(autoencoder, one, tile=tile, overlap=overlap):
            image[:, row : row + band.shape[-2]] = band[0]
            row += band.shape[-2]
    return images


def decode_bands(
    autoencoder: DCAE,
    latent: Tensor,
    *,
    tile: int | tuple[int, int] = BEST_TILE,
    overlap: float = LEAST_OVERLAP,
) -> Iterator[Tensor]:
    """The decoded picture of `latent` (1, C, h, w) in finished bands (1, 3, rows, W), top down.

    Bands are on the weights' device, in fp32, or in the weights' dtype where one tile is enough.
    """
    weight = autoencoder.decoder.stem.weight
    factor = autoencoder.config.factor
    sides = (tile, tile) if isinstance(tile, int) else tile
    rows, columns = (
        cut(n, side, overlap, factor) for n, side in zip(latent.shape[-2:], sides, strict=True)
    )
    if len(rows.starts) == len(columns.starts) == 1:
        yield autoencoder.decode(latent.to(weight.device))
        return

    def decode(y: slice, x: slice) -> Tensor:
        return autoencoder.decode(latent[..., y, x].to(weight.device))

    yield from _blend(decode, rows, columns, factor)


def encode_tiled(
    autoencoder: DCAE,
    images: Tensor,
    *,
    tile: int = BEST_TILE,
    overlap: float = LEAST_OVERLAP,
) -> Tensor:
    """Images (B, 3, H, W) in -1..1, on any device -> raw latents (B, C, h, w) by the encoder.

    The latents are on the weights' device, in their dtype. Raises `ValueError` as `encode` does.
    """
    weight = autoencoder.encoder.head.weight
    factor = autoencoder.config.factor
    height, width = images.shape[-2:]
    rows, columns = (cut(side // factor, tile, overlap, factor) for side in (height, width))
    if height % factor or width % factor or len(rows.starts) == len(columns.starts) == 1:
        return torch.cat([autoencoder.encode(one.to(weight.device)) for one in images.split(1)])

    def encode_one(image: Tensor) -> Tensor:
        def encode(y: slice, x: slice) -> Tensor:
            part = image[..., _scaled(y, factor), _scaled(x, factor)]
            return autoencoder.encode(part.to(weight.device))

        return torch.cat(list(_blend(encode, rows, columns, 1)), dim=-2).to(weight.dtype)

    return torch.cat([encode_one(image) for image in images.split(1)])


def cut(length: int, tile: int, overlap: float, factor: int) -> Axis:
    """Spread equal tiles of `tile` pixels evenly over `length` cells of `factor` pixels."""
    if tile % factor or tile < 2 * factor:
        raise ValueError(
            f"the tile is {tile} px; tiles are multiples of {factor} px and at least {2 * factor}: "
            f"use {max(2, tile // factor) * factor}"
        )
    if not LEAST_OVERLAP <= overlap < 1:
        raise ValueError(
            f"the overlap is {overlap}; tiles share at least {LEAST_OVERLAP} of their side and "
            f"less than all of it, or their borders show: use {LEAST_OVERLAP}"
        )
    cells = tile // factor
    if length <= cells:
        return Axis(length=length, tile=length, starts=(0,))
    stride = max(1, cells - math.ceil(cells * overlap))
    count = math.ceil((length - cells) / stride) + 1
    starts = tuple(round(i * (length - cells) / (count - 1)) for i in range(count))
    return Axis(length=length, tile=cells, starts=starts)


def windows(axis: Axis, scale: int) -> Tensor:
    """Weights (tiles, tile * scale), fp32: raised cosines over each overlap; they sum to one."""
    size = axis.tile * scale
    places = [slice(start * scale, start * scale + size) for start in axis.starts]
    shape = torch.ones(len(places), size, dtype=torch.float64)
    for index in range(1, len(places)):
        shared = places[index - 1].stop - places[index].start
        rise = (torch.arange(shared, dtype=torch.float64) + 0.5) * (math.pi / 2 / shared)
        shape[index, :shared] *= rise.sin().square()
        shape[index - 1, size - shared :] *= rise.cos().square()
    total = torch.zeros(axis.length * scale, dtype=torch.float64)
    for place, weights in zip(places, shape, strict=True):
        total[place] += weights
    return torch.stack(
        [weights / total[place] for place, weights in zip(places, shape, strict=True)]
    ).float()


def _blend(
    run: Callable[[slice, slice], Tensor], rows: Axis, columns: Axis, scale: int
) -> Iterator[Tensor]:
    """Bands of the weighted sum of run(y, x), whose results are `scale` times the cells' size."""
    down, across = windows(rows, scale), windows(columns, scale)
    sum_of_tiles: Tensor | None = None
    for index, y in enumerate(rows.places):
        for x, weights in zip(columns.places, across, strict=True):
            part = run(y, x)
            if sum_of_tiles is None:
                sum_of_tiles = _zeros(part, rows.tile * scale, columns.length * scale)
            window = down[index][:, None] * weights
            sum_of_tiles[..., _scaled(x, scale)] += part.float() * window.to(part.device)
            del part
        assert sum_of_tiles is not None, "an axis has a tile"
        if index + 1 == len(rows.starts):
            yield sum_of_tiles
            return
        finished = (rows.starts[index + 1] - y.start) * scale
        yield sum_of_tiles[..., :finished, :]
        following = torch.zeros_like(sum_of_tiles)
        following[..., : following.shape[-2] - finished, :] = sum_of_tiles[..., finished:, :]
        sum_of_tiles = following


def _zeros(part: Tensor, height: int, width: int) -> Tensor:
    return part.new_zeros((*part.shape[:2], height, width), dtype=torch.float32)


def _scaled(place: slice, scale: int) -> slice:
    return slice(place.start * scale, place.stop * scale)
