"""Every preset builds on the meta device with exactly the published number of parameters."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from numerics import assert_detects
from sana.config import ControlNetConfig, DCAEConfig, DiTConfig, ModelConfig, from_json, to_json
from sana.errors import RequestError
from sana.models.controlnet import ControlNet
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.presets import AUTOENCODERS, PRESETS, preset

SANA_600M, SANA_1600M = 591_747_872, 1_604_462_752
TRANSFORMERS = {
    "sana-600m-512": SANA_600M,
    "sana-600m-1024": SANA_600M,
    "sana-1600m-512": SANA_1600M,
    "sana-1600m-512-multilingual": SANA_1600M,
    "sana-1600m-1024": SANA_1600M,
    "sana-1600m-1024-multilingual": SANA_1600M,
    "sana-1600m-1024-bf16": SANA_1600M,
    "sana-1600m-2048": SANA_1600M,
    "sana-1600m-4096": SANA_1600M,
    "sana1.5-1600m-1024": 1_604_641_952,
    "sana1.5-4800m-1024": 4_721_825_952,
    "sana-sprint-600m-1024": 593_501_216,
    "sana-sprint-1600m-1024": 1_610_237_472,
    "sana-sprint-600m-1024-teacher": SANA_600M + 28 * 4 * 1152,
    "sana-sprint-1600m-1024-teacher": 1_604_641_952,
    "sana-600m-1024-controlnet-hed": SANA_600M,
    "sana-1600m-1024-controlnet-hed": SANA_1600M,
}
CONTROLNETS = {
    "sana-600m-1024-controlnet-hed": 168_765_696,
    "sana-1600m-1024-controlnet-hed": 631_576_960,
}
SANA_ENCODER = 153_027_104
AUTOENCODER_PARTS = {
    "dc-ae-f32c32-sana-1.0": (312_250_275, SANA_ENCODER, 159_223_171),
    "dc-ae-f32c32-sana-1.1": (312_250_275, SANA_ENCODER, 159_223_171),
    "dc-ae-lite-f32c32-sana-1.1": (421_181_228, SANA_ENCODER, 268_154_124),
    "dc-ae-f32c32-in-1.0": (323_356_460, 123_172_384, 200_184_076),
    "dc-ae-f32c32-mix-1.0": (323_356_460, 123_172_384, 200_184_076),
    "dc-ae-f64c128-in-1.0": (676_896_140, 264_550_528, 412_345_612),
    "dc-ae-f64c128-mix-1.0": (676_896_140, 264_550_528, 412_345_612),
    "dc-ae-f128c512-in-1.0": (1_120_682_252, 415_661_056, 705_021_196),
    "dc-ae-f128c512-mix-1.0": (1_120_682_252, 415_661_056, 705_021_196),
}
OURS = ["sticker-512", "tiny", "tiny-sprint", "tiny-controlnet"]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_have_the_published_counts(name: str) -> None:
    def check(config: DiTConfig) -> None:
        with torch.device("meta"):
            assert count(LinearDiT(config)) == TRANSFORMERS[name]

    config = preset(name).config.dit
    check(config)
    assert_detects(check, replace(config, depth=1, qk_norm=not config.qk_norm))


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnets_have_the_published_counts(name: str) -> None:
    def check(config: ControlNetConfig) -> None:
        with torch.device("meta"):
            assert count(ControlNet(config)) == CONTROLNETS[name]

    known = preset(name)
    assert known.config.controlnet is not None and known.control_source is not None
    check(known.config.controlnet)
    assert_detects(check, replace(known.config.controlnet, depth=6))


@pytest.mark.parametrize("name", AUTOENCODER_PARTS)
def test_autoencoders_have_the_published_counts(name: str) -> None:
    def check(config: DCAEConfig) -> None:
        with torch.device("meta"):
            network = DCAE(config)
        parts = (count(network), count(network.encoder), count(network.decoder))
        assert parts == AUTOENCODER_PARTS[name]

    config = AUTOENCODERS[name].config
    check(config)
    assert_detects(check, replace(config, encoder=config.decoder, decoder=config.encoder))


def test_every_preset_is_counted() -> None:
    assert set(PRESETS) == {*TRANSFORMERS, *OURS}
    assert set(AUTOENCODERS) == set(AUTOENCODER_PARTS)


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_the_header(name: str) -> None:
    config = PRESETS[name].config
    assert from_json(ModelConfig, json.loads(json.dumps(to_json(config)))) == config
    assert config.name == name


def test_official_details() -> None:
    """What the checkpoints' own configuration says, beyond the sizes."""
    sprint, huge = preset("sana-sprint-600m-1024").config, preset("sana-1600m-4096").config
    assert huge.sampling.shift == 6.0 and huge.dit.position_scale == 2.0
    assert preset("sana-1600m-2048").config.dit.position_scale == 1.0
    assert sprint.dit.qk_norm and sprint.dit.guidance_embedding
    assert not sprint.sampling.integer_times
    for name in TRANSFORMERS:
        config = preset(name).config
        assert config.dit.width == config.dit.head_dim * {1152: 36, 2240: 70}[config.dit.width]
        assert config.autoencoder.latent_scale == (0.41407,)
        assert config.text.max_tokens == 300 and config.text.width == 2304
        assert preset(name).source.startswith("Efficient-Large-Model/")
        assert "Gemma" in preset(name).licenses["text encoder"]
        folder = preset(name).folder
        assert folder is not None and folder.endswith("_diffusers")
        assert "Gemma" not in preset("sticker-512").licenses["text encoder"]
    teacher = preset("sana-sprint-1600m-1024-teacher").config
    assert teacher.dit.time_scale == 1.0 and not teacher.dit.guidance_embedding
    assert preset("sana-600m-1024").config.sampling.shift == 4.0
    assert preset("sana-600m-1024-controlnet-hed").config.sampling.shift == 4.0


def test_our_models_have_the_same_parts() -> None:
    with torch.device("meta"):
        for name in OURS:
            network = LinearDiT(preset(name).config.dit)
            assert network.refiner is not None and network.config.qk_norm
            assert DCAE(preset(name).config.autoencoder).config.factor == 32


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(RequestError, match="no model 'sticker512'.*did you mean 'sticker-512'"):
        preset("sticker512")
    with pytest.raises(RequestError, match="known are sticker-512, tiny, .*sana-600m-512"):
        preset("???")


def test_only_fp16_trained_models_clip_their_attention() -> None:
    for name, known in PRESETS.items():
        assert known.config.dit.clamps == (known.precision == "fp16"), name


def test_shifts_are_those_of_nvidias_programs() -> None:
    shifts = {name: known.config.sampling.shift for name, known in PRESETS.items()}
    assert shifts["sana-600m-1024"] == 4.0
    assert shifts["sana-1600m-4096"] == 6.0
    assert shifts["sana-1600m-1024"] == shifts["sana1.5-4800m-1024"] == 3.0
    assert shifts["sana-sprint-600m-1024"] == 1.0
