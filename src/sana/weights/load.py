"""The only door by which weights enter a network: find, build without memory, fill, strictly.

A model is a folder of ours (`transformer-0000i-of-0000N.safetensors`, `autoencoder.safetensors`
and `text.safetensors`, int8, or a Gemma-2 in `text/`), a diffusers folder, or a single file with
the rest beside it; `tiny` is made in memory from a seed. Every key must be there, none may be left
over, every shape must fit. Start reading at `load`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sana.config import (
    ControlNetConfig,
    DCAEConfig,
    DiTConfig,
    ModelConfig,
    Reference,
    to_json,
    with_reference,
)
from sana.errors import CheckpointError, RequestError
from sana.models.controlnet import ControlNet
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.models.gemma import Gemma2
from sana.models.rounding import Dtype, beside, both, narrow
from sana.models.text import MiniLM, TextEncoder, small_tokenizer
from sana.presets import Preset, preset
from sana.weights.assign import assign, meta_parameters
from sana.weights.build import TEXT_FILE, build, build_gemma2, load_text
from sana.weights.detect import PartKind
from sana.weights.files import read_header
from sana.weights.folders import transformer_files
from sana.weights.hub import fetch, fetch_controlnet
from sana.weights.locate import Found, find_networks, is_ours, settle
from sana.weights.survey import Survey, our_survey, survey

__all__ = ["TEXT_FILE", "assign", "load", "load_text", "meta_parameters", "transformer_files"]

logger = logging.getLogger(__name__)
ASSETS = Path(__file__).parents[1] / "assets"
AUTOENCODER_FILE = "autoencoder.safetensors"
TINY_SEED = 20240
SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """One model, ready to run: its config, its networks (in eval mode) and its header."""

    config: ModelConfig
    dit: LinearDiT
    autoencoder: DCAE
    text: TextEncoder
    header: dict[str, Any]
    controlnet: ControlNet | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """The device that a model's weights are read to, and the dtype of each network."""

    device: str | torch.device
    dit: Dtype
    autoencoder: Dtype
    text: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a model lies: its folder or file, and what is known of it besides."""

    path: Path
    like: Preset | None = None
    """The official model that it is."""
    controlnet: Path | None = None


def load(
    name_or_path: str | Path | Place,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    reference: Reference | None = None,
    where: Callable[[ModelConfig], Where] | None = None,
) -> Components:
    """Load a model by preset name, from a folder of ours or diffusers', or from a single file.

    An official model is fetched, unless `find_model` has already been asked for it.
    `variant` chooses between weights in a diffusers folder; by default the one that suits `dtype`.
    `reference` chooses the convention (docs/models.md); by default the one of the training. Gemma-2
    overflows in fp16 and is then kept in bf16. `where` decides device and dtypes anew once the
    config is known. Raises `RequestError` for a name without weights and `CheckpointError` for
    files that are missing, unreadable, or do not fit together.
    """
    place = name_or_path if isinstance(name_or_path, Place) else find_model(name_or_path)
    if isinstance(place, str):
        config = preset(place).config
        return _make_tiny(config, _settled(config, device, dtype, where))
    found = _look(place, variant, _name(dtype), reference)
    config = with_reference(found.config, reference) if reference else found.config
    if "controlnet" in found.networks:
        network = found.networks["controlnet"]
        its = cast(ControlNetConfig, settle(network))
        config = replace(config, controlnet=_fit_to_base(its, config.dit, network.source))
    at = _settled(config, device, dtype, where)
    networks = found.networks
    controlnet = None
    if config.controlnet is not None:
        controlnet = build(networks["controlnet"], config.controlnet, at.device, beside(at.dit))
    return Components(
        config=config,
        dit=build(networks["transformer"], config.dit, at.device, at.dit),
        autoencoder=build(networks["autoencoder"], config.autoencoder, at.device, at.autoencoder),
        text=_load_text_of(found, config.reference, place.path, at.device, at.text),
        header={**found.header, "config": to_json(config)},
        controlnet=controlnet,
    )


def find_model(name_or_path: str | Path, *, is_offline: bool = False) -> Place | str:
    """Where a model is: at a path, in the package, or on the hub, from where it is fetched.

    `is_offline` takes an official model from the cache alone. A model that is made from a seed is
    nowhere: its name comes back.
    """
    known = None if _is_path(name_or_path) else preset(str(name_or_path))
    if known is not None and known.source == "random":
        return str(name_or_path)
    if known is None or known.folder is None:
        return Place(path=find_folder(name_or_path))
    path = fetch(known, is_offline=is_offline, report=logger.warning)
    if known.control_source is None:
        return Place(path=path, like=known)
    beside = fetch_controlnet(known, is_offline=is_offline, report=logger.warning)
    return Place(path=path, like=known, controlnet=beside)


def _look(place: Place, variant: str | None, dtype: str, reference: Reference | None) -> Survey:
    if place.path.is_dir() and is_ours(place.path):
        found = our_survey(place.path)
        _require_one_model(found, place.path)
    else:
        found = survey(
            place.path, like=place.like, variant=variant, dtype=dtype, reference=reference
        )
    if place.controlnet is None:
        return found
    networks = dict(found.networks)
    networks["controlnet"] = _only(place.controlnet, "controlnet", torch.float32)
    return replace(found, networks=networks)


def _settled(
    config: ModelConfig,
    device: str | torch.device,
    dtype: torch.dtype,
    where: Callable[[ModelConfig], Where] | None,
) -> Where:
    if where is not None:
        return where(config)
    return Where(device=device, dit=dtype, autoencoder=dtype, text=dtype)


def load_dit(
    path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LinearDiT:
    """The transformer alone, from any layout."""
    found = _only(path, "transformer", dtype)
    return cast(LinearDiT, build(found, settle(found), device, dtype))


def load_autoencoder(
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    like: DCAEConfig | None = None,
) -> DCAE:
    """The autoencoder alone, from any layout; with its latent statistics or those of `like`."""
    if path.is_dir() and (path / AUTOENCODER_FILE).is_file():
        path = path / AUTOENCODER_FILE
    found = _only(path, "autoencoder", dtype)
    return cast(DCAE, build(found, settle(found, like), device, dtype))


def load_controlnet(
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    base: DiTConfig | None = None,
) -> ControlNet:
    """A ControlNet alone, from any layout; CheckpointError if it is not for the transformer `base`.

    The base's epsilons and clamp hold for it too.
    """
    found = _only(path, "controlnet", dtype)
    config = cast(ControlNetConfig, settle(found))
    if base is not None:
        config = _fit_to_base(config, base, path)
    return cast(ControlNet, build(found, config, device, dtype))


def load_gemma2(
    folder: Path,
    *,
    tokenizer: Path | None = None,
    max_tokens: int = 300,
    reference: Reference = "nvidia",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Gemma2:
    """Gemma-2 from a local transformers folder (config.json, tokenizer.json, weights); no download.

    Raises `CheckpointError` for float16, a missing file, or weights that do not fit exactly.
    """
    if dtype == torch.float16:
        raise CheckpointError(
            "Gemma-2 was asked for in float16, where its states overflow to infinity; use bfloat16 "
            "or float32"
        )
    tokenizer = tokenizer or folder / "tokenizer.json"
    missing = [file.name for file in (folder / "config.json", tokenizer) if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(missing)}; Gemma-2 is loaded from a local folder in "
            "the transformers layout; give its path"
        )
    wanted = (max_tokens, reference)
    return build_gemma2(_only(folder, "text", dtype), tokenizer, wanted, device, dtype)


def find_folder(name_or_path: str | Path) -> Path:
    """The folder of a named model's shipped weights, or the given folder or file itself."""
    text = str(name_or_path)
    if _is_path(name_or_path):
        if not Path(name_or_path).exists():
            raise CheckpointError(
                f"{text} is not there; a model is a folder, or a file with the rest beside it; "
                "give its path"
            )
        return Path(name_or_path)
    preset(text)
    folder = ASSETS / text
    if not folder.is_dir():
        shipped = sorted(entry.name for entry in ASSETS.glob("*") if entry.is_dir())
        raise RequestError(
            f"the weights of {text!r} are not in this package; shipped are "
            f"{', '.join([*shipped, 'tiny'])}; use one of them or give a folder of weights"
        )
    return folder


