"""How much does choosing the best of N help? Score against N = 1 ... 64, for several judges.

    python benchmarks/best_of.py --grader runs/detector-b/model/detector.safetensors \
        --judge sticker=runs/detector/model/detector.safetensors \
        --judge alignment=runs/alignment/model/alignment.safetensors --seconds 150

Draws each prompt 64 times, has every picture scored once by each judge and marked right or wrong by
the grader (a detector trained with another seed on other pictures), and computes every N from these
draws: the expected mark of the judge's choice among N of them, exact over all subsets, with a
bootstrap over prompts. Prompts are held out and not the graded ones. With the traits.safetensors of
`sana train sticker-traits` as the grader, prompts ask for styles on unseen pairs of concept and
style, and right is who has the style; of the judges only alignment reads these. It stops drawing
when the next group of six prompts would not fit into --seconds; what was drawn by then is reported,
and the same command goes on from there. Under torchrun the groups are shared.
Writes best-of.json and best-of.png to --output and prints a table last.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sana.data.stickers.prompts import PromptCase, held_out_prompts
from sana.data.stickers.scene import TASKS
from sana.data.stickers.sprites import load_world
from sana.data.stickers.stream import Studio
from sana.data.stickers.tiny import tiny_world
from sana.data.stickers.world import World
from sana.distributed import barrier, gather, session
from sana.evaluation.alignment import read as read_alignment
from sana.evaluation.detector import load as load_detector
from sana.evaluation.judges import StickerJudge
from sana.evaluation.report import Share, bootstrap, table, write_json
from sana.evaluation.sample import Settings, drawer
from sana.evaluation.stickers import Judge, render_truth, score, summarize
from sana.evaluation.traits import STYLE, TraitCase, trait_cases
from sana.evaluation.traits import read as read_traits
from sana.weights.files import read_file
from sana.weights.load import load

COUNTS = (1, 2, 4, 8, 16, 32, 64)
RESERVE = 8.0
"""Seconds kept for the report."""
COLORS = ((28, 100, 200), (214, 96, 20), (24, 138, 60), (130, 60, 190))
GREY = (120, 120, 120)

Case: TypeAlias = PromptCase | TraitCase
Scorer = Callable[[Any, Tensor], list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grader:
    """Who marks, on which prompts, and how often it is right on renders of them, by kind."""

    cases: Sequence[Case]
    mark: Callable[[Any, Tensor], list[float]]
    own: dict[str, Share]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """All draws of one prompt: the grader's marks (0 or 1) and each judge's scores."""

    case: Case
    marks: list[float]
    scores: dict[str, list[float]]


def main(arguments: list[str] | None = None) -> None:
    started = time.monotonic()
    options = parse(arguments)
    wanted = options.device or "auto"
    with session(wanted.partition(":")[0]) as place:
        device = str(place.device) if place.world > 1 else options.device or place.device.type
        world = open_world(options)
        studio = Studio.open(world, torch.device(device))
        grader = open_grader(options, world, studio, device)
        judges = {name: open_judge(name, path, world, device) for name, path in options.judge}
        components = load(options.model, device=device, dtype=torch.float32)
        draw = drawer(components, Settings(steps=options.steps, batch=options.batch))
        cases = grader.cases
        print(f"ready after {time.monotonic() - started:.1f} s", flush=True)
        kept = Kept.open(options, cases)
        barrier(place)
        mine: dict[int, Draws] = {}
        groups = [n for n in range(0, len(cases), len(TASKS)) if n not in kept.draws]
        for start in groups[place.rank :: place.world]:
            began = time.monotonic()
            for number, case in enumerate(cases[start : start + len(TASKS)], start):
                seeds = [options.seed + number * options.count + k for k in range(options.count)]
                pictures = draw([case.prompt] * options.count, seeds)
                mine[number] = judged(case, pictures, grader, judges)
            took = time.monotonic() - began
            print(f"{len(mine)} prompts, {took:.1f} s for the last six", flush=True)
            kept.write(mine, place.rank)
            if time.monotonic() - started + 1.1 * took + RESERVE > options.seconds:
                break
        draws = kept.draws | {n: d for part in gather(mine, place) for n, d in part.items()}
        if place.is_main:
            in_order = [draws[n] for n in sorted(draws)]
            report(in_order, grader.own, options, time.monotonic() - started)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What earlier runs of the same question drew, by the prompt's number, and where it is."""

    folder: Path
    question: str
    draws: dict[int, Draws]

    @staticmethod
    def open(options: argparse.Namespace, cases: Sequence[Case]) -> Kept:
        """Reads every `so-far-*.json` of the folder that answers the same question."""
        asked = (options.model, options.steps, options.count, options.case_seed, options.seed)
        question = repr((asked, options.grader, sorted(options.judge)))
        draws: dict[int, Draws] = {}
        for path in sorted(Path(options.output).glob("so-far-*.json")):
            found = json.loads(path.read_text("utf-8"))
            if found["question"] != question:
                continue
            draws |= {
                int(n): Draws(case=cases[int(n)], marks=row["marks"], scores=row["scores"])
                for n, row in found["draws"].items()
                if int(n) < len(cases) and cases[int(n)].prompt == row["prompt"]
            }
        return Kept(folder=Path(options.output), question=question, draws=draws)

    def write(self, mine: dict[int, Draws], rank: int) -> None:
        """What this process drew, beside what was there."""
        rows = {
            n: {"prompt": d.case.prompt, "marks": d.marks, "scores": d.scores}
            for n, d in (self.draws | mine).items()
        }
        record = {"question": self.question, "draws": rows}
        write_json(self.folder / f"so-far-{rank}.json", record)


