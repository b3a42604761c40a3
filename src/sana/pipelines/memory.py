"""Which network is on the device when, and how a picture is decoded, so that it fits.

From the model's config, the picture and a limit in bytes, `plan` takes the fastest of all ways that
fit: networks that stay, that come for their phase and leave, or whose blocks stream through two at
a time; an autoencoder over the whole picture or over the tiles that recompute least. It plans by
estimates (`footprint`); `offload` does what a plan says. Nothing here needs a device. Start reading
at `plan`.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from sana.config import ModelConfig
from sana.errors import RequestError
from sana.models.cutting import Tile, Tiling, tilings
from sana.pipelines import footprint
from sana.pipelines.footprint import Canvas, Weights, Widths

Part: TypeAlias = Literal["text", "dit", "autoencoder"]
Phase: TypeAlias = Literal["text", "encode", "denoise", "decode"]
Placement: TypeAlias = Literal["stays", "visits", "streams"]

NEEDED: dict[Phase, Part] = {
    "text": "text",
    "encode": "autoencoder",
    "denoise": "dit",
    "decode": "autoencoder",
}
NAMES: dict[Part, str] = {
    "text": "the text encoder",
    "dit": "the transformer",
    "autoencoder": "the autoencoder",
}
WHILE: dict[Phase, str] = {
    "text": "reading the prompt",
    "encode": "encoding the picture",
    "denoise": "denoising",
    "decode": "decoding",
}
MOST_VALUES = 2**31 - 1
"""Larger maps leave the convolutions that count in 32 bits, and no card has tried the others."""

SLACK_FACTOR = 1.03
SLACK_BYTES = 64 * 2**20
"""What the estimates leave out: workspaces of matrix products, small tensors, rounding."""
CUDA_CONTEXT = 512 * 2**20
"""About what CUDA itself takes of a card, beside all tensors."""

# A rough clock to choose by: bytes a second from the host, seconds a megapixel of decoding.
LINK = 12e9
DECODING = 0.15
SMALL_TILE_PENALTY = 100.0
"""They can show in plain areas (`sana.models.cutting`), so only where nothing else fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where each network is in each phase; prints as one sentence."""

    text: Placement = "stays"
    dit: Placement = "stays"
    autoencoder: Placement = "stays"
    early: tuple[Part, ...] = ()
    """Visitors that are fetched while the phase before theirs still runs."""
    tile: Tile | None = None
    """Of the decoded picture, in pixels; None means in one piece."""
    encode_tile: Tile | None = None
    """Likewise of a picture that goes in."""
    peak: int = 0
    """Estimated bytes at the busiest moment."""
    busiest: Phase = "decode"

    def present(self, phase: Phase) -> tuple[Part, ...]:
        """The networks that are on the device in `phase`."""
        before: dict[Part, tuple[Phase, ...]] = {
            "dit": ("text", "encode"),
            "autoencoder": ("denoise",),
        }
        return tuple(
            part
            for part in NAMES
            if getattr(self, part) == "stays"
            or NEEDED[phase] == part
            or (part in self.early and phase in before.get(part, ()))
        )

    @property
    def offloads(self) -> bool:
        """Whether any network leaves the device."""
        return any(getattr(self, part) != "stays" for part in NAMES)

    def __str__(self) -> str:
        size = f"about {shown(self.peak)} at most, while {WHILE[self.busiest]}"
        return f"{self.describe()}; {size}"

    def describe(self) -> str:
        """Who is where, and how the picture is decoded, without numbers of bytes."""
        groups: dict[str, list[str]] = {"stays": [], "visits": [], "streams": []}
        for part, name in NAMES.items():
            groups[getattr(self, part)].append(name)
        verbs = {
            "stays": ("stays on the device", "stay on the device"),
            "visits": ("comes for its phase and leaves", "come for their phases and leave"),
            "streams": ("streams through block by block", "stream through block by block"),
        }
        parts = [
            f"{_listed(names)} {verbs[kind][len(names) > 1]}"
            for kind, names in groups.items()
            if names
        ]
        if not self.offloads:
            parts = ["everything stays on the device"]
        return f"{_listed(parts)}; the picture is decoded {in_tiles(self.tile)}"


class DoesNotFit(RequestError):
    """No way fits the limit; `least` is the one that comes nearest."""

    def __init__(self, message: str, least: MemoryPlan) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What is to be planned."""

    config: ModelConfig
    canvas: Canvas
    weights: Weights
    widths: Widths
    tilings: tuple[Tiling, ...]


