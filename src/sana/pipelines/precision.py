"""In which number formats a model runs, by what it was trained in and what the device can.

Models trained in fp16 learnt with their attention clipped to its range; their config carries that
clamp (`DiTConfig.clamps`), so they are right in fp16 and in fp32, and drew noise in bf16. Models
trained in bf16 leave the range of fp16. Gemma-2 and the DC-AE overflow in fp16, so they never run
in it. CPUs that multiply bf16 faster than fp32 do so in the large products alone ("mixed",
`sana.models.rounding`); "fp8" is bf16 with a transformer's large products in fp8, where asked for,
and is refused where it cannot be. Any other wish that would break a model is corrected, with a
note. Start reading at `choose`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sana.config import ModelConfig
from sana.errors import NumericsError, RequestError
from sana.kernels.reference import FP8
from sana.models.rounding import Dtype, Mixed
from sana.models.sending import arriving
from sana.pipelines.footprint import Widths

logger = logging.getLogger(__name__)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
Trained: TypeAlias = Literal["fp32", "fp16", "bf16"]
MIXED: Literal["mixed"] = "mixed"
"""fp32 with the large products in bf16, as `--dtype` and a picture's metadata name it."""
SCALED: Literal["fp8"] = "fp8"
"""bf16 with the transformer's large products in fp8 (e4m3), likewise."""
Wanted: TypeAlias = torch.dtype | Literal["mixed", "fp8"]
TOO_COARSE = "it was trained in float16, and bfloat16 is too coarse for it"
AMPERE = (8, 0)
"""The first compute capability with bf16."""
ADA = (8, 9)
"""The first with products in fp8."""
TILE = 16
"""Products in fp8 have sides of multiples of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The dtype of each network, and what had to be said about it."""

    text: torch.dtype
    dit: torch.dtype
    autoencoder: torch.dtype
    products: torch.dtype | None = None
    """Of the transformer's blocks and, but for fp8, the decoder's stages, where narrower."""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the flag takes it."""
        if self.products is None:
            return name(self.dit)
        return SCALED if self.products == FP8 else MIXED

    @property
    def dit_loads(self) -> Dtype:
        """What the transformer is loaded in."""
        return self.dit if self.products is None else Mixed(self.dit, self.products)

    @property
    def autoencoder_loads(self) -> Dtype:
        """What the autoencoder is loaded in."""
        if self.products in (None, FP8):
            return self.autoencoder
        assert self.products is not None
        return Mixed(self.autoencoder, self.products)

    @property
    def widths(self) -> Widths:
        """Bytes of a value of each, for the memory planner."""
        return Widths(
            text=self.text.itemsize,
            dit=self.dit.itemsize,
            autoencoder=self.autoencoder.itemsize,
            in_fp8=self.products == FP8,
        )


def choose(
    config: ModelConfig,
    device: torch.device | str,
    wanted: Wanted | None = None,
    *,
    has_bf16: bool | None = None,
    has_fast_products: bool | None = None,
    has_fp8: bool | None = None,
) -> Precision:
    """Dtypes for `config` on `device`; `wanted` is followed where the model can stand it.

    `has_bf16` says whether the device computes in bf16, `has_fast_products` whether a CPU
    multiplies faster in it, and `has_fp8` whether a GPU multiplies in fp8; by default they are
    asked. Raises `RequestError` for fp8 where device or model do not have it.
    """
    kind = torch.device(device).type
    trained = trained_in(config)
    if wanted == SCALED:
        _require_fp8(config, torch.device(device), has_fp8)
        return Precision(text=BF16, dit=BF16, autoencoder=BF16, products=FP8)
    if has_fast_products is None:
        has_fast_products = kind == "cpu" and multiplies_in_bf16()
    may_mix = kind == "cpu" and trained != "fp16"
    if may_mix and (wanted == MIXED or (wanted is None and has_fast_products)):
        return Precision(text=FP32, dit=FP32, autoencoder=FP32, products=BF16)
    if has_bf16 is None:
        has_bf16 = computes_in_bf16(device)
    wide = BF16 if has_bf16 else FP32
    notes: list[str] = []
    if wanted is None:
        dit = _default(trained, kind, wide)
    elif isinstance(wanted, torch.dtype):
        dit = _corrected(config, kind, wanted, wide, notes)
    else:
        dit = _default(trained, kind, wide)
        notes.append(_note(config, MIXED, TOO_COARSE if kind == "cpu" else "that is for CPUs", dit))
    # Half precision for the others only where the transformer has it, and never fp16.
    other = FP32 if dit == FP32 else wide
    if dit == FP16:
        logger.debug("text encoder and autoencoder run in %s beside fp16", other)
    return Precision(text=other, dit=dit, autoencoder=other, notes=tuple(notes))


def trained_in(config: ModelConfig) -> Trained:
    """What the transformer was trained in, by its config alone."""
    if config.dit.clamps:
        return "fp16"
    return "bf16" if config.text.kind == "gemma2" else "fp32"


def computes_in_bf16(device: torch.device | str) -> bool:
    """Whether bf16 is safe and native there: every CPU, CUDA from Ampere on, not MPS."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    return device.type == "cpu"


