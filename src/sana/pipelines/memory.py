"""Which network is on the device when, and how a picture is decoded, so that it fits.

From the model's config, the picture and a limit in bytes, `plan` takes the fastest of all ways that
fit: networks that stay, that come for their phase and leave, or whose blocks stream through two at
a time; a decoder over the whole picture or over tiles. It plans by estimates (`footprint`);
`offload` does what a plan says. Nothing here needs a device. Start reading at `plan`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from sana.config import ModelConfig
from sana.errors import RequestError
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
GOOD_TILES = (2048, 1024)
SMALL_TILES = (768, 512, 256)
"""They can show in plain areas (`sana.models.tiling`), so only where nothing else fits."""

SLACK_FACTOR = 1.03
SLACK_BYTES = 64 * 2**20
"""What the estimates leave out: workspaces of matrix products, small tensors, rounding."""
CUDA_CONTEXT = 512 * 2**20
"""About what CUDA itself takes of a card, beside all tensors."""

# A rough clock to choose by: bytes a second from the host, seconds a megapixel of decoding.
LINK = 12e9
DECODING = 0.15
SMALL_TILE_PENALTY = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where each network is in each phase; prints as one sentence."""

    text: Placement = "stays"
    dit: Placement = "stays"
    autoencoder: Placement = "stays"
    early: tuple[Part, ...] = ()
    """Visitors that are fetched while the phase before theirs still runs."""
    tile: int | None = None
    """Pixels of the autoencoder's tiles; None means the whole picture in one piece."""
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
        how = "in one piece" if self.tile is None else f"in {self.tile} px tiles"
        return f"{_listed(parts)}; the picture is decoded {how}"


class DoesNotFit(RequestError):
    """No way fits the limit; `least` is the one that comes nearest."""

    def __init__(self, message: str, least: MemoryPlan) -> None:
        super().__init__(message)
        self.least = least


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
    weights = footprint.weights(config, widths)
    every = _ways(config, canvas, can_offload)
    ways = [_measured(way, config, canvas, weights, widths) for way in every]
    if limit is None:
        return ways[0]
    fitting = [way for way in ways if way.peak + reserve <= limit]
    if not fitting:
        least = min(ways, key=lambda way: way.peak)
        raise DoesNotFit(
            f"memory is {shown(limit)}; {config.name} at {canvas.width} x {canvas.height} needs at "
            f"least {shown_up(least.peak + reserve)}, with which {least.describe()}; give more "
            "memory, draw a smaller picture, or use a smaller model",
            least,
        )
    best = min(fitting, key=lambda way: _seconds(way, config, canvas, weights))
    return _with_early(best, config, canvas, weights, widths, limit - reserve)


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


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _ways(config: ModelConfig, canvas: Canvas, can_offload: bool) -> Iterator[MemoryPlan]:
    """Every way there is, the plainest first."""
    factor = config.autoencoder.factor
    longest = max(canvas.width, canvas.height)
    tiles = [tile for tile in (*GOOD_TILES, *SMALL_TILES) if tile < longest and not tile % factor]
    if longest > 2 * factor and not tiles:
        tiles = [2 * factor]
    ways: list[MemoryPlan] = [MemoryPlan()]
    if can_offload:
        ways.append(MemoryPlan(text="visits"))
        texts: tuple[Placement, ...] = ("visits", "streams")
        for text, dit in itertools.product(texts, texts):
            ways.append(MemoryPlan(text=text, dit=dit, autoencoder="visits"))
    for way in ways:
        for tile in (None, *tiles):
            yield replace(way, tile=tile)


def _measured(
    way: MemoryPlan, config: ModelConfig, canvas: Canvas, weights: Weights, widths: Widths
) -> MemoryPlan:
    """The same way with its peak."""
    phases: list[Phase] = ["text", "denoise", "decode"]
    if canvas.encodes:
        phases.append("encode")
    sizes = {phase: _phase_bytes(way, phase, config, canvas, weights, widths) for phase in phases}
    busiest = max(phases, key=lambda phase: sizes[phase])
    return replace(way, peak=sizes[busiest], busiest=busiest)


def _phase_bytes(
    way: MemoryPlan,
    phase: Phase,
    config: ModelConfig,
    canvas: Canvas,
    weights: Weights,
    widths: Widths,
) -> int:
    held = sum(_part_bytes(part, getattr(way, part), weights) for part in way.present(phase))
    if phase == "text":
        work = footprint.text_work(config.text, widths.text)
    elif phase == "denoise":
        work = footprint.dit_work(config.dit, canvas, config.autoencoder.factor, widths.dit)
    else:
        work = _autoencoder_work(way, phase, config, canvas, widths.autoencoder)
    return int((held + work) * SLACK_FACTOR) + SLACK_BYTES


def _autoencoder_work(
    way: MemoryPlan, phase: Phase, config: ModelConfig, canvas: Canvas, value: int
) -> int:
    width, height, bands = canvas.width, canvas.height, 0
    if way.tile is not None:
        # Two rows of tiles in fp32: the one that is summed up, and the next.
        bands = 2 * 3 * 4 * min(way.tile, height) * width
        width, height = min(way.tile, width), min(way.tile, height)
    work = footprint.encode_work if phase == "encode" else footprint.decode_work
    return work(config.autoencoder, width, height, value) + bands


def _part_bytes(part: Part, placement: Placement, weights: Weights) -> int:
    if placement == "streams":
        return weights.text_streamed if part == "text" else weights.dit_streamed
    return {"text": weights.text, "dit": weights.dit, "autoencoder": weights.autoencoder}[part]


def _seconds(way: MemoryPlan, config: ModelConfig, canvas: Canvas, weights: Weights) -> float:
    """About what a way costs beyond computing it with everything in place."""
    seconds = 0.0
    for part in NAMES:
        placement = getattr(way, part)
        size = _part_bytes(part, "stays", weights)
        if placement == "visits":
            seconds += size / LINK
        elif placement == "streams":
            seconds += size * (2 if part == "text" else config.sampling.steps) / LINK
    if way.tile is not None:
        pixels = canvas.width * canvas.height
        tiled = 1
        for side in (canvas.width, canvas.height):
            stride = way.tile * 3 // 4
            tiled *= (1 + max(0, -(-(side - way.tile) // stride))) * min(way.tile, side)
        seconds += DECODING * (tiled - pixels) / 2**20
        if way.tile < GOOD_TILES[-1]:
            seconds += SMALL_TILE_PENALTY * GOOD_TILES[-1] / way.tile
    return seconds


def _with_early(
    way: MemoryPlan,
    config: ModelConfig,
    canvas: Canvas,
    weights: Weights,
    widths: Widths,
    limit: int,
) -> MemoryPlan:
    """Fetch a visitor during the phase before its own where both fit."""
    for part in ("dit", "autoencoder"):
        if getattr(way, part) == "visits":
            tried = replace(way, early=(*way.early, part))
            tried = _measured(tried, config, canvas, weights, widths)
            way = tried if tried.peak <= limit else way
    return way
