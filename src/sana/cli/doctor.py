"""`sana doctor`: what is installed, what there is to compute on, and which models would fit there.

Packages are looked up, not imported, except torch, which knows the devices. The models' sizes are
estimates of the memory planner for one picture of the model's own size, with guidance.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sana import __version__
from sana.pipelines.footprint import Canvas
from sana.pipelines.memory import CUDA_CONTEXT, DoesNotFit, MemoryPlan, parse, plan, shown
from sana.presets import PRESETS

if TYPE_CHECKING:
    from sana.config import ModelConfig
    from sana.pipelines.precision import Precision

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pillow")
EXTRAS = {
    "lora": ("peft",),
    "eval": ("torchmetrics", "scipy"),
    "train": ("resvg-py", "tensorboard", "h5py"),
}
"""The optional packages of each extra; `sana-torch[dev]` is for work on sana itself."""
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "mixed": "mixed"}


def doctor(
    *,
    memory: Annotated[
        str | None, Parameter(help="ask for a device with this much, such as 8GiB")
    ] = None,
    as_json: Annotated[
        bool, Parameter(name="--json", help="the same as JSON", negative="")
    ] = False,
) -> None:
    """Say what is installed, what it can compute on, and which models would fit."""
    limit = None if memory is None else parse(memory)
    devices = find_devices()
    found = {
        "versions": _versions(),
        "devices": devices,
        "extras": _extras(),
        "models_on": devices[-1]["name"] if limit is None else f"a card with {memory}",
        "models": check_models(devices[-1], limit),
    }
    print(json.dumps(found, indent=2) if as_json else "\n".join(_report(found)))


def find_devices() -> list[dict[str, Any]]:
    """The CPU, and then each GPU; the one to draw on comes last."""
    import os

    import torch

    from sana.pipelines.placing import free_memory
    from sana.pipelines.precision import has_fp8_at

    devices = [
        {
            "name": "cpu",
            "what": f"{platform.machine()}, {os.cpu_count()} cores",
            "free": free_memory("cpu"),
            "total": None,
            "has_bf16": True,
            "has_fp8": False,
        }
    ]
    if torch.backends.mps.is_available():
        free = free_memory("mps")
        facts = {"name": "mps", "what": "Apple GPU", "free": free, "total": None}
        devices.append({**facts, "has_bf16": False, "has_fp8": False})
    for index in reversed(range(torch.cuda.device_count())):
        card = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "what": f"{card.name}, compute capability {card.major}.{card.minor}",
                "free": free_memory(f"cuda:{index}"),
                "total": card.total_memory,
                "has_bf16": card.major >= 8,
                "has_fp8": has_fp8_at((card.major, card.minor)),
            }
        )
    return devices


def check_models(device: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """How each model would fit in what is free on `device`, or on a card with `limit` bytes."""
    from sana.pipelines.precision import choose

    kind = device["name"].partition(":")[0] if limit is None else "cuda"
    has_bf16 = device["has_bf16"] if limit is None else True
    reserve = 0 if limit is None else CUDA_CONTEXT
    available = device["free"] if limit is None else limit
    rows = []
    for name, preset in PRESETS.items():
        if preset.source == "random":
            continue
        precision = choose(preset.config, kind, has_bf16=has_bf16)
        row = {"name": name, "pixels": preset.config.pixels, "dtype": SHORT[precision.name]}
        rows.append(row | _fit(preset.config, precision, available, reserve, kind))
    return rows


def _fit(
    config: ModelConfig, precision: Precision, available: int | None, reserve: int, kind: str
) -> dict[str, Any]:
    canvas = Canvas(
        width=config.pixels,
        height=config.pixels,
        batch=1 if config.dit.guidance_embedding else 2,
    )

    def planned(limit: int | None) -> MemoryPlan:
        return plan(
            config,
            canvas,
            limit,
            widths=precision.widths,
            can_offload=kind == "cuda",
            reserve=reserve,
        )

    free = planned(None)
    resident = free.peak + reserve
    try:
        planned(1)
    except DoesNotFit as refusal:
        least = refusal.least.peak + reserve
    try:
        chosen = planned(available)
    except DoesNotFit:
        return {"resident": resident, "least": least, "fits": "no", "how": None}
    tiled = chosen.tile != free.tile
    fits = "offloaded" if chosen.offloads else "tiled" if tiled else "resident"
    return {"resident": resident, "least": least, "fits": fits, "how": chosen.describe()}


def _versions() -> dict[str, str | None]:
    import torch

    versions: dict[str, str | None] = {"sana": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = _version(package)
    # torch's own word names the build, which the package's number may not.
    return {**versions, "torch": torch.__version__, "cuda": torch.version.cuda}


def _extras() -> dict[str, dict[str, Any]]:
    found = {}
    for extra, packages in EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        is_complete = all(versions.values())
        command = None if is_complete else f"pip install 'sana-torch[{extra}]'"
        found[extra] = {"packages": versions, "install": command}
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _report(found: dict[str, Any]) -> list[str]:
    versions = found["versions"]
    first = f"sana {versions['sana']} on Python {versions['python']}, torch {versions['torch']}"
    rest = [f"{name} {versions[name] or 'absent'}" for name in PACKAGES if name != "torch"]
    lines = [first, ", ".join(rest), "", "Devices"]
    for device in found["devices"]:
        free = "unknown" if device["free"] is None else shown(device["free"])
        total = "" if device["total"] is None else f" of {shown(device['total'])}"
        dtypes = "fp32, fp16, bf16" if device["has_bf16"] else "fp32, fp16"
        dtypes += ", fp8 (faster, coarser: where asked for)" if device["has_fp8"] else ""
        dtypes = _of_cpu() if device["name"] == "cpu" else dtypes
        lines.append(
            f"  {device['name']:7} {device['what']}; {free}{total} free; computes in {dtypes}"
        )
    lines += ["", "Extras"]
    for name, extra in found["extras"].items():
        lines.append(f"  {name:7} {_extra_line(extra)}")
    return [*lines, "", *_models_table(found)]


def _extra_line(extra: dict[str, Any]) -> str:
    have = [f"{name} {version}" for name, version in extra["packages"].items() if version]
    missing = [name for name, version in extra["packages"].items() if not version]
    if not missing:
        return ", ".join(have)
    return f"without {', '.join(missing)}: {extra['install']}"


def _models_table(found: dict[str, Any]) -> list[str]:
    words = {
        "resident": "fits",
        "tiled": "fits, decoded in tiles",
        "offloaded": "fits, offloaded",
        "no": "does not fit",
    }
    width = max(len(row["name"]) for row in found["models"])
    lines = [
        f"Models on {found['models_on']}: memory for one picture, all resident and at least",
        f"  {'model':{width}}    px  in     resident     least  here",
    ]
    for row in found["models"]:
        sizes = f"{shown(row['resident']):>9} {shown(row['least']):>9}"
        lines.append(
            f"  {row['name']:{width}}  {row['pixels']:4}  {row['dtype']:5}  {sizes}  "
            f"{words[row['fits']]}"
        )
    return lines


def _of_cpu() -> str:
    from sana.pipelines.precision import multiplies_in_bf16

    return "fp32, mixed, bf16" if multiplies_in_bf16() else "fp32, bf16"
