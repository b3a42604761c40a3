"""Networks with their weights, from what `locate` found. Start reading at `build`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sana.config import ControlNetConfig, DCAEConfig, GemmaConfig, Reference, TextConfig
from sana.errors import CheckpointError
from sana.models.controlnet import ControlNet
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.models.gemma import Gemma2, gemma_config
from sana.models.rounding import Dtype
from sana.models.text import MiniLM
from sana.weights.assign import assign, fill, meta_parameters
from sana.weights.files import read_config, read_file
from sana.weights.keys import NetworkConfig
from sana.weights.locate import Found
from sana.weights.packing import unpack
from sana.weights.tensors import Stored

TEXT_FILE = "text.safetensors"


def build(found: Found, config: NetworkConfig, device: str | torch.device, dtype: Dtype) -> Any:
    """The network that `config` describes, filled: LinearDiT, ControlNet or DCAE.

    What an original file holds beside it (a ControlNet's base, unused tables) is left out.
    """
    return fill(
        lambda: make_network(config),
        _in_files(found),
        f"{found.source} ({found.kind})",
        names=(found.layout, config),
        device=device,
        dtype=dtype,
    )


def make_network(config: NetworkConfig) -> nn.Module:
    """LinearDiT, ControlNet or DCAE, with the weights that it begins training with."""
    if isinstance(config, DCAEConfig):
        return DCAE(config)
    return ControlNet(config) if isinstance(config, ControlNetConfig) else LinearDiT(config)


def build_gemma2(
    found: Found,
    tokenizer: Path,
    wanted: tuple[int, Reference],
    device: str | torch.device,
    dtype: torch.dtype,
) -> Gemma2:
    """The Gemma-2 that was found, with its weights; a head, if it has one, is left out.

    `wanted` are the tokens of a prompt that count, and the convention of its instruction.
    """
    config = (
        GemmaConfig()
        if found.data is None
        else gemma_config(found.data, f"{found.source}/config.json")
    )
    try:
        definition = tokenizer.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tokenizer} cannot be read ({error}); copy it again") from None
    stored = {
        f"model.{name}": tensor
        for name, tensor in _in_files(found).items()
        if not name.startswith("lm_head.")
    }
    return fill(
        lambda: Gemma2(config, definition, max_tokens=wanted[0], reference=wanted[1]),
        stored,
        f"{found.source} (text encoder)",
        device=device,
        dtype=dtype,
    )


def load_text(
    path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> MiniLM:
    """The packed text encoder from `text.safetensors` (or from the folder that holds it)."""
    path = path / TEXT_FILE if path.is_dir() else path
    header, packed, metadata = read_file(path)
    config = read_config(TextConfig, header.get("text"), path)
    definition = metadata.get("tokenizer")
    if definition is None:
        raise CheckpointError(
            f"{path} carries no tokenizer in its metadata; without it prompts cannot be read; get "
            "the file again"
        )
    with meta_parameters():
        encoder = MiniLM(config, definition)
    tensors = {name: tensor.to(dtype) for name, tensor in unpack(packed, str(path)).items()}
    assign(encoder, tensors, str(path))
    return encoder.to(device).eval()


def _in_files(found: Found) -> Mapping[str, Stored]:
    """Its tensors, which are in memory only while `sana convert` works."""
    return cast("Mapping[str, Stored]", found.tensors)
