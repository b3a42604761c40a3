"""From a request to the denoiser that its sampler asks: text, guidance, ControlNet, LoRA.

Everything that a request changes about the network is put together here and thrown away with the
request; the model's own weights are never touched. Start reading at `make_denoiser`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sana.errors import RequestError
from sana.models.controlnet import Controlled
from sana.models.lora import adapted
from sana.pipelines.abreast import abreast
from sana.pipelines.precision import watch_finite
from sana.samplers import (
    METHODS,
    Denoiser,
    Guidance,
    Text,
    borrow_mask,
    distilled,
    guided,
    padded,
    truncated,
)
from sana.weights.lora import load_lora

if TYPE_CHECKING:
    from sana.models.dit import LinearDiT
    from sana.models.text import TextStates
    from sana.pipelines.placing import Placing
    from sana.weights.load import Components


def make_denoiser(
    components: Components,
    placing: Placing,
    request: Any,
    times: Tensor,
    control: Tensor | None = None,
) -> Denoiser:
    """What answers the sampler's queries for a complete `request`, over the grid `times`.

    control [1,C,h,w] is the normalized latent of the control picture. `placing` brings each network
    when it is needed: both texts are read before the transformer comes.
    """
    config, dit = components.config, components.dit
    has_second = request.guidance != 1 and not config.dit.guidance_embedding
    placing.enter("text")
    options = placing.reading
    encoded = components.text.encode([request.prompt], **options)
    negative = _read_negative(components, request, encoded, options) if has_second else None
    placing.enter("denoise")
    if request.loras:
        dit = adapted(dit, [load_lora(name, dit) for name in request.loras], request.lora_scales)
    base = dit if control is None else _controlled(components, dit, request, times, control)
    by_scheduler = METHODS[request.sampler].takes_integer_times
    integer_times = config.tells_integer_times(by_scheduler=by_scheduler)
    told = truncated(times[:-1]) if integer_times else times[:-1]
    scale = request.guidance if config.dit.guidance_embedding else None
    network, prepare = _captured(base, components, placing)
    network = _scheduled(network, _moments(base, components, placing, told, scale))
    if has_second and prepare is not None and (threads := _threads(dit, placing.device)) > 1:
        network, prepare = abreast(network, prepare, threads)
    network, prepare = _present(network, placing), prepare and _present(prepare, placing)
    checks: list[Callable[[], None]] = []
    text = _embedded(components, base, encoded, "the prompt", checks)
    if config.dit.guidance_embedding:
        return _checked(distilled(network, text, request.guidance, prepare=prepare), checks)
    if request.pag_scale:
        network = partial(network, perturbed_blocks=request.pag_blocks)
    denoiser = guided(
        network,
        text,
        None if negative is None else _negative(components, base, negative, text, checks),
        Guidance(
            scale=request.guidance,
            perturbation=request.pag_scale or 0.0,
            interval=request.guidance_interval or (0.0, 1.0),
        ),
        integer_times=integer_times,
        prepare=prepare,
    )
    return _checked(denoiser, checks)


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


def _threads(dit: LinearDiT, device: torch.device) -> int:
    """How many parts of a call may run side by side.

    In fp32 there is one: a product's last bits may depend on its rows, and pictures made in it
    before are to be made again bit for bit.
    """
    is_free = device.type == "cpu" and dit.products != torch.float32
    return torch.get_num_threads() if is_free else 1


def _controlled(
    components: Components, dit: LinearDiT, request: Any, times: Tensor, control: Tensor
) -> Controlled:
    assert components.controlnet is not None
    return Controlled(
        dit,
        components.controlnet,
        control,
        scale=request.control_scale,
        reference=components.config.reference,
        interval=control_interval(times, request.control_start, request.control_end),
    )


def _captured(
    base: LinearDiT | Controlled, components: Components, placing: Placing
) -> tuple[Callable[..., Tensor], Any]:
    """The network's call, by CUDA graphs where the memory plan has room for them; its `Prepare`.

    The model's own are kept for the next request; those of a LoRA or a control picture are not.
    """
    # A block that streams has its weights on the device only while it runs.
    prepare = None if placing.plan.dit == "streams" else base.prepare
    graphs = placing.graphs if base is components.dit else placing.new_graphs()
    if isinstance(base, Controlled):
        return partial(graphs, base, nn.ModuleList((base.base, base.controlnet))), prepare
    texts = placing.texts
    if base is not components.dit or not texts.is_on or prepare is None:
        return partial(graphs, base.denoise, base), prepare

    def call(latent: Tensor, time: Any, text: Any, _mask: Tensor, **options: Any) -> Tensor:
        ready = texts.present(text, base.prepare, base)
        velocity: Tensor = graphs(base.denoise, base, latent, time, ready, None, **options)
        return velocity

    return call, texts.wait


def _moments(
    base: LinearDiT | Controlled,
    components: Components,
    placing: Placing,
    told: Tensor,
    scale: float | None,
) -> Mapping[float, Any]:
    """See `embed_times`; by a CUDA graph for the model's own network where there is room."""
    if isinstance(base, Controlled) or base is not components.dit or not placing.time_graphs.is_on:
        return base.embed_times(told, scale)
    return base.embed_times(told, scale, replay=placing.time_graphs)


