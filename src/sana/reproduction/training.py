"""Ablations that train: small networks that differ in one thing, on the same data, in equal steps.

What is measured of a transformer: its velocity's error on held-out scenes at evenly spread times,
with fixed noise; and, where a detector is given, the share of held-out prompts that its pictures
follow, by kind. Of an autoencoder: PSNR and SSIM on held-out pictures. Start reading at `run_flow`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sana.config import DCAEConfig, ModelConfig
from sana.data.stickers.prompts import held_out_prompts
from sana.data.stickers.stream import CaptionedScenes, SceneStream, Studio
from sana.data.stickers.world import World
from sana.distributed import Place
from sana.evaluation.autoencoder import autoencoder_quality
from sana.evaluation.detector import load as load_detector
from sana.evaluation.stickers import Judge, score, summarize
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.presets import preset
from sana.reproduction.captions import CaptionStream
from sana.reproduction.variants import Change, without_shortcuts
from sana.training import losses
from sana.training.config import TrainConfig
from sana.training.loop import busy_workers, train
from sana.training.recipes import plan
from sana.training.run import find_frozen
from sana.training.tasks.autoencoder import AutoencoderTask
from sana.training.tasks.flow import FlowBatch, FlowTask, Ring

WIDTH, DEPTH = 256, 8
"""Of the transformers; 256 px give 64 tokens."""
CASE_SEED = 13
"""Chooses the prompts that the detector judges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every run of a row shares."""

    world: World
    studio: Studio
    place: Place
    folder: Path
    settings: tuple[str, ...] = ()
    """key=value for every run, after a row's own."""
    detector: str = ""
    prompts: int = 120
    measured: int = 256
    """Held-out scenes that the error is measured on."""
    model: str = "sticker-512"
    pools: dict[tuple[object, ...], Ring] = field(default_factory=dict)
    """What is trained on, by seed and temperature: made once, then drawn from by all variants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One thing to compare: a network's change, settings of the run, or how captions are drawn."""

    name: str
    change: Change | None = None
    settings: tuple[str, ...] = ()
    temperature: float | None = None
    steps: tuple[int, ...] = (20,)
    """Sampling steps at which the detector judges."""


class Nothing(Dataset[None]):
    """Items of a task that has its data already."""

    def __getitem__(self, index: int) -> None:
        return None


