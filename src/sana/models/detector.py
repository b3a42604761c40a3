"""A small one-stage detector of sticker objects: where each one is, what it is, and its colour.

A residual network (strides 4 to 32) with a light top-down path; a heat map at stride 8 finds
centres (CenterNet, Zhou et al. 2019), and the features of three strides, read at a centre, name the
object there. Reading happens at points only, so that hundreds of names cost little.
B pictures, P points, C channels, h w cells of the heat map. Start reading at `Detector.forward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.models.residual import Normed, initialize, stages

SIZE = 256
"""Side of the pictures that the network looks at, in pixels."""
STRIDE = 8
WIDTHS = (64, 128, 256, 256)
DEPTHS = (2, 2, 2, 2)
READ = 512
# A prior of one centre in a hundred cells, so that the first steps are not spent on the background.
PRIOR = -4.6
OVERLAP = 0.5


class Features(NamedTuple):
    """Feature maps of strides 8, 16 and 32."""

    fine: Tensor
    middle: Tensor
    coarse: Tensor


class Reading(NamedTuple):
    """What the network says at P points of each picture."""

    concept: Tensor  # [B, P, concepts] logits
    color: Tensor  # [B, P, colors] logits
    box: Tensor  # [B, P, 4] x0 y0 x1 y1 as fractions of the picture


class Peaks(NamedTuple):
    """The best P places of each picture; places that were struck out have score 0."""

    score: Tensor  # [B, P] in 0..1, descending
    concept: Tensor  # [B, P] index
    color: Tensor  # [B, P] index
    box: Tensor  # [B, P, 4] fractions of the picture


class Detector(nn.Module):
    """Finds objects among `concepts` kinds and `colors` colours (the last one: no clear colour)."""

    def __init__(
        self,
        concepts: int,
        colors: int,
        *,
        widths: tuple[int, int, int, int] = WIDTHS,
        depths: tuple[int, int, int, int] = DEPTHS,
    ) -> None:
        super().__init__()
        self.stem = Normed(3, widths[0], kernel=8, stride=4)
        self.stages = stages(widths, depths)
        self.coarse = Normed(widths[3], widths[2], kernel=1)
        self.middle = Normed(widths[2], widths[2], kernel=3)
        self.lowered = Normed(widths[2], widths[1], kernel=1)
        self.fine = Normed(widths[1], widths[1], kernel=3)
        self.heat = nn.Sequential(
            Normed(widths[1], widths[0], kernel=3), nn.Conv2d(widths[0], 1, 1)
        )
        self.read = nn.Linear(widths[1] + widths[2] + widths[3], READ)
        self.concept = nn.Linear(READ, concepts)
        self.color = nn.Linear(READ, colors)
        self.box = nn.Linear(READ, 4)
        self._initialize()

    def forward(self, pictures: Tensor, points: Tensor) -> tuple[Tensor, Reading]:
        """Heat map logits [B, h, w], and a reading at `points` [B, P, 2] (x, y in 0..1).

        Pictures are (B, 3, 256, 256) in -1..1; other sizes go through `fit` first.
        """
        features = self.look(pictures)
        return self.warmth(features), self.name(features, points)

    def look(self, pictures: Tensor) -> Features:
        """Features of pictures (B, 3, 256, 256) in -1..1."""
        x = self.stem(pictures.contiguous(memory_format=torch.channels_last))
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        _, fine, middle, coarse = found
        middle = self.middle(middle + _doubled(self.coarse(coarse)))
        fine = self.fine(fine + _doubled(self.lowered(middle)))
        return Features(fine, middle, coarse)

    def warmth(self, features: Features) -> Tensor:
        """Logits [B, h, w] that a cell holds an object's centre."""
        return torch.as_tensor(self.heat(features.fine)).squeeze(1)

    def name(self, features: Features, points: Tensor) -> Reading:
        """What stands at `points` [B, P, 2], x and y in 0..1, read between cells."""
        # In fp32: a bf16 coordinate is off by up to half a pixel.
        grid = (points.float() * 2 - 1).unsqueeze(2)
        read = [
            F.grid_sample(f.float(), grid, padding_mode="border", align_corners=False)
            for f in features
        ]
        at_points = (
            torch.cat(read, 1).squeeze(3).transpose(1, 2).to(features.fine.dtype)
        )  # [B, P, C]
        x = F.relu(self.read(at_points))
        reach = self.box(x).float()
        box = torch.cat([points - reach[..., :2], points + reach[..., 2:]], -1)
        return Reading(self.concept(x), self.color(x), box)

    @torch.no_grad()
    def peaks(self, pictures: Tensor, count: int = 16) -> Peaks:
        """The `count` hottest places of each picture, after non-maximum suppression."""
        features = self.look(fit(pictures))
        heat = self.warmth(features).float().sigmoid()
        summits = torch.where(heat == F.max_pool2d(heat, 3, 1, 1), heat, 0)
        score, cell = summits.flatten(1).topk(count)
        side = heat.shape[-1]
        points = torch.stack([cell % side, cell // side], -1).add(0.5).div(side)
        reading = self.name(features, points.float())
        concept, color = reading.concept.argmax(-1), reading.color.argmax(-1)
        return Peaks(_without_doubles(score, reading.box), concept, color, reading.box)

    def _initialize(self) -> None:
        initialize(self)
        last = self.heat[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.normal_(last.weight, std=0.01)
        nn.init.constant_(last.bias, PRIOR)
        nn.init.normal_(self.concept.weight, std=0.01)
        nn.init.normal_(self.box.weight, std=0.01)
        nn.init.constant_(self.box.bias, 0.15)


def fit(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) at the network's 256 px, averaged over areas when they are larger."""
    if pictures.shape[-2:] == (SIZE, SIZE):
        return pictures
    return F.adaptive_avg_pool2d(pictures, (SIZE, SIZE))


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4], broadcast; 0 where both are empty."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).clamp_min(0).prod(-1) for b in (first, second)]
    return shared / (areas[0] + areas[1] - shared).clamp_min(1e-9)


def _without_doubles(score: Tensor, box: Tensor) -> Tensor:
    """Scores [B, P] with 0 where a better place claims the same box, best first."""
    same = overlap(box.unsqueeze(2), box.unsqueeze(1)) > OVERLAP  # [B, P, P]
    kept = torch.ones_like(score, dtype=torch.bool)
    for index in range(1, score.shape[1]):
        beaten = (same[:, index, :index] & kept[:, :index]).any(1)
        kept[:, index] = ~beaten
    return score * kept


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
