"""A denoiser's steps as CUDA graphs: launched as one, so that the host never holds the device up.

The first two calls with inputs of some shapes run as usual, which also compiles the kernels and
makes what the network keeps; after the second it is captured, with memory of its own for its
inputs, and from then on replayed. What a step changes is copied in every time, a text only when it
is another one, and never one that is `Standing`. Graphs hold device memory until `clear`; weights
that have moved are noticed.
Results are those of the same call without a graph.
Start reading at `Graphs.__call__`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sana.models.dit import Prepared, Stem

logger = logging.getLogger(__name__)

MOST = 4
"""Shapes that are kept at a time, the last used ones."""

Capture: TypeAlias = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Something to compute -> what computes it again, and where its result is then."""


class Standing(Prepared):
    """A text in memory of its own, which graphs read where it is; what is there may change."""

    __slots__ = ()


@dataclass(slots=True)
class Captured:
    """One graph with the memory that it reads and writes."""

    replay: Callable[[], None]
    output: Any
    inputs: list[Tensor]
    stands: list[bool]
    """Which of `inputs` are not the graph's own but a `Standing` text's."""
    given: list[weakref.ref[Tensor]]
    """What was copied into `inputs` last."""
    weights: tuple[int, ...]
    kept: list[Any]
    """What else it reads: the position tables, which the network drops for another shape."""

    def is_valid(self, tensors: list[Tensor], changing: int, owner: nn.Module) -> bool:
        """Whether the weights are where they were; looked at with every new text, or always."""
        pairs = zip(self.inputs, tensors, self.stands, strict=True)
        if any(stands and place is not tensor for place, tensor, stands in pairs):
            return False
        known = list(zip(self.given[changing:], tensors[changing:], strict=True))
        is_same = bool(known) and all(ref() is tensor for ref, tensor in known)
        return is_same or self.weights == addresses(owner)

    def run(self, tensors: list[Tensor], changing: int) -> Any:
        """New tensors; the first `changing` inputs are copied always, others if not the last."""
        for index, (tensor, place) in enumerate(zip(tensors, self.inputs, strict=True)):
            if index < changing or self.given[index]() is not tensor:
                place.copy_(tensor, non_blocking=True)
                self.given[index] = weakref.ref(tensor)
        self.replay()
        return replaced(self.output, (tensor.clone() for tensor in tensors_of(self.output)))


class Graphs:
    """The graphs of one network on one device; without a `capture` it is called as it is."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self._seen: set[Any] = set()
        self._captured: dict[Any, Captured] = {}

    @property
    def is_on(self) -> bool:
        """Whether anything can be captured."""
        return self._capture is not None

    def __call__(
        self,
        network: Callable[..., Any],
        owner: nn.Module,
        latent: Tensor,
        time: Any = (),
        *texts: Any,
        **options: Any,
    ) -> Any:
        """network(latent, time, *texts, **options), whose weights are `owner`'s.

        Tensors may be anywhere in tuples, of the result too; options that are no tensors belong to
        the shape.
        """
        if self._capture is None:
            return network(latent, time, *texts, **options)
        changing = len(list(tensors_of((latent, time))))
        inputs = (latent, time, texts, tuple(sorted(options.items())))
        key = signature(inputs)
        found = self._captured.pop(key, None)
        tensors = list(tensors_of(inputs))
        if found is not None and found.is_valid(tensors, changing, owner):
            self._captured[key] = found
            return found.run(tensors, changing)
        result = network(latent, time, *texts, **options)
        if key in self._seen:
            self._record(key, network, owner, inputs, tensors)
        self._seen.add(key)
        return result

    def clear(self) -> None:
        """Give the memory back."""
        self._captured.clear()

    def _record(
        self,
        key: Any,
        network: Callable[..., Any],
        owner: nn.Module,
        inputs: Any,
        tensors: list[Tensor],
    ) -> None:
        """Keep a new graph, or give up for good where device or network do not allow one."""
        assert self._capture is not None
        stands = standing(inputs)
        places = [
            tensor if stays else tensor.to(inputs[0].device, copy=True)
            for tensor, stays in zip(tensors, stands, strict=True)
        ]
        latent, time, texts, options = replaced(inputs, iter(places))
        try:
            replay, output = self._capture(lambda: network(latent, time, *texts, **dict(options)))
        except RuntimeError as error:
            logger.warning("no CUDA graph (%s); operations are launched one at a time", error)
            self._capture = None
            self.clear()
            return
        given = [weakref.ref(tensor) for tensor in tensors]
        kept = [module._positions for module in owner.modules() if isinstance(module, Stem)]
        weights = addresses(owner)
        self._captured[key] = Captured(replay, output, places, stands, given, weights, kept)
        while len(self._captured) > MOST:
            del self._captured[next(iter(self._captured))]


def cuda_capture() -> Capture:
    """Captures for the current CUDA device; they share memory, so only one may run at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = call()
        return graph.replay, output

    return capture


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in tuples of tuples, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from tensors_of(part)


def standing(tree: Any) -> list[bool]:
    """For each of the tensors whether it is a `Standing` text's."""
    if isinstance(tree, Standing):
        return [True for _ in tensors_of(tree)]
    if not isinstance(tree, tuple):
        return [False] if isinstance(tree, Tensor) else []
    return [stands for part in tree for stands in standing(part)]


def replaced(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The same tree with other tensors."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if not isinstance(tree, tuple):
        return tree
    parts = [replaced(part, tensors) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def signature(tree: Any) -> Any:
    """Hashable, equal for trees that one graph serves: shapes and dtypes for tensors."""
    if isinstance(tree, Tensor):
        return (tuple(tree.shape), tree.dtype)
    if isinstance(tree, tuple):
        return (type(tree), *map(signature, tree))
    return tree


def addresses(owner: nn.Module) -> tuple[int, ...]:
    """Where the weights are: a graph reads them there."""
    found: list[int] = []

    def look(
        module: nn.Module,
    ) -> None:  # `parameters()` makes names, which takes ten times as long
        found.extend(p.data_ptr() for p in module._parameters.values() if p is not None)
        for child in module._modules.values():
            if child is not None:
                look(child)

    look(owner)
    return tuple(found)
