"""How much memory a computation holds at most, by torch's own account of its tensors.

Counts the bytes of every tensor storage that an operation makes, until it is freed. Works on the
meta device too, where a network of any size runs in no time and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv_transpose2d.input,
)
"""Of channels-last maps every device's are channels last; those of the meta device are not."""


class LiveBytes(TorchDispatchMode):
    """While active: `now` and `peak` bytes of the storages made inside and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            _identity(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        if func in CONVOLUTIONS and _is_channels_last(args[0]):
            result = result.contiguous(memory_format=torch.channels_last)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _identity(leaf) not in given:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        identity = storage._cdata
        if identity in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(identity)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, identity, size)

    def _remove(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that `run` holds at once, its results included, its inputs not."""
    with torch.inference_mode(), LiveBytes() as live:
        result = run()
        del result
    return live.peak


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
