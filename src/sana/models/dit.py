"""The Linear DiT: one class for Sana (arXiv 2410.10629), Sana-1.5 and Sprint.

Attributes: `patch_embed.projection`, `time_embed.{input,output}`, `guidance_embed` (Sprint only),
`modulation`, `text_input`, `text_output`, `text_norm`, `refiner` (optional), `table`, `output`;
`blocks[i]`: `table`, `attention.{qkv,query_norm,key_norm,output}`,
`cross_attention.{query,key_value,query_norm,key_norm,output}`,
`feed_forward.{expand,depthwise,project}`.

Shape letters: B batch, N image tokens, T text tokens, C latent channels, D width, h w token grid.
Start at `LinearDiT.denoise`; precision is decided in `layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.config import DiTConfig
from sana.kernels import laid, ops, scaled
from sana.kernels.reference import FP8, Branch, Lone, Row, Rows
from sana.models.layers import (
    CrossAttention,
    GLUMBConv,
    LinearSelfAttention,
    PatchEmbed,
    RMSNorm,
    TimeEmbedding,
    mask_bias,
    position_table,
)
from sana.models.refiner import Refiner
from sana.models.rounding import Product, Scaled, product_dtype
from sana.models.sending import sent

TIME_SCALE = 1000.0
GUIDANCE_SCALE = 0.1
Replay: TypeAlias = Callable[..., Any]
"""Calls network(time, (), guidance) with the weights of a module; see `embed_times`."""
Residuals: TypeAlias = Callable[[int, Tensor], Tensor]
"""(number of blocks done, tokens [B,N,D]) -> tokens for the next block, or for the output."""


class Moment(NamedTuple):
    """What the network makes of a time, and of the guidance scale: alike for all pictures."""

    embedding: Tensor
    """(B or 1, D)."""
    modulation: Tensor
    """(B or 1, 6, D), for the blocks."""


class Prepared(NamedTuple):
    """All that the blocks make of a text, which no step changes; `prepare` makes it once."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    """For each block, keys and values (B, H, T, D / H), or as `laid.lay` makes them."""
    bias: Tensor | None
    """From `mask_bias`; with `laid.lay` how many tokens count (B,)."""
    lone: tuple[Tensor, ...] = ()
    """For each block what the first samples (L, 1, D) get, whose text is one token; then keys,
    values and bias are those of the others alone."""


class Open(NamedTuple):
    """Tokens (B, N, D) and what is still to be added to them, so that a norm can do both."""

    x: Tensor
    branch: Branch


class Stem(nn.Module):
    """What stands before the blocks: patches and positions, time, text; ControlNet has a copy."""

    blocks: nn.ModuleList

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.width
        self.patch_embed = PatchEmbed(config.latent_channels, dim, config.patch_size)
        self.time_embed = TimeEmbedding(dim)
        self.guidance_embed = TimeEmbedding(dim) if config.guidance_embedding else None
        self.modulation = nn.Linear(dim, 6 * dim)
        self.refiner = Refiner(config.refiner, config.text_dim) if config.refiner else None
        self.text_input = nn.Linear(config.text_dim, dim)
        self.text_output = nn.Linear(dim, dim)
        self.text_norm = RMSNorm(dim, scale=config.text_norm_scale)
        self._positions: tuple[object, Tensor] | None = None

    def embed_text(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """Text states (B, T, text_dim) -> (B, T, D); depends on the prompt alone."""
        text = text.to(self.text_input.weight.dtype)
        if self.refiner is not None:
            text = self.refiner(text, mask if mask is None else mask.to(text.device))
        embedded = self.text_output(F.gelu(self.text_input(text), approximate="tanh"))
        normed: Tensor = self.text_norm(embedded)
        return normed

    def prepare(
        self, embedded: Tensor, mask: Tensor | None, *, lone: int | None = None
    ) -> Prepared:
        """What the blocks make of `embed_text`'s result: for `denoise` in its place, every step.

        `lone` is what `lone_texts` says of them, where that is known. The mask is best on the CPU:
        on a device it is waited for, unless `lone` is given.
        """
        readers = [block.cross_attention for block in self.blocks if isinstance(block, Block)]
        alone: tuple[Tensor, ...] = ()
        count = lone_texts(embedded, mask) if lone is None else lone
        mask = mask if mask is None else sent(mask, embedded.device)
        if mask is not None and count:
            places = mask[:count].int().argmax(dim=1, keepdim=True)[..., None]
            tokens = embedded[:count].take_along_dim(places, dim=1)
            alone = tuple(reader.prepare_lone(tokens) for reader in readers)
            embedded, mask = embedded[count:], mask[count:]
        pairs = tuple(reader.prepare(embedded) for reader in readers)
        bias = mask_bias(mask, embedded.dtype)
        return Prepared(*(laid.lay(pairs, bias, mask) or (pairs, bias)), alone)

    def block_texts(
        self, text: Tensor | Prepared, mask: Tensor | None
    ) -> tuple[Sequence[Tensor | tuple[Tensor, ...]], Tensor | None]:
        """What each block reads, and the bias on its scores, prepared or not."""
        if isinstance(text, Prepared):
            if text.lone:
                pairs = zip(text.keys_values, text.lone, strict=True)
                return [(*own, lone) for own, lone in pairs], text.bias
            return text.keys_values, text.bias
        return [text] * len(self.blocks), mask_bias(mask, text.dtype)

    def embed_latent(self, latent: Tensor) -> Tensor:
        """Latent (B, C, H, W) -> tokens with their positions (B, h, w, D)."""
        x: Tensor = self.patch_embed(latent.to(self.patch_embed.projection.weight.dtype))
        if self.config.position_scale is not None:
            x = (x + self._position_table(x)).to(x.dtype)
        return x

    def embed_times(
        self, times: Tensor, guidance: float | None, *, replay: Replay | None = None
    ) -> dict[float, Moment]:
        """The moments of a schedule's times (S,), computed together, by their values.

        With `replay`, through that, as `sana.pipelines.graphs` does it.
        """
        told = sent(times, self.modulation.weight.device)
        scale = None if guidance is None else torch.full_like(told, guidance)
        if replay is None:
            embedding, modulation = self.embed_time(told, scale)
        else:
            embedding, modulation = replay(
                lambda time, _, scale: self.embed_time(time, scale), self, told, (), scale
            )
        rows = zip(times.tolist(), embedding.split(1), modulation.split(1), strict=True)
        return {time: Moment(own, six) for time, own, six in rows}

    def embed_time(self, time: Tensor, guidance: Tensor | None) -> Moment:
        """The moments of times (B,), on any device.

        Sprint takes its time unscaled, and the guidance scale beside it.
        """
        time = time.to(self.modulation.weight.device)
        if self.guidance_embed is None:
            scaled = time.float() * self.config.time_scale
            is_whole = self.config.time_scale == TIME_SCALE
            embedding = self.time_embed(_exact(scaled) if is_whole else scaled)
        else:
            if guidance is None:
                raise ValueError("guidance is None; this network embeds the scale: pass one")
            embedding = self.time_embed(time.float())
            scale = guidance.to(time.device).float() * GUIDANCE_SCALE
            embedding = embedding + self.guidance_embed(scale)
        return Moment(embedding, self.modulation(F.silu(embedding)).unflatten(-1, (6, -1)))

    def _position_table(self, x: Tensor) -> Tensor:
        """The table for x's grid, kept for the next call with the same grid and device."""
        key = (x.shape[1], x.shape[2], x.device)
        if self._positions is None or self._positions[0] != key:
            scale = self.config.position_scale or 1.0
            base = self.config.position_base
            height, width, device = key
            table = position_table(
                height, width, self.config.width, base=base, scale=scale, device=device
            )
            self._positions = (key, table)
        return self._positions[1]

    def initialize(self) -> None:
        """As Sana: Xavier for linears, small normals for embeddings."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("refiner"):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        small = [self.modulation, self.text_input, self.text_output]
        small += [self.time_embed.input, self.time_embed.output]
        if self.guidance_embed is not None:
            small += [self.guidance_embed.input, self.guidance_embed.output]
        for linear in small:
            nn.init.normal_(linear.weight, std=0.02)


class LinearDiT(Stem):
    """Predicts velocity (noise - image latent) from a noisy latent, its time and the text."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        dim = config.width
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.output = nn.Linear(dim, config.patch_size**2 * config.latent_channels)
        self.initialize()
        nn.init.zeros_(self.output.weight)

    @property
    def products(self) -> torch.dtype:
        """What the blocks' products have their weights in."""
        # Of one in the middle: the first and the last have no fp8.
        return product_dtype(self.blocks[len(self.blocks) // 2])

    def forward(
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        mask: Tensor | None,
        *,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity for latent (B, C, H, W) from raw text states (B, T, text_dim); see `denoise`."""
        return self.denoise(latent, time, self.embed_text(text, mask), mask, guidance=guidance)

    def denoise(
        self,
        latent: Tensor,
        time: Tensor | Moment,
        embedded: Tensor | Prepared,
        mask: Tensor | None,
        *,
        guidance: Tensor | None = None,
        residuals: Residuals | None = None,
        perturbed: int = 0,
        perturbed_blocks: Collection[int] = (),
    ) -> Tensor:
        """Velocity (B, C, H, W) in the latent's dtype; H and W are multiples of the patch size.

        time (B,) in [0, 1], 1 = pure noise, or one of `embed_times`; embedded (B, T, D) from
        `embed_text`, or what `prepare` made of it; mask (B, T), true where a text token counts
        (unread if prepared); guidance (B,) is the guidance scale, for Sprint only (unread with a
        moment); residuals come from a ControlNet. In `perturbed_blocks` the last `perturbed`
        samples attend each token to itself alone (perturbed-attention guidance).
        """
        x = self.embed_latent(latent)
        grid = x.shape[1:3]
        x = x.flatten(1, 2)  # (B, N, D)
        embedding, modulation = (
            time if isinstance(time, Moment) else self.embed_time(time, guidance)
        )
        texts, bias = self.block_texts(embedded, mask)
        # A compiler sees a block, and not what is left open for the next one.
        is_whole = any(block._compiled_call_impl is not None for block in self.blocks)
        fuses = ops.trains_norms(x, modulation) and not is_whole
        fuses = fuses or (not torch.is_grad_enabled() and ops.uses_triton(x))
        is_open = residuals is None and fuses
        whole: Tensor | Open = x
        del x
        for index, (block, text) in enumerate(zip(self.blocks, texts, strict=True)):
            alone = perturbed if index in perturbed_blocks else 0
            whole = block(whole, text, modulation, bias, grid, alone, is_open=is_open)
            if residuals is not None:
                assert isinstance(whole, Tensor)
                whole = residuals(index + 1, whole)
        # The output's modulation takes the embedding itself, before the SiLU.
        shift, scale = (Row(own, embedding) for own in self.table)
        tokens = self.output(normed(whole, shift, scale)[1])
        return self._unpatch(torch.unflatten(tokens, 1, grid)).to(latent.dtype)

    def _unpatch(self, x: Tensor) -> Tensor:
        """(B, h, w, p p C), channel fastest -> (B, C, h p, w p)."""
        p = self.config.patch_size
        x = torch.unflatten(x, -1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, p)
        return x.flatten(4, 5).flatten(2, 3)


def _exact(thousandths: Tensor) -> Tensor:
    """Whole numbers put right where fp32 missed them by its last digit; all others as they are.

    Ten of the 1000 integer times come out of t * 1000 a little off, and the fastest sinusoid turns
    that into an error of 3e-5. The derivative stays one everywhere.
    """
    near = thousandths.detach().round()
    exact = thousandths + (near - thousandths).detach()
    return torch.where((near - thousandths).abs() < 1e-4, exact, thousandths)


class Block(nn.Module):
    """Linear self-attention, cross-attention without norm or gate, mix-FFN; adaLN-single."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.width
        self.table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attention = LinearSelfAttention(config)
        self.cross_attention = CrossAttention(
            dim, config.cross_heads, qk_norm=config.qk_norm, norm_eps=config.cross_norm_eps
        )
        self.feed_forward = GLUMBConv(dim, config.mlp_width)

    def forward(
        self,
        x: Tensor | Open,
        text: Tensor | tuple[Tensor, ...],
        modulation: Tensor,
        bias: Tensor | None,
        grid: torch.Size,
        perturbed: int = 0,
        *,
        is_open: bool = False,
    ) -> Tensor | Open:
        """x (B, N, D), text (B, T, D), modulation (B or 1, 6, D), bias (B, 1, 1, T), grid (h, w).

        The text may be its keys and values for this block instead, from `CrossAttention.prepare`.
        In the last `perturbed` samples self-attention passes each token's own value on. With
        `is_open` the last sum is left to whoever reads the result.
        """
        rows = list(map(Row, self.table, modulation.unbind(1)))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = rows
        products = self.feed_forward.expand.weight.dtype
        x, mixed = normed(x, shift, scale, products)
        # Branches have no names here, so that none outlives its sum.
        if self._joins_lone(x, text):
            crossed = self._beside(x, self._attend(mixed, gate, perturbed), text, bias)
        else:
            x, asking = summed(x, self._attend(mixed, gate, perturbed), products)
            crossed = Open(x, Branch(self.cross_attention(asking, text, bias)))
            del asking
        x, mixed = normed(crossed, shift_mlp, scale_mlp, products)
        del crossed
        branch: Tensor = self.feed_forward(mixed.unflatten(1, grid)).flatten(1, 2)
        result = Open(x, Branch(branch, gate_mlp))
        return result if is_open else ops.add_branch(*result)

    def _attend(self, mixed: Tensor | Rows, gate: Row, perturbed: int) -> Branch:
        attended = self.attention(mixed, perturbed, clips=False)
        return Branch(attended, gate, self.attention.limit(attended.dtype))

    def _joins_lone(self, x: Tensor, text: Tensor | tuple[Tensor, ...]) -> bool:
        """Whether the last norm reads a lone text's rows where they are; see `reference.Lone`."""
        if not isinstance(text, tuple) or len(text) != 3:
            return False
        is_own = type(self.cross_attention.output) in (Product, Scaled)  # no adapter's
        return is_own and ops.joins_lone(x, text[2])

    def _beside(
        self, x: Tensor, attended: Branch, text: Tensor | tuple[Tensor, ...], bias: Tensor | None
    ) -> Open:
        """x with both attentions to be added; only the samples that read are summed before."""
        keys, values, row = text
        others = slice(len(row), None)
        products = self.feed_forward.expand.weight.dtype
        seen, asking = summed(x[others], attended.part(others), products)
        value = self.cross_attention(asking, (keys, values), bias)
        return Open(x, Branch(value, lone=Lone(row, attended, seen)))


def lone_texts(embedded: Tensor, mask: Tensor | None) -> int:
    """How many samples at the front have a text of one token, mask (B, T), but for the last one.

    So is the empty text of guidance, which stands first. 0 where they get no way of their own.
    Waits for the mask's device.
    """
    if mask is None or not ops.allows("lone_text") or not ops.uses_triton(embedded):
        return 0
    counts = mask.sum(dim=1).tolist()[:-1]
    return next((i for i, count in enumerate(counts) if count != 1), len(counts))


def normed(
    x: Tensor | Open, shift: Row, scale: Row, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | Rows]:
    """The tokens, summed if they were open, and their norm, for products in `dtype`."""
    if dtype == FP8:
        whole, branch = x if isinstance(x, Open) else (x, None)
        return scaled.add_and_scale(whole, branch, (shift, scale))
    if isinstance(x, Open):
        return ops.add_and_modulate(*x, shift, scale, dtype)
    return x, ops.modulate(x, shift, scale, dtype)


def summed(x: Tensor, branch: Branch, dtype: torch.dtype) -> tuple[Tensor, Tensor | Rows]:
    """The tokens with their branch, and the same as a product in `dtype` takes it."""
    if dtype == FP8:
        return scaled.add_and_scale(x, branch, None)
    return ops.add_and_round(x, branch)
