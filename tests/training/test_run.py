"""Whole runs: every recipe on a CPU, what a run leaves for people, time limits, and bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sana.cli.main import main
from sana.data.stickers.tiny import tiny_world
from sana.evaluation import alignment, detector
from sana.presets import preset
from sana.training import journal, loop
from sana.training.journal import make_grid
from sana.training.loop import Progress, train
from sana.training.perceptual import Perceptual
from sana.training.recipes import RECIPES, plan
from sana.training.run import make_task, run
from sana.training.tasks.grounding import load_refiner
from sana.weights.load import find_folder, load, load_autoencoder, load_dit
from tests.numerics import assert_detects
from tests.training.lines import CPU, Batch, LineTask, make_config
from tests.training.small import SMALL

STEPS = 2
RING = ("data.chunk=2", "data.reuse=2", "data.ring=16")
# In the order in which they build on each other; {} is the folder of all runs.
CHANGES: dict[str, tuple[str, ...]] = {
    "sticker-autoencoder": ("autoencoder.perceptual=0.1", "autoencoder.perceptual_file={}/p"),
    "sticker-decoder": ("init={}/sticker-autoencoder/model", "data.batch=2"),
    "sticker-latent": ("init={}/sticker-autoencoder/model", "data.batch=2"),
    "sticker-refine": ("init={}/sticker-autoencoder/model", "data.crop=32"),
    "sticker-grounding": (),
    "sticker-256": ("init={}/sticker-grounding/model", *RING),
    "sticker-512": (
        "init={}/sticker-256/model",
        "flow.autoencoder={}/whole",
        "sample_every=2",
        "data.accumulate=2",
    ),
    "sticker-detector": ("data.batch=1",),
    "sticker-alignment": ("data.batch=2",),
    "sticker-traits": ("data.batch=2",),
}


@pytest.fixture(scope="module", autouse=True)
def one_world() -> Iterator[None]:
    """The tiny world is drawn once for all runs of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sana.training.run.tiny_world", cache(tiny_world))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every recipe carried out, each from what the one before left."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    save_file(Perceptual().state_dict(), str(folder / "p"))
    for recipe, changes in CHANGES.items():
        filled = [change.format(folder) for change in changes]
        if recipe == "sticker-512":
            make_whole(folder)
        run(
            recipe,
            [*SMALL, f"steps={STEPS}", *filled, f"folder={folder / recipe}"],
            device="cpu",
        )
    return folder


def make_whole(folder: Path) -> None:
    """An autoencoder and a text encoder in one folder, as a published model has them."""
    from sana.weights.save import save

    made = load("tiny")
    save(folder / "whole", config=made.config, text=made.text)  # type: ignore[arg-type]
    source = folder / "sticker-refine" / "model" / "autoencoder.safetensors"
    shutil.copy(source, folder / "whole")


def test_every_recipe_is_run() -> None:
    assert set(CHANGES) == set(RECIPES)


