"""Plain matrix products, each by the algorithm of cuBLASLt that a whole step prefers.

cuBLAS guesses an algorithm from the sizes. Where products follow each other without a pause, as in
the steps of a large transformer, an H100 slows down, and kernels with other tiles are faster; those
that get no workspace need no counter in it, which torch's products clear before each.
`benchmarks/products.py` times the algorithms, compares what they give with torch's, which so far
had the same bits, and prints the rows of `chosen.CHOSEN`.

Where the table has no row that is near, or the library no such algorithm, a product is torch's.
cuBLASLt is the library that torch has loaded, called through ctypes, since torch lets nobody name
an algorithm. Start reading at `product`.

Products are of bf16, or of fp8 (e4m3) with a scale for each row of both factors; results are bf16.

Shape letters: M rows, K values of a row, N values of a result; weight (N, K) as `nn.Linear` has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sana.kernels import ops
from sana.kernels.chosen import CHOSEN, Algorithm, Shape

logger = logging.getLogger(__name__)

NEAR = 1.3
"""A row of the table also serves products with so many times its rows, or as much fewer."""
MOST = 24
"""Algorithms that cuBLASLt is asked for."""
DEVICE = (9, 0, 132)
"""Capability and processors of an H100 or H200, which the table is of."""
ALIGNED = 256
"""Bytes that all addresses are multiples of, as its algorithms expect."""

# Of cublasLt.h: kinds of numbers, of an epilogue and of scales, and attributes of a product.
FP32, BF16, FP8, IN_FP32, BIAS, BY_ROWS = 0, 14, 28, 68, 4, 3
SET_TRANSPOSED, SET_EPILOGUE, SET_BIAS, SET_BIAS_TYPE = 3, 7, 8, 26
SET_FAST_SUMS, SET_SCALES, SET_KINDS_OF_SCALES = 25, (17, 18), (31, 32)
PARTS = {"tile": 1, "custom": 5, "stages": 6, "cluster": 8}
"""What sets one algorithm of a family apart, with its attribute; a cluster's has 16 bits."""


