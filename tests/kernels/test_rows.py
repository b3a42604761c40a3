"""Rows in fp8 against their reference, in triton's interpreter or on a GPU; a model drawn so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sana
from numerics import assert_detects, assert_matches, rel_rms
from sana.errors import RequestError
from sana.kernels import ops, reference, scaled
from sana.kernels.proven import Way
from sana.kernels.reference import FP8, Branch, Lone, Row, Rows
from sana.models.rounding import Mixed, Scaled
from sana.pipelines.pipeline import Pipeline
from sana.pipelines.precision import choose
from sana.presets import preset
from sana.weights.load import load

pytest.importorskip("sana.kernels.rows", reason="triton is made for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = 0.04
"""e4m3 has three digits: a value is off by 1/16 at most, a random row by 0.026 of its size."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def wide(rows: Rows) -> Tensor:
    return rows.values.double() * rows.scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3), (3, 100), (2, 5, 64), (2, 300)])
def test_rows_are_the_tensor_in_fp8(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*shape).to(dtype)
    x.flatten(0, -2)[1:2] = 0
    x[-1] *= 1e4
    with ops.force("triton"), ops.trying("scaled_rows"):
        got = ops.scaled_rows(x)
    exact = reference.scaled_rows(x)

    def check(expected: Tensor) -> None:
        assert_matches(expected, wide(got), 2e-3)  # ties alone may fall otherwise

    check(wide(exact))
    assert_detects(check, wide(Rows(exact.values, exact.scale * 1.01)))
    assert got.scale.shape == (*shape[:-1], 1)
    assert rel_rms(x.double(), wide(got)) < STEP


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_makes_its_row_nan() -> None:
    x = draw(4, 32)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    for backend in ("triton", "reference"):
        with ops.force(backend), ops.trying("scaled_rows"):
            bad = wide(ops.scaled_rows(x)).isnan()
        assert bad.any(1).tolist() == [False, True, True, False]


class Case:
    """Three samples of tokens with the rows of a block, and all that a norm is asked for."""

    def __init__(self, tokens: int, width: int, dtype: torch.dtype, lone: int = 0) -> None:
        parts = [draw(3, tokens, width, seed=i) for i in range(2)]
        parts += [draw(3 - lone, tokens, width, seed=i) for i in (2, 3)]
        parts += [draw(lone, 1, width, seed=4), draw(3, width, seed=5), draw(3, 3, width, seed=6)]
        self.lone, self.dtype = lone, dtype
        self.parts = [part.to(dtype) for part in parts]
        # Of the first sample's rows the largest, in the second piece where there are two.
        self.parts[0][0, :, -1] = 9

    def results(
        self,
        kind: torch.dtype | None = None,
        *,
        limit: float = 1.5,
        row: float = 1.0,
        shift: float = 1.0,
    ) -> list[Tensor]:
        """Sums, and rows as numbers, of branches with norm and without; the rest plants a fault.

        With `kind` computed in that, and rounded once.
        """
        kind = self.dtype if kind is None else kind
        x, value, other, seen, alone, table, time = (part.to(kind) for part in self.parts)
        gate, shifts, scales = map(Row, table, time.unbind(1))
        norm = (Row(shifts.table, shifts.time * shift), scales)
        branches = [Branch(value, gate, limit), Branch(value), None]
        if self.lone:
            before = [Branch(value, gate, limit), Branch(value, gate)]
            branches = [Branch(other, lone=Lone(alone * row, first, seen)) for first in before]
        results: list[Tensor] = []
        for branch in branches:
            for modulation in (norm, None):
                total, rows = scaled.add_and_scale(x, branch, modulation)
                results += [total.to(self.dtype), wide(rows)]
        return results


SUMS = {torch.float32: 5e-7, torch.bfloat16: 2e-2}  # floors 5e-8 and 1.1e-2
# Floors 2e-7 and 2.5e-2. Ties alone may fall otherwise in fp32; a value of bf16 that the
# interpreter cuts where a GPU rounds may be a step of fp8 away, one of nine in the smallest case.
ROWS = {torch.float32: 2e-3, torch.bfloat16: 6e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def check_rows(case: Case, exact: list[Tensor], *without: Way, **fault: float) -> None:
    with ops.force("triton"), ops.trying(without=without):
        got = case.results(**fault)
    for index, (expected, result) in enumerate(zip(exact, got, strict=True)):
        assert_matches(expected, result, (ROWS if index % 2 else SUMS)[case.dtype])


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 3), (5, 64), (1, 1100)])
def test_norms_write_rows(tokens: int, width: int, dtype: torch.dtype) -> None:
    """In one piece, or where it is split of 1024 and 76 columns."""
    case = Case(tokens, width, dtype)
    exact = case.results(torch.float64)
    check_rows(case, exact)
    assert_detects(lambda limit: check_rows(case, exact, limit=limit), 0.5)
    assert_detects(lambda shift: check_rows(case, exact, shift=shift), 1.5)


