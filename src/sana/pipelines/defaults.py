"""A request made complete for one model: its defaults filled in, what it cannot honour refused.

Rules that hold for every model are in `sana.request`; these depend on the model. A field that would
have no effect is an error, never ignored. Start reading at `complete`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sana.errors import RequestError
from sana.presets import PRESETS

if TYPE_CHECKING:
    from sana.config import ModelConfig
    from sana.request import Request

SIDE_LEAST = 64
STRENGTH = 0.6
FEATHER = 8
PERTURBED_BLOCK = 8
NVIDIA_PERTURBED = {28: 14}
"""By depth, where NVIDIA's code perturbs another block than `PERTURBED_BLOCK`."""
Size = tuple[int, int]
"""(height, width) in pixels."""


def complete(request: Request, config: ModelConfig, size: Size) -> Request:
    """The request with the model's defaults filled in; raises `RequestError`.

    `size` is that of the picture: what was asked for, or what follows from the model or an image.
    """
    defaults = {**_sampling(config), **_of_tasks(request, config)}
    defaults |= {"height": size[0], "width": size[1], "binning": _needs_bins(request, config, size)}
    missing = {k: v for k, v in defaults.items() if getattr(request, k) in (None, ())}
    full = request.replace(**missing) if missing else request
    for name, side in zip(("height", "width"), size, strict=True):
        _check_side(name, side, config, full)
    for refused in _refusals(full, config):
        raise RequestError(refused)
    return full


def step_of(config: ModelConfig) -> int:
    """Pixels along each side of a token: what a drawn side is a multiple of."""
    return config.autoencoder.factor * config.dit.patch_size


def _sampling(config: ModelConfig) -> dict[str, Any]:
    sampling = config.sampling
    return {
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "sampler": sampling.sampler,
        "shift": sampling.shift,
    }


def _of_tasks(request: Request, config: ModelConfig) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    if request.image is not None:
        defaults["strength"] = STRENGTH if request.mask is None else 1.0
    if request.mask is not None:
        defaults["feather"] = FEATHER
    if request.control is not None:
        defaults["control_detector"] = "none"
        defaults |= {"control_scale": 1.0, "control_start": 0.0, "control_end": 1.0}
    if request.pag_scale:
        depth = config.dit.depth
        block = NVIDIA_PERTURBED.get(depth) if config.reference == "nvidia" else None
        defaults["pag_blocks"] = (block or min(PERTURBED_BLOCK, depth // 2),)
    if request.loras:
        defaults["lora_scales"] = (1.0,) * len(request.loras)
    return defaults


def _needs_bins(request: Request, config: ModelConfig, size: Size) -> bool:
    is_odd = any(side % step_of(config) for side in size)
    is_large = request.mask is not None and max(size) > config.max_pixels
    return config.trained_on_bins or is_odd or is_large


def _check_side(name: str, side: int, config: ModelConfig, request: Request) -> None:
    if request.mask is not None:  # the image's own size, however large; what is drawn is checked
        return
    step = 1 if request.binning else step_of(config)
    if side % step or not SIDE_LEAST <= side <= config.max_pixels:
        kinds = "sides" if request.binning else f"multiples of {step}"
        raise RequestError(
            f"{name} is {side}; {config.name} takes {kinds} from "
            f"{SIDE_LEAST} to {config.max_pixels}, best {config.pixels}"
        )


def _refusals(request: Any, config: ModelConfig) -> Iterator[str]:
    """Why this model cannot honour the request, each with the way out."""
    if request.control is not None and config.controlnet is None:
        with_one = [name for name, row in PRESETS.items() if row.config.controlnet is not None]
        yield (
            f"control is {request.control!r} and {config.name} has no ControlNet; choose a model "
            f"with one: {', '.join(with_one)}, or a folder that holds one"
        )
    for block in request.pag_blocks:
        if block >= config.dit.depth:
            yield (
                f"pag_blocks has {block}; {config.name} has {config.dit.depth} blocks, counted "
                "from 0, so choose a smaller number"
            )
    yield from (
        _distilled(request, config) if config.dit.guidance_embedding else _plain(request, config)
    )


def _plain(request: Any, config: ModelConfig) -> Iterator[str]:
    if request.guidance < 1:
        yield (
            f"guidance is {request.guidance:g}; {config.name} takes 1 (off) or more, and only "
            "Sprint models take less"
        )
    if request.sampler == "scm":
        yield (
            f"sampler is scm; {config.name} is not distilled for it, only Sprint models are: use "
            f"{config.sampling.sampler}"
        )
    if request.guidance == 1 and request.negative_prompt:
        yield (
            "there is a negative_prompt and guidance is 1, which is off; the negative prompt acts "
            "through guidance, so raise it or leave the prompt out"
        )
    if request.guidance == 1 and not request.pag_scale and request.guidance_interval:
        yield (
            "there is a guidance_interval and guidance is 1, which is off; raise it or leave the "
            "interval out"
        )


def _distilled(request: Any, config: ModelConfig) -> Iterator[str]:
    """A Sprint model takes the guidance as an input, in one evaluation a step."""
    for name in ("negative_prompt", "guidance_interval", "pag_scale"):
        if getattr(request, name):
            yield (
                f"{name} is {getattr(request, name)!r}; {config.name} is distilled and evaluates "
                "its network once a step, without a second text: leave it out"
            )
    if request.sampler == "scm" and request.shift != 1:
        yield f"shift is {request.shift:g}; sampler scm takes none: leave it out, or give 1"
