"""Training the deep-compression autoencoder in the three phases of DC-AE (its section 3.3).

"full" trains everything on crops with L1 and a perceptual term; "latent" adapts the encoder's head
and the decoder's stem to large pictures; "refine" trains the decoder's head with PatchGAN. Optional
noise on the latent, in units of its channels' own deviation, teaches the decoder to forgive a
denoiser's errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sana.config import ModelConfig
from sana.data.stickers.stream import SceneStream, Studio, random_crops
from sana.distributed import Place
from sana.models.dcae import DCAE
from sana.models.patchgan import PatchGAN
from sana.training import losses, perceptual
from sana.training.config import TrainConfig
from sana.weights.save import save

SAMPLES = 8
CROPS = 4
"""Crops of each picture in a batch: drawing two for each took a fifth of the GPU's time."""
EXACT = 1e-5
"""Squared error (pictures in -1..1) under which a picture is as good as exact: 56 dB."""


class AutoencoderTask:
    """Trains `model`'s autoencoder on composed pictures."""

    def __init__(
        self, config: TrainConfig, model: ModelConfig, network: DCAE, studio: Studio, place: Place
    ) -> None:
        self.config, self.model, self.network, self.place = config, model, network, place
        self.studio = studio
        self.pool: list[Tensor] = []
        network.to(place.device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trained = _choose(network, config.autoencoder.phase)
        network.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        distance = None
        if config.autoencoder.perceptual:
            distance = perceptual.load(config.autoencoder.perceptual_file).to(place.device)
        self.generator = ReconstructionPhase(config, network, distance)
        self.phases: Sequence[Any] = (self.generator,)
        if config.autoencoder.phase == "refine":
            critic = CriticPhase(self.generator).to(place.device)
            self.generator.critic = critic.module
            self.phases = (self.generator, critic)

    def dataset(self) -> Dataset[Any]:
        return SceneStream(
            self.studio.composer,
            count=_scenes(self.config) * self.config.data.chunk,
            seed=self.config.seed,
            place=(self.place.rank, self.place.world),
            chunk=self.config.data.chunk,
            kinds=self.config.data.cycle(),
        )

    def warm_up(self, micro: int) -> int:
        return micro % self.config.data.chunk

    @torch.no_grad()
    def prepare(self, item: Any, *, is_warm_up: bool, generator: torch.Generator) -> Tensor:
        data = self.config.data
        if item is not None:
            drawn = self.studio.renderer.render(item, data.size)
            self.pool = list(drawn.split(_scenes(self.config)))
        images = self.pool.pop(0)
        if data.crop:
            chance = torch.Generator().manual_seed(generator.initial_seed())
            images = random_crops(images, _micro(self.config), data.crop, chance)
        return images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Pairs of original and reconstruction of held-out pictures."""
        draw = self.studio.composer.draw
        scenes = [draw(i, seed=1, split="held_out") for i in range(SAMPLES)]
        images = self.studio.renderer.render(scenes, self.config.data.size)
        return torch.stack([images, self.network(images).float()], 1).flatten(0, 1)

    def export(self, folder: Path) -> None:
        autoencoder = self.network.config
        if self.config.autoencoder.phase in ("full", "latent"):
            mean, scale = self.measure()
            autoencoder = dataclasses.replace(autoencoder, latent_mean=mean, latent_scale=scale)
        save(
            folder,
            autoencoder=self.network,
            config=dataclasses.replace(self.model, autoencoder=autoencoder),
            recipe=self.config,
            data=self.studio.version,
        )

    @torch.no_grad()
    def measure(self, batches: int = 16) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and 1/deviation of each latent channel over training pictures."""
        stream = SceneStream(
            self.studio.composer, count=32, seed=self.config.seed + 1, place=(0, 1)
        )
        latents = []
        for index in range(batches if self.place.device.type == "cuda" else 2):
            images = self.studio.renderer.render(stream.draw(index), self.config.data.size)
            latents.append(self.network.encode(images).float())
        values = torch.cat(latents).transpose(0, 1).flatten(1)
        scale = values.std(1).clamp_min(1e-4).reciprocal()
        return tuple(values.mean(1).tolist()), tuple(scale.tolist())


class ReconstructionPhase:
    """L1 + squared + perceptual (+ adversarial) loss of the round trip."""

    name = "autoencoder"

    def __init__(self, config: TrainConfig, network: DCAE, distance: nn.Module | None) -> None:
        self.config = config.autoencoder
        self.crops = CROPS if _scenes(config) * CROPS == _micro(config) else 1
        self.module: nn.Module = RoundTrip(network)
        self.distance = distance
        self.critic: nn.Module | None = None

    def loss(self, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        strength = torch.rand((), generator=generator, device=batch.device)
        noise = self.config.latent_noise * strength
        rebuilt = losses.as_seen(self.module(batch, noise, generator).float())
        absolute = (rebuilt - batch).abs().mean()
        squares = (rebuilt - batch).square().mean((1, 2, 3))
        squared = squares.mean()
        # Crops lie as `random_crops` takes them, the pictures in turn.
        logarithm = (squares.unflatten(0, (self.crops, -1)).mean(0) + EXACT).log().mean()
        loss = absolute + self.config.squared * squared + self.config.log_squared * logarithm
        found = {"loss": loss, "l1": absolute, "mse": squared}
        found["psnr"] = -10 / math.log(10) * (logarithm.detach() - math.log(4))
        if self.distance is not None:
            crop = min(self.config.perceptual_crop, batch.shape[-1])
            top, left = _corner(batch.shape[-1] - crop, generator)
            views = [x[..., top : top + crop, left : left + crop] for x in (batch, rebuilt)]
            found["perceptual"] = self.distance(*views)
            found["loss"] = found["loss"] + self.config.perceptual * found["perceptual"]
        if self.critic is not None:
            self.critic.requires_grad_(False)
            found["adversarial"] = losses.hinge_generator(self.critic(rebuilt).float())
            found["loss"] = found["loss"] + self.config.adversarial * found["adversarial"]
            self.critic.requires_grad_(True)
        return found


class CriticPhase:
    """PatchGAN's side: tells pictures from their reconstructions."""

    name = "critic"

    def __init__(self, generator: ReconstructionPhase) -> None:
        self.generator = generator
        self.module: nn.Module = PatchGAN()

    def to(self, device: torch.device) -> CriticPhase:
        self.module.to(device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def loss(self, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            rebuilt = self.generator.module(batch, torch.zeros((), device=batch.device), generator)
        scores = self.module(torch.cat([batch, rebuilt.to(batch.dtype)])).float()
        real, fake = scores.chunk(2)
        return {"loss": losses.hinge_critic(real, fake)}


class RoundTrip(nn.Module):
    """decode(encode(images) + noise); only the network's weights are its state."""

    def __init__(self, network: DCAE) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        latent = self.network.encode(images)
        deviation = latent.float().std((0, 2, 3), keepdim=True).to(latent.dtype)
        drawn = torch.randn(latent.shape, generator=generator, device=latent.device)
        return torch.as_tensor(self.network.decode(latent + drawn * deviation * noise))


def _micro(config: TrainConfig) -> int:
    """Pictures, or crops of them, of a micro-batch."""
    return config.data.batch // config.data.accumulate


def _scenes(config: TrainConfig) -> int:
    """Pictures of a micro-batch; `CROPS` crops are taken from each."""
    return max(1, _micro(config) // CROPS) if config.data.crop else _micro(config)


def _choose(network: DCAE, phase: str) -> list[nn.Module]:
    if phase == "full":
        return [network]
    if phase == "latent":
        return [network.encoder.head, network.decoder.stem]
    if phase == "decoder":
        return [network.decoder]
    last = next(s for s in network.decoder.stages if isinstance(s, nn.Sequential) and len(s))
    return [last, network.decoder.norm, network.decoder.head]


def _corner(room: int, generator: torch.Generator) -> tuple[int, int]:
    """Drawn on the CPU, so that nothing waits for the GPU."""
    chance = torch.Generator().manual_seed(generator.initial_seed() ^ 1)
    top, left = torch.randint(0, room + 1, (2,), generator=chance).tolist()
    return int(top), int(left)
