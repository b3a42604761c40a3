"""What the tasks compute: exact resume, one batch learned by heart, labels, caption dropout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sana.data.stickers.scene import COLORS, Placed, Scene
from sana.data.stickers.stream import Studio
from sana.data.stickers.tiny import tiny_world
from sana.models.dit import LinearDiT
from sana.presets import preset
from sana.training.config import TrainConfig
from sana.training.recipes import plan
from sana.training.run import make_task, run
from sana.training.tasks.autoencoder import EXACT, AutoencoderTask
from sana.training.tasks.flow import FlowBatch, FlowPhase, FlowTask, Ring
from sana.training.tasks.grounding import PLACES, CaptionStream, GroundingPhase, noun_labels
from sana.weights.load import load_autoencoder
from tests.numerics import assert_detects, assert_matches
from tests.training.lines import CPU
from tests.training.small import SMALL

# Four chunks of four latents fill the ring before step 0; three more push out the first of them.
FLOW = [*SMALL, "init=", "data.chunk=2", "data.reuse=2", "data.ring=16", "seed=3"]
AUTOENCODER = [*SMALL, "data.crop=32", "data.chunk=3", "autoencoder.latent_noise=0.3"]


def carry_out(recipe: str, changes: list[str], folder: Path, steps: int) -> dict[str, Any]:
    run(recipe, [*changes, "optimizer.decay=0", f"folder={folder}", f"steps={steps}"], device="cpu")
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state


def assert_same(first: Any, second: Any, name: str = "") -> None:
    """Bit for bit, through lists and dicts."""
    assert type(first) is type(second), name
    if isinstance(first, dict):
        assert first.keys() == second.keys(), name
        for key, value in first.items():
            assert_same(value, second[key], f"{name}.{key}")
    elif isinstance(first, (list, tuple)):
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{name}.{index}")
    else:
        is_same = torch.equal(first, second) if isinstance(first, Tensor) else first == second
        assert is_same, name


def count_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: a latent's place in the ring depends on when the ring was refilled."""
    put, counts = Ring.put, Counter[int]()

    def put_next(ring: Ring, fresh: FlowBatch, number: int) -> None:
        put(ring, fresh, counts[id(ring)])
        counts[id(ring)] += 1

    monkeypatch.setattr(Ring, "put", put_next)


