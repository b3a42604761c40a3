"""Number formats by model and device: what would break is corrected, and that is said."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from numerics import assert_detects
from sana.config import ModelConfig
from sana.errors import NumericsError
from sana.models.rounding import Mixed
from sana.pipelines.precision import (
    BF16,
    FP16,
    FP32,
    MIXED,
    Precision,
    announce,
    check_finite,
    choose,
    computes_in_bf16,
    trained_in,
)
from sana.presets import PRESETS, preset

BF16_MODEL = preset("sana1.5-1600m-1024").config
OURS = preset("sticker-512").config
FP16_MODEL = replace(BF16_MODEL, dit=replace(BF16_MODEL.dit, clamps=True), name="early")


@pytest.mark.parametrize(
    ("config", "device", "has_bf16", "dit", "others"),
    [
        (BF16_MODEL, "cpu", True, FP32, FP32),
        (FP16_MODEL, "cpu", True, FP32, FP32),
        (BF16_MODEL, "cuda", True, BF16, BF16),
        (BF16_MODEL, "cuda", False, FP32, FP32),
        (FP16_MODEL, "cuda", True, FP16, BF16),
        (FP16_MODEL, "cuda", False, FP16, FP32),
        (OURS, "cuda", True, BF16, BF16),
        (OURS, "cuda", False, FP32, FP32),
        (BF16_MODEL, "mps", False, FP32, FP32),
        (FP16_MODEL, "mps", False, FP32, FP32),
    ],
)
def test_without_a_wish_the_device_and_the_training_decide(
    config: ModelConfig, device: str, has_bf16: bool, dit: torch.dtype, others: torch.dtype
) -> None:
    got = choose(config, device, has_bf16=has_bf16, has_fast_products=False)
    assert got == Precision(text=others, dit=dit, autoencoder=others)
    # Such products are a matter of CPUs, and too coarse for what was trained in fp16.
    mixed = choose(config, device, has_bf16=has_bf16, has_fast_products=True)
    is_mixed = device == "cpu" and config is not FP16_MODEL
    assert mixed == replace(got, products=BF16 if is_mixed else None)


@pytest.mark.parametrize(
    ("config", "device", "got", "reason"),
    [
        (OURS, "cpu", "mixed", None),
        (BF16_MODEL, "cpu", "mixed", None),
        (FP16_MODEL, "cpu", "float32", "trained in float16"),
        (OURS, "cuda", "bfloat16", "that is for CPUs"),
        (OURS, "mps", "float32", "that is for CPUs"),
    ],
)
def test_mixed_is_for_cpus_and_also_for_those_that_gain_nothing(
    config: ModelConfig, device: str, got: str, reason: str | None
) -> None:
    chosen = choose(config, device, MIXED, has_bf16=device != "mps", has_fast_products=False)
    assert chosen.name == got
    assert [reason in note for note in chosen.notes] == ([] if reason is None else [True])
    if reason is None:
        assert chosen.dit_loads == chosen.autoencoder_loads == Mixed(FP32, BF16)


def test_fp32_stays_fp32_on_a_cpu_with_fast_products() -> None:
    chosen = choose(OURS, "cpu", FP32, has_fast_products=True)
    assert chosen.name == "float32"
    assert chosen.dit_loads == FP32


@pytest.mark.parametrize(
    ("config", "device", "has_bf16", "wanted", "got", "reason"),
    [
        (FP16_MODEL, "cuda", True, BF16, FP16, "trained in float16"),
        (FP16_MODEL, "cpu", True, BF16, FP32, "trained in float16"),
        (BF16_MODEL, "cuda", True, FP16, BF16, "leaves the range"),
        (BF16_MODEL, "cuda", False, FP16, FP32, "leaves the range"),
        (BF16_MODEL, "cuda", False, BF16, FP32, "does not compute in bfloat16"),
        (FP16_MODEL, "cpu", True, FP16, FP32, "a CPU computes float16"),
        (OURS, "cpu", True, FP16, FP32, "a CPU computes float16"),
    ],
)
def test_a_wish_that_would_break_the_model_is_corrected_with_a_note(
    config: ModelConfig,
    device: str,
    has_bf16: bool,
    wanted: torch.dtype,
    got: torch.dtype,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = choose(config, device, wanted, has_bf16=has_bf16)
    assert chosen.dit == got
    [note] = chosen.notes
    assert reason in note
    assert config.name in note
    with caplog.at_level(logging.WARNING, logger="sana"):
        announce(chosen)
    assert [record.getMessage() for record in caplog.records] == [note]


@pytest.mark.parametrize(
    ("config", "device", "wanted"),
    [
        (BF16_MODEL, "cpu", BF16),
        (BF16_MODEL, "cuda", FP32),
        (FP16_MODEL, "cuda", FP32),
        (FP16_MODEL, "cuda", FP16),
        (OURS, "cuda", FP16),
    ],
)
def test_a_wish_that_can_be_is_followed_in_silence(
    config: ModelConfig, device: str, wanted: torch.dtype
) -> None:
    chosen = choose(config, device, wanted, has_bf16=True)
    assert chosen.dit == wanted
    assert not chosen.notes


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("wanted", [None, FP32, FP16, BF16])
def test_the_text_encoder_and_the_autoencoder_never_run_in_fp16(
    name: str, device: str, wanted: torch.dtype | None
) -> None:
    for has_bf16 in (True, False):

        def check(chosen: Precision) -> None:
            assert FP16 not in (chosen.text, chosen.autoencoder)
            assert chosen.widths.text == chosen.text.itemsize

        check(choose(preset(name).config, device, wanted, has_bf16=has_bf16))
        assert_detects(check, Precision(text=FP16, dit=FP16, autoencoder=FP16))


def test_what_a_model_was_trained_in_is_in_its_config() -> None:
    assert [trained_in(config) for config in (BF16_MODEL, FP16_MODEL, OURS)] == [
        "bf16",
        "fp16",
        "fp32",
    ]
    assert computes_in_bf16("cpu")
    assert not computes_in_bf16("mps")


def test_what_is_not_finite_is_named_with_its_stage_and_a_way_out() -> None:
    check_finite(torch.ones(3), "the latent")
    bad = torch.tensor([1.0, float("nan"), float("inf")])
    with pytest.raises(NumericsError, match="2 of 3 values in the latent.*bfloat16.*float32"):
        check_finite(bad, "the latent", BF16)
    with pytest.raises(NumericsError, match="the weights themselves are at fault"):
        check_finite(bad, "the latent", FP32)
