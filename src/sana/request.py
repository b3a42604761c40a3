"""One generation, described: the only rule book for the Python API, the command line and HTTP.

A field that is None takes the model's own default when the pipeline resolves the request. Ranges
that depend on the model (its largest size) are checked there; all others are checked here, and a
request that breaks one cannot exist. Pictures and LoRAs are named, not held: a name is a file, or
whatever the caller of the pipeline calls a picture in memory. Start reading at `Request`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from sana.errors import RequestError

PROMPT_LIMIT = 2000
STEP_LIMIT = 200
GUIDANCE_LIMIT = 30
SHIFT_LIMIT = 100
IMAGE_LIMIT = 64
SEED_LIMIT = 2**53 - 1
SIDE_MULTIPLE = 32
SIDE_LEAST = 64
SIDE_LIMIT = 8192
SCALE_LIMIT = 10
LORA_LIMIT = 16
BLOCK_LIMIT = 200
FEATHER_LIMIT = 512
NAME_LIMIT = 4096

_SIDE_RULE = (
    f"it must be a whole number from {SIDE_LEAST} to {SIDE_LIMIT}, best a multiple of "
    f"{SIDE_MULTIPLE}, for example 512"
)
_FILE_RULE = "it must be the name of a picture file, for example cat.png"
_PART_RULE = "it must be a number from 0 (the first step) to 1 (the last)"
_TEXT_RULE = f"it must be text of at most {PROMPT_LIMIT} characters"
RULES: Mapping[str, str] = {
    "prompt": f"{_TEXT_RULE} and not empty; write what to draw, for example 'a red fox'",
    "negative_prompt": f"{_TEXT_RULE}; leave it out if there is nothing to avoid",
    "steps": f"it must be a whole number from 1 to {STEP_LIMIT}; 20 is usual",
    "guidance": f"it must be a number from 1 (off) to {GUIDANCE_LIMIT}; 4.5 is usual, and only "
    "Sprint models take less than 1",
    "seeds": f"a request takes 1 to {IMAGE_LIMIT} seeds, each a whole number from 0 to "
    f"{SEED_LIMIT}, for example 7",
    "count": f"it must be a whole number from 1 to {IMAGE_LIMIT}",
    "width": _SIDE_RULE,
    "height": _SIDE_RULE,
    "binning": "it must be true or false; leave it out to let the model and the size decide",
    "sampler": "it must be dpm, euler or scm; dpm needs fewer steps, and scm is for Sprint models",
    "shift": f"it must be a number over 0 and at most {SHIFT_LIMIT}; 1 means no shift, 3 is usual",
    "guidance_interval": "it must be two times, the smaller first, from 0 (the picture) to 1 "
    "(noise), for example 0.2 0.8",
    "pag_scale": f"it must be a number from 0 (off) to {GUIDANCE_LIMIT}; 2 to 3 is usual",
    "pag_blocks": f"it must be whole numbers from 0 to {BLOCK_LIMIT}, for example 8",
    "image": _FILE_RULE,
    "strength": "it must be a number from 0 (keep the image) to 1 (ignore it); 0.6 is usual",
    "mask": f"{_FILE_RULE}, white where the image is drawn anew and black where it is kept",
    "feather": f"it must be a whole number of pixels from 0 to {FEATHER_LIMIT}; 8 is usual",
    "control": _FILE_RULE,
    "control_detector": "it must be none (the picture is a ready control image), hed or canny",
    "control_scale": f"it must be a number from 0 (off) to {SCALE_LIMIT}; 1 is usual",
    "control_start": _PART_RULE,
    "control_end": f"{_PART_RULE}, and more than control_start",
    "loras": f"a request takes up to {LORA_LIMIT} LoRAs, each the name of a .safetensors file",
    "lora_scales": f"each must be a number from -{SCALE_LIMIT} to {SCALE_LIMIT}; 1 is usual",
    "model": "it must be the name of a model or its folder, for example sticker-512",
}
"""What each field takes and the way out, for messages."""
NEEDS: Mapping[str, str] = {
    "strength": "image",
    "mask": "image",
    "feather": "mask",
    "control_detector": "control",
    "control_scale": "control",
    "control_start": "control",
    "control_end": "control",
    "pag_blocks": "pag_scale",
    "lora_scales": "loras",
}
"""Fields that mean nothing without another."""

Prompt = Annotated[str, Field(max_length=PROMPT_LIMIT)]
Seed = Annotated[int, Field(ge=0, le=SEED_LIMIT)]
Side = Annotated[int, Field(ge=SIDE_LEAST, le=SIDE_LIMIT)]
Name = Annotated[str, Field(min_length=1, max_length=NAME_LIMIT, pattern=r"^[^\x00]*$")]
Block = Annotated[int, Field(ge=0, le=BLOCK_LIMIT)]
Part = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=-SCALE_LIMIT, le=SCALE_LIMIT, allow_inf_nan=False)]


class Request(BaseModel):
    """What to draw and how; frozen, and valid if it exists. Raises `RequestError` otherwise.

    Each seed gives `count` pictures; picture i of seed s starts from the noise of seed s + i.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Prompt = Field(min_length=1, description="what to draw, in words")
    negative_prompt: Prompt = Field("", description="what to keep out of the picture")
    steps: int | None = Field(
        None,
        ge=1,
        le=STEP_LIMIT,
        description="evaluations of the network; more is finer and slower",
    )
    guidance: float | None = Field(
        None,
        ge=0,
        le=GUIDANCE_LIMIT,
        allow_inf_nan=False,
        description="how strongly the prompt pulls; 1 turns guidance off and halves the time",
    )
    seeds: tuple[Seed, ...] = Field(
        (0,), min_length=1, max_length=IMAGE_LIMIT, description="starting noise; repeatable"
    )
    count: int = Field(1, ge=1, le=IMAGE_LIMIT, description="pictures for each seed: s, s+1, ...")
    width: Side | None = Field(None, description="pixels, best a multiple of 32")
    height: Side | None = Field(None, description="pixels, best a multiple of 32")
    binning: bool | None = Field(
        None,
        description="draw at the nearest size of the model's training, then resize and crop to "
        "the size asked for",
    )
    sampler: Literal["dpm", "euler", "scm"] | None = Field(
        None, description="how the flow is integrated"
    )
    shift: float | None = Field(
        None,
        gt=0,
        le=SHIFT_LIMIT,
        allow_inf_nan=False,
        description="moves the steps towards noise; 1 spreads them evenly",
    )
    guidance_interval: tuple[Part, Part] | None = Field(
        None, description="guide only at times between these two; 1 is noise, 0 the picture"
    )
    pag_scale: float | None = Field(
        None,
        ge=0,
        le=GUIDANCE_LIMIT,
        allow_inf_nan=False,
        description="perturbed-attention guidance, for cleaner shapes; costs half as much again",
    )
    pag_blocks: tuple[Block, ...] = Field(
        (), max_length=BLOCK_LIMIT, description="blocks that perturbed attention acts on"
    )
    image: Name | None = Field(None, description="a picture to start from")
    strength: Part | None = Field(
        None, description="how much of the image is redrawn: 0 keeps it, 1 ignores it"
    )
    mask: Name | None = Field(
        None, description="a picture, white where the image is drawn anew and black where kept"
    )
    feather: int | None = Field(
        None,
        ge=0,
        le=FEATHER_LIMIT,
        description="pixels over which the mask's edge fades, inside the white part",
    )
    control: Name | None = Field(None, description="a picture whose edges the new one follows")
    control_detector: Literal["none", "hed", "canny"] | None = Field(
        None, description="how edges are found in it; none: it is edges already"
    )
    control_scale: float | None = Field(
        None,
        ge=0,
        le=SCALE_LIMIT,
        allow_inf_nan=False,
        description="how strongly edges are followed",
    )
    control_start: Part | None = Field(None, description="part of the steps after which it begins")
    control_end: Part | None = Field(None, description="part of the steps after which it ends")
    loras: tuple[Name, ...] = Field(
        (), max_length=LORA_LIMIT, description="LoRA file to add; repeatable"
    )
    lora_scales: tuple[Scale, ...] = Field(
        (), max_length=LORA_LIMIT, description="strength of each LoRA, in the same order"
    )
    model: str = Field("sticker-512", min_length=1, description="name of a model, or its folder")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RequestError(_sentence(error.errors()[0])) from None

    @field_validator("seeds", mode="before")
    @classmethod
    def _one_seed_is_a_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise PydanticCustomError("blank", "blank")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Request:
        for broken in _contradictions(self):
            raise PydanticCustomError("contradiction", "{message}", {"message": broken})
        return self

    @property
    def image_seeds(self) -> tuple[int, ...]:
        """The noise seed of every picture, in order."""
        return tuple(seed + index for seed in self.seeds for index in range(self.count))

    def replace(self, **changes: Any) -> Request:
        """The same request with other values, checked again."""
        return Request(**{**self.model_dump(), **changes})

    def singles(self) -> tuple[Request, ...]:
        """One request for each picture; together they draw what this one draws, bit for bit."""
        return tuple(self.replace(seeds=(seed,), count=1) for seed in self.image_seeds)

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives the same request back."""
        return json.dumps(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read what `to_json` wrote; raises `RequestError`."""
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise RequestError(f"a request must be JSON, and this is not: {error}") from None
        if not isinstance(fields, dict):
            raise RequestError(
                f"a request is {_shown(fields)}; it must be a JSON object such as "
                '{"prompt": "a red fox"}'
            )
        return cls(**fields)


