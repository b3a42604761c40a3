"""LoRA files of every naming give one adapter; what does not fit is refused, and says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.errors import CheckpointError
from sana.models.dit import LinearDiT
from sana.models.lora import Adapter, adapted
from sana.pipelines.pipeline import Pipeline
from sana.request import Request
from sana.weights.lora import load_lora
from standins import tiny_components

RANK, ALPHA = 4, 2.0
# Ours -> diffusers' and NVIDIA's names of its parts, and the outputs of one part.
LAYERS = {
    "blocks.0.attention.qkv": (
        [f"transformer_blocks.0.attn1.to_{part}" for part in "qkv"],
        ["blocks.0.attn.qkv"],
        64,
    ),
    "blocks.1.cross_attention.query": (
        ["transformer_blocks.1.attn2.to_q"],
        ["blocks.1.cross_attn.q_linear"],
        64,
    ),
    "blocks.1.cross_attention.key_value": (
        ["transformer_blocks.1.attn2.to_k", "transformer_blocks.1.attn2.to_v"],
        ["blocks.1.cross_attn.kv_linear"],
        64,
    ),
    "blocks.0.attention.output": (
        ["transformer_blocks.0.attn1.to_out.0"],
        ["blocks.0.attn.proj"],
        64,
    ),
    "blocks.1.feed_forward.expand": (
        ["transformer_blocks.1.ff.conv_inverted"],
        ["blocks.1.mlp.inverted_conv.conv"],
        320,
    ),
}


@pytest.fixture(scope="module")
def dit() -> LinearDiT:
    network: LinearDiT = tiny_components().dit
    return network


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """A and B for each part, by diffusers' name."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(RANK, 64, generator=generator) / 8,
            torch.randn(outputs, RANK, generator=generator) / 8,
        )
        for parts, _, outputs in LAYERS.values()
        for name in parts
    }


