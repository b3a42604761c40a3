"""Networks that come and go: the same bits wherever they were, and never more of them than said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemmas import tiny_gemma
from live_bytes import LiveBytes
from numerics import assert_detects
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.pipelines import offload
from sana.pipelines.memory import MemoryPlan
from sana.pipelines.moving import Unit, tensors_of
from sana.pipelines.offload import Offload, Stream, longest_list
from sana.presets import preset

CPU = torch.device("cpu")
CONFIG = preset("tiny").config


class Reader(nn.Module):
    """A text encoder in small: a table, blocks, a buffer, and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.norm = nn.LayerNorm(16)
        self.twin = nn.Linear(16, 16)
        self.twin.weight = self.norm_weight = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("shift", torch.randn(16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids.to(self.table.weight.device))
        for layer in self.layers:
            x = layer(x).tanh() + x
        result: Tensor = self.twin(self.norm(x)) + self.shift
        return result


def networks() -> dict[Any, nn.Module]:
    torch.manual_seed(0)
    dit = LinearDiT(replace(CONFIG.dit, depth=3)).eval()
    for parameter in dit.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    autoencoder = DCAE(CONFIG.autoencoder).eval().to(memory_format=torch.channels_last)
    return {"text": Reader().eval(), "dit": dit, "autoencoder": autoencoder}


IDS = torch.tensor([[3, 499, 3, 0]])
LATENT = torch.randn(2, 8, 3, 2, generator=torch.Generator().manual_seed(2))


def draw(parts: dict[Any, nn.Module], stage: Offload | None) -> list[Tensor]:
    """Each network's result, in the order of a picture's way."""

    def enter(phase: Any) -> None:
        if stage is not None:
            stage.enter(phase)

    with torch.inference_mode():
        enter("text")
        text = parts["text"](IDS)
        results = [text]
        for _ in range(2):
            enter("denoise")
            embedded = torch.ones(2, 4, CONFIG.dit.width)
            dit: Any = parts["dit"]
            results.append(dit.denoise(LATENT, torch.tensor([0.3, 0.9]), embedded, None))
        enter("decode")
        autoencoder: Any = parts["autoencoder"]
        results.append(autoencoder.decode(results[-1]))
        enter("encode")
        results.append(autoencoder.encode(results[-1]))
    return results


PLANS = {
    "stay": MemoryPlan(),
    "text visits": MemoryPlan(text="visits"),
    "all visit": MemoryPlan(text="visits", dit="visits", autoencoder="visits"),
    "early": MemoryPlan(
        text="visits", dit="visits", autoencoder="visits", early=("dit", "autoencoder")
    ),
    "text streams": MemoryPlan(text="streams", dit="visits", autoencoder="visits"),
    "both stream": MemoryPlan(text="streams", dit="streams", autoencoder="visits"),
}


@pytest.mark.parametrize("name", PLANS)
def test_results_are_the_same_bits_under_every_plan(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "LARGE_TABLE", 1000)
    monkeypatch.setattr(offload, "CHUNK", 4000)
    expected = draw(networks(), None)
    parts = networks()
    stage = Offload(parts, CPU)
    stage.follow(PLANS[name])

    def check(results: list[Tensor]) -> None:
        assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))

    check(draw(parts, stage))
    check(draw(parts, stage))
    stage.rest()
    states = networks()
    for part, network in parts.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, states[part].state_dict()[key]), key
            assert tensor.stride() == states[part].state_dict()[key].stride(), key
    check(draw(parts, None))
    parts["dit"].blocks[2].table.data.mul_(1.01)  # type: ignore[union-attr, index, operator]
    assert_detects(check, draw(parts, stage))


def test_a_plan_may_change_between_pictures() -> None:
    parts = networks()
    expected = draw(networks(), None)
    stage = Offload(parts, CPU)
    for chosen in (*PLANS.values(), *reversed(PLANS.values())):
        stage.follow(chosen)
        assert all(torch.equal(a, b) for a, b in zip(expected, draw(parts, stage), strict=True))


def bytes_of(network: nn.Module) -> int:
    return sum(tensor.nbytes for _, tensor in tensors_of(network))


