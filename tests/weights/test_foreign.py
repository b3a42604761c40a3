"""Foreign folders and files: found, described, checked, and loaded with the same numbers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gemmas import tiny_gemma
from numerics import assert_detects, assert_matches
from sana.config import DCAEConfig, DiTConfig
from sana.errors import CheckpointError
from sana.weights import detect, keys
from sana.weights.load import load, load_autoencoder, load_controlnet, load_dit
from sana.weights.locate import find_networks, settle
from weights.networks import ALL, DCAES, DITS, peer, random_tensors
from weights.pipelines import DIT, save_pipeline

pytestmark = pytest.mark.parity
FOREIGN = ["original", "diffusers"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("pipeline")
    return folder, save_pipeline(folder, max_shard_size="100KB")


@pytest.fixture
def folder(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def assert_holds(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name


def test_a_pipeline_that_diffusers_saved(saved: tuple[Path, Any]) -> None:
    folder, pipeline = saved
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1, "sharded, with an index"
    got = load(folder)
    dit, autoencoder = DIT, DCAES["sana"]
    assert got.config.reference == "nvidia" and got.config.dit.attention_eps == 1e-8
    assert dataclasses.replace(got.config.dit, attention_eps=1e-15, cross_norm_eps=1e-5) == dit
    assert got.config.autoencoder == dataclasses.replace(autoencoder, latent_scale=(1.0,))
    assert got.config.text.kind == "gemma2" and got.config.text.width == dit.text_dim
    assert got.config.sampling.shift == 3.0 and got.config.sampling.sampler == "dpm"
    assert load(folder, reference="diffusers").config.dit == dit
    for ours, theirs in (
        (got.dit, pipeline.transformer),
        (got.autoencoder, pipeline.vae),
    ):
        tensors = keys.to_ours(theirs.state_dict(), "diffusers")
        assert_holds(ours, tensors)
        first = next(iter(tensors))
        fault = tensors | {first: tensors[first] * 1.01}
        assert_detects(lambda wrong, ours=ours: assert_holds(ours, wrong), fault)
    inner: Any = got.text
    assert_holds(inner.model, pipeline.text_encoder.state_dict())


def test_its_networks_compute_the_same(saved: tuple[Path, Any]) -> None:
    folder, pipeline = saved
    got = load(folder, reference="diffusers")
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 8, 4, 6, generator=generator)
    text = torch.randn(2, 5, DIT.text_dim, generator=generator)
    time = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        wanted = pipeline.transformer(latent, text, time * 1000, return_dict=False)[0]

        def check(network: Any) -> None:
            assert_matches(wanted, network(latent, time, text, None), 1e-5)  # floor 6e-7

        check(got.dit)
        got.dit.blocks[1].attention.qkv.weight.mul_(1.01)
        assert_detects(check, got.dit)
        image = pipeline.vae.decode(latent, return_dict=False)[0]
        assert_matches(image, got.autoencoder.decode(latent), 1e-5)
    assert torch.equal(
        got.text.encode(["a fox"]).states,
        tiny_gemma(reference="diffusers").encode(["a fox"]).states,
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layout", ["ours", *FOREIGN])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module."])
def test_kind_and_layout_are_told_from_names(name: str, layout: keys.Layout, prefix: str) -> None:
    config = ALL[name]
    theirs = keys.from_ours(random_tensors(config), layout, config)
    named = {prefix + key: tensor for key, tensor in theirs.items()}
    [part] = detect.find_parts(named, "x")
    assert part == detect.Part(keys.kind_of(config), layout, prefix)
    assert detect.take_part(named, part, [part]).keys() == theirs.keys()


def test_several_networks_in_one_file() -> None:
    dit, vae = DITS["1600m"], DCAES["sana"]
    named = {
        f"model.diffusion_model.{key}": tensor
        for key, tensor in keys.from_ours(random_tensors(dit), "original", dit).items()
    }
    named |= {
        f"vae.{key}": tensor
        for key, tensor in keys.from_ours(random_tensors(vae), "original", vae).items()
    }
    named["text_encoders.gemma2.model.layers.0.self_attn.q_proj.weight"] = torch.zeros(1)
    parts = detect.find_parts(named, "x")
    assert {part.kind: part.prefix for part in parts} == {
        "transformer": "model.diffusion_model.",
        "autoencoder": "vae.",
        "text": "text_encoders.gemma2.model.",
    }
    taken = [detect.take_part(named, part, parts) for part in parts]
    assert sum(map(len, taken)) == len(named)


@pytest.mark.parametrize("name", DITS)
@pytest.mark.parametrize("layout", FOREIGN)
def test_the_architecture_of_a_transformer(
    name: str, layout: keys.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DITS[name]
    monkeypatch.setattr(detect, "CROSS_HEADS", {config.width: config.cross_heads})
    theirs = keys.from_ours(random_tensors(config), layout, config)
    got = detect.describe(theirs, "transformer", layout, "x")
    plain = dataclasses.replace(config, position_scale=None, position_base=16)
    assert got == plain
    if layout == "original":
        theirs["pos_embed"] = torch.zeros(1, 128 * 128, config.width)
        got = detect.describe(theirs, "transformer", layout, "x")
        assert got == dataclasses.replace(config, position_scale=2.0, position_base=128)
        theirs["pos_embed"] = torch.zeros(1, 32 * 32, config.width)
        assert detect.describe(theirs, "transformer", layout, "x") == plain


@pytest.mark.parametrize("name", DCAES)
@pytest.mark.parametrize("layout", ["ours", *FOREIGN])
def test_the_architecture_of_an_autoencoder(name: str, layout: keys.Layout) -> None:
    """All that shapes show; the width of a stage without blocks is of no account."""
    config = DCAES[name]
    theirs = keys.from_ours(random_tensors(config), layout, config)
    got = detect.describe(theirs, "autoencoder", layout, "x")
    assert isinstance(got, DCAEConfig)
    scale = (detect.SANA_SCALE if config.encoder[-1].scales else 1.0,)
    assert got == dataclasses.replace(config, latent_scale=scale)


def test_faults_of_a_folder(folder: Path) -> None:
    """Each is one sentence that names the file."""
    config = folder / "transformer" / "config.json"
    good = config.read_text()

    def refused(message: str, **changes: Any) -> None:
        config.write_text(json.dumps(json.loads(good) | changes))
        with pytest.raises(CheckpointError, match=message):
            load(folder)
        config.write_text(good)

    refused("disagree: depth 3 and 2", num_layers=3)
    refused("disagree: qk_norm False and True", qk_norm=None)
    refused("has norm_eps 0.1; the networks here have 1e-06", norm_eps=0.1)
    refused("qk_norm is 'layer'; known are null", qk_norm="layer")
    refused("value of the wrong kind", num_layers="many")
    config.write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        load(folder)
    config.write_text(good)
    vae = folder / "vae" / "config.json"
    kept = vae.read_text()
    vae.write_text(kept.replace('"interpolate"', '"pixel_shuffle"'))
    with pytest.raises(CheckpointError, match="disagree: up pixel_shuffle and interpolate"):
        load(folder)
    vae.write_text(kept)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    assert "Infinity" in scheduler.read_text(), "which is not strict JSON"
    scheduler.write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(CheckpointError, match="names the scheduler 'DDIMScheduler'"):
        load(folder)
    scheduler.write_text('{"_class_name": "SCMScheduler"}')
    assert load(folder).config.sampling.sampler == "scm"
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="there is no tokenizer.json in"):
        load(folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(CheckpointError, match="has no text .it has transformer, autoencoder"):
        load(folder)


def test_faults_of_shards(folder: Path) -> None:
    parts = sorted((folder / "transformer").glob("*.safetensors"))
    [index] = (folder / "transformer").glob("*.index.json")
    good = index.read_text()
    listed = json.loads(good)
    name = next(iter(listed["weight_map"]))
    index.write_text(json.dumps(listed | {"weight_map": listed["weight_map"] | {name: "x"}}))
    with pytest.raises(CheckpointError, match=f"says that {name} is in x, and it is in diff"):
        load(folder)
    index.write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load(folder)
    index.write_text(good)
    content = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks part 2 of {len(parts)}"):
        load(folder)
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(CheckpointError, match="which .*00001-of-.* holds as well"):
        load(folder)
    parts[1].write_bytes(content)
    load(folder)


def test_variants(folder: Path) -> None:
    """fp16 and bf16 beside the full weights: the one that suits the dtype, or the one asked for."""
    config = DIT
    network: Any = peer(config)
    place = folder / "transformer"
    shutil.rmtree(place)
    network.save_pretrained(place)
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        marked: Any = peer(config)
        with torch.no_grad():
            marked.proj_out.bias.fill_({"fp16": 16.0, "bf16": 32.0}[variant])
        marked.to(dtype).save_pretrained(place, variant=variant)

    def bias(**settings: Any) -> float:
        return load_dit(place, **settings).output.bias[0].item()

    assert bias(dtype=torch.float16) == 16.0 and bias(dtype=torch.bfloat16) == 32.0
    assert abs(bias()) < 1
    chosen = load(folder, variant=None, dtype=torch.bfloat16)
    assert chosen.config.dit.clamps, "an fp16 variant stands beside the full weights"
    with pytest.raises(CheckpointError, match="has no variant 'fp8'; it has one without a name"):
        load(folder, variant="fp8")
    for file in place.glob("diffusion_pytorch_model.safetensors"):
        file.unlink()
    assert bias() == 32.0, "the first by name where none suits"


def test_pickled_folders_are_refused(folder: Path) -> None:
    for file in (folder / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="has no autoencoder"):
        load(folder)
    with pytest.raises(CheckpointError, match="weights as pickles only .diffusion_pytorch_model"):
        load_autoencoder(folder / "vae")


@pytest.mark.parametrize("layout", FOREIGN)
def test_a_single_file_with_the_rest_beside_it(folder: Path, layout: keys.Layout) -> None:
    network = load_dit(folder / "transformer")
    config = network.config
    shutil.rmtree(folder / "transformer")
    file = folder / "any name.safetensors"
    wide = detect.CROSS_HEADS
    theirs = keys.from_ours(network.state_dict(), layout, config)
    safetensors.torch.save_file(
        {f"model.diffusion_model.{k}": t.contiguous() for k, t in theirs.items()}, file
    )
    with pytest.raises(CheckpointError, match="64 wide, and only for 2240, 1152 is it known"):
        load(file)
    try:
        detect.CROSS_HEADS = {**wide, config.width: config.cross_heads}  # type: ignore[misc]
        got = load(file)
        in_folder = load(folder)
    finally:
        detect.CROSS_HEADS = wide  # type: ignore[misc]
    assert_holds(got.dit, network.state_dict())
    assert_holds(in_folder.dit, network.state_dict())
    assert got.config.dit.qk_norm


def test_controlnets_and_their_bases(tmp_path: Path) -> None:
    config = ALL["controlnet"]
    assert not isinstance(config, DiTConfig | DCAEConfig)
    network: Any = peer(config)
    network.save_pretrained(tmp_path)
    base = dataclasses.replace(config.dit, depth=3, clamps=True)
    got = load_controlnet(tmp_path, base=base)
    assert_holds(got, keys.to_ours(network.state_dict(), "diffusers"))
    assert got.control.dit.clamps
    for other, message in (
        (dataclasses.replace(base, width=96, cross_heads=3), "width 64 and 96"),
        (dataclasses.replace(base, depth=2), "2 blocks for 2"),
    ):
        with pytest.raises(CheckpointError, match=f"for another base.*{message}"):
            load_controlnet(tmp_path, base=other)
    with pytest.raises(CheckpointError, match="holds no transformer"):
        load_dit(tmp_path)


def test_autoencoders_without_a_config_need_to_be_known(tmp_path: Path) -> None:
    config = DCAES["imagenet"]
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(keys.from_ours(random_tensors(config), "original", config), file)
    with pytest.raises(CheckpointError, match="latent scale no shape shows"):
        load_autoencoder(file)
    like = dataclasses.replace(config, latent_scale=(0.25,))
    assert load_autoencoder(file, like=like).config == like
    with pytest.raises(CheckpointError, match="the model it should be like .*up interpolate"):
        load_autoencoder(file, like=dataclasses.replace(like, up="interpolate"))


def test_an_original_folder_with_its_own_config(tmp_path: Path) -> None:
    """efficientvit's config.json says other things than diffusers'."""
    config = DCAES["sana"]
    theirs = keys.from_ours(random_tensors(config), "original", config)
    safetensors.torch.save_file(theirs, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_name": "dc-ae-f32c32-sana-1.1"}')
    assert load_autoencoder(tmp_path).config.latent_scale == (0.41407,)


def test_other_files_say_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="is a LoRA, which changes a model"):
        find_networks(file)
    safetensors.torch.save_file({"a.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="1 tensors of no network that is known here .a.weig"):
        find_networks(file)
    config = DITS["1600m"]
    theirs = keys.from_ours(random_tensors(config), "original", config)
    file.unlink()
    for name in ("one", "two"):
        safetensors.torch.save_file(theirs, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 networks of the kind transformer"):
        find_networks(tmp_path)
    del theirs["blocks.0.attn.qkv.weight"], theirs["x_embedder.proj.weight"]
    safetensors.torch.save_file(theirs, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="whose size cannot be told, since it lacks"):
        settle(find_networks(tmp_path / "one.safetensors")[0], config)
