r"""One function per training run; `RECIPES` holds them by name, `run` carries one out.

From nothing to a model, in order:

    sana train sticker-autoencoder folder=runs/autoencoder
    sana train sticker-grounding folder=runs/grounding flow.autoencoder=runs/autoencoder/model
    sana train sticker-256 folder=runs/256 init=runs/grounding/model \
        flow.autoencoder=runs/autoencoder/model
    sana train sticker-512 folder=runs/512 init=runs/256/model \
        flow.autoencoder=runs/autoencoder/model
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType

from sana.data.stickers.scene import KINDS
from sana.errors import TrainingError
from sana.training.config import (
    AutoencoderConfig,
    DataConfig,
    FlowConfig,
    OptimizerConfig,
    TrainConfig,
    override,
)


def sticker_autoencoder() -> TrainConfig:
    """Phase 1 of DC-AE: the whole autoencoder on 256 px crops of composed pictures."""
    return TrainConfig(
        recipe="sticker-autoencoder",
        task="autoencoder",
        model="sticker-512",
        steps=6000,
        precision="bf16",
        compile=True,
        ema=0.998,
        save_every=1000,
        log_every=50,
        optimizer=OptimizerConfig(
            kind="muon", rate=1e-3, beta2=0.99, weight_decay=0.001, warmup=200, decay=0.6
        ),
        data=DataConfig(
            size=512, crop=256, batch=96, chunk=8, workers=8, avatars=5000, kinds=" ".join(KINDS)
        ),
        autoencoder=AutoencoderConfig(
            perceptual=0.02, perceptual_crop=64, squared=25.0, log_squared=0.1
        ),
    )


def sticker_latent() -> TrainConfig:
    """Phase 2 of DC-AE: encoder head and decoder stem on whole 512 px pictures."""
    return TrainConfig(
        recipe="sticker-latent",
        task="autoencoder",
        model="sticker-512",
        steps=500,
        init="runs/autoencoder/model",
        precision="bf16",
        ema=0.99,
        optimizer=OptimizerConfig(rate=2e-4, weight_decay=0.001, warmup=50, decay=1.0),
        data=DataConfig(size=512, batch=24, workers=8, avatars=5000),
        autoencoder=AutoencoderConfig(phase="latent", perceptual=0.05, squared=1.0),
    )


def sticker_decoder() -> TrainConfig:
    """The decoder alone, on a finished encoder: better pictures from the same latents."""
    return replace(
        sticker_autoencoder(),
        recipe="sticker-decoder",
        data=replace(sticker_autoencoder().data, batch=128),
        init="runs/autoencoder/model",
        autoencoder=AutoencoderConfig(
            phase="decoder",
            perceptual=0.02,
            perceptual_crop=64,
            squared=25.0,
            log_squared=0.1,
            latent_noise=0.02,
        ),
    )


def sticker_refine() -> TrainConfig:
    """Phase 3 of DC-AE: the decoder's last stage and head, with PatchGAN."""
    return TrainConfig(
        recipe="sticker-refine",
        task="autoencoder",
        model="sticker-512",
        steps=500,
        init="runs/autoencoder/model",
        precision="bf16",
        ema=0.99,
        optimizer=OptimizerConfig(rate=1e-4, beta1=0.5, beta2=0.9, warmup=50, decay=1.0),
        data=DataConfig(size=512, crop=256, batch=96, workers=8, avatars=5000),
        autoencoder=AutoencoderConfig(phase="refine", perceptual=0.05, squared=1.0),
    )


def sticker_grounding() -> TrainConfig:
    """The refiner learns binding from captions alone."""
    return TrainConfig(
        recipe="sticker-grounding",
        task="grounding",
        model="sticker-512",
        steps=600,
        precision="bf16",
        ema=0.0,
        log_every=50,
        optimizer=OptimizerConfig(rate=5e-4, warmup=100, decay=0.5),
        data=DataConfig(batch=256, workers=8, tokens=48, avatars=1000),
    )


def sticker_256() -> TrainConfig:
    """First stage of the cascade: 256 px, 64 tokens."""
    return TrainConfig(
        recipe="sticker-256",
        task="flow",
        model="sticker-512",
        steps=8000,
        init="runs/grounding/model",
        precision="bf16",
        compile=True,
        ema=0.999,
        save_every=2000,
        log_every=50,
        optimizer=OptimizerConfig(
            kind="muon", rate=1.2e-3, beta2=0.98, weight_decay=0.01, warmup=300, decay=0.0
        ),
        data=DataConfig(
            size=256,
            batch=512,
            chunk=8,
            workers=8,
            reuse=4,
            ring=1 << 17,
            tokens=48,
            avatars=5000,
        ),
        flow=FlowConfig(shift=2.0),
    )


def sticker_512() -> TrainConfig:
    """Second stage: 512 px, 256 tokens, from the 256 px weights; more stickers, of eight styles."""
    before = sticker_256()
    return replace(
        before,
        recipe="sticker-512",
        steps=10000,
        init="runs/256/model",
        optimizer=replace(before.optimizer, rate=1.5e-3, warmup=200, decay=0.5),
        data=replace(
            before.data,
            size=512,
            batch=256,
            reuse=24,
            ring=1 << 16,
            kinds="scene sticker scene styled scene sticker scene styled "
            "scene sticker scene styled scene sticker styled avatar",
        ),
        flow=FlowConfig(shift=2.5),
    )


def sticker_detector() -> TrainConfig:
    """The judge: class, color and place of every object in a picture."""
    return TrainConfig(
        recipe="sticker-detector",
        task="detector",
        model="sticker-512",
        steps=1500,
        precision="bf16",
        ema=0.998,
        log_every=50,
        optimizer=OptimizerConfig(rate=2e-3, weight_decay=0.01, warmup=100, decay=0.7),
        data=DataConfig(size=256, batch=256, workers=8, avatars=1000),
    )


def sticker_alignment() -> TrainConfig:
    """The image-text judge: does a caption hold of a picture, told from pairs of near twins."""
    return TrainConfig(
        recipe="sticker-alignment",
        task="alignment",
        model="sticker-512",
        steps=1500,
        precision="bf16",
        ema=0.998,
        log_every=50,
        optimizer=OptimizerConfig(rate=1e-3, weight_decay=0.01, warmup=100, decay=0.7),
        data=DataConfig(size=256, batch=256, workers=8, tokens=48, avatars=1000),
    )


def sticker_traits() -> TrainConfig:
    """The judge of a sticker's style and of a portrait's attributes."""
    return replace(
        sticker_detector(),
        recipe="sticker-traits",
        task="traits",
        steps=800,
        data=DataConfig(size=256, batch=256, workers=8, avatars=3000),
    )


RECIPES: MappingProxyType[str, Callable[[], TrainConfig]] = MappingProxyType(
    {
        "sticker-autoencoder": sticker_autoencoder,
        "sticker-latent": sticker_latent,
        "sticker-decoder": sticker_decoder,
        "sticker-refine": sticker_refine,
        "sticker-grounding": sticker_grounding,
        "sticker-256": sticker_256,
        "sticker-512": sticker_512,
        "sticker-detector": sticker_detector,
        "sticker-alignment": sticker_alignment,
        "sticker-traits": sticker_traits,
    }
)


def plan(name: str, changes: Sequence[str] = ()) -> TrainConfig:
    """The recipe called `name` with `key=value` changes applied."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(RECIPES)
        raise TrainingError(f"no recipe {name!r}; {hint}")
    return override(RECIPES[name](), changes)
