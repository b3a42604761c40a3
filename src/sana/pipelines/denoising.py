"""From a request to the denoiser that its sampler asks: text, guidance, ControlNet, LoRA.

Everything that a request changes about the network is put together here and thrown away with the
request; the model's own weights are never touched. Start reading at `make_denoiser`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana.errors import NumericsError, RequestError
from sana.models.controlnet import Controlled
from sana.models.lora import adapted
from sana.samplers import METHODS, Denoiser, Guidance, Text, borrow_mask, distilled, guided
from sana.weights.lora import load_lora

if TYPE_CHECKING:
    from sana.models.dit import LinearDiT
    from sana.models.text import TextStates
    from sana.weights.load import Components


def make_denoiser(
    components: Components, request: Any, times: Tensor, control: Tensor | None = None
) -> Denoiser:
    """What answers the sampler's queries for a complete `request`, over the grid `times`.

    control [1,C,h,w] is the normalized latent of the control picture.
    """
    config, dit = components.config, components.dit
    if request.loras:
        dit = adapted(dit, [load_lora(name, dit) for name in request.loras], request.lora_scales)
    base: LinearDiT | Controlled = dit
    network: Any = dit.denoise
    if control is not None:
        assert components.controlnet is not None
        base = network = Controlled(
            dit,
            components.controlnet,
            control,
            scale=request.control_scale,
            reference=config.reference,
            interval=control_interval(times, request.control_start, request.control_end),
        )
    encoded = components.text.encode([request.prompt])
    text = _embedded(components, base, encoded, "the prompt")
    if config.dit.guidance_embedding:
        return distilled(network, text, request.guidance)
    if request.pag_scale:
        network = partial(network, perturbed_blocks=request.pag_blocks)
    has_second = request.guidance != 1
    by_scheduler = METHODS[request.sampler].takes_integer_times
    return guided(
        network,
        text,
        _negative(components, base, request.negative_prompt, text) if has_second else None,
        Guidance(
            scale=request.guidance,
            perturbation=request.pag_scale or 0.0,
            interval=request.guidance_interval or (0.0, 1.0),
        ),
        integer_times=config.tells_integer_times(by_scheduler=by_scheduler),
    )


def control_interval(times: Tensor, start: float, end: float) -> tuple[float, float]:
    """The times between which a ControlNet acts, for parts of the steps (as in the peer).

    Step i of n acts if i / n >= start and (i + 1) / n <= end. Raises `RequestError` if none does.
    """
    if start <= 0 and end >= 1:
        return 0.0, 1.0
    count = len(times) - 1
    first = math.ceil(start * count - 1e-9)
    last = math.floor(end * count + 1e-9) - 1
    if first > last:
        raise RequestError(
            f"control_start {start:g} and control_end {end:g} hold none of {count} steps; set them "
            f"at least {1 / count:.2g} apart"
        )
    grid = times.tolist()
    # Half way to the neighbours: the network may be told a time rounded to a thousandth.
    high = 2.0 if first == 0 else (grid[first - 1] + grid[first]) / 2
    return (grid[last] + grid[last + 1]) / 2, high


def check_finite(tensor: Tensor, stage: str) -> None:
    """`NumericsError` that names the stage, if there is NaN or infinity in `tensor`."""
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = tensor.numel() - int(finite.sum())
        raise NumericsError(
            f"{bad} of {tensor.numel()} values in {stage} are NaN or infinite; every stage must "
            "stay finite, so check the weight file, or use dtype float32"
        )


def _negative(
    components: Components, base: LinearDiT | Controlled, prompt: str, conditional: Text
) -> Text:
    """The unconditional text; by NVIDIA's convention it is seen through the prompt's own mask."""
    borrows = components.config.borrows_mask
    length = conditional.mask.shape[1] if borrows else None
    encoded = components.text.encode_negative([prompt], length)
    text = _embedded(components, base, encoded, "the negative prompt")
    return borrow_mask(text, conditional) if borrows else text


def _embedded(
    components: Components, base: LinearDiT | Controlled, encoded: TextStates, what: str
) -> Text:
    weight = next(components.dit.parameters())
    mask = encoded.mask.to(weight.device)
    states = base.embed_text(encoded.states.to(weight.device, weight.dtype), mask)
    check_finite(states, f"the text states of {what}")
    return Text(states=states, mask=mask)
