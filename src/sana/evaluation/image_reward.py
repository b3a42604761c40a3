"""ImageReward (Xu et al. 2023): how much people would like a picture for a prompt.

BLIP's ViT and its text encoder, which looks at the picture by cross attention, and five linear
layers on the first token's state, without activations between them as in the released code. The
networks are transformers' BLIP; the released file ImageReward.pt has BLIP's original names, which
`from_original` renames. Start reading at `ImageReward.score`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sana.errors import CheckpointError, NumericsError
from sana.evaluation.networks import (
    Network,
    fetch,
    find_network,
    load_tokenizer,
    read_weights,
)
from sana.evaluation.sight import clip_pixels
from sana.weights.assign import assign, meta_parameters

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the rewards of the authors' validation set."""
TOKENS = 35
HEAD = 64
"""Width of a head, in every size of BLIP."""
BERT = "google-bert/bert-base-uncased"
TOKENIZER_FILES = ("tokenizer*.json", "vocab.txt", "config.json")
WIDTHS = (1024, 128, 64, 16, 1)
VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.(.*)", r"embeddings.patch_embedding.\1"),
    (r"blocks\.(\d+)\.norm(\d)\.(.*)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(.*)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.*)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blocks\.(\d+)\.mlp\.(.*)", r"encoder.layers.\1.mlp.\2"),
    (r"norm\.(.*)", r"post_layernorm.\1"),
)
# The linear layers' places among the dropouts of the released nn.Sequential.
PLACES = (0, 2, 4, 6, 7)
UNUSED = ("position_ids", "vision_proj", "text_proj", "temp", "_queue", "queue_ptr", "_m.")
"""Of BLIP's pre-training; the reward does not look at them."""


class ImageReward(nn.Module):
    """`forward(pixels [B,3,S,S], tokens [B,T], mask [B,T])` gives the normalized rewards (B,)."""

    def __init__(self, vision: nn.Module, text: nn.Module, width: int) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        sizes = (width, *WIDTHS)
        self.head = nn.Sequential(*map(nn.Linear, sizes[:-1], sizes[1:]))

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long).to(seen.device),
        ).last_hidden_state
        reward: Tensor = self.head(states[:, 0].float()).squeeze(1)
        return (reward - MEAN) / STD


class Reward:
    """The network with its tokenizer: pictures and sentences in, rewards out."""

    def __init__(self, network: ImageReward, tokenizer: Any, size: int) -> None:
        self.network, self.tokenizer, self.size = network, tokenizer, size
        self.device = next(network.parameters()).device

    @staticmethod
    def load(
        source: str, device: str = "cpu", *, is_offline: bool = False
    ) -> tuple[Reward, Network]:
        """From a folder or repository with ImageReward.pt, med_config.json and BERT's tokenizer."""
        found = find_network("image-reward", source, is_offline=is_offline)
        network, size = build(read_weights(found.path), _text_config(found.path), source)
        tokenizer = load_tokenizer(_with_tokenizer(found, is_offline=is_offline))
        return Reward(network.to(device).eval(), tokenizer, size), found

    @torch.inference_mode()
    def score(self, prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        """The reward of each picture; about normal with mean 0 over the authors' data."""
        text = self.tokenizer(
            [prompt],
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        pixels = torch.stack([clip_pixels(picture, self.size) for picture in pictures])
        count = len(pictures)
        rewards = self.network(
            pixels.to(self.device),
            text["input_ids"].expand(count, -1).to(self.device),
            text["attention_mask"].expand(count, -1).to(self.device),
        )
        if not bool(torch.isfinite(rewards).all()):
            raise NumericsError(
                f"ImageReward gave NaN for {prompt[:60]!r}; look at its weights, or use the CPU"
            )
        found: list[float] = rewards.tolist()
        return found


def build(
    original: Mapping[str, Tensor], text_config: Mapping[str, Any], source: str
) -> tuple[ImageReward, int]:
    """The network with the released file's tensors, and the side of its pictures.

    Sizes come from the shapes; `text_config` is what med_config.json says besides.
    """
    from transformers import BlipTextModel, BlipVisionModel

    tensors = from_original(original)
    vision, text = _configs(tensors, text_config, source)
    make_vision: Any = BlipVisionModel
    make_text: Any = BlipTextModel
    with meta_parameters():
        network = ImageReward(
            make_vision(vision), make_text(text, add_pooling_layer=False), text.hidden_size
        )
    assign(network, {name: tensor.float() for name, tensor in tensors.items()}, source)
    return network.requires_grad_(False), vision.image_size


def from_original(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the released file's tensors."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in original.items():
        if any(part in name for part in UNUSED):
            continue
        if name.startswith("blip.visual_encoder."):
            tensors["vision." + _renamed(name.removeprefix("blip.visual_encoder."))] = tensor
        elif name.startswith("blip.text_encoder."):
            tensors["text." + name.removeprefix("blip.text_encoder.")] = tensor
        elif match := re.fullmatch(r"mlp\.layers\.(\d+)\.(.*)", name):
            tensors[f"head.{PLACES.index(int(match[1]))}.{match[2]}"] = tensor
        elif not name.startswith("blip."):
            tensors[name] = tensor
    return tensors


def _configs(
    tensors: Mapping[str, Tensor], text_config: Mapping[str, Any], source: str
) -> tuple[Any, Any]:
    """Those of BLIP's two halves, from the shapes."""
    from transformers import BlipTextConfig, BlipVisionConfig

    try:
        patch = tensors["vision.embeddings.patch_embedding.weight"]
        positions = tensors["vision.embeddings.position_embedding"]
        words = tensors["text.embeddings.word_embeddings.weight"]
        inner = tensors["text.encoder.layer.0.intermediate.dense.weight"].shape[0]
        mlp = tensors["vision.encoder.layers.0.mlp.fc1.weight"].shape[0]
        places = tensors["text.embeddings.position_embeddings.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"{source} has no tensor for {error.args[0]}; it must hold the released ImageReward.pt"
        ) from None
    vision = BlipVisionConfig(
        hidden_size=patch.shape[0],
        intermediate_size=mlp,
        num_hidden_layers=_depth(tensors, "vision.encoder.layers."),
        num_attention_heads=patch.shape[0] // HEAD,
        image_size=int((positions.shape[1] - 1) ** 0.5) * patch.shape[-1],
        patch_size=patch.shape[-1],
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=patch.shape[0],
        intermediate_size=inner,
        num_hidden_layers=_depth(tensors, "text.encoder.layer."),
        num_attention_heads=int(text_config.get("num_attention_heads", words.shape[1] // HEAD)),
        max_position_embeddings=places,
        layer_norm_eps=float(text_config.get("layer_norm_eps", 1e-12)),
        hidden_act=str(text_config.get("hidden_act", "gelu")),
        is_decoder=True,
        bos_token_id=None,
        sep_token_id=None,
    )
    return vision, text


def _with_tokenizer(found: Network, *, is_offline: bool) -> Network:
    """The released repository has no tokenizer: BERT's own is taken from its repository then."""
    folder = found.path if found.path.is_dir() else found.path.parent
    names = {file.name for file in folder.iterdir()}
    if not names & {"tokenizer.json", "vocab.txt"}:
        folder = fetch("BERT's tokenizer", BERT, TOKENIZER_FILES, is_offline=is_offline)
    return replace(found, path=folder)


def _renamed(name: str) -> str:
    for pattern, ours in VISION_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return name


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[prefix.count(".")] for name in tensors if name.startswith(prefix)})


def _text_config(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "med_config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