def keep_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: a picture seen again before the first step stays in the pool."""
    prepare = AutoencoderTask.prepare

    def prepare_all(task: AutoencoderTask, item: Any, **options: Any) -> Tensor:
        images = prepare(task, item, **options)
        if options["is_warm_up"]:
            task.pool.insert(0, task.pool[0])
        return images

    monkeypatch.setattr(AutoencoderTask, "prepare", prepare_all)


@pytest.mark.parametrize(
    ("recipe", "changes", "half", "break_it"),
    [
        ("sticker-256", FLOW, 3, count_puts),
        ("sticker-autoencoder", AUTOENCODER, 2, keep_seen),
    ],
)
def test_half_and_half_equal_the_whole(
    recipe: str,
    changes: list[str],
    half: int,
    break_it: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resume(name: str) -> dict[str, Any]:
        carry_out(recipe, changes, tmp_path / name, half)
        return carry_out(recipe, changes, tmp_path / name, 2 * half)

    whole = carry_out(recipe, changes, tmp_path / "whole", 2 * half)
    assert whole["progress"]["step"] == 2 * half and whole["progress"]["skipped"] == 0
    assert_same(whole, resume("halves"))
    break_it(monkeypatch)
    assert_detects(lambda state: assert_same(whole, state), resume("broken"))


@pytest.fixture(scope="module")
def flow() -> FlowTask:
    task = make_task(plan("sticker-256", FLOW), CPU)
    assert isinstance(task, FlowTask)
    return task


def read_batch(task: FlowTask, item: int) -> FlowBatch:
    return task.encode(task.dataset()[item])


def test_the_flow_task_learns_one_batch_by_heart(flow: FlowTask) -> None:
    batches = [read_batch(flow, 2 * number) for number in range(5)]

    def train(count: int) -> float:
        """Loss over its first value, after steps on the first `count` batches in turn."""
        torch.manual_seed(0)
        phase = FlowPhase(flow.config, LinearDiT(flow.model.dit), flow.null)
        optimizer = torch.optim.AdamW(phase.module.parameters(), lr=1e-2)
        first = last = 0.0
        for step in range(25):
            generator = torch.Generator().manual_seed(step % count)
            loss = phase.loss(batches[step % count], generator)["loss"]
            first, last = first or loss.item(), loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return last / first

    def check(count: int) -> None:
        assert train(count) < 0.1  # measured: 0.017, and 0.33 for five batches

    check(1)
    assert_detects(check, len(batches))


class Recorder(nn.Module):
    """Keeps what the loss passes to the network, and predicts zero."""

    def forward(self, latent: Tensor, time: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        self.states, self.mask = states, mask
        return torch.zeros_like(latent)


def test_dropped_captions_become_the_empty_prompt_as_often_as_asked(flow: FlowTask) -> None:
    count, tokens, width = 20_000, 4, 3
    generator = torch.Generator().manual_seed(0)
    batch = FlowBatch(
        torch.zeros(count, 1, 1, 1),
        torch.randn(count, tokens, width, generator=generator),
        torch.ones(count, tokens, dtype=torch.bool),
    )
    null = torch.full((1, tokens, width), 7.0), torch.tensor([[True, True, False, False]])

    def check(dropout: float) -> None:
        config = replace(flow.config, flow=replace(flow.config.flow, dropout=dropout))
        phase = FlowPhase(config, Recorder(), null)
        phase.loss(batch, generator)
        states, mask = phase.module.states, phase.module.mask
        dropped = (states == 7).all(2).all(1)
        assert torch.equal(states[~dropped], batch.states[~dropped])
        assert mask[~dropped].all() and torch.equal(
            mask[dropped], null[1].expand(mask[dropped].shape)
        )
        # The standard error of the share is 0.0021.
        assert abs(dropped.float().mean().item() - 0.1) < 0.01

    check(0.1)
    assert_detects(check, 0.12)


# Floor 7.3e-8.
@pytest.mark.parametrize("bound", [7e-7])
def test_the_null_text_is_the_empty_prompt(flow: FlowTask, bound: float) -> None:
    states, mask = flow.phase.null
    assert states.shape == (1, 32, 32) and int(mask.sum()) == 2

    def check(prompt: str) -> None:
        assert_matches(flow.text.encode([prompt]).states[:, :2], states[:, :2], bound)

    check("")
    assert_detects(check, "a")


def test_the_ring_keeps_the_latest(flow: FlowTask) -> None:
    ring = Ring(size=11, batch=64)
    for number in range(7):
        values = torch.arange(4) + 4.0 * number
        ring.put(FlowBatch(values, values, values.bool()), number)
    # Whole chunks only: eight of the eleven places.
    drawn = ring.draw(torch.Generator().manual_seed(0)).latents
    assert set(drawn.tolist()) == set(range(20, 28))


def place(concept: int, color: str | None) -> Placed:
    return Placed(
        concept=concept,
        style=0,
        color=color,
        box=(0, 0, 9, 9),
        sprite=concept,
        square=(0, 0, 9),
    )


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio.open(tiny_world(), CPU.device)


def make_scene(
    studio: Studio, caption: str, nouns: list[str], *things: Placed, **more: Any
) -> Scene:
    """`nouns` are the words of `caption` that stand for the objects, in their order."""
    background = studio.composer.draw(0, seed=0).background
    starts = [caption.index(noun) for noun in nouns]
    spans = tuple((s, s + len(n), i) for i, (s, n) in enumerate(zip(starts, nouns, strict=True)))
    scene = Scene(
        kind="scene",
        background=background,
        objects=things,
        relation=None,
        avatar=None,
        caption=caption,
        spans=spans,
    )
    return replace(scene, **more)


@pytest.fixture(scope="module")
def scenes(studio: Studio) -> list[Scene]:
    """A relation, a natural color outside the palette, three alike, and a portrait."""
    relation = "red circle left of a gray square"
    return [
        make_scene(
            studio,
            relation,
            ["circle", "square"],
            place(0, "red"),
            place(1, "gray"),
            relation="left",
        ),
        make_scene(studio, "a moon on grass", ["moon"], place(9, None)),
        make_scene(studio, "3 white eggs", ["eggs"] * 3, *[place(11, "white")] * 3),
        make_scene(studio, "avatar, person", []),
    ]


def test_labels_by_hand(scenes: list[Scene]) -> None:
    def check(scenes: list[Scene]) -> None:
        left, right, none = (PLACES.index(name) for name in ("left", "right", "none"))
        red, white = 1 + COLORS.index("red"), 1 + COLORS.index("white")
        assert noun_labels(scenes[0], 0) == (red, left, 1)
        assert noun_labels(scenes[0], 1) == (-1, right, 1)
        assert noun_labels(scenes[1], 0) == (0, none, 1)
        assert [noun_labels(scenes[2], index) for index in range(3)] == [(white, none, 3)] * 3

    check(scenes)
    for change in ({"relation": "right"}, {"objects": scenes[0].objects[::-1]}):
        assert_detects(check, [replace(scenes[0], **change), *scenes[1:]])


def make_stream(flow: FlowTask, scenes: list[Scene], tokens: int) -> CaptionStream:
    def draw(index: int, *, seed: int, split: str) -> Scene:
        assert (seed, split) == (3, "train")
        return scenes[index % len(scenes)]

    data = replace(flow.config.data, batch=len(scenes), tokens=tokens)
    task: Any = SimpleNamespace(
        config=replace(flow.config, data=data),
        studio=SimpleNamespace(composer=SimpleNamespace(draw=draw)),
        text=flow.text,
        place=CPU,
    )
    return CaptionStream(task)


def read_letters(flow: FlowTask, caption: str, chosen: Tensor) -> str:
    """The characters of `caption` that the chosen tokens stand for."""
    _, _, offsets = flow.text.tokenizer.tokenize_with_offsets([caption], len(chosen))
    return "".join(caption[start:end] for start, end in offsets[0, chosen].tolist())


def test_labels_sit_on_the_nouns_tokens_and_no_others(flow: FlowTask, scenes: list[Scene]) -> None:
    item = make_stream(flow, scenes, tokens=32)[0]

    def check(labels: Tensor) -> None:
        marked = labels >= 0
        first = labels[0]
        for noun, index in (("circle", 0), ("square", 1)):
            chosen = (first == torch.tensor(noun_labels(scenes[0], index))).all(1)
            assert read_letters(flow, scenes[0].caption, chosen) == noun
        # No label of color for the gray one, but one of place.
        assert read_letters(flow, scenes[0].caption, marked[0, :, 0]) == "circle"
        assert read_letters(flow, scenes[0].caption, marked[0, :, 1]) == "circlesquare"
        assert read_letters(flow, scenes[1].caption, marked[1, :, 2]) == "moon"
        assert read_letters(flow, scenes[2].caption, marked[2, :, 2]) == "eggs"
        assert not marked[3].any()

    check(item.labels)
    assert_detects(check, item.labels.roll(1, 1))


def test_labels_of_a_cut_caption_stay_on_real_tokens(flow: FlowTask, scenes: list[Scene]) -> None:
    """Eight tokens end within the first noun."""
    item = make_stream(flow, scenes, tokens=8)[0]
    assert item.labels.shape == (4, 8, 3)
    marked = item.labels[0, :, 1] >= 0
    assert marked.any() and not (marked & ~item.mask[0]).any()
    assert "circle".startswith(read_letters(flow, scenes[0].caption[:-1], marked)[:3])


class Guesses(nn.Module):
    def __init__(self, logits: list[Tensor]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, states: Tensor, mask: Tensor) -> list[Tensor]:
        return self.logits


def test_the_grounding_loss_counts_labeled_tokens_alone() -> None:
    labels = torch.full((1, 3, 3), -1)
    labels[0, 1] = torch.tensor([-1, 2, 1])
    labels[0, 2] = torch.tensor([4, 1, 1])
    logits = [torch.zeros(1, 3, size) for size in (11, 5, 5)]
    expected = sum(torch.log(torch.tensor(float(size))) for size in (11, 5, 5))
    batch = (torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool), labels)

    def check(logits: list[Tensor]) -> None:
        loss = GroundingPhase(Guesses(logits)).loss(batch, torch.Generator())["loss"]
        assert_matches(torch.as_tensor(expected), loss, 1e-6)  # floor 0

    check(logits)
    logits[0][0, :2] = torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    check(logits)
    changed = [logits[0].clone(), *logits[1:]]
    changed[0][0, 2, 4] += 0.01
    assert_detects(check, changed)


@pytest.mark.parametrize("phase", ["full", "latent", "refine"])
def test_a_phase_trains_its_part_of_the_autoencoder(phase: str) -> None:
    config = plan("sticker-autoencoder", [*SMALL, f"autoencoder.phase={phase}"])
    task = make_task(config, CPU)
    assert isinstance(task, AutoencoderTask)
    trained = {n for n, p in task.network.named_parameters() if p.requires_grad}
    everything = {n for n, _ in task.network.named_parameters()}
    parts: dict[str, tuple[str, ...]] = {
        "full": ("",),
        "latent": ("encoder.head.", "decoder.stem."),
        # tiny's stage at full resolution is empty, so the one below is the last to run.
        "refine": ("decoder.stages.1.", "decoder.norm.", "decoder.head."),
    }
    assert trained == {name for name in everything if name.startswith(parts[phase])}
    assert [p.name for p in task.phases] == ["autoencoder", "critic"][: 1 + (phase == "refine")]


def test_latent_statistics_normalize_what_is_drawn(tmp_path: Path) -> None:
    """The exported mean and scale give latents of mean 0 and deviation 1 in every channel."""
    config: TrainConfig = plan("sticker-autoencoder", SMALL)
    task = make_task(config, CPU)
    assert isinstance(task, AutoencoderTask)
    task.export(tmp_path)
    network = load_autoencoder(tmp_path)
    scenes = [task.studio.composer.draw(index, seed=99) for index in range(64)]
    pictures = task.studio.renderer.render(scenes, 64)

    def check(factor: float) -> None:
        with torch.no_grad():
            latents = network.normalize(network.encode(pictures) * factor)
        # Errors of 64 pictures with four places each, measured: 0.17 and 0.13.
        assert latents.mean((0, 2, 3)).abs().max() < 0.5
        assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.4

    check(1.0)
    assert_detects(check, 2.0)
    assert preset("tiny").config.autoencoder.latent_mean != network.config.latent_mean


def test_the_logarithmic_error_is_that_of_whole_pictures() -> None:
    """The reported PSNR is the mean over pictures, each seen through its four crops."""
    config = plan("sticker-autoencoder", [*SMALL, "data.crop=32", "data.batch=8"])
    task = make_task(config, CPU)
    assert isinstance(task, AutoencoderTask)
    chance = torch.Generator().manual_seed(4)
    batch = torch.rand(8, 3, 32, 32, generator=chance) - 0.5
    errors = 0.02 * torch.randn(batch.shape, generator=chance) * torch.arange(1, 9).view(8, 1, 1, 1)

    def check(order: list[int]) -> None:
        whole = errors[order].unflatten(0, (4, 2)).transpose(0, 1).double()
        expected = (10 * (4 / (whole.square().mean((1, 2, 3, 4)) + EXACT)).log10()).mean()
        task.generator.module = Wrong(errors)
        found = task.generator.loss(batch, torch.Generator())["psnr"]
        assert_matches(expected.float(), found, 1e-5)  # measured 0

    check([*range(8)])
    assert_detects(check, [1, 0, *range(2, 8)])


class Wrong(nn.Module):
    """A round trip that errs by `errors`."""

    def __init__(self, errors: Tensor) -> None:
        super().__init__()
        self.errors = errors

    def forward(self, images: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        return images + self.errors