def plan(
    config: ModelConfig,
    canvas: Canvas,
    limit: int | None,
    *,
    widths: Widths | None = None,
    can_offload: bool = True,
    reserve: int = 0,
) -> MemoryPlan:
    """The fastest way to draw `canvas` in `limit` bytes; without a limit everything stays.

    `can_offload` is false where the device has no memory of its own (CPU, MPS); `reserve` bytes of
    the limit are taken by others (`CUDA_CONTEXT`). Raises `DoesNotFit` with the least that works.
    """
    widths = widths or Widths()
    task = _Task(
        config=config,
        canvas=canvas,
        weights=footprint.weights(config, widths),
        widths=widths,
        tilings=_tilings(config, canvas),
    )
    if limit is None:
        return _fitted(MemoryPlan(), task, None)
    placements = _placements(can_offload)
    plans = [_fitted(placed, task, limit - reserve) for placed in placements]
    fitting = [way for way in plans if way.peak + reserve <= limit]
    if not fitting:
        least = min((_fitted(placed, task, 0) for placed in placements), key=lambda way: way.peak)
        least = _fitted(least, task, least.peak)
        raise DoesNotFit(
            f"memory is {shown(limit)}; {config.name} at {canvas.width} x {canvas.height} needs at "
            f"least {shown_up(least.peak + reserve)}, with which {least.describe()}; give more "
            "memory, draw a smaller picture, or use a smaller model",
            least,
        )
    best = min(fitting, key=lambda way: _seconds(way, task))
    return _with_early(best, task, limit - reserve)


def parse(text: str) -> int:
    """Bytes of a size such as 8GiB, 7.5GB or 900MiB; raises `RequestError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    size = 0
    if match:
        base = 1024 if match[3] or not match[0].strip().lower().endswith("b") else 1000
        size = int(float(match[1]) * base ** ("KMGT".index(match[2].upper()) + 1))
    if size < 1:
        raise RequestError(
            f"memory is {text!r}; it must be a number over 0 with its unit, for example 8GiB, "
            "7.5GB or 900MiB"
        )
    return size


def shown(size: int) -> str:
    """A size for people: 7.3 GiB, 512 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(1, round(size / 2**20))} MiB"


