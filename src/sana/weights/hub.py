"""Fetch an official model from the Hugging Face hub: only the files that are read, size said first.

The folder in diffusers' layout has every part of a model. Its files are chosen from the
repository's own list, by component and variant; downloads resume where they stopped, and lie in the
hub's cache. A ControlNet is only published as a pickle: it is converted once, as `sana convert`
does. Start reading at `fetch`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sana.errors import RequestError
from sana.presets import Preset
from sana.weights.folders import NAME
from sana.weights.layouts import TOKENIZER_FILES

logger = logging.getLogger(__name__)
COMPONENTS = ("transformer", "vae", "text_encoder")
SMALL = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    *(f"{component}/config.json" for component in COMPONENTS),
)
LICENSES = ("license", "notice")
CONVERTED = "controlnet.safetensors"


def fetch(
    model: Preset, *, is_offline: bool = False, report: Callable[[str], None] | None = None
) -> Path:
    """The local folder of an official model, after fetching what is not there yet.

    `report` takes a line that says what will be fetched, and the licences. `is_offline` looks in
    the cache alone. Raises `RequestError` when the model cannot be had, with the way out.
    """
    assert model.folder is not None
    return _snapshot(model, model.folder, _choose_model, is_offline, report)


def fetch_controlnet(
    model: Preset, *, is_offline: bool = False, report: Callable[[str], None] | None = None
) -> Path:
    """The folder with an official ControlNet in our layout, converted when it is first fetched."""
    assert model.control_source is not None
    found = _snapshot(model, model.control_source, _choose_controlnet, is_offline, report)
    target = _converted_folder(model)
    if not (target / CONVERTED).is_file():
        from sana.weights.convert import convert

        [file] = [path for path in sorted(found.rglob("*")) if path.suffix in WEIGHTS]
        convert(file, target, to="ours")
    return target


def choose_files(sizes: Mapping[str, int], precision: str) -> dict[str, int]:
    """Of a repository in diffusers' layout, the files that are read, with their sizes.

    For each component the variant that the model was released in, else the files without one.
    Raises `RequestError` when a component has no weights in safetensors.
    """
    chosen = {name: size for name, size in sizes.items() if name in SMALL or _is_license(name)}
    for component in COMPONENTS:
        variants: dict[str, list[str]] = {}
        for name in sizes:
            folder, _, file = name.rpartition("/")
            match = NAME.fullmatch(file)
            if folder == component and match:
                variants.setdefault(match["variant"] or "", []).append(name)
        if not variants:
            raise RequestError(
                f"the repository has no safetensors of its {component}; fetch it another way and "
                "give its folder"
            )
        order = [name for name in (precision, "") if name in variants] or sorted(variants)
        files = variants[order[0]]
        suffix = f".{order[0]}.json" if order[0] else ".json"
        indexes = [
            name
            for name in sizes
            if name.startswith(f"{component}/") and name.endswith(f".safetensors.index{suffix}")
        ]
        if len(files) == 1:
            indexes = []
        chosen |= {name: sizes[name] for name in [*files, *indexes]}
    return chosen


def _choose_model(sizes: Mapping[str, int], model: Preset) -> dict[str, int]:
    return choose_files(sizes, model.precision)


def _choose_controlnet(sizes: Mapping[str, int], model: Preset) -> dict[str, int]:
    """The one weight file, in safetensors if there is such a one."""
    for suffix in WEIGHTS:
        files = sorted(name for name in sizes if name.endswith(suffix))
        if len(files) == 1:
            licenses = {name: size for name, size in sizes.items() if _is_license(name)}
            return {files[0]: sizes[files[0]], **licenses}
    raise RequestError(
        f"{model.control_source} does not hold exactly one ControlNet; fetch it another way, and "
        "put what `sana convert` makes of it beside the model"
    )


def _snapshot(
    model: Preset,
    repository: str,
    choose: Callable[[Mapping[str, int], Preset], dict[str, int]],
    is_offline: bool,
    report: Callable[[str], None] | None,
) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    download: Any = snapshot_download
    name = model.config.name
    if is_offline:
        try:
            return Path(download(repository, local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError):
            raise RequestError(
                f"{name} was never fetched to this computer, and nothing is fetched offline; fetch "
                "it once without --offline, or give a folder that has it"
            ) from None
    api: Any = HfApi()
    # The bases of its error are those of whatever it speaks HTTP with, OSError among them.
    failures: tuple[Any, ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)
    try:
        info = api.model_info(repository, files_metadata=True)
        sizes = {entry.rfilename: int(entry.size or 0) for entry in info.siblings}
        chosen = choose(sizes, model)
        (report or logger.info)(_sentence(model, repository, chosen))
        return Path(download(repository, revision=info.sha, allow_patterns=sorted(chosen)))
    except failures as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"{name} cannot be fetched from {repository} ({reason[:200]}); what arrived is kept: "
            "try again, use --offline if it was fetched before, or give a folder that has it"
        ) from None


def _sentence(model: Preset, repository: str, chosen: Mapping[str, int]) -> str:
    licenses = "; ".join(f"{part}: {text}" for part, text in model.licenses.items())
    return (
        f"{model.config.name}: {len(chosen)} files, {sum(chosen.values()) / 1e9:.2f} GB in all, "
        f"from {repository}; licences: {licenses}"
    )


def _converted_folder(model: Preset) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "sana-torch" / model.config.name


def _is_license(name: str) -> bool:
    return "/" not in name and name.lower().startswith(LICENSES)


WEIGHTS = (".safetensors", ".pth")
