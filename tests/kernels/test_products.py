"""Products by chosen algorithms: what cuBLASLt is asked for, and when it is asked at all.

The library is played by one in Python, which multiplies what it finds at the addresses that it is
given by the layouts that it was told, columns first.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.products import update
from numerics import assert_detects, assert_matches
from sana.kernels import chosen, ops, products, reference
from sana.kernels.chosen import CHOSEN, Algorithm, Shape
from sana.kernels.reference import FP8
from sana.models.rounding import Product, Scaled, scaled_weight

GOOD, OTHER, WIDE = (Algorithm(66, tile, 3, 35, 5) for tile in (20, 24, 99))


class Library:
    """cuBLASLt, as far as `products` uses it, on the CPU; `WIDE` needs a workspace."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.used: list[tuple[int, ...]] = []

    def _new(self, place: Any, **facts: Any) -> int:
        self.made.append(facts)
        place._obj.value = len(self.made)
        return 0

    def cublasLtMatmulDescCreate(self, place: Any, compute: Any, scale: Any) -> int:  # noqa: N802
        assert (compute.value, scale.value) == (68, 0)
        return self._new(place, set={})

    def cublasLtMatmulDescSetAttribute(  # noqa: N802
        self, which: Any, attribute: Any, value: Any, size: Any
    ) -> int:
        assert size.value == ctypes.sizeof(value._obj)
        self.made[which.value - 1]["set"][attribute.value] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(  # noqa: N802
        self, place: Any, kind: Any, rows: Any, columns: Any, apart: Any
    ) -> int:
        assert kind.value in (14, 28)
        sides = (rows.value, columns.value, apart.value)
        return self._new(place, sides=sides, in_fp8=kind.value == 28)

    def cublasLtMatmulPreferenceCreate(self, place: Any) -> int:  # noqa: N802
        return self._new(place)

    def cublasLtMatmulPreferenceDestroy(self, _: Any) -> int:  # noqa: N802
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *given: Any) -> int:  # noqa: N802
        results, count = given[8], given[9]._obj
        results[0].algorithm[:5] = GOOD
        results[1].algorithm[:5] = OTHER
        results[1].state = 7
        count.value = 2
        return 0

    def cublasLtMatmulAlgoConfigGetAttribute(  # noqa: N802
        self, algorithm: Any, attribute: Any, value: Any, size: Any, _: Any
    ) -> int:
        place = (0, 1, 5, 6, 8).index(attribute.value)
        assert size.value == (2 if attribute.value == 8 else 4)
        value._obj.value = algorithm._obj[place]
        return 0

    def cublasLtMatmulAlgoInit(self, *given: Any) -> int:  # noqa: N802
        given[8]._obj[0] = given[7].value
        return 0 if given[7].value == GOOD.family else 15

    def cublasLtMatmulAlgoConfigSetAttribute(  # noqa: N802
        self, algorithm: Any, attribute: Any, value: Any, _: Any
    ) -> int:
        algorithm._obj[(0, 1, 5, 6, 8).index(attribute.value)] = value._obj.value
        return 0

    def cublasLtMatmulAlgoCheck(self, *given: Any) -> int:  # noqa: N802
        algorithm, found = given[6]._obj, given[7]._obj
        found.workspace = 1024 if algorithm[1] == WIDE.tile else 0
        return 0

    def cublasLtMatmul(self, *given: Any) -> int:  # noqa: N802
        _, which, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout = given[:12]
        algorithm, workspace, size, stream = given[12:]
        assert (alpha._obj.value, beta._obj.value, size.value) == (1, 0, 0)
        assert workspace is None and stream.value == 77
        assert (c.value, c_layout.value) == (d.value, d_layout.value)
        own = self.made[which.value - 1]["set"]
        assert own[3] == 1
        first, second, result = (
            self._at(place, layout)
            for place, layout in ((a, a_layout), (b, b_layout), (d, d_layout))
        )
        product = first.float().mT @ second.float()
        if own.get(25):
            assert (own[31], own[32]) == (3, 3)
            scales = [fp32_at(own[17], len(product)), fp32_at(own[18], product.shape[1])]
            product *= scales[0][:, None] * scales[1]
        if own.get(7) == 4:
            assert own[26] == 14
            product += bf16_at(own[8], len(product))[:, None].float()
        result.copy_(product)
        self.used.append(tuple(algorithm._obj[:5]))
        return 0

    def _at(self, place: Any, layout: Any) -> Tensor:
        facts = self.made[layout.value - 1]
        rows, columns, apart = facts["sides"]
        at = fp8_at if facts["in_fp8"] else bf16_at
        return at(place.value, columns * apart).view(columns, apart)[:, :rows].T


