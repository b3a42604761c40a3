"""Fetching: only what is read, size and licences first, offline from the cache; on a local hub."""

from __future__ import annotations

import dataclasses
import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

from gemmas import TINY
from sana.config import ControlNetConfig, with_reference
from sana.errors import RequestError
from sana.presets import PRESETS, Preset, preset
from sana.weights import detect, hub, keys, load
from weights.networks import DCAES, random_tensors
from weights.pipelines import DIT, save_pipeline

NAME = "sana-small"
GB = 10**9


class Hub:
    """Repositories in a folder, and a cache that holds whole files only."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root / "hub", root / "cache"
        self.asked: list[tuple[str, ...]] = []
        self.error: Exception | None = None

    def model_info(self, repository: str, files_metadata: bool) -> Any:
        assert files_metadata
        if self.error is not None:
            raise self.error
        place = self.root / repository
        files = [path for path in sorted(place.rglob("*")) if path.is_file()]
        siblings = [
            SimpleNamespace(rfilename=path.relative_to(place).as_posix(), size=path.stat().st_size)
            for path in files
        ]
        return SimpleNamespace(sha="abc", siblings=siblings)

    def snapshot_download(
        self,
        repository: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        target = self.cache / repository
        if local_files_only:
            if not target.is_dir():
                raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
            return str(target)
        assert revision == "abc" and allow_patterns
        self.asked.append(tuple(allow_patterns))
        for path in (self.root / repository).rglob("*"):
            name = path.relative_to(self.root / repository).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
        return str(target)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import diffusers

    assert diffusers.SanaPipeline is not None  # brings in all of it before its hub is replaced
    made = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return made


@pytest.fixture
def model(fake: Hub, monkeypatch: pytest.MonkeyPatch) -> Preset:
    """An official model of a small size, whose repository holds more than is read."""
    base = preset("sana-600m-1024")
    fields = {name: getattr(TINY, name) for name in ("width", "layers", "heads", "mlp_width")}
    text = dataclasses.replace(base.config.text, vocabulary=TINY.vocabulary, **fields)
    config = dataclasses.replace(
        base.config,
        name=NAME,
        dit=dataclasses.replace(DIT, clamps=True),
        autoencoder=dataclasses.replace(DCAES["sana"], latent_scale=(1.0,)),
        text=text,
    )
    made = dataclasses.replace(base, config=with_reference(config, "nvidia"), source="owner/Small")
    monkeypatch.setitem(PRESETS, NAME, made)
    folder = fake.root / "owner" / "Small_diffusers"
    save_pipeline(folder)
    save_pipeline(folder, variant="fp16")
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "asset").mkdir()
    (folder / "asset" / "logo.png").write_text("x" * 1000)
    (folder / "transformer" / "training.bin").write_text("x")
    return made


def test_the_files_of_a_repository() -> None:
    sizes = {
        "model_index.json": 1,
        "README.md": 1,
        "LICENSE": 1,
        "transformer/config.json": 1,
        "transformer/diffusion_pytorch_model.safetensors.index.json": 1,
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": 4 * GB,
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": 2 * GB,
        "transformer/diffusion_pytorch_model.fp16.safetensors": 3 * GB,
        "transformer/pytorch_model.bin": 3 * GB,
        "vae/config.json": 1,
        "vae/diffusion_pytorch_model.safetensors": GB,
        "text_encoder/model.bf16-00001-of-00002.safetensors": GB,
        "text_encoder/model.bf16-00002-of-00002.safetensors": GB,
        "text_encoder/model.safetensors.index.bf16.json": 1,
        "tokenizer/tokenizer.json": 1,
        "tokenizer/evil.py": 1,
    }
    small = {"model_index.json", "LICENSE", "transformer/config.json", "vae/config.json"}
    rest = {
        "vae/diffusion_pytorch_model.safetensors",
        *(name for name in sizes if name.startswith("text_encoder/")),
        "tokenizer/tokenizer.json",
    }
    half = hub.choose_files(sizes, "fp16")
    single = {"transformer/diffusion_pytorch_model.fp16.safetensors"}
    assert set(half) == small | rest | single and sum(half.values()) == 6 * GB + 6
    whole = hub.choose_files(sizes, "bf16")
    shards = {n for n in sizes if "transformer/diffusion_pytorch_model" in n} - single
    assert set(whole) == small | rest | shards
    with pytest.raises(RequestError, match="no safetensors of its vae"):
        hub.choose_files({n: s for n, s in sizes.items() if not n.startswith("vae")}, "fp16")


def test_a_model_is_fetched_and_loaded(
    fake: Hub, model: Preset, caplog: pytest.LogCaptureFixture
) -> None:
    got = load.load(NAME)
    assert got.config == model.config, "with the shift that the scheduler's file has lost"
    assert got.config.sampling.shift == 4.0
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{NAME}: 1") and "GB in all, from owner/Small_diffusers" in line
    assert "text encoder: Gemma Terms of Use" in line and "transformer: NSCL" in line
    names = {p.relative_to(fake.cache).as_posix() for p in fake.cache.rglob("*") if p.is_file()}
    place = "owner/Small_diffusers"
    assert f"{place}/transformer/diffusion_pytorch_model.fp16.safetensors" in names
    assert f"{place}/LICENSE.txt" in names
    for absent in ("logo.png", "training.bin", "transformer/diffusion_pytorch_model.safetensors"):
        assert not any(name.endswith(absent) for name in names)
    assert load.load(NAME, reference="diffusers").config.sampling.shift == 3.0


def test_offline(fake: Hub, model: Preset) -> None:
    with pytest.raises(RequestError, match="was never fetched to this computer.*without --offline"):
        load.find_model(NAME, is_offline=True)
    online = load.find_model(NAME)
    fake.error = AssertionError("asked while offline")
    assert load.find_model(NAME, is_offline=True) == online
    assert load.find_model("tiny", is_offline=True) == "tiny"
    assert isinstance(load.find_model("sticker-512", is_offline=True), load.Place)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OSError("no route to host"),
        lambda: __import__("httpx").ConnectError("no name"),
        lambda: huggingface_hub.errors.HFValidationError("bad"),
        lambda: OSError(""),
    ],
)
def test_a_hub_that_fails(fake: Hub, model: Preset, make: Callable[[], Exception]) -> None:
    fake.error = make()
    with pytest.raises(RequestError, match="cannot be fetched from owner/Small_diff.*offline"):
        load.load(NAME)


def test_a_controlnet_is_converted_once(
    fake: Hub, model: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model.config
    control = ControlNetConfig(dit=dataclasses.replace(base.dit, qk_norm=False), depth=1)
    config = dataclasses.replace(base, name="sana-small-hed", controlnet=control)
    known = dataclasses.replace(model, config=config, control_source="owner/Hed")
    monkeypatch.setitem(PRESETS, "sana-small-hed", known)
    monkeypatch.setattr(detect, "CROSS_HEADS", {64: 2})
    ours = random_tensors(control)
    file = fake.root / "owner" / "Hed" / "checkpoints" / "Hed.pth"
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": keys.from_ours(ours, "original", control)}, file)
    got = load.load("sana-small-hed")
    assert got.controlnet is not None and got.config.controlnet is not None
    assert got.config.controlnet.dit.clamps and got.config.controlnet.depth == 1
    state = got.controlnet.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.items())
    converted = Path(huggingface_hub.constants.HF_HOME) / "sana-torch" / "sana-small-hed"
    before = (converted / hub.CONVERTED).stat().st_mtime_ns
    fake.error = AssertionError("asked while offline")
    load.load(load.find_model("sana-small-hed", is_offline=True))
    assert (converted / hub.CONVERTED).stat().st_mtime_ns == before
    fake.error = None
    shutil.copy(file, file.with_name("second.pth"))
    with pytest.raises(RequestError, match="does not hold exactly one ControlNet"):
        hub.fetch_controlnet(known)


def test_a_controlnet_laid_beside_a_model_is_taken(tmp_path: Path) -> None:
    import diffusers

    from sana.weights.configs import write_network
    from sana.weights.convert import convert

    save_pipeline(tmp_path / "model")
    control = ControlNetConfig(dit=dataclasses.replace(DIT, qk_norm=False), depth=1)
    data = write_network(control)
    kind: Any = diffusers.SanaControlNetModel
    arguments = {key: value for key, value in data.items() if not key.startswith("_")}
    kind(**arguments).save_pretrained(tmp_path / "control")
    convert(tmp_path / "model", tmp_path / "ours", to="ours")
    assert load.load(tmp_path / "ours").controlnet is None
    convert(tmp_path / "control", tmp_path / "ours", to="ours")
    got = load.load(tmp_path / "ours")
    assert got.controlnet is not None and got.config.controlnet is not None
    assert got.config.controlnet.dit.attention_eps == got.config.dit.attention_eps
