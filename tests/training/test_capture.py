"""A captured phase gives the losses and gradients of one that is launched anew each time.

The graph itself needs a GPU; without one, a replay here calls the captured function again, in the
memory and with the generator that the graph would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sana.errors import TrainingError
from sana.training.capture import Captured, Losses, cuda_capture
from sana.training.config import TrainConfig, override
from sana.training.loop import train
from sana.training.recipes import plan
from sana.training.run import make_task
from tests.numerics import assert_detects, assert_matches
from tests.training.lines import CPU, LineTask, again, make_config
from tests.training.small import SMALL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Batch:
    x: Tensor
    wanted: Tensor


class Noisy:
    """A linear layer, with noise on what it is to give."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2, device=DEVICE)

    def gradients(self, batch: Batch, generator: torch.Generator) -> Losses:
        noise = torch.randn(batch.wanted.shape, generator=generator, device=DEVICE)
        loss = (self.layer(batch.x) - batch.wanted - noise).square().mean()
        loss.backward()
        return {"loss": loss.detach()}


def results(
    compute: Callable[[Batch, torch.Generator], Losses], layer: nn.Linear, first: int = 0
) -> list[Tensor]:
    """Losses and the weight's gradients of three batches, kept by their own memory."""
    found = []
    for number in range(first, first + 3):
        generator = torch.Generator(DEVICE).manual_seed(number)
        torch.rand(number, generator=generator, device=DEVICE)  # as if something had drawn before
        parts = (torch.randn(4, n, generator=generator, device=DEVICE) for n in (3, 2))
        losses = compute(Batch(*parts), generator)
        assert layer.weight.grad is not None
        found += [losses["loss"], layer.weight.grad.clone()]
        layer.weight.grad = None
    return found


def test_batches_and_their_random_numbers_reach_a_graph() -> None:
    plain, caught = Noisy(), Noisy()
    expected = results(plain.gradients, plain.layer)
    capture = cuda_capture if DEVICE == "cuda" else again
    captured = Captured(caught.gradients, list(caught.layer.parameters()), capture)

    def check(first: int) -> None:
        for one, other in zip(expected, results(captured, caught.layer, first), strict=True):
            assert_matches(one, other, 1e-6)  # floor 0 on a CPU

    check(0)
    assert_detects(check, 1)


def test_another_shape_is_refused() -> None:
    own = Noisy()
    captured = Captured(own.gradients, list(own.layer.parameters()), again)
    generator = torch.Generator(DEVICE)
    shapes = [
        Batch(torch.ones(n, 3, device=DEVICE), torch.ones(n, 2, device=DEVICE)) for n in (4, 5)
    ]
    captured(shapes[0], generator)
    with pytest.raises(TrainingError, match=r"\(5, 3\).*\(4, 3\).*graph=false"):
        captured(shapes[1], generator)


def test_a_graph_needs_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = override(make_config(tmp_path_factory.mktemp("run"), steps=1), ["graph=true"])
    with pytest.raises(TrainingError, match="graph=true on cpu"):
        train(config, LineTask(config, CPU), CPU)


# The compiler looks at every tensor, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_flow_step_with_a_graph_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, compiled: bool
) -> None:
    """Of the tiny transformer, under autocast: weights are rounded anew in each replay."""

    def compile_all(modules: list[nn.Module]) -> None:
        for module in modules:
            module.compile(backend="aot_eager", dynamic=False)

    monkeypatch.setattr("sana.training.run._compile", compile_all)
    found = []
    for graph, capture in ((False, cuda_capture), (True, again)):
        changes = (
            *SMALL,
            "init=",
            "precision=bf16",
            "steps=3",
            f"compile={str(compiled).lower()}",
            f"graph={str(graph).lower()}",
            f"folder={tmp_path / str(graph)}",
        )
        config = plan("sticker-512", changes)
        task = make_task(config, CPU)
        train(config, task, CPU, capture)
        lines = (tmp_path / str(graph) / "log.jsonl").read_text().splitlines()
        losses = [json.loads(line)["flow/loss"] for line in lines]
        found.append((losses, task.phases[0].module.state_dict()))
    (losses, weights), (captured, others) = found
    assert losses == captured and len(set(losses)) == 3

    def check(changed: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            assert torch.equal(value, changed[name]), name

    check(others)
    assert_detects(check, {name: value * 1.01 for name, value in others.items()})


@pytest.mark.parametrize("change", ["task=detector", "data.accumulate=2"])
def test_a_graph_is_for_flow_without_accumulation(change: str) -> None:
    config = TrainConfig(recipe="", task="flow", model="tiny", steps=1)
    with pytest.raises(TrainingError, match="graph=true"):
        override(config, ["graph=true", change])
