"""The flags of `sana generate`, made from `Request`'s fields, and a request written as a command.

`parameters` turns every field but the prompt into a keyword of the command's signature, which is
what the command line library reads; `command_line` is its inverse for `sana info`.
"""

from __future__ import annotations

import inspect
import shlex
from typing import Annotated, Any, get_type_hints

from cyclopts import Parameter

from sana.request import Request

SHORT = {
    "negative_prompt": ("-n",),
    "seeds": ("-s",),
    "width": ("-W",),
    "height": ("-H",),
    "model": ("-m",),
}


def flag(field: str) -> str:
    """The flag of a field: `--negative-prompt`; a flag that repeats is in the singular."""
    return "--" + {"seeds": "seed"}.get(field, field).replace("_", "-")


def parameters() -> list[inspect.Parameter]:
    """One optional keyword for each field of `Request` but the prompt; None means not given."""
    hints = get_type_hints(Request)
    made = []
    for name, field in Request.model_fields.items():
        if name == "prompt":
            continue
        names = [flag(name), *SHORT.get(name, ())]
        default = "the model's own" if field.default is None else _plain(field.default) or "none"
        text = f"{field.description} [default: {default}]"
        how = Parameter(name=names, help=text, negative="", show_default=False)
        made.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[hints[name] | None, how],
            )
        )
    return made


def command_line(request: Request) -> str:
    """A shell command that makes `request` again, every value written out."""
    words = ["sana", "generate"]
    for name, value in request.model_dump().items():
        if name == "prompt" or value is None or value == "" or (name == "count" and value == 1):
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [flag(name), _plain(item)]
    dash = ["--"] if request.prompt.startswith("-") else []
    return shlex.join([*words, *dash, request.prompt])


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
