"""Products in fewer bits than what stands between them: bf16 weights, and inputs rounded to them.

Only the linear layers and convolutions of a transformer's blocks and of a decoder's stages: each
sums in fp32 and rounds its result once. Norms, linear attention's sums, residuals of the
transformer, embeddings, stem and head keep their own precision. Start reading at `narrow`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

PARTS = ("blocks.", "decoder.stages.")
"""Where a network has products that may be narrow; a LinearDiT's and a DCAE's."""


class Mixed(NamedTuple):
    """A network's dtype, and the narrower one of its products."""

    whole: torch.dtype
    products: torch.dtype


Dtype: TypeAlias = torch.dtype | Mixed


class Product(nn.Linear):
    """A linear layer that rounds its input where its weights are narrower."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(rounded(x, self.weight.dtype))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype` if that is narrower, else as it is."""
    return x.to(dtype) if dtype.itemsize < x.dtype.itemsize else x


def both(dtype: Dtype) -> Mixed:
    """One dtype for all of a network is the same for its products."""
    return dtype if isinstance(dtype, Mixed) else Mixed(dtype, dtype)


def narrow(network: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of `network`'s products to `dtype`, in place."""
    for _, module in _products(network):
        module.to(dtype)


def narrow_names(network: nn.Module) -> set[str]:
    """The parameters that `narrow` rounds."""
    return {
        f"{name}.{parameter}"
        for name, module in _products(network)
        for parameter, _ in module.named_parameters(recurse=False)
    }


def product_dtype(network: nn.Module) -> torch.dtype:
    """What `network`'s linear layers and convolutions have their weights in."""
    weights = (m.weight for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return next(weights).dtype


def _products(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.startswith(PARTS):
            yield name, module
