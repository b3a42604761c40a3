"""ControlNet in both wirings against loops written out, and what must leave the base alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.config import ControlNetConfig, DiTConfig, Reference
from sana.errors import CheckpointError, RequestError
from sana.kernels.reference import modulate
from sana.models.controlnet import Controlled, ControlNet
from sana.models.dit import LinearDiT, Prepared
from sana.models.layers import mask_bias

BASE = DiTConfig(width=32, depth=4, cross_heads=2, text_dim=12, latent_channels=4, head_dim=16)
POSITIONED = replace(BASE, position_scale=2.0, position_base=8)
BOTH = pytest.mark.parametrize("reference", ["nvidia", "diffusers"])


def randomize(network: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.double().parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = noise / fan**0.5


def build(config: DiTConfig = BASE, depth: int = 2) -> tuple[LinearDiT, ControlNet]:
    base, controlnet = LinearDiT(config), ControlNet(ControlNetConfig(dit=config, depth=depth))
    randomize(base, 0)
    randomize(controlnet, 1)
    return base, controlnet


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LATENT, CONTROL = draw(3, 4, 4, 6, seed=2), draw(3, 4, 4, 6, seed=3)
TIME, TEXT = torch.tensor([0.9, 0.5, 0.1]).double(), draw(3, 7, 12, seed=4)
MASK = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]


def written_out(base: LinearDiT, net: ControlNet, scale: float, reference: Reference) -> Tensor:
    """The two programs, as family-spec section 2 tells them, with a plain list of residuals."""
    grid = torch.Size((4, 6))
    bias = mask_bias(MASK, torch.float64)
    text, own = base.embed_text(TEXT, MASK), net.embed_text(TEXT, MASK)
    embedding = base.time_embed(TIME.float() * 1000)
    six = base.modulation(F.silu(embedding)).unflatten(-1, (6, -1))
    own_six = net.modulation(F.silu(net.time_embed(TIME.float() * 1000))).unflatten(-1, (6, -1))
    x = base.embed_latent(LATENT).flatten(1, 2)
    hint = net.control_input(net.embed_latent(CONTROL)).flatten(1, 2)
    if reference == "nvidia":
        x = base.blocks[0](x, text, six, bias, grid)
        copy = x + hint
        for i in range(len(base.blocks) - 1):
            if i < len(net.blocks):
                copy = net.blocks[i](copy, own, own_six, bias, grid)
                x = x + scale * net.outputs[i](copy)
            x = base.blocks[i + 1](x, text, six, bias, grid)
    else:
        copy, samples = net.embed_latent(LATENT).flatten(1, 2) + hint, []
        for block, output in zip(net.blocks, net.outputs, strict=True):
            copy = block(copy, own, own_six, bias, grid)
            samples.append(scale * output(copy))
        for i, block in enumerate(base.blocks):
            x = block(x, text, six, bias, grid)
            if 1 <= i <= len(samples):
                x = x + samples[i - 1]
    shift, factor = (base.table + embedding[:, None]).chunk(2, dim=1)
    return base._unpatch(base.output(modulate(x, shift, factor)).unflatten(1, grid))


def run(pair: tuple[LinearDiT, ControlNet], **options: object) -> Tensor:
    network = Controlled(*pair, CONTROL, **options)  # type: ignore[arg-type]
    return network(LATENT, TIME, network.embed_text(TEXT, MASK), MASK)


@BOTH
@pytest.mark.parametrize("config", [BASE, POSITIONED], ids=["plain", "positioned"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_each_wiring_is_its_program(config: DiTConfig, depth: int, reference: Reference) -> None:
    pair = build(config, depth)
    with torch.no_grad():
        expected = written_out(*pair, 0.7, reference)

    def check(options: dict[str, object]) -> None:
        assert_matches(expected, run(pair, **options), 1e-15)  # floor 0

    check({"scale": 0.7, "reference": reference})
    other = "diffusers" if reference == "nvidia" else "nvidia"
    assert_detects(check, {"scale": 0.7, "reference": other})
    assert_detects(check, {"scale": 0.71, "reference": reference})


@BOTH
def test_outside_its_interval_the_base_runs_alone(reference: Reference) -> None:
    base, controlnet = build()
    plain = base(LATENT, TIME, TEXT, MASK)
    full = run((base, controlnet), reference=reference)
    part = run((base, controlnet), reference=reference, interval=(0.4, 1.0))
    assert_matches(torch.cat([full[:2], plain[2:]]), part, 1e-15)  # floor 0
    assert torch.equal(run((base, controlnet), reference=reference, interval=(0.95, 0.97)), plain)


@BOTH
def test_a_new_controlnet_changes_nothing(reference: Reference) -> None:
    base, _ = build()
    fresh = ControlNet(ControlNetConfig(dit=BASE, depth=2)).double()
    got = run((base, fresh), reference=reference)
    assert torch.equal(got, base(LATENT, TIME, TEXT, MASK))


@BOTH
def test_every_parameter_learns(reference: Reference) -> None:
    base, controlnet = build()
    run((base, controlnet), reference=reference).square().sum().backward()
    for name, parameter in controlnet.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_one_control_serves_both_halves_of_guidance() -> None:
    base, controlnet = build()
    one = Controlled(base, controlnet, CONTROL[:1])
    three = Controlled(base, controlnet, CONTROL[:1].repeat(3, 1, 1, 1))
    states = one.embed_text(TEXT, MASK)
    assert torch.equal(one(LATENT, TIME, states, MASK), three(LATENT, TIME, states, MASK))


def test_networks_that_do_not_belong_together_are_refused() -> None:
    base, controlnet = build()
    wide = LinearDiT(replace(BASE, width=64))
    with pytest.raises(RequestError, match="width is 32 and the base's is 64"):
        Controlled(wide, controlnet, CONTROL)
    with pytest.raises(RequestError, match="has 4 blocks and the base 4"):
        Controlled(base, build(depth=4)[1], CONTROL)
    with pytest.raises(CheckpointError, match="depth is 0"):
        ControlNetConfig(dit=BASE, depth=0)


@BOTH
def test_prepared_texts_give_the_same_bits(reference: Reference) -> None:
    base, controlnet = build()
    network = Controlled(base, controlnet, CONTROL, reference=reference)
    states = network.embed_text(TEXT, MASK)
    expected = network(LATENT, TIME, states, MASK)

    def check(prepared: tuple[Prepared, Prepared]) -> None:
        assert torch.equal(network(LATENT, TIME, prepared, MASK), expected)

    own, its = network.prepare(states, MASK)
    check((own, its))
    assert_detects(check, (own, its._replace(keys_values=its.keys_values[::-1])))
