"""`sana generate`: a sentence, and pictures to start from, in; PNG files out.

Flags come from `Request`; progress goes to stderr, and the path of each file to stdout as soon as
it is written. All that can be refused is refused before torch is imported.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Parameter

from sana.cli.again import Dtype, earlier_dtype, earlier_request, earlier_threads, warn_of_changes
from sana.cli.choosing import Choosing, Hunt
from sana.cli.flags import FILES, MODEL, PICTURE, parameters
from sana.cli.progress import Previews, Watch, open_progress
from sana.errors import RequestError
from sana.pipelines.images import save_png
from sana.pipelines.memory import parse
from sana.pipelines.origin import origin
from sana.pipelines.reading import read_pictures
from sana.request import PROMPT_LIMIT, RULES, Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.distributed import Place
    from sana.pipelines.pipeline import Pictures, Pipeline

DEFAULT_NAME = "sana-{slug}-{seed}.png"
PLACEHOLDERS = ("seed", "slug")
THREAD_LIMIT = 1024
Output = Annotated[
    str | None,
    Parameter(
        name=["--output", "-o"], help="a file, a folder, or a pattern with {seed}", group=FILES
    ),
]
PreviewFolder = Annotated[
    Path | None,
    Parameter(help="a folder for small pictures of the steps; slower at first", group=FILES),
]
PreviewInterval = Annotated[
    int | None, Parameter(help="steps from one preview to the next [default: 1]", group=FILES)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where, in which numbers and in how much memory a picture is drawn; each a flag."""

    device: Annotated[
        str | None,
        Parameter(help="cpu, cuda, cuda:1 or mps [default: cuda if there, else cpu]", group=MODEL),
    ] = None
    dtype: Annotated[
        Dtype | None,
        Parameter(
            help="number format; mixed is float32 with products in bfloat16; fp8 is bfloat16 with "
            "products in fp8, for newer NVIDIA GPUs: faster, and often another picture [default: "
            "what suits model and device]",
            group=MODEL,
        ),
    ] = None
    memory: Annotated[
        str | None, Parameter(help="what may be taken of the device, such as 8GiB", group=MODEL)
    ] = None
    offline: Annotated[
        bool | None, Parameter(help="fetch nothing; use what is here", group=MODEL, negative="")
    ] = None
    threads: Annotated[
        int | None, Parameter(help="CPU threads [default: all cores]", group=MODEL)
    ] = None


def generate(
    prompt: Annotated[
        str | None, Parameter(help="what to draw; - reads it from stdin", group=PICTURE)
    ] = None,
    /,
    *,
    output: Output = None,
    again: Annotated[
        Path | None,
        Parameter(help="make this PNG again; other flags change its request", group=FILES),
    ] = None,
    preview: PreviewFolder = None,
    preview_interval: PreviewInterval = None,
    **fields: Any,
) -> None:
    """Draw pictures from a sentence, from another picture, or both.

    Without --output a picture goes to ./sana-{slug}-{seed}.png; no file is ever replaced.
    """
    parts, choosing = taken(fields, Machine), Choosing(**taken(fields, Choosing))
    given = {name: value for name, value in fields.items() if value is not None}
    if prompt is not None:
        given["prompt"] = _read_stdin() if prompt == "-" else prompt
    made, given = earlier_request(again, given)
    request = Request(**given)
    images = read_pictures(request)
    machine = checked(Machine(**parts), made)
    search = choosing.search()
    keep = None if search is None else search.keep
    targets = _targets(output, request, keep)
    previews = _previews(preview, preview_interval)
    with open_progress() as progress:
        task = progress.add_task(f"loading {request.model}", total=None)
        pipeline = load_pipeline(request, machine)
        request = pipeline.resolve(request, images)
        made_by = origin(pipeline, request)
        warn_of_changes(made, made_by)
        if search is not None:
            judge = choosing.load(str(pipeline.device))
            target_of = partial(_target_of_seed, output, request, search.keep)
            hunt = Hunt(pipeline, judge, search, progress, previews, target_of)
            _write_chosen(hunt, request, images, made_by)
            return
        progress.update(task, description="drawing")
        watch = Watch(progress, len(targets), previews)
        for single, target in zip(request.singles(), targets, strict=True):
            image = _draw(pipeline, single, images, watch, target)
            _write(image, target, single, made_by)


def _write(image: Image, target: Path, single: Request, made_by: dict[str, Any]) -> None:
    metadata = {"request": single.model_dump(mode="json"), **made_by}
    print(save_png(image, target, metadata), flush=True)


