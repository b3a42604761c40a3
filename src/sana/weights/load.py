"""The only door by which weights enter a network: find, build without memory, assign, strictly.

A model is a folder: `transformer-0000i-of-0000N.safetensors`, `autoencoder.safetensors` and
`text.safetensors` (int8, see `packing`), each with its config in the header. `tiny` is made in
memory from a seed. Every key must be there, none may be left over, every shape must fit. Start
reading at `load`.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from sana.config import (
    DCAEConfig,
    ModelConfig,
    Reference,
    TextConfig,
    from_json,
    to_json,
)
from sana.errors import CheckpointError, RequestError
from sana.models.controlnet import ControlNet
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.models.gemma import Gemma2, gemma_config
from sana.models.text import MiniLM, TextEncoder, small_tokenizer
from sana.presets import PRESETS, preset
from sana.weights.files import read_file, read_header
from sana.weights.packing import unpack

ASSETS = Path(__file__).parents[1] / "assets"
AUTOENCODER_FILE = "autoencoder.safetensors"
TEXT_FILE = "text.safetensors"
SHARD_NAME = re.compile(r"transformer-(\d{5})-of-(\d{5})\.safetensors")
TINY_SEED = 20240
SHOWN = 10

Network = TypeVar("Network", bound=nn.Module)
Config = TypeVar("Config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """One model, ready to run: its config, its three networks (in eval mode) and its header."""

    config: ModelConfig
    dit: LinearDiT
    autoencoder: DCAE
    text: TextEncoder
    header: dict[str, Any]
    controlnet: ControlNet | None = None


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Components:
    """Load a model by preset name (`sticker-512`, `tiny`) or from a folder that `save` wrote.

    Raises `RequestError` for a name without weights and `CheckpointError` for files that are
    missing, unreadable, or do not fit together.
    """
    if str(name_or_path) in PRESETS and PRESETS[str(name_or_path)].source == "random":
        return _make_tiny(preset(str(name_or_path)).config, torch.device(device), dtype)
    folder = find_folder(name_or_path)
    shards = transformer_files(folder)
    header = read_header(shards[0])
    config = _config(ModelConfig, header.get("config"), shards[0])
    autoencoder_file = folder / AUTOENCODER_FILE
    part = read_header(autoencoder_file).get("config") or {}
    _require_same(autoencoder_file, part.get("autoencoder"), to_json(config.autoencoder))
    return Components(
        config=config,
        dit=load_dit(folder, device=device, dtype=dtype),
        autoencoder=load_autoencoder(folder, device=device, dtype=dtype),
        text=_load_text_of(config, folder, device, dtype),
        header=header,
    )


def load_dit(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LinearDiT:
    """The transformer alone, from all its numbered files."""
    tensors: dict[str, Tensor] = {}
    shards = transformer_files(folder)
    first: dict[str, Any] | None = None
    for path in shards:
        header, part, _ = read_file(path)
        if first is not None and header != first:
            raise CheckpointError(
                f"{path} and {shards[0].name} come from different saves; all parts must be of one "
                "save; copy the whole folder again"
            )
        first = first or header
        tensors.update(part)
    config = _config(ModelConfig, (first or {}).get("config"), shards[0])
    source = f"{folder} (transformer, {len(shards)} files)"
    return _build(lambda: LinearDiT(config.dit), tensors, source, device, dtype)


def load_autoencoder(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DCAE:
    """The autoencoder alone; its latent statistics come from the file's own config."""
    path = folder / AUTOENCODER_FILE if folder.is_dir() else folder
    header, tensors, _ = read_file(path)
    part = header.get("config")
    part = part.get("autoencoder") if isinstance(part, dict) else None
    config = _config(DCAEConfig, part, path)
    return _build(lambda: DCAE(config), tensors, str(path), device, dtype)


