"""Write a model in our format: a folder of safetensors files with the config in each header.

The transformer is cut into files of at most 45 MB, the text encoder is packed to int8. Nothing is
half-written: all files are complete before the first takes its final name. Start reading at `save`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from sana.config import ModelConfig, TextConfig, to_json
from sana.errors import CheckpointError
from sana.models.text import MiniLM
from sana.weights.files import to_bytes, write_whole
from sana.weights.packing import pack

if TYPE_CHECKING:
    from typing_extensions import Unpack

Weights = nn.Module | Mapping[str, Tensor]
SHARD_BYTES = 45_000_000
_HEADER_ROOM = 200_000


class Facts(TypedDict, total=False):
    """What is known of the weights, for the header: JSON values or dataclasses."""

    recipe: Any
    data: Any
    quality: Any


def save(
    folder: Path,
    *,
    config: ModelConfig,
    dit: Weights | None = None,
    autoencoder: Weights | None = None,
    text: MiniLM | None = None,
    dtype: torch.dtype = torch.float16,
    **facts: Unpack[Facts],
) -> list[Path]:
    """Write the given networks (or their tensors) into `folder`; returns the files' paths.

    A network left out keeps its file. `recipe`, `data` and `quality` (see `Facts`) go
    into the header. Floats are stored as `dtype`, integer buffers as they are; the text
    encoder is packed and should be in float32. Raises `CheckpointError` when a value is NaN or does
    not fit `dtype`, and when the disk is full or cannot be written.
    """
    assert facts.keys() <= Facts.__annotations__.keys(), f"unknown header fields in {facts}"
    common = {name: _plain(value) for name, value in facts.items()}
    common["config"] = to_json(config)
    files: dict[Path, bytes] = {}
    if dit is not None:
        tensors = _stored(_tensors(dit), dtype, "transformer")
        marked = {**common, "digest": _digest(tensors)}
        parts = split(tensors)
        for number, part in enumerate(parts, start=1):
            name = f"transformer-{number:05d}-of-{len(parts):05d}.safetensors"
            files[folder / name] = to_bytes(part, marked)
    if autoencoder is not None:
        tensors = _stored(_tensors(autoencoder), dtype, "autoencoder")
        files[folder / "autoencoder.safetensors"] = to_bytes(tensors, common)
    if text is not None:
        files[folder / "text.safetensors"] = text_bytes(
            text.state_dict(), text.config, text.tokenizer.definition
        )
    write_whole(files)
    if dit is not None:
        for path in folder.glob("transformer-*.safetensors"):
            if path not in files:
                path.unlink()
    return list(files)


def text_bytes(
    tensors: Mapping[str, Tensor], config: TextConfig, tokenizer: str, **header: Any
) -> bytes:
    """Content of a `text.safetensors`: int8 matrices, config in the header, tokenizer beside it."""
    packed = pack(_stored(tensors, torch.float32, "text encoder"))
    return to_bytes(packed, {**header, "text": to_json(config)}, tokenizer=tokenizer)


def split(tensors: Mapping[str, Tensor], limit: int = SHARD_BYTES) -> list[dict[str, Tensor]]:
    """Cut into runs of at most `limit` bytes each, in order; a larger tensor gets its own part."""
    parts: list[dict[str, Tensor]] = [{}]
    room = max(limit - _HEADER_ROOM, limit // 2)
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if parts[-1] and used + size > room:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += size
    return parts


def _tensors(weights: Weights) -> Mapping[str, Tensor]:
    return weights.state_dict() if isinstance(weights, nn.Module) else weights


def _plain(value: Any) -> Any:
    is_config = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_config else value


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str) -> dict[str, Tensor]:
    largest = torch.finfo(dtype).max
    stored = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            peak = tensor.detach().abs().max().item()
            if not peak <= largest:
                raise CheckpointError(
                    f"{what} tensor {name} reaches {peak:g} and {dtype} holds at most {largest:g}; "
                    "nothing was written; save as float32, or look for where training diverged"
                )
            tensor = tensor.detach().to("cpu", dtype)
        stored[name] = tensor
    return stored


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Ties the parts of one save together; not a check of their content."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
