"""Products in fewer bits than what stands between them: weights in bf16 or fp8, inputs rounded too.

Only the linear layers and convolutions of a transformer's blocks and of a decoder's stages: each
sums in fp32 and rounds its result once. Norms, linear attention's sums, residuals of the
transformer, embeddings, stem and head keep their own precision. In fp8 (e4m3) a weight has a scale
for each output channel and an input one for each token, and only the six large products of a
transformer's inner blocks are in it. Start reading at `narrow`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from sana.config import DiTConfig
from sana.kernels import ops, products, reference
from sana.kernels.reference import FP8, Rows

PARTS = ("blocks.", "decoder.stages.")
"""Where a network has products that may be narrow; a LinearDiT's and a DCAE's."""


SCALED = (
    "attention.qkv",
    "attention.output",
    "cross_attention.query",
    "cross_attention.output",
    "feed_forward.expand",
    "feed_forward.project",
)
"""The products of a transformer's block that may be in fp8: those of all image tokens."""


class Mixed(NamedTuple):
    """A network's dtype, and the narrower one of its products."""

    whole: torch.dtype
    products: torch.dtype


Dtype: TypeAlias = torch.dtype | Mixed


class Product(nn.Linear):
    """A linear layer that rounds its input where its weights are narrower."""

    def forward(self, x: Tensor) -> Tensor:
        x = rounded(x, self.weight.dtype)
        made = products.product(x, self.weight, self.bias)
        return super().forward(x) if made is None else made

    def into(self, x: Tensor, out: Tensor) -> None:
        """Writes the result for x (B, N, K) into `out` (B, N, M), contiguous; not for autograd."""
        if not products.into(x, self.weight, self.bias, out):
            torch.addmm(self.bias, x.flatten(0, 1), self.weight.mT, out=out.flatten(0, 1))


class Scaled(Product):
    """A linear layer in fp8: weight (N, K) with a scale (1, N), and a scale for each row of x."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Takes over the bias; what `linear` computes in stays the dtype of results."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.whole = linear.weight.dtype
        weight, scale = scaled_weight(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor | Rows) -> Tensor:
        """(..., K) -> (..., N); rows that something before has scaled are taken as they are."""
        values = x.values if isinstance(x, Rows) else x
        out = torch.empty(
            (*values.shape[:-1], self.out_features), dtype=self.whole, device=values.device
        )
        self.into(x, out)
        return out

    def into(self, x: Tensor | Rows, out: Tensor) -> None:
        """Writes the result into `out`, contiguous."""
        rows = x if isinstance(x, Rows) else ops.scaled_rows(x)
        scales = (self.scale, rows.scale)
        if not products.scaled_into(rows.values, self.weight, scales, self.bias, out):
            ops.scaled_product(rows, self.weight, self.scale, self.bias, out)


def scaled_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) in fp8, and its scale (1, N), as `Scaled` has them."""
    rows = reference.scaled_rows(weight)
    return rows.values, rows.scale.t().contiguous()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype` if that is narrower, else as it is."""
    return x.to(dtype) if dtype.itemsize < x.dtype.itemsize else x


def both(dtype: Dtype) -> Mixed:
    """One dtype for all of a network is the same for its products."""
    return dtype if isinstance(dtype, Mixed) else Mixed(dtype, dtype)


def narrow(network: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of `network`'s products to `dtype`, in place; for fp8 see `Scaled`."""
    if dtype == FP8:
        for name, linear in _scaled(network):
            network.set_submodule(name, Scaled(linear))
        return
    for _, module in _products(network):
        module.to(dtype)


def narrow_names(network: nn.Module, dtype: torch.dtype) -> set[str]:
    """The parameters that `narrow` rounds to `dtype`."""
    if dtype == FP8:
        return {f"{name}.weight" for name, _ in _scaled(network)}
    return {
        f"{name}.{parameter}"
        for name, module in _products(network)
        for parameter, _ in module.named_parameters(recurse=False)
    }


def beside(dtype: Dtype) -> Dtype:
    """Of a network that goes with a transformer in `dtype`; fp8 is the transformer's alone."""
    return dtype.whole if isinstance(dtype, Mixed) and dtype.products == FP8 else dtype


def product_dtype(network: nn.Module) -> torch.dtype:
    """What `network`'s linear layers and convolutions have their weights in."""
    weights = (m.weight for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return next(weights).dtype


def _products(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.startswith(PARTS):
            yield name, module


def _scaled(network: nn.Module) -> list[tuple[str, nn.Linear]]:
    config = network.config
    assert isinstance(config, DiTConfig), "only a transformer has products in fp8"
    names = [f"blocks.{index}.{part}" for index in config.inner_blocks for part in SCALED]
    linears = [network.get_submodule(name) for name in names]
    return [(n, x) for n, x in zip(names, linears, strict=True) if isinstance(x, nn.Linear)]
