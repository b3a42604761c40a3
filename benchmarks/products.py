"""Which algorithm of cuBLASLt is fastest for each product of a transformer, with the chip at work?

    python benchmarks/products.py                          # on an H100 or H200, two minutes
    python benchmarks/products.py --rows 2048,32768 --update
    python benchmarks/products.py --race sana-600m-1024 --rows "" --fp8-rows ""  # as it is

Every shape is done by torch and by all that the library offers without a workspace: its guesses for
this shape and for all others of the run. Each is a CUDA graph of some milliseconds; graphs are
replayed in turn, in another order each time, without pauses, so that the chip is as warm and as
slow for one as for the other, and as in a picture. The fastest go through it again. Printed are
medians, and the rows of `sana.kernels.chosen`, which --update writes there. Then whole steps are
raced with torch's products, with the rows that were there and with the new ones.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.errors import rel_rms  # noqa: E402
from benchmarks.gaps import replayed, subject  # noqa: E402
from sana.kernels import chosen, ops, products  # noqa: E402
from sana.kernels.chosen import CHOSEN, Algorithm, Shape  # noqa: E402
from sana.kernels.reference import Rows  # noqa: E402
from sana.pipelines.graphs import cuda_capture  # noqa: E402
from sana.presets import preset  # noqa: E402

MODELS = ("sana-1600m-1024", "sana-600m-1024")
ROWS, FP8_ROWS = "1024,2048,4096,8192,16384,32768", "1024,2048,16384,32768"
RACES = (
    "sana-1600m-1024,sana-600m-1024,sana-sprint-1600m-1024,sana-sprint-600m-1024,"
    "sana-1600m-1024*32,sana-600m-1024*32"
)
GAIN = 0.995
"""A row is written if it takes at most so much of torch's time."""
BOUND = 4e-3
"""Relative RMS from torch's result, of which bf16's digits leave 2.4e-3."""
BEST = 6
"""What goes through the second, longer race."""
Replay = Callable[[], Any]


def main() -> int:
    """0, or 1 where there is no such GPU."""
    options = _options()
    if not torch.cuda.is_available() or not products.is_known(torch.cuda.current_device()):
        print("this needs an H100 or H200 of 132 processors: the table is for these alone")
        return 1
    began = time.monotonic()
    with torch.inference_mode(), ops.trying("chosen_products"):
        rows, narrow = (_numbers(words) for words in (options.rows, options.fp8_rows))
        wanted = [shape for model in MODELS for shape in shapes(model, rows)]
        wanted += shapes(MODELS[0], narrow, in_fp8=True)
        wanted += decoder_shapes() if rows else []
        found = search(wanted, options)
        print(*(_row(*pair) for pair in found.items()), sep="\n", flush=True)
        kept = {shape: own for shape, own in CHOSEN.items() if shape not in wanted}
        if options.update:
            update({**kept, **found})
        print(f"{time.monotonic() - began:.0f} s", flush=True)
        for name in filter(None, options.race.split(",")):
            race_steps(name, {**kept, **found}, options)
    return 0


def shapes(model: str, counts: list[int], *, in_fp8: bool = False) -> list[Shape]:
    """The products of so many image tokens."""
    config = preset(model).config.dit
    width, hidden = config.width, config.mlp_width
    sides = [(3 * width, width, False), (width, width, True)]
    sides += [(2 * hidden, width, True), (width, hidden, False)]
    return [Shape(count, *side, in_fp8=in_fp8) for count in counts for side in sides]


def decoder_shapes(pixels: int = 1024) -> list[Shape]:
    """The products of the DC-AE's transformer blocks for one picture."""
    made = []
    for index, stage in enumerate(preset(MODELS[0]).config.autoencoder.decoder):
        if stage.block == "efficientvit" and stage.depth:
            width, scales = stage.width, 1 + len(stage.scales)
            rows = (pixels >> index) ** 2
            sides = [(8 * width, width, True), (width, 4 * width, False)]
            made += [Shape(rows, *side) for side in [*sides, (width, scales * width, False)]]
    return list(dict.fromkeys(made))


def search(wanted: list[Shape], options: argparse.Namespace) -> dict[Shape, Algorithm]:
    """The fastest for each shape, where that is faster than torch."""
    guesses = {shape: list(products.Plan(shape).guesses()) for shape in wanted}
    pools: dict[bool, dict[Algorithm, None]] = {False: {}, True: {}}
    for shape in wanted:
        pools[shape.in_fp8].update(dict.fromkeys(guesses[shape]))
    counts = [len(pool) for pool in pools.values()]
    print(f"{len(wanted)} shapes; {counts} algorithms in bf16 and fp8", flush=True)
    found = {}
    for shape in wanted:
        ranked = fastest(shape, guesses[shape], pools[shape.in_fp8], options)
        times = dict(ranked)
        best, took = next((pair for pair in ranked if pair[0] is not None), (None, 0.0))
        if best is None:
            print(f"{tuple(shape)}: no algorithm but torch's, {times[None]:.1f} us", flush=True)
            continue
        guess_took = times.get((guesses[shape] or [None])[0])
        first = "" if guess_took is None else f", first guess {guess_took:.1f}"
        speed = 2e-6 * shape.rows * shape.results * shape.values / took
        print(
            f"{tuple(shape)}: torch {times[None]:.1f} us{first}, best {took:.1f} {tuple(best)}, "
            f"{speed:.0f} TFLOP/s",
            flush=True,
        )
        if took <= GAIN * times[None]:
            found[shape] = best
    return found