class Found(ctypes.Structure):
    """`cublasLtMatmulHeuristicResult_t`."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Plan:
    """How products of one shape are done, on the device that is the current one."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        owner = library()
        assert owner is not None
        self.library, self.handle = owner, _handle(torch.cuda.current_device())
        self.lock = threading.Lock()
        """Addresses are set in the description before a call, of whichever thread."""
        self.is_broken = False
        self.algorithm = (c_uint64 * 8)()
        self.description, self.layouts = c_void_p(), tuple(c_void_p() for _ in range(3))
        M, N, K, has_bias, in_fp8 = shape
        self.factor = FP8 if in_fp8 else BF16
        kinds = (c_int(IN_FP32), c_int(FP32))
        self._ask("cublasLtMatmulDescCreate", byref(self.description), *kinds)
        self._set(SET_TRANSPOSED, c_int32(1))
        # Of addresses only the alignment counts until there are any.
        if has_bias:
            self._set(SET_EPILOGUE, c_int32(BIAS))
            self._set(SET_BIAS_TYPE, c_int32(BF16))
            self._set(SET_BIAS, c_void_p(ALIGNED))
        if in_fp8:
            self._set(SET_FAST_SUMS, c_int8(1))
            for attribute, kind in zip(SET_SCALES, SET_KINDS_OF_SCALES, strict=True):
                self._set(kind, c_int32(BY_ROWS))
                self._set(attribute, c_void_p(ALIGNED))
        # With columns first the weight is (K, N), transposed, the rows (K, M), the result (N, M).
        sides = ((self.factor, K, N), (self.factor, K, M), (BF16, N, M))
        for layout, (number, high, wide) in zip(self.layouts, sides, strict=True):
            size = (c_uint64(high), c_uint64(wide), c_int64(high))
            self._ask("cublasLtMatrixLayoutCreate", byref(layout), c_int(number), *size)

    def guesses(self) -> dict[Algorithm, ctypes.Array[c_uint64]]:
        """What cuBLASLt has for it that needs no workspace, by its own estimate."""
        wishes, count, results = c_void_p(), c_int(0), (Found * MOST)()
        self._ask("cublasLtMatmulPreferenceCreate", byref(wishes))
        code = self.library.cublasLtMatmulAlgoGetHeuristic(
            self.handle, self.description, *self._all(),
            wishes, c_int(MOST), results, byref(count),
        )  # fmt: skip
        self._ask("cublasLtMatmulPreferenceDestroy", wishes)
        number = 0 if code else count.value  # an error says that there is none
        good = [found.algorithm for found in results[:number] if not found.state]
        named: dict[Algorithm, ctypes.Array[c_uint64]] = {}
        for algorithm in good:  # of those that differ in what has no name here, the first
            named.setdefault(self._named(algorithm), algorithm)
        return named

    def choose(self, wanted: Algorithm) -> bool:
        """Whether there is such an algorithm, without a workspace; then `run` uses it."""
        if (guessed := self.guesses().get(wanted)) is not None:
            self.algorithm = guessed
            return True
        numbers = (IN_FP32, FP32, self.factor, self.factor, BF16, BF16)
        kinds = (c_int(number) for number in numbers)
        code = self.library.cublasLtMatmulAlgoInit(
            self.handle, *kinds, c_int(wanted.family), byref(self.algorithm)
        )
        for name, attribute in PARTS.items():
            size = c_size_t(_size(name))
            value = c_uint64(getattr(wanted, name))
            code = code or self.library.cublasLtMatmulAlgoConfigSetAttribute(
                byref(self.algorithm), c_int(attribute), byref(value), size
            )
        found = Found()
        code = code or self.library.cublasLtMatmulAlgoCheck(
            self.handle, self.description, *self._all(), byref(self.algorithm), byref(found)
        )
        return not code and not found.state and not found.workspace

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        scales: tuple[Tensor, ...] = (),
    ) -> None:
        """Writes x (M, K) times weight (N, K) transposed, plus bias (N,), into out (M, N).

        In fp8 with the scales of the weight's rows and of x's, fp32.
        """
        a, b, d = self.layouts
        result = c_void_p(out.data_ptr())
        stream = c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        with self.lock:
            if bias is not None:
                self._set(SET_BIAS, c_void_p(bias.data_ptr()))
            for attribute, scale in zip(SET_SCALES, scales, strict=False):
                self._set(attribute, c_void_p(scale.data_ptr()))
            self._ask(
                "cublasLtMatmul", self.handle, self.description, byref(c_float(1)),
                c_void_p(weight.data_ptr()), a, c_void_p(x.data_ptr()), b, byref(c_float(0)),
                result, d, result, d, byref(self.algorithm), None, c_size_t(0), stream,
            )  # fmt: skip

    def _all(self) -> tuple[c_void_p, ...]:
        """The layouts of both factors, of what is added, which is nothing, and of the result."""
        a, b, d = self.layouts
        return a, b, d, d

    def _named(self, algorithm: ctypes.Array[c_uint64]) -> Algorithm:
        parts = []
        for name, attribute in (("family", 0), *PARTS.items()):
            value, written = c_uint64(0), c_size_t(0)
            self._ask(
                "cublasLtMatmulAlgoConfigGetAttribute", byref(algorithm), c_int(attribute),
                byref(value), c_size_t(_size(name)), byref(written),
            )  # fmt: skip
            parts.append(value.value)
        return Algorithm(*parts)

    def _set(self, attribute: int, value: c_int8 | c_int32 | c_void_p) -> None:
        size = c_size_t(ctypes.sizeof(value))
        call = "cublasLtMatmulDescSetAttribute"
        self._ask(call, self.description, c_int(attribute), byref(value), size)

    def _ask(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} for a product {tuple(self.shape)}: cuBLASLt's error {code}")


@dataclass
class _State:
    """Changed by `trying` alone."""

    table: Mapping[Shape, Algorithm]
    known: dict[Shape, Algorithm | None] = field(default_factory=dict)
    """What `nearest` has said of the table."""


_state = _State(CHOSEN)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x (..., K) times weight (N, K) transposed, plus bias (N,); None where torch is to do it."""
    plan = _plan(x, weight, bias)
    if plan is None:
        return None
    out = x.new_empty((*x.shape[:-1], len(weight)))
    return out if _does(plan, x, weight, bias, out) else None


def into(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> bool:
    """The same, written into `out`, contiguous; False where torch is to do it."""
    plan = _plan(x, weight, bias, out)
    return plan is not None and _does(plan, x, weight, bias, out)


def scaled_into(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
) -> bool:
    """The same of x (..., K) and weight (N, K) in fp8, with the weight's scales and x's."""
    plan = _plan(x, weight, bias, out, scales)
    return plan is not None and _does(plan, x, weight, bias, out, scales)


@contextlib.contextmanager
def trying(table: Mapping[Shape, Algorithm]) -> Iterator[None]:
    """Inside, this table is used; graphs keep what they saw."""
    before = _state.table, _state.known
    _state.table, _state.known = table, {}
    try:
        yield
    finally:
        _state.table, _state.known = before


def nearest(table: Mapping[Shape, Algorithm], shape: Shape) -> Algorithm | None:
    """That of the same weight's product whose number of rows is nearest, and `NEAR`."""
    alike = [known for known in table if known[1:] == shape[1:]]
    known = min(alike, key=lambda known: _apart(known, shape), default=None)
    near = known is not None and _apart(known, shape) <= math.log(NEAR)
    return table[known] if known is not None and near else None


