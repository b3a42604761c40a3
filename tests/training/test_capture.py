"""A captured phase gives the losses and gradients of one that is launched anew each time.

The graph itself needs a GPU; without one, a replay here calls the captured function again, in the
memory and with the generator that the graph would have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from sana.errors import TrainingError
from sana.training.capture import Captured, Losses, Replay, cuda_capture
from sana.training.config import TrainConfig, override
from sana.training.loop import train
from tests.numerics import assert_detects, assert_matches
from tests.training.lines import CPU, LineTask, make_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Batch:
    x: Tensor
    wanted: Tensor


class Noisy:
    """A linear layer, with noise on what it is to give; its gradients begin anew each time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2, device=DEVICE)

    def gradients(self, batch: Batch, generator: torch.Generator) -> Losses:
        noise = torch.randn(batch.wanted.shape, generator=generator, device=DEVICE)
        loss = (self.layer(batch.x) - batch.wanted - noise).square().mean()
        for parameter in self.layer.parameters():
            parameter.grad = None
        loss.backward()
        return {"loss": loss.detach()}

    def again(self, call: Callable[[], Losses], _: torch.Generator) -> tuple[Replay, Losses]:
        """In place of a graph: results stay where they are, as a graph's do."""
        output = call()
        kept = [parameter.grad for parameter in self.layer.parameters()]

        def replay() -> None:
            for name, value in call().items():
                output[name].copy_(value)
            for parameter, place in zip(self.layer.parameters(), kept, strict=True):
                assert place is not None and parameter.grad is not None
                place.copy_(parameter.grad)

        return replay, output


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
    capture = cuda_capture if DEVICE == "cuda" else caught.again
    captured = Captured(caught.gradients, list(caught.layer.parameters()), capture)

    def check(first: int) -> None:
        for one, other in zip(expected, results(captured, caught.layer, first), strict=True):
            assert_matches(one, other, 1e-6)  # floor 0 on a CPU

    check(0)
    assert_detects(check, 1)


def test_another_shape_is_refused() -> None:
    own = Noisy()
    captured = Captured(own.gradients, list(own.layer.parameters()), own.again)
    generator = torch.Generator(DEVICE)
    shapes = [
        Batch(torch.ones(n, 3, device=DEVICE), torch.ones(n, 2, device=DEVICE)) for n in (4, 5)
    ]
    captured(shapes[0], generator)
    with pytest.raises(TrainingError, match=r"\(5, 3\).*\(4, 3\).*graph=false"):
        captured(shapes[1], generator)


def test_a_graph_needs_one_gpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = override(make_config(tmp_path_factory.mktemp("run"), steps=1), ["graph=true"])
    with pytest.raises(TrainingError, match="graph=true on cpu in 1 processes"):
        train(config, LineTask(config, CPU), CPU)


@pytest.mark.parametrize("change", ["task=detector", "data.accumulate=2"])
def test_a_graph_is_for_flow_without_accumulation(change: str) -> None:
    config = TrainConfig(recipe="", task="flow", model="tiny", steps=1)
    with pytest.raises(TrainingError, match="graph=true"):
        override(config, ["graph=true", change])
