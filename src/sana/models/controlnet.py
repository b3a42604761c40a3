"""ControlNet: a copy of a Sana model's stem and first blocks that steers it by a control latent.

Attributes: the stem's (see `dit`), `control_input`, `blocks[i]`, `outputs[i]`. The two public
implementations use the same weights in different ways (family-spec section 2), and `reference`
chooses. "nvidia", as trained: copy 0 starts from the result of the base's block 0 plus the control,
and copy i's output is added to what enters the base's block i + 1. "diffusers": copy 0 starts from
the noisy latent plus the control, and each output is added one block later.

Shape letters: B batch, N image tokens, T text tokens, C latent channels, D width, h w token grid.
Start reading at `ControlNet.residuals`; `controlled` joins it with its base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sana.config import ControlNetConfig, Reference
from sana.errors import RequestError
from sana.models.dit import Block, LinearDiT, Moment, Prepared, Residuals, Stem


class ControlledMoment(NamedTuple):
    """A time for `Controlled`: whether the ControlNet acts then, and what both make of it."""

    is_active: bool
    base: Moment
    own: Moment


class ControlNet(Stem):
    """A trainable copy whose outputs are added to the base's tokens, block by block."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.dit)
        self.control = config
        dim = config.dit.width
        self.control_input = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(config.dit) for _ in range(config.depth))
        self.outputs = nn.ModuleList(nn.Linear(dim, dim) for _ in range(config.depth))
        self.initialize()
        for linear in (self.control_input, *self.outputs):
            nn.init.zeros_(linear.weight)

    def residuals(
        self,
        latent: Tensor,
        time: Tensor | Moment,
        embedded: Tensor | Prepared,
        mask: Tensor | None,
        *,
        control: Tensor,
        scale: float = 1.0,
        reference: Reference = "nvidia",
    ) -> Residuals:
        """What `LinearDiT.denoise` adds after its blocks; arguments as there.

        control (B, C, H, W) is the control picture's normalized latent; embedded comes from this
        network's own `embed_text` or `prepare`.
        """
        hint = self.control_input(self.embed_latent(control))  # (B, h, w, D)
        modulation = (time if isinstance(time, Moment) else self.embed_time(time, None)).modulation
        texts, bias = self.block_texts(embedded, mask)

        def run(x: Tensor) -> Iterator[Tensor]:
            for block, output, text in zip(self.blocks, self.outputs, texts, strict=True):
                x = block(x, text, modulation, bias, hint.shape[1:3])
                yield scale * output(x)

        if reference == "nvidia":
            return _following(run, hint.flatten(1, 2))
        return _beside(run((self.embed_latent(latent) + hint).flatten(1, 2)), len(self.blocks))


def _following(run: Callable[[Tensor], Iterator[Tensor]], hint: Tensor) -> Residuals:
    """NVIDIA's wiring: starts from the base's tokens after block 0, and adds at once."""
    outputs: Iterator[Tensor] = iter(())

    def add(done: int, x: Tensor) -> Tensor:
        nonlocal outputs
        if done == 1:
            outputs = run(x + hint)
        residual = next(outputs, None)
        return x if residual is None else x + residual

    return add


def _beside(outputs: Iterator[Tensor], count: int) -> Residuals:
    """diffusers' wiring: runs on its own, and the base's block 0 gets nothing."""
    return lambda done, x: x + next(outputs) if 2 <= done < 2 + count else x


