"""The Linear DiT against its formula written out plainly, and what must not depend on what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.config import DiTConfig, RefinerConfig
from sana.kernels import ops
from sana.kernels.proven import UNPROVEN, Way
from sana.kernels.reference import FP8
from sana.models.dit import LinearDiT, Prepared, _exact
from sana.models.layers import CrossAttention, sinusoids
from sana.models.rounding import narrow

PLAIN = DiTConfig(width=32, depth=2, cross_heads=2, text_dim=12, latent_channels=4, head_dim=16)
NORMED = replace(PLAIN, qk_norm=True)
SPRINT = replace(NORMED, guidance_embedding=True)
POSITIONED = replace(PLAIN, position_scale=2.0, position_base=8)
PATCHED = replace(NORMED, patch_size=2)
REFINED = replace(NORMED, refiner=RefinerConfig(depth=1, heads=2, max_tokens=9))
ALL = {
    "plain": PLAIN,
    "normed": NORMED,
    "sprint": SPRINT,
    "positioned": POSITIONED,
    "patched": PATCHED,
    "refined": REFINED,
}
EVERY = pytest.mark.parametrize("config", list(ALL.values()), ids=list(ALL))


def build(config: DiTConfig, *, dtype: torch.dtype = torch.float64) -> LinearDiT:
    """A network with every weight drawn, so that no gate, norm or output is neutral."""
    generator = torch.Generator().manual_seed(0)
    network = LinearDiT(config).to(dtype)
    for parameter in network.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise / fan**0.5).to(dtype)
    return network


class Inputs:
    def __init__(self, config: DiTConfig, grid: tuple[int, int] = (4, 6), batch: int = 3) -> None:
        generator = torch.Generator().manual_seed(1)
        double = {"generator": generator, "dtype": torch.float64}
        shape = (batch, config.latent_channels, *grid)
        self.latent = torch.randn(shape, **double)
        self.time = torch.tensor([0.999, 0.5, 0.017])[:batch]
        self.text = torch.randn(batch, 7, config.text_dim, **double)
        self.mask = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:batch, None]
        is_guided = config.guidance_embedding
        self.guidance = torch.tensor([4.5, 1.0, 3.0])[:batch] if is_guided else None

    def run(self, network: LinearDiT) -> Tensor:
        output: Tensor = network(
            self.latent, self.time, self.text, self.mask, guidance=self.guidance
        )
        return output


class Formula:
    """The network for patch size 1, without positions or refiner, on one picture at a time."""

    def __init__(self, network: LinearDiT) -> None:
        self.depth = network.config.depth
        self.state = {name: value.detach() for name, value in network.named_parameters()}

    def __call__(self, x: Inputs, b: int) -> Tensor:
        height, width = x.latent.shape[2:]
        tokens = self.linear("patch_embed.projection", x.latent[b].flatten(1).T)
        if x.guidance is None:
            embedding = self.mlp("time_embed", x.time[b] * 1000)
        else:
            embedding = self.mlp("time_embed", x.time[b])
            embedding = embedding + self.mlp("guidance_embed", x.guidance[b] * 0.1)
        six = self.linear("modulation", F.silu(embedding)).view(6, -1)
        text = self.linear("text_input", x.text[b][x.mask[b]])
        text = self.linear("text_output", F.gelu(text, approximate="tanh"))
        text = self.norm("text_norm", text)
        for i in range(self.depth):
            p = f"blocks.{i}."
            table = self.state[p + "table"] + six
            y = modulated(tokens, table[0], table[1])
            tokens = tokens + table[2] * self.self_attention(p + "attention", y)
            tokens = tokens + self.cross_attention(p + "cross_attention", tokens, text)
            y = modulated(tokens, table[3], table[4]).T.reshape(1, -1, height, width)
            tokens = tokens + table[5] * self.feed_forward(p + "feed_forward", y)
        shift, scale = self.state["table"] + embedding
        return self.linear("output", modulated(tokens, shift, scale)).T.reshape(-1, height, width)

    def linear(self, name: str, y: Tensor) -> Tensor:
        return F.linear(y, self.state[name + ".weight"], self.state.get(name + ".bias"))

    def mlp(self, name: str, value: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.input", sinusoids(value[None]).double())
        return self.linear(f"{name}.output", F.silu(hidden))

    def norm(self, name: str, y: Tensor) -> Tensor:
        weight = self.state.get(name + ".weight")
        return y if weight is None else F.rms_norm(y, y.shape[-1:], weight, 1e-5)

    def self_attention(self, name: str, y: Tensor) -> Tensor:
        q, k, v = self.linear(name + ".qkv", y).chunk(3, -1)
        q, k = self.norm(name + ".query_norm", q), self.norm(name + ".key_norm", k)
        scores = heads(q.relu()) @ heads(k.relu()).mT
        mixed = (scores / (scores.sum(-1, keepdim=True) + 1e-15)) @ heads(v)
        return self.linear(name + ".output", mixed.transpose(0, 1).flatten(1))

    def cross_attention(self, name: str, y: Tensor, text: Tensor) -> Tensor:
        q = self.norm(name + ".query_norm", self.linear(name + ".query", y))
        k, v = self.linear(name + ".key_value", text).chunk(2, -1)
        scores = heads(q) @ heads(self.norm(name + ".key_norm", k)).mT / 16**0.5
        mixed = scores.softmax(-1) @ heads(v)
        return self.linear(name + ".output", mixed.transpose(0, 1).flatten(1))

    def feed_forward(self, name: str, y: Tensor) -> Tensor:
        y = F.silu(self.linear(name + ".expand", y.movedim(1, -1))).movedim(-1, 1)
        weight, bias = self.state[name + ".depthwise.weight"], self.state[name + ".depthwise.bias"]
        y = F.conv2d(y, weight, bias, padding=1, groups=y.shape[1])
        value, gate = y.flatten(2)[0].T.chunk(2, -1)
        return self.linear(name + ".project", value * F.silu(gate))


def heads(y: Tensor) -> Tensor:
    return y.view(len(y), 2, 16).transpose(0, 1)


def modulated(y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale) + shift


@pytest.mark.parametrize("config", [PLAIN, NORMED, SPRINT], ids=["plain", "normed", "sprint"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (7, 9)])
def test_equals_the_formula(config: DiTConfig, grid: tuple[int, int]) -> None:
    inputs, network = Inputs(config, grid), build(config)
    expected = torch.stack([Formula(network)(inputs, b) for b in range(3)])

    def check(candidate: LinearDiT) -> None:
        assert_matches(expected, inputs.run(candidate), 4.7e-15)  # floor 4.7e-16

    check(network)
    for name in ("blocks.1.table", "blocks.0.cross_attention.key_value.weight", "table"):
        faulty = build(config)
        with torch.no_grad():
            faulty.get_parameter(name)[0].mul_(1.01)
        assert_detects(check, faulty)


@EVERY
def test_fp32_and_bf16_stay_near_fp64(config: DiTConfig) -> None:
    inputs = Inputs(config)
    expected = inputs.run(build(config))
    assert_matches(expected, inputs.run(build(config, dtype=torch.float32)), 3.5e-6)  # floor 3.5e-7
    network = build(config, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_matches(expected, inputs.run(network), 0.1)  # floor 0.010
    assert_matches(expected, inputs.run(build(config, dtype=torch.bfloat16)), 0.1)  # floor 0.010


@EVERY
def test_masked_text_does_not_matter(config: DiTConfig) -> None:
    network, inputs = build(config), Inputs(config)
    expected = inputs.run(network)

    def check(changed: Tensor) -> None:
        other = Inputs(config)
        other.text = torch.where(changed[..., None], other.text + 1, other.text)
        assert_matches(expected, other.run(network), 0.0)  # floor 0

    check(~inputs.mask)
    assert_detects(check, inputs.mask)


@EVERY
def test_pictures_do_not_depend_on_their_batch(config: DiTConfig) -> None:
    network, inputs = build(config), Inputs(config)
    together = inputs.run(network)
    for name in ("latent", "time", "text", "mask"):
        setattr(inputs, name, getattr(inputs, name)[1:2])
    inputs.guidance = None if inputs.guidance is None else inputs.guidance[1:2]

    def check(index: int) -> None:
        assert_matches(together[index : index + 1], inputs.run(network), 5.8e-15)  # floor 5.8e-16

    check(1)
    assert_detects(check, 0)


@EVERY
def test_every_parameter_learns(config: DiTConfig) -> None:
    network = build(config)
    Inputs(config).run(network).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@EVERY
def test_a_new_network_predicts_zero(config: DiTConfig) -> None:
    output = Inputs(config).run(LinearDiT(config).double())
    assert torch.equal(output, torch.zeros_like(output))


def test_the_network_is_told_whole_thousandths_exactly() -> None:
    whole = torch.arange(1001.0)
    scaled = whole.double().div(1000).float() * 1000
    assert (scaled != whole).any(), "fp32 misses some"
    assert torch.equal(_exact(scaled), whole)
    between = torch.tensor([0.5003, 17.25, 998.7])
    assert torch.equal(_exact(between), between)
    slope = torch.autograd.functional.jacobian(_exact, scaled[:20]).diagonal()
    assert torch.equal(slope, torch.ones(20))


def test_text_may_be_embedded_once() -> None:
    network, inputs = build(REFINED), Inputs(REFINED)
    embedded = network.embed_text(inputs.text, inputs.mask)
    got = network.denoise(inputs.latent, inputs.time, embedded, inputs.mask)
    assert torch.equal(got, inputs.run(network))


def test_perturbed_blocks_are_the_chosen_ones() -> None:
    """Equal to a network whose block 1 has an identity for attention, for the last samples only."""
    network, inputs = build(NORMED), Inputs(NORMED)
    embedded = network.embed_text(inputs.text, inputs.mask)
    plain = inputs.run(network)

    def run(blocks: tuple[int, ...], perturbed: int) -> Tensor:
        return network.denoise(
            inputs.latent,
            inputs.time,
            embedded,
            inputs.mask,
            perturbed=perturbed,
            perturbed_blocks=blocks,
        )

    assert torch.equal(run((), 2), plain)
    other = build(NORMED)
    attention = other.blocks[1].attention
    attention.forward = lambda x, *_, **__: attention.output(attention.qkv(x).chunk(3, -1)[2])
    expected = torch.cat([plain[:1], inputs.run(other)[1:]])

    def check(blocks: tuple[int, ...]) -> None:
        assert_matches(expected, run(blocks, 2), 4e-15)  # floor 4.0e-16

    check((1,))
    assert_detects(check, (0,))


def test_patches_keep_their_place() -> None:
    """Without attention, text and convolution, a patch of latent moves only its own patch."""
    network = build(PATCHED)
    with torch.no_grad():
        for block in network.blocks:
            for part in (block.attention.output, block.cross_attention.output):
                part.weight.zero_()
            block.feed_forward.project.weight.zero_()
    inputs = Inputs(PATCHED, grid=(6, 8))
    before = inputs.run(network)
    inputs.latent[:, :, 2:4, 6:8] += 1
    moved = (inputs.run(network) - before).abs().amax((0, 1)) > 1e-9
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal(moved, expected)


def test_patch_pixels_come_out_in_order() -> None:
    """The linear's features are (row in patch, column in patch, channel), channel fastest."""
    network = build(PATCHED)
    features = torch.arange(16.0).expand(1, 2, 3, 16)
    out = network._unpatch(features)
    assert out.shape == (1, 4, 4, 6)
    for c in range(4):
        for i in range(4):
            for j in range(6):
                assert out[0, c, i, j] == (i % 2) * 8 + (j % 2) * 4 + c


