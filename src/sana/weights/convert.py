"""`sana convert`: a model, or one network of it, from any layout into any other.

Every file is planned before one is written, tensors pass one at a time, and all files take their
names together at the end. This is the one place where pickles are read (`pickles`). Start reading
at `convert`; what each layout consists of is in `layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sana.config import (
    ControlNetConfig,
    DCAEConfig,
    DiTConfig,
    ModelConfig,
    from_json,
    with_reference,
)
from sana.errors import CheckpointError, RequestError
from sana.presets import AUTOENCODERS, PRESETS, Preset, preset
from sana.weights.build import TEXT_FILE
from sana.weights.detect import PartKind
from sana.weights.files import require_room, write_whole
from sana.weights.keys import NetworkConfig
from sana.weights.layouts import Material, Plan, plan_diffusers, plan_files, plan_ours
from sana.weights.locate import Found, Held, find_networks, settle
from sana.weights.pickles import read_pickle
from sana.weights.survey import assemble, find_tokenizer, match_preset
from sana.weights.tensors import find_content, open_index

Format = Literal["ours", "diffusers", "original", "single-file"]


@dataclass(frozen=True, slots=True)
class Report:
    """What was converted and written."""

    kinds: Mapping[PartKind, str]
    """Each network and the layout that it came in."""
    files: list[Path]
    size: int


def convert(
    source: Path,
    target: Path,
    *,
    to: Format,
    dtype: torch.dtype | None = None,
    like: str | None = None,
) -> Report:
    """Write the networks of `source` to `target` in another layout; tensors keep their bytes.

    `dtype` casts all floats but a text encoder's to fp16, where Gemma-2 overflows; `like` names the
    official model that says what tensors cannot. Nothing that exists is overwritten. Raises
    `CheckpointError` if the source is not complete, and if the disk is full, leaving no file.
    """
    networks = {found.kind: found for found in find_networks(source, open=_read_any)}
    material = _gather(source, networks, like, dtype)
    if to == "ours":
        plan = plan_ours(material, target)
    elif to == "diffusers":
        plan = plan_diffusers(material, target)
    else:
        plan = plan_files(material, target, to)
    _require_free(plan, target)
    write_whole(plan.files)
    layouts = {kind: found.layout for kind, found in networks.items()}
    return Report(layouts, sorted(plan.files), sum(f.stat().st_size for f in plan.files))


def _gather(
    source: Path, networks: Mapping[PartKind, Found], like: str | None, dtype: torch.dtype | None
) -> Material:
    configs: dict[PartKind, NetworkConfig] = {
        kind: settle(found, _like(like, kind)) for kind, found in networks.items() if kind != "text"
    }
    root = source if source.is_dir() else source.parent
    text = networks.get("text")
    packed = root / TEXT_FILE
    return Material(
        networks=networks,
        configs=configs,
        model=_model(networks, configs, root, like),
        tokenizer=find_tokenizer(text, root).parent if text else None,
        packed_text=packed if source.is_dir() and packed.is_file() else None,
        dtype=dtype,
    )


def _like(name: str | None, kind: PartKind) -> NetworkConfig | None:
    """What a known model has in the place of this network."""
    if name is None:
        return None
    if name in AUTOENCODERS:
        return AUTOENCODERS[name].config if kind == "autoencoder" else None
    config = preset(name).config
    known: dict[PartKind, NetworkConfig | None] = {
        "transformer": config.dit,
        "autoencoder": config.autoencoder,
        "controlnet": config.controlnet,
    }
    return known[kind]


def _model(
    networks: Mapping[PartKind, Found],
    configs: Mapping[PartKind, NetworkConfig],
    root: Path,
    like: str | None,
) -> ModelConfig | None:
    """The whole model's config, if the transformer is there and the rest is there or known."""
    found = networks.get("transformer")
    if found is None:
        return None
    stored = (found.header or {}).get("config")
    if isinstance(stored, dict) and "dit" in stored and "autoencoder" in stored:
        return from_json(ModelConfig, stored)
    known = PRESETS.get(like or "")
    if {"autoencoder", "text"} <= networks.keys():
        return assemble(networks, root, known)
    dit = configs["transformer"]
    assert isinstance(dit, DiTConfig)
    base = known or _match(found, dit)
    if base is None:
        return None
    model = replace(base.config, dit=replace(dit, clamps=base.config.dit.clamps))
    return with_reference(_with_parts(model, configs), model.reference)


def _with_parts(model: ModelConfig, configs: Mapping[PartKind, NetworkConfig]) -> ModelConfig:
    """The model with the other networks that were found in the place of the usual ones."""
    autoencoder, controlnet = configs.get("autoencoder"), configs.get("controlnet")
    if isinstance(autoencoder, DCAEConfig):
        model = replace(model, autoencoder=autoencoder)
    if isinstance(controlnet, ControlNetConfig):
        model = replace(model, controlnet=controlnet)
    return model


def _match(found: Found, dit: DiTConfig) -> Preset | None:
    """The official model of this architecture; its default size shows in the position table."""
    table = found.tensors.get("pos_embed")
    side = round(table.shape[1] ** 0.5) if table is not None else 0
    return match_preset(dit, 32 * side * dit.patch_size)


def _read_any(path: Path) -> tuple[Held, Mapping[str, str]]:
    if find_content(path) in ("zip", "pickle"):
        tensors: dict[str, Tensor] = read_pickle(path)
        return tensors, {}
    return open_index(path)


def _require_free(plan: Plan, target: Path) -> None:
    taken = [path for path in plan.files if path.exists()]
    if taken:
        raise RequestError(
            f"{taken[0]} is already there; nothing is overwritten: choose another target, or move "
            "it away"
        )
    if not plan.files:
        raise CheckpointError("there is nothing to write; give a folder or file with a network")
    require_room(target, plan.size)


def describe_report(report: Report) -> list[str]:
    """Lines for a person: what was read as what, and how much was written."""
    lines = [f"{kind}: read as {layout}" for kind, layout in report.kinds.items()]
    return [*lines, f"{len(report.files)} files, {report.size / 1e6:,.1f} MB"]


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A dtype by its name; RequestError for others."""
    known: dict[str, Any] = {
        "fp32": torch.float32,
        "float32": torch.float32,
        "fp16": torch.float16,
        "float16": torch.float16,
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
    }
    if name is None:
        return None
    if name not in known:
        raise RequestError(f"{name!r} is no dtype to keep weights in; choose fp32, fp16 or bf16")
    found: torch.dtype = known[name]
    return found