@DTYPES
@pytest.mark.parametrize(("tokens", "width", "lone"), [(1, 3, 1), (3, 64, 2), (1, 1100, 1)])
def test_norms_write_rows_with_a_lone_texts_row(
    tokens: int, width: int, lone: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tokens, width, dtype, lone)
    exact = case.results(torch.float64)
    check_rows(case, exact, "scaled_rows")
    monkeypatch.setattr(ops, "scaled_rows", None)
    check_rows(case, exact)
    for fault in ({"limit": 0.5}, {"shift": 1.5}, {"row": 1.5}):
        assert_detects(lambda own: check_rows(case, exact, **own), fault)


def test_gradients_know_a_lone_texts_row() -> None:
    """Training's kernels do not: the reference sums it."""
    x, before, value, row = draw(2, 3, 8), draw(2, 3, 8), draw(1, 3, 8), draw(1, 1, 8)
    branch = Branch(value.requires_grad_(), lone=Lone(row, Branch(before), x[1:]))
    shift, scale = Row(draw(8), draw(1, 8)), Row(draw(8), draw(1, 8))
    expected = reference.add_branch(x, branch)
    with ops.force("triton"), ops.trying("norm_gradient"):
        sums = [ops.add_branch(x, branch), ops.add_and_modulate(x, branch, shift, scale)[0]]
        sums += [ops.add_and_round(x, branch)[1], scaled.add_and_scale(x, branch, None)[0]]
    assert all(torch.equal(got, expected) and got.requires_grad for got in sums)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("width", [64, 1100])
def test_what_is_not_finite_spoils_its_row_in_either_piece(width: int) -> None:
    """Here infinity too may be left, since the interpreter's cast loses NaN; on a GPU it is NaN."""
    x, value, table = draw(1, 5, width), draw(1, 5, width, seed=1), draw(2, width, seed=2)
    x[0, 1, 3], x[0, 2, width - 1], value[0, 3, width - 1] = torch.nan, torch.inf, torch.nan
    modulation = (Row(table[0], table[:1]), Row(table[1], table[:1]))
    for norm in (modulation, None):
        with ops.force("triton"):
            bad = ~wide(scaled.add_and_scale(x, Branch(value), norm)[1])[0].isfinite()
        assert bad.all(1).tolist() == bad.any(1).tolist() == [False, True, True, True, False]


def test_a_tiny_model_is_drawn_and_replaces_its_weights() -> None:
    """On a CPU by the reference's product; its latent is near, and not the same."""
    plain = Pipeline(load("tiny", device="cpu"))
    scaled = Pipeline(load("tiny", device="cpu", dtype=torch.float32, where=lambda _: _where()))
    assert (plain.dtype, scaled.dtype) == ("float32", "fp8")
    network = scaled.components.dit
    linears = [module for module in network.modules() if isinstance(module, Scaled)]
    assert len(linears) == 6 * len(network.config.inner_blocks)
    assert all(linear.weight.dtype == FP8 for linear in linears)
    assert plain.fingerprint != scaled.fingerprint
    request = sana.Request(model="tiny", prompt="a red fox", seeds=3, steps=2)
    first, second = (list(pipe.steps(request))[-1].latent for pipe in (plain, scaled))
    assert 1e-4 < rel_rms(first, second) < 0.3
    with pytest.raises(RequestError, match="loras are given and dtype is fp8"):
        next(scaled.steps(request.replace(loras=("a.safetensors",), lora_scales=(1.0,))))


def test_results_have_the_dtype_of_what_is_loaded_from_files() -> None:
    network = load("sticker-512", where=lambda _: _where(torch.bfloat16)).dit
    linears = [module for module in network.modules() if isinstance(module, Scaled)]
    assert len(linears) == 6 * len(network.config.inner_blocks)
    assert {linear.whole for linear in linears} == {torch.bfloat16}
    linear = linears[0]
    assert linear(torch.zeros(2, linear.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16


def _where(whole: torch.dtype = torch.float32) -> object:
    from sana.weights.load import Where

    return Where(device="cpu", dit=Mixed(whole, FP8), autoencoder=torch.float32, text=torch.float32)


def test_fp8_is_refused_where_it_cannot_be() -> None:
    config = preset("sana-1600m-1024-bf16").config
    with pytest.raises(RequestError, match="capability 8.9"):
        choose(config, "cpu", "fp8")
    with pytest.raises(RequestError, match="trained in float16"):
        choose(preset("sana-600m-1024").config, "cuda", "fp8", has_fp8=True)
    chosen = choose(config, "cuda", "fp8", has_fp8=True)
    assert (chosen.name, chosen.autoencoder_loads) == ("fp8", torch.bfloat16)
    assert chosen.dit_loads == Mixed(torch.bfloat16, FP8)