class Controlled:
    """A base and its ControlNet as one network for the samplers.

    Its text states are the base's and the ControlNet's embeddings side by side, (B, T, 2 D), so
    that each is computed once for all steps; `embed_text` makes them.
    """

    def __init__(
        self,
        base: LinearDiT,
        controlnet: ControlNet,
        control: Tensor,
        *,
        scale: float = 1.0,
        reference: Reference = "nvidia",
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """control (1 or B, C, H, W); outside `interval` of times the base runs alone.

        Raises `RequestError` if the two networks do not belong together.
        """
        check_fit(base, controlnet)
        self.base, self.controlnet, self.control = base, controlnet, control
        self.scale, self.reference, self.interval = scale, reference, interval

    def embed_text(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """Text states (B, T, text_dim) -> (B, T, 2 D)."""
        both = (self.base.embed_text(text, mask), self.controlnet.embed_text(text, mask))
        return torch.cat(both, dim=-1)

    def prepare(self, states: Tensor, mask: Tensor | None) -> tuple[Prepared, Prepared]:
        """What the base and the ControlNet make of `embed_text`'s result, for all steps."""
        embedded, own = (part.contiguous() for part in states.chunk(2, dim=-1))
        return self.base.prepare(embedded, mask), self.controlnet.prepare(own, mask)

    def embed_times(self, times: Tensor, guidance: float | None) -> dict[float, ControlledMoment]:
        """See `Stem.embed_times`."""
        mine = self.controlnet.embed_times(times, None)
        active = dict(zip(times.tolist(), self._acts(times).tolist(), strict=True))
        return {
            time: ControlledMoment(active[time], base, mine[time])
            for time, base in self.base.embed_times(times, guidance).items()
        }

    def __call__(
        self,
        latent: Tensor,
        time: Tensor | ControlledMoment,
        states: Tensor | tuple[Prepared, Prepared],
        mask: Tensor,
        /,
        **options: Any,
    ) -> Tensor:
        """Velocity, as `LinearDiT.denoise` gives it; `options` are passed on."""
        embedded: Tensor | Prepared
        own: Tensor | Prepared
        if isinstance(states, Tensor):
            embedded, own = (part.contiguous() for part in states.chunk(2, dim=-1))
        else:
            embedded, own = states
        told: Tensor | Moment
        steering: Tensor | Moment
        if isinstance(time, ControlledMoment):
            is_active, told, steering = None, time.base, time.own
            is_alone = not time.is_active
        else:
            is_active, told, steering = self._is_active(time), time, time
            is_alone = is_active is not None and not bool(is_active.any())
        if is_alone:
            return self.base.denoise(latent, told, embedded, mask, **options)
        control = self.control.repeat(len(latent) // len(self.control), 1, 1, 1)
        residuals = self.controlnet.residuals(
            latent,
            steering,
            own,
            mask,
            control=control,
            scale=self.scale,
            reference=self.reference,
        )
        if is_active is not None:
            residuals = _where(is_active.to(latent.device), residuals)
        return self.base.denoise(latent, told, embedded, mask, residuals=residuals, **options)

    def _is_active(self, time: Tensor) -> Tensor | None:
        """(B, 1, 1), or None when every time is; that costs no look at the device."""
        if self.interval[0] <= 0 and self.interval[1] >= 1:
            return None
        return self._acts(time)[:, None, None]

    def _acts(self, time: Tensor) -> Tensor:
        low, high = self.interval
        return (time >= low) & (time <= high)


def _where(is_active: Tensor, residuals: Residuals) -> Residuals:
    return lambda done, x: torch.where(is_active, residuals(done, x), x)


def check_fit(base: LinearDiT, controlnet: ControlNet) -> None:
    """`RequestError` unless the ControlNet was made for a network like `base`."""
    mine, its = controlnet.config, base.config
    for name in ("width", "text_dim", "latent_channels", "patch_size", "position_scale"):
        wanted, got = getattr(its, name), getattr(mine, name)
        if wanted != got:
            raise RequestError(
                f"the ControlNet's {name} is {got} and the base's is {wanted}; a ControlNet only "
                "fits the model that it was trained with: load that one"
            )
    if controlnet.control.depth >= its.depth:
        raise RequestError(
            f"the ControlNet has {controlnet.control.depth} blocks and the base {its.depth}; the "
            "base must have more: load the model that the ControlNet was trained with"
        )
