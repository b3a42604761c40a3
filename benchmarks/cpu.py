"""Two versions of `sana generate` on a CPU, whole processes in turn: speed and likeness.

    git worktree add --detach ../before 3475d0a          # the commit before the issue of speed
    python benchmarks/cpu.py --before ../before --pairs 8
    python benchmarks/cpu.py --before . --before-flags="--dtype float32"

Each pair runs both on the same prompt and seed, the first one in odd pairs first. Said are the
medians over the pairs of before / after with their range, for the clock and for the CPU's time
(user and system), since the clock also sees what else runs; then how near the pictures are: PSNR,
the shares of values equal and within one step of 256, the largest difference. With
`--same-weights` both versions draw with the weights of this one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "src" / "sana" / "assets" / "sticker-512"
PROMPTS = (
    "a red fox in the snow",
    "three yellow stars above a blue car",
    "a woman with long brown hair wearing glasses",
    "a green apple next to a cat",
)


@dataclass(frozen=True, slots=True)
class Side:
    """One version: its name, its checkout and its flags."""

    name: str
    root: Path
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One process: seconds by the clock and of the CPU, and its picture as (H, W, 3)."""

    wall: float
    cpu: float
    picture: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--before", type=Path, required=True, help="a checkout of the other version"
    )
    parser.add_argument("--before-flags", default="", help="flags of the other version alone")
    parser.add_argument("--flags", default="", help="flags of this version alone")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--same-weights", action="store_true", help="give both this one's weights")
    parser.add_argument("--pictures", type=Path, help="keep the last picture of each prompt here")
    parser.add_argument("--json", type=Path, help="write every run there")
    asked = parser.parse_args()
    sides = (
        Side("before", asked.before.resolve(), tuple(shlex.split(asked.before_flags))),
        Side("after", ROOT, tuple(shlex.split(asked.flags))),
    )
    model = ("--model", str(ASSETS)) if asked.same_weights else ()
    pairs = []
    for index in range(asked.pairs):
        prompt = PROMPTS[index % len(PROMPTS)]
        order = sides if index % 2 else sides[::-1]
        runs = {side.name: run(side, prompt, model) for side in order}
        pairs.append((prompt, runs["before"], runs["after"]))
        print(said(prompt, runs["before"], runs["after"]), file=sys.stderr, flush=True)
    print("\n".join(page(pairs)))
    if asked.pictures is not None:
        keep(pairs, asked.pictures)
    if asked.json is not None:
        asked.json.write_text(json.dumps(as_json(pairs), indent=1) + "\n")


def run(side: Side, prompt: str, model: Sequence[str]) -> Run:
    """One process of one version, from its start to its end."""
    environment = {**os.environ, "PYTHONPATH": str(side.root / "src"), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory(prefix="sana-cpu-") as folder:
        words = [sys.executable, "-m", "sana.cli.main", "generate", prompt, "--seed", "7"]
        words += [*model, *side.flags, "--device", "cpu", "--output", f"{folder}/picture.png"]
        used, began = _cpu_seconds(), time.perf_counter()
        subprocess.run(words, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        wall, cpu = time.perf_counter() - began, _cpu_seconds() - used
        with Image.open(f"{folder}/picture.png") as image:
            return Run(wall, cpu, np.asarray(image.convert("RGB")))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def likeness(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float, int]:
    """PSNR in dB, the shares of values equal and within one of 256, the largest difference."""
    apart = np.abs(one.astype(np.int64) - other.astype(np.int64))
    error = float((apart**2).mean())
    psnr = float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
    return psnr, float((apart == 0).mean()), float((apart <= 1).mean()), int(apart.max())


def said(prompt: str, before: Run, after: Run) -> str:
    """A pair in a line."""
    psnr, equal, near, largest = likeness(before.picture, after.picture)
    return (
        f"{before.wall:6.2f} / {after.wall:5.2f} s = {before.wall / after.wall:.2f}   "
        f"CPU {before.cpu:6.2f} / {after.cpu:5.2f} s = {before.cpu / after.cpu:.2f}   "
        f"PSNR {psnr:.1f} dB, {equal:.1%} equal, {near:.1%} within 1, at most {largest}   {prompt}"
    )


def page(pairs: Sequence[tuple[str, Run, Run]]) -> Iterator[str]:
    """Medians with their ranges, and the likeness for each prompt, in Markdown."""
    yield f"{len(pairs)} pairs; {platform.machine()}, {os.cpu_count()} cores; before / after"
    yield ""
    yield "| | before, s | after, s | times as fast, median (range) |"
    yield "|---|---:|---:|---:|"
    for what, name in (("wall", "clock"), ("cpu", "CPU time")):
        old, new = ([getattr(pair[i], what) for pair in pairs] for i in (1, 2))
        ratios = [a / b for a, b in zip(old, new, strict=True)]
        middle = statistics.median
        yield (
            f"| {name} | {middle(old):.2f} | {middle(new):.2f} | "
            f"{middle(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    yield ""
    yield "| prompt | PSNR, dB | equal | within 1 of 256 | largest |"
    yield "|---|---:|---:|---:|---:|"
    for prompt, before, after in {pair[0]: pair for pair in pairs}.values():
        psnr, equal, near, largest = likeness(before.picture, after.picture)
        yield f"| {prompt} | {psnr:.1f} | {equal:.1%} | {near:.1%} | {largest} |"


def keep(pairs: Sequence[tuple[str, Run, Run]], folder: Path) -> None:
    """Both pictures of each prompt side by side, before on the left."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (_, before, after) in enumerate({pair[0]: pair for pair in pairs}.values()):
        both = np.concatenate([before.picture, after.picture], axis=1)
        Image.fromarray(both).save(folder / f"pair-{number}.png")


def as_json(pairs: Sequence[tuple[str, Run, Run]]) -> list[dict[str, object]]:
    """Every run's seconds."""
    return [
        {
            "prompt": prompt,
            **{
                f"{name}_{what}": getattr(one, what)
                for name, one in ends
                for what in ("wall", "cpu")
            },
            "likeness": likeness(ends[0][1].picture, ends[1][1].picture),
        }
        for prompt, before, after in pairs
        for ends in [(("before", before), ("after", after))]
    ]


if __name__ == "__main__":
    main()
