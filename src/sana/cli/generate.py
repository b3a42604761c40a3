"""`sana generate`: a sentence in, PNG files out.

Flags come from `Request`; progress goes to stderr, and the path of each file to stdout as soon as
it is written. All that can be refused is refused before torch is imported.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sana import __version__
from sana.cli.flags import parameters
from sana.errors import RequestError
from sana.pipelines.images import read_metadata, save_png
from sana.request import PROMPT_LIMIT, RULES, Request

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.progress import Progress

    from sana.pipelines.pipeline import Pipeline

DEFAULT_NAME = "sana-{slug}-{seed}.png"
PLACEHOLDERS = ("seed", "slug")
THREAD_LIMIT = 1024


def generate(
    prompt: Annotated[str | None, Parameter(help="what to draw; - reads it from stdin")] = None,
    /,
    *,
    output: Annotated[
        str | None,
        Parameter(name=["--output", "-o"], help="a file, a folder, or a pattern with {seed}"),
    ] = None,
    again: Annotated[
        Path | None, Parameter(help="make this PNG again; other flags change its request")
    ] = None,
    threads: Annotated[int | None, Parameter(help="CPU threads [default: all cores]")] = None,
    **fields: Any,
) -> None:
    """Draw pictures from a sentence.

    Without --output a picture is written to ./sana-{slug}-{seed}.png; no file is ever replaced.
    """
    made = read_metadata(again) if again is not None else {}
    request = _request(prompt, made, fields)
    threads = _thread_count(threads, made)
    targets = _targets(output, request)
    with _progress() as progress:
        task = progress.add_task(f"loading {request.model}", total=None)
        pipeline = _load(request, threads)
        request = pipeline.resolve(request)
        origin = _origin(pipeline, request)
        _warn_of_changes(made, origin)
        singles = request.singles()
        progress.update(task, total=len(singles) * (request.steps or 0), description="drawing")
        for single, target in zip(singles, targets, strict=True):
            image = _draw(pipeline, single, progress)
            metadata = {"request": single.model_dump(mode="json"), **origin}
            print(save_png(image, target, metadata), flush=True)


def _with_request_flags() -> inspect.Signature:
    signature = inspect.signature(generate, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "fields"]
    return inspect.Signature([own[0], *parameters(), *own[1:]])


generate.__signature__ = _with_request_flags()  # type: ignore[attr-defined]


def _request(prompt: str | None, made: dict[str, Any], fields: dict[str, Any]) -> Request:
    given = {name: value for name, value in fields.items() if value is not None}
    if prompt == "-":
        prompt = _read_stdin()
    if prompt is not None:
        given["prompt"] = prompt
    return Request(**{**made.get("request", {}), **given})


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(8 * PROMPT_LIMIT)
    try:
        return data.decode().strip()
    except UnicodeDecodeError:
        raise RequestError(f"stdin is not UTF-8 text; {RULES['prompt']}") from None


def _thread_count(threads: int | None, made: dict[str, Any]) -> int | None:
    """As many as asked, or as the picture to repeat was made with: sums depend on it."""
    if threads is None:
        earlier = made.get("threads")
        return (
            earlier if isinstance(earlier, int) and 0 < earlier <= (os.cpu_count() or 1) else None
        )
    if not 1 <= threads <= THREAD_LIMIT:
        raise RequestError(
            f"threads is {threads}; it must be from 1 to {THREAD_LIMIT}, or left out for all cores"
        )
    return threads


def _targets(output: str | None, request: Request) -> list[Path]:
    """Where each picture goes, before numbers are added to names that are taken."""
    pattern = _pattern(output, is_alone=len(request.image_seeds) == 1)
    slug = _slug(request.prompt)
    targets = [
        Path(pattern.replace("{seed}", str(seed)).replace("{slug}", slug))
        for seed in request.image_seeds
    ]
    for folder in {target.parent for target in targets}:
        _check_folder(folder)
    return targets


def _pattern(output: str | None, *, is_alone: bool) -> str:
    if output is None:
        return DEFAULT_NAME
    for name in re.findall(r"\{(\w*)\}", output):
        if name not in PLACEHOLDERS:
            raise RequestError(
                f"output is {output!r} with {{{name}}}; a pattern may hold {{seed}} and {{slug}}"
            )
    if output.endswith(("/", os.sep)) or Path(output).is_dir():
        return os.path.join(output, DEFAULT_NAME)
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise RequestError(
            f"output is {output!r}; pictures are PNG files, so end the name in .png, or in / for a "
            "folder"
        )
    if is_alone or "{seed}" in output:
        return output
    return str(path.with_name(f"{path.stem}-{{seed}}{path.suffix}"))


def _check_folder(folder: Path) -> None:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RequestError(
            f"output goes to {folder}, and {existing} is no folder that you may write to; choose "
            "another --output"
        )


def _slug(prompt: str) -> str:
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    slug = ""
    for word in words:
        if slug and len(slug) + len(word) >= 40:
            break
        slug = f"{slug}-{word}" if slug else word[:40]
    return slug or "picture"


def _load(request: Request, threads: int | None) -> Pipeline:
    # OpenMP reads this when torch brings it in. Threads that spin at a barrier while another
    # program has their core made a picture many times slower; asleep, they cost little when idle.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from sana.pipelines.pipeline import load

    if threads is not None:
        torch.set_num_threads(threads)
    return load(request.model)


def _draw(pipeline: Pipeline, request: Request, progress: Progress) -> Image:
    latent = None
    for step in pipeline.steps(request):
        latent = step.latent
        progress.advance(progress.task_ids[0])
    assert latent is not None, "a schedule has at least one step"
    return pipeline.decode(latent)[0]


def _origin(pipeline: Pipeline, request: Request) -> dict[str, Any]:
    import torch

    return {
        "model": pipeline.config.name,
        "weights": pipeline.fingerprint,
        "sana": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _warn_of_changes(made: dict[str, Any], origin: dict[str, Any]) -> None:
    for name, now in origin.items():
        if made and made.get(name) != now:
            print(
                f"sana: the picture was made with {name} {made.get(name)}, and this is {now}; "
                "pixels may differ",
                file=sys.stderr,
            )


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress
