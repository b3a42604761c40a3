"""What a set of tensors is, from names and shapes alone: which networks, layout, architecture.

File names are never looked at. What shapes cannot tell is taken from the official models where one
fits (heads of cross-attention by width, positions by the size of an unused table), and asked for
otherwise. Start reading at `find_parts`, then `describe`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from torch import Tensor

from sana.config import (
    BlockKind,
    ControlNetConfig,
    DCAEConfig,
    DiTConfig,
    NormKind,
    StageConfig,
)
from sana.errors import CheckpointError
from sana.weights.keys import Kind, Layout, NetworkConfig, to_ours

T = TypeVar("T")
PartKind = Literal["transformer", "controlnet", "autoencoder", "text"]
# Kind, layout, and the end of a name that every such network has.
MARKERS: tuple[tuple[PartKind, Layout, str], ...] = (
    ("controlnet", "original", "controlnet.0.copied_block.cross_attn.q_linear.weight"),
    ("controlnet", "diffusers", "controlnet_blocks.0.weight"),
    ("controlnet", "ours", "control_input.weight"),
    ("transformer", "original", "blocks.0.cross_attn.q_linear.weight"),
    ("transformer", "diffusers", "transformer_blocks.0.attn2.to_q.weight"),
    ("transformer", "ours", "blocks.0.cross_attention.query.weight"),
    ("autoencoder", "original", "decoder.project_in.main.conv.weight"),
    ("autoencoder", "diffusers", "decoder.conv_in.weight"),
    ("autoencoder", "ours", "decoder.stem.weight"),
    ("text", "diffusers", "layers.0.self_attn.q_proj.weight"),
)
CROSS_HEADS = {2240: 20, 1152: 16}
"""Of the official widths; shapes do not show how a width is cut into heads."""
SANA_SCALE = 0.41407
LORA = re.compile(r"lora_(A|B|down|up|unet|te)")


@dataclass(frozen=True, slots=True)
class Part:
    """One network within a file: its names there are its own after `prefix`."""

    kind: PartKind
    layout: Layout
    prefix: str = ""


def find_parts(names: Iterable[str], source: str) -> list[Part]:
    """The networks among the tensors of a file; `source` names it in errors.

    A file of one network may have a prefix before all names, one of several networks has one for
    each. Raises `CheckpointError` when nothing is known, with what it seems to be.
    """
    names = list(names)
    parts: dict[str, Part] = {}
    for kind, layout, marker in MARKERS:
        for name in names:
            prefix = name.removesuffix(marker)
            if prefix == name or (prefix and not prefix.endswith(".")) or prefix in parts:
                continue
            parts[prefix] = Part(kind, layout, prefix)
    if parts:
        return list(parts.values())
    if any(LORA.search(name) for name in names):
        raise CheckpointError(
            f"{source} is a LoRA, which changes a model and is none; give it beside a model"
        )
    shown = ", ".join(sorted(names)[:5])
    raise CheckpointError(
        f"{source} holds {len(names)} tensors of no network that is known here ({shown} ...); "
        "known are Sana transformers, ControlNets, DC-AEs and Gemma-2, in NVIDIA's, diffusers' or "
        "our names"
    )


def take_part(tensors: Mapping[str, T], part: Part, parts: Iterable[Part]) -> dict[str, T]:
    """The tensors of one part, under names without its prefix; the longest prefix claims a name."""
    longer = [other.prefix for other in parts if len(other.prefix) > len(part.prefix)]
    return {
        name.removeprefix(part.prefix): value
        for name, value in tensors.items()
        if name.startswith(part.prefix) and not name.startswith(tuple(longer))
    }


def describe(
    tensors: Mapping[str, Tensor],
    kind: Kind,
    layout: Layout,
    source: str,
    *,
    like: NetworkConfig | None = None,
) -> NetworkConfig:
    """The architecture of one network; tensors may be on the meta device, names without prefix.

    `like` gives the heads of cross-attention, which no shape shows. Raises `CheckpointError` where
    tensors that decide are missing or shapes contradict each other, and where heads cannot be told
    from a width that no official model has.
    """
    ours = to_ours(tensors, layout, kind)
    try:
        if kind == "autoencoder":
            return _autoencoder(ours)
        dit = _transformer(ours, tensors, like)
        if kind == "transformer":
            return dit
        base = _count(tensors, r"blocks\.(\d+)\.") if layout == "original" else 0
        return ControlNetConfig(dit=replace(dit, depth=max(base, dit.depth)), depth=dit.depth)
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{source} is a {layout} {kind} whose size cannot be told, since it lacks {error}; it "
            "is incomplete or damaged: get it again"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _transformer(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], like: NetworkConfig | None
) -> DiTConfig:
    """From our names; the patch convolution and the position table are seen in theirs alone."""
    width = ours["text_norm.weight"].shape[0]
    known = like.dit if isinstance(like, ControlNetConfig) else like
    heads = CROSS_HEADS.get(width)
    if isinstance(known, DiTConfig):
        # Of another width, its heads need not divide this one, and the caller will say so.
        heads = known.cross_heads if width % known.cross_heads == 0 else 1
    if heads is None:
        raise CheckpointError(
            f"the transformer is {width} wide, and only for {', '.join(map(str, CROSS_HEADS))} is "
            "it known how many heads attend to the text; give a folder with config.json, or say "
            "which model it is like"
        )
    patch = next((theirs[name] for name in PATCHES if name in theirs), None)
    if patch is None or patch.ndim != 4:
        raise KeyError("its patch embedding")
    hidden = ours["blocks.0.feed_forward.project.weight"].shape[1]
    config = DiTConfig(
        width=width,
        depth=_count(ours, r"blocks\.(\d+)\."),
        cross_heads=heads,
        text_dim=ours["text_input.weight"].shape[1],
        latent_channels=patch.shape[1],
        patch_size=patch.shape[2],
        mlp_ratio=hidden / width,
        qk_norm="blocks.0.attention.query_norm.weight" in ours,
        guidance_embedding="guidance_embed.input.weight" in ours,
    )
    return _positioned(config, theirs.get("pos_embed"))


def _positioned(config: DiTConfig, table: Tensor | None) -> DiTConfig:
    """Every original file has a table, but only the 2K and 4K models use it: by its size."""
    side = round(table.shape[1] ** 0.5) if table is not None and table.ndim == 3 else 0
    if side < 64:
        return config
    return replace(config, position_scale=side / 64, position_base=side)


def _autoencoder(ours: Mapping[str, Tensor]) -> DCAEConfig:
    count = 1 + max(int(match[1]) for match in map(STAGE.match, ours) if match)
    encoder = [_stage(ours, f"encoder.stages.{index}.") for index in range(count)]
    decoder = [_stage(ours, f"decoder.stages.{index}.") for index in range(count)]
    # A first stage without blocks shows nothing of itself, and nothing depends on what it is.
    for stages in (encoder, decoder):
        if not stages[0].depth:
            like = stages[1] if stages[1].block == "residual" else stages[0]
            stages[0] = replace(like, width=stages[1].width // 2, depth=0)
    attends = any(stage.block == "efficientvit" for stage in decoder)
    is_sana = any(stage.scales for stage in encoder)
    down, head = _resampler(ours, "encoder", "stem"), "decoder.head.conv.weight"
    out = 3 if head in ours else decoder[0].width
    return DCAEConfig(
        latent_channels=ours["decoder.stem.weight"].shape[1],
        encoder=tuple(encoder),
        decoder=tuple(decoder),
        down="conv" if down == encoder[1].width else "pixel_unshuffle",
        up="interpolate" if _resampler(ours, "decoder", "head") == out else "pixel_shuffle",
        out_activation="relu" if attends else "silu",
        head_dim=_head_dim(ours),
        latent_scale=(SANA_SCALE if is_sana else 1.0,),
    )


def _resampler(ours: Mapping[str, Tensor], side: str, end: str) -> int:
    """Output channels of the convolution between stages 0 and 1, or of the end in its place."""
    pattern = re.compile(rf"{side}\.(stages\.0\.\d+|{end})\.conv\.weight")
    found = [tensor.shape[0] for name, tensor in ours.items() if pattern.fullmatch(name)]
    if not found:
        raise KeyError(f"the convolution that leads to stage 1 of its {side}")
    return found[0]


def _stage(ours: Mapping[str, Tensor], prefix: str) -> StageConfig:
    """One stage from its first block; a stage without blocks has width 1 for now."""
    blocks: dict[int, str] = {}
    for name in ours:
        match = re.match(re.escape(prefix) + r"(\d+)\.(first|attention\.qkv)\.weight", name)
        if match:
            blocks[int(match[1])] = match[2]
    if not blocks:
        return StageConfig(width=1, depth=0)
    first = min(blocks)
    start = f"{prefix}{first}."
    kind: BlockKind = "residual" if blocks[first] == "first" else "efficientvit"
    weight = ours[f"{start}{blocks[first]}.weight"]
    norm: NormKind = "batch" if f"{start}norm.running_mean" in ours else "rms"
    scales = tuple(
        ours[f"{start}attention.scales.{index}.depthwise.weight"].shape[2]
        for index in range(_count(ours, re.escape(start) + r"attention\.scales\.(\d+)\."))
    )
    # Official decoders with batch norm have ReLU, all other blocks SiLU; no tensor shows it.
    return StageConfig(
        width=weight.shape[1],
        depth=len(blocks),
        block=kind,
        scales=scales,
        norm=norm,
        activation="relu" if norm == "batch" else "silu",
    )


def _head_dim(ours: Mapping[str, Tensor]) -> int:
    pointwise = [
        t for name, t in ours.items() if name.endswith("attention.scales.0.pointwise.weight")
    ]
    return pointwise[0].shape[1] if pointwise else 32


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbered modules there are; CheckpointError if one is left out."""
    numbers = {int(match[1]) for match in map(re.compile(pattern).match, names) if match}
    if numbers != set(range(len(numbers))):
        lacking = min(set(range(len(numbers))) - numbers)
        raise CheckpointError(
            f"it has {len(numbers)} modules like {pattern!r} and lacks number {lacking}; a part of "
            "the file is missing: get it again"
        )
    return len(numbers)


PATCHES = ("x_embedder.proj.weight", "patch_embed.proj.weight")
STAGE = re.compile(r"(?:encoder|decoder)\.stages\.(\d+)\.")
