"""The rule book: what is refused and how that is said, and requests to JSON and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sana.errors import RequestError
from sana.request import IMAGE_LIMIT, PROMPT_LIMIT, RULES, SEED_LIMIT, Request

REFUSED = [
    ({}, "there is no prompt; .* write what to draw"),
    ({"prompt": ""}, "prompt is empty; .* write what to draw"),
    ({"prompt": " \n\t"}, "prompt is empty"),
    ({"prompt": "x" * 10_000}, "prompt is 10000 characters long .* at most 2000 characters"),
    ({"prompt": 3}, "prompt is 3; it must be text"),
    ({"prompt": "\udcff"}, r"prompt is '\\udcff', which holds bytes that are not text; use UTF-8"),
    ({"negative_prompt": "x" * 2001}, "negative_prompt is 2001 characters long .* leave it out"),
    ({"steps": 0}, "steps is 0; it must be a whole number from 1 to 200; 20 is usual"),
    ({"steps": 201}, "steps is 201"),
    ({"steps": 2.5}, "steps is 2.5"),
    ({"steps": "many"}, "steps is 'many'"),
    ({"guidance": -0.1}, "guidance is -0.1; .* 1 .off. to 30; .* only Sprint models take less"),
    ({"guidance": 31}, "guidance is 31"),
    ({"guidance": float("nan")}, "guidance is nan"),
    ({"seeds": -1}, "seeds is -1; .* 1 to 64 seeds"),
    ({"seeds": (0, SEED_LIMIT + 1)}, "seeds is 9007199254740992"),
    ({"seeds": ()}, r"seeds is \(\)"),
    ({"seeds": tuple(range(IMAGE_LIMIT + 1))}, "seeds is "),
    ({"seeds": (1, "x")}, "seeds is 'x'"),
    ({"count": 0}, "count is 0"),
    ({"seeds": (1, 2), "count": 33}, "2 seeds times a count of 33 is 66 pictures; .* split it"),
    ({"width": 63}, "width is 63; .* from 64 to 8192, best a multiple of 32, for example 512"),
    ({"height": 8193}, "height is 8193"),
    ({"width": 500, "binning": False}, "width is 500 and binning is off; .* ask for 512 or turn"),
    ({"sampler": "ddim"}, "sampler is 'ddim'; it must be dpm, euler or scm"),
    ({"binning": "often"}, "binning is 'often'; it must be true or false"),
    ({"guidance_interval": 0.5}, "guidance_interval is 0.5; it must be two times"),
    ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is 0.8 0.2; .* the smaller first"),
    ({"pag_scale": 31}, "pag_scale is 31; it must be a number from 0 .off. to 30"),
    ({"pag_blocks": (8,)}, "pag_blocks is .8,. and there is no pag_scale; .* leave pag_blocks out"),
    ({"pag_scale": 2, "pag_blocks": (-1,)}, "pag_blocks is -1; .* for example 8"),
    ({"image": ""}, "image is empty; it must be the name of a picture file"),
    ({"image": "a\0"}, "image is 'a.x00'; it must be the name"),
    ({"strength": 0.5}, "strength is 0.5 and there is no image; .* give image or leave strength"),
    ({"image": "a.png", "strength": 1.1}, "strength is 1.1; .* 0 .keep the image. to 1"),
    ({"mask": "m.png"}, "mask is 'm.png' and there is no image"),
    ({"image": "a.png", "mask": "a.png"}, "mask and image are both 'a.png'; a mask is a picture"),
    ({"image": "a.png", "feather": 3}, "feather is 3 and there is no mask"),
    ({"control_scale": 1}, "control_scale is 1.0 and there is no control"),
    ({"control": "c.png", "control_start": 0.5, "control_end": 0.5}, "the end must be the larger"),
    ({"control": "c.png", "control_start": 1.0}, "control_start is 1 and control_end 1"),
    ({"control": "c.png", "control_detector": "sobel"}, "control_detector is 'sobel'; .* canny"),
    ({"lora_scales": (1,)}, "lora_scales is .1.0,. and there is no loras"),
    ({"loras": ("a", "b"), "lora_scales": (1,)}, "there are 1 lora_scales for 2 loras"),
    ({"loras": ("a",), "lora_scales": (11,)}, "lora_scales is 11; each must be"),
    ({"shift": 0}, "shift is 0; it must be a number over 0"),
    ({"shift": float("inf")}, "shift is inf"),
    ({"model": ""}, "model is empty; .* for example sticker-512"),
    ({"stpes": 3}, "stpes is not a field of a request; did you mean steps?"),
    ({"num_inference_steps": 3}, "did you mean steps?"),
    ({"guidance_scale": 3}, "did you mean guidance?"),
    ({"seed": 3}, "did you mean seeds?"),
    ({"zzz": 3}, "zzz is not a field of a request; known are prompt, negative_prompt, steps"),
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=lambda value: str(value)[:40])
def test_refused_in_one_clear_sentence(fields: dict[str, Any], message: str) -> None:
    start = {"prompt": "a red fox"} if fields else {}
    with pytest.raises(RequestError, match=message) as caught:
        Request(**{**start, **fields})
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 320
    assert "pydantic" not in text


def test_every_field_has_a_rule_and_a_description() -> None:
    assert list(RULES) == list(Request.model_fields)
    assert all(field.description for field in Request.model_fields.values())


def test_limits_themselves_are_taken() -> None:
    Request(prompt="x" * PROMPT_LIMIT, steps=200, guidance=30, seeds=SEED_LIMIT, width=4096)
    Request(prompt="x", steps=1, guidance=0, seeds=0, count=IMAGE_LIMIT, height=64, shift=0.01)
    Request(prompt="x", image="a", strength=0, mask="b", feather=0, control="c", control_scale=0)


def test_a_request_does_not_change() -> None:
    request = Request(prompt="a red fox")
    with pytest.raises(ValidationError):
        request.steps = 3  # type: ignore[misc]
    assert hash(request) == hash(Request(prompt="a red fox"))
    assert request.replace(steps=3).steps == 3
    assert request.steps is None
    with pytest.raises(RequestError, match="steps is 0"):
        request.replace(steps=0)


def test_one_picture_for_each_seed_and_count() -> None:
    request = Request(prompt="a red fox", seeds=(7, 3), count=2)
    assert request.image_seeds == (7, 8, 3, 4)
    assert [single.image_seeds for single in request.singles()] == [(7,), (8,), (3,), (4,)]
    assert {single.replace(seeds=(7, 3), count=2) for single in request.singles()} == {request}
    assert Request(prompt="a red fox", seeds=7).seeds == (7,)
    assert Request(prompt="a red fox", seeds=[7, 8]).seeds == (7, 8)


def side() -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(64, 8192)


@given(
    fields=st.fixed_dictionaries(
        {"prompt": st.text(min_size=1, max_size=50).filter(str.strip)},
        optional={
            "negative_prompt": st.text(max_size=20),
            "steps": st.none() | st.integers(1, 200),
            "guidance": st.none() | st.floats(1, 30),
            "seeds": st.lists(st.integers(0, SEED_LIMIT), min_size=1, max_size=4),
            "count": st.integers(1, 16),
            "width": side(),
            "height": side(),
            "sampler": st.sampled_from([None, "dpm", "euler"]),
            "shift": st.none() | st.floats(0.01, 100),
            "image": st.just("cat.png"),
            "control": st.none() | st.just("edges.png"),
            "guidance_interval": st.none() | st.just((0.25, 0.75)),
            "loras": st.lists(st.just("a.safetensors"), max_size=3),
        },
    )
)
def test_json_there_and_back(fields: dict[str, Any]) -> None:
    request = Request(**fields)
    assert Request.from_json(request.to_json()) == request
    assert "\n" not in request.to_json()
    assert list(json.loads(request.to_json())) == list(RULES)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "a request must be JSON"),
        ("[1]", r"a request is \[1\]; it must be a JSON object"),
        ('{"prompt": "a", "steps": 0}', "steps is 0"),
    ],
)
def test_bad_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request.from_json(text)
