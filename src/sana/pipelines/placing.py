"""One pipeline's memory: plans each request by what is free, moves networks, decodes in what fits.

The limit is what the user stated, or what is free now. Where nothing fits a stated limit, that is
an error; where nothing fits what happens to be free, the least is tried, and said. Running out of
memory while decoding is no end: tiles are tried next. Start reading at `Placing.prepare`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sana.kernels import ops
from sana.kernels.proven import REPORTS, Way
from sana.kernels.reference import FP8
from sana.models.cutting import Tile, tilings
from sana.models.gemma import Gemma2
from sana.models.rounding import product_dtype
from sana.models.sending import arriving
from sana.models.tiling import decode_bands, encode_tiled
from sana.pipelines import footprint
from sana.pipelines.footprint import Canvas, Widths
from sana.pipelines.graphs import Graphs, cuda_capture
from sana.pipelines.images import to_levels
from sana.pipelines.memory import (
    CUDA_CONTEXT,
    DoesNotFit,
    MemoryPlan,
    Part,
    Phase,
    in_tiles,
    plan,
)
from sana.pipelines.moving import tensors_of
from sana.pipelines.offload import Offload
from sana.pipelines.precision import check_finite, finite_values, watch_count
from sana.pipelines.texts import Texts

if TYPE_CHECKING:
    from sana.config import ModelConfig
    from sana.weights.load import Components

logger = logging.getLogger(__name__)

PIXELS = "the decoded pixels"
MEMINFO = Path("/proc/meminfo")
SLACK = 2**26
"""Free memory may change by so many bytes before a plan is made again."""
GRAPHED_PIXELS = 2**21
"""Larger pictures keep the device busy while they are decoded, and a graph of that is large; and
their pixels in fp32 have no place on a small device."""
LOOK_EVERY = 1.0
"""Seconds for which what is free on a GPU is not asked again."""


class Placing:
    """The networks of `components` on `device`, in at most `limit` bytes if one is stated."""

    def __init__(
        self,
        components: Components,
        device: torch.device | str,
        limit: int | None = None,
        *,
        uses_graphs: bool = True,
    ) -> None:
        """`uses_graphs` is whether CUDA graphs may be held where there is room."""
        self.device = torch.device(device)
        self._uses_graphs = uses_graphs and self.device.type == "cuda"
        self._has_room = (False, False, False, False)
        self.graphs, self.text_graphs, self.decode_graphs = (Graphs(None) for _ in range(3))
        self.time_graphs, self.texts = Graphs(None), Texts(None)
        self._config = components.config
        self._autoencoder = components.autoencoder
        self._products = product_dtype(components.autoencoder.decoder.stages)
        self._in_fp8 = components.dit.products == FP8
        self._limit = limit
        self._canvas: Canvas | None = None
        self._known: tuple[Canvas, frozenset[Way], int | None] | None = None
        """What was last planned for, and how much memory was free then."""
        self._known_until = 0.0
        """Until when that memory is taken to be free still."""
        self._networks = _networks(components)
        self._offload = Offload(self._networks, self.device)

    @property
    def widths(self) -> Widths:
        """How the networks are computed now."""
        values = {part: _value_bytes(network) for part, network in self._networks.items()}
        return Widths(**values, ways=ways_on(self.device), in_fp8=self._in_fp8)

    @property
    def plan(self) -> MemoryPlan:
        """What is followed now."""
        return self._offload.plan

    def prepare(self, canvas: Canvas) -> MemoryPlan:
        """Plan for `canvas` and go by it; raises `RequestError` if a stated limit is too low."""
        if self._is_planned(canvas):
            return self.plan
        limit, reserve = bounds(self.device, self._limit, self._free())
        try:
            chosen = plan(
                self._config,
                canvas,
                limit,
                widths=self.widths,
                can_offload=self.device.type == "cuda",
                reserve=reserve,
            )
        except DoesNotFit as refusal:
            if self._limit is not None:
                raise
            chosen = refusal.least
            logger.warning("%s; trying it all the same", refusal)
        if chosen != self.plan:
            logger.info("memory: %s", chosen)
        self._offload.follow(chosen)
        self._canvas = canvas
        self._make_room(chosen, canvas, None if limit is None else limit - reserve)
        self._known = canvas, ways_on(self.device), free_memory(self.device)
        self._known_until = time.monotonic() + LOOK_EVERY
        return chosen

    def _is_planned(self, canvas: Canvas) -> bool:
        """Whether the plan in force is for `canvas` and about as much free memory as there is now.

        Networks that move change what is free, so that is only told of those that stay.
        """
        if self._known is None or self.plan.offloads:
            return False
        known, ways, before = self._known
        if (canvas, ways_on(self.device)) != (known, ways):
            return False
        # Asking takes a GPU's driver milliseconds, which the first step would wait for.
        if self.device.type == "cuda" and time.monotonic() < self._known_until:
            return True
        now = free_memory(self.device)
        if before is None or now is None:
            return before == now
        self._known_until = time.monotonic() + LOOK_EVERY
        return abs(now - before) <= SLACK

    def new_graphs(self) -> Graphs:
        """CUDA graphs of steps, for as long as they are held; where there is room for them."""
        return Graphs(cuda_capture() if self._has_room[0] else None)

    @property
    def reading(self) -> dict[str, Graphs]:
        """Options of the text encoder: on a GPU texts are padded, where graphs are held or not.

        So products have the same shapes, and texts the same bits, wherever networks are.
        """
        is_used = self.device.type == "cuda" and ops.allows("text_graph")
        has_gemma = isinstance(self._networks.get("text"), Gemma2)
        return {"replay": self.text_graphs} if is_used and has_gemma else {}

    def _make_room(self, chosen: MemoryPlan, canvas: Canvas, limit: int | None) -> None:
        """Keep the graphs that are held, have new ones, or have none, as the plan allows.

        A graph holds what its work takes until it is given back, so it counts in every phase.
        """
        config, widths = self._config, self.widths
        free = None if limit is None else limit - chosen.peak

        def holds(size: int, *, wanted: bool) -> bool:
            nonlocal free
            fits = wanted and (free is None or size <= free)
            free = free - size if fits and free is not None else free
            return fits

        wanted = self._uses_graphs and chosen.dit == "stays"
        steps = holds(footprint.graph_bytes(config, canvas, widths), wanted=wanted)
        wanted = steps and ops.allows("text_graph") and chosen.text == "stays"
        wanted &= isinstance(self._networks.get("text"), Gemma2)
        texts = holds(footprint.text_work(config.text, widths.text), wanted=wanted)
        wanted = steps and ops.allows("decode_graph") and chosen.autoencoder == "stays"
        wanted &= chosen.tile is None and canvas.width * canvas.height <= GRAPHED_PIXELS
        sides = (canvas.width, canvas.height)
        value = widths.autoencoder
        work = footprint.decode_work(config.autoencoder, *sides, value, widths.ways)
        decodes = holds(work, wanted=wanted)
        starts = steps and ops.allows("start_graph")
        if (steps, texts, decodes, starts) != self._has_room:
            self._has_room = (steps, texts, decodes, starts)
            self._drop_graphs()
            capture = cuda_capture() if steps else None
            self.graphs = Graphs(capture)
            self.text_graphs = Graphs(capture if texts else None)
            self.decode_graphs = Graphs(capture if decodes else None)
            self.time_graphs = Graphs(capture if starts else None)
            self.texts = Texts(capture if starts else None)

    def _drop_graphs(self) -> None:
        graphs = (self.graphs, self.text_graphs, self.decode_graphs, self.time_graphs, self.texts)
        for held in graphs:
            held.clear()

    def enter(self, phase: Phase) -> None:
        """Have the networks of `phase` on the device; call it before each use."""
        self._offload.enter(phase)

    def rest(self) -> None:
        """Send what moves to the host."""
        self._offload.rest()

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels [3,H,W] in fp32 of a raw latent [1,C,h,w], large ones on the CPU."""
        return self.begin_decoding(latent)()

    def begin_decoding(self, latent: Tensor, *, as_bytes: bool = False) -> Callable[[], Tensor]:
        """Launches it; what is returned waits for the pixels, and raises if they are not finite.

        They are those of `decode` or, `as_bytes`, of its picture, [H,W,3] on the CPU. Out of
        memory, it is tried again in tiles of half the area, and that is logged as a warning.
        """
        self._prepare_for(latent)
        self.enter("decode")
        height, width = self._size_of(latent)
        tile = self.plan.tile
        while True:
            try:
                return self._decode_in(latent, tile, as_bytes=as_bytes)
            except (RuntimeError, MemoryError) as error:
                factor = self._config.autoencoder.factor
                smaller = _smaller(tile or (height, width), height, width, factor)
                if smaller is None or not is_out_of_memory(error):
                    raise
            # Only here, outside the handler, has the failed attempt let go of its tensors.
            self._drop_graphs()
            _empty_cache(self.device)
            how, instead = in_tiles(tile), in_tiles(smaller)
            logger.warning("out of memory decoding %s; trying it %s", how, instead)
            tile = smaller

    def encode(self, pixels: Tensor) -> Tensor:
        """Raw latent [1,C,h,w] on the device, of pixels [1,3,H,W] from anywhere."""
        self.enter("encode")
        height, width = pixels.shape[-2:]
        return encode_tiled(
            self._autoencoder, pixels, tile=self.plan.encode_tile or (height, width)
        )

    def _size_of(self, latent: Tensor) -> Tile:
        """Of the picture that it is decoded to."""
        factor = self._config.autoencoder.factor
        return latent.shape[-2] * factor, latent.shape[-1] * factor

    def _prepare_for(self, latent: Tensor) -> None:
        height, width = self._size_of(latent)
        known = self._canvas
        if known is None or (known.height, known.width) != (height, width):
            self.prepare(Canvas(width=width, height=height))

    def _decode_in(
        self, latent: Tensor, tile: Tile | None, *, as_bytes: bool
    ) -> Callable[[], Tensor]:
        if self.decode_graphs.is_on and tile is None:
            return self._replay_decoding(latent, as_bytes=as_bytes)
        height, width = self._size_of(latent)
        # A small picture becomes bytes where it is, so that a quarter of it is copied.
        place = self.device if height * width <= GRAPHED_PIXELS else torch.device("cpu")
        pixels = torch.empty((3, height, width), device=place)
        row = 0
        for band in decode_bands(self._autoencoder, latent, tile=tile or (height, width)):
            check_finite(band, PIXELS, self._products)
            pixels[:, row : row + band.shape[-2]] = band[0].float()
            row += band.shape[-2]
        return arriving(to_levels(pixels)) if as_bytes else lambda: pixels

    def _replay_decoding(self, latent: Tensor, *, as_bytes: bool) -> Callable[[], Tensor]:
        """By a graph, and what becomes of the pixels in it."""
        network = self._autoencoder

        def decode(latent: Tensor, _time: tuple[()], *, as_bytes: bool) -> tuple[Tensor, Tensor]:
            pixels = network.decode(latent)
            made = to_levels(pixels[0]) if as_bytes else pixels[0].float()
            return made, finite_values(pixels)

        made, finite = self.decode_graphs(
            decode, network, latent.to(self.device), as_bytes=as_bytes
        )
        check = watch_count(finite, made.numel(), PIXELS, self._products)
        result = arriving(made) if as_bytes else lambda: made

        def wait() -> Tensor:
            check()
            return result()

        return wait

    def _free(self) -> int | None:
        """What this pipeline can have: what is free, and what it has already."""
        free = free_memory(self.device)
        if free is None:
            return None
        kind = self.device.type
        tensors = (t for network in self._networks.values() for _, t in tensors_of(network))
        return free + sum(tensor.nbytes for tensor in tensors if tensor.device.type == kind)


