"""What a training run is: one frozen `TrainConfig`, changed only by checked `key=value` overrides.

A resolved config is saved beside every checkpoint, so a run can be read and repeated from its
folder.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sana.config import from_json, to_json
from sana.data.stickers.scene import TRAINING_KINDS, TrainingKind
from sana.errors import TrainingError

TaskName = Literal["autoencoder", "grounding", "flow", "detector", "alignment", "traits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Warm-up, a constant rate, and a linear decay to zero over the last part."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, everything else by AdamW."""
    momentum: float = 0.95
    """Of Muon alone."""
    rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    """Gradient norm above which the gradient is scaled down."""
    warmup: int = 200
    decay: float = 0.3
    """Fraction of the steps, at the end, over which the rate falls linearly to zero."""

    def __post_init__(self) -> None:
        _require(self.rate > 0, f"optimizer.rate is {self.rate}; it must be positive")
        _require(0 <= self.decay <= 1, f"optimizer.decay is {self.decay}; it must be in 0..1")
        _require(self.clip > 0, f"optimizer.clip is {self.clip}; it must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which pictures, how many at once and how large."""

    pack: str = ".data/stickers.pack"
    """Sticker pack file, or "tiny" for a world drawn by code."""
    size: int = 512
    """Side of the composed pictures in pixels."""
    crop: int = 0
    """Side of random crops taken from them; 0 keeps them whole."""
    batch: int = 64
    """Samples of one step in each process, over all its micro-batches."""
    accumulate: int = 1
    """Micro-batches of a step in each process."""
    chunk: int = 1
    """Micro-batches whose new pictures are drawn at once."""
    workers: int = 0
    kinds: str = ""
    """Kinds of pictures, taken in turn, such as "scene scene sticker avatar"; empty: as the
    composer draws them (autoencoders and transformers only)."""
    cache: str = ".data/cache"
    """Folder that keeps the pack's rasterised pictures from run to run; empty keeps none."""
    avatars: int = 0
    """How many avatars to draw from the pack; 0 takes all."""
    tokens: int = 64
    """Text tokens kept of a caption, padded to this length."""
    reuse: int = 1
    """How often a latent is trained on, on average, before a new one takes its place."""
    ring: int = 0
    """Latents kept for reuse in each process; 0 when `reuse` is 1."""

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "chunk", "reuse"):
            value = getattr(self, name)
            _require(value >= 1, f"data.{name} is {value}; it must be at least 1")
        _require(
            self.batch % self.accumulate == 0,
            f"data.batch {self.batch} is not a multiple of data.accumulate {self.accumulate}",
        )
        _require(
            self.size % 32 == 0 and self.crop % 32 == 0 and self.crop <= self.size,
            f"data.size {self.size} and data.crop {self.crop} must be multiples of 32, "
            "and the crop no larger than the picture",
        )
        new = self.batch // self.accumulate * self.chunk // self.reuse
        _require(
            self.reuse == 1 or self.ring >= max(self.batch, new),
            f"data.reuse {self.reuse} needs data.ring of at least one batch ({self.batch}) and "
            f"the new pictures of a chunk ({new})",
        )
        self.cycle()

    def cycle(self) -> tuple[TrainingKind, ...]:
        """`kinds` as a tuple; TrainingError if one is unknown."""
        named = {str(kind): kind for kind in TRAINING_KINDS}
        words = self.kinds.split()
        for word in words:
            _require(word in named, f"data.kinds has {word!r}; known: {', '.join(named)}")
        return tuple(named[word] for word in words)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderConfig:
    """The three phases of DC-AE training (DC-AE, section 3.3) and the weights of their losses."""

    phase: Literal["full", "latent", "decoder", "refine"] = "full"
    """full: everything; latent: encoder head and decoder input; refine: decoder output, with
    PatchGAN. decoder, not in the paper: the whole decoder, so that a transformer trained on the
    encoder's latents stays valid."""
    perceptual: float = 0.1
    perceptual_file: str = ".data/perceptual.safetensors"
    perceptual_crop: int = 128
    squared: float = 0.0
    """Weight of the mean squared error beside the mean absolute one."""
    log_squared: float = 0.0
    """Weight of the mean over pictures of the squared error's logarithm, which is what a mean PSNR
    measures: pictures that are nearly right count as much as the worst."""
    adversarial: float = 0.05
    """Weight of the generator's hinge loss in the refine phase."""
    latent_noise: float = 0.0
    """Largest noise added to the latent, in its channels' standard deviations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConfig:
    """Rectified flow: velocity target, logit-normal times with shift, caption dropout."""

    times: Literal["logit-normal", "uniform", "mode"] = "logit-normal"
    """How times are drawn before the shift (Stable Diffusion 3, section 3.1)."""
    shift: float = 3.0
    """Times t are moved to shift t / (1 + (shift - 1) t)."""
    dropout: float = 0.1
    """How often the caption is replaced by the empty prompt."""
    autoencoder: str = "sticker-512"
    """Model whose autoencoder and text encoder are used, frozen: a name or a folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run."""

    recipe: str
    task: TaskName
    model: str
    """Preset whose networks are trained."""
    steps: int
    folder: str = "runs/latest"
    init: str = ""
    """Model to start from, a name or a folder, also a run's; empty starts from random weights."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    graph: bool = False
    """Loss and gradients as one CUDA graph, compiled or not, for task flow with accumulate=1: where
    launching takes longer than computing, as with batches of few tokens."""
    ema: float = 0.999
    """Decay of the averaged weights; 0 keeps none."""
    save_every: int = 500
    log_every: int = 20
    sample_every: int = 0
    """Steps between sample grids; 0 draws none."""
    stop_after_bad: int = 50
    """Consecutive non-finite steps after which the run is ended."""
    time_limit: float = 0.0
    """Seconds in which the run ends, its decay included; 0 means no limit.

    The number of steps is fitted to the measured speed at every report.
    """
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "log_every"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}; it must be at least 1")
        _require(
            not self.graph or (self.task == "flow" and self.data.accumulate == 1),
            f"graph=true with task {self.task} and data.accumulate {self.data.accumulate}; it is "
            "for task flow and data.accumulate=1",
        )
        _require(0 <= self.ema < 1, f"ema is {self.ema}; it must be in 0..1, below 1")


