"""Names: each table one-to-one, key sets equal to diffusers', and every way back exact on bytes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from numerics import assert_detects
from sana.config import DCAEConfig, DiTConfig
from sana.weights import keys
from weights.networks import ALL, DCAES, DITS, peer, random_tensors

EVERY = pytest.mark.parametrize("config", list(ALL.values()), ids=list(ALL))
FOREIGN = pytest.mark.parametrize("layout", ["original", "diffusers"])


def assert_same(reference: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    assert got.keys() == reference.keys()
    for name, tensor in reference.items():
        assert got[name].shape == tensor.shape and got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@EVERY
@FOREIGN
def test_there_and_back_is_the_identity(config: keys.NetworkConfig, layout: keys.Layout) -> None:
    ours = random_tensors(config)
    theirs = keys.from_ours(ours, layout, config)
    back = keys.to_ours(theirs, layout)
    assert_same(ours, back)
    assert_same(theirs, keys.from_ours(back, layout, config))
    first = next(iter(theirs))

    def check(tensors: Mapping[str, Tensor]) -> None:
        assert_same(ours, keys.to_ours(tensors, layout))

    assert_detects(check, theirs | {first: theirs[first] * 1.01})


@EVERY
@pytest.mark.parity
def test_names_and_shapes_are_those_of_diffusers(config: keys.NetworkConfig) -> None:
    ours, theirs = random_tensors(config), peer(config).state_dict()
    made = keys.from_ours(ours, "diffusers", config)
    assert {name: t.shape for name, t in made.items()} == {n: t.shape for n, t in theirs.items()}
    back = keys.to_ours(theirs, "diffusers")
    assert {name: t.shape for name, t in back.items()} == {n: t.shape for n, t in ours.items()}


@pytest.mark.parity
@pytest.mark.parametrize("name", ["600m", "1600m", "sana"])
def test_original_names_are_those_that_diffusers_converts(name: str) -> None:
    """Its single-file converters know these, and only these, of the original layouts."""
    from diffusers.loaders import single_file_utils

    config = ALL[name]
    ours = random_tensors(config)
    original = {n: t.clone() for n, t in keys.from_ours(ours, "original", config).items()}
    if isinstance(config, DCAEConfig):
        converted = single_file_utils.convert_autoencoder_dc_checkpoint_to_diffusers(original)
    else:
        extra = {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}
        converted = single_file_utils.convert_sana_transformer_to_diffusers(original | extra)
    assert_same(keys.from_ours(ours, "diffusers", config), converted)


@FOREIGN
@pytest.mark.parametrize("kind", ["transformer", "controlnet", "autoencoder"])
def test_tables_are_one_to_one(layout: keys.Layout, kind: keys.Kind) -> None:
    """Two rules may share a name on one side only where a trait tells them apart."""
    rules = keys.TABLES[layout, kind]
    for side in ("ours", "theirs"):
        seen: dict[object, list[keys.Rule]] = {}
        for rule in rules:
            seen.setdefault(getattr(rule, side), []).append(rule)
        for shared in seen.values():
            conditions = [dict(rule.when) for rule in shared]
            for number, first in enumerate(conditions):
                for second in conditions[number + 1 :]:
                    assert any(first.get(key, value) != value for key, value in second.items())


@FOREIGN
def test_unknown_and_incomplete_names_are_kept(layout: keys.Layout) -> None:
    config = DITS["normed"]
    theirs = keys.from_ours(random_tensors(config), layout, config)
    theirs["surprise.weight"] = torch.zeros(1)
    got = keys.to_ours(theirs, layout)
    assert "surprise.weight" in got
    if layout == "diffusers":
        del theirs["transformer_blocks.0.attn1.to_v.weight"]
        got = keys.to_ours(theirs, layout)
        assert "blocks.0.attention.qkv.weight" not in got
        assert "transformer_blocks.0.attn1.to_q.weight" in got


def test_what_the_original_has_beside_the_network_goes() -> None:
    config = DITS["sprint"]
    theirs = keys.from_ours(random_tensors(config), "original", config)
    extra = {"pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias"}
    got = keys.to_ours(theirs | dict.fromkeys(extra, torch.zeros(1)), "original")
    assert got.keys() == random_tensors(config).keys()


def test_a_controlnet_leaves_its_base_behind() -> None:
    control, base = ALL["controlnet"], DITS["1600m"]
    ours = random_tensors(control)
    theirs = keys.from_ours(random_tensors(base), "original", base)
    theirs |= keys.from_ours(ours, "original", control)
    assert "controlnet.1.copied_block.attn.qkv.weight" in theirs
    assert "controlnet.0.before_proj.bias" in theirs
    assert_same(ours, keys.to_ours(theirs, "original"))


def test_parts_are_in_the_order_of_the_published_map() -> None:
    """Query, key and value in thirds, key and value in halves; patches as a convolution."""
    config = DITS["patched"]
    assert isinstance(config, DiTConfig)
    ours = random_tensors(config)
    theirs = keys.from_ours(ours, "diffusers", config)
    width = config.width
    qkv = ours["blocks.1.attention.qkv.weight"]
    assert torch.equal(theirs["transformer_blocks.1.attn1.to_k.weight"], qkv[width : 2 * width])
    halves = ours["blocks.1.cross_attention.key_value.bias"]
    assert torch.equal(theirs["transformer_blocks.1.attn2.to_v.bias"], halves[width:])
    patch = theirs["patch_embed.proj.weight"]
    assert patch.shape == (width, 8, 2, 2)
    assert torch.equal(patch[:, 3, 1, 0], ours["patch_embed.projection.weight"][:, 3 * 4 + 2])
    stage = random_tensors(DCAES["sana"])["encoder.stages.1.0.attention.qkv.weight"]
    split = keys.from_ours(random_tensors(DCAES["sana"]), "diffusers", DCAES["sana"])
    assert torch.equal(split["encoder.down_blocks.1.0.attn.to_v.weight"], stage[64:])
