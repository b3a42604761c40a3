"""A pipeline in little memory: the same pictures, retries that are said, limits that hold."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from live_bytes import peak_bytes
from numerics import assert_detects
from sana.cli.main import main
from sana.errors import NumericsError, RequestError
from sana.kernels import ops
from sana.models import dit
from sana.models.tiling import decode_tiled
from sana.pipelines import offload, placing
from sana.pipelines.footprint import Canvas, Widths
from sana.pipelines.memory import CUDA_CONTEXT, MemoryPlan
from sana.pipelines.pipeline import Pipeline, load
from sana.pipelines.placing import bounds, first_device, free_memory, is_out_of_memory
from sana.pipelines.precision import multiplies_in_bf16
from sana.presets import preset
from sana.request import Request
from standins import tiny_components

FOX = Request(prompt="a red fox", steps=2, width=96, height=64)
MIB = 2**20


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.tobytes() == second.tobytes()


def large(pixels: int) -> Any:
    """`tiny` that may be asked for more pixels than it usually draws."""
    parts = tiny_components()
    config = dataclasses.replace(parts.config, max_pixels=pixels)
    return SimpleNamespace(**{**vars(parts), "config": config})


@pytest.mark.parametrize(
    "chosen",
    [
        MemoryPlan(text="visits"),
        MemoryPlan(text="visits", dit="visits", autoencoder="visits", early=("dit",)),
        MemoryPlan(text="streams", dit="streams", autoencoder="visits"),
    ],
)
@pytest.mark.parametrize("name", ["tiny", "tiny-controlnet"])
def test_pictures_are_the_same_wherever_the_weights_are(
    name: str, chosen: MemoryPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    request, images = FOX.replace(image="in.png", strength=0.8), {"in.png": picture}
    if name == "tiny-controlnet":
        request = request.replace(control="in.png", control_detector="none")
    [expected] = Pipeline(tiny_components(name)).generate(request, images)
    monkeypatch.setattr(placing, "plan", lambda *_, **__: chosen)
    pipeline = Pipeline(tiny_components(name))
    fingerprint = pipeline.fingerprint

    def check(pipeline: Pipeline) -> None:
        assert same(pipeline.generate(request, images)[0], expected)

    check(pipeline)
    check(pipeline)
    assert pipeline.fingerprint == fingerprint
    pipeline.components.dit.blocks[1].table.data.mul_(1.2)
    assert_detects(check, pipeline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"guidance": 1.0}, {"pag_scale": 2.0}], ids=str)
def test_streaming_computes_what_a_gpu_computes(
    changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels fuse a block's last sum with the next one's norm, as on a GPU.

    The next block then reads a gate of the block before it, whose memory another one has by then.
    """
    fusing = SimpleNamespace(**{**vars(ops), "uses_triton": lambda _: True})
    monkeypatch.setattr(dit, "ops", fusing)
    request = FOX.replace(**changes)

    def latent() -> Tensor:
        parts = tiny_components()
        more = tiny_components().dit.blocks
        more[1].table.data.mul_(-1.5)
        parts.dit.blocks.extend(more)  # two would share no slot
        parts.dit.to(dtype)
        return list(Pipeline(parts).steps(request))[-1].latent

    expected = latent()
    chosen = MemoryPlan(text="streams", dit="streams", autoencoder="visits")
    monkeypatch.setattr(placing, "plan", lambda *_, **__: chosen)

    def check(got: Tensor) -> None:
        assert torch.equal(expected, got)

    check(latent())
    monkeypatch.setattr(offload, "kept", lambda output, _slot: output)
    assert_detects(check, latent())


def test_two_requests_by_turns_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = MemoryPlan(text="visits", dit="visits", autoencoder="visits")
    monkeypatch.setattr(placing, "plan", lambda *_, **__: chosen)
    pipeline = Pipeline(tiny_components())
    requests = [FOX.replace(steps=4), FOX.replace(prompt="two blue whales", steps=4)]
    alone = [list(pipeline.steps(request))[-1].latent for request in requests]
    first, second = (pipeline.steps(request) for request in requests)
    for _ in range(3):
        next(first)
        next(second)
        pipeline.decode(torch.zeros(1, 8, 2, 2))
    assert torch.equal(next(first).latent, alone[0])
    assert torch.equal(next(second).latent, alone[1])


