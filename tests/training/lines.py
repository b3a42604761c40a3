"""A task small enough to follow by hand: a line fitted to noisy points, for tests of the loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sana import distributed
from sana.distributed import Place
from sana.training.capture import Losses, Replay, cuda_capture
from sana.training.config import DataConfig, OptimizerConfig, TrainConfig
from sana.training.loop import train

CPU = Place(rank=0, world=1, device=torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class Batch:
    points: Tensor


def again(call: Callable[[], Losses], _: torch.Generator) -> tuple[Replay, Losses]:
    """In place of a graph, on a CPU: a replay calls again, and losses stay where they are."""
    output = call()

    def replay() -> None:
        for name, value in call().items():
            output[name].copy_(value)

    return replay, output


class Points(Dataset[Tensor]):
    def __init__(self, count: int, place: Place) -> None:
        self.count, self.place = count, place

    def __getitem__(self, item: int) -> Tensor:
        generator = torch.Generator().manual_seed(item * self.place.world + self.place.rank)
        return torch.randn(self.count, 3, generator=generator)


class LinePhase:
    name = "line"

    def __init__(self, bad_steps: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Linear(3, 1)
        self.bad_steps, self.calls = bad_steps, 0

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        points = batch.points
        noise = torch.randn(len(points), 1, generator=generator)
        error = self.module(points) - points.sum(1, keepdim=True) - 0.1 * noise
        self.calls += 1
        scale = float("nan") if self.calls - 1 in self.bad_steps else 1.0
        return {"loss": error.square().mean() * scale}


class LineTask:
    def __init__(self, config: TrainConfig, place: Place, bad_steps: tuple[int, ...] = ()) -> None:
        self.config, self.place = config, place
        self.phase = LinePhase(bad_steps)
        self.exported: list[dict[str, Tensor]] = []

    @property
    def phases(self) -> tuple[LinePhase]:
        return (self.phase,)

    def dataset(self) -> Dataset[Any]:
        data = self.config.data
        return Points(data.batch // data.accumulate, self.place)

    def warm_up(self, micro: int) -> int:
        return 0

    def prepare(self, item: Tensor, *, is_warm_up: bool, generator: torch.Generator) -> Batch:
        return Batch(item)

    def sample(self) -> None:
        return None

    def export(self, folder: Path) -> None:
        # Copies: the loop puts the current weights back in the same memory.
        module = distributed.unwrap(self.phase.module)
        self.exported.append({name: t.clone() for name, t in module.state_dict().items()})


def make_config(folder: Path, **changes: Any) -> TrainConfig:
    data = DataConfig(batch=changes.pop("batch", 4), accumulate=changes.pop("accumulate", 1))
    return TrainConfig(
        recipe="line",
        task="flow",
        model="tiny",
        folder=str(folder),
        save_every=1000,
        log_every=1,
        data=data,
        optimizer=OptimizerConfig(rate=0.01, warmup=2, decay=0.0),
        **changes,
    )


def fit(folder: Path, place: Place = CPU, **changes: Any) -> dict[str, Tensor]:
    """Train and return the final weights and averages; with graph=True, `again` is the graph.

    Processes begin with other weights each, so that those of the first must reach the others.
    """
    config = make_config(folder, **changes)
    task = LineTask(config, place)
    with torch.no_grad():
        for parameter in task.phase.module.parameters():
            parameter.add_(place.rank)
    train(config, task, place, again if config.graph else cuda_capture)
    module = distributed.unwrap(task.phase.module)
    return dict(module.state_dict()) | {
        f"average.{name}": value for name, value in (task.exported or [{}])[0].items()
    }


def fit_in_process(
    rank: int, world: int, folder: str, port: int, graph: bool = False, averages: bool = True
) -> None:
    """One of several gloo processes; each leaves its weights in the folder.

    Without `averages` a graph's gradients stay those of its own process: a planted fault.
    """
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if not averages:
        distributed.average_gradients = lambda row, place: None
    with distributed.session("cpu") as place:
        weights = fit(Path(folder), place, steps=6, graph=graph)
    torch.save(weights, Path(folder) / f"weights{rank}.pt")
