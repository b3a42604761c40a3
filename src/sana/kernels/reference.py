"""The definition of correct for every kernel: plain PyTorch, written to be read.

ReLU linear attention of Sana (eq. 2 of the paper) in O(N) and in its quadratic form. Shape letters:
B batch, H heads, N tokens, D head width.

Precision: sums over tokens run in fp32 (fp64 for fp64 inputs) whatever autocast says, because the
denominator is a sum of N non-negative terms and bf16 loses its small ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
    """sum_j relu(q_i).relu(k_j) v_j / (sum_j relu(q_i).relu(k_j) + eps), in O(N) time and memory.

    q, k, v are (B, H, N, D), and so is the result, in v's dtype. The peer appends a row of ones to
    v for the denominator; here it is a product with the summed keys, so that matrices stay D wide.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(_autocast_kind(q), enabled=False):
        query, key, value = q.to(dtype).relu(), k.to(dtype).relu(), v.to(dtype)
        state = key.transpose(-1, -2) @ value  # (B, H, D, D)
        denominator = (query * key.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True)
        return ((query @ state) / (denominator + eps)).to(v.dtype)


def quadratic_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
    """The same function by way of the (N, N) scores: cheaper when N is no larger than D."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(_autocast_kind(q), enabled=False):
        scores = q.to(dtype).relu() @ k.to(dtype).relu().transpose(-1, -2)  # (B, H, N, N)
        weights = scores / (scores.sum(dim=-1, keepdim=True) + eps)
        return (weights @ v.to(dtype)).to(v.dtype)


def _autocast_kind(x: Tensor) -> str:
    """The device type that autocast knows x by; it refuses `meta`, where nothing is computed."""
    return "cpu" if x.is_meta else x.device.type
