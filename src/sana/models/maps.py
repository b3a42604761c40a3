"""What stands between a DC-AE's convolutions: norms, activations and sums of maps (B, C, H, W).

Without gradients they are taken in the map's own memory, and the norm goes through it in pieces.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.config import Activation, NormKind
from sana.kernels import ops

NORM_VALUES = 2**22
"""The fp32 copies inside a norm hold at most this many values where no gradient is wanted."""
ACTIVATIONS: dict[Activation, Callable[..., Tensor]] = {"relu": F.relu, "silu": F.silu}


class ChannelRMSNorm(nn.Module):
    """RMSNorm over the channels of a map, with weight and bias; statistics in fp32."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.numel() <= NORM_VALUES:
            return self._normalize(x)
        out = torch.empty_like(x)
        rows = max(1, NORM_VALUES * x.shape[-2] // x.numel())
        for part, place in zip(x.split(rows, dim=-2), out.split(rows, dim=-2), strict=True):
            place.copy_(self._normalize(part))
        return out

    def activated(self, own: Tensor, activation: Activation) -> Tensor:
        """The activation of the norm, in own's memory where no gradient needs it."""
        weight, bias = self.weight, self.bias
        rows = own.permute(0, 2, 3, 1)
        if ops.rms_norm_(rows, weight, bias, eps=self.eps, activation=activation):
            return own
        return activate(ACTIVATIONS[activation], self(own))

    def _normalize(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + self.eps)
        return (wide * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def make_norm(kind: NormKind, dim: int) -> nn.Module:
    """The norm at the end of a branch."""
    return nn.BatchNorm2d(dim) if kind == "batch" else ChannelRMSNorm(dim)


def add(own: Tensor, other: Tensor) -> Tensor:
    """own + other, in own's memory where no gradient needs it; the caller gives `own` away."""
    return own + other if torch.is_grad_enabled() else own.add_(other)


def activate(activation: Callable[..., Tensor], own: Tensor) -> Tensor:
    """The activation of `own`, in its memory where no gradient needs it."""
    return activation(own, inplace=not torch.is_grad_enabled())


def convolve(conv: nn.Conv2d, x: Tensor, activation: Activation) -> Tensor:
    """act(conv(x)); on a GPU cuDNN would add the bias in a pass of its own."""
    # Under autocast a bias in fp32 fits no result in bf16, and the convolution would be done twice.
    fits = conv.bias is not None and conv.bias.dtype == x.dtype
    if fits and ops.is_inference(x, conv.weight) and ops.uses_triton(x):
        assert conv.bias is not None
        bare = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
        if ops.bias_act_(bare.permute(0, 2, 3, 1), conv.bias, activation):
            return bare
    return activate(ACTIVATIONS[activation], conv(x))


def normed_sum(norm: nn.Module, own: Tensor, residual: Tensor) -> Tensor:
    """norm(own) + residual, in own's memory where no gradient needs it."""
    if isinstance(norm, ChannelRMSNorm):
        rows, others = own.permute(0, 2, 3, 1), residual.permute(0, 2, 3, 1)
        if ops.rms_norm_(rows, norm.weight, norm.bias, others, eps=norm.eps):
            return own
    return add(norm(own), residual)
