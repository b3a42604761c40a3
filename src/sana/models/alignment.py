"""Does a caption hold of a picture? A small image-text model whose every word makes a claim.

A residual network and two attention layers make tokens of the picture; a refiner binds colours and
places to nouns in the states of a frozen text encoder. Words find their regions by embeddings that
are trained to agree (after GLIP, Li et al. 2022), then look at the whole picture, and each answers
with the log-odds that what it says is there. A caption holds if all its claims do, so its score is
their soft minimum. Start reading at `Alignment.forward`.

B pictures, C captions, P pairs, K objects of a picture, N tokens of a picture, T of a caption, D
width. Precision: what autocast gives; scores and region-word products are fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.config import AlignmentConfig
from sana.models.detector import SIZE
from sana.models.layers import MASKED, CrossAttention, mask_bias
from sana.models.refiner import Refiner
from sana.models.residual import Normed, initialize, stages

EMBEDDING = 128
"""Width of the region and word embeddings."""
LIKELY, SCALE = 3.0, 14.0
"""Where claims start, and the factor on cosines of embeddings."""


class Words(NamedTuple):
    """A caption as the model reads it: tokens [C, T, D] and mask [C, T], true for real ones."""

    tokens: Tensor
    mask: Tensor


class Alignment(nn.Module):
    """Scores pairs of pictures and captions: over 0 where the caption is likelier to hold."""

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stem = Normed(3, config.stages[0], kernel=8, stride=4)
        self.stages = stages(config.stages, config.depths)
        self.tokens = nn.Linear(config.stages[-1], width)
        self.side = SIZE // 4 // 2 ** (len(config.stages) - 1)
        self.places = nn.Parameter(torch.randn(self.side**2, width) * 0.02)
        self.picture_layers = nn.ModuleList(
            Layer(config, sees=False) for _ in range(config.picture_layers)
        )
        self.picture_norm = nn.LayerNorm(width)
        self.refiner = Refiner(config.refiner, config.text_width)
        self.words = nn.Sequential(
            nn.LayerNorm(config.text_width), nn.Linear(config.text_width, width)
        )
        self.region = nn.Linear(width, EMBEDDING)
        self.word = nn.Linear(width, EMBEDDING)
        self.scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.found = nn.Linear(width, width)
        self.sureness = nn.Linear(1, width)
        self.layers = nn.ModuleList(Layer(config, sees=True) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.claim = nn.Linear(width, 1)
        initialize(self)
        nn.init.constant_(self.claim.bias, LIKELY)

    def forward(
        self, pictures: Tensor, states: Tensor, mask: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor, Words]:
        """Claims [P, T] of the pairs (picture, caption) in `pairs` [2, P], and what was read.

        Pictures (B, 3, 256, 256) in -1..1; `states` [C, T, text_width] and `mask` [C, T] are the
        text encoder's. The second and third results are for `regions` and `nouns`.
        """
        seen, words = self.look(pictures), self.read(states, mask)
        return self.claims(seen, words, pairs), seen, words

    def look(self, pictures: Tensor) -> Tensor:
        """Tokens [B, N, D] of pictures (B, 3, 256, 256) in -1..1."""
        x = self.stem(pictures.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
        x = self.tokens(x.flatten(2).transpose(1, 2)) + self.places
        for layer in self.picture_layers:
            x = layer(x, None, None)
        return torch.as_tensor(self.picture_norm(x))

    def read(self, states: Tensor, mask: Tensor) -> Words:
        """Captions from the text encoder's states [C, T, text_width]."""
        return Words(self.words(self.refiner(states, mask)), mask)

    def claims(self, seen: Tensor, words: Words, pairs: Tensor) -> Tensor:
        """Log-odds [P, T] that what each token says is there; large where there is no token."""
        picture, caption = pairs
        mask = words.mask[caption]
        x, bias = self.ground(seen, words, pairs), mask_bias(mask, words.tokens.dtype)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x = layer(x, bias, layer.prepare(seen, picture))
        claims = torch.as_tensor(self.claim(self.norm(x))).squeeze(-1).float()
        return claims.masked_fill(~mask, -MASKED)

    def ground(self, seen: Tensor, words: Words, pairs: Tensor) -> Tensor:
        """Tokens [P, T, D] of captions with what each finds in the picture, and how surely."""
        picture, caption = pairs
        regions = F.normalize(self.region(seen).float(), dim=-1)
        terms = F.normalize(self.word(words.tokens).float(), dim=-1)
        with torch.autocast(seen.device.type, enabled=False):
            alike = self.scale.float().exp() * terms[caption] @ regions[picture].mT  # [P, T, N]
        found = alike.softmax(-1).to(seen.dtype) @ seen[picture]
        sureness = self.sureness(alike.amax(-1, keepdim=True).to(seen.dtype))
        return torch.as_tensor(words.tokens[caption] + self.found(found) + sureness)

    def regions(self, seen: Tensor, points: Tensor) -> Tensor:
        """Unit embeddings [B, K, E] of the picture at points [B, K, 2], x and y in 0..1."""
        maps = seen.float().transpose(1, 2).unflatten(2, (self.side, self.side))
        grid = (points.float() * 2 - 1).unsqueeze(2)
        read = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
        at_points = read.squeeze(3).transpose(1, 2).to(seen.dtype)
        return F.normalize(self.region(at_points).float(), dim=-1)

    def nouns(self, words: Words, where: Tensor) -> Tensor:
        """Unit embeddings [C, K, E] of the tokens marked in `where` [C, K, T], averaged."""
        share = where.float() / where.sum(-1, keepdim=True).clamp_min(1)
        noun = share.to(words.tokens.dtype) @ words.tokens
        return F.normalize(self.word(noun).float(), dim=-1)

    def match(self, nouns: Tensor, regions: Tensor) -> Tensor:
        """How alike nouns and regions are, [W, R], from embeddings [W, E] and [R, E]."""
        with torch.autocast(nouns.device.type, enabled=False):
            return torch.as_tensor(self.scale.float().exp() * nouns @ regions.T)


class Layer(nn.Module):
    """Pre-norm self-attention, attention to a picture where it `sees` one, GELU MLP."""

    def __init__(self, config: AlignmentConfig, *, sees: bool) -> None:
        super().__init__()
        width = config.width
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = CrossAttention(width, config.heads, qk_norm=False, norm_eps=1e-6)
        self.cross_norm = nn.LayerNorm(width) if sees else None
        self.cross_attention = (
            CrossAttention(width, config.heads, qk_norm=False, norm_eps=1e-6) if sees else None
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def prepare(self, seen: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the pictures `picture` [P] among tokens `seen` [B, N, D]."""
        assert self.cross_attention is not None
        keys, values = self.cross_attention.prepare(seen)
        return keys[picture], values[picture]

    def forward(self, x: Tensor, bias: Tensor | None, seen: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [P, T, D], bias from `mask_bias`, seen from `prepare` -> [P, T, D]."""
        normed = self.self_norm(x)
        x = x + self.self_attention(normed, normed, None if bias is None else bias.to(normed.dtype))
        if self.cross_attention is not None and self.cross_norm is not None:
            assert seen is not None
            x = x + self.cross_attention(self.cross_norm(x), seen, None)
        return torch.as_tensor(x + self.mlp(x))


def score(claims: Tensor) -> Tensor:
    """Scores [P] of claims [P, T]: their soft minimum, -log sum exp(-claim)."""
    return -torch.logsumexp(-claims, dim=-1)