def first_device(
    config: ModelConfig, widths: Widths, device: torch.device, limit: int | None
) -> torch.device:
    """Where to read the weights to: `device`, unless they will not all stay there."""
    if device.type != "cuda":
        return device
    canvas = Canvas(width=config.pixels, height=config.pixels)
    available, reserve = bounds(device, limit, free_memory(device))
    try:
        chosen = plan(config, canvas, available, widths=widths, reserve=reserve)
    except DoesNotFit:
        # A smaller picture may still fit, and only a request says what is drawn.
        return torch.device("cpu")
    return torch.device("cpu") if chosen.offloads else device


def bounds(device: torch.device, stated: int | None, free: int | None) -> tuple[int | None, int]:
    """What a plan may take, and how much of it CUDA takes itself.

    What is free is counted beside CUDA's own; what a user states is the whole.
    """
    reserve = CUDA_CONTEXT if stated is not None and device.type == "cuda" else 0
    if free is None:
        return stated, reserve
    return free + reserve if stated is None else min(stated, free + reserve), reserve


def ways_on(device: torch.device) -> frozenset[Way]:
    """The ways of computing that are in use on `device`; none where there are no kernels."""
    if not ops.uses_triton(torch.empty(0, device=device)):
        return frozenset()
    return frozenset(way for way in REPORTS if ops.allows(way))