def test_positions_follow_the_grid() -> None:
    """One network serves several grids in turn; the kept table never goes stale."""
    network = build(POSITIONED)
    wide, tall = Inputs(POSITIONED, grid=(4, 6)), Inputs(POSITIONED, grid=(6, 4))
    first = wide.run(network)
    tall.run(network)
    assert torch.equal(wide.run(network), first)
    assert_detects(lambda config: assert_matches(first, wide.run(build(config)), 1e-3), PLAIN)


def test_sprint_needs_a_guidance_scale() -> None:
    inputs = Inputs(SPRINT)
    inputs.guidance = None
    with pytest.raises(ValueError, match="guidance is None"):
        inputs.run(build(SPRINT))


def test_the_output_has_the_latents_dtype() -> None:
    inputs = Inputs(NORMED)
    inputs.latent = inputs.latent.float()
    assert inputs.run(build(NORMED, dtype=torch.bfloat16)).dtype is torch.float32


@EVERY
def test_a_prepared_text_gives_the_same_bits(config: DiTConfig) -> None:
    network, inputs = build(config), Inputs(config)
    embedded = network.embed_text(inputs.text, inputs.mask)
    expected = inputs.run(network)

    def check(prepared: Prepared) -> None:
        got = network.denoise(inputs.latent, inputs.time, prepared, None, guidance=inputs.guidance)
        assert torch.equal(got, expected)

    prepared = network.prepare(embedded, inputs.mask)
    check(prepared)
    assert_detects(check, prepared._replace(bias=None))
    assert_detects(check, prepared._replace(keys_values=prepared.keys_values[::-1]))


