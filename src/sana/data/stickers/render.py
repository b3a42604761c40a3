"""Draws batches of scenes on a CPU or a GPU.

Objects of equal size are handled together: their sprites are scaled with an antialiased filter in
premultiplied alpha, recoloured, and laid over the background inside their squares alone, so that
the cost follows the drawn area. Start reading at `Renderer.render`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.data.stickers import landscapes
from sana.data.stickers.backgrounds import KINDS
from sana.data.stickers.recolor import Hues, make_tables, measure_hues, recolor
from sana.data.stickers.scene import CANVAS, COLORS, SLOTS, Scene
from sana.data.stickers.world import World

_AVATAR_SIDE = 496
_CHUNK = 256
_KIND_NUMBER = {name: number for number, name in enumerate(KINDS)}
_COLOR_NUMBER = {name: number for number, name in enumerate(COLORS)}


class SceneTensors(NamedTuple):
    """What a renderer needs of B scenes, on the CPU; every field has B rows.

    sprite, color: int64 [B, 4], -1 for an empty slot or the natural colour. square: int64
    [B, 4, 3], (x, y, side). avatar: int64 [B], -1 for none. kind: int64 [B], in `KINDS`;
    ends: uint8 [B, 2, 3]; knobs: fp32 [B, 6].
    """

    sprite: Tensor
    color: Tensor
    square: Tensor
    avatar: Tensor
    kind: Tensor
    ends: Tensor
    knobs: Tensor

    def rows(self, index: slice | Tensor) -> SceneTensors:
        """Some of the scenes."""
        return SceneTensors(*(field[index] for field in self))

    @staticmethod
    def cat(parts: Sequence[SceneTensors]) -> SceneTensors:
        """Several batches as one."""
        return SceneTensors(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def to_tensors(scenes: Sequence[Scene]) -> SceneTensors:
    """Scenes as tensors, cheap enough for a data worker."""
    sprites, colors, squares = [], [], []
    for scene in scenes:
        empty = SLOTS - len(scene.objects)
        sprites.append([placed.sprite for placed in scene.objects] + [-1] * empty)
        colors.append(
            [
                _COLOR_NUMBER[placed.color or ""] if placed.is_recolored else -1
                for placed in scene.objects
            ]
            + [-1] * empty
        )
        squares.append([placed.square for placed in scene.objects] + [(0, 0, 0)] * empty)
    behind = [scene.background for scene in scenes]
    return SceneTensors(
        sprite=torch.tensor(sprites),
        color=torch.tensor(colors),
        square=torch.tensor(squares),
        avatar=torch.tensor([-1 if s.avatar is None else s.avatar for s in scenes]),
        kind=torch.tensor([_KIND_NUMBER[background.kind] for background in behind]),
        ends=torch.tensor([(b.top, b.bottom) for b in behind], dtype=torch.uint8),
        knobs=torch.tensor([b.knobs for b in behind], dtype=torch.float32),
    )


class Renderer:
    """A world's pictures on one device."""

    def __init__(
        self,
        world: World,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._palette = landscapes.Palette(self.device)
        self._tables = make_tables(self.device)
        self.sprites = world.sprites.to(self.device)
        self.avatars = world.avatar_images.to(self.device)
        main = [
            int(world.sprite_of[c, 0])
            for c, concept in enumerate(world.concepts)
            if concept.recolorable and world.sprite_of[c, 0] >= 0
        ]
        self._hues = self._measure(torch.tensor(main, dtype=torch.int64))

    @torch.no_grad()
    def render(self, scenes: Sequence[Scene] | SceneTensors, size: int) -> Tensor:
        """Pictures [B, 3, size, size] in -1..1, channels last. `size` is a multiple of 64."""
        if size < 64 or size % 64:
            raise ValueError(
                f"pictures of {size} px were asked for; scenes lie on a 64-part grid: "
                "take a multiple of 64"
            )
        batch = scenes if isinstance(scenes, SceneTensors) else to_tensors(scenes)
        canvas = landscapes.paint(batch.kind, batch.ends, batch.knobs, size, self._palette)
        self._draw_sprites(canvas, batch, size)
        self._draw_avatars(canvas, batch, size)
        return canvas.mul_(2).sub_(1).clamp_(-1, 1).to(self.dtype).permute(0, 3, 1, 2)

    def _draw_sprites(self, canvas: Tensor, batch: SceneTensors, size: int) -> None:
        scene, slot = (batch.sprite >= 0).nonzero().unbind(1)
        if not len(scene):
            return
        color = batch.color[scene, slot]
        x, y, side = batch.square[scene, slot].unbind(1)
        group = side * 2 + (color >= 0)
        order = group.argsort(stable=True)
        keys, counts = group[order].unique_consecutive(return_counts=True)
        # One copy for all groups.
        fields = [batch.sprite[scene, slot], color, scene, x * size // CANVAS, y * size // CANVAS]
        placed = self._put(torch.stack(fields)[:, order])
        parts = placed.split(counts.tolist(), dim=1)
        for key, part in zip(keys.tolist(), parts, strict=True):
            for rows in part.split(_CHUNK, dim=1):
                pixels = self._scaled(self.sprites, rows[0], key // 2 * size // CANVAS)
                if key % 2:
                    pixels = self._turned(pixels, rows[0], rows[1])
                _lay(canvas, pixels, rows[2:])

    def _turned(self, pixels: Tensor, sprite: Tensor, color: Tensor) -> Tensor:
        straight = pixels[..., :3] / pixels[..., 3:].clamp(min=1e-3)
        hues = self._hues.rows(sprite)
        turned = recolor(straight.clamp(0, 1), color, hues, self._tables)
        return torch.cat([turned * pixels[..., 3:], pixels[..., 3:]], -1)

    def _draw_avatars(self, canvas: Tensor, batch: SceneTensors, size: int) -> None:
        scene = (batch.avatar >= 0).nonzero().flatten()
        side = _AVATAR_SIDE * size // CANVAS
        for rows in scene.split(_CHUNK) if len(scene) else ():
            pixels = self._scaled(self.avatars, self._put(batch.avatar[rows]), side)
            left = torch.full_like(rows, (size - side) // 2)
            corner = torch.stack([rows, left, torch.full_like(rows, size - side)])
            _lay(canvas, pixels, self._put(corner))

    def _scaled(self, pictures: Tensor, index: Tensor, side: int) -> Tensor:
        """Pictures scaled to [n, side, side, 4] with premultiplied alpha in 0..1."""
        pixels = pictures[index].float().div_(255)
        pixels[..., :3] *= pixels[..., 3:]
        scaled = F.interpolate(
            pixels.permute(0, 3, 1, 2),
            size=(side, side),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        return scaled.permute(0, 2, 3, 1)

    def _put(self, tensor: Tensor) -> Tensor:
        return landscapes.send(tensor, self.device)

    def _measure(self, index: Tensor) -> Hues:
        """Colour families at the rows of the sprites that can be recoloured."""
        total = len(self.sprites)
        fields = [torch.zeros(total, device=self.device) for _ in Hues._fields]
        for part in index.split(64):
            rows = self._put(part)
            for field, values in zip(
                fields, measure_hues(self.sprites[rows], self._tables), strict=True
            ):
                field[rows] = values
        return Hues(*fields)


def render(
    world: World,
    scenes: Sequence[Scene] | SceneTensors,
    size: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`Renderer(world, device=device).render(scenes, size)`; for many batches keep a `Renderer`."""
    return Renderer(world, device=device).render(scenes, size)


def _lay(canvas: Tensor, pixels: Tensor, corner: Tensor) -> None:
    """Lay premultiplied squares [n, s, s, 4] over the canvas; corner [3, n] is (row, x, y)."""
    side = torch.arange(pixels.shape[1], device=canvas.device)
    row, x, y = corner
    place = (row[:, None, None], y[:, None, None] + side[:, None], x[:, None, None] + side)
    canvas[place] = canvas[place] * (1 - pixels[..., 3:]) + pixels[..., :3]
