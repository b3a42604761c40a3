"""An autoencoder scored on a folder; LPIPS against its formula and against torchmetrics' own."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from evaluation.tinies import picture
from numerics import assert_detects, assert_matches
from sana.cli.main import main
from sana.errors import CheckpointError, MissingExtra, NumericsError, RequestError
from sana.evaluation import rebuilt
from sana.evaluation.rebuilt import Task, load_lpips, score_autoencoder
from sana.models.hed import WIDTHS
from sana.models.lpips import Lpips


def vgg_file(path: Path) -> Path:
    """torchvision's vgg16 with random weights: its names, and layers that LPIPS does not use."""
    torch.manual_seed(0)
    tensors, place = {"classifier.0.bias": torch.zeros(3)}, 0
    for widths in WIDTHS:
        for into, out in zip(widths, widths[1:], strict=False):
            scale = math.sqrt(2 / (9 * into))
            tensors[f"features.{place}.weight"] = torch.randn(out, into, 3, 3) * scale
            tensors[f"features.{place}.bias"] = torch.randn(out) * 0.1
            place += 2
        place += 1
    torch.save(tensors, path)
    return path


def torchvision_stub(file: Path) -> types.ModuleType:
    """As much of torchvision as torchmetrics' LPIPS asks for, with the weights of `file`."""
    layers: list[nn.Module] = []
    for widths in WIDTHS:
        for into, out in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(into, out, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    features = nn.Sequential(*layers)
    state = torch.load(file, weights_only=True)
    inner = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
    features.load_state_dict(inner)
    stub = types.ModuleType("torchvision")
    stub.models = types.SimpleNamespace(  # type: ignore[attr-defined]
        vgg16=lambda **_: types.SimpleNamespace(features=features),
        VGG16_Weights=types.SimpleNamespace(DEFAULT=None),
    )
    return stub


def test_lpips_equals_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.functional.image import lpips as theirs

    file = vgg_file(tmp_path / "vgg16.pth")
    module, network = load_lpips(str(file), "cpu")
    assert not network.is_published
    monkeypatch.setitem(sys.modules, "torchvision", torchvision_stub(file))
    monkeypatch.setattr(theirs, "_TORCHVISION_AVAILABLE", True)
    reference = theirs._LPIPS(net="vgg")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 3, 48, 40, generator=generator) * 2 - 1 for _ in range(2))
    expected = reference(first, second).flatten()

    def check(other: Tensor) -> None:
        # Bit-equal on the day of writing.
        assert_matches(expected, module(first, other), 4e-7)

    check(second)
    assert_detects(check, second * 0.99)
    assert (module(first, first) == 0).all()


def test_other_networks_are_no_lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"has no features\.0\.weight"):
        load_lpips(str(path), "cpu")
    assert Lpips().state_dict()["weights.4"].shape == (512,)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingExtra, match=r"sana-torch\[eval\]"):
        load_lpips(str(path), "cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "more/b.png", "c.jpg")):
        picture(number, (80 + 10 * number, 64)).save(folder / name)
    return folder


class Halved(nn.Module):
    """Rebuilds everything at half its contrast; counts what it sees."""

    config = types.SimpleNamespace(factor=32)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.calls = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return pixels * self.scale

    def decode(self, latent: Tensor) -> Tensor:
        return latent


def task(pictures: Path, **more: Any) -> Task:
    output = pictures.parent / "out"
    return Task(**{"model": "tiny", "pictures": pictures, "output": output, "size": 64, **more})


def test_scores_of_a_known_loss(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Halved()
    monkeypatch.setattr(rebuilt, "open_autoencoder", lambda _: model)
    path, text = score_autoencoder(task(pictures))
    record = json.loads(path.read_text())
    psnr, ssim = record["scores"]
    expected = []
    for crop in sorted((path.parent / "crops").rglob("*.png")):
        levels = np.asarray(Image.open(crop)).astype(np.float64)
        errors = np.round((levels / 127.5 - 1) * 0.5 * 127.5 + 127.5) - levels
        expected.append(10 * math.log10(255**2 / (errors**2).mean()))

    def check(values: list[float]) -> None:
        assert psnr["value"] == pytest.approx(np.mean(values), abs=0.01)

    check(expected)
    assert_detects(check, [value + 0.1 for value in expected])
    assert psnr["parts"]["worst"] == pytest.approx(min(expected), abs=0.01)
    assert 0 < ssim["value"] < 1 and record["size"] == 64 and "| PSNR dB " in text
    names = [p.relative_to(path.parent) for p in sorted((path.parent / "rebuilt").rglob("*.png"))]
    assert [str(n) for n in names] == [
        *("rebuilt/a.png.png", "rebuilt/c.jpg.png", "rebuilt/more/b.png.png"),
    ]


def test_a_stopped_run_goes_on(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Halved()
    monkeypatch.setattr(rebuilt, "open_autoencoder", lambda _: model)

    def kill(what: str, done: int, total: int) -> None:
        if model.calls == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_autoencoder(task(pictures), kill)
    score_autoencoder(task(pictures))
    assert model.calls == 3
    with pytest.raises(RequestError, match="holds a run with other size"):
        score_autoencoder(task(pictures, size=96))
    (pictures.parent / "out" / "rebuilt.json").write_text("{")
    with pytest.raises(RequestError, match="cannot be read"):
        score_autoencoder(task(pictures))


def test_nan_and_sizes_are_refused(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="size is 70; tiny takes multiples of 32, so give 64"):
        score_autoencoder(task(pictures, size=70))
    model = Halved()
    model.scale.data.fill_(math.nan)
    monkeypatch.setattr(rebuilt, "open_autoencoder", lambda _: model)
    with pytest.raises(NumericsError, match=r"NaN for .*a\.png"):
        score_autoencoder(task(pictures))
    assert not list((pictures.parent / "out").rglob("*.png"))


def test_lpips_and_rfid_are_named(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sana.evaluation.features import Extractor
    from sana.evaluation.networks import Network
    from sana.evaluation.sight import to_levels

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))[:, :2]

    extractor = Extractor(module=Mean(), label="mean", width=2, prepare=to_levels)
    network = Network(role="features", source="f", path=Path("f"), sha256="f", is_published=False)
    monkeypatch.setattr(rebuilt, "load_extractor", lambda *_, **__: (extractor, network))
    vgg = str(vgg_file(tmp_path / "vgg16.pth"))
    path, _ = score_autoencoder(task(pictures, lpips=vgg, features="f"))
    scores = {score["metric"]: score for score in json.loads(path.read_text())["scores"]}
    assert scores["lpips"]["name"] == "LPIPS-like (vgg16.pth)"
    assert scores["rfid"]["name"] == "Frechet distance (mean)"
    assert scores["lpips"]["value"] > 0
    (pictures / "a.png").unlink()
    with pytest.raises(RequestError, match="holds 2 pictures and rfid needs at least 3"):
        score_autoencoder(task(pictures, features="f", output=tmp_path / "other"))


def test_the_command(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores"
    given = ["evaluate", "autoencoder", "tiny", "--pictures", str(pictures), "--size", "64"]
    assert main([*given, "--output", str(out), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "PSNR dB" in lines[2] and lines[-1] == str(out / "scores.json")
    assert main([*given[:4], str(tmp_path / "none"), "--output", str(out)]) == 2
    assert "is no folder" in capsys.readouterr().err
