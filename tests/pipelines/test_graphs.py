"""CUDA graphs of steps, with a stand-in that records a call and runs it again on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemmas import tiny_gemma
from numerics import assert_detects, assert_matches
from sana.config import DiTConfig
from sana.kernels import ops
from sana.models.dit import LinearDiT, Moment, Prepared
from sana.models.tiling import decode_tiled
from sana.pipelines import placing
from sana.pipelines.footprint import Canvas
from sana.pipelines.graphs import MOST, Graphs, addresses, cuda_capture, tensors_of
from sana.pipelines.memory import MemoryPlan
from sana.pipelines.pipeline import Pipeline
from sana.pipelines.texts import Texts
from sana.presets import preset
from sana.request import Request
from standins import tiny_components

GIB = 2**30
FACTOR = preset("tiny").config.autoencoder.factor


class Recorder:
    """Like a CUDA graph, it knows only the memory that it was captured with."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captured += 1
        output = call()

        def replay() -> None:
            self.replayed += 1
            for place, tensor in zip(tensors_of(output), tensors_of(call()), strict=True):
                place.copy_(tensor)

        return replay, output


def network(latent: Tensor, moment: Moment, text: Prepared, mask: Tensor, **options: Any) -> Tensor:
    [(key, value)] = text.keys_values
    total = latent * moment.embedding.sum() + (key * value * mask).sum()
    return total + sum(options.get("blocks", ()))


def draw(seed: int, width: int = 3) -> tuple[Tensor, Moment]:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(2, width, generator=generator)
    return latent, Moment(torch.randn(1, 4, generator=generator), torch.zeros(1, 6, 4))


def text(seed: int) -> tuple[Prepared, Tensor]:
    key, value = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
    return Prepared(keys_values=((key, value),), bias=None), torch.ones(5)


def test_replays_follow_every_input() -> None:
    recorder, owner = Recorder(), nn.Linear(2, 2)
    graphs = Graphs(recorder)
    first, second = text(1), text(2)
    for step, words in enumerate([first, first, first, second, second, first]):
        inputs = (*draw(step), *words)
        assert torch.equal(graphs(network, owner, *inputs), network(*inputs))
    assert (recorder.captured, recorder.replayed) == (1, 4)


def test_a_text_is_copied_once_and_results_are_the_callers_own() -> None:
    recorder, owner = Recorder(), nn.Linear(2, 2)
    graphs, words = Graphs(recorder), text(1)
    results = [graphs(network, owner, *draw(step), *words) for step in range(4)]
    for step, result in enumerate(results):
        assert torch.equal(result, network(*draw(step), *words))
    [(key, _)] = words[0].keys_values
    key.zero_()  # the same tensor, so nobody looks
    unaware = graphs(network, owner, *draw(3), *words)
    assert torch.equal(unaware, results[3])


def test_options_and_shapes_have_graphs_of_their_own_and_few_are_kept() -> None:
    recorder, owner, words = Recorder(), nn.Linear(2, 2), text(1)
    graphs = Graphs(recorder)
    for _ in range(3):
        for blocks in ((), (1,)):
            got = graphs(network, owner, *draw(0), *words, blocks=blocks)
            assert torch.equal(got, network(*draw(0), *words, blocks=blocks))
    assert recorder.captured == 2
    for width in range(4, 4 + MOST):
        for _ in range(2):
            graphs(network, owner, *draw(0, width), *words)
    before = recorder.captured
    graphs(network, owner, *draw(0), *words, blocks=(1,))
    assert recorder.captured == before + 1, "the oldest was dropped"


def test_weights_that_moved_are_captured_anew() -> None:
    recorder, owner = Recorder(), nn.Linear(2, 2)
    graphs = Graphs(recorder)
    for seed in (1, 1, 2):
        graphs(network, owner, *draw(0), *text(seed))
    assert recorder.captured == 1
    before = addresses(owner)
    owner.weight.data = owner.weight.data.clone()
    assert addresses(owner) != before
    graphs(network, owner, *draw(0), *text(3))
    assert recorder.captured == 2


