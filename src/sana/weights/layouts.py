"""What each layout consists of: which file holds what, planned before anything is written.

`ours` is a folder of numbered transformer files and one file for each other network; `diffusers` a
folder of components with config.json; `original` and `single-file` are one file for each network.
Start reading at `plan_ours`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from sana.config import DiTConfig, ModelConfig, to_json
from sana.errors import CheckpointError, RequestError
from sana.models.layers import position_table
from sana.weights.configs import CLASSES, read_json, write_gemma, write_network, write_scheduler
from sana.weights.detect import PartKind
from sana.weights.export import Pieces, Relay, file_writer, own_metadata, relay, relay_same
from sana.weights.files import Writer
from sana.weights.keys import NetworkConfig
from sana.weights.locate import Found

SHARD_BYTES = 5_000_000_000
FOLDERS: Mapping[PartKind, str] = {
    "transformer": "transformer",
    "controlnet": "controlnet",
    "autoencoder": "vae",
    "text": "text_encoder",
}
FIELDS: Mapping[PartKind, str] = {
    "transformer": "dit",
    "controlnet": "controlnet",
    "autoencoder": "autoencoder",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
)
NULL_TOKENS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What there is to write."""

    networks: Mapping[PartKind, Found]
    configs: Mapping[PartKind, NetworkConfig]
    model: ModelConfig | None
    """The whole model's config, if it is known."""
    tokenizer: Path | None = None
    """The folder of a Gemma-2's tokenizer."""
    packed_text: Path | None = None
    """Our own packed text encoder."""
    dtype: torch.dtype | None = None


@dataclass(slots=True)
class Plan:
    """Files and the bytes they need."""

    files: dict[Path, bytes | Writer] = field(default_factory=dict)
    size: int = 0

    def add(self, path: Path, content: bytes) -> None:
        """A small file."""
        self.files[path] = content
        self.size += len(content)

    def add_tensors(self, path: Path, found: Relay, metadata: Mapping[str, str]) -> None:
        """One safetensors file."""
        self.files[path] = file_writer(found, list(found.shapes), metadata)
        self.size += found.size


def plan_ours(material: Material, target: Path) -> Plan:
    """A folder of ours, or a part of one when only a part was given."""
    plan = Plan()
    whole = to_json(material.model) if material.model else None
    for kind, config in material.configs.items():
        names = {"transformer": "transformer-00001-of-00001"}
        file = target / f"{names.get(kind, kind)}.safetensors"
        header = {"config": whole or {FIELDS[kind]: to_json(config)}}
        tensors = relay(material.networks[kind], config, "ours", material.dtype)
        plan.add_tensors(file, tensors, own_metadata(header))
    if material.packed_text is not None:
        plan.add(target / material.packed_text.name, material.packed_text.read_bytes())
    _add_text(plan, material, target / "text", target / "text")
    return plan


def plan_diffusers(material: Material, target: Path) -> Plan:
    """A pipeline's folder, or a component's when only one network was given."""
    if material.packed_text is not None:
        raise CheckpointError(
            "this model reads its prompts with MiniLM, which no pipeline of diffusers does; "
            "convert its transformer's or autoencoder's file by itself"
        )
    plan = Plan()
    is_pipeline = len(material.networks) > 1
    size = material.model.pixels // material.model.autoencoder.factor if material.model else 32
    for kind, config in material.configs.items():
        folder = target / FOLDERS[kind] if is_pipeline else target
        data = write_network(config, sample_size=size)
        plan.add(folder / "config.json", _json(data))
        tensors = relay(material.networks[kind], config, "diffusers", material.dtype)
        _add_shards(plan, folder, "diffusion_pytorch_model", tensors)
    _add_text(
        plan,
        material,
        target / FOLDERS["text"] if is_pipeline else target,
        target / "tokenizer" if is_pipeline else target,
    )
    if is_pipeline and material.model is not None:
        scheduler = write_scheduler(material.model.sampling)
        plan.add(target / "scheduler" / "scheduler_config.json", _json(scheduler))
        plan.add(target / "model_index.json", _json(_index(material, scheduler["_class_name"])))
    return plan


def plan_files(material: Material, target: Path, to: Literal["original", "single-file"]) -> Plan:
    """One file for each network in NVIDIA's names, in a folder when there are several."""
    plan = Plan()
    is_one = len(material.networks) == 1 and material.packed_text is None
    if material.packed_text is not None:
        plan.add(target / material.packed_text.name, material.packed_text.read_bytes())
    for kind, config in material.configs.items():
        tensors = relay(material.networks[kind], config, "original", material.dtype)
        if isinstance(config, DiTConfig):
            tensors = _with_tables(tensors, config, _side(material, config))
        is_pickle = to == "original" and kind != "autoencoder"
        file = target if is_one else target / f"{kind}.{'pth' if is_pickle else 'safetensors'}"
        if is_one:
            _require_suffix(file, ".pth" if is_pickle else ".safetensors")
        if is_pickle:
            plan.files[file] = _pickle_writer(tensors)
            plan.size += tensors.size
        else:
            # NVIDIA's autoencoder files say nothing of themselves; a single file of ours may.
            header = {"config": {FIELDS[kind]: to_json(config)}}
            plan.add_tensors(file, tensors, own_metadata(header) if to == "single-file" else {})
    if not is_one:
        _add_text(plan, material, target / FOLDERS["text"], target / "tokenizer")
    elif "text" in material.networks:
        raise RequestError(
            "a text encoder is kept in a folder with its config and tokenizer: use --to diffusers "
            "or --to ours"
        )
    return plan