class PoolTask(FlowTask):
    """Flow training on `data.ring` latents that were made before the run; without a ring, afresh.

    Every batch is chosen by the run's seed and the step, so that all variants see the same.
    """

    pooled = False

    def fill(self, pools: dict[tuple[object, ...], Ring], key: tuple[object, ...]) -> None:
        """Take the ring of this key, or make it; nothing where the task has no ring."""
        if self.ring is None:
            return
        data, fresh = self.config.data, self._fresh()
        if key not in pools:
            ring = Ring(max(fresh, data.ring), self.ring.batch)
            loader: DataLoader[CaptionedScenes] = DataLoader(
                self.scenes(),
                batch_size=None,
                sampler=range(0, ring.size // fresh * data.chunk, data.chunk),
                num_workers=busy_workers(data.workers, 1),
            )
            for number, item in enumerate(loader):
                made = self.encode(item)
                ring.put(FlowBatch(made.latents, made.states, made.mask), number)
            pools[key] = ring
        self.ring, self.pooled = pools[key], True

    def scenes(self) -> Dataset[CaptionedScenes]:
        """The stream that the pool is made of."""
        return super().dataset()

    def dataset(self) -> Dataset[CaptionedScenes] | Nothing:
        return Nothing() if self.pooled else self.scenes()

    def warm_up(self, micro: int) -> int:
        return 0 if self.pooled else super().warm_up(micro)


class CaptionTask(PoolTask):
    """Flow training on captions drawn at `temperature`."""

    temperature = 0.0

    def scenes(self) -> Dataset[CaptionedScenes]:
        stream = super().scenes()
        assert isinstance(stream, SceneStream)
        made = CaptionStream(
            stream.composer,
            count=stream.count,
            seed=stream.seed,
            place=stream.place,
            chunk=stream.chunk,
            tokenizer=stream.tokenizer,
            tokens=stream.tokens,
        )
        made.temperature = self.temperature
        return made


def run_flow(bench: Bench, variant: Variant, seed: int) -> dict[str, float]:
    """Train one transformer and measure it."""
    config = flow_plan(bench, variant, seed)
    torch.manual_seed(seed)
    model = small_model(preset(config.model).config)
    network = (variant.change or LinearDiT)(model.dit)
    autoencoder, text = find_frozen(config.flow.autoencoder)
    assert autoencoder is not None
    model = replace(model, autoencoder=autoencoder.config)
    kind = PoolTask if variant.temperature is None else CaptionTask
    task = kind(config, model, network, (autoencoder, text), bench.studio, bench.place)
    if isinstance(task, CaptionTask):
        task.temperature = variant.temperature or 0.0
    task.fill(bench.pools, (config.seed, variant.temperature, config.data))
    task.config = config = replace(config, data=replace(config.data, workers=0))
    if config.compile:
        for block in network.blocks:
            block.compile(dynamic=False)
    train(config, task, bench.place)
    network.eval()
    with torch.compiler.set_stance("force_eager" if config.compile else "default"):
        return _measured(task, bench, variant)


def _measured(task: FlowTask, bench: Bench, variant: Variant) -> dict[str, float]:
    found = {"velocity error": velocity_error(task, bench.measured)}
    if bench.detector:
        for steps in variant.steps:
            shares = follow(task, bench, steps)
            found |= {f"{kind}, {steps} steps": share for kind, share in shares.items()}
    return found


def flow_plan(bench: Bench, variant: Variant, seed: int) -> TrainConfig:
    """The run's settings: the 256 px recipe, shorter, from random weights."""
    folder = bench.folder / f"{variant.name.replace(', ', '-').replace(' ', '_')}-{seed}"
    own = (
        *("init=", "compile=false", "steps=1500", "save_every=1000000", "log_every=100"),
        *("data.batch=256", "data.avatars=500", "optimizer.decay=0.5", "optimizer.warmup=100"),
        *("data.ring=32768", f"seed={seed}", f"folder={folder}"),
    )
    return plan("sticker-256", (*own, *variant.settings, *bench.settings))


def small_model(model: ModelConfig) -> ModelConfig:
    """The model with a small transformer, without refiner; `tiny`'s is small already."""
    width, depth = min(WIDTH, model.dit.width), min(DEPTH, model.dit.depth)
    heads = max(1, width // 64)
    dit = replace(model.dit, width=width, depth=depth, cross_heads=heads, refiner=None)
    return replace(model, dit=dit)


@torch.no_grad()
def velocity_error(task: FlowTask, count: int) -> float:
    """Mean squared error of the velocity over held-out scenes and times 0.05, 0.15 ... 0.95."""
    composer, data = task.studio.composer, task.config.data
    scenes = [composer.draw(index, seed=77, split="held_out") for index in range(count)]
    total = 0.0
    for start in range(0, count, 64):
        part = scenes[start : start + 64]
        ids, mask = task.text.tokenizer.tokenize([s.caption for s in part], data.tokens)
        batch = task.encode(CaptionedScenes(composer.to_tensors(part), ids, mask, 0))
        clean = batch.latents.float()
        noise = torch.stack([_noise(clean[0], start + row) for row in range(len(part))])
        noise = noise.to(clean.device)
        with task_precision(task):
            for number in range(10):
                time = torch.full((len(part),), 0.05 + 0.1 * number, device=clean.device)
                mixed = losses.add_noise(clean, noise, time)
                velocity = task.phase.module(mixed, time, batch.states.float(), batch.mask)
                error = velocity.float() - losses.flow_velocity(clean, noise)
                total += error.square().mean((1, 2, 3)).sum().item() / 10
    return total / count


def task_precision(task: FlowTask) -> torch.autocast:
    """The precision that the task trains in."""
    is_bf16 = task.config.precision == "bf16"
    return torch.autocast(task.place.device.type, dtype=torch.bfloat16, enabled=is_bf16)


def follow(task: FlowTask, bench: Bench, steps: int) -> dict[str, float]:
    """Share of held-out prompts that pictures follow, by kind and "all", one picture each."""
    device = bench.place.device
    judge = Judge(
        detector=load_detector(bench.detector, bench.world, device),
        world=bench.world,
        studio=bench.studio,
    )
    cases = held_out_prompts(bench.studio.composer, bench.prompts, CASE_SEED)
    pictures: list[Tensor] = []
    for start in range(0, len(cases), 60):
        prompts = [case.prompt for case in cases[start : start + 60]]
        pictures.append(task.pictures(prompts, seed=start, steps=steps).cpu())
    shares = summarize(score(torch.cat(pictures), cases, judge))
    return {kind: share.value for kind, share in shares.items()}


def run_autoencoder(bench: Bench, has_shortcuts: bool, seed: int) -> dict[str, float]:
    """Train one small autoencoder and measure it."""
    name = "with" if has_shortcuts else "without"
    own = (
        *("steps=1500", "save_every=1000000", "log_every=100", "compile=false"),
        *("data.size=256", "data.crop=128", "data.batch=64", "data.avatars=500"),
        *("autoencoder.perceptual=0", f"seed={seed}", f"folder={bench.folder / name}-{seed}"),
    )
    config = plan("sticker-autoencoder", (*own, *bench.settings))
    torch.manual_seed(seed)
    model = preset(config.model).config
    model = replace(model, autoencoder=narrow(model.autoencoder))
    network = DCAE(model.autoencoder)
    if not has_shortcuts:
        without_shortcuts(network)
    train(config, AutoencoderTask(config, model, network, bench.studio, bench.place), bench.place)
    network.eval()

    @torch.inference_mode()
    def rebuild(images: Tensor) -> Tensor:
        parts = [network.decode(network.encode(part)).float() for part in images.split(16)]
        return torch.cat(parts).clamp(-1, 1)

    count = max(2, bench.measured // 8)
    quality = autoencoder_quality(rebuild, bench.studio, count=count, size=config.data.size)
    return {"PSNR": quality["all"].psnr, "SSIM": quality["all"].ssim}


def narrow(config: DCAEConfig) -> DCAEConfig:
    """Half the width of every stage, as far as the shortcuts' channels divide."""
    stages = [
        tuple(replace(stage, width=max(stage.width // 2, 8)) for stage in half)
        for half in (config.encoder, config.decoder)
    ]
    return replace(config, encoder=stages[0], decoder=stages[1])


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(10_000 + seed))
