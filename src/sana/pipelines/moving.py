"""Tensors that move together between the host and a device, in one piece.

The first time that they come to the device they come from where they lie, a mapped file perhaps;
only what comes again is gathered in a stretch of page-locked memory, which costs as much as several
copies. Start reading at `Unit`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Movable: TypeAlias = tuple[Callable[[Tensor], None], Tensor]
"""A tensor, and what puts another one in its place."""

ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's place in a unit's memory: what puts it there, its layout, its first byte."""

    point: Callable[[Tensor], None]
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """From its first to its last value in memory, so that any layout survives a move."""
        if 0 in self.shape:
            return 0
        reach = zip(self.shape, self.stride, strict=True)
        return (1 + sum((size - 1) * stride for size, stride in reach)) * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """The tensor at its place in `memory`."""
        stretch = memory[self.start : self.start + self.nbytes].view(self.dtype)
        return stretch.as_strided(self.shape, self.stride, stretch.storage_offset())


class Unit:
    """One stretch of memory on the device, filled from the host whenever it comes."""

    def __init__(
        self,
        tensors: list[Movable],
        device: torch.device,
        side: torch.cuda.Stream | None,
        *,
        comes_often: bool = False,
    ) -> None:
        """Copies are made on the stream `side`, if there is one, while the device works.

        What `comes_often` is gathered at once.
        """
        self._device, self._side = device, side
        self._entries: list[Entry] = []
        self.size = 0
        for point, tensor in tensors:
            entry = Entry(point, tensor.shape, tensor.stride(), tensor.dtype, self.size)
            self._entries.append(entry)
            self.size += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
        self._loose = [tensor.detach() for _, tensor in tensors]
        """On the host, each where it was; none once they are gathered."""
        self._host: Tensor | None = None
        self._has_come = False
        self._here: Tensor | None = None
        self._arrival: torch.cuda.Event | None = None
        self._is_used = False
        if comes_often or any(tensor.device.type != "cpu" for tensor in self._loose):
            self._gather()

    def fetch(self, slot: Tensor | None = None) -> None:
        """Start the copy to the device, into `slot` if given; nothing if it has started already."""
        if self._here is not None:
            return
        if self._host is None and self._has_come:
            self._gather()
        self._has_come = True
        with torch.inference_mode(False), torch.no_grad():
            here = slot
            if here is None:
                here = torch.empty(self.size, dtype=torch.uint8, device=self._device)
            self._here = here[: self.size]
            if self._side is None:
                self._fill(self._here)
                return
            # Also waits for the work that last used this memory.
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                self._fill(self._here)
                self._arrival = self._side.record_event()

    def _fill(self, here: Tensor) -> None:
        if self._host is not None:
            here.copy_(self._host, non_blocking=True)
            return
        for entry, tensor in zip(self._entries, self._loose, strict=True):
            entry.view(here).copy_(tensor, non_blocking=True)

    def _gather(self) -> None:
        """Have all in one stretch of page-locked memory."""
        with torch.inference_mode(False), torch.no_grad():
            self._host = torch.empty(self.size, dtype=torch.uint8)
            for entry, tensor in zip(self._entries, self._loose, strict=True):
                entry.view(self._host).copy_(tensor)
        self._loose = []
        if self._side is not None:
            lock_pages(self._host)
        self._point_to(self._host)

    def use(self) -> None:
        """Have the tensors on the device for all work from here on."""
        if self._is_used:
            return
        self.fetch()
        assert self._here is not None, "fetched"
        self._wait()
        self._is_used = True
        self._point_to(self._here)

    def drop(self) -> None:
        """Point to the host; the device's memory is free for whatever is computed next."""
        if self._here is None:
            return
        self._wait()
        if self._is_used:
            self._return()
        self._here, self._is_used = None, False

    def _wait(self) -> None:
        if self._arrival is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrival)
            self._arrival = None

    def _return(self) -> None:
        if self._host is not None:
            self._point_to(self._host)
            return
        with torch.inference_mode(False), torch.no_grad():
            for entry, tensor in zip(self._entries, self._loose, strict=True):
                entry.point(tensor)

    def _point_to(self, memory: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for entry in self._entries:
                entry.point(entry.view(memory))


def tensors_of(network: nn.Module) -> list[Movable]:
    """Every parameter and buffer once, each with what puts another tensor in its place."""
    found: dict[int, Movable] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in found:
                found[id(parameter)] = (_set_data(parameter), parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in found:
                found[id(buffer)] = (_set_buffer(module, name), buffer)
    return list(found.values())


def lock_pages(memory: Tensor) -> None:
    """Page-lock host memory in place, so that CUDA copies it without a detour, until it is freed.

    `pin_memory` would round every allocation up to a power of two. If the system refuses, copies
    are slower and nothing else changes.
    """
    if not memory.numel():
        return
    runtime: Any = torch.cuda.cudart()
    address = memory.data_ptr()
    error = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
    if error:
        logger.info("page-locking %d bytes was refused (CUDA error %d)", memory.nbytes, error)
        return
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, address)


def _set_data(parameter: nn.Parameter) -> Callable[[Tensor], None]:
    def point(tensor: Tensor) -> None:
        parameter.data = tensor

    return point


def _set_buffer(module: nn.Module, name: str) -> Callable[[Tensor], None]:
    def point(tensor: Tensor) -> None:
        module._buffers[name] = tensor

    return point
