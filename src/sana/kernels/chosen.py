"""Which algorithm of cuBLASLt does a product on an H100 or H200, as `products` reads it.

Rows come from `benchmarks/products.py`, which times all that the library has for a shape, in turn
and without pauses, so that the chip is as warm and as slow as it is in a picture.
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


CHOSEN: Mapping[Shape, Algorithm] = MappingProxyType(
    {
        Shape(1024, 1024, 2048, False): Algorithm(66, 135, 2, 35, 9),
        Shape(1024, 1152, 1152, True): Algorithm(66, 28, 2, 35, 7),
        Shape(1024, 1152, 2880, False): Algorithm(66, 196, 2, 35, 8),
        Shape(1024, 2240, 2240, True): Algorithm(66, 458, 1, 35, 3),
        Shape(1024, 2240, 2240, True, True): Algorithm(66, 20, 3, 36, 9),
        Shape(1024, 2240, 5600, False): Algorithm(66, 184, 6, 35, 5),
        Shape(1024, 2240, 5600, False, True): Algorithm(66, 20, 3, 36, 9),
        Shape(1024, 5760, 1152, True): Algorithm(66, 20, 3, 35, 5),
        Shape(1024, 6720, 2240, False): Algorithm(66, 184, 0, 35, 3),
        Shape(1024, 6720, 2240, False, True): Algorithm(66, 20, 3, 36, 9),
        Shape(1024, 8192, 1024, True): Algorithm(66, 20, 1, 35, 3),
        Shape(1024, 11200, 2240, True): Algorithm(66, 20, 1, 35, 3),
        Shape(1024, 11200, 2240, True, True): Algorithm(66, 20, 3, 36, 5),
        Shape(2048, 1152, 2880, False): Algorithm(66, 184, 6, 35, 5),
        Shape(2048, 2240, 2240, True): Algorithm(66, 458, 1, 35, 3),
        Shape(2048, 2240, 2240, True, True): Algorithm(66, 20, 3, 36, 7),
        Shape(2048, 2240, 5600, False): Algorithm(66, 184, 2, 35, 5),
        Shape(2048, 2240, 5600, False, True): Algorithm(66, 20, 3, 36, 7),
        Shape(2048, 3456, 1152, False): Algorithm(66, 184, 2, 35, 5),
        Shape(2048, 5760, 1152, True): Algorithm(66, 20, 3, 35, 5),
        Shape(2048, 6720, 2240, False): Algorithm(66, 197, 2, 35, 5),
        Shape(2048, 6720, 2240, False, True): Algorithm(66, 20, 1, 36, 3),
        Shape(2048, 11200, 2240, True): Algorithm(66, 20, 1, 35, 3),
        Shape(2048, 11200, 2240, True, True): Algorithm(66, 20, 3, 36, 5),
        Shape(4096, 1024, 2048, False): Algorithm(66, 20, 3, 35, 5),
        Shape(4096, 1024, 4096, False): Algorithm(66, 20, 3, 35, 5),
        Shape(4096, 1152, 1152, True): Algorithm(66, 209, 6, 35, 5),
        Shape(4096, 1152, 2880, False): Algorithm(66, 184, 2, 35, 5),
        Shape(4096, 2240, 2240, True): Algorithm(66, 165, 0, 35, 3),
        Shape(4096, 2240, 5600, False): Algorithm(66, 184, 2, 35, 5),
        Shape(4096, 3456, 1152, False): Algorithm(66, 184, 2, 35, 5),
        Shape(4096, 5760, 1152, True): Algorithm(66, 20, 3, 35, 5),
        Shape(4096, 6720, 2240, False): Algorithm(66, 20, 3, 35, 5),
        Shape(4096, 8192, 1024, True): Algorithm(66, 24, 7, 35, 5),
        Shape(4096, 11200, 2240, True): Algorithm(66, 184, 6, 35, 5),
        Shape(8192, 1152, 1152, True): Algorithm(66, 28, 0, 35, 3),
        Shape(8192, 1152, 2880, False): Algorithm(66, 184, 2, 35, 5),
        Shape(8192, 2240, 2240, True): Algorithm(66, 495, 7, 35, 5),
        Shape(8192, 2240, 5600, False): Algorithm(66, 184, 2, 35, 5),
        Shape(8192, 3456, 1152, False): Algorithm(66, 184, 2, 35, 5),
        Shape(8192, 5760, 1152, True): Algorithm(66, 29, 7, 35, 5),
        Shape(8192, 6720, 2240, False): Algorithm(66, 201, 2, 35, 5),
        Shape(8192, 11200, 2240, True): Algorithm(66, 184, 6, 35, 5),
        Shape(16384, 512, 1024, False): Algorithm(66, 201, 2, 35, 5),
        Shape(16384, 512, 2048, False): Algorithm(66, 20, 1, 35, 3),
        Shape(16384, 1152, 1152, True): Algorithm(66, 20, 3, 35, 5),
        Shape(16384, 1152, 2880, False): Algorithm(66, 184, 2, 35, 5),
        Shape(16384, 2240, 2240, True): Algorithm(66, 24, 7, 35, 5),
        Shape(16384, 2240, 2240, True, True): Algorithm(66, 20, 3, 36, 5),
        Shape(16384, 2240, 5600, False): Algorithm(66, 201, 2, 35, 5),
        Shape(16384, 2240, 5600, False, True): Algorithm(66, 20, 3, 36, 5),
        Shape(16384, 3456, 1152, False): Algorithm(66, 184, 2, 35, 5),
        Shape(16384, 4096, 512, True): Algorithm(66, 29, 5, 35, 3),
        Shape(16384, 5760, 1152, True): Algorithm(66, 23, 6, 35, 5),
        Shape(16384, 6720, 2240, False): Algorithm(66, 197, 2, 35, 5),
        Shape(16384, 6720, 2240, False, True): Algorithm(66, 20, 3, 36, 5),
        Shape(16384, 11200, 2240, True): Algorithm(66, 24, 7, 35, 5),
        Shape(16384, 11200, 2240, True, True): Algorithm(66, 20, 3, 36, 5),
        Shape(32768, 1152, 1152, True): Algorithm(66, 20, 3, 35, 5),
        Shape(32768, 1152, 2880, False): Algorithm(66, 29, 3, 35, 2),
        Shape(32768, 2240, 2240, True): Algorithm(66, 29, 5, 35, 3),
        Shape(32768, 2240, 2240, True, True): Algorithm(66, 20, 3, 36, 5),
        Shape(32768, 2240, 5600, False): Algorithm(66, 29, 1, 35, 3),
        Shape(32768, 3456, 1152, False): Algorithm(66, 29, 3, 35, 2),
        Shape(32768, 5760, 1152, True): Algorithm(66, 209, 4, 35, 3),
        Shape(32768, 6720, 2240, False): Algorithm(66, 197, 2, 35, 5),
        Shape(32768, 6720, 2240, False, True): Algorithm(66, 20, 3, 36, 5),
        Shape(32768, 11200, 2240, True): Algorithm(66, 24, 7, 35, 5),
        Shape(32768, 11200, 2240, True, True): Algorithm(66, 20, 3, 36, 5),
    }
)
"""On GPUs of capability 9.0."""
