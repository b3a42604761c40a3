"""Gemma-2's kernels and the network through them, in triton's interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemmas import TINY, tiny_gemma
from numerics import assert_detects, assert_matches
from sana.kernels import ops, reference
from sana.kernels.proven import Way
from sana.models.gemma import Gemma2
from sana.models.gemma_decoder import GemmaDecoder, Memory, adjoin, adjoined
from sana.pipelines.memory import MemoryPlan
from sana.pipelines.offload import Offload

kernels = pytest.importorskip("sana.kernels.gemma", reason="triton is made for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter has no products in bf16, and cuts where a GPU rounds.
NARROW = torch.float16
WAYS: tuple[Way, ...] = ("gemma_norm", "gemma_attention", "gemma_gate", "gemma_joined")
EPS = 1e-6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1.5e-6), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)],
)  # floors 1.5e-7, 5.5e-4, 4.8e-3
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 3), (2, 3, 100), (1, 5, 64)])
def test_norms_around_the_residual_equal_the_reference(
    batch: int, tokens: int, width: int, dtype: torch.dtype, bound: float
) -> None:
    x, branch = (draw(batch, tokens, width, seed=i).to(dtype) for i in (0, 1))
    after, before = (draw(width, seed=i).to(dtype) / 4 for i in (2, 3))

    def run(kind: torch.dtype, after: Tensor, before: Tensor) -> list[Tensor]:
        rest = (branch.to(kind), after.to(kind))
        total, normed = ops.sandwich_norm(x.to(kind), *rest, before.to(kind), eps=EPS)
        alone, nothing = ops.sandwich_norm(x.to(kind), *rest, None, eps=EPS)
        same, only = ops.sandwich_norm(x.to(kind), None, None, before.to(kind), eps=EPS)
        assert nothing is None and normed is not None and only is not None
        assert torch.equal(alone, total) and torch.equal(same, x.to(kind))
        return [total, normed, only]

    exact = [part.to(dtype) for part in run(torch.float64, after, before)]

    def check(weights: tuple[Tensor, Tensor]) -> None:
        with ops.force("triton"), ops.trying("gemma_norm"):
            for expected, got in zip(exact, run(dtype, *weights), strict=True):
                assert_matches(expected, got, bound)

    check((after, before))
    tilt = torch.linspace(-0.2, 0.2, width).to(before)
    assert_detects(check, (after, before + tilt))
    assert_detects(check, (after + tilt, before))


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 5e-7), (torch.float16, 1e-4), (torch.bfloat16, 2e-2)],
)  # floors 6.8e-8, one digit in a thousand, 4.2e-3
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 3), (2, 3, 1100)])
def test_the_gate_equals_the_reference(
    batch: int, tokens: int, width: int, dtype: torch.dtype, bound: float
) -> None:
    both = draw(batch, tokens, 2 * width).to(dtype) * 2
    exact = reference.gelu_gate(*both.double().chunk(2, dim=-1)).to(dtype)

    def check(both: Tensor) -> None:
        with ops.force("triton"), ops.trying("gemma_gate"):
            got = ops.gelu_gate(*both.chunk(2, dim=-1))
        assert got.is_contiguous()
        assert_matches(exact, got, bound)

    check(both)
    assert_detects(check, both * 1.05)


class Heads:
    """Rows of one product, a memory that is a slice, turns of places far from zero."""

    def __init__(self, batch: int, before: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
        self.dim, self.before, self.scale = dim, before, dim**-0.5
        self.qkv = (draw(batch, tokens, 8 * dim) * 1.5).to(dtype)
        self.memory = [draw(batch, 2, before + 3, dim, seed=i).to(dtype) for i in (1, 2)]
        angles = torch.outer(torch.arange(tokens) + 7.0, 3.0 ** -torch.arange(dim / 2))
        angles = torch.cat([angles, angles], dim=-1).to(DEVICE)
        self.turns = [angles.cos().to(dtype), angles.sin().to(dtype)]
        self.mask = torch.arange(tokens, device=DEVICE)[None] < max(1, tokens - 2)

    def parts(self) -> tuple[Tensor, ...]:
        return self.qkv.split([4 * self.dim, 2 * self.dim, 2 * self.dim], dim=-1)

    def past(self) -> list[Tensor]:
        return [part[:, :, : self.before] for part in self.memory] if self.before else []

    def plain(self, dtype: torch.dtype, cap: float, mask: Tensor | None) -> Tensor:
        """The way of the network without the kernel."""
        q, k, v = (
            part.to(dtype).unflatten(-1, (-1, self.dim)).transpose(1, 2) for part in self.parts()
        )
        cosine, sine = (part.to(dtype) for part in self.turns)
        q, k = (reference.turned(part, (cosine, sine)) for part in (q, k))
        if self.before:
            k, v = (
                torch.cat([p.to(dtype), x], 2) for p, x in zip(self.past(), (k, v), strict=True)
            )
        length = k.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[self.before :]
        hidden = ~(seen if mask is None else seen & mask[:, None, None])
        return reference.capped_attention(q, k, v, hidden, scale=self.scale, cap=cap)

    def fast(self, cap: float, mask: Tensor | None, turns: list[Tensor] | None = None) -> Tensor:
        out: Tensor = kernels.prompt_attention(
            *self.parts(), turns or self.turns, self.past(), mask, self.dim, self.scale, cap
        )
        return out


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float32, 2e-6),
        (NARROW, 3.5e-3),
        pytest.param(torch.bfloat16, 2.5e-2, marks=pytest.mark.gpu),
    ],
)  # floors 2.1e-7, 3.8e-4
@pytest.mark.parametrize("cap", [2.0, torch.inf])
@pytest.mark.parametrize(
    ("batch", "before", "tokens", "dim", "masked"),
    [(1, 0, 1, 8, False), (2, 0, 21, 8, True), (1, 70, 37, 48, False), (1, 5, 64, 256, False)],
)
def test_attention_is_as_near_to_fp64_as_the_plain_one(
    batch: int,
    before: int,
    tokens: int,
    dim: int,
    masked: bool,
    cap: float,
    dtype: torch.dtype,
    bound: float,
) -> None:
    if dtype == torch.float32 and DEVICE == "cuda":
        # `gemma.takes` refuses fp32 there: the interpreter alone has it, for want of bf16.
        pytest.skip("on a GPU the kernel takes bf16 and fp16 alone")
    heads = Heads(batch, before, tokens, dim, dtype)
    mask = heads.mask.expand(batch, -1) if masked else None
    exact = heads.plain(torch.float64, cap, mask).to(dtype)
    plain = heads.plain(dtype, cap, mask)
    got = heads.fast(cap, mask)
    assert_matches(exact, got, bound)

    def rms(x: Tensor) -> float:
        return float((x.double() - exact.double()).square().mean().sqrt())

    assert rms(got) <= 1.3 * rms(plain) + 1e-8
    if tokens > 1:
        faults = [heads.fast(3 * cap if cap < 9 else 2.0, mask)]
        faults.append(heads.fast(cap, mask, [heads.turns[0], -heads.turns[1]]))
        real = torch.ones(batch, tokens, dtype=torch.bool, device=DEVICE)
        real[:, 1] = False
        faults.append(heads.fast(cap, None if masked else real))
        for fault in faults:
            assert_detects(lambda x: assert_matches(exact, x, bound), fault)


def test_attention_takes_what_it_knows() -> None:
    x = draw(1, 2, 16)
    with ops.force("triton"):
        assert ops.knows_prompt_attention(x.to(NARROW), 8, 50.0)
        assert ops.knows_prompt_attention(x.to(NARROW), 8, torch.inf)
        for other in ((x.double(), 8, 50.0), (x.to(NARROW), 7, 50.0), (x.to(NARROW), 8, 1e9)):
            assert not ops.knows_prompt_attention(*other)
        assert not ops.knows_prompt_attention(x.to(NARROW).requires_grad_(), 8, 50.0)


def made() -> Gemma2:
    """In fp32, with a short instruction."""
    gemma = tiny_gemma(max_tokens=40).to(DEVICE)
    gemma.instruction = "photo of two mountains, left and right "
    return gemma


def states(gemma: Gemma2, backend: ops.Backend) -> list[Tensor]:
    """Of a prompt behind the instruction, of one without, of one with padding."""
    with ops.force(backend), ops.trying(*WAYS):
        read = gemma.encode(["a red fox in the snow"]).states
        negative = gemma.encode_negative(["a blue fox"]).states
        return [read, negative, gemma.encode_negative(["", "a fox"], length=21).states]


# On a GPU the attention takes no fp32.
def test_the_network_is_the_same_by_kernels() -> None:
    gemma = made()
    expected = states(gemma, "reference")
    gemma._prefix = gemma._empty = None

    def check(gemma: Gemma2) -> None:
        for exact, got in zip(expected, states(gemma, "triton"), strict=True):
            assert_matches(exact, got, 3e-6)  # floor 3e-7

    check(gemma)
    faulty = made()
    faulty.model.layers[1].self_attn.config = replace(TINY, soft_cap=2.3)
    assert_detects(check, faulty)
    faulty = made()
    faulty.model.layers[2].post_feedforward_layernorm.weight.data *= 1.1
    assert_detects(check, faulty)


def test_a_memory_is_kept_only_when_it_is_asked_for() -> None:
    decoder: GemmaDecoder = made().model
    ids = torch.arange(5, 17, device=DEVICE)[None]
    with torch.no_grad(), ops.force("triton"), ops.trying(*WAYS):
        whole, memory = decoder(ids)
        assert [tuple(key.shape) for key, _ in memory] == [(1, 2, 12, 8)] * 3
        first = decoder(ids[:, :7])[1]
        got, nothing = decoder(ids[:, 7:], None, first, keeps=False)
    assert nothing == []
    assert_matches(whole[:, 7:], got, 3e-6)  # floor 3e-7

    def check(memory: Memory) -> None:
        with torch.no_grad(), ops.force("triton"), ops.trying(*WAYS):
            assert_matches(whole[:, 7:], decoder(ids[:, 7:], None, memory, keeps=False)[0], 3e-6)

    assert_detects(check, [(key.roll(1, 2), value) for key, value in first])


def test_streaming_layers_are_the_same_bits() -> None:
    """Then a layer's last norm and the next one's first are apart, and weights come together."""
    gemma = made()
    expected = states(gemma, WAYS)
    streaming = made().cpu()
    stage = Offload({"text": streaming}, torch.device(DEVICE))
    stage.follow(MemoryPlan(text="streams"))
    stage.enter("text")
    with torch.inference_mode():
        got = states(streaming, WAYS)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    stage.rest()
    first = [linear.weight for linear in streaming.model.layers[0].mlp.together]
    assert all(weight.device.type == "cpu" for weight in first)


def test_weights_side_by_side_are_one_and_moving_parts_them() -> None:
    decoder: GemmaDecoder = made().model
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    attention = decoder.layers[0].self_attn
    weights = [linear.weight for linear in attention.together]
    assert adjoined(weights) is None
    adjoin(decoder)
    whole = adjoined(weights)
    assert whole is not None and torch.equal(whole, torch.cat(list(weights)))
    assert adjoined(weights[::-1]) is None
    places = [parameter.data_ptr() for parameter in decoder.parameters()]
    adjoin(decoder)
    assert places == [parameter.data_ptr() for parameter in decoder.parameters()]
    assert {name: value.shape for name, value in decoder.state_dict().items()} == {
        name: value.shape for name, value in before.items()
    }
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())
    attention.k_proj.weight.data = attention.k_proj.weight.data.clone()
    assert adjoined(weights) is None
    adjoin(decoder)
    assert adjoined(weights) is not None
