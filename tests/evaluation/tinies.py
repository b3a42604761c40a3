"""Networks of the published metrics in miniature: random weights, a few words, saved as folders."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)

WORDS = (
    "a photo of red orange yellow green blue purple pink brown black white grey object colored fox "
    "bench is there the what color are two apples yes no in picture"
).split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")


def picture(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Noise over a slope."""
    width, height = size
    random = np.random.default_rng(seed)
    slope = np.linspace(0, 200, width)[None, :, None] + random.integers(0, 56, (height, width, 3))
    return Image.fromarray(slope.astype(np.uint8))


def clip_folder(folder: Path, *, width: int = 32) -> Path:
    torch.manual_seed(0)
    letters = [*string.ascii_lowercase, *string.digits, "-", "'"]
    vocab = {t: i for i, t in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    common = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": 1}
    config: Any = CLIPConfig(
        text_config=common | heads | ends | {"vocab_size": len(vocab)},
        vision_config=common | heads | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    make: Any = CLIPModel
    model = make(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer: Any = CLIPTokenizer
    tokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder)
    return folder


def bert_tokenizer(folder: Path) -> int:
    """Write BERT's tokenizer for `WORDS`; how many tokens it has."""
    tokens = [
        *SPECIAL,
        *WORDS,
        *string.ascii_lowercase,
        *(f"##{c}" for c in string.ascii_lowercase),
    ]
    tokens = [*dict.fromkeys([*tokens, "?", ".", "-"])]
    tokenizer: Any = BertTokenizer
    tokenizer(vocab={t: i for i, t in enumerate(tokens)}).save_pretrained(folder)
    return len(tokens)


def vqa_folder(folder: Path) -> Path:
    torch.manual_seed(1)
    count = bert_tokenizer(folder)
    config: Any = BlipConfig(
        text_config={
            "vocab_size": count,
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 40,
            "bos_token_id": 5,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        projection_dim=16,
    )
    make: Any = BlipForQuestionAnswering
    make(config).save_pretrained(folder)
    return folder


def reward_tensors(words: int, *, width: int = 64, depth: int = 2) -> dict[str, Tensor]:
    """The released ImageReward.pt in miniature, with its names."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    def linear(name: str, into: int, out: int) -> dict[str, Tensor]:
        return {f"{name}.weight": random(out, into), f"{name}.bias": random(out)}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    tensors = {
        f"{eye}.cls_token": random(1, 1, width),
        f"{eye}.pos_embed": random(1, 5, width),
        f"{eye}.patch_embed.proj.weight": random(width, 3, 16, 16),
        f"{eye}.patch_embed.proj.bias": random(width),
        f"{text}.embeddings.word_embeddings.weight": random(words, width),
        f"{text}.embeddings.position_embeddings.weight": random(40, width),
        f"{text}.embeddings.position_ids": torch.arange(40)[None],
        "blip.temp": torch.tensor(0.07),
        **norm(f"{eye}.norm"),
        **norm(f"{text}.embeddings.LayerNorm"),
        **linear("blip.vision_proj", width, 16),
    }
    for i in range(depth):
        block = f"{eye}.blocks.{i}"
        tensors |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        tensors |= linear(f"{block}.attn.qkv", width, 3 * width)
        tensors |= linear(f"{block}.attn.proj", width, width)
        tensors |= linear(f"{block}.mlp.fc1", width, 96) | linear(f"{block}.mlp.fc2", 96, width)
        layer = f"{text}.encoder.layer.{i}"
        for part in ("attention", "crossattention"):
            for which in ("query", "key", "value"):
                tensors |= linear(f"{layer}.{part}.self.{which}", width, width)
            tensors |= linear(f"{layer}.{part}.output.dense", width, width)
            tensors |= norm(f"{layer}.{part}.output.LayerNorm")
        tensors |= linear(f"{layer}.intermediate.dense", width, 96)
        tensors |= linear(f"{layer}.output.dense", 96, width) | norm(f"{layer}.output.LayerNorm")
    sizes = (width, 1024, 128, 64, 16, 1)
    for place, into, out in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        tensors |= linear(f"mlp.layers.{place}", into, out)
    return tensors


def reward_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(reward_tensors(bert_tokenizer(folder)), folder / "ImageReward.pt")
    return folder


def segmenter_folder(folder: Path) -> Path:
    """Mask2Former for COCO's 80 classes, sure of everything."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(3)
    swin: Any = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config: Any = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=6,
        num_labels=80,
    )
    make: Any = Mask2FormerForUniversalSegmentation
    model = make(config)
    torch.nn.init.normal_(model.class_predictor.weight, std=3)
    model.save_pretrained(folder)
    return folder


def verifier_folder(folder: Path, *, knows_no: bool = True) -> Path:
    """LLaVA with a chat template; without `knows_no`, yes and no are one unknown word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(4)
    words = [word for word in WORDS if knows_no or word not in ("yes", "no")]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "<image>", "<pad>", *words])}
    level: Any = models.WordLevel
    backend = Tokenizer(level(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    make: Any = PreTrainedTokenizerFast
    ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = make(tokenizer_object=backend, additional_special_tokens=["<image>"], **ends)
    see: Any = CLIPImageProcessorPil
    process: Any = LlavaProcessor
    process(
        image_processor=see(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}{% for c in m['content'] %}{% if c.type == 'image' %}<image> "
            "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %} answer :"
        ),
    ).save_pretrained(folder)
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
    text = {"model_type": "llama", "vocab_size": len(vocab), "num_key_value_heads": 2}
    config: Any = LlavaConfig
    network: Any = LlavaForConditionalGeneration
    model = network(
        config(
            vision_config=common | heads | vision,
            text_config=common | heads | text,
            image_token_id=vocab["<image>"],
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
