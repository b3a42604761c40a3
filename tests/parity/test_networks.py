"""Transformer, ControlNet and DC-AE against diffusers on the same weights, in fp32 and bf16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches, rel_rms
from parity.pairs import Inputs, draw, faulty, ours_from, pair
from sana.config import DCAEConfig, DiTConfig, StageConfig
from sana.models.controlnet import Controlled
from weights.networks import CONTROLNET, DCAES, DITS

pytestmark = pytest.mark.parity

CONFIGS = {
    **DITS,
    "positions at scale 1": replace(DITS["positions"], position_scale=1.0),
    "sprint with positions": replace(DITS["sprint"], position_scale=1.0, position_base=4),
}
DEEP = (16, 32, 32, 64, 64, 64)


def imagenet(channels: int, extra: int) -> DCAEConfig:
    """f64 and f128 of the `in` and `mix` kind: one and two more stages than `imagenet`'s f8."""
    kinds = ["residual", "residual", *["efficientvit"] * (2 + extra)]
    depths = (0, 1, 1, 1, 1, 1)

    def side(**plain: Any) -> tuple[StageConfig, ...]:
        return tuple(
            StageConfig(width=width, depth=depth, block=kind, **plain)
            if kind == "residual"
            else StageConfig(width=width, depth=depth, block=kind)  # type: ignore[arg-type]
            for width, depth, kind in zip(DEEP, depths, kinds, strict=False)
        )

    return replace(
        DCAES["imagenet"],
        latent_channels=channels,
        encoder=side(),
        decoder=side(norm="batch", activation="relu"),
    )


