"""Save and resume a run: modules, optimizers, averaged weights, progress and the resolved config.

Random numbers and data have no state of their own (both are functions of the seed and the
position), so the step number carries them. A file is written beside its target and renamed: a run
that is killed while saving keeps the previous checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sana import distributed
from sana.config import from_json, to_json
from sana.errors import TrainingError
from sana.training.config import TrainConfig, difference
from sana.training.optim import Average
from sana.weights.files import write_whole
from sana.weights.load import assign

if TYPE_CHECKING:
    from sana.training.loop import Progress, Task

log = logging.getLogger(__name__)

# Settings that may change when a run goes on: they do not alter what a step computes.
FREE = (
    "steps",
    "folder",
    "save_every",
    "log_every",
    "sample_every",
    "time_limit",
    "data.workers",
    "data.cache",
)


def save(
    folder: Path,
    config: TrainConfig,
    task: Task,
    optimizers: Sequence[Sequence[torch.optim.Optimizer]],
    average: Average | None,
    progress: Progress,
) -> None:
    """Write `folder/checkpoint.pt` and `folder/config.json` atomically."""
    state = {
        "modules": [distributed.unwrap(p.module).state_dict() for p in task.phases],
        "optimizers": [[part.state_dict() for part in parts] for parts in optimizers],
        "average": None if average is None else (average.updates, average.shadow),
        "progress": {"step": progress.step, "skipped": progress.skipped},
    }
    write_whole({folder / "config.json": json.dumps(to_json(config), indent=1).encode()})
    partial = folder / "checkpoint.pt.partial"
    try:
        torch.save(state, partial)
        os.replace(partial, folder / "checkpoint.pt")
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(
            f"could not write {folder / 'checkpoint.pt'} ({error}); free some space and run the "
            "same command again, it goes on from the last saved step"
        ) from None


def resume(
    folder: Path,
    config: TrainConfig,
    task: Task,
    optimizers: Sequence[Sequence[torch.optim.Optimizer]],
    average: Average | None,
    progress: Progress,
) -> None:
    """Restore what `save` wrote, or do nothing when there is no checkpoint."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return
    _check_same(folder, config)
    state = _read(path)
    for phase, tensors in zip(task.phases, state["modules"], strict=True):
        assign(phase.module, tensors, str(path))
    for parts, saved in zip(optimizers, state["optimizers"], strict=True):
        for optimizer, values in zip(parts, saved, strict=True):
            optimizer.load_state_dict(values)
    if average is not None:
        average.updates, shadow = state["average"]
        for name, value in shadow.items():
            average.shadow[name].copy_(value)
    progress.step = state["progress"]["step"]
    progress.skipped = state["progress"]["skipped"]
    log.warning("going on from step %d in %s", progress.step, folder)


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TrainingError(
            f"{path} cannot be read ({type(error).__name__}); delete it to start again"
        ) from None
    return state


def _check_same(folder: Path, config: TrainConfig) -> None:
    saved = from_json(TrainConfig, json.loads((folder / "config.json").read_text()))
    changed = {k: v for k, v in difference(saved, config).items() if k not in FREE}
    if changed:
        key, (old, new) = next(iter(changed.items()))
        raise TrainingError(
            f"{folder} holds a run with {key}={old!r}, this one has {new!r}; "
            "give another folder=..., or the same settings to go on"
        )