class Trial:
    """One shape: inputs that are used in turn, and its product by torch or by a plan."""

    def __init__(self, shape: Shape, copies: int) -> None:
        rows, results, values, has_bias, self.in_fp8 = shape
        dtype = torch.float8_e4m3fn if self.in_fp8 else torch.bfloat16

        def draw(*sides: int) -> Tensor:
            return torch.randn(*sides, device="cuda")

        self.xs = [draw(rows, values).to(dtype) for _ in range(copies)]
        self.weights = [draw(results, values).to(dtype) for _ in range(copies)]
        self.bias = draw(results).bfloat16() if has_bias else None
        self.out = draw(rows, results).bfloat16()
        scales = (draw(1, results).abs(), draw(rows, 1).abs())
        self.scales = scales if self.in_fp8 else ()
        self.times = max(2, round(2e-3 / (2 * rows * results * values / 7e14)))
        """In a graph, for some milliseconds."""

    def once(self, plan: products.Plan | None, turn: int = 0) -> None:
        """By the plan, or by torch."""
        x, weight = (own[turn % len(own)] for own in (self.xs, self.weights))
        if plan is not None:
            plan.run(x, weight, self.bias, self.out, self.scales)
        elif self.in_fp8:
            of_weight, of_x = self.scales
            ops.scaled_product(Rows(x, of_x), weight, of_weight, self.bias, self.out)
        elif self.bias is None:
            torch.mm(x, weight.mT, out=self.out)
        else:
            torch.addmm(self.bias, x, weight.mT, out=self.out)

    def captured(self, plan: products.Plan | None) -> Replay:
        """A graph of several."""

        def several() -> None:
            for turn in range(self.times):
                self.once(plan, turn)

        several()
        return cuda_capture()(several)[0]


def fastest(
    shape: Shape,
    guesses: list[Algorithm],
    pool: Iterable[Algorithm],
    options: argparse.Namespace,
) -> list[tuple[Algorithm | None, float]]:
    """Microseconds of torch (None) and of the best, the fastest first."""
    trial = Trial(shape, options.copies)
    known: dict[Algorithm | None, Replay] = {None: trial.captured(None)}
    trial.once(None)
    expected = trial.out.clone()
    for one in dict.fromkeys([*guesses, *pool]):
        plan = products.Plan(shape)
        if not plan.choose(one):
            continue
        trial.out.fill_(float("nan"))
        trial.once(plan)
        error = rel_rms(expected, trial.out)
        if not error < BOUND:  # so that NaN fails too
            print(f"  {tuple(one)}: {error:.1e} off torch's: left out", flush=True)
            continue
        if not torch.equal(expected, trial.out):
            print(f"  {tuple(one)}: other bits, {error:.1e}", flush=True)
        known[one] = trial.captured(plan)
    ranked = race(known, 3)
    kept = [one for one, _ in ranked[:BEST]]
    kept += [one for one in (None, *guesses[:1]) if one in known and one not in kept]
    ranked = race({one: known[one] for one in kept}, options.rounds)
    return [(one, 1000 * took / trial.times) for one, took in ranked]


def race(replays: Mapping[Any, Replay], rounds: int, row: int = 1) -> list[tuple[Any, float]]:
    """Median ms of each, the fastest first."""
    taken: dict[Any, list[float]] = {name: [] for name in replays}
    order = list(replays)
    torch.cuda.synchronize()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            taken[name].append(replayed(replays[name], row))
    medians = [(name, statistics.median(own)) for name, own in taken.items()]
    return sorted(medians, key=lambda pair: pair[1])


def race_steps(name: str, table: Mapping[Shape, Algorithm], options: argparse.Namespace) -> None:
    """A step with torch's products, twice, and with tables."""
    call, exact = subject(name, torch.device("cuda"), 300, is_tiny=False)
    tables = {"torch": {}, "as it was": CHOSEN, "now": table, "torch again": {}}
    graphs: dict[str, Any] = {}
    with ops.force("triton"):
        for which, rows in tables.items():
            with products.trying(rows):
                call()
                graphs[which] = cuda_capture()(call)
    is_heavy = "*" in name or "@" in name
    replays = {which: replay for which, (replay, _) in graphs.items()}
    ranked = race(replays, options.rounds // (2 if is_heavy else 1), 1 if is_heavy else 8)
    first = None
    for which, (replay, output) in graphs.items():
        output.fill_(float("nan"))
        replay()
        first = output.clone() if first is None else first
        same = "same bits" if torch.equal(first, output) else "other bits"
        took, error = dict(ranked)[which], rel_rms(exact, output)
        print(f"{name}, {which}: {took:.3f} ms, {error:.3e} from fp32, {same}", flush=True)
    del graphs, replays
    torch.cuda.empty_cache()


def update(table: Mapping[Shape, Algorithm], path: Path = Path(chosen.__file__)) -> None:
    """Write the rows to `sana.kernels.chosen`."""
    place = r"MappingProxyType\(.*?\n?\}?\n?\)\n(?=\"\"\"On GPUs)"
    rows = "".join(f"        {_row(*pair)}\n" for pair in sorted(table.items()))
    made = f"MappingProxyType(\n    {{\n{rows}    }}\n)\n"
    path.write_text(re.sub(place, made, path.read_text(), flags=re.S))


def _numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",") if word]


def _row(shape: Shape, algorithm: Algorithm) -> str:
    parts = shape if shape.in_fp8 else shape[:-1]
    return f"Shape{tuple(parts)}: Algorithm{tuple(algorithm)},"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default=ROWS, help="numbers of image tokens in a call")
    parser.add_argument("--fp8-rows", default=FP8_ROWS, help="the same, in fp8, of 1.6B")
    parser.add_argument("--race", default=RACES, help="networks, as gaps.py has them")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--copies", type=int, default=3, help="inputs and weights in turn")
    parser.add_argument("--update", action="store_true", help="write the rows into the table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