def _checked(denoiser: Denoiser, checks: list[Callable[[], None]]) -> Denoiser:
    """The same denoiser; `checks` of the text come once a step is launched, for the device to do.

    They may wait for the text, so the first velocity is asked for before.
    """

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        velocity = denoiser(latents, times)
        while checks:
            checks.pop(0)()
        return velocity

    return denoise


def _scheduled(network: Callable[..., Tensor], moments: Mapping[float, Any]) -> Any:
    """The same network, told the moment of a time wherever all its samples have one that is known.

    Then their guidance scale is in the moment too.
    """

    def call(latent: Tensor, time: Tensor, *texts: Any, **options: Any) -> Tensor:
        moment = moments.get(float(time[0])) if bool((time == time[0]).all()) else None
        if moment is None:
            return network(latent, time, *texts, **options)
        options.pop("guidance", None)
        return network(latent, moment, *texts, **options)

    return call


def _present(network: Any, placing: Placing) -> Any:
    """The same network, which comes to the device first if another request sent it away."""

    def call(*inputs: Any, **options: Any) -> Any:
        placing.enter("denoise")
        return network(*inputs, **options)

    return call


def _read_negative(
    components: Components, request: Any, conditional: TextStates, options: dict[str, Any]
) -> TextStates:
    length = conditional.mask.shape[1] if components.config.borrows_mask else None
    return components.text.encode_negative([request.negative_prompt], length, **options)


def _negative(
    components: Components,
    base: LinearDiT | Controlled,
    encoded: TextStates,
    conditional: Text,
    checks: list[Callable[[], None]],
) -> Text:
    """The unconditional text; by NVIDIA's convention it is seen through the prompt's own mask."""
    text = _embedded(components, base, encoded, "the negative prompt", checks)
    return borrow_mask(text, conditional) if components.config.borrows_mask else text


def _embedded(
    components: Components,
    base: LinearDiT | Controlled,
    encoded: TextStates,
    what: str,
    checks: list[Callable[[], None]],
) -> Text:
    """The text as the network takes it; what raises if it is not finite goes to `checks`."""
    weight = next(components.dit.parameters())
    states = base.embed_text(encoded.states.to(weight.device, weight.dtype), encoded.mask)
    checks.append(watch_finite(states, f"the text states of {what}", weight.dtype))
    block, text = text_block(weight.device), Text(states=states, mask=encoded.mask)
    return padded(text, -(-encoded.mask.shape[1] // block) * block)


def text_block(device: torch.device) -> int:
    """Texts are padded to multiples of so many tokens.

    On CUDA, so that prompts share the graph of a step; the kernel there reads as many at a time.
    """
    return 64 if device.type == "cuda" else 1
