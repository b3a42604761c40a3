"""The networks in whatever was given: our folder, a diffusers folder, one component, one file.

Each is told by its tensors (see `detect`), and described by our header, by the config.json beside
it, or by its shapes; where a config.json speaks, it must agree with the shapes. Start reading at
`find_networks`, then `settle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from sana.config import ControlNetConfig, DCAEConfig, DiTConfig, from_json
from sana.errors import CheckpointError
from sana.weights.configs import (
    read_autoencoder,
    read_controlnet,
    read_json,
    read_transformer,
)
from sana.weights.detect import PartKind, describe, find_parts, take_part
from sana.weights.files import HEADER_KEY, parse_header
from sana.weights.folders import OUR_NAME, find_variants, open_weights, transformer_files
from sana.weights.keys import Kind, Layout, NetworkConfig
from sana.weights.tensors import Stored, blank, find_content, open_index

Held: TypeAlias = Mapping[str, Stored | Tensor]
Open: TypeAlias = Callable[[Path], tuple[Held, Mapping[str, str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One network: its tensors under the names of its layout, and what stands beside them."""

    kind: PartKind
    layout: Layout
    tensors: Held
    source: Path
    """The file or the component's folder."""
    data: Mapping[str, Any] | None = None
    """The config.json beside it, in a folder of diffusers' or transformers'."""
    header: Mapping[str, Any] | None = None
    """Our own header, in a file that sana wrote."""


def find_networks(
    path: Path, *, variant: str | None = None, dtype: str = "float32", open: Open | None = None
) -> list[Found]:
    """Every network in a file, in a component's folder, or in a folder of components.

    `open` replaces the reader of single files (`sana convert` reads pickles as well). Raises
    `CheckpointError` when two networks of one kind are found, or none.
    """
    found = []
    for place in _places(path):
        found += open_place(place, variant=variant, dtype=dtype, open=open)
    if path.is_dir() and is_ours(path):
        found.append(_our_transformer(path))
    for kind in {network.kind for network in found}:
        same = [str(network.source) for network in found if network.kind == kind]
        if len(same) > 1:
            raise CheckpointError(
                f"{path} holds {len(same)} networks of the kind {kind} ({', '.join(same)}); give "
                "the one that is meant, or a folder with one of each"
            )
    return found


def open_place(
    place: Path, *, variant: str | None = None, dtype: str = "float32", open: Open | None = None
) -> list[Found]:
    """The networks of one file or of one component's folder."""
    if place.is_dir() or open is None:
        tensors, metadata = open_weights(place, variant=variant, dtype=dtype)
        return _split(place, tensors, metadata)
    return _split(place, *open(place))


def is_ours(folder: Path) -> bool:
    """Whether sana wrote this folder: its transformer's files are numbered at the top."""
    return any(OUR_NAME.fullmatch(file.name) for file in folder.glob("transformer-*.safetensors"))


def _our_transformer(folder: Path) -> Found:
    """The transformer from all its numbered files, which must be of one save."""
    tensors: dict[str, Stored] = {}
    shards = transformer_files(folder)
    first: dict[str, Any] | None = None
    for path in shards:
        part, metadata = open_index(path)
        header = parse_header(path, metadata)
        if first is not None and header != first:
            raise CheckpointError(
                f"{path} and {shards[0].name} come from different saves; all parts must be of one "
                "save; copy the whole folder again"
            )
        first = first or header
        tensors.update(part)
    return Found(kind="transformer", layout="ours", tensors=tensors, source=shards[0], header=first)


def settle(network: Found, like: NetworkConfig | None = None) -> NetworkConfig:
    """The architecture of a transformer, a ControlNet or an autoencoder.

    `like` is a known model's, for what neither a config nor shapes say; its shapes must agree.
    Raises `CheckpointError` when config.json and tensors differ, and when too little is known.
    """
    source = str(network.source)
    own = _of_header(network)
    if own is not None:
        return own
    assert network.kind != "text"
    said = like
    if network.data is not None:
        said = READERS[network.kind](network.data, f"{source}/config.json")
    seen = describe(_meta(network.tensors), network.kind, network.layout, source, like=said)
    if said is None:
        if isinstance(seen, DCAEConfig) and seen.latent_scale == (1.0,):
            raise CheckpointError(
                f"{source} is an autoencoder whose latent scale no shape shows; give a folder with "
                "its config.json, or say which model it is like"
            )
        return seen
    differing = _differences(said, seen)
    if differing:
        name = "its config.json" if network.data is not None else "the model it should be like"
        raise CheckpointError(
            f"{source}: {name} and the tensors disagree: {'; '.join(differing)}; they must be of "
            "one model: copy the folder again"
        )
    return said