@pytest.mark.parametrize("recipe", sorted(CHANGES))
def test_a_recipe_leaves_its_record(runs: Path, recipe: str) -> None:
    lines = (runs / recipe / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        assert record["skipped"] == 0 and record["rate"] > 0
        assert all(value == value and abs(value) < 1e6 for value in record.values())
        assert any(name.endswith("/loss") for name in record)
    saved = json.loads((runs / recipe / "config.json").read_text())
    assert (saved["recipe"], saved["model"], saved["steps"]) == (recipe, "tiny", STEPS)
    assert not list((runs / recipe).rglob("*.partial"))


def test_the_models_of_all_recipes_can_be_loaded(runs: Path) -> None:
    for name in ("autoencoder", "decoder", "latent", "refine"):
        network = load_autoencoder(runs / f"sticker-{name}" / "model")
        assert network(torch.zeros(1, 3, 64, 64)).isfinite().all()
    # Only the parts that a phase trains differ from where it began.
    first, latent = (
        load_autoencoder(runs / f"sticker-{name}" / "model").state_dict()
        for name in ("autoencoder", "latent")
    )
    moved = {name for name, tensor in first.items() if not torch.equal(tensor, latent[name])}
    assert moved and all(n.startswith(("encoder.head.", "decoder.stem.")) for n in moved)
    for recipe in ("sticker-256", "sticker-512"):
        config = load_dit(runs / recipe / "model").config
        assert config == preset("tiny").config.dit
    detector.load(runs / "sticker-detector" / "model" / "detector.safetensors", tiny_world())
    alignment.read(runs / "sticker-alignment" / "model" / "alignment.safetensors")


def test_the_flow_run_starts_from_the_grounded_refiner(runs: Path) -> None:
    network = load_dit(runs / "sticker-256" / "model")
    assert network.refiner is not None
    refiner = load_refiner(runs / "sticker-grounding" / "model" / "refiner.pt")

    def check(refiner: dict[str, Tensor]) -> None:
        for name, value in network.refiner.state_dict().items():
            # Two steps at the start of the warm-up, and fp16.
            assert torch.allclose(value, refiner[name], atol=1e-3), name

    check(refiner)
    assert_detects(check, {name: value * 1.01 + 0.01 for name, value in refiner.items()})


def test_a_run_starts_from_a_model_by_its_name() -> None:
    rest = ("data.pack=tiny", "compile=false", "flow.autoencoder=sticker-512")
    task = make_task(plan("sticker-512", ["init=sticker-512", *rest]), CPU)
    trained = task.phases[0].module.state_dict()["blocks.0.attention.qkv.weight"]
    shipped = load_dit(find_folder("sticker-512")).state_dict()["blocks.0.attention.qkv.weight"]
    assert torch.equal(trained, shipped)


def test_what_two_stages_made_draws_a_picture(runs: Path, tmp_path: Path) -> None:
    """The transformer of the last stage beside the autoencoder and text encoder that it used."""
    shutil.copytree(runs / "whole", tmp_path / "model")
    shutil.copytree(runs / "sticker-512" / "model", tmp_path / "model", dirs_exist_ok=True)
    assert main(["generate", "a fox", "--model", str(tmp_path / "model"), "-o", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.png"))


def test_sample_grids_are_drawn(runs: Path) -> None:
    [path] = (runs / "sticker-512" / "samples").glob("*.png")
    assert path.name == "0000002.png"
    with Image.open(path) as image:
        assert image.size == (4 * 64, 4 * 64)
        assert len(image.getcolors(1 << 20) or []) > 100


@pytest.mark.parametrize(("count", "columns", "rows"), [(5, 0, 2), (3, 2, 2), (1, 0, 1), (4, 4, 1)])
def test_a_grid_is_filled_row_by_row(count: int, columns: int, rows: int) -> None:
    values = torch.linspace(-1, 1, count + 1)[:count]
    pictures = values.view(-1, 1, 1, 1).expand(-1, 3, 3, 5)
    grid = make_grid(pictures, columns)
    across = columns or {1: 1, 5: 3}[count]
    assert grid.shape == (3, rows * 3, across * 5) and grid.dtype == torch.uint8

    def check(grid: Tensor) -> None:
        expected = [round((value + 1) * 127.5) for value in values.tolist()]
        expected += [255] * (rows * across - count)
        for index, value in enumerate(expected):
            top, left = index // across * 3, index % across * 5
            assert (grid[:, top : top + 3, left : left + 5] == value).all()

    check(grid)
    if count > 1:
        assert_detects(check, grid.flip(2))
    assert make_grid(torch.full((1, 3, 1, 1), 9.0)).flatten().tolist() == [255] * 3


@pytest.mark.parametrize("step_takes", [1.0, 0.25])
def test_a_time_limit_ends_the_run_with_its_decay(
    step_takes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves only while a step is computed."""
    now = 0.0
    for module in (loop, journal):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))

    def finish(limit: float) -> tuple[Progress, list[float]]:
        nonlocal now
        folder = tmp_path / str(limit)
        config = make_config(folder, steps=100_000 if limit else 40, time_limit=limit)
        decayed = dataclasses.replace(config.optimizer, decay=0.5)
        config = dataclasses.replace(config, optimizer=decayed, log_every=4)
        task = LineTask(config, CPU)
        inner = task.phase.loss

        def loss(batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            nonlocal now
            now += step_takes
            return inner(batch, generator)

        task.phase.loss = loss  # type: ignore[method-assign]
        progress = train(config, task, CPU)
        lines = (folder / "log.jsonl").read_text().splitlines()
        return progress, [json.loads(line)["rate"] for line in lines]

    progress, rates = finish(100.0)
    expected = 100 / step_takes
    assert abs(progress.step - expected) <= 2
    peak = max(rates)
    assert peak == 0.01 and rates[len(rates) // 4] == peak
    assert rates[len(rates) * 3 // 4] < 0.6 * peak and rates[-1] < 0.05 * peak
    assert rates[len(rates) // 2 :] == sorted(rates[len(rates) // 2 :], reverse=True)
    assert finish(0.0)[0].step == 40


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sana: ") and err.count("\n") == 1, err
    return err


BAD: dict[str, tuple[str, list[str], str]] = {
    "recipe": ("sticker-513", [], "no recipe 'sticker-513'; did you mean 'sticker-512'?"),
    "setting": ("sticker-512", ["stepz=1"], "did you mean 'steps'?"),
    "pack": ("sticker-512", ["data.pack=none.pack"], "sana data stickers --output none.pack"),
    "perceptual": (
        "sticker-autoencoder",
        ["autoencoder.perceptual=1", "autoencoder.perceptual_file=none.st"],
        "none.st is not there",
    ),
    "perceptual damage": (
        "sticker-autoencoder",
        ["autoencoder.perceptual=1", "autoencoder.perceptual_file={}/damaged"],
        "damaged cannot be read",
    ),
    "init of autoencoder": ("sticker-latent", ["init=none/model"], "none/model"),
    "init of flow": ("sticker-512", ["init=none/model"], "none/model"),
    "autoencoder": ("sticker-512", ["init=", "flow.autoencoder=none/model"], "none/model"),
    "autoencoder's name": ("sticker-512", ["init=", "flow.autoencoder=tinny"], "'tiny'"),
    "model": ("sticker-512", ["init=", "model=tinny"], "'tiny'"),
    "ring": (
        "sticker-256",
        ["init=", "data.chunk=8", "data.reuse=2", "data.ring=4"],
        "data.ring",
    ),
    "tokens": ("sticker-512", ["init=", "data.tokens=33"], "use data.tokens=32"),
    "nothing at once": ("sticker-512", ["data.chunk=0"], "data.chunk is 0"),
    "no parts": ("sticker-512", ["data.accumulate=0"], "data.accumulate is 0"),
    "never saved": ("sticker-512", ["save_every=0"], "save_every is 0"),
    "text of another width": (
        "sticker-grounding",
        ["flow.autoencoder=sticker-512"],
        "flow.autoencoder",
    ),
    "other latents": ("sticker-512", ["init=", "flow.autoencoder=sticker-512"], "flow.autoencoder"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_is_one_line(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").write_bytes(b"nothing")
    recipe, changes, words = BAD[name]
    filled = [change.format(tmp_path) for change in changes]
    code = main(["train", recipe, *SMALL, "steps=1", f"folder={tmp_path / 'run'}", *filled])
    assert code in (1, 2)
    assert words in one_line(capsys)
    assert not (tmp_path / "run").exists()