AUTOENCODERS = {
    **DCAES,
    "imagenet, one stage more": imagenet(16, 1),
    "imagenet, two stages more": imagenet(64, 2),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("grid", [(2, 2), (4, 6), (8, 8), (14, 6)])
def test_transformer(name: str, grid: tuple[int, int]) -> None:
    config = CONFIGS[name]
    theirs, ours = pair(config)
    inputs = Inputs(config, grid)
    with torch.no_grad():
        expected = inputs.theirs(theirs)

    @torch.no_grad()
    def check(network: Any) -> None:
        assert_matches(expected, inputs.ours(network), 2e-6)  # floor 2.1e-7

    check(ours)
    assert_detects(check, faulty(ours, "blocks.1.attention.output.weight"))
    assert_detects(check, faulty(ours, "modulation.weight"))


@pytest.mark.parametrize("name", ["1600m", "sprint"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (7, 9)])
def test_transformer_at_odd_sizes(name: str, grid: tuple[int, int]) -> None:
    config = CONFIGS[name]
    theirs, ours = pair(config)
    inputs = Inputs(config, grid)

    @torch.no_grad()
    def check(network: Any) -> None:
        assert_matches(inputs.theirs(theirs), inputs.ours(network), 2e-6)  # floor 2.1e-7

    check(ours)
    assert_detects(check, faulty(ours, "blocks.0.table"))


@pytest.mark.parametrize("rows", [(7, 7, 7), (1, 7, 3), (0, 0, 0), None])
def test_transformer_masks(rows: tuple[int, int, int] | None) -> None:
    """An empty row attends to all tokens, its scores rounded to thousandths by the -10000 in both.

    Where the two round differently, by chance, that row's error is a hundred times the others'.
    """
    config = DITS["normed"]
    theirs, ours = pair(config)
    inputs = Inputs(config)
    inputs.mask = None if rows is None else torch.arange(7)[None] < torch.tensor(rows)[:, None]
    with torch.no_grad():
        expected = inputs.theirs(theirs)

    @torch.no_grad()
    def check(asked: Inputs) -> None:
        assert_matches(expected, asked.ours(ours), 1e-5)  # floor 2.4e-6, for empty rows

    check(inputs)
    other = Inputs(config)
    other.mask = torch.arange(7)[None] < torch.tensor([6, 2, 1])[:, None]
    assert_detects(check, other)


@pytest.mark.parametrize("name", ["1600m", "normed", "sprint"])
def test_transformer_gradients(name: str) -> None:
    """Of every input and every weight, ours compared under diffusers' names."""
    config = CONFIGS[name]
    theirs, ours = pair(config)
    target = draw(3, config.latent_channels, 4, 6, seed=9)

    def gradients(network: Any, side: str) -> Tensor:
        inputs = Inputs(config)
        for tensor in (inputs.latent, inputs.text):
            tensor.requires_grad_()
        network.zero_grad()
        (getattr(inputs, side)(network) * target).sum().backward()
        found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        if side == "ours":
            from sana.weights.keys import from_ours

            found = from_ours(found, "diffusers", config)
        ordered = [found[name].flatten() for name in sorted(found)]
        return torch.cat([inputs.latent.grad.flatten(), inputs.text.grad.flatten(), *ordered])

    expected = gradients(theirs, "theirs")

    def check(network: Any) -> None:
        assert_matches(expected, gradients(network, "ours"), 2e-6)  # floor 2.8e-7

    check(ours)
    assert_detects(check, faulty(ours, "blocks.0.feed_forward.project.weight"))


def test_attention_clamp_is_the_peers_in_fp16() -> None:
    """The peer clips in fp16 alone; made to clip in fp32 too, it equals ours with `clamps`."""
    config = DITS["1600m"]
    theirs, _ = pair(config)
    for block in theirs.transformer_blocks:
        block.attn1.to_out[0].weight.data.mul_(1e5)
    inputs = Inputs(config)
    plain = ours_from(theirs.state_dict(), config)
    clamped = ours_from(theirs.state_dict(), replace(config, clamps=True))
    for block in theirs.transformer_blocks:
        output, processor = block.attn1.to_out[0], block.attn1.processor
        block.attn1.processor = lambda *a, _p=processor, **k: _p(*a, **k).clip(-65504, 65504)
        assert output.weight.abs().max() > 1e4
    with torch.no_grad():
        expected = inputs.theirs(theirs)

    @torch.no_grad()
    def check(network: Any) -> None:
        assert_matches(expected, inputs.ours(network), 2e-6)  # floor 2.1e-7

    check(clamped)
    assert_detects(check, plain)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_controlnet(scale: float) -> None:
    """diffusers' wiring, base and ControlNet together."""
    config = replace(DITS["1600m"], depth=4)
    base, ours = pair(config)
    theirs, controlnet = pair(CONTROLNET, seed=5)
    inputs, control = Inputs(config), draw(3, config.latent_channels, 4, 6, seed=6)
    with torch.no_grad():
        samples = inputs.theirs(theirs, controlnet_cond=control, conditioning_scale=scale)
        expected = inputs.theirs(base, controlnet_block_samples=tuple(samples))

    @torch.no_grad()
    def check(options: dict[str, Any]) -> None:
        network = Controlled(ours, controlnet, control, **options)
        states = network.embed_text(inputs.text, inputs.mask)
        got = network(inputs.latent, inputs.time, states, inputs.mask)
        assert_matches(expected, got, 2e-6)  # floor 2.1e-7

    check({"scale": scale, "reference": "diffusers"})
    assert_detects(check, {"scale": scale, "reference": "nvidia"})
    assert_detects(check, {"scale": scale * 1.01, "reference": "diffusers"})


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder(name: str) -> None:
    """Both attention forms: maps larger and smaller than a head, and odd numbers of cells."""
    config = AUTOENCODERS[name]
    theirs, ours = pair(config)
    factor = config.factor
    for cells in ((1, 1), (3, 5), (2, 9)):
        images = draw(2, 3, cells[0] * factor, cells[1] * factor, seed=3)
        latent = draw(2, config.latent_channels, *cells, seed=4)
        with torch.no_grad():
            encoded, decoded = theirs.encode(images).latent, theirs.decode(latent).sample

        @torch.no_grad()
        def check(
            network: Any,
            images: Tensor = images,
            latent: Tensor = latent,
            wanted: tuple[Tensor, Tensor] = (encoded, decoded),
        ) -> None:
            assert_matches(wanted[0], network.encode(images).contiguous(), 5e-6)  # floor 9.3e-7
            assert_matches(wanted[1], network.decode(latent).contiguous(), 5e-6)  # floor 9.3e-7

        check(ours)
        assert_detects(check, faulty(ours, "encoder.head.weight"))
        last = len(config.decoder) - 1
        assert_detects(check, faulty(ours, f"decoder.stages.{last}.0.norm.weight"))


@pytest.mark.parametrize("name", ["sana", "imagenet"])
def test_autoencoder_gradients(name: str) -> None:
    config = AUTOENCODERS[name]
    theirs, ours = pair(config)
    factor = config.factor

    def gradients(network: Any, *, is_peer: bool) -> Tensor:
        images = draw(2, 3, 3 * factor, 2 * factor, seed=3).requires_grad_()
        latent = network.encode(images)
        out = network.decode(latent.latent if is_peer else latent)
        ((out.sample if is_peer else out) * draw(*images.shape, seed=5)).sum().backward()
        assert images.grad is not None
        return images.grad

    expected = gradients(theirs, is_peer=True)

    def check(network: Any) -> None:
        assert_matches(expected, gradients(network, is_peer=False), 1e-5)  # floor 1.7e-6

    check(ours)
    head = "decoder.head.conv.weight" if name == "imagenet" else "decoder.head.weight"
    assert_detects(check, faulty(ours, head))


@pytest.mark.parametrize("name", ["1600m", "normed", "sprint", "sana", "imagenet", "lite"])
def test_bf16_is_no_farther_from_fp32_than_the_peer(name: str) -> None:
    """Over several draws of the weights, the mean of the error against 1.5 times the peer's."""
    config = {**CONFIGS, **AUTOENCODERS}[name]
    mine, its = [], []
    for seed in range(4):
        theirs, ours = pair(config, seed)
        outputs = []
        for network, side in ((theirs, "fp32"), (theirs, "theirs"), (ours, "ours")):
            if side != "fp32":
                network = network.bfloat16()
            outputs.append(_output(network, config, is_ours=side == "ours"))
        its.append(rel_rms(outputs[0], outputs[1]))
        mine.append(rel_rms(outputs[0], outputs[2]))

    def check(errors: list[float]) -> None:
        ratio = sum(errors) / sum(its)
        print(f"ratio {ratio:.3f} (bound 1.5)")
        assert ratio <= 1.5

    check(mine)
    assert_detects(check, [1.6 * error for error in its])


@torch.no_grad()
def _output(network: Any, config: Any, *, is_ours: bool) -> Tensor:
    dtype = next(network.parameters()).dtype
    if isinstance(config, DiTConfig):
        inputs = Inputs(config, (8, 8))
        inputs.latent = inputs.latent.to(dtype)
        return (inputs.ours(network) if is_ours else inputs.theirs(network)).float()
    latent = draw(2, config.latent_channels, 4, 4, seed=4).to(dtype)
    out = network.decode(latent)
    return (out if is_ours else out.sample).float()