def load_text(
    path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> MiniLM:
    """The packed text encoder from `text.safetensors` (or from the folder that holds it)."""
    path = path / TEXT_FILE if path.is_dir() else path
    header, packed, metadata = read_file(path)
    config = _config(TextConfig, header.get("text"), path)
    definition = metadata.get("tokenizer")
    if definition is None:
        raise CheckpointError(
            f"{path} carries no tokenizer in its metadata; without it prompts cannot be read; get "
            "the file again"
        )
    tensors = unpack(packed, str(path))
    return _build(lambda: MiniLM(config, definition), tensors, str(path), device, dtype).eval()


def load_gemma2(
    folder: Path,
    *,
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
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(missing)}; Gemma-2 is loaded from a local folder in "
            "the transformers layout; give its path"
        )
    tensors: dict[str, Tensor] = {}
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for path in sorted(folder.glob("model*.safetensors")):
            tensors.update(safetensors.torch.load_file(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded as Gemma-2: {error}; get its files again"
        ) from None
    config = gemma_config(data, str(folder / "config.json"))
    definition = (folder / "tokenizer.json").read_text(encoding="utf-8")
    named = {
        "model." + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if not name.startswith("lm_head.")
    }
    return _build(
        lambda: Gemma2(config, definition, max_tokens=max_tokens, reference=reference),
        named,
        str(folder),
        device,
        dtype,
    )


def assign(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put `tensors` into `module`, all of them and nothing else; `source` names them in errors.

    A network on the meta device takes over the tensors as they are, dtype and device included; one
    that has memory is overwritten in place, so that its optimizer keeps its parameters. Raises
    `CheckpointError` listing the first ten missing, unexpected and misshapen keys of each kind.
    """
    expected = module.state_dict()
    _raise_misfits(
        source,
        missing=[name for name in expected if name not in tensors],
        extra=[name for name in tensors if name not in expected],
        misshapen=[
            f"{name} {tuple(tensors[name].shape)} for {tuple(value.shape)}"
            for name, value in expected.items()
            if name in tensors and tensors[name].shape != value.shape
        ],
    )
    takes_over = any(parameter.is_meta for parameter in module.parameters())
    module.load_state_dict(dict(tensors), strict=True, assign=takes_over)


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Networks built inside have parameters without memory, while buffers keep their values.

    Plain `torch.device("meta")` would also lose tables and statistics that no file holds.
    """
    thread = threading.get_ident()

    def replace(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    register: Any = register_module_parameter_registration_hook  # typed as if it returned nothing
    hook = register(replace)
    try:
        with _NormalSkipsMeta():
            yield
    finally:
        hook.remove()


class _NormalSkipsMeta(TorchFunctionMode):
    """Leaves out `nn.init.normal_` on the meta device, where torch imports its compiler for it.

    That import takes seconds, and there is nothing to fill. Holds for one thread, as the hook does.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_ and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def find_folder(name_or_path: str | Path) -> Path:
    """The folder of a named model's shipped weights, or the given folder itself."""
    text = str(name_or_path)
    path = Path(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or "\\" in text or path.is_dir():
        if not path.is_dir():
            state = "a file" if path.is_file() else "not there"
            raise CheckpointError(f"{text} is {state}; a model is a folder; give the folder's path")
        return path
    preset(text)
    folder = ASSETS / text
    if not folder.is_dir():
        shipped = sorted(entry.name for entry in ASSETS.glob("*") if entry.is_dir())
        raise RequestError(
            f"the weights of {text!r} are not in this package; shipped are "
            f"{', '.join([*shipped, 'tiny'])}; use one of them or give a folder of weights"
        )
    return folder


def transformer_files(folder: Path) -> list[Path]:
    """All numbered parts in order; a gap or parts of two saves are a `CheckpointError`."""
    found = {}
    for path in folder.glob("transformer-*.safetensors"):
        match = SHARD_NAME.fullmatch(path.name)
        if match:
            found[path] = (int(match[1]), int(match[2]))
    if not found:
        raise CheckpointError(
            f"{folder} has no transformer-00001-of-0000N.safetensors; a model folder holds all "
            "parts of its transformer; train it, or give another folder"
        )
    counts = sorted({count for _, count in found.values()})
    missing = sorted(set(range(1, counts[-1] + 1)) - {number for number, _ in found.values()})
    if len(counts) > 1 or missing:
        fault = f"lacks part {missing[0]}" if missing else "mixes parts of different saves"
        raise CheckpointError(
            f"{folder} {fault} of its transformer (found "
            f"{', '.join(sorted(path.name for path in found))}); all "
            "parts of one save are needed; copy the folder again"
        )
    return sorted(found)


def _build(
    make: Callable[[], Network],
    tensors: Mapping[str, Tensor],
    source: str,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Network:
    with meta_parameters():
        module = make()
    # A copy even where nothing changes: a file replaced under a memory map would crash the process.
    moved = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in tensors.items()
    }
    assign(module, moved, source)
    return module.to(device).eval()


def _load_text_of(
    config: ModelConfig, folder: Path, device: str | torch.device, dtype: torch.dtype
) -> TextEncoder:
    text = config.text
    if text.kind == "gemma2":
        return load_gemma2(
            folder / "text",
            max_tokens=text.max_tokens,
            reference=config.reference,
            device=device,
            dtype=dtype,
        )
    path = folder / TEXT_FILE
    _require_same(path, read_header(path).get("text"), to_json(text))
    return load_text(path, device=device, dtype=dtype)


def _config(kind: type[Config], data: object, path: Path) -> Config:
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} has no {kind.__name__} in its header; the network is built from it; get the "
            "file again"
        )
    try:
        return from_json(kind, data)
    except (CheckpointError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _require_same(path: Path, got: object, expected: dict[str, Any]) -> None:
    if got == expected:
        return
    known = got if isinstance(got, dict) else {}
    names = [name for name in expected if known.get(name) != expected[name]] or sorted(known)
    raise CheckpointError(
        f"{path} does not belong to the transformer beside it: they differ in "
        f"{', '.join(names[:SHOWN])}; all files of a folder must be of one model"
    )


def _raise_misfits(
    source: str, *, missing: list[str], extra: list[str], misshapen: list[str]
) -> None:
    groups = {"missing": missing, "unexpected": extra, "misshapen": misshapen}
    parts = [f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in groups.items() if keys]
    if parts:
        raise CheckpointError(
            f"{source} does not fit the network: {'; '.join(parts)}. Every tensor must be there "
            "with its shape and no other; use weights saved for this config"
        )


def _first(keys: Iterable[str]) -> str:
    listed = list(keys)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _make_tiny(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Components:
    """Random weights, the same on every call; zero-initialized layers are opened up as well."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(TINY_SEED)
        dit, autoencoder = LinearDiT(config.dit), DCAE(config.autoencoder)
        text = MiniLM(config.text, small_tokenizer(config.text.vocabulary))
        controlnet = ControlNet(config.controlnet) if config.controlnet else None
        for network in (dit, autoencoder, controlnet):
            if network is not None:
                _open_zeros(network)
    return Components(
        config=config,
        dit=dit.to(device, dtype).eval(),
        autoencoder=autoencoder.to(device, dtype).eval(),
        text=text.to(device, dtype),
        controlnet=controlnet and controlnet.to(device, dtype).eval(),
        header={"recipe": f"random weights, seed {TINY_SEED}", "config": to_json(config)},
    )


@torch.no_grad()
def _open_zeros(network: nn.Module) -> None:
    """Give every all-zero weight and gate random values, so that each part shows in the output."""
    for name, parameter in network.named_parameters():
        if parameter.ndim and not name.endswith("bias") and not parameter.any():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(std=fan_in**-0.5)
