"""The end of the DC-AE's decoder (arXiv 2410.10733) in two passes, forward only.

RMSNorm over a cell's channels, activation, and a 3x3 convolution to three: first the product of
each cell with all 27 weights that it meets, then for each pixel the sum over its nine neighbors. So
the map is read once, and nothing as wide is written. The norm is fp32 and rounded once, as that of
`norms`; its products with the weights, which are as wide as the map, stay fp32 until they are
summed. They are kept in planes, one for each tap of each output, whose reads and writes are dense.

Shape letters: B batch, H W grid, C channels, M cells of a band, Z cells that a plane has room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op
from sana.kernels.linear_attention import exact_products
from sana.kernels.norms import _activate

OUT = 3
PLANES = 9 * OUT
WIDEST = 256
"""Channels that one program holds."""
ROWS = 64
"""Cells of a step, of which a program does STEPS with the same weights."""
STEPS = 4
NUM_WARPS = 4
NUM_STAGES = 2
TILE = 2**13
"""Values of a step in 16 bits."""
PIXELS = 256
"""Of a program of the second pass."""
BAND_VALUES = 2**27
"""The planes of a band of rows hold at most so many values, if three rows fit."""


@triton.jit
def _multiply(
    x_ptr, norm_ptr, shift_ptr, weight_ptr, z_ptr, M, Z, eps, sO, sC, sY, sX,
    C: tl.constexpr, KIND: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """z of STEPS times ROWS cells; plane 3 t + o is tap t of output o, and the last 5 are none."""
    c = tl.arange(0, BLOCK)
    n = tl.arange(0, 32)
    tap, out = n // 3, n % 3
    place = out * sO + tap // 3 * sY + tap % 3 * sX
    is_tap = (c < C)[:, None] & (n < 27)[None, :]
    weight = tl.load(weight_ptr + c[:, None] * sC + place[None, :], mask=is_tap, other=0.0)
    norm = tl.load(norm_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    start = tl.program_id(0) * (STEPS * ROWS)
    row = tl.arange(0, ROWS)
    x_ptr += start.to(tl.int64) * C
    x_at = row[:, None] * C + c[None, :]
    for step in tl.range(0, STEPS, num_stages=NUM_STAGES):
        m = start + step * ROWS + row
        inside = (m < M)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
        rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
        x = _activate(x * rstd[:, None] * norm[None, :] + shift[None, :], KIND)
        z = tl.dot(x.to(weight.dtype), weight, input_precision=EXACT)
        z_at = n[None, :] * Z + m[:, None]
        tl.store(z_ptr + z_at, z, mask=(m < M)[:, None] & (n < 27)[None, :])
        x_ptr += ROWS * C


@triton.jit
def _sum_neighbors(
    z_ptr, bias_ptr, out_ptr, M, H, W, Z, START, BEFORE, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of a band that begins at row START of all samples' and has BEFORE rows more."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = m % W
    row = (START + m // W) % H
    for out in tl.static_range(3):
        total = tl.zeros((BLOCK,), tl.float32)
        for y in tl.static_range(3):
            for x in tl.static_range(3):
                inside = (row + y > 0) & (row + y <= H) & (column + x > 0) & (column + x <= W)
                plane = 3 * (3 * y + x) + out
                at = plane * Z + m + (BEFORE + y - 1) * W + x - 1
                total += tl.load(z_ptr + at, mask=inside & (m < M), other=0.0)
        total += tl.load(bias_ptr + out).to(tl.float32)
        tl.store(out_ptr + m * 3 + out, total.to(out_ptr.dtype.element_ty), mask=m < M)


def supports(x: Tensor, norm: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the kernels take the inputs: one dtype of at most 32 bits, 3x3 taps to three."""
    C = x.shape[-1]
    alike = all(part.dtype == x.dtype for part in (norm, shift, weight, bias))
    fits = x.is_contiguous() and C <= WIDEST and weight.shape == (OUT, C, 3, 3)
    return alike and fits and x.is_floating_point() and x.dtype.itemsize <= 4


@op("make_pixels")
def make_pixels(
    x: Tensor, norm: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, kind: int
) -> Tensor:
    """3x3 convolution of act(x / rms(x) * norm + shift), x (B, H, W, C), dense -> (B, H, W, 3)."""
    B, H, W, C = x.shape
    out = x.new_empty((B, H, W, OUT))
    cells, pixels = x.flatten(0, 2), out.flatten(0, 2)
    # Of all samples, one below the other; each band sees one row more on either side.
    total, rows = B * H, max(1, BAND_VALUES // (PLANES * W) - 2)
    z = x.new_empty((PLANES, min(total, rows + 2) * W), dtype=torch.float32)
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        first, last = max(start - 1, 0), min(stop + 1, total)
        _launch_products(cells[first * W : last * W], (norm, shift, weight), z, eps, kind)
        M = (stop - start) * W
        _sum_neighbors[(triton.cdiv(M, PIXELS),)](
            z, bias, pixels[start * W : stop * W], M, H, W, z.shape[1], start, start - first,
            BLOCK=PIXELS, num_warps=4,
        )  # fmt: skip
    return out


@make_pixels.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:3], OUT))


def _launch_products(
    cells: Tensor, weights: tuple[Tensor, Tensor, Tensor], z: Tensor, eps: float, kind: int
) -> None:
    """z's planes begin with those of cells (M, C)."""
    M, C = cells.shape
    block = max(16, triton.next_power_of_2(C))
    # Exact products in fp32 keep their factors in registers.
    tile = TILE if cells.dtype.itemsize == 2 else TILE // 4
    rows = max(16, min(ROWS, tile // block))
    _multiply[(triton.cdiv(M, STEPS * rows),)](
        cells, *weights, z, M, z.shape[1], eps, *weights[2].stride(),
        C=C, KIND=kind, EXACT=exact_products(cells), ROWS=rows, BLOCK=block, STEPS=STEPS,
        NUM_STAGES=NUM_STAGES, num_warps=NUM_WARPS,
    )  # fmt: skip