def free_memory(device: torch.device | str) -> int | None:
    """Bytes free on `device`, with what torch has cached there; None where nobody knows."""
    device = torch.device(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        held: Any = torch.cuda.memory_stats_as_nested_dict(device)  # flat, it takes much longer
        if not held:  # nothing was ever allocated there
            return free
        inside = (held[f"{what}_bytes"]["all"]["current"] for what in ("reserved", "allocated"))
        reserved, allocated = inside
        return int(free + reserved - allocated)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    if all(name in os.sysconf_names for name in names):
        return os.sysconf(names[0]) * os.sysconf(names[1])
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return "not enough memory" in said or "out of memory" in said or "can't allocate" in said


def _networks(components: Components) -> dict[Part, nn.Module]:
    """What can move; a ControlNet goes with its base."""
    dit: nn.Module = components.dit
    controlnet = getattr(components, "controlnet", None)
    if controlnet is not None:
        dit = nn.ModuleDict({"dit": dit, "controlnet": controlnet})
    networks: dict[Part, nn.Module] = {"dit": dit, "autoencoder": components.autoencoder}
    text: Any = components.text
    if isinstance(text, nn.Module):
        networks["text"] = text
    return networks


def _smaller(tile: Tile, height: int, width: int, factor: int) -> Tile | None:
    """Of the tiles of at most half the area, those of least work."""
    area = tile[0] * tile[1]
    ways = tilings(height, width, factor)
    return next((way.tile for way in ways if 2 * way.area <= area), None)


def _value_bytes(network: nn.Module) -> int:
    return next(network.parameters()).element_size()


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
