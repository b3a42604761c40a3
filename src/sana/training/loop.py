"""The only training loop: tasks are phases, each with a module and a loss, stepped in turn.

A step takes `accumulate` micro-batches in each process. Micro-batch g of the whole run (counted
over steps, accumulation and processes) has its own data and its own random numbers, seeded by
(seed, g): so a resumed run repeats an uninterrupted one bit for bit on a CPU, and two processes
compute what one process computes with twice the accumulation. Start reading at `train`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sana import distributed
from sana.distributed import Place
from sana.errors import TrainingError
from sana.training import checkpoint
from sana.training.capture import Capture, Captured, cuda_capture
from sana.training.config import TrainConfig
from sana.training.journal import Journal
from sana.training.optim import Average, make_optimizers, rate_factor, set_rate

log = logging.getLogger(__name__)


class Phase(Protocol):
    """One optimizer's share of a step."""

    name: str
    module: nn.Module
    """Trained parameters are those of `module` that require gradients; the loop may wrap it."""

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars to report; the one called "loss" is minimized."""
        ...


class Task(Protocol):
    """What is trained, on what."""

    @property
    def phases(self) -> Sequence[Phase]: ...

    def dataset(self) -> Dataset[Any]:
        """Item i is this process's i-th micro-batch, as CPU tensors."""
        ...

    def warm_up(self, micro: int) -> int:
        """How many items before `micro` must be seen again before a run can start there."""
        ...

    def prepare(self, item: Any, *, is_warm_up: bool, generator: torch.Generator) -> Any:
        """From an item to the batch that the phases' losses take, on the device."""
        ...

    def sample(self) -> Tensor | None:
        """Pictures at fixed seeds, (B, 3, H, W) in -1..1, drawn with the current weights."""
        ...

    def export(self, folder: Path) -> None:
        """Write the first phase's module, as it is now, for whoever uses it."""
        ...


@dataclass(slots=True)
class Progress:
    """How far the run is; saved with every checkpoint."""

    step: int = 0
    skipped: int = 0
    means: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    bad: Tensor | None = None
    """(skipped since the last check, skipped in a row), on the device."""

    def note_bad(self, is_bad: Tensor) -> None:
        """Count a step, without waiting for the device."""
        before = self.bad if self.bad is not None else is_bad.new_zeros(2)
        self.bad = torch.stack([before[0] + is_bad, (before[1] + 1) * is_bad])

    def check(self, most: int) -> None:
        """Read the counts; raises TrainingError after `most` skipped steps in a row."""
        if self.bad is None:
            return
        skipped, in_a_row = (int(count) for count in self.bad.tolist())
        self.skipped += skipped
        self.bad[0].zero_()
        if in_a_row >= most:
            raise TrainingError(
                f"{in_a_row} steps in a row up to step {self.step} gave a gradient that is not "
                "finite; lower optimizer.rate or use precision=fp32"
            )


def train(
    config: TrainConfig, task: Task, place: Place, capture: Capture = cuda_capture
) -> Progress:
    """Run `task` to `config.steps`, resuming from `config.folder` when it holds a checkpoint.

    `capture` makes the graph of `config.graph`; the default is for GPUs. Raises TrainingError when
    `stop_after_bad` steps in a row gave a non-finite gradient.
    """
    folder = Path(config.folder)
    optimizers = [make_optimizers(phase.module, config.optimizer) for phase in task.phases]
    average = Average(task.phases[0].module, config.ema) if config.ema else None
    progress = Progress()
    checkpoint.resume(folder, config, task, optimizers, average, progress)
    captured = _captured(config, task, place, capture) if config.graph else None
    if captured is None:
        for phase in task.phases:
            phase.module = distributed.wrap(phase.module, place)
    journal = Journal(folder, place)
    run = _Run(config, task, place, optimizers, average, progress, journal, config.steps, captured)
    try:
        run.to_end()
    except KeyboardInterrupt:
        run.save()
        log.warning(
            "interrupted: saved step %d in %s; run it again to go on", progress.step, folder
        )
        raise
    return progress


def gradients(
    config: TrainConfig, phase: Phase, batch: Any, generator: torch.Generator, of: int = 1
) -> dict[str, Tensor]:
    """Losses of one of `of` micro-batches; adds their gradients to the parameters'."""
    device = generator.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        losses = phase.loss(batch, generator)
    (losses["loss"] / of).backward()
    return {name: value.detach() for name, value in losses.items()}


def _captured(config: TrainConfig, task: Task, place: Place, capture: Capture) -> Captured:
    if place.device.type != "cuda" and capture is cuda_capture:
        raise TrainingError(f"graph=true on {place.device.type}; it is for GPUs: use graph=false")
    phase = task.phases[0]
    distributed.equalize(phase.module, place)
    return Captured(
        functools.partial(gradients, config, phase),
        _trained(phase.module),
        capture,
        functools.partial(distributed.average_gradients, place=place),
    )


def busy_workers(workers: int, chunk: int) -> int:
    """At most `workers` processes, so many that each in turn gets a chunk's first item to draw.

    A loader deals items out in turn and only every `chunk`-th holds work: of 8 workers at chunks
    of 8, one would do it all.
    """
    return next((n for n in range(workers, 0, -1) if math.gcd(n, chunk) == 1), 0)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