def judged(case: Case, pictures: Tensor, grader: Grader, judges: dict[str, Scorer]) -> Draws:
    """Marks and scores of one prompt's pictures."""
    scores = {name: judge(case, pictures) for name, judge in judges.items()}
    check_scores(scores)
    return Draws(case=case, marks=grader.mark(case, pictures), scores=scores)


def kind_of(case: Case) -> str:
    """Of a prompt of the exam its kind, of a styled one its style."""
    return case.kind if isinstance(case, PromptCase) else case.wanted[STYLE]


def check_scores(scores: dict[str, list[float]]) -> None:
    """End the program with one sentence if a judge gave NaN."""
    for name, found in scores.items():
        if not all(map(math.isfinite, found)):
            raise SystemExit(f"judge {name!r} gave a score that is not finite; look at its weights")


def choice(marks: Sequence[float], scores: Sequence[float], count: int) -> float:
    """Expected mark of the highest score among `count` of the draws, over all subsets.

    With draws in falling order of score, number r of M (from 0) is the best of a random subset of N
    in C(M - 1 - r, N - 1) of C(M, N) cases. Draws with equal scores share their marks.
    """
    total = len(marks)
    level: dict[float, list[float]] = {}
    for mark, value in zip(marks, scores, strict=True):
        level.setdefault(value, []).append(mark)
    fair = [
        sum(same) / len(same) for value, same in sorted(level.items(), reverse=True) for _ in same
    ]
    ways = [math.comb(total - 1 - rank, count - 1) for rank in range(total)]
    return sum(w * m for w, m in zip(ways, fair, strict=True)) / math.comb(total, count)


def curve(draws: Sequence[Draws], judge: str | None) -> dict[int, Share]:
    """Share of right pictures against N; without a judge, the grader itself chooses."""
    most = len(draws[0].marks)
    return {
        count: bootstrap(
            [[choice(d.marks, d.scores[judge] if judge else d.marks, count)] for d in draws]
        )
        for count in COUNTS
        if count <= most
    }


def report(draws: Sequence[Draws], own: dict[str, Share], options: Any, seconds: float) -> None:
    """Write the JSON and the plot, print the table."""
    curves = {name: curve(draws, name) for name, _ in options.judge}
    curves["the grader itself (bound)"] = curve(draws, None)
    kinds = {
        name: {
            kind: {str(n): asdict(share) for n, share in curve(part, name).items()}
            for kind in sorted({kind_of(d.case) for d in draws})
            if (part := [d for d in draws if kind_of(d.case) == kind])
        }
        for name, _ in options.judge
    }
    agreement = {name: agree(draws, name) for name, _ in options.judge}
    record = {
        "model": options.model,
        "steps": options.steps,
        "prompts": len(draws),
        "draws": options.count,
        "case_seed": options.case_seed,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "judges": dict(options.judge),
        "grader": options.grader,
        "grader_on_renders": {kind: asdict(share) for kind, share in own.items()},
        "agreement": agreement,
        "curves": {
            name: {str(n): asdict(share) for n, share in values.items()}
            for name, values in curves.items()
        },
        "kinds": kinds,
        "marks": [
            {"prompt": d.case.prompt, "kind": kind_of(d.case), "marks": d.marks, "scores": d.scores}
            for d in draws
        ],
    }
    folder = Path(options.output)
    write_json(folder / "best-of.json", record)
    plot(curves).save(folder / "best-of.png")
    numbers = list(next(iter(curves.values())))
    rows = [[name, *(str(values[n]) for n in numbers)] for name, values in curves.items()]
    print(table(["judge", *(f"N = {n}" for n in numbers)], rows))
    most = max(n for n in numbers if n <= 16)
    for name, by_kind in kinds.items():
        shown = ", ".join(f"{kind} {Share(**at[str(most)])}" for kind, at in by_kind.items())
        print(f"{name}, N = {most}: {shown}")
    whole = own["all"] if "all" in own else own[STYLE]
    print(f"grader on renders: {whole}")
    for name, value in agreement.items():
        share = "no such pair" if value is None else f"{value:.3f}"
        print(f"{name}: of a right and a wrong picture of one prompt, prefers the right: {share}")
    print(f"{len(draws)} prompts x {options.count} draws, {options.steps} steps, {seconds:.0f} s")


def agree(draws: Sequence[Draws], judge: str) -> float | None:
    """Of all pairs of a right and a wrong picture of one prompt, how many the judge orders so."""
    right = total = 0.0
    for d in draws:
        good = [s for s, m in zip(d.scores[judge], d.marks, strict=True) if m]
        bad = [s for s, m in zip(d.scores[judge], d.marks, strict=True) if not m]
        total += len(good) * len(bad)
        right += sum((g > b) + 0.5 * (g == b) for g in good for b in bad)
    return right / total if total else None


