"""ImageReward against the released network written out in plain formulas; its files and faults."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.tinies import bert_tokenizer, picture, reward_folder, reward_tensors
from numerics import assert_detects, assert_matches
from sana.errors import CheckpointError, NumericsError, RequestError
from sana.evaluation import networks
from sana.evaluation.image_reward import MEAN, STD, Reward, build
from sana.evaluation.sight import clip_pixels


def test_equals_the_released_networks_formulas(tmp_path: Path) -> None:
    tensors = reward_tensors(50)
    network, size = build(tensors, {}, "here")
    assert size == 32
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[2, 9, 11, 3, 0, 0], [2, 8, 3, 0, 0, 0], [2, 7, 7, 7, 7, 3]])
    mask = (tokens != 0).long()
    wide = {name: value.double() for name, value in tensors.items() if value.is_floating_point()}
    expected = _reward(wide, pixels.double(), tokens, mask).float()

    def check(given: dict[str, Tensor]) -> None:
        # Floor 2.0e-6: five layers without activations amplify.
        built, _ = build(given, {}, "here")
        assert_matches(expected, built(pixels, tokens, mask), 1e-5)

    check(tensors)
    for name in ("blip.visual_encoder.blocks.1.attn.qkv.weight", "mlp.layers.6.bias"):
        assert_detects(check, tensors | {name: tensors[name] * 1.01})
    assert_detects(
        lambda states: assert_matches(expected, network(pixels, states, mask), 1e-5),
        tokens.flip(1),
    )


def test_scores_pictures_and_says_what_it_is(tmp_path: Path) -> None:
    reward, network = Reward.load(str(reward_folder(tmp_path / "tiny")))
    assert network.name("ImageReward") == "ImageReward (tiny)"
    pictures = [picture(0), picture(1, (90, 200))]
    scores = reward.score("a photo of a red fox", pictures)
    again = [reward.score("a photo of a red fox", [one])[0] for one in pictures]
    assert scores == pytest.approx(again, rel=1e-5) and scores[0] != scores[1]
    assert reward.score("a fox " * 60, pictures) != scores
    reward.network.head[0].bias[:] = math.nan
    with pytest.raises(NumericsError, match="ImageReward gave NaN"):
        reward.score("a fox", pictures)


def test_the_tokenizer_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reward_folder(tmp_path / "tiny")
    bert = tmp_path / "bert"
    bert_tokenizer(bert)
    for file in folder.glob("*.json"):
        file.unlink()
    asked: list[Any] = []

    def download(source: str, **how: Any) -> str:
        asked.append((source, how["local_files_only"]))
        return str(bert)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    reward, _ = Reward.load(str(folder / "ImageReward.pt"), is_offline=True)
    assert asked == [("google-bert/bert-base-uncased", True)]
    assert reward.score("a fox", [picture()])


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = reward_tensors(50)
    del tensors["mlp.layers.4.bias"]
    with pytest.raises(CheckpointError, match="1 missing: head.2.bias"):
        build(tensors, {}, "here")
    with pytest.raises(CheckpointError, match="must hold the released ImageReward.pt"):
        build({"x": torch.zeros(1)}, {}, "here")
    with pytest.raises(RequestError, match="holds no weights"):
        Reward.load(str(tmp_path))

    def fail(*_: Any, **__: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(RequestError, match="neither a path here nor can be had.*no route"):
        networks.find_network("image-reward", "THUDM/ImageReward")


def test_pixels_are_resized_and_cropped() -> None:
    pixels = clip_pixels(picture(size=(101, 64)), 32)
    assert pixels.shape == (3, 32, 32)
    whole = clip_pixels(picture(size=(32, 32)), 32)
    by_hand = (torch.tensor(picture(size=(32, 32)).getpixel((5, 7))) / 255).float()
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    assert_matches((by_hand - mean) / std, whole[:, 7, 5], 1e-6)


def _reward(t: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """BLIP's ViT, BERT with cross attention and the head, by their formulas; heads of 64."""
    eye, text = "blip.visual_encoder", "blip.text_encoder"

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        parts = []
        for a, b, c in zip(q.split(64, -1), k.split(64, -1), v.split(64, -1), strict=True):
            parts.append((a @ b.mT / 8 + bias).softmax(-1) @ c)
        return torch.cat(parts, -1)

    x = F.conv2d(
        pixels, t[f"{eye}.patch_embed.proj.weight"], t[f"{eye}.patch_embed.proj.bias"], stride=16
    )
    x = torch.cat([t[f"{eye}.cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    x = x + t[f"{eye}.pos_embed"]
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v))
        inner = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", inner)
    seen = norm(f"{eye}.norm", x, 1e-6)
    y = t[f"{text}.embeddings.word_embeddings.weight"][tokens]
    y = y + t[f"{text}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    y = norm(f"{text}.embeddings.LayerNorm", y, 1e-12)
    hidden = torch.where(mask[:, None, :] == 1, 0.0, -1e9)
    for i in range(2):
        layer = f"{text}.encoder.layer.{i}"
        for part, other, bias in (("attention", None, hidden), ("crossattention", seen, 0.0)):
            own = f"{layer}.{part}.self"
            source = y if other is None else other
            q = linear(f"{own}.query", y)
            mixed = attend(q, linear(f"{own}.key", source), linear(f"{own}.value", source), bias)
            mixed = linear(f"{layer}.{part}.output.dense", mixed)
            y = norm(f"{layer}.{part}.output.LayerNorm", y + mixed, 1e-12)
        inner = F.gelu(linear(f"{layer}.intermediate.dense", y))
        inner = linear(f"{layer}.output.dense", inner)
        y = norm(f"{layer}.output.LayerNorm", y + inner, 1e-12)
    state = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        state = linear(f"mlp.layers.{place}", state)
    return (state.squeeze(1) - MEAN) / STD
