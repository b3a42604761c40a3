"""Files that exist as pickles alone, opened by a reader that makes tensors and nothing else.

`sana convert` reads others' models by it, and `sana evaluate` the networks of metrics. torch's
`weights_only` reader knows tensors, plain containers and numbers; whatever else a pickle asks for
ends the reading before it happens. Start at `read_pickle`.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.errors import CheckpointError
from sana.weights.tensors import find_content

WRAPPERS = ("state_dict", "model", "module", "state_dict_ema")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The network's tensors in a .pth, .pt or .bin file, mapped from it where its format allows.

    What stands beside them (epoch, optimizer) is left out. Raises `CheckpointError` when the file
    holds anything but tensors and plain values, or no network.
    """
    content = find_content(path)
    if content not in ("zip", "pickle"):
        raise CheckpointError(f"{path} is no torch file (it holds {content} data); check the path")
    try:
        with warnings.catch_warnings():
            # Another protocol is no fault of the file; what is not understood is refused.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            loaded: Any = torch.load(
                path, map_location="cpu", weights_only=True, mmap=content == "zip"
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} asks for more than tensors and plain values ({_reason(error)}); loading it "
            "could run code, so nothing of it was run; save its state_dict alone where you trust it"
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} cannot be read as a torch file ({_reason(error)}); it is truncated or "
            "damaged: get it again"
        ) from None
    return _unwrap(path, loaded)


def _unwrap(path: Path, loaded: Any) -> dict[str, Tensor]:
    while isinstance(loaded, Mapping) and not _tensors(loaded):
        inner = [loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), Mapping)]
        if not inner:
            break
        loaded = inner[0]
    if not isinstance(loaded, Mapping) or not _tensors(loaded):
        held = (
            ", ".join(map(str, loaded))[:200] if isinstance(loaded, Mapping) else repr(loaded)[:60]
        )
        raise CheckpointError(
            f"{path} holds no network (it holds {held or 'nothing'}); a checkpoint is a "
            f"state_dict, by itself or under {', '.join(WRAPPERS)}"
        )
    return _tensors(loaded)


def _tensors(loaded: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _reason(error: Exception) -> str:
    """The first sentence of torch's page-long message, without its advice to trust the file."""
    text = str(error)
    start = text.find("WeightsUnpickler error:")
    return text[max(start, 0) :].splitlines()[0][:200] if text else type(error).__name__