def shown_up(size: int) -> str:
    """As `shown`, rounded up, so that giving what is shown is enough."""
    return shown(size + (2**30 // 20 if size >= 2**30 else 2**19))


def in_tiles(tile: Tile | None) -> str:
    """How a picture is decoded, for people: width x height, as pictures are."""
    if tile is None:
        return "in one piece"
    height, width = tile
    return f"in {width} px tiles" if height == width else f"in tiles of {width} x {height} px"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _placements(can_offload: bool) -> list[MemoryPlan]:
    """Who may be where, the plainest first."""
    ways = [MemoryPlan()]
    if can_offload:
        ways.append(MemoryPlan(text="visits"))
        texts: tuple[Placement, ...] = ("visits", "streams")
        for text, dit in itertools.product(texts, texts):
            ways.append(MemoryPlan(text=text, dit=dit, autoencoder="visits"))
    return ways


def _tilings(config: ModelConfig, canvas: Canvas) -> tuple[Tiling, ...]:
    """What the picture may be cut into, whatever memory there is."""
    widest = footprint.widest(config.autoencoder)
    every = tilings(canvas.height, canvas.width, config.autoencoder.factor)
    return tuple(way for way in every if way.area * widest <= MOST_VALUES)


def _fitted(way: MemoryPlan, task: _Task, limit: int | None) -> MemoryPlan:
    """The same way in the tiles of least work that fit, or else in the smallest; and its peak."""
    decoding, encoding = (_tile(way, phase, task, limit) for phase in ("decode", "encode"))
    return _measured(replace(way, tile=decoding, encode_tile=encoding), task)


def _tile(
    way: MemoryPlan, phase: Literal["encode", "decode"], task: _Task, limit: int | None
) -> Tile | None:
    held = _held(way, phase, task)
    tiles = [tiling.tile if tiling.count > 1 else None for tiling in task.tilings]

    def fits(tile: Tile | None) -> bool:
        return limit is None or _padded(held + _work(tile, phase, task)) <= limit

    return next(filter(fits, tiles), tiles[-1])


def _measured(way: MemoryPlan, task: _Task) -> MemoryPlan:
    """The same way with its peak."""
    phases: list[Phase] = ["text", "denoise", "decode"]
    if task.canvas.encodes:
        phases.append("encode")
    sizes = {phase: _phase_bytes(way, phase, task) for phase in phases}
    busiest = max(phases, key=lambda phase: sizes[phase])
    return replace(way, peak=sizes[busiest], busiest=busiest)


def _phase_bytes(way: MemoryPlan, phase: Phase, task: _Task) -> int:
    config, widths = task.config, task.widths
    if phase == "text":
        work = footprint.text_work(config.text, widths.text)
    elif phase == "denoise":
        factor = config.autoencoder.factor
        work = footprint.dit_work(config.dit, task.canvas, factor, widths.dit)
    else:
        work = _work(way.tile if phase == "decode" else way.encode_tile, phase, task)
    return _padded(_held(way, phase, task) + work)


def _held(way: MemoryPlan, phase: Phase, task: _Task) -> int:
    """Bytes of the weights that are on the device in `phase`."""
    return sum(_part_bytes(part, getattr(way, part), task.weights) for part in way.present(phase))


def _padded(size: int) -> int:
    return int(size * SLACK_FACTOR) + SLACK_BYTES


def _work(tile: Tile | None, phase: Literal["encode", "decode"], task: _Task) -> int:
    """Bytes that the autoencoder takes beside its weights."""
    canvas, value = task.canvas, task.widths.autoencoder
    height, width = tile or (canvas.height, canvas.width)
    # Two rows of tiles in fp32: the one that is summed up, and the next.
    bands = 0 if tile is None else 2 * 3 * 4 * height * canvas.width
    config = task.config.autoencoder
    if phase == "encode":
        return footprint.encode_work(config, width, height, value) + bands
    return footprint.decode_work(config, width, height, value, task.widths.ways) + bands


def _part_bytes(part: Part, placement: Placement, weights: Weights) -> int:
    if placement == "streams":
        return weights.text_streamed if part == "text" else weights.dit_streamed
    return {"text": weights.text, "dit": weights.dit, "autoencoder": weights.autoencoder}[part]


def _seconds(way: MemoryPlan, task: _Task) -> float:
    """About what a way costs beyond computing it with everything in place."""
    seconds = 0.0
    for part in NAMES:
        placement = getattr(way, part)
        size = _part_bytes(part, "stays", task.weights)
        if placement == "visits":
            seconds += size / LINK
        elif placement == "streams":
            seconds += size * (2 if part == "text" else task.config.sampling.steps) / LINK
    tiles = [way.tile, way.encode_tile] if task.canvas.encodes else [way.tile]
    for tiling in task.tilings:
        seconds += tiles.count(tiling.tile) * _tiling_seconds(tiling, task.canvas)
    return seconds


def _tiling_seconds(tiling: Tiling, canvas: Canvas) -> float:
    again = tiling.computed - canvas.width * canvas.height
    penalty = SMALL_TILE_PENALTY * tiling.smallness if tiling.smallness > 1 else 0.0
    return DECODING * again / 2**20 + penalty


def _with_early(way: MemoryPlan, task: _Task, limit: int) -> MemoryPlan:
    """Fetch a visitor during the phase before its own where both fit."""
    for part in ("dit", "autoencoder"):
        if getattr(way, part) == "visits":
            tried = _measured(replace(way, early=(*way.early, part)), task)
            way = tried if tried.peak <= limit else way
    return way
