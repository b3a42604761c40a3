"""Training the sticker alignment: does this caption hold of this picture?

Pictures come in pairs that differ in one thing (`data/stickers/twins`). Each is asked about its own
caption, its twin's and a stranger's (sigmoid loss over their scores); in each, a noun's claim must
be true where the picture has that thing, in that colour and number; and each noun must find the
regions of the whole batch that show it. Pictures are softened as the detector's are. B pictures and
captions, 2 n and 2 n + 1 twins; K objects, T tokens.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from sana.config import to_json
from sana.data.stickers.compose import Composer
from sana.data.stickers.render import SceneTensors
from sana.data.stickers.scene import COLORS, SLOTS, Scene
from sana.data.stickers.stream import Studio
from sana.data.stickers.twins import CHANGES, Twins, draw_twins
from sana.distributed import Place, unwrap
from sana.models.alignment import Alignment, Words, score
from sana.models.detector import fit
from sana.models.layers import MASKED
from sana.models.text import MiniLM, PromptTokenizer
from sana.training.config import TrainConfig
from sana.training.softening import soften
from sana.training.tasks.detector import Targets, to_targets
from sana.weights.files import to_bytes, write_whole

STREAM = 0xA1167
"""Added to the seed, so that no picture is one that another network was trained on."""
MEASURED = 0x3EA5
"""Added to the seed of the pictures that measure the model."""
MEASURE, CHUNK = 600, 50
"""Pairs that measure the model at the end of a run, and how many at once."""
REGION_WEIGHT = 0.5
JITTER = 1 / 32
"""How far from its centre an object is read, in fractions of the picture."""


class Item(NamedTuple):
    """Micro-batch of twins: scenes, truth, token ids and mask [B, T], and what the nouns say.

    nouns [B, K, T]: the tokens that name object k. said [B, K]: its colour if the caption says one,
    else -1.
    """

    scenes: SceneTensors
    targets: Targets
    ids: Tensor
    mask: Tensor
    nouns: Tensor
    said: Tensor


class Batch(NamedTuple):
    pictures: Tensor  # [B, 3, 256, 256] in -1..1
    states: Tensor  # [B, T, W]
    mask: Tensor  # [B, T]
    targets: Targets
    nouns: Tensor
    said: Tensor


class AlignmentTask:
    """Trains `network` over the frozen `text` encoder's states; `source` says whose that is."""

    def __init__(
        self,
        config: TrainConfig,
        network: Alignment,
        text: MiniLM,
        studio: Studio,
        place: Place,
        source: str,
    ) -> None:
        self.config, self.studio, self.place = config, studio, place
        self.text, self.source = text.to(place.device), source
        self.network = network.to(place.device)
        if config.compile:
            self.network.compile()
        self.phases: Sequence[AlignmentPhase] = (AlignmentPhase(self.network),)

    def dataset(self) -> Dataset[Item]:
        data = self.config.data
        return TwinScenes(
            self.studio.composer,
            self.text.tokenizer,
            count=data.batch // data.accumulate,
            tokens=data.tokens,
            seed=self.config.seed + STREAM,
            place=(self.place.rank, self.place.world),
        )

    def warm_up(self, micro: int) -> int:
        return 0

    @torch.no_grad()
    def prepare(self, item: Item, *, is_warm_up: bool, generator: torch.Generator) -> Batch:
        device = self.place.device
        pictures = fit(self.studio.renderer.render(item.scenes, self.config.data.size))
        targets = Targets(*(t.to(device, non_blocking=True) for t in item.targets))
        pictures, box = soften(pictures, targets.box, generator)
        return self._batch(pictures, item, targets._replace(box=box))

    def _batch(self, pictures: Tensor, item: Item, targets: Targets) -> Batch:
        rest = (item.ids, item.mask, item.nouns, item.said)
        ids, mask, nouns, said = (t.to(self.place.device, non_blocking=True) for t in rest)
        with self._autocast():
            states = self.text.states(ids, mask)
        return Batch(pictures, states, mask, targets, nouns, said)

    def _autocast(self) -> torch.autocast:
        is_bf16 = self.config.precision == "bf16"
        return torch.autocast(self.place.device.type, dtype=torch.bfloat16, enabled=is_bf16)

    def sample(self) -> None:
        return None

    def export(self, folder: Path) -> None:
        """Write `folder/alignment.safetensors`; print how often it tells new twins apart."""
        quality = self.measure(min(MEASURE, 8 * self.config.data.batch))
        for change, share in quality.items():
            line = f"held-out {change}: {share:.3f} of the twins told apart"
            print(line, file=sys.stderr, flush=True)
        network = unwrap(self.network)
        assert isinstance(network, Alignment)
        header = {
            "kind": "alignment",
            "config": to_json(network.config),
            "text": self.source,
            "tokens": self.config.data.tokens,
            "data": self.studio.version,
            "recipe": to_json(self.config),
            "told_apart": quality,
        }
        slim = {
            name: tensor.half() if tensor.dim() > 1 else tensor
            for name, tensor in network.state_dict().items()
        }
        write_whole({folder / "alignment.safetensors": to_bytes(slim, header)})

    @torch.no_grad()
    def measure(self, pairs: int) -> dict[str, float]:
        """Share of pictures of held-out twins whose own caption beats the twin's, by change."""
        right, total = Counter[str](), Counter[str]()
        network, was_training = self.network, self.network.training
        network.eval()
        for start in range(0, pairs, CHUNK):
            twins = [
                draw_twins(
                    self.studio.composer, n, seed=self.config.seed + MEASURED, split="held_out"
                )
                for n in range(start, min(start + CHUNK, pairs))
            ]
            item = to_item(
                self.studio.composer, self.text.tokenizer, twins, self.config.data.tokens
            )
            pictures = fit(self.studio.renderer.render(item.scenes, self.config.data.size))
            batch = self._batch(pictures, item, item.targets)
            with self._autocast():
                claims, _, _ = network(
                    batch.pictures, batch.states, batch.mask, pairs_of(len(pictures), pictures)
                )
            own, other, _ = score(claims).chunk(3)
            for index, is_right in enumerate((own > other).tolist()):
                for name in (twins[index // 2].change, "all"):
                    total[name] += 1
                    right[name] += is_right
        network.train(was_training)
        return {name: right[name] / total[name] for name in (*CHANGES, "all") if total[name]}


class AlignmentPhase:
    """Sigmoid loss of pairs, and of nouns against regions."""

    name = "alignment"

    def __init__(self, network: Alignment) -> None:
        self.module: torch.nn.Module = network

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        count = len(batch.pictures)
        pairs = pairs_of(count, batch.pictures)
        claims, seen, words = self.module(batch.pictures, batch.states, batch.mask, pairs)
        own, other, stranger = score(claims).chunk(3)
        # A third of the pairs is right; all three kinds weigh alike.
        pair = (F.softplus(-own) + F.softplus(other) + F.softplus(stranger)).mean()
        network = unwrap(self.module)
        assert isinstance(network, Alignment)
        region = region_loss(network, seen, words, batch, generator)
        noun = noun_loss(claims, batch, pairs)
        return {
            "loss": pair + noun + REGION_WEIGHT * region,
            "pair": pair,
            "noun": noun,
            "region": region,
            "told_apart": (own > other).float().mean(),
            "accuracy": torch.stack([own > 0, other < 0, stranger < 0]).float().mean(),
        }


class TwinScenes(Dataset[Item]):
    """Item i: the twins of micro-batch i, of both splits; `count` pictures, an even number."""

    def __init__(
        self,
        composer: Composer,
        tokenizer: PromptTokenizer,
        *,
        count: int,
        tokens: int,
        seed: int,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        self.composer, self.tokenizer = composer, tokenizer
        self.pairs, self.tokens, self.seed, self.place = count // 2, tokens, seed, place

    def __getitem__(self, item: int) -> Item:
        rank, world = self.place
        first = (item * world + rank) * self.pairs
        twins = [
            draw_twins(self.composer, first + number, seed=self.seed)
            for number in range(self.pairs)
        ]
        return to_item(self.composer, self.tokenizer, twins, self.tokens)


def to_item(
    composer: Composer, tokenizer: PromptTokenizer, twins: Sequence[Twins], tokens: int
) -> Item:
    """Twins as CPU tensors, the two of a pair in neighbouring rows."""
    scenes = [scene for pair in twins for scene in (pair.first, pair.second)]
    captions = [scene.caption for scene in scenes]
    ids, mask, offsets = tokenizer.tokenize_with_offsets(captions, tokens)
    nouns = torch.zeros(len(scenes), SLOTS, tokens, dtype=torch.bool)
    said = torch.full((len(scenes), SLOTS), -1)
    for row, scene in enumerate(scenes):
        for start, end, index in scene.spans:
            inside = (offsets[row, :, 0] < end) & (offsets[row, :, 1] > start) & mask[row]
            nouns[row, index] |= inside
            said[row, index] = _color(scene, index)
    targets = to_targets(composer.concepts, scenes)
    return Item(composer.to_tensors(scenes), targets, ids, mask, nouns, said)


def pairs_of(count: int, like: Tensor) -> Tensor:
    """(picture, caption) [2, 3 B]: its own, its twin's, a stranger's, on the device of `like`."""
    rows = torch.arange(count, device=like.device)
    captions = torch.cat([rows, rows ^ 1, (rows + 2) % count])
    return torch.stack([rows.repeat(3), captions])


def region_loss(
    network: Alignment, seen: Tensor, words: Words, batch: Batch, generator: torch.Generator
) -> Tensor:
    """Every noun of the batch finds its regions, and every region its nouns (InfoNCE).

    A region is what a noun says if it shows that concept, in the colour if one is said; of several
    right ones the mean counts (SupCon, Khosla et al. 2020, eq. 2).
    """
    box, concept = batch.targets.box, batch.targets.concept
    centers = (box[..., :2] + box[..., 2:]) / 2
    noise = torch.rand(centers.shape, generator=generator, device=centers.device) * 2 - 1
    regions = network.regions(seen, centers + noise * JITTER).flatten(0, 1)
    nouns = network.nouns(words, batch.nouns).flatten(0, 1)
    alike = network.match(nouns, regions)  # [B K, B K]
    concept, color = concept.flatten(), batch.targets.color.flatten()
    said, real = batch.said.flatten(), concept >= 0
    named = batch.nouns.any(-1).flatten() & real
    fits = (concept[:, None] == concept) & ((said[:, None] < 0) | (said[:, None] == color))
    fits = fits & named[:, None] & real
    return (_found(alike, fits, real) + _found(alike.T, fits.T, named)) / 2


def _found(alike: Tensor, fits: Tensor, among: Tensor) -> Tensor:
    """Mean over rows with a right column of -log softmax over the columns `among`."""
    chance = alike.masked_fill(~among, MASKED).log_softmax(-1)
    count = fits.sum(-1)
    each = -(chance * fits).sum(-1) / count.clamp_min(1)
    return each.sum() / (count > 0).sum().clamp_min(1)


def noun_loss(claims: Tensor, batch: Batch, pairs: Tensor) -> Tensor:
    """Sigmoid loss of the nouns' claims [P, T]: true where thing, stated colour and number agree.

    A noun's claim is the mean over its tokens.
    """
    picture, caption = pairs
    concept, color = batch.targets.concept, batch.targets.color
    asked, said, nouns = concept[caption], batch.said[caption], batch.nouns[caption]
    is_there = concept[picture][:, None] == asked[..., None]  # [P, nouns, objects]
    has_color = color[picture][:, None] == said[..., None]
    have = (is_there & ((said < 0)[..., None] | has_color)).sum(-1)
    wanted = (asked[:, None] == asked[..., None]).sum(-1)
    counted = nouns.any(-1) & (asked >= 0)
    sign = torch.where(have == wanted, 1.0, -1.0)
    share = nouns.float() / nouns.sum(-1, keepdim=True).clamp_min(1)
    claim = (share @ claims[..., None]).squeeze(-1)
    return (F.softplus(-sign * claim) * counted).sum() / counted.sum().clamp_min(1)


def _color(scene: Scene, index: int) -> int:
    color = scene.objects[index].color
    return COLORS.index(color) if color in COLORS else -1
