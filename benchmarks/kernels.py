"""Our kernels on a GPU: are they right, how fast are they, and what do they make of a step?

    python benchmarks/kernels.py                 # on a GPU, two minutes; needs torch and triton
    python benchmarks/kernels.py --seconds 300   # more time for torch.compile
    python benchmarks/kernels.py --only step,sweep --write report.txt
    python benchmarks/kernels.py --tiny          # the same at small size, on a CPU, interpreted

Parts, in order: `step` (one evaluation of a transformer for two samples, the first with the empty
text of guidance: plain torch, our kernels, a CUDA graph of them, and where the time goes before and
after), `decode` (DC-AE at 1024 px), `text` (Gemma-2, with and without a graph), `kernels` (each
against the reference in fp64 on the same numbers, then timed against plain torch; a wrong kernel
has no time), `sweep` (block sizes), `compile` (torch.compile for the same kernels and the same
step). What `sana.kernels.proven` does not have yet is tried in `step`, `decode` and `text`, one way
after the other, and kept for the next if it is right and faster; --ways names a file for what was
kept, which `generate.py --try` takes, and beside it the way that is being tried. Networks have
random weights at the official sizes, in bf16. A part that fails says so and the others go on;
parts that no longer fit --seconds are left out. Kernel times are medians in a CUDA graph, or with a
cold cache where there cannot be one; the floor is the bytes that must move at 3.0 TB/s. The last
thing printed is the table; with --write it is on disk after each row.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as change
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.commands import named_ways  # noqa: E402
from benchmarks.errors import rel_rms  # noqa: E402
from gemmas import TINY  # noqa: E402
from sana.config import DCAEConfig, DiTConfig, GemmaConfig  # noqa: E402
from sana.kernels import ops, reference  # noqa: E402
from sana.kernels.proven import Way  # noqa: E402
from sana.kernels.reference import Branch, Row  # noqa: E402
from sana.models.dcae import DCAE  # noqa: E402
from sana.models.dit import LinearDiT  # noqa: E402
from sana.pipelines.graphs import Graphs, cuda_capture  # noqa: E402
from sana.presets import preset  # noqa: E402

BANDWIDTH = 3.0e12
NARROW = torch.float16 if "--tiny" in sys.argv else torch.bfloat16
"""Triton's interpreter has no products in bf16."""
TEXT = 300
PARTS = ("step", "decode", "text", "kernels", "sweep", "compile")
STEP_WAYS: tuple[Way, ...] = (
    "lone_text",
    "tanh_silu",
    "cross_attention",
    "split_attention",
    "laid_text",
    "lone_rows",
    "whole_heads",
)
DECODE_WAYS: tuple[Way, ...] = ("doubling", "windows", "aggregate", "pixels")
TEXT_WAYS: tuple[Way, ...] = ("gemma_norm", "gemma_attention", "gemma_gate", "gemma_joined")
GAIN = 0.998
"""A way is kept if it takes at most so much of the time without it."""
BOUND = 3e-3
"""Relative RMS in bf16; the digits of the result alone leave 1.7e-3."""
RATIO = 3.0 if "--tiny" in sys.argv else 1.5
"""Our error over that of plain ops; the interpreter cuts where a GPU rounds."""
TOP = 15


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A transformer's sizes, and its tokens."""

    name: str
    config: DiTConfig
    side: int
    batch: int = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op on fixed inputs."""

    name: str
    inputs: tuple[Tensor, ...]
    call: Callable[..., Any]
    moved: int
    """Bytes that must move at least."""
    needs: tuple[Way, ...] = ()
    """What no card has proven before, as in `sana.kernels.proven`."""
    bound: float = BOUND


@dataclass
class Bench:
    """Where it runs, how long it may, and the rows so far."""

    device: torch.device
    is_tiny: bool
    deadline: float
    options: argparse.Namespace
    rows: list[tuple[str, ...]] = field(default_factory=list)
    kept: list[Way] = field(default_factory=list)
    """Ways that were right and faster, each beside those before it."""

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, *cells: object) -> None:
        """Print a row now and once more at the end."""
        self.rows.append(tuple(str(cell) for cell in cells))
        print("  ".join(self.rows[-1]), flush=True)
        if self.options.write:
            Path(self.options.write).write_text("\n".join(self.lines()) + "\n")

    def lines(self) -> list[str]:
        """The table so far."""
        name = "CPU, interpreted" if self.is_tiny else torch.cuda.get_device_name()
        return ["", f"{name}, torch {torch.__version__}, ms", *table(self.rows)]

    def is_left_out(self, way: Way) -> bool:
        """Whether it is proven, kept or not wanted; notes that it is being tried otherwise."""
        if ops.allows(way) or way in self.kept or way in self.options.without.split(","):
            return True
        if self.options.ways:
            Path(f"{self.options.ways}.trying").write_text(way)
        return False

    def keep(self, way: Way) -> None:
        """Use this from here on."""
        self.kept.append(way)
        if self.options.ways:
            Path(self.options.ways).write_text(",".join(self.kept))


def main() -> int:
    """Run the parts; 1 if one failed or a kernel was wrong."""
    options = arguments()
    device = torch.device("cpu" if options.tiny else "cuda")
    bench = Bench(device, options.tiny, time.monotonic() + options.seconds, options)
    bench.kept = named_ways(options.tried)
    print(bench.lines()[1], flush=True)
    failed = False
    for part in options.only.split(","):
        print(f"# {part}, {bench.left:.0f} s left", flush=True)
        try:
            globals()[f"run_{part}"](bench)
        except Exception:
            failed = True
            bench.add(part, "FAILED", traceback.format_exc(limit=-1).strip().splitlines()[-1][:90])
            traceback.print_exc()
        if not options.tiny:
            torch.cuda.empty_cache()
    print("\n".join(bench.lines()))
    print("kept:", ",".join(bench.kept) or "nothing")
    return int(failed or any({"WRONG", "FAILED"} & {*row} for row in bench.rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--write")
    parser.add_argument("--ways", help="file for the ways that were right and faster")
    parser.add_argument("--try", dest="tried", default="", help="ways to begin with")
    parser.add_argument("--without", default="", help="ways that are not tried")
    return parser.parse_args()


def table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """The rows in columns."""
    count = max((len(row) for row in rows), default=0)
    padded = [(*row, *[""] * (count - len(row))) for row in rows]
    widths = [max(len(row[i]) for row in padded) for i in range(count)]
    for row in padded:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def sizes(bench: Bench) -> list[Sizes]:
    if bench.is_tiny:
        config = change(preset("tiny").config.dit, depth=2, head_dim=16)
        return [Sizes(name="tiny", config=config, side=3)]
    names = ("sana-1600m-1024", "sana-600m-1024")
    return [Sizes(name=name, config=preset(name).config.dit, side=32) for name in names]


def run_kernels(bench: Bench) -> None:
    """Every op, checked and timed."""
    bench.add("op", "error", "kernel", "plain", "floor")
    for size in sizes(bench):
        for case in cases(bench, size):
            with torch.inference_mode():
                check_and_time(bench, size, case)


def check_and_time(bench: Bench, size: Sizes, case: Case) -> None:
    name = f"{size.name}: {case.name}" + (", tried" if case.needs else "")
    with ops.force("reference"):
        exact = flat(case.call(*(x.double() for x in fresh(case.inputs))))
    with ops.force("triton"), ops.trying(*case.needs):
        got = flat(case.call(*fresh(case.inputs)))
    error = max(rel_rms(e, g) for e, g in zip(exact, got, strict=True))
    del exact, got
    if not error <= case.bound * (2 if bench.is_tiny else 1):  # so that NaN is wrong too
        bench.add(name, f"{error:.1e}", "WRONG")
        return
    with ops.force("triton"), ops.trying(*case.needs):
        fast = clock(bench, lambda: case.call(*case.inputs))
    with ops.force("reference"):
        plain = clock(bench, lambda: case.call(*case.inputs))
    floor = case.moved / BANDWIDTH * 1000
    bench.add(name, f"{error:.1e}", f"{fast:.4f}", f"{plain:.4f}", f"{floor:.4f}")


def cases(bench: Bench, size: Sizes) -> Iterator[Case]:
    """The ops of a block, and those of the decoder's first stage once."""
    c, b, n = size.config, size.batch, size.side**2
    rand = Draw(bench.device)
    qkv = rand(b, n, 3 * c.width)
    whole = b * n * c.width * 2
    x, y = rand(b, n, c.width), rand(b, n, c.width)
    table_, time_ = rand(6, c.width), rand(1, 6, c.width)

    def heads(qkv: Tensor) -> Tensor:
        parts = (part.unflatten(-1, (-1, c.head_dim)) for part in qkv.chunk(3, dim=-1))
        return ops.linear_attention(*(part.transpose(1, 2) for part in parts), eps=1e-15)

    def rows(table: Tensor, times: Tensor) -> list[Row]:
        return list(map(Row, table, times.unbind(1)))

    def both(x: Tensor, y: Tensor, table: Tensor, times: Tensor) -> Any:
        shift, scale, gate, *_ = rows(table, times)
        return ops.add_and_modulate(x, Branch(y, gate), shift, scale)

    def gate(x: Tensor, y: Tensor, table: Tensor, times: Tensor) -> Any:
        return ops.add_branch(x, Branch(y, rows(table, times)[2]))

    def norm(x: Tensor, table: Tensor, times: Tensor) -> Any:
        return ops.modulate(x, *rows(table, times)[:2])

    def pair(qkv: Tensor, weight: Tensor) -> Any:
        q, k, _ = qkv.chunk(3, dim=-1)
        return ops.rms_norm(q, weight, eps=1e-5), ops.rms_norm(k, weight, eps=1e-5)

    yield Case(name="linear attention", inputs=(qkv,), call=heads, moved=4 * whole)
    yield Case(name="x + gate y, norm", inputs=(x, y, table_, time_), call=both, moved=4 * whole)
    yield Case(name="x + gate y", inputs=(x, y, table_, time_), call=gate, moved=3 * whole)
    yield Case(name="norm", inputs=(x, table_, time_), call=norm, moved=2 * whole)
    yield Case(name="norms of q, k", inputs=(qkv, rand(c.width)), call=pair, moved=4 * whole)
    width, text = c.width // c.cross_heads, 5 if bench.is_tiny else TEXT
    q, k, v = (rand(b, length, c.width) for length in (n, text, text))
    bias = torch.zeros(b, 1, 1, text, device=bench.device, dtype=NARROW)

    def across(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        parts = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k, v))
        return ops.cross_attention(*parts, bias)

    inside = (q, k, v, bias)
    needs: tuple[Way, ...] = ("cross_attention",)
    yield Case(name="cross-attention", inputs=inside, call=across, moved=2 * whole, needs=needs)
    f = c.mlp_width
    inside = (rand(b, size.side, size.side, 2 * f), rand(2 * f, 1, 3, 3), rand(2 * f))
    yield Case(name="glumbconv", inputs=inside, call=ops.glu_depthwise, moved=b * n * f * 6)
    if size.name == sizes(bench)[0].name:
        yield from gemma_cases(rand, TINY if bench.is_tiny else GemmaConfig())
    if size is not sizes(bench)[0] and size.name == "sana-600m-1024":
        yield from decoder_cases(rand)