def _contradictions(request: Request) -> Iterator[str]:
    """What is wrong with fields taken together, each with its way out."""
    total = len(request.seeds) * request.count
    if total > IMAGE_LIMIT:
        yield (
            f"{len(request.seeds)} seeds times a count of {request.count} is {total} pictures; "
            f"a request takes at most {IMAGE_LIMIT}, so split it"
        )
    for name, needed in NEEDS.items():
        if getattr(request, name) not in (None, ()) and not getattr(request, needed):
            yield (
                f"{name} is {_shown(getattr(request, name))} and there is no {needed}; it has an "
                f"effect only together with one, so give {needed} or leave {name} out"
            )
    if request.mask is not None and request.mask == request.image:
        yield (
            f"mask and image are both {_shown(request.mask)}; a mask is a picture of its own, "
            "white where the image is drawn anew and black where it is kept"
        )
    yield from _contradictory_numbers(request)


def _contradictory_numbers(request: Request) -> Iterator[str]:
    for name in ("width", "height"):
        side = getattr(request, name)
        if request.binning is False and side is not None and side % SIDE_MULTIPLE:
            yield (
                f"{name} is {side} and binning is off; without it a side must be a multiple of "
                f"{SIDE_MULTIPLE}, so ask for {round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE} or "
                "turn binning on"
            )
    if request.lora_scales and len(request.lora_scales) != len(request.loras):
        yield (
            f"there are {len(request.lora_scales)} lora_scales for {len(request.loras)} loras; "
            "give one for each, or none for 1 each"
        )
    start = request.control_start or 0.0
    end = 1.0 if request.control_end is None else request.control_end
    if start >= end:
        yield f"control_start is {start:g} and control_end {end:g}; the end must be the larger"
    low, high = request.guidance_interval or (0.0, 1.0)
    if low >= high:
        yield (
            f"guidance_interval is {low:g} {high:g}; {RULES['guidance_interval']}, or leave it out"
        )


def _sentence(error: ErrorDetails) -> str:
    """Value seen, rule, way out: one sentence for the first thing that is wrong."""
    if not error["loc"]:
        return error["msg"]
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        inside = [field for field in RULES if field in name]
        near = inside or difflib.get_close_matches(name, RULES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(RULES)}"
        return f"{name} is not a field of a request; {hint}"
    if error["type"] == "missing":
        return f"there is no {name}; {RULES[name]}"
    if error["type"] == "string_unicode":
        return f"{name} is {_shown(error['input'])}, which holds bytes that are not text; use UTF-8"
    return f"{name} is {_shown(error['input'])}; {RULES[name]}"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        if not value.strip():
            return "empty"
        if len(value) > 60:
            return f"{len(value)} characters long ({value[:20]!a}...)"
        return ascii(value) if not value.isprintable() else repr(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
