"""How many bytes a model's networks take and how many its work takes, from its config alone.

Weights are counted exactly. Activations follow from which maps and tokens are alive at the widest
moment of each network in inference; tests hold them against torch's own account, from never less
than 0.97 to at most 1.25 of it. Nothing here imports torch. Start reading at `weights` and `work`.

In the formulas: D width, F hidden width, N tokens, C channels, e bytes of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

from sana.config import (
    ControlNetConfig,
    DCAEConfig,
    DiTConfig,
    ModelConfig,
    RefinerConfig,
    StageConfig,
    TextConfig,
)
from sana.kernels.proven import Way

NORM_VALUES = 2**22
STRIP_VALUES = 2**26
"""Values that a DC-AE norm and an enlarging convolution hold at a time, as `sana.models.dcae`."""
SINUSOIDS = 256
GEMMA_HEAD_DIM = 256
TEXT_BLOCK = 64
"""Texts are padded to multiples of so many tokens on CUDA, as `sana.pipelines.denoising` does."""
INSTRUCTION_TOKENS = 210
"""About what Gemma reads before the prompt (family-spec section 4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Bytes of one value of each network's weights, and by which ways kernels compute, if any."""

    text: int = 2
    dit: int = 2
    autoencoder: int = 2
    ways: frozenset[Way] = frozenset()
    in_fp8: bool = False
    """Whether the large products of the transformer's inner blocks have their weights in fp8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Bytes of each network's weights, and the least that must be there when they stream."""

    text: int
    dit: int
    autoencoder: int
    text_streamed: int
    dit_streamed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """What is drawn: pixels of the picture, and how many samples the network sees at once."""

    width: int
    height: int
    batch: int = 2
    """2 with guidance, 1 without, 3 with perturbed-attention guidance on top."""
    encodes: bool = False
    """Whether a picture goes in (image-to-image, ControlNet)."""


def weights(config: ModelConfig, widths: Widths) -> Weights:
    """Bytes of the weights of `config`; streamed, two blocks at a time and what is outside them."""
    dit, text = dit_parameters(config.dit), text_parameters(config.text)
    dit_blocks = config.dit.depth * block_parameters(config.dit)
    dit_least = dit - dit_blocks + 2 * block_parameters(config.dit)
    if config.controlnet is not None:
        dit += controlnet_parameters(config.controlnet)
        dit_least += controlnet_parameters(config.controlnet)
    saved = fp8_saving(config.dit, widths.dit) if widths.in_fp8 else 0
    scaled = len(config.dit.inner_blocks)
    layer = text_layer_parameters(config.text)
    table = config.text.vocabulary * config.text.width
    text_least = text - table - config.text.layers * layer + 2 * layer
    return Weights(
        text=text * widths.text,
        dit=dit * widths.dit - scaled * saved,
        autoencoder=autoencoder_parameters(config.autoencoder) * widths.autoencoder,
        text_streamed=text_least * widths.text,
        # There is room for two of the largest blocks, which have no fp8 where any has none.
        dit_streamed=dit_least * widths.dit - (0 if scaled < config.dit.depth else 2 * saved),
    )


def dit_parameters(c: DiTConfig) -> int:
    """Of the whole transformer."""
    head = 2 * c.width + _linear(c.width, c.patch_size**2 * c.latent_channels)
    return _stem(c) + c.depth * block_parameters(c) + head


def block_parameters(c: DiTConfig) -> int:
    """Of one block of the transformer."""
    dim, hidden = c.width, c.mlp_width
    attention = 3 * dim * dim + _linear(dim, dim) + (2 * dim if c.qk_norm else 0)
    cross = 2 * _linear(dim, dim) + _linear(dim, 2 * dim) + (2 * dim if c.qk_norm else 0)
    return 6 * dim + attention + cross + _glumbconv(dim, hidden)


def fp8_saving(c: DiTConfig, width: int) -> int:
    """Bytes that fp8 saves in a block, against `width` bytes a value; its scales are counted."""
    dim, hidden = c.width, c.mlp_width
    values = 6 * dim * dim + 3 * dim * hidden
    rows = 3 * dim + 4 * dim + 2 * hidden
    return values * (width - 1) - 4 * rows


def controlnet_parameters(c: ControlNetConfig) -> int:
    """Of a ControlNet: its stem, its blocks, and a linear before and after each."""
    linears = (1 + c.depth) * _linear(c.dit.width, c.dit.width)
    return _stem(c.dit) + c.depth * block_parameters(c.dit) + linears


def autoencoder_parameters(c: DCAEConfig) -> int:
    """Of encoder and decoder."""
    return _encoder(c) + _decoder(c)


def text_parameters(c: TextConfig) -> int:
    """Of the text encoder without a head."""
    table = c.vocabulary * c.width
    if c.kind == "gemma2":
        return table + c.width + c.layers * text_layer_parameters(c)
    embeddings = table + c.max_tokens * c.width + c.width + 2 * c.width
    return embeddings + c.layers * text_layer_parameters(c)


def text_layer_parameters(c: TextConfig) -> int:
    """Of one layer of the text encoder."""
    if c.kind == "gemma2":
        # Half as many keys and values as queries; a gated MLP; four norms; no biases.
        attention = 3 * c.width * c.heads * GEMMA_HEAD_DIM
        return attention + 3 * c.width * c.mlp_width + 4 * c.width
    attention = 4 * _linear(c.width, c.width)
    return attention + _linear(c.width, c.mlp_width) + _linear(c.mlp_width, c.width) + 4 * c.width


def text_work(c: TextConfig, width: int) -> int:
    """Bytes that reading one prompt takes: the MLP's maps, and the scores, which are in fp32."""
    tokens = c.max_tokens + (INSTRUCTION_TOKENS if c.kind == "gemma2" else 0)
    mlp = tokens * (4 * c.mlp_width * width + 6 * c.width * 4)
    return mlp + c.heads * tokens**2 * (2 * width + 4)


def dit_work(c: DiTConfig, canvas: Canvas, factor: int, width: int) -> int:
    """Bytes that one evaluation of the transformer takes.

    In half precision linear attention is the widest moment, since its sums run in fp32; in fp32
    the mix-FFN is.
    """
    tokens = canvas.width * canvas.height // (factor * c.patch_size) ** 2
    units = 13.0 if width == 4 else 15.3 + (2.0 if c.qk_norm else 0.0)
    positions = 4 * tokens * c.width if c.position_scale is not None else 0
    return int(units * canvas.batch * tokens * c.width * width) + positions


def graph_bytes(c: ModelConfig, canvas: Canvas, widths: Widths) -> int:
    """Bytes that CUDA graphs of a step hold: the text for every block, and their work.

    The graph that prepares the text shares the step's memory, and makes the text there first.
    """
    tokens = -(-c.text.max_tokens // TEXT_BLOCK) * TEXT_BLOCK
    texts = 2 * canvas.batch * tokens * c.dit.width * c.dit.depth * widths.dit
    return texts + max(texts, dit_work(c.dit, canvas, c.autoencoder.factor, widths.dit))


def widest(c: DCAEConfig) -> float:
    """The most values that a map between two layers holds for each pixel of the picture."""
    return max(
        float(stage.width) / (1 << 2 * index)
        for stages in (c.encoder, c.decoder)
        for index, stage in enumerate(stages)
        if stage.depth
    )


def decode_work(
    c: DCAEConfig, width: int, height: int, value: int, ways: frozenset[Way] = frozenset()
) -> int:
    """Bytes that decoding a picture of width x height in one piece takes; `value` bytes a value.

    `ways` are those that kernels compute by; each enlarges with maps of its own.
    """
    stages, pixels = c.decoder, width * height
    last = stages[0].width * pixels if stages[0].depth else stages[1].width * pixels // 4
    moments = [2 * last * value + 12 * min(last, NORM_VALUES)]
    for index, stage in enumerate(stages):
        here = pixels // 4**index
        moments.append(_block_work(stage, here, value))
        if index + 1 < len(stages):
            moments.append(_up_work(c, index, here, value, ways))
    return max(moments)


def encode_work(c: DCAEConfig, width: int, height: int, value: int) -> int:
    """Bytes that encoding a picture of width x height in one piece takes."""
    stages, pixels = c.encoder, width * height
    moments = []
    for index, stage in enumerate(stages):
        here = pixels // 4**index
        moments.append(_block_work(stage, here, value))
        if index + 1 < len(stages):
            out = stages[index + 1].width * here // 4
            # The input, its unshuffled copy and the result, twice where that is shuffled too.
            inside = 2 * stage.width * here if index or stage.depth else 3 * here
            moments.append((inside + 2 * out) * value)
    # In half precision the picture is copied, and the copy stays.
    return max(moments) + (3 * pixels * value if value < 4 else 0)


def _block_work(stage: StageConfig, pixels: int, value: int) -> int:
    if not stage.depth:
        return 0
    maps = stage.width * pixels
    if stage.block == "residual":
        # The input, the branch and its norm, and what the norm holds in fp32.
        if stage.norm == "batch":
            return 3 * maps * value
        in_pieces = maps > NORM_VALUES
        pieces = 12 * min(maps, NORM_VALUES)
        return (3 if in_pieces else 2) * maps * value + pieces
    attention = 33.0 if stage.scales else 18.0
    if value == 4:
        attention = 21.0 if stage.scales else 18.0
    return int(attention * maps * value)


def _up_work(
    c: DCAEConfig, index: int, pixels: int, value: int, ways: frozenset[Way] = frozenset()
) -> int:
    """From stage index + 1 to stage index; where stage 0 is empty, the last makes the picture."""
    wide, coarse = c.decoder[index + 1].width, c.decoder[index + 1].width * pixels // 4
    empty = index == 0 and not c.decoder[0].depth
    out = 3 if empty else c.decoder[index].width
    fine = out * pixels
    if c.up == "pixel_shuffle":
        main = coarse + 2 * fine
    elif "windows" in ways and not empty:
        # The input, and the kernel and the windows; these and the result.
        main = coarse + max(16 * wide * out + fine, 2 * fine)
    elif "doubling" in ways:
        # The input, and the kernel's parts in fp32; it and the result.
        main = coarse + max(44 * 4 // value * wide * out, 16 * wide * out + fine)
    elif 4 * coarse <= STRIP_VALUES:
        main = coarse + fine + 4 * coarse
    else:
        # The input twice, with the rows around it; the result; an enlarged strip and its result.
        main = 2 * coarse + fine + STRIP_VALUES + STRIP_VALUES * out // wide
    shortcut = 0 if empty else coarse + fine
    return max(main, shortcut) * value


def _stem(c: DiTConfig) -> int:
    dim = c.width
    times = _linear(SINUSOIDS, dim) + _linear(dim, dim)
    count = _linear(c.latent_channels * c.patch_size**2, dim) + times + _linear(dim, 6 * dim)
    if c.guidance_embedding:
        count += times
    if c.refiner is not None:
        count += _refiner(c.refiner, c.text_dim)
    return count + _linear(c.text_dim, dim) + _linear(dim, dim) + dim


def _refiner(c: RefinerConfig, dim: int) -> int:
    hidden = int(dim * c.mlp_ratio)
    attention = _linear(dim, 3 * dim) + _linear(dim, dim)
    layer = 4 * dim + attention + _linear(dim, hidden) + _linear(hidden, dim) + 2 * dim
    return c.max_tokens * dim + c.depth * layer


def _encoder(c: DCAEConfig) -> int:
    count, stages = 0, c.encoder
    for index, stage in enumerate(stages):
        count += stage.depth * _autoencoder_block(stage, c.head_dim)
        if index + 1 < len(stages):
            into = 3 if index == 0 and not stage.depth else stage.width
            out = stages[index + 1].width
            count += _conv(into, out // 4 if c.down == "pixel_unshuffle" else out)
    stem = _conv(3, stages[0].width) if stages[0].depth else 0
    return count + stem + _conv(stages[-1].width, c.latent_channels)


def _decoder(c: DCAEConfig) -> int:
    count, stages = 0, c.decoder
    for index, stage in enumerate(stages):
        count += stage.depth * _autoencoder_block(stage, c.head_dim)
        if index + 1 < len(stages):
            out = 3 if index == 0 and not stage.depth else stage.width
            count += _conv(stages[index + 1].width, 4 * out if c.up == "pixel_shuffle" else out)
    first = stages[0].width if stages[0].depth else stages[1].width
    head = _conv(first, 3) if stages[0].depth else 0
    return count + _conv(c.latent_channels, stages[-1].width) + 2 * first + head


def _autoencoder_block(stage: StageConfig, head_dim: int) -> int:
    dim = stage.width
    if stage.block == "residual":
        return _conv(dim, dim) + 9 * dim * dim + 2 * dim
    scales = sum(3 * dim * size**2 + 3 * dim * head_dim for size in stage.scales)
    attention = 3 * dim * dim + scales + (1 + len(stage.scales)) * dim * dim + 2 * dim
    return attention + _glumbconv(dim, 4 * dim) + 2 * dim


def _glumbconv(dim: int, hidden: int) -> int:
    return _linear(dim, 2 * hidden) + 10 * 2 * hidden + hidden * dim


def _conv(into: int, out: int) -> int:
    return 9 * into * out + out


def _linear(into: int, out: int) -> int:
    return into * out + out
