"""Names of tensors in the layouts that people have, two ways: theirs -> ours, ours -> theirs.

Layouts: `original` (NVIDIA's .pth and single files; for DC-AE efficientvit's names), `diffusers`,
and `ours`. One table of rules per network; a rule pairs a name of ours with one or more of theirs,
which are its parts along the first dimension, and a 1x1 convolution or a patch convolution there
is a linear layer here. No value is computed, so any way there and back is the identity on bytes.
Meta tensors go both ways too: that is how files are checked before they are read. Start reading at
`to_ours`; the tables are at the end.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sana.config import ControlNetConfig, DCAEConfig, DiTConfig

Layout = Literal["ours", "original", "diffusers"]
Kind = Literal["transformer", "controlnet", "autoencoder"]
NetworkConfig = DiTConfig | ControlNetConfig | DCAEConfig
Form = Literal["same", "pointwise", "patch"]


@dataclass(frozen=True, slots=True)
class Rule:
    """`ours` is the concatenation of `theirs`; names are templates with the same places in order.

    `when` restricts the rule to networks that have, or lack, a trait; see `_traits`.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form = "same"
    when: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class Move:
    """One tensor's way: its name here, the names of its parts there, and how its weight is kept."""

    ours: str
    theirs: tuple[str, ...]
    form: Form = "same"

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Their parts -> our tensor; a single part is not copied."""
        whole = parts[0] if len(parts) == 1 else _concatenate(parts)
        return whole.flatten(1) if self.form != "same" and whole.ndim == 4 else whole

    def cut(self, whole: Tensor, patch_size: int = 1) -> list[Tensor]:
        """Our tensor -> their parts, which are views of it."""
        if self.form == "pointwise" and whole.ndim == 2:
            whole = whole[:, :, None, None]
        if self.form == "patch" and whole.ndim == 2:
            whole = torch.unflatten(whole, 1, (-1, patch_size, patch_size))
        return [whole] if len(self.theirs) == 1 else list(whole.chunk(len(self.theirs)))


def to_ours(
    tensors: Mapping[str, Tensor], layout: Layout, kind: Kind | None = None
) -> dict[str, Tensor]:
    """Rename and reshape into our names; `kind` is told from the names when it is not given.

    What no rule knows, and parts whose other parts are missing, keep their names: the strict
    loader reports them. What the original layout holds beside the network (see `surplus`) goes.
    """
    kind = kind or find_kind(tensors)
    moves = plan(tensors, layout, kind)
    result = {move.ours: move.join([tensors[name] for name in move.theirs]) for move in moves}
    done = {name for move in moves for name in move.theirs} | surplus(tensors, layout, kind)
    return result | {name: tensor for name, tensor in tensors.items() if name not in done}


def from_ours(
    tensors: Mapping[str, Tensor], layout: Layout, config: NetworkConfig
) -> dict[str, Tensor]:
    """Our names -> theirs, for the network that `config` describes; parts are views of ours.

    A name that no rule knows stays as it is.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        move = rename(name, layout, config)
        result.update(zip(move.theirs, move.cut(tensor, patch_size(config)), strict=True))
    return result


def rename(name: str, layout: Layout, config: NetworkConfig) -> Move:
    """Where the tensor that we call `name` goes in another layout."""
    for rule in TABLES.get((layout, kind_of(config)), ()):
        match = _pattern(rule.ours).fullmatch(name)
        if match and _applies(rule, _traits(config, name)):
            theirs = tuple(_fill(their, match.groups()) for their in rule.theirs)
            return Move(name, theirs, rule.form)
    return Move(name, (name,))


def plan(names: Iterable[str], layout: Layout, kind: Kind) -> list[Move]:
    """The moves of all our tensors whose parts are all among `names`, in their order."""
    names = list(names)
    known = set(names)
    is_stemless = not any(name.startswith("encoder.stages.0.") for name in names)
    moves = []
    for name in names:
        for rule in TABLES.get((layout, kind), ()):
            match = _pattern(rule.theirs[0]).fullmatch(name)
            if match and _applies(rule, {"stemless": is_stemless}):
                theirs = tuple(_fill(their, match.groups()) for their in rule.theirs)
                if known.issuperset(theirs):
                    moves.append(Move(_fill(rule.ours, match.groups()), theirs, rule.form))
                break
    return moves


