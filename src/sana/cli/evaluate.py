"""`sana evaluate`: draw a prompt list, score a folder, test an autoencoder, judge stickers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from sana.cli.flags import parameters
from sana.cli.generate import Machine, load_pipeline, taken
from sana.cli.progress import open_progress
from sana.cli.scoring import Comparing, Examining, Scoring, make_plan, with_flags
from sana.errors import RequestError
from sana.evaluation.folders import list_pictures
from sana.request import Request

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

evaluate = App(name="evaluate", help="Draw prompt lists, and measure what was drawn.")
DRAWN = (
    *("negative_prompt", "width", "height", "binning", "steps", "guidance", "sampler", "shift"),
    *("guidance_interval", "pag_scale", "pag_blocks", "model", "loras", "lora_scales"),
)
"""The fields of a request that all pictures of a list share."""


@evaluate.command
def draw(
    prompts: Annotated[
        Path,
        Parameter(
            help=".txt, .jsonl (GenEval's evaluation_metadata.jsonl), MJHQ's meta_data.json, or "
            "DPG-Bench's folder of .txt files"
        ),
    ],
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="the folder to draw into")],
    count: Annotated[int, Parameter(help="pictures of each prompt")] = 4,
    seed: Annotated[int, Parameter(name=["--seed", "-s"], help="of the first; they count up")] = 0,
    **fields: Any,
) -> None:
    """Draw every prompt of a list; a run that was stopped goes on. Runs under torchrun too."""
    from sana.distributed import session
    from sana.evaluation.draw import draw_folder, plan_jobs
    from sana.evaluation.prompts import read_prompts

    machine = Machine(**taken(fields, Machine))
    given = {name: value for name, value in fields.items() if value is not None}
    items = read_prompts(prompts)
    like = Request(prompt=items[0].prompt, seeds=(seed,), **given)
    kind = "auto" if machine.device is None else machine.device.partition(":")[0]
    with session(kind) as place, open_progress() as progress:
        task = progress.add_task(f"loading {like.model}", total=None)
        pipeline = load_pipeline(like, machine, place)
        jobs = plan_jobs(pipeline, items, output, count=count, like=like)
        mine = len(jobs[place.rank :: place.world])
        progress.update(task, description="drawing", total=mine)
        drawn = draw_folder(
            pipeline,
            jobs,
            output,
            items,
            place=place,
            report=lambda job: progress.advance(task),
        )
        if place.is_main:
            print(f"{drawn} of {mine} drawn here, the rest were there", file=sys.stderr)
            print(output)


draw.__signature__ = with_flags(  # type: ignore[attr-defined]
    draw, Machine, [p for p in parameters() if p.name in DRAWN]
)


@evaluate.command
def score(
    folder: Annotated[Path, Parameter(help="the folder of drawn pictures")], /, **fields: Any
) -> None:
    """Measure a folder of pictures: one record with intervals, a table, and a contact sheet.

    What was measured is kept, so a run that was stopped goes on.
    """
    from sana.evaluation.plan import check

    device = fields.get("device")
    plan = make_plan(folder, fields)
    check(plan)
    _score(plan, device)


score.__signature__ = with_flags(score, Scoring)  # type: ignore[attr-defined]


@evaluate.command
def autoencoder(
    model: Annotated[str, Parameter(help="a model's name or folder, or an autoencoder's file")],
    /,
    *,
    pictures: Annotated[Path, Parameter(help="folder of pictures to encode and decode")],
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="folder for all that is made")],
    size: Annotated[int, Parameter(help="side of the square that is cut out")] = 512,
    **fields: Any,
) -> None:
    """PSNR and SSIM of what comes back, with --lpips LPIPS, with --features rFID.

    What was rebuilt is kept, so a run that was stopped goes on.
    """
    list_pictures(pictures)
    given = Comparing(**fields)
    device = choose_device(given.device)
    from sana.evaluation.rebuilt import Task, score_autoencoder

    task = Task(
        model=model,
        pictures=pictures,
        output=output,
        size=size,
        lpips=given.lpips,
        features=given.features,
        device=device,
        is_offline=given.offline,
    )
    with open_progress() as progress:
        path, text = score_autoencoder(task, Bars(progress).advance)
    print(text)
    print(f"\n{path}")


autoencoder.__signature__ = with_flags(autoencoder, Comparing)  # type: ignore[attr-defined]


@evaluate.command
def stickers(
    model: Annotated[str, Parameter(help="a model's name or folder")] = "sticker-512",
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="folder for all that is made")],
    detector: Annotated[
        Path, Parameter(help="detector.safetensors of `sana train sticker-detector`")
    ],
    pack: Annotated[Path, Parameter(help="the pack of `sana data stickers`")],
    **fields: Any,
) -> None:
    """Judge a sticker model on held-out prompts, beside seen ones and the judge's own accuracy.

    What was drawn is kept, so a run that was stopped goes on. Runs under torchrun too.
    """
    given = Examining(**fields)
    device = choose_device(given.device)
    from sana.distributed import session
    from sana.evaluation.exam import score_stickers

    with session(device.partition(":")[0]) as place, open_progress() as progress:
        if place.world > 1:
            device = str(place.device)
        exam = given.exam(model, str(detector), str(pack), output, device)
        path, text = score_stickers(exam, Bars(progress).advance, place)
    if place.is_main:
        print(text)
        print(f"\n{path}")


stickers.__signature__ = with_flags(stickers, Examining)  # type: ignore[attr-defined]


def _score(plan: Any, device: str | None) -> None:
    """The slow part: torch is imported here."""
    from dataclasses import replace

    from sana.evaluation.scoring import score_folder

    with open_progress() as progress:
        path, text = score_folder(
            replace(plan, device=choose_device(device)), Bars(progress).advance
        )
    print(text)
    print(f"\n{path}")


class Bars:
    """One bar for each metric, made when it first reports."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def advance(self, name: str, done: int, total: int) -> None:
        """`done` more of `total`."""
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total)
        self.progress.advance(self.tasks[name], done)


def choose_device(device: str | None) -> str:
    """The device that is asked for, if it is there; else CUDA where there is one."""
    import torch

    from sana.cli.generate import check_device

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise RequestError(f"device is {device!r}; it must be cpu, cuda, cuda:1 or mps")
    check_device(device)
    return device
