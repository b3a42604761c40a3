"""The frozen surface: public names, fields and flags. A change here is a change for every user."""

from __future__ import annotations

import inspect
from typing import Any

from cyclopts import Parameter

import sana
from sana.cli.bench import bench
from sana.cli.convert import convert
from sana.cli.data import stickers
from sana.cli.doctor import doctor
from sana.cli.evaluate import autoencoder, draw, score
from sana.cli.evaluate import stickers as exam
from sana.cli.generate import generate
from sana.cli.info import info
from sana.cli.main import VERBS
from sana.cli.reproduce import reproduce
from sana.cli.train import train
from sana.request import Request


def flags(command: Any) -> list[str]:
    """Every flag of a command in order, positional arguments in capitals."""
    found: list[str] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            found.append(parameter.name.upper())
            continue
        [how] = [
            item
            for item in getattr(parameter.annotation, "__metadata__", ())
            if isinstance(item, Parameter)
        ]
        found += how.name or (f"--{parameter.name}",)
    return found


def test_public_names() -> None:
    assert sorted(sana.__all__) == ["Pipeline", "Request", "__version__", "load", "presets"]
    assert all(getattr(sana, name) for name in sana.__all__)
    assert list(inspect.signature(sana.load).parameters) == [
        *("name_or_path", "device", "dtype", "memory", "offline", "batch"),
    ]
    public = [name for name in vars(sana.Pipeline) if not name.startswith("_")]
    assert public == [
        *("resolve", "steps", "generate", "finish", "device", "dtype"),
        *("memory_plan", "fingerprint", "decode", "encode", "preview"),
    ]


def test_request_fields() -> None:
    assert list(Request.model_fields) == [
        "prompt",
        "negative_prompt",
        "steps",
        "guidance",
        "seeds",
        "count",
        "width",
        "height",
        "binning",
        "sampler",
        "shift",
        "guidance_interval",
        "pag_scale",
        "pag_blocks",
        "image",
        "strength",
        "mask",
        "feather",
        "control",
        "control_detector",
        "control_scale",
        "control_start",
        "control_end",
        "loras",
        "lora_scales",
        "model",
    ]


def test_verbs() -> None:
    assert list(VERBS) == [
        "generate",
        "info",
        "convert",
        "data",
        "train",
        "reproduce",
        "evaluate",
        "bench",
        "doctor",
    ]


def test_flags() -> None:
    assert flags(generate) == [
        *("PROMPT", "--negative-prompt", "-n", "--seed", "-s", "--count"),
        *("--width", "-W", "--height", "-H", "--binning"),
        *("--image", "-i", "--strength", "--mask", "--feather"),
        *("--control", "--control-detector", "--control-scale", "--control-start", "--control-end"),
        *("--steps", "--guidance", "--sampler", "--shift", "--guidance-interval"),
        *("--pag-scale", "--pag-block", "--model", "-m", "--lora", "--lora-scale"),
        *("--output", "-o", "--again", "--preview", "--preview_interval"),
        *("--best_of", "--judge", "--judge_model", "--drafts", "--keep"),
        *("--device", "--dtype", "--memory", "--offline", "--threads"),
    ]
    assert flags(bench) == [
        *("MODELS", "--prompt", "--steps", "--guidance", "--width", "-W", "--height", "-H"),
        *("--batch", "--seconds", "--cold", "--json"),
        *("--device", "--dtype", "--memory", "--offline", "--threads"),
    ]
    assert flags(info) == ["TARGET", "--models"]
    assert flags(convert) == ["SOURCE", "TARGET", "--to", "--dtype", "--like"]
    assert flags(train) == ["RECIPE", "OVERRIDES"]
    assert flags(doctor) == ["--memory", "--json"]
    assert flags(draw) == [
        *("PROMPTS", "--output", "-o", "--count", "--seed", "-s", "--negative-prompt", "-n"),
        *("--width", "-W", "--height", "-H", "--binning"),
        *("--steps", "--guidance", "--sampler", "--shift", "--guidance-interval"),
        *("--pag-scale", "--pag-block", "--model", "-m", "--lora", "--lora-scale"),
        *("--device", "--dtype", "--memory", "--offline", "--threads"),
    ]
    assert flags(score) == [
        *("FOLDER", "--metrics", "--output", "-o", "--prompts", "--reference", "--questions"),
        *("--count", "--grid", "--size", "--kid-subset"),
        *("--features", "--clip", "--image-reward", "--detector", "--vqa", "--device", "--offline"),
    ]
    assert flags(autoencoder) == [
        *("MODEL", "--pictures", "--output", "-o", "--size"),
        *("--lpips", "--features", "--device", "--offline"),
    ]
    assert flags(exam) == [
        *("MODEL", "--output", "-o", "--detector", "--pack"),
        *("--count", "--seeds", "--case-seed", "--seen", "--features"),
        *("--traits", "--alignment", "--pictures", "--trait-count"),
        *("--steps", "--guidance", "--shift", "--sampler", "--batch", "--cache", "--device"),
    ]
    assert flags(reproduce) == [
        *("ROW", "OVERRIDES", "--seeds", "--pack", "--cache", "--detector", "--model", "-m"),
        *("--output", "-o", "--part", "--device"),
    ]
    assert flags(stickers) == ["--output", "-o", "--sheet"]