def surplus(names: Iterable[str], layout: Layout, kind: Kind) -> set[str]:
    """Names that the original layout carries beside the network, none of which inference needs.

    The position table (computed here), the learned empty prompt (an empty prompt is encoded
    instead), the training loss's own layer; in a ControlNet's file also the blocks of its base.
    """
    if layout != "original" or kind == "autoencoder":
        return set()
    patterns = [SURPLUS, BASE] if kind == "controlnet" else [SURPLUS]
    return {name for name in names if any(pattern.fullmatch(name) for pattern in patterns)}


def find_kind(names: Iterable[str]) -> Kind:
    """Which network has tensors of these names, in any layout; a transformer if in doubt."""
    firsts = {name.split(".")[0] for name in names}
    if firsts & {"encoder", "decoder"}:
        return "autoencoder"
    if firsts & {"controlnet", "controlnet_blocks", "input_block", "control_input"}:
        return "controlnet"
    return "transformer"


def kind_of(config: NetworkConfig) -> Kind:
    """The kind of network that a config describes."""
    if isinstance(config, DCAEConfig):
        return "autoencoder"
    return "controlnet" if isinstance(config, ControlNetConfig) else "transformer"


def patch_size(config: NetworkConfig) -> int:
    """Side of a patch in latent cells; 1 for an autoencoder."""
    if isinstance(config, DCAEConfig):
        return 1
    return (config.dit if isinstance(config, ControlNetConfig) else config).patch_size


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Along the first dimension; by shape alone on meta, where torch would import its compiler."""
    if not parts[0].is_meta:
        return torch.cat(list(parts))
    return parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))


def _traits(config: NetworkConfig, name: str) -> dict[str, bool]:
    """What decides between two names for the tensor that we call `name`."""
    if not isinstance(config, DCAEConfig):
        return {"guided": isinstance(config, DiTConfig) and config.guidance_embedding}
    side, *rest = name.split(".")
    found = {
        "strided": side == "encoder" and config.down == "conv",
        "stemless": not config.encoder[0].depth,
    }
    if rest[0] == "stages" and side in ("encoder", "decoder"):
        stages = config.encoder if side == "encoder" else config.decoder
        found["attends"] = stages[int(rest[1])].block == "efficientvit"
    return found


def _applies(rule: Rule, found: Mapping[str, bool]) -> bool:
    """A trait that was not judged excludes no rule: there the names themselves differ."""
    return all(found.get(trait, value) == value for trait, value in rule.when)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for place in ("{i}", "{j}"):
        text = text.replace(re.escape(place), r"(\d+)")
    suffixes = "weight|bias|running_mean|running_var|num_batches_tracked"
    return re.compile(text.replace(re.escape("{p}"), f"({suffixes})"))


def _fill(template: str, values: Sequence[str]) -> str:
    """Put `values` at the places of `template`, in order."""
    rest = iter(values)
    return PLACE.sub(lambda _: next(rest), template)


def _rule(ours: str, theirs: str, form: Form = "same", **when: bool) -> Rule:
    """One rule for all tensors of a layer; `to_{q,k}` names two parts, a table has no suffix."""
    end = "" if ours.endswith("table") else ".{p}"
    parts = re.search(r"\{(\w(?:,\w)+)\}", theirs)
    letters = parts[1].split(",") if parts else [""]
    names = [theirs.replace(parts[0], letter) if parts else theirs for letter in letters]
    return Rule(ours + end, tuple(name + end for name in names), form, tuple(when.items()))


PLACE = re.compile(r"\{[ijp]\}")
SURPLUS = re.compile(r"pos_embed|y_embedder\.y_embedding|logvar_linear\.(weight|bias)")
BASE = re.compile(r"(blocks\.\d+|final_layer)\..+")

# Each row: ours, original, diffusers, and where the shape differs the form.
_STEM = """
patch_embed.projection  x_embedder.proj         patch_embed.proj             patch
modulation              t_block.1               time_embed.linear
text_input              y_embedder.y_proj.fc1   caption_projection.linear_1
text_output             y_embedder.y_proj.fc2   caption_projection.linear_2
text_norm               attention_y_norm        caption_norm
"""
_BLOCK = """
table                        scale_shift_table         scale_shift_table
attention.qkv                attn.qkv                  attn1.to_{q,k,v}
attention.query_norm         attn.q_norm               attn1.norm_q
attention.key_norm           attn.k_norm               attn1.norm_k
attention.output             attn.proj                 attn1.to_out.0
cross_attention.query        cross_attn.q_linear       attn2.to_q
cross_attention.key_value    cross_attn.kv_linear      attn2.to_{k,v}
cross_attention.query_norm   cross_attn.q_norm         attn2.norm_q
cross_attention.key_norm     cross_attn.k_norm         attn2.norm_k
cross_attention.output       cross_attn.proj           attn2.to_out.0
feed_forward.expand          mlp.inverted_conv.conv    ff.conv_inverted   pointwise
feed_forward.depthwise       mlp.depth_conv.conv       ff.conv_depth
feed_forward.project         mlp.point_conv.conv       ff.conv_point      pointwise
"""
_CONTEXT, _LOCAL = "context_module.main", "local_module.main"
# The items of a DC-AE stage. `@` and `%` are short for `_CONTEXT` and `_LOCAL`.
_ITEM = """
first                            main.conv1.conv        conv1
second                           main.conv2.conv        conv2
attention.qkv                    @.qkv.conv             attn.to_{q,k,v}          pointwise
attention.scales.{j}.depthwise   @.aggreg.{j}.0         attn.to_qkv_multiscale.{j}.proj_in
attention.scales.{j}.pointwise   @.aggreg.{j}.1         attn.to_qkv_multiscale.{j}.proj_out
attention.output                 @.proj.conv            attn.to_out              pointwise
attention.norm                   @.proj.norm            attn.norm_out
feed_forward.expand              %.inverted_conv.conv   conv_out.conv_inverted   pointwise
feed_forward.depthwise           %.depth_conv.conv      conv_out.conv_depth
feed_forward.project             %.point_conv.conv      conv_out.conv_point      pointwise
"""
# The ends of a DC-AE.
_ENDS = """
encoder.head        encoder.project_out.main.op_list.0.conv   encoder.conv_out
decoder.stem        decoder.project_in.main.conv              decoder.conv_in
decoder.norm        decoder.project_out.op_list.0             decoder.norm_out
decoder.head        decoder.project_out.op_list.2.conv        decoder.conv_out
decoder.head.conv   decoder.project_out.op_list.2.conv.conv   decoder.conv_out.conv
"""


def _rows(table: str) -> list[tuple[str, str, str, Form]]:
    forms: dict[str, Form] = {"pointwise": "pointwise", "patch": "patch"}
    rows = [[*line.split(), ""] for line in table.strip().splitlines()]
    return [(row[0], row[1], row[2], forms.get(row[3], "same")) for row in rows]


def _stem(layout: Layout) -> list[Rule]:
    """What a transformer and a ControlNet begin with."""
    column = 1 if layout == "original" else 2
    rules = [_rule(row[0], row[column], row[3]) for row in _rows(_STEM)]
    for part, number in (("input", 0), ("output", 1)):
        ours = f"time_embed.{part}"
        if layout == "original":
            rules.append(_rule(ours, f"t_embedder.mlp.{2 * number}"))
            continue
        linear = f"timestep_embedder.linear_{1 + number}"
        rules.append(_rule(ours, f"time_embed.emb.{linear}", guided=False))
        rules.append(_rule(ours, f"time_embed.{linear}", guided=True))
    return rules


def _transformer(layout: Layout) -> list[Rule]:
    is_original = layout == "original"
    guidance = "cfg_embedder.mlp.{}" if is_original else "time_embed.guidance_embedder.linear_{}"
    rules = _stem(layout) + _blocks(layout, "blocks.{i}")
    for part, number in (("input", 0), ("output", 1)):
        theirs = guidance.format(2 * number if is_original else 1 + number)
        rules.append(_rule(f"guidance_embed.{part}", theirs))
    rules.append(_rule("output", "final_layer.linear" if is_original else "proj_out"))
    table = "final_layer.scale_shift_table" if is_original else "scale_shift_table"
    return [*rules, _rule("table", table)]


def _controlnet(layout: Layout) -> list[Rule]:
    if layout == "original":
        ends = ("controlnet.0.before_proj", "controlnet.{i}.after_proj")
    else:
        ends = ("input_block", "controlnet_blocks.{i}")
    blocks = _blocks(layout, "controlnet.{i}.copied_block")
    return [
        *_stem(layout),
        *blocks,
        _rule("control_input", ends[0]),
        _rule("outputs.{i}", ends[1]),
    ]


def _blocks(layout: Layout, original: str) -> list[Rule]:
    prefix, column = (original, 1) if layout == "original" else ("transformer_blocks.{i}", 2)
    rows = _rows(_BLOCK)
    return [_rule(f"blocks.{{i}}.{row[0]}", f"{prefix}.{row[column]}", row[3]) for row in rows]


def _autoencoder(layout: Layout) -> list[Rule]:
    """The ends, then the stages' items of both halves."""
    is_original = layout == "original"
    column = 1 if is_original else 2
    rules = [_rule(row[0], row[column], row[3]) for row in _rows(_ENDS)]
    if is_original:
        stem = "encoder.project_in.conv"
        rules.append(_rule("encoder.stem", stem, stemless=False))
        rules.append(_rule("encoder.stem.conv", stem, stemless=True, strided=True))
        rules.append(_rule("encoder.stem.conv", f"{stem}.conv", strided=False))
    else:
        rules.append(_rule("encoder.stem", "encoder.conv_in"))
        rules.append(_rule("encoder.stem.conv", "encoder.conv_in.conv"))
    for side, blocks in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        items = [_rule(row[0], row[column], _form(row, layout)) for row in _rows(_ITEM)]
        if is_original:
            items.append(_rule("norm", "main.conv2.norm", attends=False))
            items.append(_rule("norm", "%.point_conv.norm", attends=True))
            items.append(_rule("conv", "main.conv", strided=True))
            items.append(_rule("conv", "main.conv.conv", strided=False))
        else:
            items.append(_rule("norm", "norm", attends=False))
            items.append(_rule("norm", "conv_out.norm", attends=True))
            items.append(_rule("conv", "conv"))
        place = "stages.{i}.op_list.{j}" if is_original else f"{blocks}.{{i}}.{{j}}"
        rules += [_within(rule, f"{side}.stages.{{i}}.{{j}}", f"{side}.{place}") for rule in items]
    return rules


def _form(row: tuple[str, str, str, Form], layout: Layout) -> Form:
    """diffusers keeps a DC-AE's attention in linear layers, as we do."""
    return "same" if layout == "diffusers" and row[0].startswith("attention") else row[3]


def _within(rule: Rule, ours: str, theirs: str) -> Rule:
    """The same rule for a layer inside of others."""
    names = [name.replace("@", _CONTEXT).replace("%", _LOCAL) for name in rule.theirs]
    return Rule(
        f"{ours}.{rule.ours}", tuple(f"{theirs}.{name}" for name in names), rule.form, rule.when
    )


TABLES: dict[tuple[Layout, Kind], tuple[Rule, ...]] = {}
for _layout in ("original", "diffusers"):
    TABLES[_layout, "transformer"] = tuple(_transformer(_layout))
    TABLES[_layout, "controlnet"] = tuple(_controlnet(_layout))
    TABLES[_layout, "autoencoder"] = tuple(_autoencoder(_layout))
