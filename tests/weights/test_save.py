"""Saving: round trips, nothing half-written, values that do not fit, packing is stable."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from numerics import assert_detects, assert_matches
from sana.errors import CheckpointError
from sana.weights import files, save
from sana.weights.load import Components, load, load_text
from sana.weights.packing import pack, unpack


@pytest.fixture(scope="module")
def tiny() -> Components:
    return load("tiny")


def save_all(tiny: Components, folder: Path, dtype: torch.dtype = torch.float16) -> list[Path]:
    return save.save(
        folder,
        config=tiny.config,
        dit=tiny.dit,
        autoencoder=tiny.autoencoder,
        text=tiny.text,
        dtype=dtype,
        recipe={"steps": 3},
        quality={"psnr": 38.5},
    )


def test_round_trip_is_exact_in_float32(tiny: Components, tmp_path: Path) -> None:
    save_all(tiny, tmp_path, torch.float32)
    loaded = load(tmp_path)
    assert loaded.config == tiny.config
    assert loaded.header["recipe"] == {"steps": 3} and loaded.header["quality"] == {"psnr": 38.5}
    for name in ("dit", "autoencoder"):
        before, after = getattr(tiny, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not getattr(loaded, name).training


def test_half_storage_loads_in_any_dtype(tiny: Components, tmp_path: Path) -> None:
    save_all(tiny, tmp_path)
    loaded = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.dit.parameters()} == {torch.bfloat16}
    wide = load(tmp_path)
    latent = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    wanted = tiny.autoencoder.decode(latent).detach()

    def check(network: nn.Module) -> None:
        assert_matches(wanted, network.decode(latent).detach(), 2e-3)  # floor 2.4e-04

    check(wide.autoencoder)
    with torch.no_grad():
        next(wide.autoencoder.decoder.parameters()).mul_(1.1)
    assert_detects(check, wide.autoencoder)


def test_partial_save_keeps_the_rest(tiny: Components, tmp_path: Path) -> None:
    save_all(tiny, tmp_path)
    before = (tmp_path / "text.safetensors").read_bytes()
    [path] = save.save(tmp_path, config=tiny.config, autoencoder=tiny.autoencoder.state_dict())
    assert path.name == "autoencoder.safetensors"
    assert (tmp_path / "text.safetensors").read_bytes() == before
    load(tmp_path)


def test_shards(tiny: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save.split, "__defaults__", (60_000,))
    paths = save_all(tiny, tmp_path)
    parts = [path for path in paths if path.name.startswith("transformer")]
    assert len(parts) > 2 and parts[0].name == f"transformer-00001-of-{len(parts):05d}.safetensors"
    load(tmp_path)
    monkeypatch.undo()
    save.save(tmp_path, config=tiny.config, dit=tiny.dit)
    assert len(list(tmp_path.glob("transformer-*"))) == 1, "parts of the earlier save are removed"
    load(tmp_path)


def test_split_respects_the_limit() -> None:
    sizes = (10, 900, 300_000, 5, 90_000, 90_000)
    tensors = {str(i): torch.zeros(size) for i, size in enumerate(sizes)}
    parts = save.split(tensors, 400_000)
    assert [name for part in parts for name in part] == list(tensors)
    for part in parts:
        size = sum(4 * tensor.numel() for tensor in part.values())
        assert size <= 400_000 or len(part) == 1


@pytest.mark.parametrize("value", [70_000.0, float("nan"), float("inf")])
def test_values_that_do_not_fit(tmp_path: Path, tiny: Components, value: float) -> None:
    tensors = {name: tensor.clone() for name, tensor in tiny.dit.state_dict().items()}
    tensors["output.weight"][0, 0] = value
    with pytest.raises(CheckpointError, match=r"output.weight reaches .* 65504"):
        save.save(tmp_path, config=tiny.config, dit=tensors)
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_nothing(
    tiny: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(tiny, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*MB are needed.*MB are free"):
        save_all(tiny, tmp_path, torch.float32)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_that_is_a_file(tiny: Components, tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.write_text("x")
    with pytest.raises(CheckpointError, match="cannot write .*taken"):
        save_all(tiny, target)
    assert target.read_text() == "x"


def test_header_takes_dataclasses_and_refuses_unknown_fields(
    tiny: Components, tmp_path: Path
) -> None:
    [path] = save.save(tmp_path, config=tiny.config, dit=tiny.dit, recipe=tiny.config.sampling)
    recipe = files.read_header(path)["recipe"]
    assert recipe == json.loads(json.dumps(dataclasses.asdict(tiny.config.sampling)))
    with pytest.raises(AssertionError, match="unknown header fields"):
        save.save(tmp_path, config=tiny.config, dit=tiny.dit, recipes=1)


def test_integer_buffers_are_kept(tiny: Components, tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(3)
    norm.num_batches_tracked.fill_(70_001)
    [path] = save.save(tmp_path, config=tiny.config, autoencoder=norm)
    _, tensors, _ = files.read_file(path)
    assert tensors["num_batches_tracked"].dtype == torch.int64
    assert tensors["num_batches_tracked"] == 70_001
    assert tensors["weight"].dtype == torch.float16


@pytest.mark.parametrize("columns", [384, 100, 64])
def test_packing(columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = 1100
    matrix = torch.randn(rows, columns, generator=generator) * torch.linspace(0.1, 2, rows)[:, None]
    matrix[7] = 0
    tensors = {"m": matrix, "small": matrix[:3], "bias": matrix[0], "count": torch.tensor(5)}
    packed = pack(tensors)
    assert packed["m"].dtype == torch.int8 and packed["small"].dtype == torch.float16
    again = unpack(packed, "test")
    assert again.keys() == tensors.keys()

    def check(got: Tensor) -> None:
        assert_matches(matrix, got, 2e-2)  # floor 6.7e-03

    check(again["m"])
    assert_detects(check, again["m"].roll(1, dims=0))
    repacked = pack(again)
    assert all(torch.equal(packed[name], repacked[name]) for name in packed)


def test_packed_text_stays_the_same_through_save_and_load(tiny: Components, tmp_path: Path) -> None:
    save.save(tmp_path / "a", config=tiny.config, text=tiny.text)
    save.save(tmp_path / "b", config=tiny.config, text=load_text(tmp_path / "a"))
    first, second = (tmp_path / name / "text.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_temporary_names_are_hidden_and_gone(tmp_path: Path) -> None:
    files.write_whole({tmp_path / "x" / "one": b"1", tmp_path / "two": b"2"})
    assert sorted(os.listdir(tmp_path)) == ["two", "x"] and os.listdir(tmp_path / "x") == ["one"]