def plot(curves: dict[str, dict[int, Share]]) -> Image.Image:
    """Shares against the logarithm of N, with the intervals shaded."""
    width, height, left, low = 720, 440, 64, 392
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image, "RGBA")
    font = ImageFont.load_default(13)
    numbers = list(next(iter(curves.values())))
    bottom = min(s.low for values in curves.values() for s in values.values())
    bottom = math.floor(bottom * 10) / 10
    span = max(1e-9, 1.0 - bottom)

    def at(index: int, value: float) -> tuple[float, float]:
        step = (width - left - 24) / max(1, len(numbers) - 1)
        return left + index * step, low - (value - bottom) / span * (low - 40)

    for tick in range(round(bottom * 10), 11):
        _, y = at(0, tick / 10)
        pen.line((left, y, width - 24, y), fill=(225, 225, 225))
        pen.text((left - 34, y - 8), f"{tick / 10:.1f}", fill=GREY, font=font)
    for index, number in enumerate(numbers):
        x, _ = at(index, bottom)
        pen.text((x - 6, low + 6), str(number), fill=GREY, font=font)
    pen.text((width // 2 - 60, low + 26), "candidates (N)", fill=GREY, font=font)
    pen.text((8, 10), "right pictures", fill=GREY, font=font)
    for row, (name, values) in enumerate(curves.items()):
        color = COLORS[row % len(COLORS)]
        upper = [at(i, values[n].high) for i, n in enumerate(numbers)]
        lower = [at(i, values[n].low) for i, n in enumerate(numbers)]
        if len(numbers) > 1:
            pen.polygon([*upper, *lower[::-1]], fill=(*color, 36))
            pen.line([at(i, values[n].value) for i, n in enumerate(numbers)], fill=color, width=3)
        pen.text((left + 260, low - 24 - 18 * row), name, fill=color, font=font)
    return image


def open_grader(options: argparse.Namespace, world: World, studio: Studio, device: str) -> Grader:
    """A detector with the exam's kinds of prompts, or a judge of traits with prompts of styles."""
    count, seed = options.prompts, options.case_seed
    if read_file(Path(options.grader))[0].get("kind") == "traits":
        blind = [name for name, _ in options.judge if not name.startswith("alignment")]
        if blind:
            raise SystemExit(f"judge {blind[0]!r} knows no styles; take alignment=FILE alone")
        eyes = read_traits(options.grader, device)
        styled = trait_cases(studio.composer, "sticker", count, seed)

        def has_style(case: TraitCase, pictures: Tensor) -> list[float]:
            return [float(seen[STYLE] == case.wanted[STYLE]) for seen in eyes.name(pictures)]

        shown = [studio.renderer.render([case.scene], 256) for case in styled]
        right = [has_style(case, render) for case, render in zip(styled, shown, strict=True)]
        return Grader(cases=styled, mark=has_style, own={STYLE: bootstrap(right)})
    judge = Judge(detector=load_detector(options.grader, world, device), world=world, studio=studio)
    cases = held_out_prompts(world, count, seed)

    def is_right(case: PromptCase, pictures: Tensor) -> list[float]:
        verdicts = score(pictures, [case] * len(pictures), judge)
        return [float(verdict.is_right) for verdict in verdicts]

    own = summarize(score(render_truth(cases, judge), cases, judge))
    return Grader(cases=cases, mark=is_right, own=dict(own))


def open_judge(name: str, path: str, world: World, device: str) -> Scorer:
    if name.startswith("alignment"):
        aligner, _ = read_alignment(path, device)
        return lambda case, pictures: aligner.score(case.prompt, pictures)
    return StickerJudge(load_detector(path, world, device), world).score


def open_world(options: argparse.Namespace) -> World:
    if options.pack == "tiny":
        return tiny_world()
    cache = Path(options.cache) if options.cache else None
    return load_world(options.pack, avatars=1, cache=cache)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sticker-512")
    parser.add_argument("--pack", default=".data/stickers.pack", help='sticker pack, or "tiny"')
    parser.add_argument("--cache", default=".data/cache")
    parser.add_argument("--grader", required=True, help="detector or traits, of another seed")
    parser.add_argument(
        "--judge",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="sticker=DETECTOR or alignment=MODEL; again for another",
    )
    parser.add_argument("--prompts", type=int, default=120, help="at most so many, in sixes")
    parser.add_argument("--count", type=int, default=64, help="draws of each prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--case-seed", type=int, default=7, help="1 chooses the graded prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/best-of")
    parser.add_argument("--device")
    options = parser.parse_args(arguments)
    options.judge = [tuple(pair.split("=", 1)) for pair in options.judge]
    if any(len(pair) != 2 for pair in options.judge):
        parser.error("--judge takes NAME=FILE, such as sticker=detector.safetensors")
    if any(path == options.grader for _, path in options.judge):
        parser.error("a judge may not be the grader: train a second detector with another seed")
    return options


if __name__ == "__main__":
    main()
