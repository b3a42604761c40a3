"""Conversion in every direction: identity on bytes, strict, atomic, deaf to what pickles ask."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from numerics import assert_detects
from sana.config import ControlNetConfig, DCAEConfig, DiTConfig
from sana.errors import CheckpointError, RequestError
from sana.presets import PRESETS, preset
from sana.weights import convert as conversion
from sana.weights import detect, files, keys, layouts, load, tensors
from sana.weights.convert import convert
from sana.weights.locate import find_networks, settle
from weights.networks import ALL, BASE, DCAES, DITS, peer, random_tensors
from weights.pipelines import save_pipeline
from weights.test_tensors import pickles

EVERY = pytest.mark.parametrize("name", ALL)


def read_all(path: Path) -> dict[str, Tensor]:
    [found] = find_networks(path)
    return {
        name: tensors.read(value) if isinstance(value, tensors.Stored) else value
        for name, value in found.tensors.items()
    }


def assert_same_bytes(reference: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    assert got.keys() == reference.keys()
    for name, tensor in reference.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        whole = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, got[name])]
        assert torch.equal(*whole), name


def original_file(config: keys.NetworkConfig, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """As NVIDIA publishes it: a pickle with a base's blocks and unused tensors, or efficientvit's.

    Weights are in fp16 and hold a NaN's bits and a negative zero, that only a copy keeps.
    """
    theirs = keys.from_ours(random_tensors(config), "original", config)
    theirs = {n: t.half() if t.is_floating_point() else t for n, t in theirs.items()}
    first = next(iter(theirs.values())).view(-1)
    first[0], first[1] = float("nan"), -0.0
    if isinstance(config, DCAEConfig):
        path = folder / "model.safetensors"
        safetensors.torch.save_file({n: t.contiguous() for n, t in theirs.items()}, path)
        return path, theirs
    extra = {"pos_embed": torch.zeros(1, 64, 64), "y_embedder.y_embedding": torch.zeros(3, 24)}
    if isinstance(config, ControlNetConfig):
        base = keys.from_ours(random_tensors(config.dit), "original", config.dit)
        extra |= {n: t for n, t in base.items() if n not in theirs}
    path = folder / "model.pth"
    torch.save({"state_dict": {**theirs, **extra}, "epoch": 3}, path)
    return path, theirs


@pytest.fixture
def known_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if these sizes were official."""
    heads = {config.width: config.cross_heads for config in DITS.values()}
    monkeypatch.setattr(detect, "CROSS_HEADS", heads)


@EVERY
@pytest.mark.usefixtures("known_heads")
def test_original_to_ours_to_diffusers_to_ours(name: str, tmp_path: Path) -> None:
    config = ALL[name]
    like = config if isinstance(config, DCAEConfig) else None
    path, theirs = original_file(config, tmp_path)
    if isinstance(config, DCAEConfig):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conversion, "_like", lambda *_: like)
            convert(path, tmp_path / "ours", to="ours")
    else:
        convert(path, tmp_path / "ours", to="ours")
    file = next((tmp_path / "ours").iterdir())
    first = read_all(tmp_path / "ours")
    assert_same_bytes(keys.to_ours(theirs, "original"), first)
    convert(tmp_path / "ours", tmp_path / "theirs", to="diffusers")
    convert(tmp_path / "theirs", tmp_path / "again", to="ours")
    second = read_all(tmp_path / "again")
    assert_same_bytes(first, second)
    name_of_one = next(iter(first))
    changed = second | {name_of_one: second[name_of_one] + 1}
    assert_detects(lambda got: assert_same_bytes(first, got), changed)
    assert (tmp_path / "again" / file.name).is_file()
    [found] = find_networks(tmp_path / "again")
    plain = settle(find_networks(tmp_path / "ours")[0])
    assert settle(found) == plain


@EVERY
@pytest.mark.parametrize("to", ["original", "single-file"])
def test_ours_to_files_and_back(
    name: str, to: conversion.Format, tmp_path: Path, known_heads: None
) -> None:
    """The header of a single file keeps even what NVIDIA's own files do not say."""
    config = ALL[name]
    ours = tmp_path / "ours.safetensors"
    state = random_tensors(config)
    field = layouts.FIELDS[keys.kind_of(config)]
    header = {"config": {field: layouts.to_json(config)}}
    ours.write_bytes(files.to_bytes(state, header))
    is_pickle = to == "original" and not isinstance(config, DCAEConfig)
    target = tmp_path / f"target.{'pth' if is_pickle else 'safetensors'}"
    report = convert(ours, target, to=to)
    assert report.files == [target] and target.stat().st_size == report.size
    if is_pickle:
        held = torch.load(target, weights_only=True)["state_dict"]
        assert ("pos_embed" in held) == isinstance(config, DiTConfig)
    if to == "original" and isinstance(config, DCAEConfig):
        assert_same_bytes(state, keys.to_ours(read_all(target), "original"))
        return
    convert(target, tmp_path / "back", to="ours")
    assert_same_bytes(state, read_all(tmp_path / "back"))
    if to == "single-file":
        assert settle(find_networks(target)[0]) == config


