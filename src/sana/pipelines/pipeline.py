"""A request's way through a model: text, noise, steps, picture. One class for every task.

`steps` yields after each evaluation of the network, so a caller can show progress or stop by not
pulling; `generate` pulls them all and decodes. A pipeline holds weights and nothing that a call
changes: the same request gives the same pixels, whatever was drawn before or beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sana.errors import RequestError
from sana.kernels.reference import FP8
from sana.models.sending import sent
from sana.pipelines import preview, start
from sana.pipelines.control import control_pixels
from sana.pipelines.defaults import Size
from sana.pipelines.denoising import make_denoiser
from sana.pipelines.footprint import Canvas
from sana.pipelines.images import from_levels, to_pil
from sana.pipelines.memory import MemoryPlan, parse
from sana.pipelines.placing import Placing, first_device
from sana.pipelines.precision import (
    MIXED,
    SCALED,
    Wanted,
    announce,
    check_finite,
    choose,
    name,
    watch_finite,
)
from sana.pipelines.reading import read_pictures
from sana.pipelines.start import Plan
from sana.samplers import (
    METHODS,
    Fresh,
    Step,
    draw_noise,
    first_step,
    in_groups,
    run,
)

if TYPE_CHECKING:
    from sana.config import ModelConfig
    from sana.request import Request
    from sana.weights.load import Components

Pictures = Mapping[str, Image.Image]
"""The pictures that a request names, by name; None where a caller leaves the reading to us."""


class Pipeline:
    """Every task with one set of weights; build it with `sana.load`.

    Where `images` is None, the pictures that a request names are read from their files; otherwise
    no file is opened, and `images` holds them under those names. `device` is where it computes, by
    default where the weights are, and `memory` how many bytes it may take there. On CUDA, steps run
    as CUDA graphs where the memory plan has room for them, unless `graph` is false.
    """

    def __init__(
        self,
        components: Components,
        *,
        device: torch.device | str | None = None,
        memory: int | None = None,
        batch: int = 1,
        graph: bool = True,
    ) -> None:
        if batch < 1:
            raise RequestError(f"batch is {batch}; it must be 1 or more: 1 draws one by one")
        self.components = components
        self.config = components.config
        self._batch = batch
        self._dtype = components.dit.output.weight.dtype
        self._projection: preview.Projection | None = None
        place = device or components.dit.output.weight.device
        self._placing = Placing(components, place, memory, uses_graphs=graph)
        components.dit.eval()
        components.autoencoder.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def resolve(self, request: Request, images: Pictures | None = None) -> Request:
        """The request with the model's defaults filled in; raises `RequestError`."""
        return self._plan(request, images).request

    def steps(self, request: Request, images: Pictures | None = None) -> Iterator[Step]:
        """Yield a `Step` for each evaluation; its latents [B,C,h,w] hold all the pictures.

        With strength 0 nothing is evaluated, and the one step holds the image's own latent. Raises
        `RequestError` at once, and `NumericsError` when NaN appears.
        """
        return self._steps(self._plan(request, images))

    def generate(self, request: Request, images: Pictures | None = None) -> list[Image.Image]:
        """The pictures of `request`, one for each of `request.image_seeds`."""
        plan = self._plan(request, images)
        latent = None
        late: list[Callable[[], None]] = []
        for step in self._steps(plan, late):
            latent = step.latent
        assert latent is not None, "a schedule has at least one step"
        return self._finish(plan, latent, late)

    def finish(
        self, request: Request, latents: Tensor, images: Pictures | None = None
    ) -> list[Image.Image]:
        """The pictures of a last step's latents: decoded, resized, joined to the image."""
        return self._finish(self._plan(request, images), latents)

    @property
    def device(self) -> torch.device:
        """Where it computes; latents are there."""
        return self._placing.device

    @property
    def dtype(self) -> str:
        """What the transformer computes in, such as float32; mixed and fp8 are its products'."""
        products = self.components.dit.products
        if products == self._dtype:
            return name(self._dtype)
        return SCALED if products == FP8 else MIXED

    def memory_plan(self, request: Request, images: Pictures | None = None) -> MemoryPlan:
        """What is where when, to draw `request`; prints as a sentence. Raises `RequestError`."""
        return self._prepare(self._plan(request, images))

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of the weights: the first numbers of every tensor, hashed."""
        self._placing.rest()
        digest = hashlib.sha256()
        whole = self.components
        parts = (whole.dit, whole.autoencoder, whole.text, whole.controlnet)
        for network in (part for part in parts if isinstance(part, torch.nn.Module)):
            for key, tensor in sorted(network.state_dict().items()):
                sample = tensor.detach().flatten()[:64].double().cpu()
                digest.update(f"{key} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:12]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of image latents [B,C,h,w], decoded one at a time to bound the memory."""
        return list(self._pictures(latents))

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> Tensor:
        """Image latent [1,C,h,w] in fp32 of an RGB picture whose sides the model can draw."""
        return self._encode(start.drawn_tensor(image, (image.height, image.width)))

    @torch.inference_mode()
    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Small pictures of a step's `clean` latents [B,C,h,w], without the decoder.

        The first call takes a few seconds: it fits the projection to the autoencoder.
        """
        if self._projection is None:
            self._projection = preview.fit(self._encode, self.config.autoencoder.factor)
        return [to_pil(pixels) for pixels in self._projection(latents)]

    def _plan(self, request: Request, images: Pictures | None) -> Plan:
        if request.loras and self.dtype == SCALED:
            raise RequestError(
                "loras are given and dtype is fp8; an adapter adds to weights that fp8 has "
                "rounded already: leave dtype out, or use bfloat16"
            )
        return start.plan(
            request, self.config, read_pictures(request) if images is None else images
        )

    @torch.inference_mode()
    def _finish(
        self, plan: Plan, latents: Tensor, late: list[Callable[[], None]] | None = None
    ) -> list[Image.Image]:
        if start.is_plain(plan):
            return list(self._pictures(latents, late))
        for check in late or ():
            check()
        decode = self._placing.decode
        return [start.finished(decode(self._raw(one)), plan) for one in latents.split(1)]

    def _pictures(
        self, latents: Tensor, late: list[Callable[[], None]] | None = None
    ) -> Iterator[Image.Image]:
        """Decoded one at a time; on a GPU the next is launched before one becomes a picture.

        The checks in `late` come before the first.
        """
        ahead = 2 if self.device.type == "cuda" else 1
        waiting: list[Callable[[], Tensor]] = []
        for latent in latents.split(1):
            waiting.append(self._placing.begin_decoding(self._raw(latent), as_bytes=True))
            while late:
                late.pop(0)()
            if len(waiting) == ahead:
                yield from_levels(waiting.pop(0)())
        yield from (from_levels(result()) for result in waiting)

    def _raw(self, latent: Tensor) -> Tensor:
        return self.components.autoencoder.denormalize(latent.to(self.device))

    def _encode(self, pixels: Tensor) -> Tensor:
        raw = self._placing.encode(pixels)
        latent = self.components.autoencoder.normalize(raw)
        check_finite(latent, "the encoded image", raw.dtype)
        return latent.float()

    def _prepare(self, plan: Plan) -> MemoryPlan:
        request: Any = plan.request
        second = 0 if self.config.dit.guidance_embedding or request.guidance == 1 else 1
        together = min(self._batch, len(request.image_seeds))
        canvas = Canvas(
            width=plan.drawn[1],
            height=plan.drawn[0],
            batch=together * (1 + second + (1 if request.pag_scale else 0)),
            encodes=plan.image is not None or plan.control is not None,
        )
        return self._placing.prepare(canvas)

    @torch.inference_mode()
    def _steps(self, plan: Plan, late: list[Callable[[], None]] | None = None) -> Iterator[Step]:
        """See `steps`; the last step is not waited for where its check may go to `late`."""
        request: Any = plan.request
        self._prepare(plan)
        method = METHODS[request.sampler]
        generators = [torch.Generator().manual_seed(seed) for seed in request.image_seeds]
        fresh = self._noise(plan.drawn, generators)
        latent = fresh()
        times = method.times(request.steps, request.shift)
        clean = None
        if plan.image is not None:
            clean = self._encode(start.drawn_tensor(plan.image, plan.drawn))
            times = times[first_step(request.steps, request.strength) :]
            if len(times) == 1:
                latent = clean.expand_as(latent)
                yield Step(index=0, count=1, latent=latent, clean=latent)
                return
            if request.strength < 1:
                latent = torch.lerp(clean, latent, times[0].item())
        control = self._control(plan)
        denoiser = in_groups(
            make_denoiser(self.components, self._placing, request, times, control), self._batch
        )
        if clean is not None and plan.mask is not None:
            denoiser = start.held(denoiser, clean, start.kept(plan.mask, latent))
        check: Callable[[], None] | None = None
        for step in run(method.start(latent, times, fresh), denoiser):
            # One step late, so that the device has the next one to do while the host looks.
            if check is not None:
                check()
            stage = f"the latent at step {step.index + 1} of {step.count}"
            check = watch_finite(step.latent, stage, self.components.dit.products)
            if step.index + 1 == step.count and late is None:
                check()
            yield step
        if late is not None and check is not None:
            late.append(check)

    def _control(self, plan: Plan) -> Tensor | None:
        """The normalized latent of the control picture, edges found first where asked."""
        if plan.control is None:
            return None
        pixels = start.drawn_tensor(plan.control, plan.drawn)
        return self._encode(control_pixels(pixels, plan.request.control_detector or "none"))

    def _noise(self, drawn: Size, generators: list[torch.Generator]) -> Fresh:
        """A source of noise [B,C,h,w]; each picture's comes from its own generator."""
        factor, channels = self.config.autoencoder.factor, self.config.dit.latent_channels
        shape = (channels, drawn[0] // factor, drawn[1] // factor)
        return lambda: sent(draw_noise(shape, generators), self.device)


def load(
    name_or_path: str = "sticker-512",
    *,
    device: torch.device | str | None = None,
    dtype: Wanted | None = None,
    memory: int | str | None = None,
    offline: bool = False,
    batch: int = 1,
) -> Pipeline:
    """A pipeline with the weights of a preset or a folder; raises as `weights.load.load` does.

    By default on CUDA where there is one, else the CPU, and in the dtypes that suit the model and
    the device; a `dtype` that would break the model is corrected with a warning. "mixed" is fp32
    with the large products in bf16, the default on CPUs that are faster so; "fp8" is bf16 with the
    transformer's large products in fp8, faster and coarser, for GPUs of compute capability 8.9 or
    newer and a `RequestError` elsewhere. `memory`, in bytes or such as "8GiB", is what may be taken
    of the device. An official model is fetched when it is first used; `offline` takes it from the
    cache alone. `batch` is how many pictures of a request are denoised at a time.
    """
    from sana.weights.load import Where, find_model
    from sana.weights.load import load as load_components

    limit = parse(memory) if isinstance(memory, str) else memory
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def where(config: ModelConfig) -> Where:
        precision = choose(config, place, dtype)
        announce(precision)
        return Where(
            device=first_device(config, precision.widths, place, limit),
            dit=precision.dit_loads,
            autoencoder=precision.autoencoder_loads,
            text=precision.text,
        )

    found = find_model(name_or_path, is_offline=offline)
    variant = dtype if isinstance(dtype, torch.dtype) else torch.float32
    components = load_components(found, dtype=variant, where=where)
    return Pipeline(components, device=place, memory=limit, batch=batch)