def fp32_at(address: int, count: int) -> Tensor:
    memory = (ctypes.c_int32 * count).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32)


def fp8_at(address: int, count: int) -> Tensor:
    memory = (ctypes.c_int8 * count).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float8_e4m3fn)


def bf16_at(address: int, count: int) -> Tensor:
    memory = (ctypes.c_int16 * count).from_address(address)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    played = Library()
    monkeypatch.setattr(products, "library", lambda: played)
    monkeypatch.setattr(products, "_handle", lambda device: ctypes.c_void_p(5))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    yield played


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("wanted", [GOOD, OTHER])
def test_a_product_is_what_torch_gives(library: Library, has_bias: bool, wanted: Algorithm) -> None:
    x, weight = draw(5, 7, seed=1), draw(3, 7, seed=2)
    bias = draw(3, seed=3) if has_bias else None
    exact = F.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    plan = products.Plan(Shape(5, 3, 7, has_bias))
    assert plan.choose(wanted)

    def check(weight: Tensor) -> None:
        out = torch.full((5, 3), float("nan"), dtype=torch.bfloat16)
        plan.run(x, weight, bias, out)
        assert_matches(exact.bfloat16(), out, 1e-3)  # floor 0

    check(weight)
    assert_detects(check, weight.roll(1, dims=0))
    assert library.used[0] == wanted, "the guess, or one that is made of its parts"


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_in_fp8_is_scaled_by_rows_of_both(library: Library, has_bias: bool) -> None:
    x, weight = reference.scaled_rows(draw(5, 7, seed=1)), draw(3, 7, seed=2)
    bias = draw(3, seed=3) if has_bias else None
    values, scale = scaled_weight(weight)
    exact = reference.scaled_product(x, values, scale, bias, torch.bfloat16)
    plan = products.Plan(Shape(5, 3, 7, has_bias, in_fp8=True))
    assert plan.choose(OTHER)

    def check(scale: Tensor) -> None:
        out = torch.full((5, 3), float("nan"), dtype=torch.bfloat16)
        plan.run(x.values, values, bias, out, (scale, x.scale))
        assert_matches(exact, out, 2e-3)  # floor 0 to 8e-4

    check(scale)
    assert_detects(check, scale.roll(1, dims=1))


def test_an_algorithm_that_is_not_there_is_left_to_torch(library: Library) -> None:
    plan = products.Plan(Shape(5, 3, 7, False))
    assert list(plan.guesses()) == [GOOD], "one has failed"
    assert not plan.choose(WIDE), "needs a workspace"
    assert not plan.choose(GOOD._replace(family=1)), "an unknown family"


