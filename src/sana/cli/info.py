"""`sana info`: how a picture was made, what a model is, or which models there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sana.cli.flags import command_line
from sana.config import ModelConfig, to_json
from sana.pipelines.images import read_metadata
from sana.presets import AUTOENCODERS, PRESETS, Preset, preset
from sana.request import Request


def info(
    target: Annotated[
        str | None,
        Parameter(help="a PNG that sana made, a model's folder or weight file, or a model's name"),
    ] = None,
    /,
    *,
    models: Annotated[
        bool, Parameter(help="list every known model with its defaults", negative="")
    ] = False,
) -> None:
    """Say how a picture was made, what a model is, or which models there are."""
    if models:
        print("\n".join(_table()))
    elif target is None:
        _print_presets()
    elif Path(target).is_dir() or _holds_weights(Path(target)):
        _print_fields(_header(Path(target)))
    elif Path(target).is_file() or target.lower().endswith(".png"):
        _print_picture(Path(target))
    else:
        _print_preset(target)


def _print_picture(path: Path) -> None:
    metadata = read_metadata(path)
    print(command_line(Request(**metadata.pop("request"))))
    for name, value in metadata.items():
        print(f"{name}: {value}")


def _print_presets() -> None:
    width = max(map(len, PRESETS))
    for name, row in PRESETS.items():
        origin = row.source if "/" in row.source else "ready to use"
        print(f"{name:{width}}  {row.config.pixels:4} px  {origin}")


def _table() -> list[str]:
    """Every model with what it is and does by default, the autoencoders, and the licences."""
    width = max(map(len, [*PRESETS, *AUTOENCODERS]))
    lines = [
        f"{'model':{width}}  {'size':>5}  {'pixels':>6}  {'runs in':7}  {'default':34}  source"
    ]
    for name, row in PRESETS.items():
        config = row.config
        numbers = f"{_size(config):>5}  {config.pixels:6}  {row.precision:7}"
        origin = row.source if "/" in row.source else "ready to use"
        lines.append(f"{name:{width}}  {numbers}  {_defaults(config):34}  {origin}")
    lines += ["", f"{'autoencoder':{width}}  channels  scale    source"]
    for name, part in AUTOENCODERS.items():
        channels, scale = part.config.latent_channels, part.config.latent_scale[0]
        lines.append(f"{name:{width}}  {channels:8}  {scale:.5f}  {part.source}")
    lines += ["", "licences"]
    for text, names in _by_license().items():
        lines.append(f"  {text}\n    {', '.join(names)}")
    return lines


def _defaults(config: ModelConfig) -> str:
    sampling = config.sampling
    text = f"{sampling.steps} steps, {sampling.sampler}, guidance {sampling.guidance:g}"
    return text if sampling.sampler == "scm" else f"{text}, shift {sampling.shift:g}"


def _size(config: ModelConfig) -> str:
    """Parameters of the transformer, as its published size is."""
    from sana.pipelines.footprint import dit_parameters

    count = dit_parameters(config.dit)
    return f"{count / 1e9:.1f}B" if count > 5e8 else f"{count / 1e6:.1f}M"


def _by_license() -> dict[str, list[str]]:
    """Each licence of a transformer or another part, and whose it is."""
    found: dict[str, list[str]] = {}
    for name, row in PRESETS.items():
        text = "; ".join(f"{part}: {license}" for part, license in row.licenses.items())
        found.setdefault(text, []).append(name)
    return found


def _print_preset(name: str) -> None:
    row: Preset = preset(name)
    if row.source == "package":
        from sana.weights.load import find_folder

        _print_fields(_header(find_folder(name)))
        return
    fields: dict[str, Any] = {"source": row.source, "licenses": row.licenses}
    if row.folder is not None:
        fields |= {"folder": row.folder, "controlnet": row.control_source}
    _print_fields({**fields, "config": to_json(row.config)})


def _holds_weights(path: Path) -> bool:
    """Told by content; a pickle counts, so that it is named as one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(4) == b"\x89PNG":
            return False
    from sana.weights.tensors import find_content

    return find_content(path) in ("safetensors", "pickle", "zip")


def _header(path: Path) -> dict[str, Any]:
    """What the header of a model of ours says; of others, what their tensors and files show."""
    from sana.weights.locate import find_networks, is_ours, settle
    from sana.weights.survey import our_survey

    if path.is_dir() and is_ours(path):
        return dict(our_survey(path).header)
    found: dict[str, Any] = {}
    for network in find_networks(path):
        facts = {"layout": network.layout, "source": str(network.source)}
        described = network.data if network.kind == "text" else to_json(settle(network))
        found[network.kind] = {**facts, "config": described}
    return found


def _print_fields(fields: dict[str, Any]) -> None:
    print(json.dumps(fields, indent=2, ensure_ascii=False))
