"""Training the Linear DiT by rectified flow on latents of composed pictures (Sana, section 2.4).

Pictures are drawn, encoded by the frozen autoencoder and read by the frozen text encoder as the run
goes on; each latent is used `data.reuse` times from a ring, because composing and encoding cost
more than a step. The ring's content is a function of the position in the stream, so a resumed run
refills it and goes on exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sana.config import ModelConfig
from sana.data.stickers.stream import CaptionedScenes, SceneStream, Studio
from sana.distributed import Place, unwrap
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.models.text import MiniLM
from sana.samplers import Text, dpm, flow_times, guided, run
from sana.training import losses
from sana.training.config import TrainConfig
from sana.weights.save import save

SAMPLE_GUIDANCE = 4.0


@dataclass(frozen=True, slots=True)
class FlowBatch:
    """Normalized latents (B, C, h, w), text states (B, T, W) and their mask (B, T)."""

    latents: Tensor
    states: Tensor
    mask: Tensor


class FlowTask:
    """Trains `network` on what `frozen` autoencoder and text encoder make of composed scenes."""

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        network: LinearDiT,
        frozen: tuple[DCAE, MiniLM],
        studio: Studio,
        place: Place,
    ) -> None:
        self.config, self.model, self.place, self.studio = config, model, place, studio
        self.autoencoder, self.text = frozen
        self.autoencoder.requires_grad_(False).to(place.device)
        self.autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.precision == "bf16":
            # Under autocast norms keep fp32 weights, and then no kernel takes them: in pieces they
            # were most of the launches of a run.
            self.autoencoder.encoder.to(torch.bfloat16)
        self.text.to(place.device)
        network.to(place.device)
        self.null = self._read_null()
        self.phase = FlowPhase(config, network, self.null)
        micro = config.data.batch // config.data.accumulate
        self.ring = Ring(config.data.ring, micro) if config.data.reuse > 1 else None
        self.pool: list[FlowBatch] = []

    @property
    def phases(self) -> Sequence[FlowPhase]:
        return (self.phase,)

    def dataset(self) -> Dataset[Any]:
        data = self.config.data
        return SceneStream(
            self.studio.composer,
            count=self._fresh(),
            chunk=data.chunk,
            seed=self.config.seed,
            place=(self.place.rank, self.place.world),
            tokenizer=self.text.tokenizer,
            tokens=data.tokens,
            kinds=data.cycle(),
        )

    def _fresh(self) -> int:
        """New pictures of a chunk."""
        data = self.config.data
        return max(1, data.batch // data.accumulate * data.chunk // data.reuse)

    def warm_up(self, micro: int) -> int:
        """Items that fill the ring: four batches at the start, up to the whole ring later."""
        chunk = self.config.data.chunk
        if self.ring is None:
            return micro % chunk
        start = -(-4 * self.ring.batch // self._fresh()) * chunk
        kept = (self.ring.size // self._fresh()) * chunk
        seen = start + micro
        return min(seen, kept + seen % chunk)

    @torch.no_grad()
    def prepare(
        self, item: CaptionedScenes | None, *, is_warm_up: bool, generator: torch.Generator
    ) -> FlowBatch | None:
        if self.ring is None:
            if item is not None:
                self.pool = _split(self.encode(item), self.config.data.chunk)
            return self.pool.pop(0)
        if item is not None:
            self.ring.put(self.encode(item), item.number)
        return None if is_warm_up else self.ring.draw(generator)

    @torch.no_grad()
    def encode(self, item: CaptionedScenes) -> FlowBatch:
        """Draw the pictures and pass them and their captions through the frozen encoders."""
        device = self.place.device
        images = self.studio.renderer.render(item.scenes, self.config.data.size)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            latents = self.autoencoder.normalize(self.autoencoder.encode(images).float())
            mask = item.mask.to(device, non_blocking=True)
            ids = item.ids.to(device, non_blocking=True)
            states = self.text.states(ids, mask)
        keep = torch.float16 if device.type == "cuda" else torch.float32
        return FlowBatch(latents.contiguous().to(keep), states.to(keep), mask)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Held-out prompts drawn with the current weights."""
        scenes = [self.studio.composer.draw(i, seed=1, split="held_out") for i in range(16)]
        return self.pictures([scene.caption for scene in scenes], seed=0, steps=16)

    @torch.no_grad()
    def pictures(self, prompts: Sequence[str], *, seed: int, steps: int) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 for the prompts, with guidance."""
        device, network = self.place.device, unwrap(self.phase.module)
        assert isinstance(network, LinearDiT)
        ids, mask = self.text.tokenize(prompts, self.config.data.tokens)
        ids, mask = ids.to(device), mask.to(device)
        null_states, null_mask = (x.expand(len(prompts), *x.shape[1:]) for x in self.null)
        with torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            states = self.text.states(ids, mask)
            denoise = guided(
                network.denoise,
                Text(states=network.embed_text(states, mask), mask=mask),
                Text(states=network.embed_text(null_states, null_mask), mask=null_mask),
                SAMPLE_GUIDANCE,
            )
            side = self.config.data.size // self.model.autoencoder.factor
            shape = (len(prompts), self.model.dit.latent_channels, side, side)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
            latent = noise
            for step in run(dpm(noise, flow_times(steps, self.config.flow.shift)), denoise):
                latent = step.latent
            decoded = [
                self.autoencoder.decode(self.autoencoder.denormalize(part)).float()
                for part in latent.split(16)
            ]
        return torch.cat(decoded)

    def export(self, folder: Path) -> None:
        save(
            folder,
            dit=unwrap(self.phase.module),
            config=self.model,
            recipe=self.config,
            data=self.studio.version,
        )

    def _read_null(self) -> tuple[Tensor, Tensor]:
        ids, mask = self.text.tokenize([""], self.config.data.tokens)
        device = self.place.device
        with torch.no_grad():
            return self.text.states(ids.to(device), mask.to(device)).float(), mask.to(device)


class FlowPhase:
    """E |v(x_t, t, text) - (noise - x_0)|^2 with caption dropout (Sana, section 2.4)."""

    name = "flow"

    def __init__(
        self, config: TrainConfig, network: nn.Module, null: tuple[Tensor, Tensor]
    ) -> None:
        self.config, self.null = config.flow, null
        self.module = network

    def loss(self, batch: FlowBatch, generator: torch.Generator) -> dict[str, Tensor]:
        clean = batch.latents.float()
        device = clean.device
        time = losses.draw_times(
            self.config.times,
            len(clean),
            shift=self.config.shift,
            generator=generator,
            device=device,
        )
        noise = torch.randn(clean.shape, generator=generator, device=device)
        dropped = torch.rand(len(clean), generator=generator, device=device) < self.config.dropout
        states, mask = self.null
        states = torch.where(dropped[:, None, None], states, batch.states.float())
        mask = torch.where(dropped[:, None], mask, batch.mask)
        velocity = self.module(losses.add_noise(clean, noise, time), time, states, mask)
        error = (velocity.float() - losses.flow_velocity(clean, noise)).square().mean((1, 2, 3))
        # The part at high noise follows composition, the part at low noise follows detail.
        high = (time > 0.5).float()
        return {
            "loss": error.mean(),
            "high_noise": (error * high).sum().detach() / high.sum().clamp_min(1),
            "low_noise": (error * (1 - high)).sum().detach() / (1 - high).sum().clamp_min(1),
        }


class Ring:
    """The last `size` latents with their text; the oldest give way to new ones.

    Where a chunk is kept depends on its number alone, so a refilled ring is the same ring.
    """

    def __init__(self, size: int, batch: int) -> None:
        self.size, self.batch, self.full = size, batch, 0
        self.store: FlowBatch | None = None

    def put(self, fresh: FlowBatch, number: int) -> None:
        """Keep chunk `number`; all chunks are of one size."""
        parts = _parts(fresh)
        count = len(parts[0])
        size = self.size // count * count
        if self.store is None:
            self.store = FlowBatch(*(part.new_empty(size, *part.shape[1:]) for part in parts))
        start = number * count % size
        for kept, part in zip(_parts(self.store), parts, strict=True):
            kept[start : start + count] = part
        self.full = min((number + 1) * count, size)

    def draw(self, generator: torch.Generator) -> FlowBatch:
        """A batch of what is kept, with replacement."""
        assert self.store is not None
        device = self.store.mask.device
        chosen = torch.randint(0, self.full, (self.batch,), generator=generator, device=device)
        return FlowBatch(*(part[chosen] for part in _parts(self.store)))


def _split(batch: FlowBatch, count: int) -> list[FlowBatch]:
    parts = [part.chunk(count) for part in _parts(batch)]
    return [FlowBatch(*pieces) for pieces in zip(*parts, strict=True)]


def _parts(batch: FlowBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.latents, batch.states, batch.mask