def running_out(pipeline: Pipeline, cells: int, error: Exception) -> None:
    """Make the decoder fail on every latent of more than `cells` cells."""
    autoencoder = pipeline.components.autoencoder
    decode = autoencoder.decode

    def run_out(latent: Tensor) -> Tensor:
        if latent.shape[-2] * latent.shape[-1] > cells:
            raise error
        return decode(latent)

    autoencoder.decode = run_out  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_while_decoding_goes_on_in_tiles_and_says_so(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(large(1024))
    latent = torch.randn(1, 8, 32, 20, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        raw = pipeline.components.autoencoder.denormalize(latent)
        expected = decode_tiled(pipeline.components.autoencoder, raw, tile=(352, 384))[0]
    running_out(pipeline, 16 * 16, error)
    with caplog.at_level(logging.WARNING, logger="sana"), torch.inference_mode():
        pixels = pipeline._placing.decode(raw)
    assert torch.equal(pixels, expected)
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory decoding in one piece; trying it in tiles of 640 x 448 px",
        "out of memory decoding in tiles of 640 x 448 px; trying it in tiles of 384 x 352 px",
    ]


def test_what_is_no_lack_of_memory_or_cannot_be_tiled_is_not_tried_again() -> None:
    pipeline = Pipeline(large(1024))
    running_out(pipeline, 0, RuntimeError("a shape does not fit"))
    with pytest.raises(RuntimeError, match="does not fit"):
        pipeline.decode(torch.zeros(1, 8, 20, 20))
    pipeline = Pipeline(large(1024))
    running_out(pipeline, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.decode(torch.zeros(1, 8, 20, 20))
    assert not is_out_of_memory(ValueError("no"))


def test_a_limit_tiles_the_decoder_and_is_kept() -> None:
    """Decoding 1024 px, by torch's own account, in what a stated limit leaves beside the weights.

    The peak includes the finished picture on the CPU, which is where this test's device is too.
    """
    request = FOX.replace(width=1024, height=1024)
    bare = Pipeline(tiny_components())
    assert bare.memory_plan(request).tile is None
    limited = Pipeline(tiny_components(), memory=90 * MIB)
    assert limited.memory_plan(request).tile == (448, 608)
    latent = torch.zeros(1, 8, 32, 32)
    picture = 3 * 4 * 1024**2
    whole, tiled = (
        peak_bytes(lambda pipeline=pipeline: pipeline._placing.decode(latent)) - picture
        for pipeline in (bare, limited)
    )
    assert tiled < 0.65 * whole  # measured 0.55
    assert tiled < 25 * MIB


def test_a_limit_that_cannot_be_kept_is_an_error_and_a_lack_is_only_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="memory is 50 MiB; tiny at 96 x 64 needs at least"):
        Pipeline(tiny_components(), memory=50 * MIB).generate(FOX)
    monkeypatch.setattr(placing, "free_memory", lambda _: 1000)
    with caplog.at_level(logging.WARNING, logger="sana"):
        assert Pipeline(tiny_components()).generate(FOX)
    assert "trying it all the same" in caplog.text
    monkeypatch.undo()
    line = ["generate", "a fox", "-m", "tiny", "--output", str(tmp_path / "a.png"), "--memory"]
    assert main([*line, "10MiB"]) == 2
    assert main([*line, "plenty"]) == 2
    assert main([*line, "1GiB"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_loading_takes_a_limit_and_the_dtype_that_suits() -> None:
    pipeline = load("tiny", device="cpu", memory="1GiB")
    assert pipeline.device.type == "cpu"
    assert pipeline.dtype == ("mixed" if multiplies_in_bf16() else "float32")
    assert load("tiny", device="cpu", dtype=torch.bfloat16).dtype == "bfloat16"
    with pytest.raises(RequestError, match="for example 8GiB"):
        load("tiny", memory="lots")


def test_not_finite_pixels_are_named_with_the_way_out() -> None:
    parts = tiny_components()
    parts.autoencoder.decoder.head.conv.bias.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="the decoded pixels.*float32"):
        Pipeline(parts).decode(torch.zeros(1, 8, 2, 2))


def test_free_memory_is_known_here_and_none_where_nobody_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = free_memory("cpu")
    assert free is not None
    assert 2**26 < free < 2**44
    monkeypatch.setattr(placing, "MEMINFO", tmp_path / "none")
    assert free_memory("cpu") is not None
    monkeypatch.setattr(placing.os, "sysconf_names", {})  # type: ignore[attr-defined]
    assert free_memory("cpu") is None
    pipeline = Pipeline(tiny_components())
    assert not pipeline.memory_plan(FOX).offloads


@pytest.mark.slow
def test_4096_px_run_end_to_end_in_tiles() -> None:
    pipeline = Pipeline(large(4096), memory=400 * MIB)
    request = FOX.replace(width=4096, height=4096, steps=1, guidance=1.0)
    assert pipeline.memory_plan(request).tile == (1280, 4096)
    [picture] = pipeline.generate(request)
    assert picture.size == (4096, 4096)
    assert len(picture.resize((64, 64)).getcolors(64 * 64) or ()) > 100


def test_a_canvas_holds_what_the_request_makes_the_network_see() -> None:
    pipeline = Pipeline(tiny_components())
    plans = {
        guidance: pipeline.memory_plan(FOX.replace(guidance=guidance, width=1024, height=1024))
        for guidance in (1.0, 4.5)
    }
    assert plans[1.0].peak <= plans[4.5].peak
    assert pipeline._placing._canvas == Canvas(width=1024, height=1024, batch=2)
    pipeline.memory_plan(FOX.replace(pag_scale=2.0, pag_blocks=(1,)))
    assert pipeline._placing._canvas == Canvas(width=96, height=64, batch=3)


@pytest.mark.parametrize(
    ("free", "limit", "device"),
    [(80, None, "cuda"), (8, None, "cpu"), (80, 8, "cpu"), (80, 12, "cuda"), (1, None, "cpu")],
)
def test_weights_are_read_straight_to_the_device_only_if_all_stay(
    free: int, limit: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "free_memory", lambda _: free * 2**30)
    config = preset("sana-1600m-1024").config
    stated = None if limit is None else limit * 2**30
    assert first_device(config, Widths(), torch.device("cuda"), stated).type == device
    assert first_device(config, Widths(), torch.device("cpu"), stated).type == "cpu"


def test_what_a_user_states_is_the_whole_and_what_is_free_is_beside_cuda() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    gib = 2**30
    assert bounds(cuda, None, 5 * gib) == (5 * gib, 0)
    assert bounds(cuda, 8 * gib, 80 * gib) == (8 * gib, CUDA_CONTEXT)
    assert bounds(cuda, 8 * gib, 5 * gib) == (5 * gib + CUDA_CONTEXT, CUDA_CONTEXT)
    assert bounds(cpu, 8 * gib, None) == (8 * gib, 0)
    assert bounds(cpu, None, None) == (None, 0)
