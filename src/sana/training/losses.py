"""Losses and noise schedules of training, as pure functions with the equation each one implements.

Time t is in 0..1 with 1 = pure noise. Images are in -1..1. Nothing here holds state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MODE_SCALE = 1.29
"""The scale of mode sampling that Stable Diffusion 3 found best."""


def draw_times(
    kind: str, count: int, *, shift: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Training times (count,) in 0..1: "logit-normal", "uniform" or "mode", then shifted."""
    if kind == "logit-normal":
        return logit_normal_times(count, shift=shift, generator=generator, device=device)
    uniform = torch.rand(count, generator=generator, device=device, dtype=torch.float32)
    times = mode_times(uniform) if kind == "mode" else uniform
    return shift * times / (1 + (shift - 1) * times)


def mode_times(uniform: Tensor, scale: float = MODE_SCALE) -> Tensor:
    """f(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u), dense in the middle (SD3, eq. 20)."""
    return 1 - uniform - scale * ((math.pi / 2 * uniform).cos().square() - 1 + uniform)


def logit_normal_times(
    count: int, *, shift: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Times t with logit(t) ~ N(ln shift, 1) (Stable Diffusion 3, eq. 19; shift as eq. 23).

    Shifting uniform-logit times by t' = s t / (1 + (s - 1) t) adds ln s to their logit.
    """
    normal = torch.randn(count, generator=generator, device=device, dtype=torch.float32)
    return torch.sigmoid(normal + math.log(shift))


def add_noise(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t noise (rectified flow; Sana, section 2.4); time has shape (B,)."""
    t = time.view(-1, *[1] * (clean.dim() - 1))
    return (1 - t) * clean + t * noise


def flow_velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """dx_t/dt = noise - x_0, what the network learns to predict."""
    return noise - clean


def as_seen(rebuilt: Tensor) -> Tensor:
    """Pictures as a file would hold them, clamped to -1..1; the gradient passes unchanged.

    Where a picture is as bright as can be, going beyond is then no error, and costs a network
    nothing; where it is not, a value beyond is still called back.
    """
    return rebuilt + (rebuilt.clamp(-1, 1) - rebuilt).detach()


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))] (Lim and Ye 2017, eq. 8)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-E[D(fake)], the generator's side of the hinge loss."""
    return -fake.mean()
