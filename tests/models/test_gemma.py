"""Gemma-2 as text encoder: its slice behind the instruction, its memory of it, its guards."""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemmas import TINY, gemma_tokenizer, tiny_gemma
from numerics import assert_detects, assert_matches
from sana.config import Reference
from sana.errors import CheckpointError
from sana.models.gemma import Gemma2, gemma_config
from sana.models.gemma_decoder import GemmaDecoder
from sana.models.instruction import INSTRUCTIONS
from sana.models.text import small_tokenizer

PROMPTS = {
    "short": "a red fox in the snow",
    "empty": "",
    "long": "red fox " * 200,
    "cjk": "雪の中の赤い狐, 水彩画",
    "emoji": "🦊❄️ fox",
    "digits": "3 cats and 12 foxes",
    "capitals": "  A RED Fox\n",
}
EVERY = pytest.mark.parametrize("prompt", list(PROMPTS.values()), ids=list(PROMPTS))


@pytest.fixture(scope="module")
def gemma() -> Gemma2:
    return tiny_gemma(max_tokens=40)


def straightforward(gemma: Gemma2, prompt: str) -> tuple[Tensor, list[int]]:
    """No memory, no prefix: pad to the full length, run everything, take the positions."""
    count = len(gemma.tokenizer.numbers(gemma.instruction))
    total = count + gemma.max_tokens - 2
    ids = gemma.tokenizer.numbers(gemma.instruction + prompt.strip())[:total]
    mask = torch.arange(total)[None] < len(ids)
    padded = torch.tensor([ids + [0] * (total - len(ids))])
    states = gemma.states(padded, mask)[0]
    kept = [0, *range(total - gemma.max_tokens + 1, total)]
    real = [position for position in kept if position < len(ids)]
    return states[real], [ids[position] for position in real]


@EVERY
def test_the_slice_equals_the_straightforward_way(gemma: Gemma2, prompt: str) -> None:
    expected, tokens = straightforward(gemma, prompt)
    text = gemma.encode([prompt])
    assert text.mask.sum().item() == len(tokens) <= gemma.max_tokens

    def check(states: Tensor) -> None:
        assert_matches(expected, states[0], 1e-6)  # floor 2.1e-7

    check(text.states)
    assert_detects(check, text.states.roll(1, dims=1))
    fresh = copy.deepcopy(gemma)
    fresh._prefix = None
    fresh.instruction = fresh.instruction.replace("Enhanced", "enhanced", 1)
    if len(tokens) > 1:
        assert_detects(check, fresh.encode([prompt]).states[:, : len(tokens)])


def test_the_last_token_of_the_instruction_melts_into_a_word_and_not_into_a_digit(
    gemma: Gemma2,
) -> None:
    """The golden token lists: what stands at the first places behind <bos>."""
    names = {number: piece for piece, number in gemma.tokenizer._tokenizer.get_vocab().items()}

    def first(prompt: str) -> list[str]:
        return [names[token] for token in straightforward(gemma, prompt)[1][:3]]

    assert first("cat") == ["<bos>", "▁cat"]
    assert first("") == ["<bos>", "▁"]
    assert first("3 cats") == ["<bos>", "▁", "3"]
    assert first("雪") == ["<bos>", "▁", "<0xE9>"]
    assert first("🦊") == ["<bos>", "▁", "<0xF0>"]


def test_the_instruction_is_read_once(gemma: Gemma2) -> None:
    fresh = tiny_gemma(max_tokens=40)
    lengths: list[int] = []
    fresh.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    fresh.encode([PROMPTS["short"], PROMPTS["digits"]])
    fresh.encode([PROMPTS["empty"]])
    count = len(fresh.tokenizer.numbers(fresh.instruction))
    assert lengths[0] == count - 1
    assert sum(lengths[1:]) < 40, "only the prompts' own tokens, and no padding"
    assert lengths[3] == 1


def test_the_empty_prompt_is_read_once(gemma: Gemma2) -> None:
    fresh = tiny_gemma(max_tokens=40)
    lengths: list[int] = []
    fresh.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    first = fresh.encode_negative(["", "blurry"]).states[0, :1]
    assert torch.equal(fresh.encode_negative([" "]).states[0], first)
    assert len(lengths) == 2
    fresh.load_state_dict({name: value * 1.1 for name, value in fresh.state_dict().items()})
    assert not torch.equal(fresh.encode_negative([""]).states[0], first)
    fresh.encode_negative([""], length=5)
    assert lengths[2:] == [1, 5]


def test_the_memory_follows_the_weights(gemma: Gemma2) -> None:
    model = tiny_gemma(max_tokens=40)
    before = model.encode(["a fox"]).states
    other = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(other)
    changed = model.encode(["a fox"]).states
    model._prefix = None
    assert torch.equal(changed, model.encode(["a fox"]).states)
    assert not torch.equal(changed, before)
    half = model.bfloat16().encode(["a fox"]).states
    assert half.dtype == torch.bfloat16


def test_prompts_do_not_depend_on_each_other(gemma: Gemma2) -> None:
    first = gemma.encode([PROMPTS["short"]]).states
    both = gemma.encode([PROMPTS["digits"], PROMPTS["short"]])
    again = gemma.encode([PROMPTS["short"]]).states
    assert torch.equal(first, again)
    assert torch.equal(both.states[1][both.mask[1]], first[0])
    assert not both.states[~both.mask].any()


