"""Where a picture starts and what it must keep to: noise, an image, a mask, a size.

Image to image starts part of the way (SDEdit, arXiv 2108.01073), at `samplers.first_step`.
Inpainting holds the latent outside the mask to the image's at every step
(blended latents, arXiv 2206.02779), here by giving it the velocity that leads there, which any
sampler follows. Start reading at `plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from sana.errors import RequestError
from sana.pipelines.bins import nearest_bin
from sana.pipelines.defaults import SIDE_LEAST, Size, complete, step_of
from sana.pipelines.images import to_pil, to_tensor
from sana.pipelines.reading import named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sana.config import ModelConfig
    from sana.request import Request
    from sana.samplers import Denoiser


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A request with every default filled in, its pictures at the size asked, the size drawn."""

    request: Request
    drawn: Size
    image: Image.Image | None = None
    mask: Image.Image | None = None
    control: Image.Image | None = None

    @property
    def asked(self) -> Size:
        assert self.request.height is not None and self.request.width is not None
        return self.request.height, self.request.width


def plan(request: Request, config: ModelConfig, images: Mapping[str, Image.Image]) -> Plan:
    """Fill in the model's defaults and fit the pictures; raises `RequestError`.

    Without a size, a picture has the model's; with an image or a control, that one's shape at the
    model's area; with a mask, the image's very size, so that what is kept is kept exactly.
    """
    image, mask, control = (named(images, request, role) for role in ("image", "mask", "control"))
    if image is not None and mask is not None:
        mask = _same_size(mask, image)
    lead = image or control
    size = _size(request, config, lead, is_exact=mask is not None)
    full = complete(request, config, size)
    drawn = nearest_bin(*size, config.pixels, step_of(config)) if full.binning else size
    fitted = [p and ImageOps.fit(p, size[::-1], _filter(p)) for p in (image, mask, control)]
    return Plan(
        request=full,
        drawn=_checked(drawn, config),
        image=fitted[0],
        mask=fitted[1],
        control=fitted[2],
    )


def drawn_tensor(image: Image.Image, size: Size) -> Tensor:
    """Pixels [1,3,H,W] in -1..1 of a picture, stretched to the size that is drawn."""
    if image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    return to_tensor(image)


def kept(mask: Image.Image, like: Tensor) -> Tensor:
    """Bool [1,1,h,w], true for cells of a latent [B,C,h,w] with no white pixel of `mask` in them.

    It is on the latent's device.
    """
    cells = F.adaptive_max_pool2d(to_tensor(mask), (like.shape[-2], like.shape[-1]))
    return (cells == 0).to(like.device)


def held(denoiser: Denoiser, clean: Tensor, keep: Tensor) -> Denoiser:
    """The same denoiser, but `keep` cells move straight towards `clean`: v = (x - clean) / t."""

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        straight = (latents - clean) / times[:, None, None, None].to(latents.device)
        return torch.where(keep, straight, denoiser(latents, times))

    return denoise


def is_plain(plan: Plan) -> bool:
    """Whether the picture asked for is the one drawn, neither resized nor joined to an image."""
    return plan.drawn == plan.asked and plan.mask is None


def finished(pixels: Tensor, plan: Plan) -> Image.Image:
    """The picture asked for, of pixels [3,H,W] as drawn; outside the mask it is the image's."""
    picture = to_pil(_resized(pixels, plan))
    if plan.mask is None or plan.image is None:
        return picture
    weight = _feathered(to_tensor(plan.mask), plan.request.feather or 0)[0]
    mixed = torch.lerp(to_tensor(plan.image)[0], to_tensor(picture)[0], weight)
    return Image.composite(to_pil(mixed), plan.image, plan.mask)


def _same_size(mask: Image.Image, image: Image.Image) -> Image.Image:
    """The mask at the image's size; refused if its shape is another, or if nothing is white."""
    if mask.getextrema() == (0, 0):
        raise RequestError(
            "the mask is black everywhere; white is where the image is drawn anew, so paint some "
            "of it white, or invert it"
        )
    if mask.size == image.size:
        return mask
    width, height = image.size
    if abs(mask.height * width / mask.width - height) > 1:
        raise RequestError(
            f"the mask is {mask.width} x {mask.height} and the image {width} x {height}; a mask of "
            "another size is resized only if it has the image's shape, so make them alike"
        )
    return mask.resize(image.size, Image.Resampling.NEAREST)


def _size(
    request: Request, config: ModelConfig, lead: Image.Image | None, *, is_exact: bool
) -> Size:
    if request.height is not None and request.width is not None:
        return request.height, request.width
    if lead is None:
        return request.height or config.pixels, request.width or config.pixels
    ratio = lead.height / lead.width
    if request.width is not None:
        return _round(request.width * ratio, config), request.width
    if request.height is not None:
        return request.height, _round(request.height / ratio, config)
    if is_exact:
        return lead.height, lead.width
    side = config.pixels
    return _round(side * ratio**0.5, config), _round(side * ratio**-0.5, config)


def _round(side: float, config: ModelConfig) -> int:
    step = step_of(config)
    return min(max(round(side / step) * step, SIDE_LEAST), config.max_pixels)


def _checked(drawn: Size, config: ModelConfig) -> Size:
    step = step_of(config)
    if any(side % step for side in drawn) or max(drawn) > config.max_pixels:
        raise RequestError(
            f"the picture would be drawn at {drawn[1]} x {drawn[0]}; {config.name} draws multiples "
            f"of {step} up to {config.max_pixels}, so ask for another size"
        )
    return drawn


def _filter(image: Image.Image) -> Image.Resampling:
    return Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS


def _resized(pixels: Tensor, plan: Plan) -> Tensor:
    """From the size drawn to the size asked.

    A picture from text alone covers the size asked and is centre-cropped, as in the peer; one that
    follows an image is stretched back as that image was stretched, so that they lie on each other.
    """
    height, width = plan.asked
    if pixels.shape[-2:] == (height, width):
        return pixels
    target = (height, width)
    if plan.image is None and plan.control is None:
        ratio = max(height / pixels.shape[-2], width / pixels.shape[-1])
        covering = (int(side * ratio) for side in pixels.shape[-2:])
        target = (max(height, next(covering)), max(width, next(covering)))
    resized = F.interpolate(pixels[None].float(), size=target, mode="bilinear")[0]
    top, left = (target[0] - height) // 2, (target[1] - width) // 2
    return resized[:, top : top + height, left : left + width]


def _feathered(mask: Tensor, feather: int) -> Tensor:
    """Weight of the new picture: 0 outside the white part, rising to 1 `feather` pixels inside."""
    total, inner = mask, mask
    for _ in range(feather):
        inner = -F.max_pool2d(-inner, 3, stride=1, padding=1)
        total = total + inner
    return total / (feather + 1)
