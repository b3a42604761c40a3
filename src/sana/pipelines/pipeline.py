"""A request's way through a model: text, noise, steps, picture. One class for every task.

`steps` yields after each evaluation of the network, so a caller can show progress or stop by not
pulling; `generate` pulls them all and decodes. A pipeline holds weights and nothing that a call
changes: the same request gives the same pixels, whatever was drawn before or beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sana.errors import NumericsError, RequestError
from sana.pipelines.images import to_pil
from sana.samplers import METHODS, Denoiser, Step, Text, guided, one_by_one, run

if TYPE_CHECKING:
    from sana.request import Request
    from sana.weights.load import Components

SIDE_LEAST = 64


class Pipeline:
    """Text to image with one set of weights; build it with `sana.load`."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self.config = components.config
        components.dit.eval()
        components.autoencoder.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def resolve(self, request: Request) -> Request:
        """The request with the model's defaults filled in; raises `RequestError`."""
        sampling = self.config.sampling
        defaults = {
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "sampler": sampling.sampler,
            "shift": sampling.shift,
            "width": self.config.pixels,
            "height": self.config.pixels,
        }
        missing = {k: value for k, value in defaults.items() if getattr(request, k) is None}
        full = request.replace(**missing) if missing else request
        for name in ("width", "height"):
            self._check_side(name, getattr(full, name))
        return full

    def steps(self, request: Request) -> Iterator[Step]:
        """Yield a `Step` for each evaluation; its latents [B,C,h,w] hold all the pictures.

        Raises `RequestError` at once, and `NumericsError` when NaN appears.
        """
        return self._steps(self.resolve(request))

    def generate(self, request: Request) -> list[Image.Image]:
        """The pictures of `request`, one for each of `request.image_seeds`."""
        latent = None
        for step in self.steps(request):
            latent = step.latent
        assert latent is not None, "a schedule has at least one step"
        return self.decode(latent)

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
        return [self._decode_one(latent) for latent in latents.split(1)]

    def _decode_one(self, latent: Tensor) -> Image.Image:
        autoencoder = self.components.autoencoder
        weight = next(autoencoder.parameters())
        raw = autoencoder.denormalize(latent.to(weight.device)).to(weight.dtype)
        pixels = autoencoder.decode(raw)
        _check_finite(pixels, "the decoded pixels")
        return to_pil(pixels[0])

    @torch.inference_mode()
    def _steps(self, request: Any) -> Iterator[Step]:
        method = METHODS[request.sampler]
        sampler = method.start(self._noise(request), method.times(request.steps, request.shift))
        for step in run(sampler, one_by_one(self._denoiser(request))):
            _check_finite(step.latent, f"the latent at step {step.index + 1} of {step.count}")
            yield step

    def _denoiser(self, request: Any) -> Denoiser:
        whole = METHODS[request.sampler].takes_integer_times and self.config.sampling.integer_times
        return guided(
            self.components.dit.denoise,
            self._embed(request.prompt, "the prompt"),
            None
            if request.guidance == 1
            else self._embed(request.negative_prompt, "the negative one"),
            request.guidance,
            integer_times=whole,
        )

    def _embed(self, prompt: str, what: str) -> Text:
        dit = self.components.dit
        weight = next(dit.parameters())
        encoded = self.components.text.encode([prompt])
        mask = encoded.mask.to(weight.device)
        states = dit.embed_text(encoded.states.to(weight.device, weight.dtype), mask)
        _check_finite(states, f"the text states of {what}")
        return Text(states=states, mask=mask)

    def _noise(self, request: Any) -> Tensor:
        """Noise [B,C,h,w], each picture's from its own seed, on the CPU in fp32."""
        factor, channels = self.config.autoencoder.factor, self.config.dit.latent_channels
        shape = (channels, request.height // factor, request.width // factor)
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for seed in request.image_seeds
        ]
        return torch.stack(noise).to(next(self.components.dit.parameters()).device)

    def _check_side(self, name: str, side: int) -> None:
        factor = self.config.autoencoder.factor * self.config.dit.patch_size
        if side % factor or not SIDE_LEAST <= side <= self.config.max_pixels:
            raise RequestError(
                f"{name} is {side}; {self.config.name} takes multiples of {factor} from "
                f"{SIDE_LEAST} to {self.config.max_pixels}, best {self.config.pixels}"
            )


def load(
    name_or_path: str = "sticker-512",
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """A pipeline with the weights of a preset or a folder; raises as `weights.load.load` does."""
    from sana.weights.load import load as load_components

    return Pipeline(load_components(name_or_path, device=device, dtype=dtype))


def _check_finite(tensor: Tensor, stage: str) -> None:
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = tensor.numel() - int(finite.sum())
        raise NumericsError(
            f"{bad} of {tensor.numel()} values in {stage} are NaN or infinite; every stage must "
            "stay finite, so check the weight file, or use dtype float32"
        )