@pytest.mark.parametrize("prompt", ["", "blurry, 3 hands"])
def test_a_negative_prompt_has_no_instruction(gemma: Gemma2, prompt: str) -> None:
    ids = torch.tensor([gemma.tokenizer.numbers(prompt)])
    expected = gemma.states(ids, torch.ones_like(ids, dtype=torch.bool))
    text = gemma.encode_negative([prompt])
    assert torch.equal(text.states, expected) and bool(text.mask.all())


def test_padding_states_of_the_negative_prompt_come_on_demand(gemma: Gemma2) -> None:
    """NVIDIA's convention reads them: they see the prompt, and not each other."""
    alone = gemma.encode_negative(["blurry"])
    count = alone.mask.shape[1]
    padded = gemma.encode_negative(["blurry"], length=12)
    assert padded.states.shape[1] == 12 and padded.mask.sum().item() == count
    assert_matches(alone.states, padded.states[:, :count], 1.5e-6)  # floor 1.5e-7
    [ids] = gemma.tokenize(["blurry"], 40)[:1]
    mask = torch.arange(40)[None] < count
    assert_matches(gemma.states(ids, mask)[:, :12], padded.states, 1.5e-6)  # floor 2e-7
    assert gemma.encode_negative(["blurry " * 20], length=3).states.shape[1] > 3
    two = gemma.encode_negative(["blurry", ""], length=1)
    assert two.mask.sum(1).tolist() == [count, 1]


def test_long_prompts_are_cut_with_a_warning(
    gemma: Gemma2, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        text = gemma.encode([PROMPTS["long"]])
    assert text.mask.shape == (1, 40)
    assert "'red fox red fox" in caplog.text and "and 39 are read" in caplog.text


def test_the_instruction_is_the_published_one() -> None:
    hashes = {
        "nvidia": "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1",
        "diffusers": "48290080bb4fd4a264bdc81d0647ac0221359a36506e2b3e954616d6cb48c3da",
    }
    for reference, text in INSTRUCTIONS.items():
        assert hashlib.sha256(text.encode()).hexdigest() == hashes[reference]
        assert len(text) == 1057


@pytest.mark.parametrize("reference", ["nvidia", "diffusers"])
def test_only_diffusers_lowers_the_prompt(reference: Reference) -> None:
    model = tiny_gemma(max_tokens=40, reference=reference)
    same = torch.equal(model.encode(["A Red FOX"]).states, model.encode(["a red fox"]).states)
    assert same == (reference == "diffusers")
    assert torch.equal(model.encode([" a fox\n"]).states, model.encode(["a fox"]).states)


def test_float16_is_refused_and_autocast_is_off(gemma: Gemma2) -> None:
    half = copy.deepcopy(gemma).half()
    with pytest.raises(CheckpointError, match="float16.*overflow.*bfloat16"):
        half.encode(["a fox"])
    expected = gemma.encode(["a fox"]).states
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gemma.encode(["a fox"]).states, expected)


def test_bfloat16_stays_near(gemma: Gemma2) -> None:
    expected = gemma.encode([PROMPTS["short"]]).states
    got = copy.deepcopy(gemma).bfloat16().encode([PROMPTS["short"]]).states.float()
    assert_matches(expected, got, 0.05)  # floor 0.011
    assert_detects(lambda states: assert_matches(expected, states, 0.05), got.roll(1, dims=1))


def test_the_soft_cap_counts(gemma: Gemma2) -> None:
    uncapped = Gemma2(replace(TINY, soft_cap=1e9), gemma_tokenizer(), max_tokens=40)
    uncapped.load_state_dict(gemma.state_dict())
    expected = gemma.encode(["a fox"]).states
    assert_detects(
        lambda states: assert_matches(expected, states, 1e-3), uncapped.encode(["a fox"]).states
    )


def test_configs_of_transformers_4_and_5_are_read() -> None:
    data = {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "vocab_size": 256000,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-6,
    }
    four = gemma_config({**data, "rope_theta": 10000.0}, "config.json")
    five = gemma_config({**data, "rope_parameters": {"rope_theta": 10000.0}}, "config.json")
    assert four == five == type(four)()
    with pytest.raises(CheckpointError, match="describes a 't5' model"):
        gemma_config({"model_type": "t5"}, "config.json")
    del data["head_dim"]
    with pytest.raises(CheckpointError, match="has no 'head_dim'"):
        gemma_config(data, "config.json")
    with pytest.raises(CheckpointError, match="3 query and 2 key heads"):
        replace(TINY, heads=3)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="of an empty prompt; Gemma's makes <bos> alone"):
        Gemma2(TINY, small_tokenizer(160))
    with pytest.raises(CheckpointError, match="tokens and Gemma-2 has rows for 300"):
        Gemma2(replace(TINY, vocabulary=300), gemma_tokenizer())


def test_the_full_size_has_the_published_count() -> None:
    with torch.device("meta"):
        decoder = GemmaDecoder(type(TINY)())
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 2_614_341_888
