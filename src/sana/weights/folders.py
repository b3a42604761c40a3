"""Weight files of one component in a Hugging Face folder: shards, their index, and variants.

`<base>[.<variant>].safetensors`, or `<base>[.<variant>]-0000i-of-0000N.safetensors` with
`<base>.safetensors.index[.<variant>].json`, where base is diffusion_pytorch_model (diffusers) or
model (transformers). Start reading at `open_weights`.
"""

from __future__ import annotations

import re
from pathlib import Path

from sana.errors import CheckpointError
from sana.weights.configs import read_json
from sana.weights.tensors import Stored, open_index

NAME = re.compile(
    r"(?P<base>diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?"
    r"(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?\.safetensors"
)
OUR_NAME = re.compile(r"transformer-(\d{5})-of-(\d{5})\.safetensors")
SUITED = {"float16": "fp16", "bfloat16": "bf16"}
"""The variant to prefer for a dtype, when there is one and none was asked for."""


def open_weights(
    path: Path, *, variant: str | None = None, dtype: str = "float32"
) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of a component: one file, or a folder with all parts of one variant.

    `dtype` (as in torch, without "torch.") decides between variants when `variant` does not. The
    second result is the metadata of a single file. Raises `CheckpointError` for a missing part, an
    index that disagrees with its files, and a variant that is not there.
    """
    if not path.is_dir():
        return open_index(path)
    files = weight_files(path, variant=variant, dtype=dtype)
    if len(files) == 1:
        return open_index(files[0])
    tensors: dict[str, Stored] = {}
    for file in files:
        part, _ = open_index(file)
        twice = sorted(part.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{file} holds {twice[0]}, which {tensors[twice[0]].path.name} holds as well; all "
                "parts must be of one save: copy the folder again"
            )
        tensors.update(part)
    _check_index(path, files, tensors)
    return tensors, {}


def weight_files(path: Path, *, variant: str | None = None, dtype: str = "float32") -> list[Path]:
    """The files of one variant, complete and in order."""
    found = find_variants(path)
    if not found:
        raise _none(path)
    if variant is not None and variant not in found:
        raise CheckpointError(
            f"{path} has no variant {variant!r}; it has {_listed(found)}: ask for one of them"
        )
    if variant is None:
        suited = SUITED.get(dtype, "")
        variant = next((name for name in (suited, "") if name in found), min(found))
    return _complete(path, found[variant])


def find_variants(path: Path) -> dict[str, list[Path]]:
    """The weight files of a folder by variant; "" is the one without a name."""
    found: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*.safetensors")):
        match = NAME.fullmatch(file.name)
        if match:
            found.setdefault(match["variant"] or "", []).append(file)
    return found


def transformer_files(folder: Path) -> list[Path]:
    """All numbered parts in order; a gap or parts of two saves are a `CheckpointError`."""
    found = {}
    for path in folder.glob("transformer-*.safetensors"):
        match = OUR_NAME.fullmatch(path.name)
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


def _complete(path: Path, files: list[Path]) -> list[Path]:
    """One unnumbered file, or all of the numbered ones."""
    numbered: dict[int, set[int]] = {}
    for file in files:
        match = NAME.fullmatch(file.name)
        assert match is not None
        if match["count"] is None:
            return [file]
        numbered.setdefault(int(match["count"]), set()).add(int(match["number"]))
    count, numbers = next(iter(numbered.items()))
    missing = sorted(set(range(1, count + 1)) - numbers)
    if len(numbered) > 1 or missing:
        fault = f"lacks part {missing[0]} of {count}" if missing else "mixes parts of two saves"
        raise CheckpointError(
            f"{path} {fault} (found {', '.join(file.name for file in files)}); all parts of one "
            "save are needed: copy the folder again"
        )
    return files


def _check_index(path: Path, files: list[Path], tensors: dict[str, Stored]) -> None:
    """An index, where there is one, must name the same tensors in the same files."""
    match = NAME.fullmatch(files[0].name)
    assert match is not None
    suffix = f".{match['variant']}" if match["variant"] else ""
    index = path / f"{match['base']}.safetensors.index{suffix}.json"
    if not index.is_file():
        return
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{index} has no weight_map; copy the folder again")
    places = {name: stored.path.name for name, stored in tensors.items()}
    wrong = sorted(name for name in listed.keys() | places if listed.get(name) != places.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{index} says that {name} is in {listed.get(name, 'no file')}, and it is in "
            f"{places.get(name, 'no file')} ({len(wrong)} such tensors); copy the folder again"
        )


def _none(path: Path) -> CheckpointError:
    pickled = sorted(file.name for kind in ("*.bin", "*.pth", "*.pt") for file in path.glob(kind))
    if pickled:
        return CheckpointError(
            f"{path} has its weights as pickles only ({', '.join(pickled[:3])}), and opening one "
            "can run any code; get the safetensors files, or use `sana convert` on the file"
        )
    return CheckpointError(
        f"{path} has no diffusion_pytorch_model.safetensors or model.safetensors, whole or in "
        "parts; copy the whole folder again"
    )


def _listed(found: dict[str, list[Path]]) -> str:
    return ", ".join(repr(name) if name else "one without a name" for name in sorted(found))
