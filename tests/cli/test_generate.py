"""`sana generate` and `sana info` on a small pipeline: files, names, metadata, making it again."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sana import __version__
from sana.cli.generate import _slug
from sana.cli.main import main
from sana.errors import CheckpointError
from sana.pipelines import pipeline as pipelines
from sana.pipelines.pipeline import Pipeline
from standins import tiny_components


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test runs in an empty folder, and every model is the stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipelines, "load", lambda name, **how: Pipeline(tiny_components()))


def pixels(path: str | Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def draw(*arguments: str, code: int = 0) -> None:
    assert main(["generate", *arguments]) == code


def test_a_picture_and_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    draw("A red fox, on a sofa!", "--seed", "7")
    out, err = capsys.readouterr()
    assert out == "sana-a-red-fox-on-a-sofa-7.png\n"
    assert err == ""
    assert os.listdir() == [out.strip()]
    with Image.open(out.strip()) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


def test_metadata_holds_the_whole_request_and_its_origin() -> None:
    draw("a red fox", "-s", "7", "-n", "fog", "--count", "2", "-o", "{seed}.png", "--width", "96")
    with Image.open("8.png") as image:
        metadata = json.loads(image.text["sana"])
    assert metadata["request"] == {
        "prompt": "a red fox",
        "negative_prompt": "fog",
        "steps": 2,
        "guidance": 4.5,
        "seeds": [8],
        "count": 1,
        "width": 96,
        "height": 64,
        "binning": False,
        "sampler": "dpm",
        "shift": 3.0,
        "model": "sticker-512",
        **dict.fromkeys(("guidance_interval", "pag_scale", "image", "strength", "mask", "feather")),
        **dict.fromkeys(("control", "control_detector", "control_scale")),
        **dict.fromkeys(("control_start", "control_end")),
        **dict.fromkeys(("pag_blocks", "loras", "lora_scales"), []),
    }
    assert "files" not in metadata
    assert (metadata["device"], metadata["dtype"]) == ("cpu", "float32")
    assert metadata["model"] == "tiny"
    assert re.fullmatch("[0-9a-f]{12}", metadata["weights"])
    assert metadata["sana"] == __version__
    assert metadata["torch"] == torch.__version__
    assert metadata["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["-s", "1", "-s", "5"], ["sana-a-fox-1.png", "sana-a-fox-5.png"]),
        (["-s", "1", "--count", "2"], ["sana-a-fox-1.png", "sana-a-fox-2.png"]),
        (["-o", "x.png"], ["x.png"]),
        (["-o", "x.PNG", "--count", "2"], ["x-0.PNG", "x-1.PNG"]),
        (["-o", "new/"], ["new/sana-a-fox-0.png"]),
        (["-o", "."], ["sana-a-fox-0.png"]),
        (["-o", "new/{slug}_{seed}.png", "-s", "3"], ["new/a-fox_3.png"]),
        (["-o", "deep/er/x.png"], ["deep/er/x.png"]),
        (["-s", "4", "-s", "4"], ["sana-a-fox-4-2.png", "sana-a-fox-4.png"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_names(arguments: list[str], names: list[str]) -> None:
    draw("a fox", *arguments)
    assert sorted(map(str, Path(".").rglob("*.*"))) == names


def test_no_file_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        draw("a fox", "-o", "x.png")
    assert capsys.readouterr().out == "x.png\nx-2.png\n"
    assert pixels("x.png") == pixels("x-2.png")


def test_many_seeds_are_the_same_pictures_as_one_by_one() -> None:
    draw("a fox", "-s", "1", "-s", "5", "-o", "many-{seed}.png")
    draw("a fox", "-s", "5", "-o", "one.png")
    assert pixels("many-5.png") == pixels("one.png") != pixels("many-1.png")


def test_again_is_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    draw("a fox", "-s", "5", "--steps", "3", "--guidance", "3", "--shift", "2", "-o", "first.png")
    draw("--again", "first.png", "-o", "second.png")
    assert Path("first.png").read_bytes() == Path("second.png").read_bytes()
    assert capsys.readouterr().err == ""
    draw("--again", "first.png", "--steps", "4", "-o", "changed.png")
    assert pixels("changed.png") != pixels("first.png")


@pytest.mark.parametrize(
    "made, flags, used",
    [
        ("float32", [], torch.float32),
        ("mixed", [], "mixed"),
        ("float32", ["--dtype", "mixed"], "mixed"),
        ("unheard of", [], None),
    ],
)
def test_again_computes_in_the_pictures_own_dtype(
    made: str, flags: list[str], used: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str, **how: Any) -> Pipeline:
        asked.append(how["dtype"])
        return Pipeline(tiny_components())

    monkeypatch.setattr(pipelines, "load", load)
    monkeypatch.setattr(Pipeline, "dtype", property(lambda self: made))
    draw("a fox", "-o", "first.png")
    draw("--again", "first.png", *flags, "-o", "second.png")
    assert asked == [None, used]


def test_again_says_when_the_weights_have_changed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw("a fox", "-o", "first.png")

    def load(name: str, **how: Any) -> Pipeline:
        components = tiny_components()
        components.dit.output.weight.data *= 1.01
        return Pipeline(components)

    monkeypatch.setattr(pipelines, "load", load)
    draw("--again", "first.png", "-o", "second.png")
    assert re.search("made with weights .* pixels may differ", capsys.readouterr().err)


def test_info_prints_the_command_that_makes_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = '-it\'s a "fox" & $HOME; ünïcode\nnew line'
    draw("-n", "fog", "-s", "5", "-o", "first.png", "--", prompt)
    capsys.readouterr()
    assert main(["info", "first.png"]) == 0
    out = capsys.readouterr().out
    command, rest = out.split("\nmodel: tiny\n")
    words = shlex.split(command)
    assert words[:2] == ["sana", "generate"]
    assert words[-1] == prompt
    assert f"sana: {__version__}" in rest
    assert main([*words[1:-2], "--output", "second.png", *words[-2:]]) == 0
    assert pixels("first.png") == pixels("second.png")


def test_prompt_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    def say(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    say("a füchsin\n".encode())
    draw("-", "-o", "x.png")
    with Image.open("x.png") as image:
        assert json.loads(image.text["sana"])["request"]["prompt"] == "a füchsin"
    for data in (b"", b"\xff\xfe", b"x" * 10_000):
        say(data)
        draw("-", code=2)
    assert os.listdir() == ["x.png"]


def pictures() -> None:
    """photo.png and mask.png in the current folder."""
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(levels).save("photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 30, 64))
    mask.save("mask.png")


INPAINT = ("a fox", "-i", "photo.png", "--mask", "mask.png", "--feather", "2")


def test_image_tasks_are_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    pictures()
    draw(*INPAINT, "--pag-scale", "2", "--guidance-interval", "0.1", "0.9", "-o", "first.png")
    with Image.open("photo.png") as photo, Image.open("first.png") as first:
        outside = np.s_[:, 30:]
        assert np.array_equal(np.asarray(photo)[outside], np.asarray(first)[outside])
    draw("--again", "first.png", "-o", "second.png")
    assert Path("first.png").read_bytes() == Path("second.png").read_bytes()
    capsys.readouterr()
    assert main(["info", "first.png"]) == 0
    command, _ = capsys.readouterr().out.split("\nmodel: tiny\n")
    assert main([*shlex.split(command)[1:], "-o", "third.png"]) == 0
    assert Path("first.png").read_bytes() == Path("third.png").read_bytes()
    assert capsys.readouterr().err == ""


def test_files_are_found_beside_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures()
    draw(*INPAINT, "-o", "first.png")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    draw("--again", "../first.png", "-o", "second.png")
    assert pixels("second.png") == pixels("../first.png")


def test_a_file_that_changed_or_went_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pictures()
    draw(*INPAINT, "-o", "first.png")
    Path("kept.png").write_bytes(Path("photo.png").read_bytes())
    Image.new("RGB", (64, 64)).save("photo.png")
    draw("--again", "first.png", code=2)
    expected = "first.png was made with image photo.png, and photo.png has changed since"
    assert expected in capsys.readouterr().err
    os.remove("photo.png")
    draw("--again", "first.png", code=2)
    assert "image photo.png, which is not there; put it back, or name another with --image" in (
        capsys.readouterr().err
    )
    draw("--again", "first.png", "--image", "kept.png", "-o", "second.png")
    assert pixels("first.png") == pixels("second.png")


def test_loras_are_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    weights = {
        f"{layer}.lora_A.weight": torch.ones(2, 64),
        f"{layer}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(weights, "a.safetensors")
    os.mkdir("peft")
    save_file(weights, "peft/adapter_model.safetensors")
    scales = ("--lora-scale", "0.5", "--lora-scale", "-0.25")
    draw("a fox", "--lora", "a.safetensors", "--lora", "peft", *scales, "-o", "first.png")
    draw("a fox", "-o", "plain.png")
    assert pixels("first.png") != pixels("plain.png")
    draw("--again", "first.png", "-o", "second.png")
    capsys.readouterr()
    assert main(["info", "first.png"]) == 0
    command, rest = capsys.readouterr().out.split("\nmodel: tiny\n")
    assert "a.safetensors" in rest
    assert main([*shlex.split(command)[1:], "-o", "third.png"]) == 0
    assert pixels("first.png") == pixels("second.png") == pixels("third.png")
    save_file({**weights, "x.alpha": torch.ones(1)}, "a.safetensors")
    draw("--again", "first.png", code=2)
    assert "made with loras a.safetensors, and a.safetensors has changed" in capsys.readouterr().err


def test_previews_of_every_second_step(capsys: pytest.CaptureFixture[str]) -> None:
    draw("a fox", "--steps", "4", "--preview", "seen", "--preview-interval", "2", "-o", "x.png")
    assert sorted(os.listdir("seen")) == ["x-step-02.png", "x-step-04.png"]
    assert capsys.readouterr().out == "x.png\n"
    with Image.open("seen/x-step-04.png") as image:
        assert image.size == (8, 8)
    draw("a fox", "--steps", "4", "-o", "y.png")
    assert pixels("x.png") == pixels("y.png")


def test_strength_0_is_one_step(capsys: pytest.CaptureFixture[str]) -> None:
    pictures()
    draw("a fox", "-i", "photo.png", "--strength", "0", "-o", "x.png")
    draw("a dog", "-i", "photo.png", "--strength", "0", "-s", "3", "-o", "y.png")
    assert pixels("x.png") == pixels("y.png")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a fox", "--device", "gpu"], "device is 'gpu'; it must be cpu, cuda, cuda:1 or mps"),
        (["a fox", "--device", "cuda:99"], "device is cuda:99, and torch .* finds none here"),
        (["a fox", "--device", "mps"], "device is mps, and torch .* finds none here"),
        (["a fox", "--preview-interval", "2"], "preview_interval is 2 and there is no preview"),
        (["a fox", "--preview", "x", "--preview-interval", "0"], "preview_interval is 0; it must"),
        (["a fox", "--preview", "file"], "goes to file, and file is no folder"),
        (["a fox", "--image", "missing.png"], "image missing.png is not there"),
        (["a fox", "--image", "file"], "image file is no picture that can be read"),
        (["a fox", "--strength", "0.5"], "strength is 0.5 and there is no image"),
        (["a fox", "-o", "x.jpg"], "output is 'x.jpg'; pictures are PNG files"),
        (["a fox", "-o", "x{what}.png"], r"pattern may hold \{seed\} and \{slug\}"),
        (["a fox", "-o", "file/x.png"], "file is no folder that you may write to"),
        (["a fox", "--threads", "0"], "threads is 0; it must be from 1"),
        (["a fox", "--width", "2048"], "width is 2048; tiny takes multiples of 32"),
        (["--again", "file"], "cannot be read as a picture"),
        (["--again", "missing.png"], "there is no file missing.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_with_a_way_out(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("not a picture")
    draw(*arguments, code=2)
    assert re.search(message, capsys.readouterr().err)
    assert os.listdir() == ["file"]


def test_a_full_disk_is_one_message_and_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    draw("a fox", "-o", "x.png", code=1)
    out, err = capsys.readouterr()
    assert (out, os.listdir()) == ("", [])
    assert err.startswith("sana: no space left to write x.png; free some")


@pytest.mark.parametrize(
    "error, code", [(KeyboardInterrupt(), 130), (CheckpointError("model.safetensors is cut"), 1)]
)
def test_failures_leave_nothing_behind(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, **how: Any) -> Any:
        raise error

    monkeypatch.setattr(pipelines, "load", fail)
    draw("a fox", code=code)
    assert os.listdir() == []


def test_nan_is_an_error_and_no_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(name: str, **how: Any) -> Pipeline:
        components = tiny_components()
        components.dit.output.weight.data[:] = float("nan")
        return Pipeline(components)

    monkeypatch.setattr(pipelines, "load", load)
    draw("a fox", code=1)
    assert "the latent at step 1 of 2" in capsys.readouterr().err
    assert os.listdir() == []


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        draw("a fox", "--threads", "2", "-o", "x.png")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "prompt, slug",
    [
        ("A red fox!", "a-red-fox"),
        ("狐", "picture"),
        ("../../etc/passwd", "etc-passwd"),
        ("x" * 99, "x" * 40),
        (
            "one two three four five six seven eight nine ten",
            "one-two-three-four-five-six-seven-eight",
        ),
    ],
)
def test_slugs(prompt: str, slug: str) -> None:
    assert _slug(prompt) == slug
