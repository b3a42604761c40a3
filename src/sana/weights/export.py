"""One network's tensors from one layout to another, a tensor at a time, into safetensors files.

What is in memory is one tensor of ours, whatever the size of the network; nothing is computed but
a cast where one was asked for. Start reading at `relay`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from sana.errors import CheckpointError
from sana.weights.assign import meta_parameters, require_fit
from sana.weights.build import make_network
from sana.weights.files import FORMAT, HEADER_KEY, Writer
from sana.weights.keys import (
    Layout,
    Move,
    NetworkConfig,
    from_ours,
    kind_of,
    patch_size,
    plan,
    rename,
    surplus,
)
from sana.weights.locate import Found, Held
from sana.weights.tensors import DTYPES, Stored, blank, read

LABELS = {dtype: label for label, dtype in DTYPES.items()}
Pieces: TypeAlias = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Relay:
    """Tensors on their way: their shapes in the target's names, and where they come from."""

    shapes: Mapping[str, Tensor]
    """On the meta device, in the dtype they will have."""
    pieces: Callable[[Container[str]], Pieces]
    """Each of the given names with its tensor, in any order."""

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.shapes.values())


def relay(
    found: Found, config: NetworkConfig, layout: Layout, dtype: torch.dtype | None = None
) -> Relay:
    """The network's tensors in another layout, strictly all of them; floats cast to `dtype`.

    Raises `CheckpointError` if the tensors are not exactly those of the network that `config`
    describes and, while reading, for a value that is NaN or that `dtype` cannot hold.
    """
    kind = kind_of(config)
    with meta_parameters():
        expected = make_network(config).state_dict()
    given = {name: _blank(value, None) for name, value in found.tensors.items()}
    theirs = from_ours(expected, found.layout, config)
    dropped = surplus(given, found.layout, kind)
    kept = {name: tensor for name, tensor in given.items() if name not in dropped}
    require_fit(theirs, kept, str(found.source))
    if found.layout == "ours":
        moves = [Move(name, (name,)) for name in kept]
    else:
        moves = plan(kept, found.layout, kind)
    shapes: dict[str, Tensor] = {}
    for move in moves:
        whole = _cast_meta(move.join([kept[name] for name in move.theirs]), dtype)
        shapes |= from_ours({move.ours: whole}, layout, config)

    def pieces(wanted: Container[str]) -> Pieces:
        for move in moves:
            out = rename(move.ours, layout, config)
            if not any(name in wanted for name in out.theirs):
                continue
            whole = move.join([fetch(found.tensors, name) for name in move.theirs])
            parts = out.cut(cast(whole, dtype, move.ours), patch_size(config))
            yield from (pair for pair in zip(out.theirs, parts, strict=True) if pair[0] in wanted)

    return Relay(shapes, pieces)


def relay_same(tensors: Held, dtype: torch.dtype | None = None) -> Relay:
    """Tensors under the names that they have, for a text encoder."""
    shapes = {name: _blank(value, dtype) for name, value in tensors.items()}

    def pieces(wanted: Container[str]) -> Pieces:
        for name in tensors:
            if name in wanted:
                yield name, cast(fetch(tensors, name), dtype, name)

    return Relay(shapes, pieces)


def fetch(tensors: Held, name: str) -> Tensor:
    """One tensor, read if it is in a file."""
    value = tensors[name]
    return read(value) if isinstance(value, Stored) else value


def cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """To `dtype` if it is one of floats; CheckpointError for a value that is lost by it."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    largest = torch.finfo(dtype).max
    peak = tensor.float().abs().max().item() if tensor.numel() else 0.0
    if not peak <= largest:
        raise CheckpointError(
            f"{name} reaches {peak:g} and {dtype} holds at most {largest:g}; nothing was written: "
            "keep it in bfloat16 or float32"
        )
    return tensor.to(dtype)


def file_writer(relay: Relay, names: Iterable[str], metadata: Mapping[str, str]) -> Writer:
    """Writes the tensors called `names` as one safetensors file; equal input gives equal bytes.

    Wider dtypes come first, so that every tensor is aligned.
    """
    order = sorted(names, key=lambda name: (-relay.shapes[name].element_size(), name))
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    places: dict[str, int] = {}
    end = 0
    for name in order:
        tensor = relay.shapes[name]
        places[name] = end
        end += tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": LABELS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [places[name], end],
        }
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, tensor in relay.pieces(places):
            assert tensor.shape == relay.shapes[name].shape
            file.seek(8 + len(head) + places[name])
            file.write(_bytes(tensor))
        file.truncate(8 + len(head) + end)

    return write


def own_metadata(header: Mapping[str, Any]) -> dict[str, str]:
    """Our header as the metadata of a file."""
    return {HEADER_KEY: json.dumps({"format": FORMAT, **header}, sort_keys=True, default=str)}


def _blank(value: Stored | Tensor, dtype: torch.dtype | None) -> Tensor:
    if isinstance(value, Stored):
        value = blank({"": value})[""]
    return _cast_meta(torch.empty(value.shape, dtype=value.dtype, device="meta"), dtype)


def _cast_meta(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    return tensor.new_empty(tensor.shape, dtype=dtype)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    array: Any = flat.numpy()
    return memoryview(array)