def gemma_cases(rand: Draw, c: GemmaConfig) -> Iterator[Case]:
    """What stands between Gemma-2's products, for 64 tokens after an instruction."""
    tokens, past, heads = 64, 240, c.head_dim * c.key_heads

    def attend(qkv: Tensor, key: Tensor, value: Tensor, *turns: Tensor) -> Tensor:
        q, k, v = qkv.split([qkv.shape[-1] - 2 * heads, heads, heads], dim=-1)
        scale = c.query_scale**-0.5
        if ops.knows_prompt_attention(qkv, c.head_dim, c.soft_cap):
            from sana.kernels.gemma import prompt_attention as fast

            parts = (list(turns), [key, value], None, c.head_dim, scale, c.soft_cap)
            return fast(q, k, v, *parts)
        q, k, v = (x.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for x in (q, k, v))
        q, k = (reference.turned(x, (turns[0], turns[1])) for x in (q, k))
        k, v = torch.cat([key, k], 2), torch.cat([value, v], 2)
        whole = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device)
        hidden = ~whole.tril()[past:]
        return reference.capped_attention(q, k, v, hidden, scale=scale, cap=c.soft_cap)

    def norm(x: Tensor, y: Tensor, after: Tensor, before: Tensor) -> Any:
        return ops.sandwich_norm(x, y, after, before, eps=c.norm_eps)

    def gate(both: Tensor) -> Tensor:
        return ops.gelu_gate(*both.chunk(2, dim=-1))

    angles = torch.rand(tokens, c.head_dim // 2, device=rand.device) * 6
    angles = torch.cat([angles, angles], dim=-1)
    turns = (angles.cos().to(NARROW), angles.sin().to(NARROW))
    memory = [rand(1, c.key_heads, past, c.head_dim) for _ in range(2)]
    qkv = rand(1, tokens, c.head_dim * c.heads + 2 * heads)
    # Turned vectors are rounded, as logits' factors; so are weights and result.
    yield Case(
        name="Gemma attention",
        inputs=(qkv, *memory, *turns),
        call=attend,
        moved=(qkv.numel() + 2 * memory[0].numel()) * 2,
        needs=("gemma_attention",),
        bound=2 * BOUND,
    )
    x, y = rand(1, tokens, c.width), rand(1, tokens, c.width)
    inside = (x, y, rand(c.width) / 4, rand(c.width) / 4)
    yield Case(
        name="Gemma norm + x, norm",
        inputs=inside,
        call=norm,
        moved=8 * x.numel(),
        needs=("gemma_norm",),
        bound=2 * BOUND,
    )
    both = rand(1, tokens, 2 * c.mlp_width)
    needs: tuple[Way, ...] = ("gemma_gate",)
    yield Case(name="Gemma gate", inputs=(both,), call=gate, moved=3 * both.numel(), needs=needs)


def decoder_cases(rand: Draw) -> Iterator[Case]:
    own, other, weight = rand(1, 512, 512, 128), rand(1, 512, 512, 128), rand(128)

    def norm(own: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        if not ops.rms_norm_(own, weight, weight, other, eps=1e-5):
            return own.copy_(reference.rms_norm(own, weight, weight, eps=1e-5) + other)
        return own

    def act(own: Tensor, weight: Tensor) -> Tensor:
        if not ops.bias_act_(own, weight, "silu"):
            return torch.nn.functional.silu(own.add_(weight), inplace=True)
        return own

    taps, product = rand(3072, 1, 5, 5) / 5, rand(3072, 32, 1, 1) / 6
    wide = rand(1, 64, 64, 6144)

    def scale(wide: Tensor, taps: Tensor, product: Tensor) -> Tensor:
        if not ops.aggregate_(wide, taps, product, 3072):
            maps = wide[..., :3072].permute(0, 3, 1, 2)
            maps = F.conv2d(maps, taps, padding=2, groups=3072)
            wide[..., 3072:] = F.conv2d(maps, product, groups=96).permute(0, 2, 3, 1)
        return wide[..., 3072:]

    inside = (wide, taps, product)
    yield Case(name="DC-AE scale of 64 px", inputs=inside, call=scale, moved=wide.numel() * 2)
    size = own.numel() * 2
    yield Case(name="DC-AE norm + x", inputs=(own, other, weight), call=norm, moved=3 * size)
    yield Case(name="DC-AE bias, SiLU", inputs=(own, weight), call=act, moved=2 * size)


def run_step(bench: Bench) -> None:
    """One evaluation for guidance: plain, kernels, graph; the profile before and after."""
    bench.add("step", "error", "plain", "kernels", "graph")
    todo = sizes(bench)
    if not bench.is_tiny:
        config = preset("sana-sprint-1600m-1024").config.dit
        todo.append(Sizes(name="sana-sprint-1600m-1024", config=config, side=32, batch=1))
    for size in todo:
        with torch.inference_mode():
            step = Step(bench, size)
            if size is todo[0]:
                step.with_ways()
            else:
                step.check_and_time(())
                step.check_and_time(tuple(bench.kept))
        del step


class Step:
    """A transformer with random weights and its inputs."""

    def __init__(self, bench: Bench, size: Sizes) -> None:
        self.bench, self.size, c = bench, size, size.config
        self.network = random_network(lambda: LinearDiT(c), bench.device)
        rand = Draw(bench.device)
        self.latent = rand(size.batch, c.latent_channels, size.side, size.side).float()
        self.text = rand(size.batch, 5 if bench.is_tiny else TEXT, c.width)
        self.mask = torch.ones(self.text.shape[:2], dtype=torch.bool, device=bench.device)
        self.mask[: size.batch // 2, 1:] = False
        guidance = 4.5 if c.guidance_embedding else None
        [self.moment] = self.network.embed_times(torch.tensor([0.7]), guidance).values()
        self._known: tuple[Tensor, Tensor, float] | None = None

    def call(self) -> Tensor:
        return self.network.denoise(self.latent, self.moment, self.prepared, None)

    def graph(self) -> Tensor:
        own = self.network
        return self.graphs(own.denoise, own, self.latent, self.moment, self.prepared, None)

    def with_ways(self) -> None:
        """As it is, and with each way that no card has proven, kept for the next if it helps."""
        best = self.check_and_time((), with_profile=True)
        keep_what_helps(self.bench, STEP_WAYS, self.check_and_time, best)
        attempt(self.bench, lambda: self.check_and_time(tuple(self.bench.kept), with_profile=True))

    def check_and_time(self, tried: tuple[Way, ...], *, with_profile: bool = False) -> float | None:
        """Milliseconds in a graph, None if it is wrong."""
        name, bench = named(self.size.name, tried), self.bench
        self.graphs = Graphs(None if bench.is_tiny else cuda_capture())
        exact, plain, before = self.known()
        with ops.force("triton"), ops.trying(*tried):
            self.prepared = self.network.prepare(self.text, self.mask)
            got, kernels = self.call(), clock(bench, self.call, is_step=True)
            self.graph()
            self.graph()
            replayed, after = self.graph(), clock(bench, self.graph, is_step=True)
        theirs, ours = rel_rms(exact, plain), max(rel_rms(exact, x) for x in (got, replayed))
        error = f"{ours:.1e} ({theirs:.1e} plain)"
        if not ours <= RATIO * theirs:
            bench.add(name, error, "WRONG")
            return None
        bench.add(name, error, f"{before:.2f}", f"{kernels:.2f}", f"{after:.2f}")
        if with_profile and not bench.is_tiny:
            if not tried:
                with ops.force("reference"):
                    breakdown(f"{name}: plain", self.plain_call)
            breakdown(f"{name}: kernels in a graph", self.graph)
        return after

    def known(self) -> tuple[Tensor, Tensor, float]:
        """The result in fp32, the plain one in bf16, and how long that takes; found once."""
        if self._known is None:
            exact = self.in_fp32()
            with ops.force("reference"):
                self.plain_prepared = self.network.prepare(self.text, self.mask)
                plain = self.plain_call()
                before = clock(self.bench, self.plain_call, is_step=True)
            self._known = exact, plain, before
        return self._known

    def plain_call(self) -> Tensor:
        return self.network.denoise(self.latent, self.moment, self.plain_prepared, None)

    def in_fp32(self) -> Tensor:
        wide = copy.deepcopy(self.network).float()
        with ops.force("reference"):
            prepared = wide.prepare(self.text.float(), self.mask)
            moment = type(self.moment)(*(part.float() for part in self.moment))
            return wide.denoise(self.latent, moment, prepared, None)


def run_decode(bench: Bench) -> None:
    """The decoder at 1024 px, plain and with kernels."""
    config = tiny_decoder() if bench.is_tiny else preset("sana-1600m-1024").config.autoencoder
    network = random_network(lambda: DCAE(config), bench.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latent = Draw(bench.device)(1, config.latent_channels, *((2, 2) if bench.is_tiny else (32, 32)))
    bench.add("decode 1024 px", "error", "plain", "kernels", "graph", "cudnn.benchmark")

    def call() -> Tensor:
        return network.decode(latent)

    with torch.inference_mode():
        with ops.force("reference"):
            plain, before = call(), clock(bench, call, is_step=True)
            if not bench.is_tiny:
                breakdown("decode: plain", call)
            wide = copy.deepcopy(network).float()
            exact = wide.decode(latent.float())
            del wide
        decoder = Decode(bench, network, latent, (exact, plain), before)
        best = decoder.row(tuple(bench.kept), with_profile=True)
        keep_what_helps(bench, DECODE_WAYS, decoder.row, best)
        attempt(bench, lambda: decoder.row(tuple(bench.kept), with_profile=True))


@dataclass(kw_only=False)
class Decode:
    """A decoder with random weights, a latent, and what is known of its result."""

    bench: Bench
    network: Any
    latent: Tensor
    known: tuple[Tensor, Tensor]
    before: float

    def row(self, tried: tuple[Way, ...], *, with_profile: bool = False) -> float | None:
        """Check and time it with our kernels and `tried`; milliseconds in a graph."""
        bench, (exact, plain) = self.bench, self.known
        name = named("decode", tried)
        graphs = Graphs(None if bench.is_tiny else cuda_capture())

        def decode(latent: Tensor, _time: tuple[()]) -> Tensor:
            return self.network.decode(latent)

        def graph() -> Tensor:
            return graphs(decode, self.network, self.latent)

        def call() -> Tensor:
            return self.network.decode(self.latent)

        tuned = float("nan")
        with ops.force("triton"), ops.trying(*tried):
            got, after = call(), clock(bench, call, is_step=True)
            graph()
            graph()
            replayed, graphed = graph(), clock(bench, graph, is_step=True)
            if with_profile and not bench.is_tiny:
                breakdown(f"{name}: kernels", call)
                with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                    call()
                    graphs.clear()
                    graph()
                    graph()
                    tuned = clock(bench, graph, is_step=True)
        theirs, ours = rel_rms(exact, plain), max(rel_rms(exact, x) for x in (got, replayed))
        error = f"{ours:.1e} ({theirs:.1e} plain)"
        if not ours <= RATIO * theirs:
            bench.add(name, error, "WRONG")
            return None
        bench.add(
            name, error, f"{self.before:.2f}", f"{after:.2f}", f"{graphed:.2f}", f"{tuned:.2f}"
        )
        if graphed < after and graphs.is_on and not ops.allows("decode_graph"):
            bench.keep("decode_graph")
        return graphed


def run_text(bench: Bench) -> None:
    """Gemma-2 behind the instruction, and the empty prompt; with and without a graph."""
    bench.add("text", "error", "plain", "graph")
    if not ops.allows("text_graph") and bench.is_left_out("text_graph"):
        return
    reading = Reading(bench)
    with torch.inference_mode():
        best = reading.row(tuple(bench.kept))
        if best is not None and best < reading.before and not ops.allows("text_graph"):
            bench.keep("text_graph")
        keep_what_helps(bench, TEXT_WAYS, reading.row, best)
        attempt(bench, lambda: reading.row(tuple(bench.kept)))


class Reading:
    """Gemma-2 with random weights, and what is known of its states."""

    def __init__(self, bench: Bench) -> None:
        from benchmarks.rigs import PROMPT, WIDE, Texts

        texts = Texts(bench.device, is_tiny=bench.is_tiny, has_peer=False)
        self.bench, self.prompt = bench, PROMPT
        self.text = texts.ours[torch.bfloat16]
        if bench.is_tiny:
            for text in texts.ours.values():
                text.instruction = "photo of a "
        with torch.inference_mode(), ops.force("reference"):
            self.exact, self.plain = self.read(texts.ours[WIDE]), self.read(self.text)
            self.before = clock(bench, lambda: self.read(self.text), is_step=True)

    def read(self, text: Any, **options: Any) -> Tensor:
        """States of both prompts."""
        both = text.encode([self.prompt], **options), text.encode_negative([""], **options)
        return torch.cat([one.states for one in both], dim=1).float()

    def row(self, tried: tuple[Way, ...]) -> float | None:
        """Check and time it with `tried`; milliseconds in a graph, None if it is wrong."""
        bench = self.bench
        name = named("prompt and empty prompt", tried)
        graphs = Graphs(None if bench.is_tiny else cuda_capture())
        self.text._prefix = self.text._empty = None  # as this way makes them

        def graph() -> Tensor:
            return self.read(self.text, replay=graphs)

        with ops.force("triton"), ops.trying(*tried):
            got = self.read(self.text)
            graph()
            graph()
            replayed, after = graph(), clock(bench, graph, is_step=True)
            if not bench.is_tiny:
                breakdown(f"{name}: in graphs", graph)
        theirs = rel_rms(self.exact, self.plain)
        ours = max(rel_rms(self.exact, x) for x in (got, replayed))
        error = f"{ours:.1e} ({theirs:.1e} plain)"
        if not ours <= RATIO * theirs:
            bench.add(name, error, "WRONG")
            return None
        bench.add(name, error, f"{self.before:.2f}", f"{after:.2f}")
        return after if graphs.is_on or bench.is_tiny else None


def named(name: str, tried: tuple[Way, ...]) -> str:
    return f"{name}, tried: {' '.join(tried)}" if tried else name


def keep_what_helps(
    bench: Bench,
    ways: Sequence[Way],
    measure: Callable[[tuple[Way, ...]], float | None],
    best: float | None,
) -> None:
    """Tries each way beside those kept; keeps it if `measure` gives clearly less than `best`."""
    for way in ways:
        if bench.is_left_out(way):
            continue
        tried = (*bench.kept, way)
        took = attempt(bench, lambda tried=tried: measure(tried))
        if took is not None and (best is None or took < GAIN * best):
            best = took
            bench.keep(way)


def attempt(bench: Bench, call: Callable[[], float | None]) -> float | None:
    """What no card has run may fail there, and the rest goes on."""
    try:
        return call()
    except Exception:
        bench.add("tried", "FAILED", traceback.format_exc(limit=-1).strip().splitlines()[-1][:90])
        traceback.print_exc()
        return None


def tiny_decoder() -> DCAEConfig:
    stages = tuple(
        change(stage, width=4, depth=1, scales=())
        for stage in preset("sana-1600m-1024").config.autoencoder.decoder[1:4]
    )
    return DCAEConfig(latent_channels=2, encoder=stages, decoder=stages, head_dim=4)


def run_sweep(bench: Bench) -> None:
    """Other block sizes than those in use."""
    from sana.kernels import cross_attention as cross
    from sana.kernels import gemma, glumbconv
    from sana.kernels import linear_attention as linear

    if bench.is_tiny:
        return
    size = sizes(bench)[0]
    by_name = {case.name: case for case in cases(bench, size)}
    trials: list[tuple[str, Any, dict[str, int]]] = [
        ("glumbconv", glumbconv, {"BLOCK_F": f, "NUM_WARPS": w, "SEGMENT": s})
        for f, w in ((64, 1), (128, 2), (256, 4), (128, 1), (256, 2), (512, 8))
        for s in (16, 32)
    ]
    trials += [
        ("cross-attention", cross, {"BLOCK_N": n, "BLOCK_T": t, "NUM_WARPS": w, "NUM_STAGES": s})
        for n, t, w, s in ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2),
                           (128, 64, 8, 3), (128, 32, 4, 3), (128, 128, 8, 2))
    ]  # fmt: skip
    trials += [
        ("Gemma attention", gemma, {"BLOCK_P": p, "BLOCK_N": n, "NUM_WARPS": w, "NUM_STAGES": s})
        for p, n, w, s in ((64, 32, 4, 2), (64, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 3),
                           (32, 32, 4, 4), (64, 64, 8, 2), (64, 64, 8, 3), (128, 32, 8, 2),
                           (64, 32, 8, 2), (32, 16, 2, 3))
    ]  # fmt: skip
    trials += [
        (
            "linear attention",
            linear,
            {"TOKENS_OF_A_PART": part, "BLOCK_N": block, "APPLY_BLOCK": rows, "APPLY_WARPS": warps},
        )
        for part, block in ((256, 64), (128, 64), (256, 128), (512, 64))
        for rows, warps in ((64, 2), (128, 4), (256, 4))
    ]
    found: dict[str, list[tuple[float, str]]] = {}
    for name, module, settings in trials:
        if bench.left < 20:
            break
        case = by_name[name]
        tried = ops.trying(*case.needs)
        try:
            with torch.inference_mode(), ops.force("triton"), tried, patched(module, settings):
                took = clock(bench, lambda case=case: case.call(*case.inputs))
        except Exception as error:
            print(f"{name}, {settings}: {type(error).__name__}: {error}"[:200], flush=True)
            continue
        print(f"{name}, {settings}: {took:.4f}", flush=True)
        found.setdefault(name, []).append((took, str(settings)))
    for name, times in found.items():
        print(
            f"sweep of {name}:", *(f"{took:.4f} {what}" for took, what in sorted(times)), sep="\n "
        )
        bench.add("best of sweep", name, f"{min(times)[0]:.4f}", min(times)[1])


def run_compile(bench: Bench) -> None:
    """torch.compile for the plain ops, and for the blocks of the step, with a graph around."""
    if bench.is_tiny:
        return
    bench.add("torch.compile of plain ops", "compiled")
    size = sizes(bench)[0]
    with torch.inference_mode(), ops.force("reference"):
        for case in cases(bench, size):
            if bench.left < 20:
                bench.add("compile", "no time left")
                return
            compiled = torch.compile(case.call, dynamic=False)
            compiled(*case.inputs)
            took = clock(bench, lambda f=compiled, case=case: f(*case.inputs))
            bench.add(f"{size.name}: {case.name}", f"{took:.4f}")
            del compiled
        if bench.left < 30:
            bench.add("compiled step", "no time left")
            return
        step = Step(bench, size)
        began = time.monotonic()
        for block in step.network.blocks:
            block.compile(dynamic=False)
        for _ in range(3):
            step.graph()
        took, spent = clock(bench, step.graph, is_step=True), time.monotonic() - began
        bench.add(f"{size.name}: compiled blocks in a graph", f"{took:.2f}", f"{spent:.0f} s first")


class Draw:
    """Normal numbers in 16 bits, new ones for each program run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(NARROW)


def random_network(build: Callable[[], Any], device: torch.device) -> Any:
    """Normal weights that keep a signal's size, made on the device."""
    with torch.device("meta"):
        network: nn.Module = build().to(NARROW).eval()
    network.to_empty(device=device).requires_grad_(False)
    for name, parameter in network.named_parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
        nn.init.normal_(parameter, std=fan**-0.5)
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
    return network


def clock(bench: Bench, call: Callable[[], Any], *, is_step: bool = False) -> float:
    """Median milliseconds: of a kernel with a cold cache, of a step with the host's part."""
    if bench.is_tiny:
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1000
    if not is_step:
        from triton.testing import do_bench, do_bench_cudagraph

        try:
            return float(do_bench_cudagraph(call, rep=15, return_mode="median"))
        except RuntimeError:  # a call that a graph cannot hold
            torch.cuda.synchronize()
            return float(do_bench(call, warmup=10, rep=40, return_mode="median"))
    times = []
    for _ in range(25):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times[5:])


def breakdown(title: str, call: Callable[[], Any]) -> None:
    """The costliest kernels of one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    launches = sum(event.count for event in events)
    print(f"{title}: {total / 1000:.2f} ms on the device in {launches} launches")
    for event in events[:TOP]:
        print(
            f"  {event.self_device_time_total / 1000:8.3f} ms {event.count:5d} x {event.key[:96]}"
        )
    sys.stdout.flush()


@contextlib.contextmanager
def patched(module: Any, settings: dict[str, int]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in settings}
    vars(module).update(settings)
    try:
        yield
    finally:
        vars(module).update(before)


def fresh(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.clone() for x in inputs]


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


if __name__ == "__main__":
    sys.exit(main())
