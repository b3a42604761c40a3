"""What a model's folder or file holds, before any of it is read: its networks and one config.

A folder of ours says everything in its header. For others the config is put together: networks
from `locate`, sampling from the scheduler's file, and what nobody writes down (default size, steps,
licence) from the official model of the same architecture. Start reading at `survey`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sana.config import (
    ControlNetConfig,
    DCAEConfig,
    DiTConfig,
    ModelConfig,
    Reference,
    SamplingConfig,
    TextConfig,
    with_reference,
)
from sana.errors import CheckpointError
from sana.presets import GEMMA, PRESETS, Preset
from sana.weights.configs import read_json, read_sampling, read_text
from sana.weights.detect import PartKind
from sana.weights.files import read_config
from sana.weights.folders import find_variants
from sana.weights.locate import Found, find_networks, open_place, settle

CONVERTER_SHIFT = 3.0
NEEDED: tuple[PartKind, ...] = ("transformer", "autoencoder", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """A model's config and where its parts are."""

    config: ModelConfig
    networks: Mapping[PartKind, Found]
    header: Mapping[str, Any]
    tokenizer: Path | None = None
    """The tokenizer.json of a Gemma-2."""


def survey(
    path: Path,
    *,
    like: Preset | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    reference: Reference | None = None,
) -> Survey:
    """Look at a diffusers folder, a folder of loose files, or a file with the rest beside it.

    `like` is the official model that the files are known to be. Raises `CheckpointError` when a
    network is missing or does not go with the others.
    """
    networks = {found.kind: found for found in find_networks(path, variant=variant, dtype=dtype)}
    root = path if path.is_dir() else path.parent
    if not path.is_dir():
        _add_neighbours(networks, path, variant, dtype)
    missing = [kind for kind in NEEDED if kind not in networks]
    if missing:
        raise CheckpointError(
            f"{path} has no {' and no '.join(missing)} (it has {', '.join(networks)}); a picture "
            "needs all three: put them beside it, each as its file or folder"
        )
    config = assemble(networks, root, like, reference)
    if reference is not None:
        config = with_reference(config, reference)
    origin = {kind: str(found.source) for kind, found in networks.items()}
    return Survey(
        config=config,
        networks=networks,
        header={"recipe": {"converted from": origin}, "config": None},
        tokenizer=find_tokenizer(networks["text"], root),
    )


def find_tokenizer(text: Found, root: Path) -> Path:
    """The tokenizer.json that belongs to a text encoder; CheckpointError if there is none."""
    folder = text.source if text.source.is_dir() else text.source.parent
    places = [folder, root / "tokenizer", folder.parent / "tokenizer", root]
    for place in places:
        if (place / "tokenizer.json").is_file():
            return place / "tokenizer.json"
    raise CheckpointError(
        f"there is no tokenizer.json in {', '.join(map(str, dict.fromkeys(places)))}; prompts are "
        "read with the one that came with the model: copy its tokenizer folder as well"
    )


def _add_neighbours(
    networks: dict[PartKind, Found], path: Path, variant: str | None, dtype: str
) -> None:
    """What a single file lacks, from the files and folders beside it."""
    beside = [entry for entry in sorted(path.parent.iterdir()) if entry != path]
    for entry in beside:
        if not entry.is_dir() and entry.suffix != ".safetensors":
            continue
        try:
            found = open_place(entry, variant=variant, dtype=dtype)
        except CheckpointError:
            # Whatever else lies there is not this model's.
            continue
        for network in found:
            if network.kind not in NEEDED or network.kind == "transformer":
                continue
            if network.kind in networks and networks[network.kind].source != path:
                raise CheckpointError(
                    f"beside {path} there are two networks of the kind {network.kind}: "
                    f"{networks[network.kind].source} and {network.source}; keep the one that is "
                    "meant"
                )
            networks.setdefault(network.kind, network)


def assemble(
    networks: Mapping[PartKind, Found],
    root: Path,
    like: Preset | None,
    reference: Reference | None = None,
) -> ModelConfig:
    found = networks["transformer"]
    dit = settle(found, like.config.dit if like else None)
    autoencoder = settle(networks["autoencoder"], like.config.autoencoder if like else None)
    assert isinstance(dit, DiTConfig) and isinstance(autoencoder, DCAEConfig)
    size = int((found.data or {}).get("sample_size", 0)) * autoencoder.factor
    base = like or match_preset(dit, size, _precision(found))
    dit = replace(dit, clamps=base.config.dit.clamps if base else _precision(found) == "fp16")
    control = networks.get("controlnet")
    controlnet = settle(control) if control else None
    assert controlnet is None or isinstance(controlnet, ControlNetConfig)
    pixels = base.config.pixels if base else size or 1024
    model = ModelConfig(
        name=base.config.name if base else "custom",
        dit=dit,
        autoencoder=autoencoder,
        text=_text(networks["text"]),
        sampling=_sampling(root, base, dit, reference),
        pixels=pixels,
        max_pixels=2 * pixels,
        trained_on_bins=base.config.trained_on_bins if base else True,
        controlnet=controlnet,
    )
    return with_reference(model, model.reference)


def match_preset(dit: DiTConfig, pixels: int, precision: str | None = None) -> Preset | None:
    """The official model of this architecture, and of this default size (0: of any), if any.

    Between two that differ in what they were trained in, `precision` decides.
    """

    def bare(config: DiTConfig) -> DiTConfig:
        return replace(
            config, clamps=False, attention_eps=1.0, cross_norm_eps=1.0, text_norm_scale=1.0
        )

    same = [
        preset
        for preset in PRESETS.values()
        if bare(preset.config.dit) == bare(dit) and pixels in (0, preset.config.pixels)
    ]
    trained_so = [preset for preset in same if preset.precision == precision]
    return next(iter(trained_so or same), None)


def _precision(found: Found) -> str | None:
    """What a model was released in: the variant beside the full weights, or what is stored."""
    variants = find_variants(found.source) if found.source.is_dir() else {}
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()}
    for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        if name in variants or dtype in kinds:
            return name
    return None


def _sampling(
    root: Path, base: Preset | None, dit: DiTConfig, reference: Reference | None
) -> SamplingConfig:
    """By the scheduler's file, except for the shift of 4 that diffusers' converter lost.

    It writes 3 for every model but the 4K one, so 3 says nothing of an official model.
    """
    default = base.config.sampling if base else SamplingConfig()
    if base is None and dit.guidance_embedding:
        default = SamplingConfig(shift=1.0, steps=2, sampler="scm", integer_times=False)
    file = root / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return default
    said = read_sampling(read_json(file), default, str(file))
    if base is not None and said.shift == CONVERTER_SHIFT and reference != "diffusers":
        return replace(said, shift=default.shift)
    return said


def _text(found: Found) -> TextConfig:
    """From config.json; a file without one is the official Gemma-2-2B, as its shapes must show."""
    if found.data is None:
        return GEMMA
    return read_text(found.data, f"{found.source}/config.json")


def our_survey(path: Path) -> Survey:
    """A folder that sana wrote."""
    networks = {found.kind: found for found in find_networks(path)}
    header = networks["transformer"].header or {}
    made = read_config(ModelConfig, header.get("config"), networks["transformer"].source)
    text = networks.get("text")
    tokenizer = find_tokenizer(text, path) if text else None
    return Survey(config=made, networks=networks, header=header, tokenizer=tokenizer)