def test_a_graph_holds_what_the_network_drops_for_another_shape() -> None:
    owner = LinearDiT(
        DiTConfig(
            width=32, depth=1, cross_heads=2, text_dim=4, latent_channels=2, position_scale=1.0
        )
    )
    graphs = Graphs(Recorder())
    with torch.inference_mode():
        moment = owner.embed_times(torch.tensor([0.5]), None)[0.5]
        words = owner.prepare(torch.randn(1, 3, 32), None)
        for side in (2, 2, 3):
            graphs(owner.denoise, owner, torch.randn(1, 2, side, side), moment, words, None)
    [captured] = graphs._captured.values()
    [(key, table)] = captured.kept
    assert key[:2] == (2, 2) and table.shape == (2, 2, 32)


def test_a_refused_capture_leaves_the_call_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_call: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, owner, words = Graphs(refuse), nn.Linear(2, 2), text(1)
    for step in range(3):
        inputs = (*draw(step), *words)
        assert torch.equal(graphs(network, owner, *inputs), network(*inputs))
    assert caplog.text.count("no CUDA graph") == 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"seeds": (1, 2), "guidance": 1.0}, {"guidance_interval": (0.3, 0.9)}, {"pag_scale": 2.0}],
    ids=str,
)
def test_a_pipeline_draws_the_same_with_graphs(changes: dict[str, Any]) -> None:
    """Every input of the real network is seen by the graphs, or a replay would miss it."""
    pipeline = Pipeline(tiny_components())
    recorder = Recorder()
    requests = [
        Request(prompt=prompt, steps=4).replace(**changes) for prompt in ("a fox", "a cow", "a fox")
    ]
    plain = [list(pipeline.steps(request))[-1].latent for request in requests]
    pipeline._placing.graphs = Graphs(recorder)
    for expected, request in zip(plain, requests, strict=True):
        assert torch.equal(expected, list(pipeline.steps(request))[-1].latent)
    assert recorder.captured and recorder.replayed > recorder.captured


@pytest.mark.parametrize("name", ["tiny", "tiny-sprint"])
def test_requests_by_turns_read_their_own_texts_and_moved_weights(name: str) -> None:
    """All of the start in graphs: texts of one shape share the memory that steps read."""
    pipeline = Pipeline(tiny_components(name))
    requests = [Request(prompt=prompt, steps=4, seeds=3) for prompt in ("a fox", "a cow", "a hen")]

    def draw() -> list[Tensor]:
        """The last latents of requests whose steps take turns."""
        turns = zip(*map(pipeline.steps, requests), strict=True)
        *_, last = turns
        return [step.latent for step in last]

    plain = draw()
    recorder = Recorder()
    seats = pipeline._placing
    seats.graphs, seats.time_graphs = Graphs(recorder), Graphs(recorder)
    seats.texts = texts = Texts(recorder)

    def check(expected: list[Tensor]) -> None:
        for wanted, got in zip(expected, draw(), strict=True):
            assert torch.equal(wanted, got)

    for _ in range(3):
        check(plain)
    [place] = texts._places.values()
    assert place.replay is not None and recorder.replayed > recorder.captured
    place.text = lambda: None  # nobody's, so it is prepared again
    check(plain)
    weight = pipeline.components.dit.blocks[0].cross_attention.key_value.weight
    weight.data = 1.5 * weight.data
    changed = draw()
    seats.graphs, seats.time_graphs, seats.texts = Graphs(None), Graphs(None), Texts(None)
    check(changed)
    assert_detects(check, plain)


def test_a_pipeline_decodes_the_same_with_a_graph() -> None:
    pipeline = Pipeline(tiny_components())
    latents = [torch.randn(1, 8, side, 2) for side in (2, 2, 2, 3, 2)]
    plain = [pipeline.decode(latent)[0].tobytes() for latent in latents]
    recorder = Recorder()
    pipeline._placing.decode_graphs = Graphs(recorder)

    def check(latents: list[Tensor]) -> None:
        got = [pipeline.decode(latent)[0].tobytes() for latent in latents]
        assert got == plain

    check(latents)
    assert (recorder.captured, recorder.replayed) == (1, 2)
    assert_detects(check, [latents[1] + 0.1, *latents[1:]])
    weight = pipeline.components.autoencoder.decoder.stem.weight
    weight.data = 1.1 * weight.data
    changed = pipeline.decode(latents[0])[0].tobytes()
    pipeline._placing.decode_graphs = Graphs(None)
    assert changed == pipeline.decode(latents[0])[0].tobytes() != plain[0]


