"""A prompt list in, a folder of pictures out: what every benchmark of a model starts with.

Every picture is drawn by the pipeline alone, with a seed of its own, and carries its request, so
that `sana generate --again` makes it again. Under torchrun each process draws its share. A run that
was killed goes on where it stopped; two runs, or two different plans, never share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana.distributed import Place, any_process, barrier
from sana.errors import RequestError
from sana.evaluation.folders import one_at_a_time
from sana.evaluation.prompts import LIST, Item, write_list
from sana.evaluation.report import write_json
from sana.pipelines.images import read_metadata, save_png
from sana.pipelines.origin import origin
from sana.pipelines.pipeline import Pipeline
from sana.request import SEED_LIMIT, Request

PLAN = "draw.json"
GOES_ON = ("model", "weights", "dtype")
"""What of the origin must be the same for a run to go on; the machine may be another."""
COUNT_LIMIT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One picture: its request and where it goes."""

    request: Request
    target: Path


def draw_folder(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    folder: Path,
    items: Sequence[Item],
    *,
    place: Place,
    report: Callable[[Job], None] = lambda job: None,
) -> int:
    """Draw this process's share of `jobs` into `folder`, as far as it is not there; how many.

    `report` is called after every picture that is there. Raises `RequestError` where the folder is
    in use, or holds pictures of another plan.
    """
    made_by = origin(pipeline, jobs[0].request)
    with held(folder, place):
        _agree(folder, jobs, items, made_by, place)
        drawn = 0
        for job in jobs[place.rank :: place.world]:
            if not _is_there(job):
                [image] = pipeline.generate(job.request)
                metadata = {"request": job.request.model_dump(mode="json"), **made_by}
                save_png(image, job.target, metadata)
                drawn += 1
            report(job)
        barrier(place)
    return drawn


def plan_jobs(
    pipeline: Pipeline, items: Sequence[Item], folder: Path, *, count: int, like: Request
) -> list[Job]:
    """`count` pictures of each item as `like` says, the seeds in order from its first.

    Picture k of prompt number i has seed + i * count + k: no two pictures share their noise.
    """
    if not 1 <= count <= COUNT_LIMIT:
        raise RequestError(f"count is {count}; it must be from 1 to {COUNT_LIMIT}, GenEval's is 4")
    seed = like.seeds[0]
    if len(like.image_seeds) > 1 or seed + len(items) * count > SEED_LIMIT:
        raise RequestError(
            f"seed is {', '.join(map(str, like.image_seeds))}; the pictures' seeds count up from "
            "one, so give one small number"
        )
    jobs = []
    for index, item in enumerate(items):
        for number in range(count):
            asked = like.replace(prompt=item.prompt, seeds=(seed + index * count + number,))
            request = pipeline.resolve(asked)
            jobs.append(Job(request=request, target=folder / item.file(number)))
    return jobs


@contextlib.contextmanager
def held(folder: Path, place: Place) -> Iterator[None]:
    """The folder's lock, taken by the first process for all; every one learns if that fails."""
    with contextlib.ExitStack() as stack:
        with told(place):
            if place.is_main:
                stack.enter_context(one_at_a_time(folder))
        yield


@contextlib.contextmanager
def told(place: Place) -> Iterator[None]:
    """Where one process is refused, all are, and none waits for another forever."""
    refusal: RequestError | None = None
    try:
        yield
    except RequestError as error:
        refusal = error
    if any_process(holds=refusal is not None, place=place):
        raise refusal or RequestError("the first process was refused; see its message")


def _agree(
    folder: Path,
    jobs: Sequence[Job],
    items: Sequence[Item],
    made_by: dict[str, Any],
    place: Place,
) -> None:
    """Write the plan, or refuse a folder that holds another; clear what a killed run left."""
    with told(place):
        if not place.is_main:
            return
        plan = _plan(jobs, made_by)
        path = folder / PLAN
        if path.exists():
            _refuse_others(path, plan)
        elif strays := [p for p in folder.rglob("*.png")]:
            raise RequestError(
                f"{folder} already holds {len(strays)} pictures that no run here made; choose an "
                "empty folder with --output"
            )
        for left in folder.rglob(".*.part"):
            left.unlink()
        write_list(items, folder / LIST)
        for item in items:
            if item.is_geneval:
                _write_geneval(item, folder)
        write_json(path, {**plan, "origin": made_by})


def _plan(jobs: Sequence[Job], made_by: dict[str, Any]) -> dict[str, Any]:
    requests = "\n".join(job.request.to_json() for job in jobs)
    return {
        "pictures": len(jobs),
        "first_request": jobs[0].request.model_dump(mode="json"),
        "requests": hashlib.sha256(requests.encode()).hexdigest(),
        **{name: made_by[name] for name in GOES_ON},
    }


def _refuse_others(path: Path, plan: dict[str, Any]) -> None:
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RequestError(f"{path} cannot be read; choose another --output") from None
    for name, value in plan.items():
        if earlier.get(name) == value:
            continue
        was, now = earlier.get(name), value
        if isinstance(was, dict) and isinstance(now, dict):
            changed = next(key for key in now if was.get(key) != now[key])
            name, was, now = f"{name}'s {changed}", was.get(changed), now[changed]
        raise RequestError(
            f"{path.parent} holds pictures of another run: its {name} is {was}, and now {now}; a "
            "run goes on only with the same list, settings and weights, so choose another --output"
        )


def _write_geneval(item: Item, folder: Path) -> None:
    """The file that GenEval's own program looks for beside the samples."""
    path = folder / item.key / "metadata.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**item.facts, "prompt": item.prompt}), encoding="utf-8")


def _is_there(job: Job) -> bool:
    """Whether the picture is drawn already; refused if the file is one of another request."""
    if not job.target.exists():
        return False
    if read_metadata(job.target)["request"] != job.request.model_dump(mode="json"):
        raise RequestError(
            f"{job.target} was made by another request; remove it, or choose another --output"
        )
    return True