def _draw(
    pipeline: Pipeline, single: Request, images: Pictures, watch: Watch, target: Path
) -> Image:
    latent = None
    for step in pipeline.steps(single, images):
        latent = step.latent
        watch.show(pipeline, step, target)
    assert latent is not None, "a schedule has at least one step"
    [image] = pipeline.finish(single, latent, images)
    return image


def _write_chosen(hunt: Hunt, request: Request, images: Pictures, made_by: dict[str, Any]) -> None:
    """Search, and write what is kept, the best first; each file says who chose it."""
    from sana.scaling import record

    for candidate in hunt.chosen(request, images):
        chosen = record(candidate, hunt.judge, hunt.search)
        target = hunt.target(candidate.request.image_seeds[0])
        _write(candidate.image, target, candidate.request, {**made_by, "chosen": chosen})


def taken(fields: dict[str, Any], kind: type) -> dict[str, Any]:
    """The values of `kind`'s fields, taken out of `fields`."""
    return {part.name: fields.pop(part.name, None) for part in dataclasses.fields(kind)}


def _with_all_flags() -> inspect.Signature:
    signature = inspect.signature(generate, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "fields"]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
        for kind in (Choosing, Machine)
        for name, hint in get_type_hints(kind, include_extras=True).items()
    ]
    return inspect.Signature([own[0], *parameters(), *own[1:], *more])


generate.__signature__ = _with_all_flags()  # type: ignore[attr-defined]


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(8 * PROMPT_LIMIT)
    try:
        return data.decode().strip()
    except UnicodeDecodeError:
        raise RequestError(f"stdin is not UTF-8 text; {RULES['prompt']}") from None


def _thread_count(threads: int | None, made: dict[str, Any]) -> int | None:
    if threads is None:
        return earlier_threads(made)
    if not 1 <= threads <= THREAD_LIMIT:
        raise RequestError(
            f"threads is {threads}; it must be from 1 to {THREAD_LIMIT}, or left out for all cores"
        )
    return threads


def checked(machine: Machine, made: dict[str, Any]) -> Machine:
    """With threads and dtype as in `made` if not stated; `RequestError` for what cannot be."""
    device = machine.device
    if device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise RequestError(f"device is {device!r}; it must be cpu, cuda, cuda:1 or mps")
    if machine.memory is not None:
        parse(machine.memory)
    return replace(
        machine,
        threads=_thread_count(machine.threads, made),
        dtype=machine.dtype or earlier_dtype(made),
    )


def _targets(output: str | None, request: Request, keep: int | None = None) -> list[Path]:
    """Where each picture goes, before numbers are added to names that are taken.

    Of a search, which keeps `keep`, it is where a picture of these seeds would go.
    """
    pattern = _pattern(output, is_alone=(keep or len(request.image_seeds)) == 1)
    slug = _slug(request.prompt)
    targets = [
        Path(pattern.replace("{seed}", str(seed)).replace("{slug}", slug))
        for seed in request.image_seeds
    ]
    for folder in {target.parent for target in targets}:
        _check_folder(folder)
    return targets


def _target_of_seed(output: str | None, request: Request, keep: int, seed: int) -> Path:
    [target] = _targets(output, request.replace(seeds=(seed,)), keep)
    return target


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


def load_pipeline(
    request: Request, machine: Machine, place: Place | None = None, *, batch: int = 1
) -> Pipeline:
    """The pipeline that `request` names, on the machine's device or, under torchrun, `place`'s.

    It denoises `batch` pictures at a time.
    """
    # OpenMP reads this when torch brings it in. Threads that spin at a barrier while another
    # program has their core made a picture many times slower; asleep, they cost little when idle.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from sana.pipelines.pipeline import load

    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    device = machine.device
    if device is not None:
        check_device(device)
    if place is not None and place.world > 1:
        device = str(place.device)
    dtype = (
        machine.dtype if machine.dtype in (None, "mixed", "fp8") else getattr(torch, machine.dtype)
    )
    return load(
        request.model,
        device=device,
        dtype=dtype,
        memory=machine.memory,
        offline=bool(machine.offline),
        batch=batch,
    )


def check_device(device: str) -> None:
    """Raise `RequestError` where torch finds no such device."""
    import torch

    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    is_there = torch.backends.mps.is_available() if kind == "mps" else int(number or 0) < count
    if not is_there:
        raise RequestError(
            f"device is {device}, and torch {torch.__version__} finds none here; use cpu, or "
            "install a build of torch for it"
        )


def _previews(folder: Path | None, interval: int | None) -> Previews | None:
    if folder is None:
        if interval is not None:
            raise RequestError(
                f"preview_interval is {interval} and there is no preview; name a folder with "
                "--preview, or leave it out"
            )
        return None
    _check_folder(folder)
    return Previews(folder=folder, interval=1 if interval is None else interval)
