"""A phase's loss and gradients as one CUDA graph, so that the device never waits for launches.

A graph reads a batch and writes all gradients, one behind the other, in memory of its own; between
processes that row is averaged after each replay, so no DistributedDataParallel is needed. What is
random in the loss is drawn by a generator that the graph knows, set to the state of each
micro-batch's own, so that a step draws the same numbers with and without the graph. The optimizer
is not part of it. What is captured must enter autocast itself, or weights once rounded stay so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from sana.errors import TrainingError

WARM_UPS = 3
"""Calls before a graph is captured, in which libraries and compilers prepare themselves."""

Losses: TypeAlias = dict[str, Tensor]
Replay: TypeAlias = Callable[[], None]


class Capture(Protocol):
    """Makes a graph of a call that uses the generator: how to run it again, and what it gave."""

    def __call__(
        self, call: Callable[[], Losses], generator: torch.Generator
    ) -> tuple[Replay, Losses]: ...


def cuda_capture(call: Callable[[], Losses], generator: torch.Generator) -> tuple[Replay, Losses]:
    """A CUDA graph on the current device."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    # Other threads, such as a loader's that pins memory, may go on using the device.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call()
    return graph.replay, output


class Captured:
    """`gradients` of a batch, captured at its first call; all batches have its shapes.

    `gradients(batch, generator)` leaves gradients in the parameters and returns the losses.
    `average` is given all gradients as one row after each replay, to change in place.
    """

    def __init__(
        self,
        gradients: Callable[[Any, torch.Generator], Losses],
        parameters: list[nn.Parameter],
        capture: Capture = cuda_capture,
        average: Callable[[Tensor], None] = lambda row: None,
    ) -> None:
        self._compute, self._parameters = gradients, parameters
        self._capture, self._average = capture, average
        self._replay: Replay | None = None
        self._row: Tensor | None = None

    def __call__(self, batch: Any, generator: torch.Generator) -> Losses:
        """Losses of a batch, a dataclass of tensors; its gradients are in the parameters.

        They are the graph's own memory: the next call writes over them. TrainingError where a
        batch has other shapes than the first.
        """
        if self._replay is None:
            self._prepare(batch, generator)
        assert self._replay is not None and self._row is not None
        for kept, given in zip(_tensors(self._batch), _tensors(batch), strict=True):
            if kept.shape != given.shape or kept.dtype != given.dtype:
                raise TrainingError(
                    f"a batch has {tuple(given.shape)} of {given.dtype} where the first had "
                    f"{tuple(kept.shape)} of {kept.dtype}; use graph=false"
                )
            kept.copy_(given)
        self._generator.set_state(generator.get_state())
        self._replay()
        self._average(self._row)
        for parameter, gradient in zip(self._given, self._gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in self._losses.items()}

    def _prepare(self, batch: Any, generator: torch.Generator) -> None:
        copies = {
            part.name: getattr(batch, part.name).clone() for part in dataclasses.fields(batch)
        }
        self._batch = dataclasses.replace(batch, **copies)
        self._generator = torch.Generator(generator.device)
        self._generator.set_state(generator.get_state())
        self._warm_up()
        self._replay, self._losses = self._capture(self._call, self._generator)

    def _warm_up(self) -> None:
        """On a stream of its own, as a graph is captured; makes the row of gradients."""
        if self._generator.device.type != "cuda":
            self._call()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._call()
        torch.cuda.current_stream().wait_stream(stream)

    def _call(self) -> Losses:
        """Losses of the kept batch; its gradients are copied into the row."""
        self._clear()
        losses = self._compute(self._batch, self._generator)
        if self._row is None:
            self._lay_out()
        # Had backward views of the row to add to, it would launch a sum for every parameter.
        gradients = [parameter.grad for parameter in self._given]
        torch.cat([grad.flatten() for grad in gradients if grad is not None], out=self._row)
        self._clear()
        return losses

    def _lay_out(self) -> None:
        """The row, and each gradient's place in it."""
        self._given = [p for p in self._parameters if p.grad is not None]
        sizes = [parameter.numel() for parameter in self._given]
        first = self._given[0]
        self._row = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        parts = zip(self._row.split(sizes), self._given, strict=True)
        self._gradients = [part.view(parameter.shape) for part, parameter in parts]

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _tensors(batch: Any) -> list[Tensor]:
    return [getattr(batch, part.name) for part in dataclasses.fields(batch)]
