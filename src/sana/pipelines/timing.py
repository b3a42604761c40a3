"""How long a pipeline takes, by stage, and how much memory: for `sana bench` and `benchmarks/`.

Wall-clock times of work that the device has finished. A stage is timed from outside, so nothing in
a pipeline is there to be measured, and what is timed is what a user gets. Start at `time_request`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sana.pipelines.pipeline import Pipeline
    from sana.request import Request

T = TypeVar("T")

LEAST, MOST = 3, 50
"""How many times a thing is done at least, however long it takes, and at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Seconds of one thing that was done several times; at least one."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def p90(self) -> float:
        return self.quantile(0.9)

    def quantile(self, part: float) -> float:
        """Between the two nearest times, by their distance."""
        ordered = sorted(self.seconds)
        place = part * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def as_json(self) -> dict[str, float | int]:
        """Milliseconds, to the hundredth."""
        return {
            "median_ms": round(1000 * self.median, 2),
            "p90_ms": round(1000 * self.p90, 2),
            "runs": len(self.seconds),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One request, drawn again and again."""

    first: float
    """Seconds of the first time in this process, with all that is done once."""
    whole: Spread
    """From the prompt to the pictures in the host's memory, as `Pipeline.generate` gives them.

    Stages are timed by draws of their own that wait between them, so that they take more together.
    """
    text: Spread
    """Reading the prompt, and the empty one where there is guidance."""
    steps: Spread
    """From the request to the last latent, less the text's median."""
    decode: Spread
    """From the last latent to the pictures."""
    peak: int
    """Most bytes at once: the allocator's on a GPU, the process's on a CPU."""

    def as_json(self) -> dict[str, Any]:
        """Plain numbers and names."""
        stages = ("whole", "text", "steps", "decode")
        return {
            "first_ms": round(1000 * self.first, 2),
            "peak_bytes": self.peak,
            **{stage: getattr(self, stage).as_json() for stage in stages},
        }


def time_request(
    pipeline: Pipeline, request: Request, *, seconds: float = 5.0, least: int = LEAST
) -> Timing:
    """Draw `request` once, then `least` times and on for about `seconds`; pictures are dropped.

    As many draws again, in half of the time where `least` allows it, are timed stage by stage.
    """
    device = pipeline.device
    resolved: Any = pipeline.resolve(request)
    has_second = resolved.guidance != 1 and not pipeline.config.dit.guidance_embedding

    def read() -> None:
        options: Any = pipeline._placing.reading
        pipeline.components.text.encode([resolved.prompt], **options)
        if has_second:
            pipeline.components.text.encode_negative([resolved.negative_prompt], **options)

    def draw() -> float:
        began = time.perf_counter()
        pipeline.generate(request)
        return time.perf_counter() - began

    def draw_in_stages() -> tuple[float, float]:
        began = time.perf_counter()
        latent = last_latent(pipeline, request)
        synchronize(device)
        drawn = time.perf_counter()
        pipeline.finish(request, latent)
        return drawn - began, time.perf_counter() - drawn

    forget_peak(device)
    first = draw()
    whole = _again(draw, seconds, least)
    stages = _again(draw_in_stages, seconds / 2, least)
    peak = peak_bytes(device)
    # Where networks move, the text encoder is fetched first; that is not counted.
    pipeline._placing.enter("text")
    text = timed(read, device, seconds=seconds / 10, least=least)
    loops, decodes = zip(*stages, strict=True)
    return Timing(
        first=first,
        whole=Spread(seconds=tuple(whole)),
        text=text,
        steps=Spread(seconds=tuple(max(0.0, loop - text.median) for loop in loops)),
        decode=Spread(seconds=decodes),
        peak=peak,
    )


def timed(
    call: Callable[[], Any], device: torch.device, *, seconds: float = 2.0, least: int = LEAST
) -> Spread:
    """Do `call` once unmeasured, then `least` times and on for about `seconds`."""
    with torch.inference_mode():
        call()
        synchronize(device)

        def once() -> float:
            began = time.perf_counter()
            call()
            synchronize(device)
            return time.perf_counter() - began

        return Spread(seconds=tuple(_again(once, seconds, least)))


def _again(once: Callable[[], T], seconds: float, least: int) -> list[T]:
    """What `once` gives `least` times, and on for about `seconds`, though never over `MOST`."""
    deadline = time.perf_counter() + seconds
    found: list[T] = []
    while len(found) < least or (time.perf_counter() < deadline and len(found) < MOST):
        found.append(once())
    return found


def last_latent(pipeline: Pipeline, request: Request) -> Tensor:
    """What the steps of `request` end in."""
    *_, last = pipeline.steps(request)
    return last.latent


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def forget_peak(device: torch.device) -> None:
    """Start a new maximum, where there is an allocator that keeps one."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The maximum since `forget_peak`; on other devices the process's since its start, or 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