def _apart(first: Shape, second: Shape) -> float:
    return abs(math.log(first.rows / second.rows))


def _plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
    scales: tuple[Tensor, ...] = (),
) -> Plan | None:
    """Where all is as the library wants it, and the table has a row; in fp8 with `scales`."""
    # First what may be asked of any tensor, and of a compiler's.
    if not x.is_cuda or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return None
    if not ops.allows("chosen_products") or not ops.uses_triton(x) or not x.numel():
        return None
    rows, (results, values) = math.prod(x.shape[:-1]), weight.shape
    shape = Shape(rows, results, values, bias is not None, bool(scales))
    if shape not in _state.known:
        _state.known[shape] = nearest(_state.table, shape)
    wanted = _state.known[shape]
    if wanted is None or x.shape[-1] != values or (bias is not None and bias.shape != (results,)):
        return None
    if [scale.numel() for scale in scales] not in ([], [results, rows]):
        return None
    wide = [part for part in (bias, out) if part is not None]
    if not (_fit((x, weight), wide, scales) and ops.is_inference(x, weight, *wide)):
        return None
    plan = _made(shape, wanted, x.get_device())
    return None if plan is None or plan.is_broken else plan


def _fit(factors: Iterable[Tensor], wide: Iterable[Tensor], scales: Sequence[Tensor]) -> bool:
    """Whether dtypes, device and memory of a product's parts are what the library takes."""
    narrow = torch.float8_e4m3fn if scales else torch.bfloat16
    kinds = ((factors, narrow), (wide, torch.bfloat16), (scales, torch.float32))
    parts = [(part, dtype) for own, dtype in kinds for part in own]
    device = parts[0][0].device
    return all(
        part.dtype == dtype
        and part.device == device
        and part.is_contiguous()
        and part.data_ptr() % (ALIGNED if dtype != torch.float32 else 16) == 0
        for part, dtype in parts
    )


def _does(plan: Plan, x: Tensor, *others: Any) -> bool:
    """Whether the plan did it; one that once could not is not asked again."""
    try:
        with torch.cuda.device(x.device):
            plan.run(x, *others)
    except RuntimeError as error:
        logger.warning("%s; such products are torch's from now on", error)
        plan.is_broken = True
    return not plan.is_broken


@cache
def _made(shape: Shape, wanted: Algorithm, device: int) -> Plan | None:
    """None where the device is another one than the table's, or the library has no such thing."""
    if library() is None or not is_known(device):
        return None
    try:
        with torch.cuda.device(device):
            plan = Plan(shape)
            return plan if plan.choose(wanted) else None
    except RuntimeError as error:  # before CUDA 12.9 it knows no scales of rows
        logger.info("%s; such products are torch's", error)
        return None


def is_known(device: int) -> bool:
    """Whether the table is of such a GPU."""
    facts = torch.cuda.get_device_properties(device)
    return (facts.major, facts.minor, facts.multi_processor_count) == DEVICE


@cache
def library() -> ctypes.CDLL | None:
    """cuBLASLt as torch has loaded it, or else as it is found; None where there is none."""
    major = (torch.version.cuda or "").partition(".")[0]
    loaded = getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_NOW", 0)
    for mode in (loaded, ctypes.DEFAULT_MODE):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(f"libcublasLt.so.{major}", mode=mode)
    return None


@cache
def _handle(device: int) -> c_void_p:
    """For a device, which is the current one, and all threads."""
    owner, handle = library(), c_void_p()
    assert owner is not None
    if code := owner.cublasLtCreate(byref(handle)):
        raise RuntimeError(f"cublasLtCreate on device {device}: cuBLASLt's error {code}")
    return handle


def _size(part: str) -> int:
    return 2 if part == "cluster" else 4