def override(config: TrainConfig, changes: Sequence[str]) -> TrainConfig:
    """Apply changes such as `optimizer.rate=2e-4`; unknown keys fail with the nearest."""
    data = to_json(config)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise TrainingError(f"{change!r} is not key=value, for example steps=1000")
        _set(data, key, key.split("."), _parse(text))
    return from_json(TrainConfig, data)


def difference(before: TrainConfig, after: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, by dotted key."""
    left, right = _flatten(to_json(before)), _flatten(to_json(after))
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def _set(data: dict[str, Any], key: str, path: list[str], value: Any) -> None:
    head, rest = path[0], path[1:]
    if head not in data:
        near = difflib.get_close_matches(head, data, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(data)}"
        raise TrainingError(f"no setting {key!r}{hint}")
    if isinstance(data[head], dict) and rest:
        _set(data[head], key, rest, value)
        return
    if rest or isinstance(data[head], dict):
        raise TrainingError(f"no setting {key!r}; {head!r} is {_describe(data[head])}")
    data[head] = _match(key, data[head], value)


def _match(key: str, old: Any, value: Any) -> Any:
    wanted = type(old)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is str and not isinstance(value, str):
        return str(value)
    if type(value) is not wanted:
        raise TrainingError(
            f"{key}={value!r}: this setting takes a {wanted.__name__}, like {old!r}"
        )
    return value


def _parse(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return text


def _describe(value: Any) -> str:
    return (
        f"a group of {', '.join(value)}"
        if isinstance(value, dict)
        else f"a single value, {value!r}"
    )


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise TrainingError(message)
