"""The text seat: MiniLM is BERT, padding changes nothing, offsets point at words."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn

from numerics import assert_detects, assert_matches
from sana.config import TextConfig
from sana.errors import CheckpointError, RequestError
from sana.models.text import MiniLM, PromptTokenizer, small_tokenizer

CONFIG = TextConfig(
    kind="minilm", width=32, max_tokens=24, layers=2, heads=2, mlp_width=64, vocabulary=160
)
PROMPTS = ["a red fox", "", "two blue cats to the left of a yellow car"]


@pytest.fixture(scope="module")
def encoder() -> MiniLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = MiniLM(CONFIG, small_tokenizer(CONFIG.vocabulary))
        for parameter in made.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(small_tokenizer(160), 24)


def make_bert(encoder: MiniLM) -> nn.Module:
    """transformers' network with the encoder's weights, loaded strictly."""
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.bert.modeling_bert import BertModel

    config = BertConfig(
        vocab_size=CONFIG.vocabulary,
        hidden_size=CONFIG.width,
        num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads,
        intermediate_size=CONFIG.mlp_width,
        max_position_embeddings=CONFIG.max_tokens,
        type_vocab_size=1,
    )
    model: nn.Module = BertModel(config, add_pooling_layer=False).eval()
    model.load_state_dict(encoder.bert.state_dict(), strict=True)
    return model


def test_shapes_and_dtypes(encoder: MiniLM) -> None:
    text = encoder.encode(PROMPTS)
    assert text.states.shape == (3, text.mask.shape[1], encoder.width)
    assert text.states.dtype == torch.float32 and text.mask.dtype == torch.bool
    assert text.mask.sum(1).tolist()[1] == 2, "the empty prompt is its two special tokens"
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parity
@pytest.mark.parametrize("bound", [2e-6])  # floor 3.9e-07
@pytest.mark.parametrize("pad_to", [None, 19, 24])
def test_minilm_is_transformers_bert(encoder: MiniLM, pad_to: int | None, bound: float) -> None:
    ids, mask = encoder.tokenize(PROMPTS, pad_to)
    model = make_bert(encoder)
    output = model(input_ids=ids, attention_mask=mask.long(), return_dict=True)
    wanted = output.last_hidden_state

    def check(mine: MiniLM) -> None:
        assert_matches(wanted[mask], mine.states(ids, mask)[mask], bound)

    check(encoder)
    for name in encoder.state_dict():
        faulty = copy.deepcopy(encoder)
        tensor = faulty.state_dict()[name]
        tensor.view(-1)[::2] *= 1.01
        if not name.endswith("key.bias"):  # adds the same to every logit of a query
            assert_detects(check, faulty)


@pytest.mark.parametrize("bound", [2e-6])  # floor 4.7e-07
@pytest.mark.parametrize("pad_to", [19, 24])
def test_padding_does_not_change_real_tokens(encoder: MiniLM, pad_to: int, bound: float) -> None:
    alone = [encoder.encode([prompt]).states[0] for prompt in PROMPTS]
    ids, mask = encoder.tokenize(PROMPTS, pad_to)
    assert ids.shape == (3, pad_to)

    def check(mask_seen: Tensor) -> None:
        states = encoder.states(ids, mask_seen)
        assert_matches(torch.cat(alone), states[mask], bound)

    check(mask)
    seen = mask.clone()
    seen[0, -1] = True
    assert_detects(check, seen)


def test_a_negative_prompt_is_read_like_any_other(encoder: MiniLM) -> None:
    plain, negative = encoder.encode(["a fox"]), encoder.encode_negative(["a fox"], length=20)
    assert torch.equal(plain.states, negative.states) and torch.equal(plain.mask, negative.mask)


def test_bfloat16_autocast(encoder: MiniLM) -> None:
    wanted = encoder.encode(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder.encode(PROMPTS)

    def check(states: Tensor) -> None:
        assert_matches(wanted.states[wanted.mask], states.float()[wanted.mask], 0.05)  # 0.010

    check(got.states)
    assert_detects(check, got.states.roll(1, dims=1))


def test_long_prompts_are_cut_with_a_warning(
    tokenizer: PromptTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long = "red fox " * 40
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer.tokenize(["cat", long, long])
    assert "2 of 3 prompts are longer than the 24 tokens" in caplog.text
    assert ids.shape == (3, 24) and bool(mask[1].all())
    assert ids[1, -1] == ids[0, 2], "the closing token stays"
    caplog.clear()
    tokenizer.tokenize(["cat"])
    assert not caplog.text
    short, _ = tokenizer.tokenize([long], 6)
    assert short.shape == (1, 6)


def test_offsets_point_at_the_words(tokenizer: PromptTokenizer) -> None:
    prompt = "Two RED foxes, a Café"
    ids, mask, offsets = tokenizer.tokenize_with_offsets([prompt, "cat"], pad_to=24)
    assert offsets.shape == (2, 24, 2) and offsets.dtype == torch.int64
    assert not offsets[~mask].any() and offsets[0, 0].tolist() == [0, 0]
    start = prompt.index("RED")
    red = [row for row in offsets[0].tolist() if row == [start, start + 3]]
    assert len(red) == 1
    covered = {i for low, high in offsets[0].tolist() for i in range(low, high)}
    assert covered == {i for i, letter in enumerate(prompt) if letter != " "}


def test_small_tokenizer_is_fixed_and_spells_anything(tokenizer: PromptTokenizer) -> None:
    assert small_tokenizer(160) == small_tokenizer(160)
    assert tokenizer.size <= 160
    unknown = json.loads(small_tokenizer(160))["model"]["vocab"]["[UNK]"]
    ids, _ = tokenizer.tokenize(["xylophone z9 (quick)"])
    assert unknown not in ids[0]
    with pytest.raises(CheckpointError, match="vocabulary of 20 is too small"):
        small_tokenizer(20)


def test_bad_input() -> None:
    with pytest.raises(CheckpointError, match="tokenizer definition cannot be read"):
        PromptTokenizer("{}", 8)
    with pytest.raises(CheckpointError, match="has 201 tokens and the network has 160"):
        MiniLM(CONFIG, small_tokenizer(160).replace('"[MASK]": 4', '"[MASK]": 4, "x1": 200'))
    plain = PromptTokenizer(small_tokenizer(160), 8)
    for prompts in ("a bare string", []):
        with pytest.raises(RequestError, match="not a list of prompts"):
            plain.tokenize(prompts)


def test_tokenizer_can_be_sent_to_workers(tokenizer: PromptTokenizer) -> None:
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copied.tokenize(PROMPTS)[0], tokenizer.tokenize(PROMPTS)[0])
