"""Prompt lists in the benchmarks' own formats, and which pictures of a folder belong to which.

Read are plain text (a prompt a line), JSON lines with a "prompt", GenEval's
evaluation_metadata.jsonl, DPG-Bench's folder of text files and MJHQ-30K's meta_data.json. Start at
`read_prompts`; `match` is the rule that refuses a folder whose pictures do not fit the list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana.errors import RequestError
from sana.evaluation.folders import list_pictures

LIST = "prompts.jsonl"
"""The list that a folder of drawn pictures carries."""
_KEY = re.compile(r"[\w-][\w.-]*")
FORMATS = (
    'it must be a .txt file (a prompt a line), a .jsonl file with a "prompt" in each line, '
    "MJHQ's meta_data.json, or a folder of .txt files as DPG-Bench has"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One prompt; `key` names its pictures, `facts` is what its line says besides."""

    key: str
    prompt: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_geneval(self) -> bool:
        return "tag" in self.facts and "include" in self.facts

    def file(self, number: int) -> Path:
        """Where picture `number` goes in a folder; GenEval's prompts as its own program puts it."""
        inner = Path(self.key, "samples") if self.is_geneval else Path(self.key)
        return inner / f"{number:04}.png"


def read_prompts(source: Path) -> tuple[Item, ...]:
    """The prompts of a list or folder, in order; raises `RequestError`."""
    if source.is_dir():
        items = _folder(source)
    elif source.suffix == ".jsonl":
        items = [_item(source, n, line) for n, line in enumerate(_lines(source))]
    elif source.suffix == ".json":
        items = _mjhq(source)
    elif source.suffix == ".txt":
        items = [Item(key=f"{n:05}", prompt=line) for n, line in enumerate(_lines(source))]
    else:
        raise RequestError(f"prompts is {source}; {FORMATS}")
    _check(items, source)
    return tuple(items)


def write_list(items: Sequence[Item], path: Path) -> None:
    """Write the items as JSON lines that `read_prompts` gives back."""
    lines = [json.dumps({**i.facts, "key": i.key, "prompt": i.prompt}) for i in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def items_of(folder: Path, prompts: Path | None) -> tuple[Item, ...]:
    """The prompts of the pictures in `folder`: its own list, unless another is named."""
    source = prompts or folder / LIST
    if prompts is None and not source.exists():
        raise RequestError(
            f"{folder} has no {LIST}, which `sana evaluate draw` writes; name the list that its "
            "pictures were drawn from with --prompts"
        )
    return read_prompts(source)


def match(folder: Path, items: Sequence[Item], *, count: int | None = None) -> list[list[Path]]:
    """The pictures of each item, in order; `count` is how many each must have, else one or more.

    A picture belongs to the key that its folder has (KEY/0000.png, KEY/samples/0000.png), or its
    name (KEY.png, KEY_0.png). Raises `RequestError` for a picture without a prompt and the reverse.
    """
    found: dict[str, list[Path]] = {item.key: [] for item in items}
    strays = []
    for path in list_pictures(folder):
        key = _key_of(path.relative_to(folder), found)
        if key is None:
            strays.append(str(path.relative_to(folder)))
        else:
            found[key].append(path)
    if strays:
        raise RequestError(
            f"{len(strays)} pictures in {folder} belong to no prompt, {_some(strays)}; each "
            "must lie in a folder named after its prompt's key, so check which list this is"
        )
    short = [k for k, files in found.items() if len(files) != (count or max(len(files), 1))]
    if short:
        wanted = f"{count} pictures" if count else "at least one picture"
        raise RequestError(
            f"{len(short)} of {len(items)} prompts do not have {wanted} in {folder}, "
            f"{_some(short)} ({len(found[short[0]])} there); each needs {wanted}: run "
            "`sana evaluate draw` again to draw what is missing"
        )
    return [found[item.key] for item in items]


def _key_of(path: Path, keys: Mapping[str, Any]) -> str | None:
    folders = [part for part in path.parts[:-1] if part != "samples"]
    names = [*folders[-1:], path.stem, path.stem.rpartition("_")[0]]
    return next((name for name in names if name in keys), None)


def _folder(source: Path) -> list[Item]:
    files = sorted(source.glob("*.txt"), key=lambda path: (len(path.stem), path.stem))
    return [Item(key=path.stem, prompt=_text(path).strip()) for path in files]


def _item(source: Path, number: int, line: str) -> Item:
    facts = _parsed(source, line, f"line {number + 1} of ")
    if not isinstance(facts, dict) or not isinstance(facts.get("prompt"), str):
        raise RequestError(
            f'line {number + 1} of {source} has no "prompt"; each line must be a JSON object with '
            "one"
        )
    key = str(facts.pop("key", f"{number:05}"))
    return Item(key=key, prompt=facts.pop("prompt"), facts=facts)


def _mjhq(source: Path) -> list[Item]:
    whole = _parsed(source, _text(source), "")
    if not isinstance(whole, dict) or not all(
        isinstance(v, dict) and isinstance(v.get("prompt"), str) for v in whole.values()
    ):
        raise RequestError(f'{source} is not {{"ID": {{"prompt": ...}}}}; {FORMATS}')
    return [Item(key=key, prompt=facts.pop("prompt"), facts=facts) for key, facts in whole.items()]


def _parsed(source: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"{where}{source} is no JSON ({error}); {FORMATS}") from None


def _lines(source: Path) -> list[str]:
    return [line.strip() for line in _text(source).splitlines() if line.strip()]


def _text(source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RequestError(f"prompts is {source}, which is not there; {FORMATS}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{source} is not UTF-8 text; save it as UTF-8") from None


def _check(items: Sequence[Item], source: Path) -> None:
    if not items:
        raise RequestError(f"{source} holds no prompt; {FORMATS}")
    seen: set[str] = set()
    for item in items:
        if not _KEY.fullmatch(item.key) or item.key in seen:
            what = "twice" if item.key in seen else "which cannot name a folder"
            raise RequestError(
                f"{source} has the key {item.key!r}, {what}; keys must differ and be letters, "
                "digits, points and dashes"
            )
        seen.add(item.key)


def _some(names: Sequence[str]) -> str:
    return f"the first being {names[0]}"
