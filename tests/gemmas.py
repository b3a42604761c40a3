"""A tiny Gemma-2 with random weights and a tokenizer built like Gemma's, for tests of the text."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from sana.config import GemmaConfig, Reference
from sana.models.gemma import Gemma2
from sana.models.instruction import INSTRUCTIONS

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
WORDS = "a an cat red fox in the snow with blue eyes photo of left right two three mountain"
TINY = GemmaConfig(
    width=32,
    layers=3,
    heads=4,
    key_heads=2,
    head_dim=8,
    mlp_width=48,
    vocabulary=700,
    query_scale=8.0,
    soft_cap=2.0,
)


@functools.cache
def gemma_tokenizer() -> str:
    """A tokenizer.json: BPE over words that begin with their space, digits alone, bytes else."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("▁"), "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=TINY.vocabulary, special_tokens=SPECIAL + BYTES, show_progress=False
    )
    lines = [*INSTRUCTIONS.values(), *(f" {word}" * 9 for word in WORDS.split()), "0123456789"]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return str(tokenizer.to_str())


def tiny_gemma(max_tokens: int = 300, reference: Reference = "nvidia") -> Gemma2:
    """Always the same weights, each of them random, norms included."""
    gemma = Gemma2(TINY, gemma_tokenizer(), max_tokens=max_tokens, reference=reference)
    generator = torch.Generator().manual_seed(5)
    for parameter in gemma.parameters():
        fan = parameter.shape[-1] if parameter.ndim > 1 else 10
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan**0.5
    gemma.model.embed_tokens.weight.data *= 2.0
    return gemma


def peer_of(gemma: Gemma2) -> Any:
    """transformers' network with the same weights; eager, for its soft cap."""
    from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Model

    config = gemma.model.config
    model = Gemma2Model(
        Gemma2Config(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_heads,
            head_dim=config.head_dim,
            query_pre_attn_scalar=int(config.query_scale),
            attn_logit_softcapping=config.soft_cap,
            attn_implementation="eager",
        )
    )
    model.load_state_dict(gemma.model.state_dict(), strict=True)
    return model.eval()


def peer_tokenizer() -> Any:
    """transformers' wrapper around the same tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(gemma_tokenizer()),
        bos_token="<bos>",
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
    )
