"""A request's way through a model: text, noise, steps, picture. One class for every task.

`steps` yields after each evaluation of the network, so a caller can show progress or stop by not
pulling; `generate` pulls them all and decodes. A pipeline holds weights and nothing that a call
changes: the same request gives the same pixels, whatever was drawn before or beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sana.pipelines import start
from sana.pipelines.control import control_pixels
from sana.pipelines.defaults import Size
from sana.pipelines.denoising import check_finite, make_denoiser
from sana.pipelines.images import to_pil
from sana.pipelines.reading import read_pictures
from sana.pipelines.start import Plan
from sana.samplers import (
    METHODS,
    Fresh,
    Step,
    draw_noise,
    first_step,
    one_by_one,
    run,
)

if TYPE_CHECKING:
    from sana.request import Request
    from sana.weights.load import Components

Pictures = Mapping[str, Image.Image]
"""The pictures that a request names, by name; None where a caller leaves the reading to us."""


class Pipeline:
    """Every task with one set of weights; build it with `sana.load`.

    Where `images` is None, the pictures that a request names are read from their files; otherwise
    no file is opened, and `images` holds them under those names.
    """

    def __init__(self, components: Components) -> None:
        self.components = components
        self.config = components.config
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
        for step in self._steps(plan):
            latent = step.latent
        assert latent is not None, "a schedule has at least one step"
        return self._finish(plan, latent)

    def finish(
        self, request: Request, latents: Tensor, images: Pictures | None = None
    ) -> list[Image.Image]:
        """The pictures of a last step's latents: decoded, resized, joined to the image."""
        return self._finish(self._plan(request, images), latents)

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of the weights: the first numbers of every tensor, hashed."""
        digest = hashlib.sha256()
        parts = (self.components.dit, self.components.autoencoder, self.components.text)
        for network in (part for part in parts if isinstance(part, torch.nn.Module)):
            for name, tensor in sorted(network.state_dict().items()):
                sample = tensor.detach().flatten()[:64].double().cpu()
                digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:12]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of image latents [B,C,h,w], decoded one at a time to bound the memory."""
        return [to_pil(self._decode_one(latent)) for latent in latents.split(1)]

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> Tensor:
        """Image latent [1,C,h,w] in fp32 of an RGB picture whose sides the model can draw."""
        return self._encode(start.drawn_tensor(image, (image.height, image.width)))

    def _plan(self, request: Request, images: Pictures | None) -> Plan:
        return start.plan(
            request, self.config, read_pictures(request) if images is None else images
        )

    @torch.inference_mode()
    def _finish(self, plan: Plan, latents: Tensor) -> list[Image.Image]:
        return [start.finished(self._decode_one(latent), plan) for latent in latents.split(1)]

    def _decode_one(self, latent: Tensor) -> Tensor:
        autoencoder = self.components.autoencoder
        weight = next(autoencoder.parameters())
        raw = autoencoder.denormalize(latent.to(weight.device)).to(weight.dtype)
        pixels = autoencoder.decode(raw)
        check_finite(pixels, "the decoded pixels")
        return pixels[0].float().cpu()

    def _encode(self, pixels: Tensor) -> Tensor:
        autoencoder = self.components.autoencoder
        latent = autoencoder.normalize(
            autoencoder.encode(pixels.to(next(autoencoder.parameters()).device))
        )
        check_finite(latent, "the encoded image")
        return latent.float().to(next(self.components.dit.parameters()).device)

    @torch.inference_mode()
    def _steps(self, plan: Plan) -> Iterator[Step]:
        request: Any = plan.request
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
        denoiser = one_by_one(make_denoiser(self.components, request, times, self._control(plan)))
        if clean is not None and plan.mask is not None:
            denoiser = start.held(denoiser, clean, start.kept(plan.mask, latent))
        for step in run(method.start(latent, times, fresh), denoiser):
            check_finite(step.latent, f"the latent at step {step.index + 1} of {step.count}")
            yield step

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
        device = next(self.components.dit.parameters()).device
        return lambda: draw_noise(shape, generators).to(device)


def load(
    name_or_path: str = "sticker-512",
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """A pipeline with the weights of a preset or a folder; raises as `weights.load.load` does."""
    from sana.weights.load import load as load_components

    return Pipeline(load_components(name_or_path, device=device, dtype=dtype))
