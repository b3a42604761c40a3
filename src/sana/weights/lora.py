"""LoRA files in the namings that people have: PEFT, diffusers, kohya, ComfyUI, and our own.

A file's keys are a prefix, a layer's name in NVIDIA's, diffusers' or our layout, and a suffix; in
kohya's the dots of the name are underscores. Layers that are parts of one of ours (query, key and
value) are joined: their A are stacked and their B set on a diagonal of blocks, which is exact.
Every key must find its layer. Start reading at `load_lora`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sana.errors import CheckpointError
from sana.models.lora import Adapter
from sana.weights.keys import Layout, rename
from sana.weights.tensors import open_index, read

if TYPE_CHECKING:
    from sana.models.dit import LinearDiT

PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.")
KOHYA = ("lora_unet_", "lora_transformer_", "lora_")
LAYOUTS: tuple[Layout, ...] = ("ours", "diffusers", "original")
SHOWN = 5
_SUFFIX = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<a>lora_A|lora_down|lora\.down)|(?P<b>lora_B|lora_up|lora\.up))"
    r"(?:\.\w+)?\.weight|(?P<scaled>.+)\.alpha"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a layer of theirs is in ours: part `index` of `count` along the outputs of `layer`."""

    layer: str
    index: int
    count: int


@dataclass(slots=True)
class Parts:
    """What a file holds for one layer of theirs."""

    a: Tensor | None = None
    b: Tensor | None = None
    alpha: float | None = None

    def are_whole(self) -> bool:
        """Whether A and B are both there, and of one rank."""
        return self.a is not None and self.b is not None and len(self.a) == self.b.shape[1]


def load_lora(path: str | Path, dit: LinearDiT) -> Adapter:
    """Read a LoRA file, or the folder that PEFT writes, for `dit`; raises `CheckpointError`.

    No key that fits is an error, and so is any key that does not.
    """
    path = _file(Path(path))
    index, metadata = open_index(path)
    found, strange = _grouped({name: read(stored) for name, stored in index.items()})
    places = _places(dit)
    layers: dict[tuple[str, int], dict[int, Parts]] = {}
    for name, parts in found.items():
        place = places.get(_bare(name)) or places.get(_underscored(name))
        if place is None or not parts.are_whole():
            strange.append(name)
        else:
            layers.setdefault((place.layer, place.count), {})[place.index] = parts
    _refuse(path, strange, has_any=bool(layers))
    scale = _scale(path, metadata)
    return Adapter(
        source=str(path),
        layers={name: _joined(parts, count, scale) for (name, count), parts in layers.items()},
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    known = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    for name in known:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} is a folder without {' or '.join(known)}; give the LoRA's .safetensors file"
    )


def _grouped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Parts], list[str]]:
    """Parts by their layer's full name, and the keys that are none of LoRA's."""
    found: dict[str, Parts] = {}
    strange = []
    for key, tensor in tensors.items():
        match = _SUFFIX.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        parts = found.setdefault(match["layer"] or match["scaled"], Parts())
        if match["scaled"]:
            parts.alpha = float(tensor)
        elif match["a"]:
            parts.a = tensor.float().flatten(1)
        else:
            parts.b = tensor.float().flatten(1)
    return found, strange


def _places(dit: LinearDiT) -> dict[str, Place]:
    """Every linear layer's place, by its name in each layout, dotted and with underscores."""
    places: dict[str, Place] = {}
    for layer, module in dit.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        for layout in LAYOUTS:
            theirs = rename(f"{layer}.weight", layout, dit.config).theirs
            for index, name in enumerate(theirs):
                bare = name.removesuffix(".weight")
                place = Place(layer=layer, index=index, count=len(theirs))
                places[bare] = places[bare.replace(".", "_")] = place
    return places


def _bare(name: str) -> str:
    """Without the prefixes, of which there may be several."""
    while True:
        shorter = next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)
        if shorter == name:
            return name
        name = shorter


def _underscored(name: str) -> str:
    return next((name.removeprefix(p) for p in KOHYA if name.startswith(p)), name)


def _refuse(path: Path, strange: Iterable[str], *, has_any: bool) -> None:
    keys = list(strange)
    shown = ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if keys[SHOWN:] else "")
    if not has_any:
        raise CheckpointError(
            f"{path} has no LoRA weights for this model: of {len(keys)} keys none fits a layer of "
            f"it ({shown}); use a LoRA for Sana in PEFT, diffusers, kohya or ComfyUI naming"
        )
    if keys:
        raise CheckpointError(
            f"{path} fits this model only in part: {len(keys)} of its keys name no linear layer of "
            f"it, or are no plain LoRA ({shown}); nothing was loaded, so use one made for it"
        )


def _scale(path: Path, metadata: Mapping[str, str]) -> Any:
    """rank -> alpha / rank for layers that state no alpha, from what PEFT and diffusers write."""
    settings: dict[str, Any] = {}
    beside = path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in metadata:
            settings = json.loads(metadata["lora_adapter_metadata"])
        elif beside.is_file():
            settings = json.loads(beside.read_text(encoding="utf-8"))
        plain = {key.removeprefix("transformer."): value for key, value in settings.items()}
        alpha, power = plain.get("lora_alpha"), 0.5 if plain.get("use_rslora") else 1.0
        if plain.get("alpha_pattern"):
            raise TypeError("an alpha_pattern")
        alpha = None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has settings that cannot be used ({error}); save it again as a plain LoRA"
        ) from None
    return lambda rank: 1.0 if alpha is None else alpha / rank**power


def _joined(parts: Mapping[int, Parts], count: int, scale: Any) -> tuple[Tensor, Tensor]:
    """A and B of our layer from those of its parts; B is scaled."""
    downs, ups = [], []
    height = max(len(_tensor(part.b)) for part in parts.values())
    for index, part in sorted(parts.items()):
        a, b = _tensor(part.a), _tensor(part.b)
        factor = scale(len(a)) if part.alpha is None else part.alpha / len(a)
        whole = torch.zeros(count * height, len(a))
        whole[index * height : index * height + len(b)] = factor * b
        downs.append(a)
        ups.append(whole)
    return torch.cat(downs), torch.cat(ups, dim=1)


def _tensor(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
