"""Rows in fp8 against their reference, in triton's interpreter or on a GPU; a model drawn so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sana
from numerics import assert_detects, assert_matches, rel_rms
from sana.errors import RequestError
from sana.kernels import ops, reference
from sana.kernels.reference import FP8, Branch, Row, Rows
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


@pytest.mark.parametrize("has_norm", [True, False])
def test_norms_write_rows(has_norm: bool) -> None:
    x, value, table, time = draw(2, 5, 64), draw(2, 5, 64, seed=1), draw(3, 64), draw(2, 3, 64)
    shift, scale, gate = map(Row, table, time.unbind(1))
    norm = (shift, scale) if has_norm else None
    for branch in (Branch(value, gate, 1.5), Branch(value), None):
        total, rows = ops.add_and_scale(x, branch, norm)
        with ops.force("triton"), ops.trying("scaled_rows"):
            got = ops.add_and_scale(x, branch, norm)
        assert_matches(total, got[0], 1e-6)
        assert_matches(wide(rows), wide(got[1]), 2e-3)


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
