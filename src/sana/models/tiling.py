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

import torch
from torch import Tensor

from sana.models.cutting import BEST_TILE, LEAST_OVERLAP, Axis, Tile, cut
from sana.models.dcae import DCAE


def decode_tiled(
    autoencoder: DCAE,
    latent: Tensor,
    *,
    tile: int | Tile = BEST_TILE,
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
    tile: int | Tile = BEST_TILE,
    overlap: float = LEAST_OVERLAP,
) -> Iterator[Tensor]:
    """The decoded picture of `latent` (1, C, h, w) in finished bands (1, 3, rows, W), top down.

    Bands are on the weights' device, in fp32, or in the weights' dtype where one tile is enough.
    """
    weight = autoencoder.decoder.stem.weight
    factor = autoencoder.config.factor
    rows, columns = _axes(latent.shape[-2], latent.shape[-1], tile, overlap, factor)
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
    tile: int | Tile = BEST_TILE,
    overlap: float = LEAST_OVERLAP,
) -> Tensor:
    """Images (B, 3, H, W) in -1..1, on any device -> raw latents (B, C, h, w) by the encoder.

    The latents are on the weights' device, in their dtype. Raises `ValueError` as `encode` does.
    """
    weight = autoencoder.encoder.head.weight
    factor = autoencoder.config.factor
    height, width = images.shape[-2:]
    is_whole = bool(height % factor or width % factor)
    if not is_whole:
        rows, columns = _axes(height // factor, width // factor, tile, overlap, factor)
        is_whole = len(rows.starts) == len(columns.starts) == 1
    if is_whole:
        return torch.cat([autoencoder.encode(one.to(weight.device)) for one in images.split(1)])

    def encode_one(image: Tensor) -> Tensor:
        def encode(y: slice, x: slice) -> Tensor:
            part = image[..., _scaled(y, factor), _scaled(x, factor)]
            return autoencoder.encode(part.to(weight.device))

        return torch.cat(list(_blend(encode, rows, columns, 1)), dim=-2).to(weight.dtype)

    return torch.cat([encode_one(image) for image in images.split(1)])


def _axes(
    height: int, width: int, tile: int | Tile, overlap: float, factor: int
) -> tuple[Axis, Axis]:
    """How `height` x `width` cells are cut."""
    tall, wide = (tile, tile) if isinstance(tile, int) else tile
    return cut(height, tall, overlap, factor), cut(width, wide, overlap, factor)


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