def test_an_error_of_the_library_says_what_failed(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = products.Plan(Shape(5, 3, 7, False))
    monkeypatch.setattr(library, "cublasLtMatmul", lambda *_: 13, raising=False)
    x = draw(5, 7, seed=1)
    with pytest.raises(RuntimeError, match=r"cublasLtMatmul for a product \(5, 3, 7, .*13"):
        plan.run(x, draw(3, 7, seed=2), None, x)


def test_what_the_library_refuses_is_torchs_from_then_on(
    library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    plan = products.Plan(Shape(5, 3, 7, False))
    x, weight = draw(5, 7, seed=1), draw(3, 7, seed=2)
    monkeypatch.setattr(products, "_plan", lambda *_: None if plan.is_broken else plan)
    assert plan.choose(GOOD)
    got = products.product(x, weight, None)
    assert got is not None
    assert_matches(F.linear(x, weight), got, 3e-3)
    monkeypatch.setattr(library, "cublasLtMatmul", lambda *_: 13, raising=False)
    assert products.product(x, weight, None) is None
    assert "such products are torch's" in caplog.text
    assert not products.into(x, weight, None, got) and len(caplog.records) == 1


def test_a_row_serves_what_is_near() -> None:
    table = {
        Shape(1000, 3, 7, True): GOOD,
        Shape(2000, 3, 7, True): OTHER,
        Shape(2000, 3, 7, False): WIDE,
    }
    cases = {900: GOOD, 1000: GOOD, 1290: GOOD, 1700: OTHER, 2500: OTHER, 1450: None, 2700: None}
    for rows, expected in cases.items():
        assert products.nearest(table, Shape(rows, 3, 7, True)) == expected, rows
    assert products.nearest(table, Shape(1000, 3, 8, True)) is None
    assert products.nearest({}, Shape(1000, 3, 7, True)) is None


def test_the_table_is_of_the_official_networks() -> None:
    for shape, algorithm in CHOSEN.items():
        assert {shape.results, shape.values} & {512, 1024, 1152, 2240}, shape
        assert algorithm.family and algorithm.stages


@dataclass
class Played:
    """What `_plan` asks of a tensor on a GPU, without one."""

    shape: torch.Size
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda:0"
    is_cuda: bool = True
    requires_grad: bool = False
    address: int = 512
    dense: bool = True

    def data_ptr(self) -> int:
        return self.address

    def is_contiguous(self) -> bool:
        return self.dense

    def numel(self) -> int:
        return self.shape.numel()

    def get_device(self) -> int:
        return 0


def played(*shape: int, **facts: Any) -> Any:
    return Played(torch.Size(shape), **facts)


BAD: dict[str, Callable[[], list[Any]]] = {
    "another K": lambda: [played(2, 4, 8), played(3, 7), played(3)],
    "a bias of another length": lambda: [played(2, 4, 7), played(3, 7), played(4)],
    "a weight on the host": lambda: [played(2, 4, 7), played(3, 7, device="cpu"), played(3)],
    "fp16": lambda: [played(2, 4, 7, dtype=torch.float16), played(3, 7), played(3)],
    "a bias in fp32": lambda: [played(2, 4, 7), played(3, 7), played(3, dtype=torch.float32)],
    "an odd address": lambda: [played(2, 4, 7), played(3, 7, address=264), played(3)],
    "a slice": lambda: [played(2, 4, 7, dense=False), played(3, 7), played(3)],
    "no rows": lambda: [played(0, 4, 7), played(3, 7), played(3)],
    "on the CPU": lambda: [played(2, 4, 7, is_cuda=False), played(3, 7), played(3)],
    "a result in fp32": lambda: [
        played(2, 4, 7), played(3, 7), played(3), played(2, 4, 3, dtype=torch.float32)
    ],
    "one scale": lambda: [
        played(2, 4, 7, dtype=FP8), played(3, 7, dtype=FP8), played(3), played(2, 4, 3),
        (played(1, 3, dtype=torch.float32), played(1, dtype=torch.float32)),
    ],
}  # fmt: skip


def test_only_what_the_library_takes_gets_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Shape] = []

    def made(shape: Shape, _wanted: Algorithm, _device: int) -> Any:
        asked.append(shape)
        return SimpleNamespace(is_broken=False)

    monkeypatch.setattr(products, "_made", made)
    good = [played(2, 4, 7), played(3, 7), played(3)]
    shapes = [Shape(8, 3, 7, True), Shape(8, 3, 7, False), Shape(8, 3, 7, True, in_fp8=True)]
    table = dict.fromkeys(shapes, GOOD)
    with ops.force("triton"), products.trying(table):
        assert products._plan(*good) and products._plan(*good[:2], None)
        narrow = [replace(part, dtype=FP8) for part in good[:2]]
        scales = tuple(played(1, count, dtype=torch.float32) for count in (3, 8))
        assert products._plan(*narrow, good[2], played(2, 4, 3), scales)
        assert asked == shapes
        for what, parts in BAD.items():
            assert products._plan(*parts()) is None, what
        asks = [replace(good[0]), replace(good[1], requires_grad=True), good[2]]
        monkeypatch.setattr(ops, "is_inference", lambda *own: not any(x.requires_grad for x in own))
        assert products._plan(*asks) is None
        with ops.trying(without=["chosen_products"]):
            assert products._plan(*good) is None
        with monkeypatch.context() as patch:
            patch.setattr(torch, "is_autocast_enabled", lambda kind: True)
            assert products._plan(*good) is None
    with ops.force("reference"), products.trying(table):
        assert products._plan(*good) is None
    with ops.force("triton"), products.trying({}):
        assert products._plan(*good) is None
    assert asked == shapes


@pytest.mark.parametrize("refused", ["cublasLtMatmulDescSetAttribute", "cublasLtCreate"])
def test_a_library_that_knows_no_scales_of_rows_leaves_products_to_torch(
    library: Library, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    set_plain = library.cublasLtMatmulDescSetAttribute

    def set_attribute(which: Any, attribute: Any, *rest: Any) -> int:
        return 7 if attribute.value in (31, 32) else set_plain(which, attribute, *rest)

    if refused == "cublasLtCreate":

        def handle(device: int) -> Any:
            raise RuntimeError("cublasLtCreate")

        monkeypatch.setattr(products, "_handle", handle)
    else:
        monkeypatch.setattr(library, refused, set_attribute, raising=False)
    facts = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    make = products._made.__wrapped__
    assert make(Shape(8, 3, 7, True, in_fp8=True), GOOD, 0) is None
    assert (make(Shape(8, 3, 7, True), GOOD, 0) is None) == (refused == "cublasLtCreate")
    facts.multi_processor_count = 114
    assert make(Shape(8, 3, 7, True), GOOD, 0) is None, "another chip"


def test_layers_can_be_compiled_whole() -> None:
    layer = Product(7, 3).bfloat16().requires_grad_(False)
    narrow, x = Scaled(layer), draw(2, 5, 7, seed=1)
    out = torch.empty(2, 5, 3, dtype=torch.bfloat16)
    for call in (lambda x: layer(x), lambda x: layer.into(x, out), lambda x: narrow(x)):
        torch.compile(call, backend="eager", fullgraph=True)(x)
    assert_matches(layer(x), out, 3e-3)


def test_the_benchmark_writes_the_table(tmp_path: Path) -> None:
    path = tmp_path / "chosen.py"
    path.write_text(Path(chosen.__file__).read_text())
    table = {Shape(8, 3, 7, True): GOOD, Shape(8, 3, 7, False, in_fp8=True): OTHER}
    for rows in (table, {}, table):
        update(rows, path)
        found: dict[str, Any] = {}
        exec(path.read_text(), found)
        assert found["CHOSEN"] == rows
    assert path.read_text().count("Shape(8") == 2


@pytest.mark.gpu
def test_products_on_a_gpu_are_torchs() -> None:
    if not products.is_known(0):
        pytest.skip("the table is of another chip")
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*sides: int) -> Tensor:
        return torch.randn(sides, generator=generator, device="cuda")

    for shape in (shape for shape in CHOSEN if shape.rows <= 4096):
        x, weight = draw(shape.rows, shape.values), draw(shape.results, shape.values)
        bias = draw(shape.results).bfloat16() if shape.has_bias else None
        out = torch.full((shape.rows, shape.results), float("nan"), device="cuda").bfloat16()
        with torch.no_grad():
            if shape.in_fp8:
                rows, (values, scale) = reference.scaled_rows(x), scaled_weight(weight)
                assert products.scaled_into(rows.values, values, (scale, rows.scale), bias, out)
                expected = ops.scaled_product(rows, values, scale, bias, torch.empty_like(out))
            else:
                x, weight = x.bfloat16(), weight.bfloat16()
                assert products.into(x, weight, bias, out)
                expected = F.linear(x, weight, bias)
        assert_matches(expected, out, 3e-3 if shape.in_fp8 else 1e-4)  # floor 0 in bf16
