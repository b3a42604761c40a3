"""How fast are the steps of a recipe, computed in several ways, and where does their time go?

    python benchmarks/training.py sticker-512 --ways compiled,compiled-graph data.pack=tiny
    python benchmarks/training.py sticker-512 --ways compiled-graph,compiled-graph+data.chunk=24
    torchrun --nproc-per-node 2 benchmarks/training.py sticker-512 --ways compiled,compiled-graph

A way is the recipe with `compile` and `graph` set and, behind each +, one key=value more. All begin
with the same weights, data and random numbers, so their losses and gradients' norms must agree.
Says, of the second `SPAN` steps, steps a second without the profiler; how long the first step
took with compiling; the most memory; the losses' and norms' means of each span, with the relative
difference to the first way; and, of one chunk of data more, what the device did, kernel by kernel.
Nothing is saved. Without a GPU ops on the host are counted instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.flow_step import kernel_lines  # noqa: E402
from sana import distributed  # noqa: E402
from sana.data.stickers.world import World  # noqa: E402
from sana.distributed import Place  # noqa: E402
from sana.pipelines.timing import synchronize  # noqa: E402
from sana.training import checkpoint  # noqa: E402
from sana.training.config import TrainConfig  # noqa: E402
from sana.training.loop import train  # noqa: E402
from sana.training.recipes import plan  # noqa: E402
from sana.training.run import load_data, make_task  # noqa: E402

WAYS = {
    "eager": ("compile=false", "graph=false"),
    "compiled": ("compile=true", "graph=false"),
    "graph": ("compile=false", "graph=true"),
    "compiled-graph": ("compile=true", "graph=true"),
}
SPAN, PROFILED = 32, 8
"""Steps, each in whole chunks of data."""
COMPARED = ("loss", "gradient_norm")


class Clock:
    """Marks a run's steps; `prepare` is called before each."""

    def __init__(self, device: torch.device, chunk: int, scale: int) -> None:
        unit = chunk * -(-PROFILED // chunk)
        self.span = unit * -(-SPAN // scale // unit)
        self.profiled, self.device = unit, device
        self.calls = 0
        self.marks = {"start": time.perf_counter()}
        kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        self.profiler = profile(activities=[kind])

    @property
    def steps(self) -> int:
        return 2 * self.span + self.profiled + 1

    def before_step(self) -> None:
        # The loop reports just before both marks, so that the device is waited for anyway.
        first, last = self.span, 2 * self.span
        names = {1: "first", first: "from", last: "to"}
        if self.calls in names:
            synchronize(self.device)
            self.marks[names[self.calls]] = time.perf_counter()
        if self.calls == last:
            self.profiler.__enter__()
        if self.calls == last + self.profiled:
            synchronize(self.device)
            self.profiler.__exit__(None, None, None)
        self.calls += 1

    def seconds(self) -> float:
        """Of a step."""
        return (self.marks["to"] - self.marks["from"]) / self.span


def main() -> int:
    """Run each way; those that would begin after --seconds are left out."""
    options = _options()
    began = time.perf_counter()
    lines: list[str] = []
    first: dict[str, list[float]] = {}
    with distributed.session() as place:
        world: World | None = None
        for way in options.ways.split(","):
            late = time.perf_counter() - began > options.seconds
            if distributed.any_process(holds=late, place=place):
                lines.append(f"{way}: no time left")
                continue
            name, *more = way.split("+")
            with tempfile.TemporaryDirectory(prefix="timed-run-") as folder:
                changes = [*options.changes, *WAYS[name], *more, f"folder={folder}"]
                config = plan(options.recipe, ["save_every=1000000", *changes])
                world = world or load_data(config.data)
                line, records = _measure(config, world, place, options)
            if place.is_main:
                first = first or records
                lines.append(f"{way}: {line}; {_agreement(first, records)}")
                print(lines[-1], flush=True)
        if place.is_main:
            print(f"\n{place.world} x {_device(place)}, torch {torch.__version__}")
            print("\n".join(lines))
            print(f"{time.perf_counter() - began:.0f} s in all")
    return 0


def _measure(
    config: TrainConfig, world: World, place: Place, options: Any
) -> tuple[str, dict[str, list[float]]]:
    """What to say of a way, and of its reports the numbers to compare."""
    gc.collect()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(place.device, config.data.chunk, options.fewer)
    config = dataclasses.replace(config, steps=clock.steps, log_every=clock.span)
    task = make_task(config, place, world)
    prepare = task.prepare

    def timed(item: Any, *, is_warm_up: bool, generator: torch.Generator) -> Any:
        if not is_warm_up:
            clock.before_step()
        return prepare(item, is_warm_up=is_warm_up, generator=generator)

    with (
        mock.patch.object(task, "prepare", timed),
        mock.patch.object(task, "export"),
        mock.patch.object(checkpoint, "save"),
    ):
        train(config, task, place)
    if not place.is_main:
        return "", {}
    lines = (Path(config.folder) / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    phase = task.phases[0].name
    seconds = clock.seconds()
    for line in kernel_lines(clock.profiler, seconds, options.top, clock.profiled):
        print(line, flush=True)
    memory = torch.cuda.max_memory_allocated() / 1e9 if place.device.type == "cuda" else 0.0
    return (
        f"{1000 * seconds:.1f} ms a step, {1 / seconds:.2f} steps/s, "
        f"{config.data.batch * place.world / seconds:.0f} samples/s, {memory:.1f} GB, "
        f"first step after {clock.marks['first'] - clock.marks['start']:.1f} s"
    ), {name: [record[f"{phase}/{name}"] for record in records] for name in COMPARED}


def _agreement(first: dict[str, list[float]], records: dict[str, list[float]]) -> str:
    """The means of each span, and how far they lie from the first way's."""
    parts = []
    for name, values in records.items():
        apart = [abs(v / w - 1) for v, w in zip(values, first[name], strict=True)]
        pairs = (f"{v:.4f} ({a:.1e} apart)" for v, a in zip(values, apart, strict=True))
        parts.append(f"{name} {', '.join(pairs)}")
    return "; ".join(parts)


def _device(place: Place) -> str:
    return torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "CPU"


def _options() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--ways", default="compiled,compiled-graph", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="no way begins after these")
    parser.add_argument("--top", type=int, default=12, help="so many kernels")
    parser.add_argument("--fewer", type=int, default=1, help="divides the steps, for trying it out")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
