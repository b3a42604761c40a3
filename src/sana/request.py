"""One generation, described: the only rule book for the Python API, the command line and HTTP.

A field that is None takes the model's own default when the pipeline resolves the request. Ranges
that depend on the model (its largest size) are checked there; all others are checked here, and a
request that breaks one cannot exist. Start reading at `Request`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
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
SIDE_LIMIT = 4096

_SIDE_RULE = (
    f"it must be a multiple of {SIDE_MULTIPLE} from {SIDE_LEAST} to {SIDE_LIMIT}, for example 512"
)
_TEXT_RULE = f"it must be text of at most {PROMPT_LIMIT} characters"
RULES: Mapping[str, str] = {
    "prompt": f"{_TEXT_RULE} and not empty; write what to draw, for example 'a red fox'",
    "negative_prompt": f"{_TEXT_RULE}; leave it out if there is nothing to avoid",
    "steps": f"it must be a whole number from 1 to {STEP_LIMIT}; 20 is usual",
    "guidance": f"it must be a number from 1 (off) to {GUIDANCE_LIMIT}; 4.5 is usual",
    "seeds": f"a request takes 1 to {IMAGE_LIMIT} seeds, each a whole number from 0 to "
    f"{SEED_LIMIT}, for example 7",
    "count": f"it must be a whole number from 1 to {IMAGE_LIMIT}",
    "width": _SIDE_RULE,
    "height": _SIDE_RULE,
    "sampler": "it must be dpm or euler; dpm needs fewer steps",
    "shift": f"it must be a number over 0 and at most {SHIFT_LIMIT}; 1 means no shift, 3 is usual",
    "model": "it must be the name of a model or its folder, for example sticker-512",
}
"""What each field takes and the way out, for messages."""

Prompt = Annotated[str, Field(max_length=PROMPT_LIMIT)]
Seed = Annotated[int, Field(ge=0, le=SEED_LIMIT)]
Side = Annotated[int, Field(ge=SIDE_LEAST, le=SIDE_LIMIT, multiple_of=SIDE_MULTIPLE)]


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
        ge=1,
        le=GUIDANCE_LIMIT,
        allow_inf_nan=False,
        description="how strongly the prompt pulls; 1 turns guidance off and halves the time",
    )
    seeds: tuple[Seed, ...] = Field(
        (0,), min_length=1, max_length=IMAGE_LIMIT, description="starting noise; repeatable"
    )
    count: int = Field(1, ge=1, le=IMAGE_LIMIT, description="pictures for each seed: s, s+1, ...")
    width: Side | None = Field(None, description="pixels, a multiple of 32")
    height: Side | None = Field(None, description="pixels, a multiple of 32")
    sampler: Literal["dpm", "euler"] | None = Field(None, description="how the flow is integrated")
    shift: float | None = Field(
        None,
        gt=0,
        le=SHIFT_LIMIT,
        allow_inf_nan=False,
        description="moves the steps towards noise; 1 spreads them evenly",
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
    def _is_not_too_many(self) -> Request:
        total = len(self.seeds) * self.count
        if total > IMAGE_LIMIT:
            raise PydanticCustomError(
                "too_many",
                f"{len(self.seeds)} seeds times a count of {self.count} is {total} pictures; "
                f"a request takes at most {IMAGE_LIMIT}, so split it",
            )
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