@pytest.mark.parity
@pytest.mark.parametrize("name", ["normed", "sprint", "patched", "controlnet", "sana", "lite"])
def test_diffusers_reads_what_is_written(name: str, tmp_path: Path) -> None:
    import diffusers

    config = ALL[name]
    classes: dict[str, Any] = {
        "transformer": diffusers.SanaTransformer2DModel,
        "controlnet": diffusers.SanaControlNetModel,
        "autoencoder": diffusers.AutoencoderDC,
    }
    network: Any = peer(config)
    network.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", to="ours")
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    read = classes[keys.kind_of(config)].from_pretrained(tmp_path / "back")
    assert_same_bytes(network.state_dict(), read.state_dict())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    for key, value in written.items():
        if not key.startswith("_") and key != "sample_size":
            assert _plain(read.config[key]) == _plain(value) == _plain(network.config[key]), key


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parity
def test_a_whole_pipeline_goes_round(tmp_path: Path) -> None:
    """diffusers -> ours -> diffusers, and single files with the rest beside them."""
    import diffusers

    pipeline = save_pipeline(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", to="ours")
    first = load.load(tmp_path / "ours")
    assert first.config == load.load(tmp_path / "theirs").config
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    kind: Any = diffusers.SanaPipeline
    back = kind.from_pretrained(tmp_path / "back")
    for name in ("transformer", "vae", "text_encoder"):
        before, after = getattr(pipeline, name), getattr(back, name)
        assert_same_bytes(before.state_dict(), after.state_dict())
    assert back.scheduler.config.flow_shift == pipeline.scheduler.config.flow_shift
    assert back.tokenizer("a fox").input_ids == pipeline.tokenizer("a fox").input_ids
    report = convert(tmp_path / "ours", tmp_path / "loose", to="single-file")
    assert tmp_path / "loose" / "transformer.safetensors" in report.files
    for path in (tmp_path / "loose", tmp_path / "loose" / "transformer.safetensors"):
        again = load.load(path)
        assert_same_bytes(first.dit.state_dict(), again.dit.state_dict())
        assert again.text.encode(["a"]).states.equal(first.text.encode(["a"]).states)


def test_our_own_models(tmp_path: Path) -> None:
    """With their packed text; what diffusers cannot hold is said."""
    from sana.weights.save import save

    tiny = load.load("tiny")
    save(
        tmp_path / "tiny",
        config=tiny.config,
        dit=tiny.dit,
        autoencoder=tiny.autoencoder,
        text=tiny.text,  # type: ignore[arg-type]
        dtype=torch.float32,
    )
    convert(tmp_path / "tiny", tmp_path / "half", to="ours", dtype=torch.bfloat16)
    got = load.load(tmp_path / "half")
    assert got.config == tiny.config
    wanted = tiny.dit.state_dict()["blocks.0.attention.qkv.weight"].bfloat16().float()
    assert torch.equal(got.dit.state_dict()["blocks.0.attention.qkv.weight"], wanted)
    with pytest.raises(CheckpointError, match="MiniLM, which no pipeline of diffusers"):
        convert(tmp_path / "tiny", tmp_path / "x", to="diffusers")
    with pytest.raises(CheckpointError, match="has a refiner"):
        convert(
            tmp_path / "tiny" / "transformer-00001-of-00001.safetensors",
            tmp_path / "x",
            to="diffusers",
        )
    convert(tmp_path / "tiny" / "autoencoder.safetensors", tmp_path / "vae", to="diffusers")
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("known_heads")
def test_an_official_file_gets_the_whole_models_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lone transformer of a published size becomes a folder that awaits its other networks."""
    official = preset("sana-1600m-2048")
    small = dataclasses.replace(BASE, position_scale=1.0, position_base=64)
    text = dataclasses.replace(official.config.text, width=small.text_dim)
    config = dataclasses.replace(official.config, dit=small, autoencoder=DCAES["sana"], text=text)
    monkeypatch.setitem(PRESETS, config.name, dataclasses.replace(official, config=config))
    theirs = keys.from_ours(random_tensors(small), "original", small)
    theirs["pos_embed"] = torch.zeros(1, 64 * 64, small.width)
    torch.save(theirs, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "ours", to="ours")
    [found] = find_networks(tmp_path / "ours")
    assert found.header is not None and found.header["config"]["name"] == config.name
    assert found.header["config"]["dit"]["attention_eps"] == 1e-8, "by NVIDIA's convention"
    with pytest.raises(CheckpointError, match="has no weight file|there is no weight file"):
        load.load(tmp_path / "ours")


@pytest.mark.parametrize("kind", ["zip", "legacy", *(f"protocol {n}" for n in range(1, 6))])
def test_a_pickle_that_would_act_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "model.pth"
    path.write_bytes(pickles(trace)[kind])
    with pytest.raises(
        CheckpointError, match="asks for more than tensors.*nothing of it was run"
    ) as e:
        convert(path, tmp_path / "ours", to="ours")
    assert not trace.exists() and not (tmp_path / "ours").exists()
    assert "\n" not in str(e.value) and "weights_only=False" not in str(e.value)


@pytest.mark.parametrize("kind", ["cut", "numbers", "nothing", "text"])
def test_pickles_without_a_network(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": 1} if kind == "numbers" else {"state_dict": {}}, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    if kind == "text":
        path.write_text("hello, this is no torch file")
    message = {
        "cut": "cannot be read as a torch file",
        "numbers": "holds no network .it holds a.",
        "nothing": "holds no network",
        "text": "does not begin with a header",
    }[kind]
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "ours", to="ours")


def test_only_convert_and_metrics_networks_read_pickles() -> None:
    source = Path(conversion.__file__).parents[1]
    users = [
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if "read_pickle" in path.read_text() and path.name != "pickles.py"
    ]
    assert sorted(users) == ["evaluation/networks.py", "weights/convert.py"]


@pytest.mark.usefixtures("known_heads")
def test_faults_are_found_before_anything_is_written(tmp_path: Path) -> None:
    config = DITS["normed"]
    path, theirs = original_file(config, tmp_path)
    del theirs["blocks.1.attn.proj.bias"]
    torch.save({"state_dict": theirs}, path)
    target = tmp_path / "ours"
    with pytest.raises(CheckpointError, match="1 missing: blocks.1.attn.proj.bias"):
        convert(path, target, to="ours")
    path, theirs = original_file(config, tmp_path)
    torch.save({"state_dict": {**theirs, "surplus.weight": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="1 unexpected: surplus.weight"):
        convert(path, target, to="ours")
    assert not target.exists()
    big = {n: t.float().nan_to_num() for n, t in theirs.items()}
    big["final_layer.linear.bias"][0] = 1e6
    torch.save(big, path)
    with pytest.raises(CheckpointError, match="output.bias reaches 1e.06 and torch.float16 holds"):
        convert(path, target, to="ours", dtype=torch.float16)
    with pytest.raises(RequestError, match="'int4' is no dtype"):
        conversion.parse_dtype("int4")
    assert conversion.parse_dtype(None) is None and conversion.parse_dtype("bf16") is torch.bfloat16
    with pytest.raises(RequestError, match="give it a name that ends in .pth"):
        convert(path, target, to="original")
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.usefixtures("known_heads")
def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = original_file(DITS["1600m"], tmp_path)
    target = tmp_path / "a" / "b"
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match="needs .* MB and its disk has 0.0 MB free"):
            convert(path, target, to="ours")
    assert not target.parent.exists()

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file
            self.left = 20_000

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> None:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(data)

    real = layouts.file_writer
    with monkeypatch.context() as patch:
        patch.setattr(
            layouts,
            "file_writer",
            lambda *a: lambda file: real(*a)(Full(file)),  # type: ignore[arg-type]
        )
        with pytest.raises(CheckpointError, match="No space left.*no file was left half-written"):
            convert(path, target, to="ours")
    assert not list(target.iterdir())
    convert(path, target, to="ours")
    with pytest.raises(RequestError, match="is already there; nothing is overwritten"):
        convert(path, target, to="ours")


@pytest.mark.usefixtures("known_heads")
def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "SHARD_BYTES", 100_000)
    path, theirs = original_file(DITS["1600m"], tmp_path)
    report = convert(path, tmp_path / "theirs", to="diffusers")
    parts = [file for file in report.files if file.suffix == ".safetensors"]
    assert len(parts) > 2 and all(file.stat().st_size < 130_000 for file in parts[:-1])
    again = keys.to_ours(read_all(tmp_path / "theirs"), "diffusers")
    assert_same_bytes(keys.to_ours(theirs, "original"), again)


def test_equal_input_gives_equal_bytes_and_aligned_tensors(tmp_path: Path) -> None:
    config = DCAES["imagenet"]
    network: Any = peer(config)
    network.save_pretrained(tmp_path / "theirs")
    for name in ("one", "two"):
        convert(tmp_path / "theirs", tmp_path / name, to="ours")
    one, two = (tmp_path / name / "autoencoder.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    for stored in tensors.open_index(one)[0].values():
        assert stored.start % stored.dtype.itemsize == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sana.cli.main import main

    network: Any = peer(DITS["normed"])
    network.save_pretrained(tmp_path / "theirs")
    source, target = str(tmp_path / "theirs"), str(tmp_path / "x.safetensors")
    assert main(["convert", source, target, "--to", "single-file", "--dtype", "bf16"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == target and "transformer: read as diffusers" in err
    assert {t.dtype for t in read_all(Path(target)).values()} == {torch.bfloat16}
    assert main(["convert", source, target, "--to", "single-file"]) == 2
    assert "already there" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), target, "--to", "ours"]) == 1
    assert "is not there" in capsys.readouterr().err
    assert main(["convert", source, target, "--to", "gguf"]) == 2
