"""Evaluates a model folder on held-out prompts, for each combination of the sampling values given.

    python -m sana.evaluation --model FOLDER --detector FILE --pack FILE --count 200 \
        --guidance 3 4.5 --shift 2 3 --output runs/evaluation
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from sana.data.stickers.prompts import PromptCase, held_out_prompts
from sana.data.stickers.scene import TASKS
from sana.data.stickers.sprites import load_world
from sana.data.stickers.stream import Studio
from sana.data.stickers.tiny import tiny_world
from sana.evaluation.autoencoder import autoencoder_quality
from sana.evaluation.detector import load as load_detector
from sana.evaluation.report import Share, table, write_json
from sana.evaluation.sample import Settings, drawer, rebuild
from sana.evaluation.stickers import (
    Judge,
    Result,
    evaluate_prompts,
    render_truth,
    score,
    summarize,
    write,
)
from sana.weights.load import Components, load


def main(arguments: list[str] | None = None) -> None:
    """Print tables of the accuracies and of the autoencoder's quality; write both as files."""
    options = _parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(options.output)
    is_tiny = options.pack == "tiny"
    world = (
        tiny_world()
        if is_tiny
        else load_world(
            options.pack,
            avatars=options.avatars,
            cache=Path(options.cache) if options.cache else None,
        )
    )
    judge = Judge(
        detector=load_detector(options.detector, world, device),
        world=world,
        studio=Studio.open(world, torch.device(device)),
    )
    cases = held_out_prompts(world, options.count, options.case_seed)
    if options.model is None:
        own = summarize(score(render_truth(cases, judge), cases, judge))
        print(_accuracies([("judge on renders", own)]))
        write_json(folder / "judge.json", {kind: asdict(share) for kind, share in own.items()})
        return
    components = load(options.model, device=device, dtype=torch.float32)
    if options.pictures:
        _report_autoencoder(components, judge, options.pictures, folder)
    _report_prompts(components, judge, cases, options)


def _report_prompts(
    components: Components,
    judge: Judge,
    cases: tuple[PromptCase, ...],
    options: argparse.Namespace,
) -> None:
    """One row for each combination; the sheet and the JSON are of the best one."""
    folder = Path(options.output)
    results: dict[str, Result] = {}
    started = time.monotonic()
    for guidance, shift in product(options.guidance, options.shift):
        settings = Settings(
            steps=options.steps,
            guidance=guidance,
            shift=shift,
            sampler=options.sampler,
            batch=options.batch,
        )
        name = f"guidance {guidance or 'default'}, shift {shift or 'default'}"
        draw = drawer(components, settings)
        results[name] = evaluate_prompts(draw, cases, options.seeds, judge)
    seconds = (time.monotonic() - started) / len(results)
    best = max(results, key=lambda name: results[name].model["all"].value)
    write(results[best], judge.world, folder)
    rebuilt = rebuild(components, render_truth(cases, judge, size=components.config.pixels))
    rows = [
        ("renders (the judge)", results[best].judge),
        ("renders, autoencoded", summarize(score(rebuilt, cases, judge))),
        *((name, result.model) for name, result in results.items()),
    ]
    text = (
        f"{_accuracies(rows)}\n\n{len(cases)} prompts, {len(options.seeds)} seeds, "
        f"{seconds:.1f} s a row; sheet.png and results.json: {best}."
    )
    (folder / "prompts.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def _report_autoencoder(components: Components, judge: Judge, count: int, folder: Path) -> None:
    found = autoencoder_quality(
        lambda images: rebuild(components, images, is_exact=True),
        judge.studio,
        count=count,
        size=components.config.pixels,
    )
    rows = [(kind, q.psnr, q.ssim, q.worst, q.count) for kind, q in found.items()]
    text = table(["kind", "PSNR dB", "SSIM", "worst dB", "pictures"], rows)
    write_json(folder / "autoencoder.json", {kind: asdict(q) for kind, q in found.items()})
    print(f"{text}\n")


def _accuracies(rows: list[tuple[str, dict[str, Share]]]) -> str:
    kinds = [kind for kind in (*TASKS, "all") if kind in rows[0][1]]
    return table(
        ["pictures", *kinds],
        [[name, *(str(shares[kind]) for kind in kinds)] for name, shares in rows],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sana.evaluation")
    parser.add_argument("--model", help="model folder or name; without it the judge judges itself")
    parser.add_argument("--detector", required=True, help="detector.safetensors")
    parser.add_argument("--pack", required=True, help='sticker pack, or "tiny"')
    parser.add_argument("--output", default="runs/evaluation")
    parser.add_argument("--count", type=int, default=200, help="prompts, six kinds in turn")
    parser.add_argument("--case-seed", type=int, default=1, help="chooses the prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--guidance", type=float, nargs="+", default=[None])
    parser.add_argument("--shift", type=float, nargs="+", default=[None])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--pictures", type=int, default=64, help="of each kind; 0 skips them")
    parser.add_argument("--avatars", type=int, default=400, help="of the pack, for the autoencoder")
    parser.add_argument("--cache", help="folder that keeps the rasterised pack")
    parser.add_argument("--device")
    return parser


if __name__ == "__main__":
    main()
