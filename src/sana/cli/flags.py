"""The flags of `sana generate`, made from `Request`'s fields, and a request written as a command.

`parameters` turns every field but the prompt into a keyword of the command's signature, which is
what the command line library reads; `command_line` is its inverse for `sana info`.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator
from typing import Annotated, Any, get_type_hints

from cyclopts import Group, Parameter

from sana.request import Request

SHORT = {
    "negative_prompt": ("-n",),
    "seeds": ("-s",),
    "width": ("-W",),
    "height": ("-H",),
    "image": ("-i",),
    "model": ("-m",),
}
SINGULAR = {
    "seeds": "seed",
    "pag_blocks": "pag_block",
    "loras": "lora",
    "lora_scales": "lora_scale",
}
PICTURE = Group("Picture", sort_key=1)
FILES = Group("Files", sort_key=2)
IMAGE = Group("Start from an image", sort_key=3)
CONTROL = Group("Follow edges (models with a ControlNet)", sort_key=4)
SAMPLING = Group("Sampling", sort_key=5)
MODEL = Group("Model and machine", sort_key=6)
GROUPS = {
    PICTURE: ("negative_prompt", "seeds", "count", "width", "height", "binning"),
    IMAGE: ("image", "strength", "mask", "feather"),
    CONTROL: ("control", "control_detector", "control_scale", "control_start", "control_end"),
    SAMPLING: (
        *("steps", "guidance", "sampler", "shift"),
        *("guidance_interval", "pag_scale", "pag_blocks"),
    ),
    MODEL: ("model", "loras", "lora_scales"),
}
"""The panels of the help, each with its fields in order."""
DEFAULTS = {
    "binning": "on for official models and for other sizes",
    "guidance_interval": "always",
    "pag_scale": "off",
    "pag_blocks": "one in the middle",
    "image": "none",
    "strength": "0.6, or 1 with a mask",
    "mask": "none",
    "feather": "8",
    "control": "none",
    "control_detector": "none",
    "control_scale": "1",
    "control_start": "0",
    "control_end": "1",
    "lora_scales": "1 each",
}


def flag(field: str) -> str:
    """The flag of a field: `--negative-prompt`; a flag that repeats is in the singular."""
    return "--" + SINGULAR.get(field, field).replace("_", "-")


def parameters() -> list[inspect.Parameter]:
    """One optional keyword for each field of `Request` but the prompt; None means not given."""
    return [_parameter(name, group) for group, names in GROUPS.items() for name in names]


def command_line(request: Request) -> str:
    """A shell command that makes `request` again, every value written out."""
    words = ["sana", "generate"]
    for name, value in request.model_dump().items():
        is_default = value is None or value in ("", ()) or (name == "count" and value == 1)
        if name != "prompt" and not is_default:
            words += _words(name, value)
    dash = ["--"] if request.prompt.startswith("-") else []
    return shlex.join([*words, *dash, request.prompt])


def _parameter(name: str, group: Group) -> inspect.Parameter:
    field = Request.model_fields[name]
    hint = get_type_hints(Request)[name]
    if name in DEFAULTS:
        default = DEFAULTS[name]
    else:
        default = "the model's own" if field.default is None else _plain(field.default) or "none"
    how = Parameter(
        name=[flag(name), *SHORT.get(name, ())],
        help=f"{field.description} [default: {default}]",
        negative=f"--no-{name}" if name == "binning" else "",
        show_default=False,
        group=group,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[hint | None, how],
    )


def _words(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield flag(name) if value else f"--no-{name}"
    elif name == "guidance_interval":
        yield from (flag(name), *map(_plain, value))
    else:
        for item in value if isinstance(value, tuple) else (value,):
            yield from (flag(name), _plain(item))


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
