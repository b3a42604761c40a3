"""Frozen descriptions of every network and schedule, checked when made, kept as JSON.

Nothing here imports torch. A checkpoint's header holds one `ModelConfig` as JSON, and a network is
built from its config alone. Start reading at `ModelConfig`; sizes of official models are in
`presets`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from sana.errors import CheckpointError

BlockKind = Literal["residual", "efficientvit"]
Resample = Literal["conv", "pixel_unshuffle", "interpolate", "pixel_shuffle"]
NormKind = Literal["rms", "batch"]
Activation = Literal["relu", "silu"]
SamplerName = Literal["dpm", "euler", "scm"]
Reference = Literal["nvidia", "diffusers"]
EPSILONS: Mapping[Reference, tuple[float, float]] = {
    "nvidia": (1e-8, 1e-6),
    "diffusers": (1e-15, 1e-5),
}
"""Of linear attention, and of the query and key norms of cross-attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinerConfig:
    """Bidirectional layers over text states, with positions and zero-initialized gates (LiDiT)."""

    depth: int = 2
    heads: int = 6
    mlp_ratio: float = 2.0
    max_tokens: int = 128

    def __post_init__(self) -> None:
        _require(self.depth >= 1, f"refiner depth is {self.depth}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig:
    """Linear DiT: width D, `depth` blocks, self-attention heads of `head_dim`.

    `cross_heads` is the number of heads that attend to the text.
    """

    width: int
    depth: int
    cross_heads: int
    text_dim: int
    latent_channels: int = 32
    head_dim: int = 32
    mlp_ratio: float = 2.5
    patch_size: int = 1
    qk_norm: bool = False
    guidance_embedding: bool = False
    position_scale: float | None = None
    """Interpolation scale of the sin-cos table (1.0 at 2K, 2.0 at 4K); None means no positions."""
    position_base: int = 16
    """Grid side, in tokens, at which positions have unit spacing (before `position_scale`)."""
    time_scale: float = 1000.0
    """What a time in 0..1 is multiplied by before its embedding; 1 for the teachers of Sprint.

    Sprint itself, which embeds the guidance scale, always takes its time as it is.
    """
    text_norm_scale: float = 0.01
    attention_eps: float = 1e-15
    self_norm_eps: float = 1e-5
    cross_norm_eps: float = 1e-5
    clamps: bool = False
    """Whether attention output is clipped to the range of fp16 in every dtype (fp16-trained)."""
    refiner: RefinerConfig | None = None

    def __post_init__(self) -> None:
        for name in ("width", "depth", "cross_heads", "text_dim", "latent_channels", "patch_size"):
            value = getattr(self, name)
            _require(value >= 1, f"DiT {name} is {value}; it must be at least 1")
        _require(
            self.width % self.head_dim == 0,
            f"DiT width {self.width} is not a multiple of head_dim {self.head_dim}",
        )
        _require(
            self.width % self.cross_heads == 0,
            f"DiT width {self.width} is not a multiple of cross_heads {self.cross_heads}",
        )

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def inner_blocks(self) -> range:
        """Those whose products may be in fp8: not the first and the last, if there are others.

        These two alone cost half of the accuracy (docs/performance.md).
        """
        return range(1, self.depth - 1) if self.depth > 2 else range(self.depth)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetConfig:
    """A ControlNet: a copy of the stem and of the first `depth` blocks of a transformer.

    `dit` describes the stem and the blocks; its own `depth` is the base's where that is known and
    plays no part in the ControlNet. No official one has query and key norms.
    """

    dit: DiTConfig
    depth: int = 7

    def __post_init__(self) -> None:
        _require(self.depth >= 1, f"ControlNet depth is {self.depth}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One resolution of the DC-AE: how wide, how many blocks, of which kind."""

    width: int
    depth: int
    block: BlockKind = "residual"
    scales: tuple[int, ...] = ()
    """Kernel sizes of the multi-scale branch of an EfficientViT block."""
    norm: NormKind = "rms"
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        _require(self.width >= 1, f"stage width is {self.width}; it must be at least 1")
        _require(self.depth >= 0, f"stage depth is {self.depth}; it must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class DCAEConfig:
    """Deep-compression autoencoder; stages run from full resolution to the latent's.

    With S stages the compression factor is 2^(S-1). A first stage of depth 0 is skipped, and the
    stem (or the head) resamples instead, without shortcut.
    """

    latent_channels: int
    encoder: tuple[StageConfig, ...]
    decoder: tuple[StageConfig, ...]
    down: Literal["conv", "pixel_unshuffle"] = "conv"
    up: Literal["interpolate", "pixel_shuffle"] = "interpolate"
    out_activation: Activation = "relu"
    head_dim: int = 32
    latent_mean: tuple[float, ...] = (0.0,)
    latent_scale: tuple[float, ...] = (1.0,)
    """The DiT sees (z - latent_mean) * latent_scale, for each channel or one for all."""

    def __post_init__(self) -> None:
        _require(
            len(self.encoder) == len(self.decoder) >= 2,
            f"DC-AE has {len(self.encoder)} encoder and {len(self.decoder)} decoder stages; "
            "they must be equal in number and at least 2",
        )
        for name in ("latent_mean", "latent_scale"):
            count = len(getattr(self, name))
            _require(
                count in (1, self.latent_channels),
                f"DC-AE {name} has {count} values; it takes 1 or {self.latent_channels}",
            )
        _require(all(s > 0 for s in self.latent_scale), "DC-AE latent_scale must be positive")

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        return int(2 ** (len(self.encoder) - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Which language model reads the prompt, and how many of its states are kept."""

    kind: Literal["minilm", "gemma2"]
    width: int
    max_tokens: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int

    def __post_init__(self) -> None:
        _require(
            self.max_tokens >= 3, f"text max_tokens is {self.max_tokens}; it must be at least 3"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentConfig:
    """The image-text model that judges pictures of the sticker world, at 256 px."""

    text_width: int
    refiner: RefinerConfig
    width: int = 256
    heads: int = 8
    stages: tuple[int, ...] = (64, 128, 256)
    """Widths of the convolution stages; the first has a quarter of the side, each other half."""
    depths: tuple[int, ...] = (2, 2, 2)
    picture_layers: int = 2
    layers: int = 3
    """Layers in which words look at the picture."""

    def __post_init__(self) -> None:
        _require(
            self.width % self.heads == 0,
            f"alignment width {self.width} is not a multiple of heads {self.heads}",
        )
        _require(
            len(self.stages) == len(self.depths) and 1 <= len(self.stages) <= 5,
            f"alignment has {len(self.stages)} stages and {len(self.depths)} depths; give as many "
            "of each, 1 to 5",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig:
    """A Gemma-2 decoder, as its own folder describes it; the defaults are those of the 2B."""

    width: int = 2304
    layers: int = 26
    heads: int = 8
    key_heads: int = 4
    head_dim: int = 256
    mlp_width: int = 9216
    vocabulary: int = 256000
    query_scale: float = 256.0
    """Attention logits are divided by its square root."""
    soft_cap: float = 50.0
    """Logits are cap * tanh(logits / cap)."""
    window: int = 4096
    """Every other layer looks back this far; no prompt is longer."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require(
            self.heads % self.key_heads == 0,
            f"Gemma-2 has {self.heads} query and {self.key_heads} key heads; the first must be a "
            "multiple of the second",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Sampling defaults and the time convention that the weights were trained with."""

    shift: float = 3.0
    steps: int = 20
    guidance: float = 4.5
    sampler: SamplerName = "dpm"
    integer_times: bool = True
    """Whether the network is told trunc(1000 t) / 1000 (official models) or t itself."""

    def __post_init__(self) -> None:
        _require(self.shift > 0, f"shift is {self.shift}; it must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that a pipeline needs to know about a set of weights."""

    name: str
    dit: DiTConfig
    autoencoder: DCAEConfig
    text: TextConfig
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    pixels: int = 512
    """Default side of a picture."""
    max_pixels: int = 1024
    """Largest side the model may be asked for."""
    trained_on_bins: bool = False
    """Whether training saw the published aspect-ratio table, so that drawing keeps to it."""
    reference: Reference = "nvidia"
    """Whose conventions hold where the two public implementations differ (docs/models.md)."""
    controlnet: ControlNetConfig | None = None

    def __post_init__(self) -> None:
        _require(
            self.dit.latent_channels == self.autoencoder.latent_channels,
            f"the DiT takes {self.dit.latent_channels} latent channels and the autoencoder makes "
            f"{self.autoencoder.latent_channels}; they must be equal",
        )
        _require(
            self.dit.text_dim == self.text.width,
            f"the DiT takes text states {self.dit.text_dim} wide and the encoder makes "
            f"{self.text.width}; they must be equal",
        )

    @property
    def borrows_mask(self) -> bool:
        """Whether the unconditional half of guidance sees its text through the prompt's mask.

        NVIDIA's code does, and its padding then counts; only Gemma's texts are padded that way.
        """
        return self.reference == "nvidia" and self.text.kind == "gemma2"

    def tells_integer_times(self, *, by_scheduler: bool) -> bool:
        """Whether the network is told whole thousandths; `by_scheduler`: whether the sampler's are.

        NVIDIA's network rounds down whatever it is told, diffusers' only sees what its scheduler
        rounded. Sprint and our own models are told the time itself.
        """
        return self.sampling.integer_times and (by_scheduler or self.reference == "nvidia")


def with_reference(config: ModelConfig, reference: Reference) -> ModelConfig:
    """The same model by the other implementation's rules; our own models do not change.

    The epsilons of a DiT belong to the convention too: NVIDIA has 1e-8 in linear attention and 1e-6
    in the norms of cross-attention, diffusers 1e-15 and 1e-5.
    """
    if config.text.kind != "gemma2":
        return replace(config, reference=reference)
    attention, norm = EPSILONS[reference]
    dit = replace(config.dit, attention_eps=attention, cross_norm_eps=norm)
    control = config.controlnet
    if control is not None:
        its = replace(control.dit, attention_eps=attention, cross_norm_eps=norm)
        control = replace(control, dit=its)
    return replace(config, reference=reference, dit=dit, controlnet=control)


Config = TypeVar("Config")


def to_json(config: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars; `from_json` gives the same config back."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_json(kind: type[Config], data: Mapping[str, Any]) -> Config:
    """Build a config of type `kind`; unknown keys fail with the nearest known name."""
    hints = typing.get_type_hints(kind)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(hints)}"
            raise CheckpointError(f"{kind.__name__} has no field {key!r}{hint}")
    values = {key: _typed(hints[key], value) for key, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise CheckpointError(f"{kind.__name__}: {error}; the header is incomplete") from None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [item for item in typing.get_args(hint) if item is not type(None)]
        return None if value is None else _typed(inner[0], value)
    if origin is Literal:
        _require(
            value in typing.get_args(hint),
            f"{value!r} is not one of {', '.join(map(repr, typing.get_args(hint)))}",
        )
        return value
    if origin is tuple:
        return tuple(_typed(typing.get_args(hint)[0], item) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    return float(value) if hint is float else value


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise CheckpointError(message)
