"""Which algorithm of cuBLASLt does a product on an H100 or H200, as `products` reads it.

Rows come from `benchmarks/products.py`, which times all that the library has for a shape, in turn
and without pauses, so that the chip is at its power limit as it is in a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Shape(NamedTuple):
    """One product: (rows, values) times (values, results), plus perhaps a bias."""

    rows: int
    results: int
    values: int
    has_bias: bool
    in_fp8: bool = False


class Algorithm(NamedTuple):
    """One of cuBLASLt's, by its own numbers for its parts."""

    family: int
    tile: int
    custom: int
    stages: int
    cluster: int


CHOSEN: Mapping[Shape, Algorithm] = MappingProxyType({})
"""On GPUs of capability 9.0."""