def _of_header(network: Found) -> NetworkConfig | None:
    """From the config in our own header."""
    config = (network.header or {}).get("config")
    if not isinstance(config, dict) or network.kind == "text":
        return None
    field, kind = HEADER_FIELDS[network.kind]
    data = config.get(field)
    return from_json(kind, data) if isinstance(data, dict) else None


def _places(path: Path) -> list[Path]:
    """The files and component folders to open."""
    if not path.exists():
        raise CheckpointError(f"{path} is not there; give a model's folder or a weight file")
    if not path.is_dir() or find_variants(path):
        return [path]
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir()]
    index = path / "model_index.json"
    if index.is_file():
        listed = read_json(index)
        folders = [folder for folder in folders if folder.name in listed]
    places = [folder for folder in folders if find_variants(folder)]
    loose = sorted(path.glob("*.safetensors"))
    places += [file for file in loose if not OUR_NAME.fullmatch(file.name) and not _is_text(file)]
    if not places and not is_ours(path):
        pickled = [folder for folder in [path, *folders] if any(folder.glob("*.bin"))]
        if pickled:
            open_weights(pickled[0])
        raise CheckpointError(
            f"{path} has no transformer-00001-of-0000N.safetensors, no other safetensors file and "
            "no component folder; a model is a folder of ours or diffusers': train it, or give "
            "another folder"
        )
    return places


def _is_text(file: Path) -> bool:
    """Our packed text encoder, which has its own reader."""
    return find_content(file) == "safetensors" and "text" in own_header(file)


def own_header(file: Path) -> dict[str, Any]:
    """The header of a file that sana wrote; empty for any other."""
    metadata = open_index(file)[1]
    return parse_header(file, metadata) if HEADER_KEY in metadata else {}


def _split(place: Path, tensors: Held, metadata: Mapping[str, str]) -> list[Found]:
    file = place / "config.json"
    data = read_json(file) if place.is_dir() and file.is_file() else None
    header = parse_header(place, metadata) if HEADER_KEY in metadata else None
    parts = find_parts(tensors, str(place))
    return [
        Found(
            kind=part.kind,
            layout=part.layout,
            tensors=take_part(tensors, part, parts),
            source=place,
            # What lies beside NVIDIA's own files has other fields, and says nothing more.
            data=data if part.layout == "diffusers" else None,
            header=header,
        )
        for part in parts
    ]


def _meta(tensors: Held) -> dict[str, Tensor]:
    return {
        name: value.to("meta") if isinstance(value, Tensor) else blank({name: value})[name]
        for name, value in tensors.items()
    }


def _differences(said: NetworkConfig, seen: NetworkConfig) -> list[str]:
    """What both can know, and know differently."""
    if isinstance(said, ControlNetConfig) and isinstance(seen, ControlNetConfig):
        dits = _compare(said.dit, seen.dit, DIT_FIELDS - {"depth"})
        return _compare(said, seen, {"depth"}) + dits
    if isinstance(said, DiTConfig):
        return _compare(said, seen, DIT_FIELDS)
    assert isinstance(said, DCAEConfig) and isinstance(seen, DCAEConfig)
    differing = _compare(said, seen, {"latent_channels", "down", "up"})
    for side in ("encoder", "decoder"):
        ours, theirs = getattr(said, side), getattr(seen, side)
        if len(ours) != len(theirs):
            return [f"{side} has {len(ours)} stages there and {len(theirs)} here"]
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            fields = {"depth"} if not one.depth else {"depth", "width", "block", "scales", "norm"}
            differing += [f"{side} {index} {text}" for text in _compare(one, other, fields)]
    return differing


READERS: Mapping[Kind, Callable[[Mapping[str, Any], str], NetworkConfig]] = {
    "transformer": read_transformer,
    "controlnet": read_controlnet,
    "autoencoder": read_autoencoder,
}
HEADER_FIELDS: Mapping[Kind, tuple[str, type[NetworkConfig]]] = {
    "transformer": ("dit", DiTConfig),
    "controlnet": ("controlnet", ControlNetConfig),
    "autoencoder": ("autoencoder", DCAEConfig),
}
DIT_FIELDS = {
    "width",
    "depth",
    "text_dim",
    "latent_channels",
    "patch_size",
    "mlp_width",
    "qk_norm",
    "guidance_embedding",
}


def _compare(said: Any, seen: Any, fields: Iterable[str]) -> list[str]:
    return [
        f"{name} {getattr(said, name)} and {getattr(seen, name)}"
        for name in sorted(fields)
        if getattr(said, name) != getattr(seen, name)
    ]
