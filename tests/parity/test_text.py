"""Gemma-2 against transformers, and prompts against diffusers' pipeline, on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemmas import peer_of, peer_tokenizer, tiny_gemma
from numerics import assert_detects, assert_matches
from sana.models.gemma import Gemma2
from sana.models.instruction import INSTRUCTIONS

pytestmark = pytest.mark.parity

PROMPTS = {
    "short": "a red fox in the snow",
    "empty": "",
    "long": "red fox " * 200,
    "cjk": "雪の中の赤い狐, 水彩画",
    "emoji": "🦊❄️ Fox",
    "digits": "3 cats and 12 foxes",
    "capitals": "  A RED Fox\n",
}


@pytest.fixture(scope="module")
def gemma() -> Gemma2:
    return tiny_gemma(reference="diffusers")


@pytest.fixture(scope="module")
def pipeline(gemma: Gemma2) -> Any:
    """diffusers' pipeline with a text encoder and nothing else."""
    from diffusers import SanaPipeline

    return SanaPipeline(
        tokenizer=peer_tokenizer(),
        text_encoder=peer_of(gemma),
        vae=None,
        transformer=None,
        scheduler=None,
    )


@pytest.mark.parametrize("length", [1, 3, 63])
def test_decoder(gemma: Gemma2, pipeline: Any, length: int) -> None:
    ids = torch.randint(3, 700, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length)[None] < torch.tensor([length, max(1, length // 2)])[:, None]
    with torch.no_grad():
        expected = pipeline.text_encoder(ids, attention_mask=mask.long())[0]

    def check(model: Gemma2) -> None:
        assert_matches(expected, model.states(ids, mask), 2e-6)  # floor 2.3e-7

    check(gemma)
    faulty = tiny_gemma(reference="diffusers")
    faulty.model.layers[1].input_layernorm.weight.data.mul_(1.01)
    assert_detects(check, faulty)


@pytest.mark.parametrize("prompt", list(PROMPTS.values()), ids=list(PROMPTS))
def test_prompts(gemma: Gemma2, pipeline: Any, prompt: str) -> None:
    """States at the real positions and the masks, of the prompt and of the negative one."""
    states, mask, negative, negative_mask = pipeline.encode_prompt(
        prompt,
        negative_prompt=prompt,
        device=torch.device("cpu"),
        complex_human_instruction=INSTRUCTIONS["diffusers"].split("\n"),
    )
    assert states.shape == negative.shape == (1, 300, 32)
    ours, plain = gemma.encode([prompt]), gemma.encode_negative([prompt])
    assert ours.mask.sum() == mask.sum() and plain.mask.sum() == negative_mask.sum()

    def check(pair: tuple[Tensor, Tensor]) -> None:
        assert_matches(states[mask.bool()], pair[0][0], 3e-6)  # floor 3.6e-7
        assert_matches(negative[negative_mask.bool()], pair[1][0], 3e-6)

    check((ours.states, plain.states))
    other = tiny_gemma(reference="nvidia").encode([prompt]).states
    assert_detects(check, (other, plain.states))


def test_padding_states_for_nvidias_convention(gemma: Gemma2, pipeline: Any) -> None:
    """What the peer computes for the padding of a negative prompt is what we make on demand."""
    _, _, negative, _ = pipeline.encode_prompt(
        "a fox", negative_prompt="blurry", device=torch.device("cpu")
    )

    def check(prompt: str) -> None:
        ours = gemma.encode_negative([prompt], length=20).states
        assert_matches(negative[:, :20], ours, 1e-6)  # floor 1.1e-7

    check("blurry")
    assert_detects(check, "blur")