def deltas(pairs: dict[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> dict[str, Tensor]:
    """What each of our weights changes by."""
    return {
        ours: torch.cat([scale * pairs[name][1] @ pairs[name][0] for name in parts])
        for ours, (parts, _, _) in LAYERS.items()
    }


def peft_file() -> dict[str, Tensor]:
    named = {}
    for name, (a, b) in pairs().items():
        named[f"base_model.model.{name}.lora_A.weight"] = a
        named[f"base_model.model.{name}.lora_B.weight"] = b
    return named


def diffusers_file() -> dict[str, Tensor]:
    return {k.replace("base_model.model.", "transformer."): v for k, v in peft_file().items()}


def kohya_file() -> dict[str, Tensor]:
    named = {}
    for name, (a, b) in pairs().items():
        under = "lora_unet_" + name.replace(".", "_")
        is_convolution = "conv" in name
        named[f"{under}.lora_down.weight"] = a[..., None, None] if is_convolution else a
        named[f"{under}.lora_up.weight"] = b[..., None, None] if is_convolution else b
        named[f"{under}.alpha"] = torch.tensor(ALPHA)
    return named


def comfy_file() -> dict[str, Tensor]:
    """NVIDIA's names, whose query, key and value are one layer: a LoRA of that layer."""
    named = {}
    made = pairs()
    for parts, [theirs], _ in LAYERS.values():
        a = torch.cat([made[name][0] for name in parts])
        b = torch.block_diag(*[made[name][1] for name in parts])
        named[f"diffusion_model.{theirs}.lora_A.weight"] = a
        named[f"diffusion_model.{theirs}.lora_B.weight"] = b
    return named


def our_file() -> dict[str, Tensor]:
    theirs = {names[0]: ours for ours, (_, names, _) in LAYERS.items()}
    return {
        f"{theirs[key.removeprefix('diffusion_model.').rsplit('.', 2)[0]]}{key[-14:]}": value
        for key, value in comfy_file().items()
    }


NAMINGS: dict[str, tuple[Callable[[], dict[str, Tensor]], float]] = {
    "peft": (peft_file, 1.0),
    "diffusers": (diffusers_file, 1.0),
    "kohya": (kohya_file, ALPHA / RANK),
    "comfy": (comfy_file, 1.0),
    "ours": (our_file, 1.0),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_same_change(dit: LinearDiT, tmp_path: Path, naming: str) -> None:
    make, scale = NAMINGS[naming]
    save_file(make(), tmp_path / "a.safetensors")
    layers = load_lora(tmp_path / "a.safetensors", dit).layers
    expected = deltas(pairs(), scale)
    assert set(layers) == set(expected)

    def check(factor: float) -> None:
        for name, (a, b) in layers.items():
            assert_matches(expected[name], factor * b @ a, 1e-7)  # floor 0, exact

    check(1.0)
    assert_detects(check, 1.01)


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({"lora_alpha": 8, "r": RANK}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.r": RANK}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({}, 1.0),
    ],
)
def test_alpha_is_taken_from_the_metadata_or_the_file_beside(
    dit: LinearDiT, tmp_path: Path, settings: dict[str, Any], scale: float
) -> None:
    first, folder = tmp_path / "a.safetensors", tmp_path / "adapter"
    folder.mkdir()
    save_file(peft_file(), first, {"lora_adapter_metadata": json.dumps(settings)})
    save_file(peft_file(), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for path in (first, folder):
        for name, (a, b) in load_lora(path, dit).layers.items():
            assert_matches(deltas(pairs(), scale)[name], b @ a, 1e-7)


def made(dit: LinearDiT, **changed: Tensor) -> Adapter:
    layers = {
        ours: (
            torch.cat([pairs()[name][0] for name in parts]),
            torch.block_diag(*[pairs()[name][1] for name in parts]),
        )
        for ours, (parts, _, _) in LAYERS.items()
    }
    return Adapter(source="a.safetensors", layers={**layers, **changed})


def test_two_adapters_add_up_like_merged_weights(dit: LinearDiT) -> None:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 8, 2, 2, generator=generator)
    text = torch.randn(2, 5, 32, generator=generator)
    inputs = (latent, torch.tensor([0.3, 0.9]), text, torch.ones(2, 5, dtype=torch.bool))
    only = Adapter(source="b", layers={"output": (torch.ones(1, 64), 0.1 * torch.ones(8, 1))})
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    with torch.no_grad():
        plain = dit(*inputs)
        got = adapted(dit, [made(dit), only], [0.5, -2.0])(*inputs)

        def check(scale: float) -> None:
            merged = LinearDiT(dit.config)
            for name, parameter in merged.named_parameters():
                parameter.copy_(before[name])
            for name, delta in deltas(pairs(), 0.5).items():
                merged.get_submodule(name).weight.add_(delta)
            merged.output.weight.add_(scale * 0.1)
            assert_matches(merged(*inputs), got, 3e-6)  # floor 3.3e-7

        check(-2.0)
        assert_detects(check, -1.98)
        assert torch.equal(dit(*inputs), plain)
    assert all(torch.equal(before[name], value) for name, value in dit.state_dict().items())
    assert all(parameter.requires_grad for parameter in dit.parameters())


def test_a_b_a_gives_a_twice(tmp_path: Path) -> None:
    pipeline = Pipeline(tiny_components())
    save_file({k: 4 * v for k, v in peft_file().items()}, tmp_path / "a.safetensors")
    plain = Request(prompt="a red fox", steps=2)
    with_lora = plain.replace(loras=(str(tmp_path / "a.safetensors"),))

    def draw(request: Request) -> Image.Image:
        return pipeline.generate(request)[0]

    first, between, again = draw(plain), draw(with_lora), draw(plain)
    assert first.tobytes() == again.tobytes() != between.tobytes()
    assert draw(with_lora).tobytes() == between.tobytes()
    assert draw(with_lora.replace(lora_scales=(0.0,))).tobytes() == first.tobytes()
    together = with_lora.replace(seeds=(3, 4, 5))
    alone = [draw(single).tobytes() for single in together.singles()]
    assert [picture.tobytes() for picture in pipeline.generate(together)] == alone


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in peft_file().items()}


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"a.weight": torch.ones(2)}, "no LoRA weights for this model: of 1 keys none fits"),
        (renamed("transformer_blocks", "double_blocks"), "of 8 keys none fits .* Sana in PEFT"),
        (renamed("transformer_blocks.1", "transformer_blocks.21"), "only in part: 4 of its keys"),
        ({**peft_file(), "x.dora_scale": torch.ones(2)}, "only in part: 1 .* .x.dora_scale."),
        ({**peft_file(), "text_encoder.q.lora_A.weight": torch.ones(2, 2)}, "text_encoder.q"),
        (
            {
                "blocks.0.attn.proj.lora_A.weight": torch.ones(4, 2240),
                "blocks.0.attn.proj.lora_B.weight": torch.ones(2240, 4),
            },
            r"another model: its blocks.0.attention.output is 2240 wide .* 64 .width 64.; use a",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    dit: LinearDiT, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        adapted(dit, [load_lora(tmp_path / "a.safetensors", dit)], [1.0])


def test_bad_files_are_refused(dit: LinearDiT, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="pickle"):
        load_lora(tmp_path / "a.safetensors", dit)
    with pytest.raises(CheckpointError, match="there is no weight file"):
        load_lora(tmp_path / "missing.safetensors", dit)
    with pytest.raises(CheckpointError, match="is a folder without adapter_model.safetensors or"):
        load_lora(tmp_path, dit)
    for settings in ("{", '{"alpha_pattern": {"x": 1}}', "[]"):
        save_file(peft_file(), tmp_path / "b.safetensors", {"lora_adapter_metadata": settings})
        with pytest.raises(CheckpointError, match="settings that cannot be used"):
            load_lora(tmp_path / "b.safetensors", dit)