def held_while(stage: Offload, run: Any) -> int:
    """The most bytes of weights that a phase holds beside its own work."""
    with LiveBytes() as live, torch.no_grad():
        run()
        return live.now


def test_no_more_is_here_than_the_plan_says() -> None:
    parts = networks()
    stage = Offload(parts, CPU)
    stage.follow(PLANS["all visit"])
    ways: Any = (("text", "text"), ("denoise", "dit"), ("decode", "autoencoder"))
    for phase, _ in 2 * ways:  # what comes again is gathered on the host first
        stage.enter(phase)
        stage.rest()
    for phase, part in ways:
        held = held_while(stage, lambda phase=phase: stage.enter(phase))
        whole = bytes_of(parts[part])
        assert whole <= held <= 1.3 * whole + 2**14, phase
        stage.rest()
    stage.follow(PLANS["early"])
    held = held_while(stage, lambda: stage.enter("denoise"))
    assert held > bytes_of(parts["dit"]) + bytes_of(parts["autoencoder"])


def test_only_what_comes_again_is_gathered_on_the_host() -> None:
    network = networks()["dit"]
    unit = Unit(tensors_of(network), CPU, None)
    before = {name: p.data_ptr() for name, p in network.named_parameters()}
    for times in range(3):
        unit.fetch()
        unit.use()
        assert all(p.data_ptr() != before[name] for name, p in network.named_parameters())
        unit.drop()
        back = all(p.data_ptr() == before[name] for name, p in network.named_parameters())
        assert back == (times == 0)


def test_a_stream_holds_two_blocks_however_many_there_are() -> None:
    held = []
    for depth in (4, 9):
        torch.manual_seed(0)
        network = LinearDiT(replace(CONFIG.dit, depth=depth))
        stream = Stream(network, CPU, None)
        with torch.no_grad(), LiveBytes() as live:
            stream.begin()
            stream.arrive()
            network.denoise(LATENT, torch.ones(2), torch.ones(2, 4, CONFIG.dit.width), None)
        held.append(live.now)
        stream.leave()
        assert not stream._hooks
    assert held[0] == held[1]
    assert held[0] < 0.8 * bytes_of(network)


def test_a_run_that_was_broken_off_leaves_no_stale_block() -> None:
    torch.manual_seed(0)
    network = LinearDiT(replace(CONFIG.dit, depth=5)).eval()

    def draw_once() -> Tensor:
        with torch.inference_mode():
            return network.denoise(LATENT, torch.ones(2), torch.ones(2, 4, 64), None)

    nn.init.normal_(network.output.weight)
    expected = draw_once()
    stream = Stream(network, CPU, None)
    stream.begin()
    stream.arrive()
    for stop in range(5):

        def fail(_module: nn.Module, _inputs: object) -> None:
            raise MemoryError("in the middle")

        handle = network.blocks[stop].feed_forward.register_forward_pre_hook(fail)  # type: ignore[union-attr]
        with pytest.raises(MemoryError):
            draw_once()
        handle.remove()
        assert torch.equal(draw_once(), expected), stop


def test_the_longest_list_is_the_blocks() -> None:
    network = LinearDiT(replace(CONFIG.dit, depth=3))
    assert longest_list(network) is network.blocks


def test_gemma_streams_with_its_table_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LARGE_TABLE", 1000)
    prompts = ["a red fox", "3 cats in the snow"]
    expected = [tiny_gemma().encode([prompt]).states for prompt in prompts]
    gemma = tiny_gemma()
    stage = Offload({"text": gemma}, CPU)
    stage.follow(MemoryPlan(text="streams"))
    looked_up = []
    plain = offload.Table._gather

    def gather(table: Any, module: nn.Module, inputs: Any) -> Any:
        result = plain(table, module, inputs)
        looked_up.append(len(gemma.model.embed_tokens.weight))
        return result

    monkeypatch.setattr(offload.Table, "_gather", gather)
    for _ in range(2):
        stage.enter("text")
        with torch.inference_mode():
            got = [gemma.encode([prompt]).states for prompt in prompts]
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        stage.rest()
    assert looked_up
    assert max(looked_up) < len(gemma.model.embed_tokens.weight) / 2
