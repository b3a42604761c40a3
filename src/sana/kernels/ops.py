"""The ops that networks call, and the one rule for who computes them: Triton or plain PyTorch.

Triton takes tensors on GPUs of compute capability 8 or newer, of shapes and dtypes that its kernels
know, where triton is installed; `reference` takes everything else and defines what is correct.
Tests and comparisons choose with `force`. Start reading at `uses_triton`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from sana.kernels import reference

OLDEST = 8
"""Compute capability: older GPUs lack the tf32 and bf16 products that the kernels use."""

Backend = Literal["auto", "triton", "reference"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
# The one mutable state of this package, changed by `force` alone; torch.compile cannot trace a
# ContextVar.
_chosen: dict[str, Backend] = {"backend": "auto"}


@contextlib.contextmanager
def force(backend: Backend) -> Iterator[None]:
    """Inside, every op is computed by `backend`; "triton" on a CPU needs triton's interpreter."""
    before = _chosen["backend"]
    _chosen["backend"] = backend
    try:
        yield
    finally:
        _chosen["backend"] = before


def uses_triton(x: Tensor) -> bool:
    """Whether Triton kernels are wanted for x; each op also asks whether they know its shapes."""
    backend = _chosen["backend"]
    if backend != "auto":
        return backend == "triton"
    return HAS_TRITON and x.is_cuda and torch.cuda.get_device_properties(x.device).major >= OLDEST


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
    """See `reference.linear_attention`."""
    if uses_triton(q):
        from sana.kernels import linear_attention as fast

        if fast.supports(q, k, v):
            out: Tensor = fast.linear_attention(q, k, v, eps)[0]
            return out
    return reference.linear_attention(q, k, v, eps=eps)
