"""Every known model by name: architecture, sampling defaults, where its weights are, their licence.

Thirteen official image models, two teachers of Sprint, two models with a ControlNet, nine official
autoencoders, and our own `sticker-512` and `tiny`. Numbers as published; the tests hold each
network's parameter count. Start reading at `preset`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from sana.config import (
    Activation,
    BlockKind,
    ControlNetConfig,
    DCAEConfig,
    DiTConfig,
    ModelConfig,
    NormKind,
    RefinerConfig,
    SamplingConfig,
    StageConfig,
    TextConfig,
    with_reference,
)
from sana.errors import RequestError

NVIDIA = "NSCL v2-custom (NVIDIA License), for research use by the model card"
SPRINT = (
    "the repository says NVIDIA Open Model License, its card NSCL v2-custom: ask NVIDIA before "
    "commercial use"
)
GEMMA_TERMS = "Gemma Terms of Use, with its prohibited uses"
MIT_HAN_LAB = "see LICENSE.txt in the repository"
OURS = "Apache-2.0; see NOTICE beside the weights"

OWNER = "Efficient-Large-Model"
Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A named image model."""

    config: ModelConfig
    source: str
    """NVIDIA's repository on the Hugging Face hub, or `package` or `random` for our own."""
    license: str
    """Of the transformer; each part has its own."""
    autoencoder_license: str = OURS
    text_license: str = "Apache-2.0 (all-MiniLM-L6-v2)"
    precision: Precision = "fp32"
    """What the weights were released in, and should run in on a GPU."""
    control_source: str | None = None
    """The repository of its ControlNet, in NVIDIA's layout."""

    @property
    def folder(self) -> str | None:
        """The repository with the same weights in diffusers' layout, all parts together."""
        return f"{self.source}_diffusers" if "/" in self.source else None

    @property
    def licenses(self) -> dict[str, str]:
        """The licence of each part."""
        return {
            "transformer": self.license,
            "autoencoder": self.autoencoder_license,
            "text encoder": self.text_license,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderPreset:
    """A named DC-AE."""

    config: DCAEConfig
    source: str
    license: str


def preset(name: str) -> Preset:
    """The image model called `name`; RequestError naming the nearest known one."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PRESETS)}"
    raise RequestError(f"there is no model {name!r}; {hint}")


def _stages(
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    *,
    attention_from: int | None = None,
    scales: tuple[int, ...] = (),
    norm: NormKind = "rms",
    activation: Activation = "silu",
) -> tuple[StageConfig, ...]:
    """One stage for each width; EfficientViT blocks from stage `attention_from` on."""

    def stage(index: int) -> StageConfig:
        if attention_from is None or index < attention_from:
            return StageConfig(
                width=widths[index], depth=depths[index], norm=norm, activation=activation
            )
        kind: BlockKind = "efficientvit"
        return StageConfig(width=widths[index], depth=depths[index], block=kind, scales=scales)

    return tuple(stage(index) for index in range(len(widths)))


_WIDTHS = (128, 256, 512, 512, 1024, 1024)
_SANA_ENCODER = _stages(_WIDTHS, (2, 2, 2, 3, 3, 3), attention_from=3, scales=(5,))
_SANA_AUTOENCODER = DCAEConfig(
    latent_channels=32,
    encoder=_SANA_ENCODER,
    decoder=_stages(_WIDTHS, (3, 3, 3, 3, 3, 3), attention_from=3, scales=(5,)),
    latent_scale=(0.41407,),
)
_LITE_AUTOENCODER = DCAEConfig(
    latent_channels=32,
    encoder=_SANA_ENCODER,
    decoder=_stages(_WIDTHS, (0, 3, 5, 4, 4, 4)),
    up="pixel_shuffle",
    out_activation="silu",
    latent_scale=(0.41407,),
)


def _imagenet(channels: int, scale: float) -> DCAEConfig:
    """The `in` and `mix` autoencoders: one more stage for each fourfold in channels."""
    extra = {32: 0, 128: 1, 512: 2}[channels]
    widths = _WIDTHS + (2048,) * extra
    deep = (2,) * (3 + extra)
    return DCAEConfig(
        latent_channels=channels,
        encoder=_stages(widths, (0, 4, 8, *deep), attention_from=3),
        decoder=_stages(
            widths, (0, 5, 10, *deep), attention_from=3, norm="batch", activation="relu"
        ),
        down="pixel_unshuffle",
        up="pixel_shuffle",
        latent_scale=(scale,),
    )


def _autoencoder(name: str, config: DCAEConfig) -> tuple[str, AutoencoderPreset]:
    source = f"mit-han-lab/{name}"
    return name, AutoencoderPreset(config=config, source=source, license=MIT_HAN_LAB)


AUTOENCODERS: dict[str, AutoencoderPreset] = dict(
    [
        _autoencoder("dc-ae-f32c32-sana-1.0", _SANA_AUTOENCODER),
        _autoencoder("dc-ae-f32c32-sana-1.1", _SANA_AUTOENCODER),
        _autoencoder("dc-ae-lite-f32c32-sana-1.1", _LITE_AUTOENCODER),
        _autoencoder("dc-ae-f32c32-in-1.0", _imagenet(32, 0.3189)),
        _autoencoder("dc-ae-f32c32-mix-1.0", _imagenet(32, 0.4552)),
        _autoencoder("dc-ae-f64c128-in-1.0", _imagenet(128, 0.2889)),
        _autoencoder("dc-ae-f64c128-mix-1.0", _imagenet(128, 0.4538)),
        _autoencoder("dc-ae-f128c512-in-1.0", _imagenet(512, 0.4883)),
        _autoencoder("dc-ae-f128c512-mix-1.0", _imagenet(512, 0.3620)),
    ]
)

GEMMA = TextConfig(
    kind="gemma2",
    width=2304,
    max_tokens=300,
    layers=26,
    heads=8,
    mlp_width=9216,
    vocabulary=256000,
)
_600M = DiTConfig(width=1152, depth=28, cross_heads=16, text_dim=2304)
_1600M = DiTConfig(width=2240, depth=20, cross_heads=20, text_dim=2304)
_2K = replace(_1600M, position_scale=1.0, position_base=64)
_4K = replace(_1600M, position_scale=2.0, position_base=128)
_1600M_NORMED = replace(_1600M, qk_norm=True)
_4800M_NORMED = replace(_1600M_NORMED, depth=60)
_600M_SPRINT = replace(_600M, qk_norm=True, guidance_embedding=True)
_1600M_SPRINT = replace(_1600M_NORMED, guidance_embedding=True)
_600M_TEACHER = replace(_600M, qk_norm=True, time_scale=1.0)
_1600M_TEACHER = replace(_1600M_NORMED, time_scale=1.0)
_SPRINT = SamplingConfig(shift=1.0, steps=2, sampler="scm", integer_times=False)


def _official(
    name: str,
    source: str,
    dit: DiTConfig,
    pixels: int,
    *,
    precision: Precision = "bf16",
    sampling: SamplingConfig | None = None,
) -> tuple[str, Preset]:
    """A model of NVIDIA's, of which the aspect ratios go up to twice its side."""
    config = ModelConfig(
        name=name,
        dit=replace(dit, clamps=precision == "fp16"),
        autoencoder=_SANA_AUTOENCODER,
        text=GEMMA,
        sampling=sampling or SamplingConfig(),
        pixels=pixels,
        max_pixels=2 * pixels,
        trained_on_bins=True,
    )
    config = with_reference(config, "nvidia")
    is_sprint = dit.guidance_embedding or dit.time_scale == 1.0
    return name, Preset(
        config=config,
        source=f"{OWNER}/{source}",
        license=SPRINT if is_sprint else NVIDIA,
        autoencoder_license=MIT_HAN_LAB,
        text_license=GEMMA_TERMS,
        precision=precision,
    )


def _controlled(name: str, base: Preset, control: str) -> tuple[str, Preset]:
    """A model with the ControlNet that follows edges found by HED."""
    config = replace(base.config, name=name, controlnet=ControlNetConfig(dit=base.config.dit))
    return name, replace(base, config=config, control_source=f"{OWNER}/{control}")


_STICKER = ModelConfig(
    name="sticker-512",
    dit=DiTConfig(
        width=384, depth=12, cross_heads=6, text_dim=384, qk_norm=True, refiner=RefinerConfig()
    ),
    autoencoder=DCAEConfig(
        latent_channels=32,
        encoder=_stages((32, 64, 128, 256, 256, 256), (0, 2, 2, 1, 1, 1)),
        decoder=_stages((32, 64, 128, 256, 256, 256), (0, 2, 3, 1, 1, 1)),
        down="pixel_unshuffle",
        up="pixel_shuffle",
        out_activation="silu",
    ),
    text=TextConfig(
        kind="minilm",
        width=384,
        max_tokens=96,
        layers=6,
        heads=12,
        mlp_width=1536,
        vocabulary=30522,
    ),
    sampling=SamplingConfig(guidance=3.0, integer_times=False),
)
_TINY = ModelConfig(
    name="tiny",
    dit=DiTConfig(
        width=64,
        depth=2,
        cross_heads=2,
        text_dim=32,
        latent_channels=8,
        qk_norm=True,
        refiner=RefinerConfig(depth=1, heads=2, max_tokens=32),
    ),
    autoencoder=DCAEConfig(
        latent_channels=8,
        encoder=_stages((8, 8, 16, 16, 32, 32), (0, 1, 1, 1, 1, 1)),
        decoder=_stages((8, 8, 16, 16, 32, 32), (0, 1, 1, 1, 1, 1)),
        down="pixel_unshuffle",
        up="pixel_shuffle",
        out_activation="silu",
    ),
    text=TextConfig(
        kind="minilm", width=32, max_tokens=32, layers=1, heads=2, mlp_width=64, vocabulary=256
    ),
    sampling=SamplingConfig(steps=2, integer_times=False),
    pixels=64,
)
_TINY_SPRINT = replace(
    _TINY,
    name="tiny-sprint",
    dit=replace(_TINY.dit, guidance_embedding=True),
    sampling=_SPRINT,
)
_TINY_CONTROLNET = replace(
    _TINY, name="tiny-controlnet", controlnet=ControlNetConfig(dit=_TINY.dit, depth=1)
)

_F16: Precision = "fp16"
_SHIFTED = SamplingConfig(shift=6.0)
_SHIFTED_600M = SamplingConfig(shift=4.0)
"""NVIDIA's own for this size; diffusers' files say 3."""
PRESETS: dict[str, Preset] = {
    "sticker-512": Preset(config=_STICKER, source="package", license=OURS),
    "tiny": Preset(config=_TINY, source="random", license=OURS),
    "tiny-sprint": Preset(config=_TINY_SPRINT, source="random", license=OURS),
    "tiny-controlnet": Preset(config=_TINY_CONTROLNET, source="random", license=OURS),
} | dict(
    [
        _official("sana-600m-512", "Sana_600M_512px", _600M, 512, precision=_F16),
        _official(
            "sana-600m-1024",
            "Sana_600M_1024px",
            _600M,
            1024,
            precision=_F16,
            sampling=_SHIFTED_600M,
        ),
        _official("sana-1600m-512", "Sana_1600M_512px", _1600M, 512, precision=_F16),
        _official(
            "sana-1600m-512-multilingual",
            "Sana_1600M_512px_MultiLing",
            _1600M,
            512,
            precision=_F16,
        ),
        _official("sana-1600m-1024", "Sana_1600M_1024px", _1600M, 1024, precision=_F16),
        _official(
            "sana-1600m-1024-multilingual",
            "Sana_1600M_1024px_MultiLing",
            _1600M,
            1024,
            precision=_F16,
        ),
        _official("sana-1600m-1024-bf16", "Sana_1600M_1024px_BF16", _1600M, 1024),
        _official("sana-1600m-2048", "Sana_1600M_2Kpx_BF16", _2K, 2048),
        _official("sana-1600m-4096", "Sana_1600M_4Kpx_BF16", _4K, 4096, sampling=_SHIFTED),
        _official("sana1.5-1600m-1024", "SANA1.5_1.6B_1024px", _1600M_NORMED, 1024),
        _official("sana1.5-4800m-1024", "SANA1.5_4.8B_1024px", _4800M_NORMED, 1024),
        _official(
            "sana-sprint-600m-1024",
            "Sana_Sprint_0.6B_1024px",
            _600M_SPRINT,
            1024,
            sampling=_SPRINT,
        ),
        _official(
            "sana-sprint-1600m-1024",
            "Sana_Sprint_1.6B_1024px",
            _1600M_SPRINT,
            1024,
            sampling=_SPRINT,
        ),
        _official(
            "sana-sprint-600m-1024-teacher",
            "Sana_Sprint_0.6B_1024px_teacher",
            _600M_TEACHER,
            1024,
        ),
        _official(
            "sana-sprint-1600m-1024-teacher",
            "Sana_Sprint_1.6B_1024px_teacher",
            _1600M_TEACHER,
            1024,
        ),
    ]
)
PRESETS |= dict(
    [
        _controlled(
            "sana-600m-1024-controlnet-hed",
            PRESETS["sana-600m-1024"],
            "Sana_600M_1024px_ControlNet_HED",
        ),
        _controlled(
            "sana-1600m-1024-controlnet-hed",
            PRESETS["sana-1600m-1024-bf16"],
            "Sana_1600M_1024px_BF16_ControlNet_HED",
        ),
    ]
)
