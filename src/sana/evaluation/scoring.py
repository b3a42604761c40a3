"""A folder of pictures in, a record of scores out: `score_folder` is `sana evaluate score`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from sana.evaluation.draw import PLAN
from sana.evaluation.folders import one_at_a_time
from sana.evaluation.measures import MEASURES, Faults, Run
from sana.evaluation.plan import METRICS, SEED, Plan, Report, check
from sana.evaluation.record import drawn_by, write_record
from sana.evaluation.report import Labelled, contact_sheet
from sana.evaluation.sight import cropped, open_picture
from sana.pipelines.images import to_tensor

SHOWN, SIDE = 100, 192


def score_folder(plan: Plan, report: Report = lambda metric, done, total: None) -> tuple[Path, str]:
    """Score the folder, and write the record, its table and a contact sheet to `plan.output`.

    Gives the record's path and the table. Raises `RequestError` where the folder, the prompts or
    the plan do not fit, and where another run is at work in the output.
    """
    check(plan)
    run = Run(plan, report)
    assert run.paths, "list_pictures refuses an empty folder"
    if any(METRICS[metric].prompts for metric in plan.metrics):
        run.groups(None)
    with one_at_a_time(plan.output):
        scores = []
        faults: Faults = {}
        for metric in plan.metrics:
            score, found = MEASURES[metric](run)
            scores.append(score)
            faults.update(found)
        _sheet(run, faults).save(plan.output / "sheet.png")
        return write_record(scores, _facts(run), plan.output)


def _sheet(run: Run, faults: Faults) -> Image.Image:
    """The first picture of each prompt, up to a hundred; green and red where one was judged."""
    if any(METRICS[metric].prompts for metric in run.plan.metrics):
        chosen = [(files[0], item.prompt) for item, files in run.groups(None)]
    else:
        chosen = [(path, run.key(path)) for path in run.paths]
    entries = []
    for path, text in chosen[:SHOWN]:
        fault = faults.get(run.key(path))
        small = cropped(open_picture(path), SIDE, Image.Resampling.LANCZOS)
        entries.append(
            Labelled(
                picture=to_tensor(small)[0],
                text=f"{text} [{fault}]" if fault else text,
                is_right=None if fault is None else not fault,
            )
        )
    return contact_sheet(entries, side=SIDE)


def _facts(run: Run) -> dict[str, Any]:
    """What the record says besides scores and versions."""
    plan = run.plan
    has_prompts = any(METRICS[metric].prompts for metric in plan.metrics)
    drawn = drawn_by(plan.folder, PLAN)
    first = (drawn or {}).get("first_request") or {}
    return {
        "folder": str(plan.folder),
        "pictures": len(run.paths),
        "prompts": len(run.items) if has_prompts else None,
        "seeds": {
            "first": (first.get("seeds") or [None])[0],
            "count": (drawn or {}).get("pictures"),
        }
        if drawn
        else None,
        "drawn": drawn,
        "resampling_seed": SEED,
        "device": plan.device,
    }