@dataclass(slots=True)
class _Run:
    config: TrainConfig
    task: Task
    place: Place
    optimizers: list[list[torch.optim.Optimizer]]
    """Those of each phase."""
    average: Average | None
    progress: Progress
    journal: Journal
    planned: int
    """Steps of the whole run; fewer than `config.steps` where a time limit says so."""
    captured: Captured | None
    """The only phase's gradients, with `config.graph`."""

    def to_end(self) -> None:
        config, progress = self.config, self.progress
        started = time.monotonic()
        batches = self._batches()
        while progress.step < self.planned:
            self._step(list(itertools.islice(batches, config.data.accumulate)))
            progress.step += 1
            if progress.step % config.log_every == 0 or progress.step == self.planned:
                self._report(time.monotonic() - started)
            if progress.step % config.save_every == 0:
                self.save()
            if config.sample_every and progress.step % config.sample_every == 0:
                self._sample()
        self.save()
        if self.place.is_main:
            with self._averaged(), torch.compiler.set_stance("force_eager"):
                self.task.export(Path(config.folder) / "model")
        distributed.barrier(self.place)

    def save(self) -> None:
        if self.place.is_main:
            checkpoint.save(
                Path(self.config.folder),
                self.config,
                self.task,
                self.optimizers,
                self.average,
                self.progress,
            )

    def _batches(self) -> Iterator[tuple[Any, torch.Generator]]:
        """Prepared micro-batches from the current step on, each with its generator."""
        data, place = self.config.data, self.place
        first = self.progress.step * data.accumulate
        seen = self.task.warm_up(first)
        offset = self.task.warm_up(0)
        items = range(first + offset - seen, self.config.steps * data.accumulate + offset)
        loader: DataLoader[Any] = DataLoader(
            self.task.dataset(),
            batch_size=None,
            sampler=items,
            num_workers=busy_workers(data.workers, data.chunk),
            prefetch_factor=4 if data.workers else None,
            pin_memory=place.device.type == "cuda",
        )
        for item, batch in zip(items, loader, strict=True):
            generator = torch.Generator(place.device)
            generator.manual_seed(_mix(self.config.seed, item * place.world + place.rank))
            ready = self.task.prepare(batch, is_warm_up=item < first + offset, generator=generator)
            if item >= first + offset:
                yield ready, generator

    def _step(self, batches: list[tuple[Any, torch.Generator]]) -> None:
        """One step of every phase; a gradient that is not finite leaves the weights as they are.

        The decision is made on the device (`found_inf` of the optimizers), so that the host
        never waits; `_report` reads how many steps were skipped.
        """
        progress, config = self.progress, self.config
        factor = rate_factor(progress.step, self.planned, config.optimizer)
        bad = torch.zeros((), device=self.place.device)
        for phase, optimizers in zip(self.task.phases, self.optimizers, strict=True):
            self._accumulate(phase, batches)
            norm = nn.utils.clip_grad_norm_(_trained(phase.module), config.optimizer.clip)
            is_bad = (~torch.isfinite(norm)).float()
            for optimizer in optimizers:
                optimizer.found_inf = is_bad  # type: ignore[attr-defined]
                set_rate(optimizer, config.optimizer.rate * factor)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bad = torch.maximum(bad, is_bad)
            self._note(f"{phase.name}/gradient_norm", norm.nan_to_num(0, 0, 0))
        progress.count += 1
        progress.note_bad(bad)
        if self.average:
            self.average.update(distributed.unwrap(self.task.phases[0].module))

    def _accumulate(self, phase: Phase, batches: list[tuple[Any, torch.Generator]]) -> None:
        for index, (batch, generator) in enumerate(batches):
            with contextlib.ExitStack() as stack:
                module, is_last = phase.module, index + 1 == len(batches)
                if not is_last and isinstance(module, nn.parallel.DistributedDataParallel):
                    stack.enter_context(module.no_sync())
                if self.captured is not None:
                    losses = self.captured(batch, generator)
                else:
                    losses = gradients(self.config, phase, batch, generator, len(batches))
            for name, value in losses.items():
                self._note(f"{phase.name}/{name}", value / len(batches))

    def _note(self, name: str, value: Tensor) -> None:
        means = self.progress.means
        means[name] = means[name] + value.float() if name in means else value.float()

    def _report(self, seconds: float) -> None:
        progress = self.progress
        progress.check(self.config.stop_after_bad)
        names = sorted(progress.means)
        values = torch.stack([progress.means[n] / progress.count for n in names])
        values = distributed.mean_over_processes(values, self.place)
        scalars = dict(zip(names, values.tolist(), strict=True))
        scalars["rate"] = self.optimizers[0][0].param_groups[0]["lr"]
        scalars["skipped"] = progress.skipped
        speed = self.journal.scalars(progress.step, self.planned, scalars, seconds)
        progress.means, progress.count = {}, 0
        if self.config.time_limit and progress.step < self.planned:
            self._plan(max(0.0, self.config.time_limit - seconds), speed)

    def _plan(self, left: float, speed: float) -> None:
        """Fit the number of steps, and with it the decay of the rate, to the time that is left."""
        if speed:
            reach = torch.tensor(self.progress.step + left * speed, device=self.place.device)
            mean = distributed.mean_over_processes(reach, self.place).item()
            self.planned = max(self.progress.step, min(self.config.steps, round(mean)))

    def _sample(self) -> None:
        if self.place.is_main:
            with self._averaged(), torch.compiler.set_stance("force_eager"):
                pictures = self.task.sample()
            if pictures is not None:
                self.journal.pictures(self.progress.step, pictures)
        distributed.barrier(self.place)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the current ones."""
        if self.average is None:
            yield
            return
        module = distributed.unwrap(self.task.phases[0].module)
        current = {n: p.detach().clone() for n, p in module.named_parameters()}
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self.average.shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(current[name])


def _mix(seed: int, index: int) -> int:
    """One 63-bit seed from two integers (the constant is 2^64 over the golden ratio)."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + index) % (2**63)