def _add_text(plan: Plan, material: Material, folder: Path, tokenizer: Path) -> None:
    """Gemma-2 in transformers' layout, which all layouts share, with its tokenizer's files."""
    found = material.networks.get("text")
    if found is None:
        return
    assert material.tokenizer is not None
    tensors = {n: value for n, value in found.tensors.items() if not n.startswith("lm_head.")}
    dtype = None if material.dtype == torch.float16 else material.dtype
    plan.add(folder / "config.json", _json(dict(found.data or write_gemma())))
    _add_shards(plan, folder, "model", relay_same(tensors, dtype))
    for name in TOKENIZER_FILES:
        if (material.tokenizer / name).is_file():
            plan.add(tokenizer / name, (material.tokenizer / name).read_bytes())


def _add_shards(plan: Plan, folder: Path, base: str, tensors: Relay) -> None:
    """One file, or numbered ones of at most 5 GB with their index."""
    parts: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.shapes.items():
        size = tensor.numel() * tensor.element_size()
        if parts[-1] and used + size > SHARD_BYTES:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    metadata = {"format": "pt"}
    plan.size += tensors.size
    if len(parts) == 1:
        plan.files[folder / f"{base}.safetensors"] = file_writer(tensors, parts[0], metadata)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(parts, start=1):
        file = f"{base}-{number:05d}-of-{len(parts):05d}.safetensors"
        plan.files[folder / file] = file_writer(tensors, names, metadata)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": tensors.size}, "weight_map": dict(sorted(places.items()))}
    plan.add(folder / f"{base}.safetensors.index.json", _json(index))


def _index(material: Material, scheduler: str) -> dict[str, Any]:
    """model_index.json: the pipeline and its components' classes."""
    assert material.model is not None
    kind = "SanaSprintPipeline" if material.model.dit.guidance_embedding else "SanaPipeline"
    if "controlnet" in material.networks:
        kind = "SanaControlNetPipeline"
    found: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.32.0"}
    for name in material.configs:
        found[FOLDERS[name]] = ["diffusers", CLASSES[name]]
    found["scheduler"] = ["diffusers", scheduler]
    if material.tokenizer is not None:
        file = material.tokenizer / "tokenizer_config.json"
        settings = read_json(file) if file.is_file() else {}
        found["text_encoder"] = ["transformers", "Gemma2Model"]
        found["tokenizer"] = [
            "transformers",
            settings.get("tokenizer_class", "GemmaTokenizerFast"),
        ]
    return found


def _side(material: Material, config: DiTConfig) -> int:
    """Side, in tokens, of the table that original files carry: the model's default size."""
    if config.position_scale is not None:
        return config.position_base
    model = material.model
    return model.pixels // model.autoencoder.factor // config.patch_size if model else 32


def _with_tables(tensors: Relay, config: DiTConfig, side: int) -> Relay:
    """With the two tensors that every original file has and readers ask for.

    The position table is used by the 2K and 4K models alone, but its size tells which model it is.
    The learned empty text is zero here: it is only used in training.
    """
    dtype = next(t.dtype for t in tensors.shapes.values() if t.is_floating_point())
    shapes = {
        "pos_embed": torch.empty(1, side**2, config.width, dtype=dtype, device="meta"),
        "y_embedder.y_embedding": torch.empty(
            NULL_TOKENS, config.text_dim, dtype=dtype, device="meta"
        ),
    }

    def pieces(wanted: Any) -> Pieces:
        scale = config.position_scale or 1.0
        device = torch.device("cpu")
        made: dict[str, Tensor] = {
            "pos_embed": position_table(
                side, side, config.width, base=side, scale=scale, device=device
            ).flatten(0, 1)[None],
            "y_embedder.y_embedding": torch.zeros(NULL_TOKENS, config.text_dim),
        }
        yield from ((name, made[name].to(dtype)) for name in made if name in wanted)
        yield from tensors.pieces(wanted)

    return Relay({**shapes, **tensors.shapes}, pieces)


def _pickle_writer(tensors: Relay) -> Writer:
    """NVIDIA's own form; the whole network is in memory while it is written."""

    def write(file: BinaryIO) -> None:
        state = {name: tensor.clone() for name, tensor in tensors.pieces(tensors.shapes)}
        torch.save({"state_dict": state}, file)

    return write


def _require_suffix(file: Path, suffix: str) -> None:
    if file.suffix != suffix or file.is_dir():
        raise RequestError(
            f"the target is {file}; a single network in this layout is one file: give it a name "
            f"that ends in {suffix}"
        )


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