def test_the_kernels_compute_the_same_network() -> None:
    """In triton's interpreter, or on a GPU: every op of a block but the matrix products."""
    pytest.importorskip("triton", reason="triton is made for Linux only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = replace(NORMED, clamps=True)
    inputs = Inputs(config, grid=(2, 3), batch=2)
    network = build(config)
    with torch.inference_mode():
        expected = inputs.run(network).float()
    network.float().to(device)

    def check(network: LinearDiT) -> None:
        prepared = network.prepare(
            network.embed_text(inputs.text.float().to(device), inputs.mask.to(device)),
            inputs.mask.to(device),
        )
        latent = inputs.latent.float().to(device)
        got = network.denoise(latent, inputs.time.to(device), prepared, None)
        assert_matches(expected, got.cpu(), 2e-6)  # floor 2.1e-7

    with torch.inference_mode(), ops.force("triton"), ops.trying(*UNPROVEN):
        check(network)
        network.blocks[1].feed_forward.depthwise.bias.data.mul_(1.01)
        assert_detects(check, network)


def test_a_text_of_one_token_is_the_same_everywhere() -> None:
    """Guidance's empty text, in the first of three samples; in fp64, the other way of summing."""
    network, inputs = build(NORMED), Inputs(NORMED, batch=3)
    inputs.mask[:] = True
    inputs.mask[0] = torch.arange(inputs.mask.shape[1]) == 1
    with torch.inference_mode():
        expected = inputs.run(network)
        embedded = network.embed_text(inputs.text, inputs.mask)
        with ops.force("triton"):
            prepared = network.prepare(embedded, inputs.mask)

    def check(lone: tuple[Tensor, ...]) -> None:
        changed = prepared._replace(lone=lone)
        with torch.inference_mode():
            got = network.denoise(inputs.latent, inputs.time, changed, None)
        assert_matches(expected, got, 1e-13)

    assert prepared.lone[0].shape == (1, 1, NORMED.width) and len(prepared.keys_values[0][0]) == 2
    check(prepared.lone)
    assert_detects(check, prepared.lone[::-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's product in fp8 gives bf16 alone")
def test_in_fp8_the_norm_adds_what_a_lone_text_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a copy of it for all tokens; in triton's interpreter."""
    pytest.importorskip("triton", reason="triton is made for Linux only")
    config = replace(NORMED, clamps=True)
    network, inputs = build(config, dtype=torch.float32), Inputs(config, grid=(2, 2))
    inputs.mask[:] = True
    inputs.mask[:2] = torch.arange(inputs.mask.shape[1]) == 1
    latent, time, text = (x.float() for x in (inputs.latent, inputs.time, inputs.text))
    narrow(network, FP8)

    def run(*without: Way, swaps: bool = False) -> Tensor:
        trying = ops.trying(without=without)
        with torch.inference_mode(), ops.force("triton"), trying:
            prepared = network.prepare(network.embed_text(text, inputs.mask), inputs.mask)
            assert len(prepared.lone[1]) == 2
            if swaps:
                prepared = prepared._replace(lone=tuple(row.flip(0) for row in prepared.lone))
            return network.denoise(latent, time, prepared, None)

    expected = run("lone_rows")

    def check(swaps: bool) -> None:
        assert_matches(expected, run(swaps=swaps), 1e-6)  # floor 0

    monkeypatch.setattr(CrossAttention, "_beside", None)
    check(False)
    assert_detects(check, True)