@pytest.mark.parametrize("length", [None, 20])
def test_prompts_are_read_the_same_through_a_graph(length: int | None) -> None:
    gemma, recorder = tiny_gemma(), Recorder()
    graphs = Graphs(recorder)
    prompts = ["a red fox", "3 cats", "", "a red fox in the snow"]
    expected = [gemma.encode([prompt]) for prompt in prompts]
    negative = [gemma.encode_negative([prompt], length) for prompt in prompts]

    def check(prompts: list[str]) -> None:
        for prompt, text, other in zip(prompts, expected, negative, strict=True):
            got = gemma.encode([prompt], replay=graphs)
            assert torch.equal(got.mask, text.mask)
            assert_matches(text.states, got.states, 2e-6)  # floor 2e-7
            got = gemma.encode_negative([prompt], length, replay=graphs)
            assert torch.equal(got.mask, other.mask)
            assert_matches(other.states, got.states, 2e-6)  # floor 2e-7

    for _ in range(2):
        check(prompts)
    assert recorder.captured == 2 and recorder.replayed > 6
    assert_detects(check, ["a red cat", *prompts[1:]])


def test_out_of_memory_in_a_decode_graph_is_tried_in_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seats = Pipeline(tiny_components())._placing
    latent = torch.randn(1, 8, 4, 4)
    with torch.inference_mode():
        expected = decode_tiled(seats._autoencoder, latent, tile=64)[0]

    def full(_call: Callable[[], Tensor]) -> Any:
        raise torch.OutOfMemoryError("in a graph")

    seats.decode_graphs = graphs = Graphs(full)
    monkeypatch.setattr(seats._autoencoder, "decode", refusing(seats._autoencoder.decode, 64))
    with torch.inference_mode():
        assert torch.equal(seats.decode(latent), expected)
    assert not graphs._captured


def refusing(decode: Callable[[Tensor], Tensor], largest: int) -> Callable[[Tensor], Tensor]:
    def call(latent: Tensor) -> Tensor:
        if FACTOR * latent.shape[-1] > largest:
            raise torch.OutOfMemoryError("too large")
        return decode(latent)

    return call


def test_a_decode_graph_is_held_only_where_it_is_proven_and_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = preset("sana-1600m-1024").config
    monkeypatch.setattr(placing, "cuda_capture", Recorder)
    seats = placing.Placing(tiny_components(), "cpu")
    seats._config, seats._uses_graphs = config, True

    def holds(limit: int | None, side: int = 1024, **changes: Any) -> tuple[bool, bool]:
        chosen = MemoryPlan(peak=10 * GIB, **changes)
        seats._make_room(chosen, Canvas(width=side, height=side), limit)
        assert not seats.text_graphs.is_on
        return seats.graphs.is_on, seats.decode_graphs.is_on

    assert holds(None) == (True, True)
    assert holds(None, side=4096) == (True, False), "there the device is not waiting"
    assert holds(None, tile=(512, 512)) == (True, False)
    assert holds(None, dit="visits", autoencoder="visits") == (False, False)
    assert holds(10 * GIB) == (False, False)
    assert holds(11 * GIB) == (True, False)
    assert holds(12 * GIB) == (True, True)
    monkeypatch.setitem(ops._allowed, "decode_graph", False)
    assert holds(None) == (True, False), "as if nobody had run it on a card"
    seats._networks["text"] = tiny_gemma()
    for text, is_on in (("stays", True), ("visits", False)):
        seats._make_room(MemoryPlan(text=text), Canvas(width=1024, height=1024), None)  # type: ignore[arg-type]
        assert seats.graphs.is_on and seats.text_graphs.is_on == is_on
        assert not seats.reading, "on a CPU nothing is padded"
        monkeypatch.setattr(seats, "device", torch.device("cuda"))
        assert seats.reading == {"replay": seats.text_graphs}, "padded with a graph or without"
        monkeypatch.setattr(seats, "device", torch.device("cpu"))


@pytest.mark.gpu
def test_a_cuda_graph_draws_what_single_launches_draw() -> None:
    components = tiny_components()
    plain = Pipeline(components, device="cuda", graph=False)
    graphed = Pipeline(components, device="cuda")
    for prompt in ("a fox", "a cow"):
        request = Request(prompt=prompt, steps=5)
        expected = list(plain.steps(request))[-1].latent

        def check(request: Request, expected: Tensor = expected) -> None:
            assert_matches(expected, list(graphed.steps(request))[-1].latent, 1e-6)

        check(request)
        assert_detects(check, request.replace(guidance=4.6))
    assert cuda_capture() is not None
