"""A phase's loss and gradients as one CUDA graph, so that the device never waits for launches.

A graph reads a batch and writes gradients in memory of its own. What is random in the loss is
drawn by a generator that the graph knows, set to the state of each micro-batch's own, so that a
step draws the same numbers with and without the graph. The optimizer is not part of it.
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
    """

    def __init__(
        self,
        gradients: Callable[[Any, torch.Generator], Losses],
        parameters: list[nn.Parameter],
        capture: Capture = cuda_capture,
    ) -> None:
        self._compute, self._parameters, self._capture = gradients, parameters, capture
        self._replay: Replay | None = None

    def __call__(self, batch: Any, generator: torch.Generator) -> Losses:
        """Losses of a batch, a dataclass of tensors; its gradients are in the parameters.

        They are the graph's own memory: the next call writes over them. TrainingError where a
        batch has other shapes than the first.
        """
        if self._replay is None:
            self._prepare(batch, generator)
        assert self._replay is not None
        for kept, given in zip(_tensors(self._batch), _tensors(batch), strict=True):
            if kept.shape != given.shape or kept.dtype != given.dtype:
                raise TrainingError(
                    f"a batch has {tuple(given.shape)} of {given.dtype} where the first had "
                    f"{tuple(kept.shape)} of {kept.dtype}; use graph=false"
                )
            kept.copy_(given)
        self._generator.set_state(generator.get_state())
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in self._losses.items()}

    def _prepare(self, batch: Any, generator: torch.Generator) -> None:
        copies = {
            part.name: getattr(batch, part.name).clone() for part in dataclasses.fields(batch)
        }
        self._batch = dataclasses.replace(batch, **copies)
        self._generator = torch.Generator(generator.device)
        self._generator.set_state(generator.get_state())

        def call() -> Losses:
            return self._compute(self._batch, self._generator)

        self._warm_up(call)
        self._replay, self._losses = self._capture(call, self._generator)
        self._gradients = [parameter.grad for parameter in self._parameters]

    def _warm_up(self, call: Callable[[], Losses]) -> None:
        """On a stream of its own, as a graph is captured; leaves no gradients."""
        if self._generator.device.type != "cuda":
            call()
            self._clear()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                call()
                self._clear()
        torch.cuda.current_stream().wait_stream(stream)

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _tensors(batch: Any) -> list[Tensor]:
    return [getattr(batch, part.name) for part in dataclasses.fields(batch)]