def _is_path(name_or_path: str | Path) -> bool:
    text = str(name_or_path)
    is_written_so = isinstance(name_or_path, Path) or "/" in text or "\\" in text
    return is_written_so or Path(text).exists()


def _fit_to_base(config: ControlNetConfig, base: DiTConfig, path: Path) -> ControlNetConfig:
    """The config by the rules of its base; CheckpointError where the two do not go together."""
    fields = ("width", "cross_heads", "text_dim", "latent_channels", "patch_size")
    differing = [name for name in fields if getattr(config.dit, name) != getattr(base, name)]
    if differing or config.depth >= base.depth:
        reasons = [f"{n} {getattr(config.dit, n)} and {getattr(base, n)}" for n in differing]
        raise CheckpointError(
            f"{path} is a ControlNet for another base: "
            f"{'; '.join(reasons) or f'{config.depth} blocks for {base.depth}'}; use the one that "
            "was made for this model"
        )
    dit = replace(
        config.dit,
        depth=base.depth,
        clamps=base.clamps,
        attention_eps=base.attention_eps,
        cross_norm_eps=base.cross_norm_eps,
    )
    return replace(config, dit=dit)


def _only(path: Path, kind: PartKind, dtype: torch.dtype) -> Found:
    """The one network of a kind in `path`."""
    found = [network for network in find_networks(path, dtype=_name(dtype)) if network.kind == kind]
    if not found:
        raise CheckpointError(f"{path} holds no {kind}; give the file or folder of one")
    return found[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load_text_of(
    found: Survey,
    reference: Reference,
    path: Path,
    device: str | torch.device,
    dtype: torch.dtype,
) -> TextEncoder:
    config = found.config.text
    if config.kind == "gemma2":
        kept = torch.bfloat16 if dtype == torch.float16 else dtype
        tokenizer = found.tokenizer
        assert tokenizer is not None
        text = found.networks["text"]
        wanted = (config.max_tokens, reference)
        return build_gemma2(text, tokenizer, wanted, device, kept)
    file = path / TEXT_FILE
    _require_same(file, read_header(file).get("text"), to_json(config))
    return load_text(file, device=device, dtype=dtype)


def _require_one_model(found: Survey, path: Path) -> None:
    """Every other file's header must say what the transformer's does of that network."""
    needed = [AUTOENCODER_FILE] if "autoencoder" not in found.networks else []
    if found.config.text.kind == "gemma2" and "text" not in found.networks:
        needed.append("text/model.safetensors")
    if found.config.controlnet is not None and "controlnet" not in found.networks:
        needed.append("controlnet.safetensors")
    if needed:
        raise CheckpointError(
            f"there is no weight file {path / needed[0]}; a model is one folder with its "
            "transformer, autoencoder and text files; copy the missing one into it, or check the "
            "path"
        )
    for kind, config in (
        ("autoencoder", found.config.autoencoder),
        ("controlnet", found.config.controlnet),
    ):
        if config is not None:
            network = found.networks[cast(PartKind, kind)]
            part = (network.header or {}).get("config") or {}
            _require_same(network.source, part.get(kind), to_json(config))


def _require_same(path: Path, got: object, expected: dict[str, Any]) -> None:
    if got == expected:
        return
    known = got if isinstance(got, dict) else {}
    names = [name for name in expected if known.get(name) != expected[name]] or sorted(known)
    raise CheckpointError(
        f"{path} does not belong to the transformer beside it: they differ in "
        f"{', '.join(names[:SHOWN])}; all files of a folder must be of one model"
    )


def _make_tiny(config: ModelConfig, at: Where) -> Components:
    """Random weights, the same on every call; zero-initialized layers are opened up as well."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(TINY_SEED)
        dit, autoencoder = LinearDiT(config.dit), DCAE(config.autoencoder)
        text = MiniLM(config.text, small_tokenizer(config.text.vocabulary))
        controlnet = ControlNet(config.controlnet) if config.controlnet else None
        others = (autoencoder, at.autoencoder), (controlnet, beside(at.dit))
        for network, dtype in ((dit, at.dit), *others):
            if network is not None:
                _open_zeros(network)
                _place(network, at.device, dtype)
    return Components(
        config=config,
        dit=dit,
        autoencoder=autoencoder,
        text=text.to(at.device, at.text),
        controlnet=controlnet,
        header={"recipe": f"random weights, seed {TINY_SEED}", "config": to_json(config)},
    )


def _place(network: nn.Module, device: str | torch.device, dtype: Dtype) -> None:
    wide, products = both(dtype)
    network.to(device, wide).eval()
    if products != wide:
        narrow(network, products)


@torch.no_grad()
def _open_zeros(network: nn.Module) -> None:
    """Give every all-zero weight and gate random values, so that each part shows in the output."""
    for name, parameter in network.named_parameters():
        if parameter.ndim and not name.endswith("bias") and not parameter.any():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(std=fan_in**-0.5)
