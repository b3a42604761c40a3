"""What a network makes of a request's text, by a CUDA graph and where the graphs of steps read it.

For texts of some shape there is one place in memory; the graph that prepares a text ends by writing
there, so nothing is copied tensor by tensor. A place knows whose text it holds: requests may take
turns, and one whose text is not there is prepared again before its step. The first text of a shape
is prepared as usual, so is the second, after which the graph is captured. Start at `Texts.present`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sana.models.dit import Prepared, lone_texts
from sana.pipelines.graphs import (
    MOST,
    Capture,
    Standing,
    addresses,
    replaced,
    signature,
    tensors_of,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Waiting:
    """A request's text [B,T,D] with its mask [B,T] on the CPU, to be prepared when it is needed."""

    states: Tensor
    mask: Tensor
    lone: int
    """As `Stem.prepare` takes it."""


@dataclass(slots=True)
class Place:
    """Memory for prepared texts of one shape, and what fills it."""

    prepared: Standing
    weights: tuple[int, ...]
    text: weakref.ref[Waiting]
    """Whose text is in it."""
    states: Tensor | None = None
    mask: Tensor | None = None
    replay: Callable[[], None] | None = None

    def fill(self, prepared: Prepared) -> None:
        """Copy a text into it, tensor by tensor."""
        for place, tensor in zip(tensors_of(self.prepared), tensors_of(prepared), strict=True):
            place.copy_(tensor)


class Texts:
    """The prepared texts of one network on one device; off without a `capture`."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self._places: dict[Any, Place] = {}

    @property
    def is_on(self) -> bool:
        """Whether anything can be captured."""
        return self._capture is not None

    def wait(self, states: Tensor, mask: Tensor) -> Waiting:
        """In place of `Stem.prepare`: what `present` takes."""
        lone = lone_texts(states, mask)
        is_far = states.is_cuda and not mask.is_cuda
        return Waiting(states, mask.pin_memory() if is_far else mask, lone)

    def present(
        self, text: Waiting, prepare: Callable[..., Prepared], owner: nn.Module
    ) -> Standing:
        """`text` as `prepare` makes it with the weights of `owner`, good until the next call."""
        key = (signature((text.states, text.mask)), text.lone)
        place = self._places.pop(key, None)
        if place is None or (place.text() is not text and place.weights != addresses(owner)):
            made = prepare(text.states, text.mask, lone=text.lone)
            own = replaced(made, (tensor.clone() for tensor in tensors_of(made)))
            place = Place(Standing(*own), addresses(owner), weakref.ref(text))
        elif place.text() is not text:
            self._fill(place, text, prepare)
            place.text = weakref.ref(text)
        self._places[key] = place
        while len(self._places) > MOST:
            del self._places[next(iter(self._places))]
        return place.prepared

    def clear(self) -> None:
        """Give the memory back."""
        self._places.clear()

    def _fill(self, place: Place, text: Waiting, prepare: Callable[..., Prepared]) -> None:
        if place.replay is not None:
            assert place.states is not None and place.mask is not None
            place.states.copy_(text.states)
            place.mask.copy_(text.mask, non_blocking=True)
            place.replay()
            return
        place.fill(prepare(text.states, text.mask, lone=text.lone))
        if self._capture is not None:
            self._record(place, text, prepare)

    def _record(self, place: Place, text: Waiting, prepare: Callable[..., Prepared]) -> None:
        """Keep a graph that fills `place`, or give up for good where a device allows none."""
        assert self._capture is not None
        states, mask = text.states.clone(), text.mask.to(text.states.device, copy=True)

        def fill() -> Tensor:
            place.fill(prepare(states, mask, lone=text.lone))
            return states

        try:
            place.replay, _ = self._capture(fill)
        except RuntimeError as error:
            logger.warning("no CUDA graph of a text (%s); it is prepared without", error)
            self._capture = None
            return
        place.states, place.mask = states, mask
