"""In which order the programs of a kernel take samples and tokens.

A matrix product leaves what it wrote last in the cache: with LAST_FIRST the kernel behind it begins
there, and its own last results are what the next product reads first.
"""

from __future__ import annotations

import triton
import triton.language as tl

LAST_FIRST = 0


@triton.jit
def place(AXIS: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Of this program along an axis of the grid."""
    own = tl.program_id(AXIS)
    if LAST_FIRST:
        own = tl.num_programs(AXIS) - 1 - own
    return own
