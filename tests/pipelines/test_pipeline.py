"""A pipeline's promises: pictures independent of batch and history, checked ranges, no NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.errors import NumericsError, RequestError
from sana.pipelines.pipeline import Pipeline, load
from sana.request import Request
from standins import tiny_components

FOX = Request(prompt="a red fox", steps=3)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny_components())


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.tobytes() == second.tobytes()


@pytest.mark.parametrize("sampler", ["dpm", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_three_together_are_three_alone(pipeline: Pipeline, sampler: str, guidance: float) -> None:
    together = FOX.replace(seeds=(7, 3), count=2, sampler=sampler, guidance=guidance)
    pictures = pipeline.generate(together)
    alone = [pipeline.generate(single)[0] for single in together.singles()]

    def check(others: list[Image.Image]) -> None:
        assert all(same(a, b) for a, b in zip(pictures, others, strict=True))

    assert len(pictures) == 4
    check(alone)
    assert_detects(check, alone[1:] + alone[:1])
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_mixed_pictures_do_not_depend_on_their_batch_or_history() -> None:
    pipeline = load("tiny", device="cpu", dtype="mixed")
    assert pipeline.dtype == "mixed"
    together = FOX.replace(seeds=(7, 3, 9))
    pictures = pipeline.generate(together)

    def check(others: list[Image.Image]) -> None:
        assert all(same(a, b) for a, b in zip(pictures, others, strict=True))

    check([pipeline.generate(single)[0] for single in together.singles()])
    check(load("tiny", device="cpu", dtype="mixed").generate(together))
    assert_detects(check, load("tiny", device="cpu", dtype=torch.float32).generate(together))


def test_steps_latents_do_not_depend_on_the_batch(pipeline: Pipeline) -> None:
    together = list(pipeline.steps(FOX.replace(seeds=(5, 6, 9))))
    alone = list(pipeline.steps(FOX.replace(seeds=(6,))))
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many.latent[1:2], one.latent)
        assert torch.equal(many.clean[1:2], one.clean)
    assert [(step.index, step.count) for step in alone] == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(alone[-1].latent, alone[-1].clean)
    assert alone[-1].latent.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance": 1.0},
        {"pag_scale": 2.0},
        {"image": "start", "strength": 0.7},
        {"image": "start", "mask": "mask"},
        {"control": "start"},
    ],
    ids=lambda changes: next(reversed(changes), "text"),
)
def test_groups_draw_the_same_up_to_rounding(changes: dict[str, Any]) -> None:
    components = tiny_components("tiny-controlnet")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    images = dict.fromkeys(("start", "mask"), Image.fromarray(noise))
    request = FOX.replace(seeds=(5, 6, 9), **changes)

    def latent(batch: int, asked: Request = request) -> Tensor:
        *_, last = Pipeline(components, batch=batch).steps(asked, images)
        return last.latent

    alone = latent(1)

    def check(asked: Request) -> None:
        for batch in (2, 3, 8):
            assert_matches(alone, latent(batch, asked), 2e-6)  # floor 5.2e-7

    check(request)
    assert_detects(check, request.replace(seeds=(6, 5, 9)))


def test_a_batch_must_be_one_or_more() -> None:
    with pytest.raises(RequestError, match="batch is 0; it must be 1 or more"):
        Pipeline(tiny_components(), batch=0)


def test_a_b_a_gives_a_twice(pipeline: Pipeline) -> None:
    other = Request(prompt="two blue whales", negative_prompt="fog", seeds=3, steps=2, width=96)
    first, between, again = (pipeline.generate(r)[0] for r in (FOX, other, FOX))
    assert same(first, again)
    assert not same(first, between)
    assert (first.size, between.size) == ((64, 64), (96, 64))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue fox"},
        {"negative_prompt": "fog"},
        {"steps": 4},
        {"guidance": 3.0},
        {"seeds": (1,)},
        {"sampler": "euler"},
        {"shift": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_changes_the_picture(pipeline: Pipeline, change: dict[str, Any]) -> None:
    latents = [list(pipeline.steps(r))[-1].latent for r in (FOX, FOX.replace(**change))]
    assert not torch.equal(*latents)


def test_text_is_embedded_once_for_a_request() -> None:
    components = tiny_components()
    pipeline = Pipeline(components)
    pipeline.generate(FOX.replace(count=3, negative_prompt="fog"))
    assert components.text.prompts == ["a red fox", "fog"]
    components.text.prompts.clear()
    pipeline.generate(FOX.replace(guidance=1))
    assert components.text.prompts == ["a red fox"]


def test_noise_is_each_seeds_own_and_from_the_cpu(pipeline: Pipeline) -> None:
    seen: list[torch.Tensor] = []
    components = tiny_components()
    denoise = components.dit.denoise

    def spy(latent: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(latent[-1].clone())
        return denoise(latent, *rest)

    components.dit.denoise = spy
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    Pipeline(components).generate(FOX.replace(seeds=(40,), count=3, steps=1))
    assert torch.equal(before, torch.random.get_rng_state())
    for index, latent in enumerate(seen):
        generator = torch.Generator().manual_seed(40 + index)
        assert torch.equal(latent, torch.randn(8, 2, 2, generator=generator))


def test_integer_times_follow_the_config_and_the_sampler() -> None:
    def told(is_whole: bool, sampler: str, reference: Any = "nvidia") -> list[float]:
        components = tiny_components()
        sampling = dataclasses.replace(components.config.sampling, integer_times=is_whole)
        components.config = dataclasses.replace(
            components.config, sampling=sampling, reference=reference
        )
        times: list[float] = []
        denoise, embed_times = components.dit.denoise, components.dit.embed_times
        known: dict[float, Any] = {}

        def embed(times: torch.Tensor, guidance: float | None) -> dict[float, Any]:
            known.update(embed_times(times, guidance))
            return known

        def spy(latent: torch.Tensor, moment: Any, *rest: Any) -> torch.Tensor:
            times.extend(time for time, own in known.items() if own is moment)
            return denoise(latent, moment, *rest)

        components.dit.embed_times, components.dit.denoise = embed, spy
        Pipeline(components).generate(FOX.replace(sampler=sampler))
        return times

    assert [round(1000 * t, 4) for t in told(True, "dpm")] == [999, 856, 599]
    assert all(1000 * t != round(1000 * t) for t in told(False, "dpm"))
    assert told(True, "euler", "diffusers") == told(False, "euler")
    assert told(True, "euler") != told(False, "euler")


def test_defaults_are_the_models_own(pipeline: Pipeline) -> None:
    full = pipeline.resolve(Request(prompt="a red fox"))
    sampling = pipeline.config.sampling
    assert full == Request(
        prompt="a red fox",
        steps=sampling.steps,
        guidance=sampling.guidance,
        sampler=sampling.sampler,
        shift=sampling.shift,
        width=64,
        height=64,
        binning=False,
    )
    assert pipeline.resolve(full) is full


@pytest.mark.parametrize("name, side", [("width", 2048), ("height", 1056)])
def test_sides_out_of_the_models_range_are_refused_at_once(
    pipeline: Pipeline, name: str, side: int
) -> None:
    with pytest.raises(RequestError, match=f"{name} is {side}; tiny takes multiples of 32"):
        pipeline.steps(FOX.replace(**{name: side}))


def test_sides_follow_the_models_factor() -> None:
    components = tiny_components()
    dit = dataclasses.replace(components.config.dit, patch_size=2)
    components.config = dataclasses.replace(components.config, dit=dit)
    with pytest.raises(RequestError, match="width is 96; tiny takes multiples of 64"):
        Pipeline(components).resolve(FOX.replace(width=96, binning=False))


def spoil_text(components: Any) -> None:
    components.dit.text_norm.weight.data[0] = float("nan")


def spoil_network(components: Any) -> None:
    components.dit.output.weight.data[0] = float("inf")


def spoil_decoder(components: Any) -> None:
    next(iter(components.autoencoder.decoder.parameters())).data.fill_(float("nan"))


@pytest.mark.parametrize(
    "spoil, stage",
    [
        (spoil_text, "the text states of the prompt"),
        (spoil_network, "the latent at step 1 of 3"),
        (spoil_decoder, "the decoded pixels"),
    ],
)
def test_nan_is_an_error_that_names_the_stage(spoil: Callable[[Any], None], stage: str) -> None:
    components = tiny_components()
    spoil(components)
    with pytest.raises(NumericsError, match=stage):
        Pipeline(components).generate(FOX)


def test_decode_takes_one_latent_at_a_time(pipeline: Pipeline) -> None:
    latents = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    pictures = pipeline.decode(latents)
    for latent, picture in zip(latents, pictures, strict=True):
        assert same(picture, pipeline.decode(latent[None])[0])
    assert pictures[0].mode == "RGB"
    assert np.asarray(pictures[0]).std() > 0


def test_decoding_undoes_the_normalization() -> None:
    components = tiny_components()
    seen: list[torch.Tensor] = []
    components.autoencoder.denormalize = lambda latent: seen.append(latent) or latent
    latents = torch.zeros(1, 8, 2, 2)
    Pipeline(components).decode(latents)
    assert torch.equal(seen[0], latents)


def test_stopping_early_runs_no_more_steps_and_leaves_no_mode_behind(pipeline: Pipeline) -> None:
    steps = pipeline.steps(FOX)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    del steps
    assert same(pipeline.generate(FOX)[0], pipeline.generate(FOX)[0])


def test_fingerprint_tells_weights_apart(pipeline: Pipeline) -> None:
    assert pipeline.fingerprint == Pipeline(tiny_components()).fingerprint
    components = tiny_components()
    components.dit.output.weight.data[0, 0] += 1e-3
    assert Pipeline(components).fingerprint != pipeline.fingerprint
    assert len(pipeline.fingerprint) == 12
