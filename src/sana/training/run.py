"""From a recipe's name to a finished run: build the networks, the data and the task, then train."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sana import distributed, presets
from sana.config import ModelConfig
from sana.data.stickers.sprites import load_world
from sana.data.stickers.stream import Studio
from sana.data.stickers.tiny import tiny_world
from sana.data.stickers.world import World
from sana.distributed import Place
from sana.errors import TrainingError
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.models.text import MiniLM
from sana.training.config import DataConfig, TrainConfig
from sana.training.loop import Progress, Task, train
from sana.training.recipes import plan
from sana.weights import load as weights


def run(recipe: str, changes: Sequence[str] = (), *, device: str = "auto") -> Progress:
    """Carry out a recipe; under torchrun, as one process of several."""
    config = plan(recipe, changes)
    with distributed.session(device) as place:
        return train(config, make_task(config, place), place)


def make_task(config: TrainConfig, place: Place, world: World | None = None) -> Task:
    """The networks, data and losses of `config`, on this process's device."""
    torch.manual_seed(config.seed)
    if place.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    model = presets.preset(config.model).config
    studio = Studio.open(world or load_data(config.data), place.device)
    if config.task == "autoencoder":
        return _autoencoder(config, model, studio, place)
    if config.task == "grounding":
        return _grounding(config, model, studio, place)
    if config.task == "flow":
        return _flow(config, model, studio, place)
    if config.task == "alignment":
        return _alignment(config, model, studio, place)
    if config.task == "traits":
        from sana.training.tasks.traits import TraitsTask

        return TraitsTask(config, studio, place)
    return _detector(config, studio, place)


def load_data(data: DataConfig) -> World:
    """The world of a pack file, or the one drawn by code."""
    if data.pack == "tiny":
        return tiny_world()
    if not Path(data.pack).exists():
        raise TrainingError(
            f"data.pack is {data.pack!r} and no such file is there; "
            f"make it with `sana data stickers --output {data.pack}`, or use data.pack=tiny"
        )
    cache = Path(data.cache) if data.cache else None
    return load_world(Path(data.pack), avatars=data.avatars or None, cache=cache)


def _autoencoder(config: TrainConfig, model: ModelConfig, studio: Studio, place: Place) -> Task:
    from sana.training.tasks.autoencoder import AutoencoderTask

    network = DCAE(model.autoencoder)
    if config.init:
        source = weights.load_autoencoder(weights.find_folder(config.init))
        weights.assign(network, source.state_dict(), config.init)
        network.config = source.config
    if config.compile:
        # Whole halves: block by block, fourteen shapes took twice as long to compile, and looking
        # for the right one at each call kept the GPU waiting for a third of the time.
        _compile([network.encoder, network.decoder])
    return AutoencoderTask(config, model, network, studio, place)


def _grounding(config: TrainConfig, model: ModelConfig, studio: Studio, place: Place) -> Task:
    from sana.training.tasks.grounding import GroundingTask

    refiner = LinearDiT(model.dit).refiner
    if refiner is None:
        raise TrainingError(f"model {config.model} has no refiner to train; take one that has")
    _, text = find_frozen(config.flow.autoencoder, needs_autoencoder=False)
    _check_fit(config, model, None, text)
    return GroundingTask(config, model, refiner, text, studio, place)


def _flow(config: TrainConfig, model: ModelConfig, studio: Studio, place: Place) -> Task:
    from sana.training.tasks.flow import FlowTask
    from sana.training.tasks.grounding import load_refiner

    autoencoder, text = find_frozen(config.flow.autoencoder)
    assert autoencoder is not None
    _check_fit(config, model, autoencoder, text)
    network = LinearDiT(model.dit)
    grounded = Path(config.init) / "refiner.pt"
    if config.init and grounded.exists():
        assert network.refiner is not None
        weights.assign(network.refiner, load_refiner(grounded), str(grounded))
    elif config.init:
        source = weights.load_dit(weights.find_folder(config.init))
        weights.assign(network, source.state_dict(), config.init)
    if config.compile:
        _compile(list(network.blocks))
    model = dataclasses.replace(model, autoencoder=autoencoder.config)
    return FlowTask(config, model, network, (autoencoder, text), studio, place)


def find_frozen(source: str, *, needs_autoencoder: bool = True) -> tuple[DCAE | None, MiniLM]:
    """The autoencoder and text encoder of a model or a folder.

    A folder that an autoencoder recipe wrote holds no text encoder: then it is the package's own.
    """
    if source == "tiny":
        tiny = weights.load("tiny")
        assert isinstance(tiny.text, MiniLM)
        return tiny.autoencoder, tiny.text
    folder = weights.find_folder(source)
    has_text = (folder / weights.TEXT_FILE).exists()
    text = weights.load_text(folder if has_text else weights.find_folder("sticker-512"))
    return (weights.load_autoencoder(folder) if needs_autoencoder else None), text


def _check_fit(
    config: TrainConfig, model: ModelConfig, autoencoder: DCAE | None, text: MiniLM
) -> None:
    """Raise TrainingError where the frozen networks or the captions do not fit `model`."""
    dit, source = model.dit, config.flow.autoencoder
    pairs = [("text states", text.width, dit.text_dim)]
    if autoencoder is not None:
        pairs.append(("latent channels", autoencoder.config.latent_channels, dit.latent_channels))
    for what, given, wanted in pairs:
        if given != wanted:
            raise TrainingError(
                f"flow.autoencoder={source} has {what} of width {given}, model={config.model} "
                f"takes {wanted}; give the two of one model"
            )
    most = dit.refiner.max_tokens if dit.refiner else config.data.tokens
    if config.data.tokens > most:
        raise TrainingError(
            f"data.tokens is {config.data.tokens}, model={config.model} reads at most {most}; "
            f"use data.tokens={most}"
        )


def _detector(config: TrainConfig, studio: Studio, place: Place) -> Task:
    from sana.training.tasks.detector import DetectorTask

    return DetectorTask(config, studio, place)


def _alignment(config: TrainConfig, model: ModelConfig, studio: Studio, place: Place) -> Task:
    from sana.config import AlignmentConfig, RefinerConfig
    from sana.models.alignment import Alignment
    from sana.training.tasks.alignment import AlignmentTask

    if config.data.batch // config.data.accumulate % 2:
        raise TrainingError(
            f"data.batch is {config.data.batch} in {config.data.accumulate} parts; twins come in "
            "twos, so each part must be even"
        )
    source = config.flow.autoencoder
    _, text = find_frozen(source, needs_autoencoder=False)
    _check_fit(config, model, None, text)
    width = min(256, 2 * text.width)
    network = Alignment(
        AlignmentConfig(
            text_width=text.width,
            refiner=model.dit.refiner or RefinerConfig(),
            width=width,
            stages=(width // 4, width // 2, width),
        )
    )
    return AlignmentTask(config, network, text, studio, place, source)


def _compile(modules: list[Any]) -> None:
    """Compile each of the modules; those of one class and shape share a compilation."""
    torch._dynamo.config.cache_size_limit = 64
    for module in modules:
        module.compile(dynamic=False)


if __name__ == "__main__":
    # For torchrun, which starts a module: torchrun -m sana.training.run RECIPE key=value ...
    run(sys.argv[1], sys.argv[2:])
