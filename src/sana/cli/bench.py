"""`sana bench`: how long a picture takes on this machine, by stage, and how much memory.

Each model is loaded in turn, draws one picture for the caches, and then draws for some seconds. A
model that fails is named, the others are timed all the same. The numbers mean something only while
nothing else runs. Start reading at `bench`.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sana.cli.generate import Machine, checked, load_pipeline, taken
from sana.cli.progress import open_progress
from sana.cli.scoring import keywords, with_flags
from sana.errors import CheckpointError, MissingExtra, NumericsError, RequestError
from sana.request import IMAGE_LIMIT, Request

if TYPE_CHECKING:
    from sana.pipelines.timing import Spread, Timing

PROMPT = "a red fox in the snow"
SECONDS_LIMIT = 3600.0
STAGES = {"text": "text", "steps": "steps", "decode": "decoding", "whole": "in all"}
Failure = (RequestError, CheckpointError, MissingExtra, NumericsError, OSError, MemoryError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is drawn; each a flag."""

    prompt: Annotated[str, Parameter(help="what to draw")] = PROMPT
    steps: Annotated[int | None, Parameter(help="steps [default: the model's own]")] = None
    guidance: Annotated[
        float | None, Parameter(help="guidance [default: the model's own]; 1 is off")
    ] = None
    width: Annotated[
        int | None, Parameter(name=["--width", "-W"], help="pixels [default: the model's own]")
    ] = None
    height: Annotated[
        int | None, Parameter(name=["--height", "-H"], help="pixels [default: the model's own]")
    ] = None
    batch: Annotated[int, Parameter(help="pictures at a time")] = 1
    seconds: Annotated[float, Parameter(help="about how long each model is timed, once warm")] = 5.0
    cold: Annotated[
        bool, Parameter(help="time a process of its own for one picture, too", negative="")
    ] = False
    as_json: Annotated[
        bool, Parameter(name="--json", help="the same as JSON, in milliseconds", negative="")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured of one model."""

    request: Request
    """With the model's defaults filled in."""
    name: str
    dtype: str
    device: str
    load: float
    """Seconds of reading the weights, without importing torch."""
    timing: Timing
    cold: float | None
    """Seconds from starting a process to its picture's file."""

    @property
    def count(self) -> int:
        """Pictures at a time."""
        return len(self.request.image_seeds)

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.count / self.timing.whole.median

    def as_json(self) -> dict[str, Any]:
        """Milliseconds and bytes."""
        request: Any = self.request
        timing = self.timing.as_json()
        stages = {stage: timing.pop(stage) for stage in STAGES}
        cold = {} if self.cold is None else {"cold_ms": round(1000 * self.cold, 2)}
        return {
            "model": self.name,
            "device": self.device,
            "dtype": self.dtype,
            "width": request.width,
            "height": request.height,
            "steps": request.steps,
            "guidance": request.guidance,
            "batch": self.count,
            "load_ms": round(1000 * self.load, 2),
            **cold,
            **timing,
            "pictures_per_second": round(self.rate, 4),
            "stages": stages,
        }


def bench(
    *models: Annotated[str, Parameter(help="names or folders of models [default: sticker-512]")],
    **fields: Any,
) -> None:
    """Time models on this machine: text, steps, decoding and memory.

    Let nothing else run meanwhile. The memory is the card's, on a CPU the whole process's.
    """
    asked = Asked(**{k: v for k, v in taken(fields, Asked).items() if v is not None})
    machine = checked(Machine(**taken(fields, Machine)), {})
    requests = [_request(model, asked) for model in models or ("sticker-512",)]
    rows: list[Row] = []
    failures: list[str] = []
    with open_progress() as progress:
        task = progress.add_task("", total=len(requests))
        for request in requests:
            progress.update(task, description=f"timing {request.model}")
            try:
                rows.append(_measure(request, asked, machine))
            except Failure as error:
                failures.append(f"{request.model}: {error or type(error).__name__}")
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":
                    raise
                failures.append(f"{request.model}: out of memory; try --memory, or less at a time")
            gc.collect()
            progress.update(task, advance=1)
    if asked.as_json:
        data = {**_machine(), "models": [row.as_json() for row in rows], "failed": failures}
        print(json.dumps(data, indent=2))
    elif rows:
        print("\n".join(_table(rows)))
    if failures:
        raise CheckpointError("; ".join(failures))


bench.__signature__ = with_flags(bench, Machine, keywords(Asked))  # type: ignore[attr-defined]


def _request(model: str, asked: Asked) -> Request:
    """What this model draws; `RequestError` before anything is loaded, also for no such model."""
    from sana.presets import PRESETS, preset

    if not 0 < asked.seconds <= SECONDS_LIMIT:
        raise RequestError(
            f"seconds is {asked.seconds:g}; it must be over 0 and at most {SECONDS_LIMIT:g}"
        )
    if not 1 <= asked.batch <= IMAGE_LIMIT:
        raise RequestError(f"batch is {asked.batch}; it must be from 1 to {IMAGE_LIMIT}")
    if model not in PRESETS and not Path(model).exists():
        if os.sep in model or model.startswith("."):
            raise RequestError(f"there is nothing at {model}; give a model's name or its folder")
        preset(model)
    given = {
        name: getattr(asked, name)
        for name in ("steps", "guidance", "width", "height")
        if getattr(asked, name) is not None
    }
    return Request(prompt=asked.prompt, model=model, count=asked.batch, **given)


def _measure(request: Request, asked: Asked, machine: Machine) -> Row:
    # Imported here, so that importing torch is no part of the loading.
    from sana.pipelines.timing import time_request

    began = time.perf_counter()
    pipeline = load_pipeline(request, machine, batch=asked.batch)
    load = time.perf_counter() - began
    timing = time_request(pipeline, request, seconds=asked.seconds)
    row: dict[str, Any] = {
        "request": pipeline.resolve(request),
        "name": pipeline.config.name,
        "dtype": pipeline.dtype,
        "device": _device(pipeline.device.type),
    }
    del pipeline
    cold = _cold(request, machine) if asked.cold else None
    return Row(load=load, timing=timing, cold=cold, **row)


def _cold(request: Request, machine: Machine) -> float:
    """Seconds of `sana generate` as a process, from its start to its end."""
    from sana.cli.flags import command_line

    stated = {name: getattr(machine, name) for name in ("device", "dtype", "memory", "threads")}
    flags = [f"--{name}={value}" for name, value in stated.items() if value is not None]
    flags += ["--offline"] if machine.offline else []
    words = [sys.executable, "-m", "sana.cli.main", *shlex.split(command_line(request))[1:]]
    with tempfile.TemporaryDirectory(prefix="sana-bench-") as folder:
        began = time.perf_counter()
        done = subprocess.run(
            [*words[:-1], *flags, "--output", f"{folder}/", words[-1]],
            capture_output=True,
            text=True,
            check=False,
        )
        took = time.perf_counter() - began
    if done.returncode:
        raise CheckpointError(f"a process of its own failed: {done.stderr.strip()}")
    return took


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """For people: a block for each model, and where there are several, one line each at the end."""
    yield ", ".join(f"{name} {value}" for name, value in _machine().items())
    for row in rows:
        timing, request = row.timing, _complete(row.request)
        yield ""
        yield (
            f"{row.name}, {request.width} x {request.height}, {request.steps} steps, guidance "
            f"{request.guidance:g}, {row.count} at a time, {row.dtype} on {row.device}"
        )
        yield f"  {'':9}{'median':>12}{'p90':>12}"
        for stage, name in STAGES.items():
            spread: Spread = getattr(timing, stage)
            yield f"  {name:9}{_shown(spread.median):>12}{_shown(spread.p90):>12}"
        cold = "" if row.cold is None else f"; in a process of its own {_shown(row.cold)}"
        yield f"  loading {_shown(row.load)}, then first picture {_shown(timing.first)}{cold}"
        yield (
            f"  {row.rate:.3g} pictures a second over {len(timing.whole.seconds)} runs; "
            f"at most {timing.peak / 2**30:.2f} GiB"
        )
    if len(rows) > 1:
        yield ""
        for row in rows:
            yield f"{row.name:32} {_shown(row.timing.whole.median / row.count):>10} a picture"


def _complete(request: Request) -> Any:
    """The same request, whose fields a model has filled in."""
    return request


def _shown(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _machine() -> dict[str, Any]:
    """What is timed on, and with what."""
    import torch

    from sana import __version__

    return {"sana": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}


def _device(kind: str) -> str:
    import torch

    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{kind} ({platform.machine()}, {os.cpu_count()} cores)"