def multiplies_in_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16 (AVX512-BF16, AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def multiplies_in_fp8(device: torch.device | str) -> bool:
    """Whether the device multiplies in fp8: NVIDIA's from compute capability 8.9 on."""
    device = torch.device(device)
    return device.type == "cuda" and has_fp8_at(torch.cuda.get_device_capability(device))


def has_fp8_at(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability multiplies in fp8; AMD's count otherwise."""
    return torch.version.hip is None and capability >= ADA


def announce(precision: Precision) -> None:
    """Log what was corrected, as warnings."""
    for note in precision.notes:
        logger.warning("%s", note)


def check_finite(tensor: Tensor, stage: str, dtype: torch.dtype = FP32) -> None:
    """`NumericsError` that names the stage, if there is NaN or infinity in `tensor`.

    `dtype` is what the stage computed in, for the way out.
    """
    watch_finite(tensor, stage, dtype)()


def watch_finite(tensor: Tensor, stage: str, dtype: torch.dtype = FP32) -> Callable[[], None]:
    """`check_finite` in two halves: looks now, and what is returned raises.

    On a GPU it waits for `tensor` alone, and not for what was launched after it.
    """
    return watch_count(finite_values(tensor), tensor.numel(), stage, dtype)


def finite_values(tensor: Tensor) -> Tensor:
    """How many of the values are finite, int64 on the device."""
    return torch.isfinite(tensor).sum()


def watch_count(
    finite: Tensor, total: int, stage: str, dtype: torch.dtype = FP32
) -> Callable[[], None]:
    """`watch_finite` where `finite_values` of the stage's `total` values are known already."""
    count = arriving(finite)

    def check() -> None:
        bad = total - int(count())
        if bad:
            _complain(bad, total, stage, dtype)

    return check


def _complain(bad: int, total: int, stage: str, dtype: torch.dtype) -> None:
    way_out = "use dtype float32"
    if dtype == FP32:
        way_out = "the weights themselves are at fault, or were trained with a clamp that is off"
    raise NumericsError(
        f"{bad} of {total} values in {stage} are NaN or infinite "
        f"(computed in {name(dtype)}); every stage must stay finite, so check the weight file: "
        f"{way_out}"
    )


def name(dtype: torch.dtype) -> str:
    """`bfloat16`, as the flag takes it."""
    return str(dtype).removeprefix("torch.")


def _require_fp8(config: ModelConfig, device: torch.device, has_fp8: bool | None) -> None:
    """`RequestError` unless `config` can be drawn with products in fp8 there."""
    way_out = "leave dtype out, or use bfloat16"
    if not (multiplies_in_fp8(device) if has_fp8 is None else has_fp8):
        raise RequestError(
            f"dtype is fp8 and the device {device}; fp8 needs an NVIDIA GPU of compute capability "
            f"8.9 or newer (Ada, Hopper, Blackwell): {way_out}"
        )
    if trained_in(config) == "fp16":
        raise RequestError(
            f"{config.name} was asked for in fp8; it was trained in float16, and the bfloat16 "
            "between products in fp8 is too coarse for it: leave dtype out, or use a model trained "
            "in bfloat16"
        )
    sides = (config.dit.width, config.dit.mlp_width)
    if any(side % TILE for side in sides):
        raise RequestError(
            f"{config.name} was asked for in fp8, and its transformer is {sides[0]} wide with "
            f"{sides[1]} in the mix-FFN; products in fp8 need multiples of {TILE}: {way_out}"
        )


def _default(trained: Trained, kind: str, wide: torch.dtype) -> torch.dtype:
    if kind != "cuda":
        return FP32
    if trained == "fp16":
        return FP16
    return wide


def _corrected(
    config: ModelConfig, kind: str, wanted: torch.dtype, wide: torch.dtype, notes: list[str]
) -> torch.dtype:
    """`wanted`, or the nearest that works; what was wrong goes into `notes`."""
    trained = trained_in(config)
    if wanted == BF16 and trained == "fp16":
        better = FP16 if kind == "cuda" else FP32
        reason = TOO_COARSE
    elif wanted == FP16 and trained == "bf16":
        better, reason = wide, "it was trained in bfloat16 and leaves the range of float16"
    elif wanted == FP16 and kind == "cpu":
        better, reason = FP32, "a CPU computes float16 slowly or not at all"
    elif wanted == BF16 and wide != BF16:
        better, reason = FP32, f"this {kind} device does not compute in bfloat16"
    else:
        return wanted
    notes.append(_note(config, name(wanted), reason, better))
    return better


def _note(config: ModelConfig, wanted: str, reason: str, better: torch.dtype) -> str:
    return f"{config.name} was asked for in {wanted}; {reason}, so it runs in {name(better)}"
