"""Where does a training step's time go? Runs a recipe for some steps under torch's profiler.

    python benchmarks/training.py sticker-512 steps=60 compile=true data.pack=tiny
    torchrun --nproc-per-node 2 benchmarks/training.py sticker-512 steps=60

Prints steps and samples a second without the profiler's cost, then the costliest operations of
ten profiled steps, by time on the device and by time on the host.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from sana import distributed
from sana.training.loop import train
from sana.training.recipes import plan
from sana.training.run import make_task

PROFILED, ROWS = 10, 25


def main(recipe: str, changes: list[str]) -> None:
    """Profile `recipe` with its key=value `changes`; `steps` should be over 30."""
    folder = tempfile.mkdtemp(prefix="profiled-run-")
    config = plan(recipe, ["save_every=1000000", f"folder={folder}", *changes])
    warm = config.steps - PROFILED - 2
    with distributed.session() as place:
        task = make_task(config, place)
        device = torch.cuda.is_available()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device else [])]
        plan_of_steps = schedule(wait=warm, warmup=1, active=PROFILED)
        with profile(activities=kinds, schedule=plan_of_steps) as profiler:
            clock = Clock(place.device, warm)
            task.phases[0].loss = clock.around(task.phases[0].loss, profiler)  # type: ignore[method-assign]
            train(config, task, place)
        if place.is_main:
            seconds = clock.seconds()
            samples = config.data.batch * place.world / seconds
            print(f"{1 / seconds:.2f} steps/s, {samples:.0f} samples/s")
            for key in ("self_device_time_total", "self_cpu_time_total"):
                print(profiler.key_averages().table(sort_by=key, row_limit=ROWS))


class Clock:
    """Times the second half of the steps before the profiler starts."""

    def __init__(self, device: torch.device, warm: int) -> None:
        self.device, self.first, self.last = device, warm // 2, warm - 1
        self.calls = 0
        self.marks: list[float] = []

    def around(self, loss: Callable[..., Any], profiler: Any) -> Callable[..., Any]:
        """`loss`, telling the profiler of each step and marking two of them."""

        def timed(*arguments: Any) -> Any:
            if self.calls in (self.first, self.last):
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                self.marks.append(time.perf_counter())
            self.calls += 1
            profiler.step()
            return loss(*arguments)

        return timed

    def seconds(self) -> float:
        """Seconds a step."""
        return (self.marks[1] - self.marks[0]) / (self.last - self.first)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
