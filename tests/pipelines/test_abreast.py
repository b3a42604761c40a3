"""Samples side by side: the same results in order, and threads that keep to their share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from numerics import assert_detects
from sana.pipelines.abreast import abreast
from sana.pipelines.pipeline import load
from sana.request import Request


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Network:
    """Each sample by itself: latent * time + text where its mask is true; negated if perturbed."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def prepare(self, states: Tensor, mask: Tensor) -> Tensor:
        return (states * mask[..., None]).sum(dim=1)

    def __call__(
        self, latent: Tensor, time: Tensor, text: Tensor, mask: Tensor, perturbed: int = 0
    ) -> Tensor:
        assert torch.is_inference_mode_enabled()
        name = threading.current_thread().name
        self.seen.append((name, len(latent), torch.get_num_threads()))
        signs = torch.ones(len(latent))
        signs[len(latent) - perturbed :] = -1
        value = latent * time[:, None, None, None] + text[:, :, None, None]
        return value * signs[:, None, None, None]


@pytest.mark.parametrize("samples", [1, 2, 3, 6])
@pytest.mark.parametrize("threads", [2, 4])
def test_parts_together_are_the_whole(two_threads: None, samples: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(samples, 4, 2, 2, generator=generator)
    time = torch.rand(samples, generator=generator)
    states = torch.randn(samples, 5, 4, generator=generator)
    mask = torch.rand(samples, 5, generator=generator) > 0.3
    network = Network()
    call, prepare = abreast(network, network.prepare, threads)
    with torch.inference_mode():
        for perturbed in range(samples):
            options: dict[str, Any] = {"perturbed": perturbed} if perturbed else {}
            whole = network(latent, time, network.prepare(states, mask), mask, **options)

            def check(options: dict[str, Any], whole: Tensor = whole) -> None:
                assert torch.equal(
                    call(latent, time, prepare(states, mask), mask, **options), whole
                )

            network.seen.clear()
            check(options)
            parts = min(samples, threads)
            assert len(network.seen) == parts
            assert sum(size for _, size, _ in network.seen) == samples
            assert max(size for _, size, _ in network.seen) == -(-samples // parts)
            if parts > 1:
                share = max(1, threads // parts)
                assert {(name[:4], own) for name, _, own in network.seen} == {("sana", share)}
            assert_detects(check, {"perturbed": perturbed + 1})
    assert torch.get_num_threads() == 2
    new: list[int] = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [2]


def test_an_error_in_a_part_comes_out(two_threads: None) -> None:
    def fail(*inputs: Any) -> Tensor:
        raise ValueError("a fault")

    call, prepare = abreast(fail, lambda states, mask: states, 2)
    texts, mask = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="a fault"):
        call(torch.zeros(2, 4, 2, 2), torch.zeros(2), prepare(texts, mask), mask)


def test_pictures_side_by_side_do_not_depend_on_their_batch(two_threads: None) -> None:
    pipeline = load("tiny", device="cpu", dtype="mixed")
    together = Request(prompt="a red fox", negative_prompt="fog", steps=3, seeds=(7, 3, 9))
    pictures = [picture.tobytes() for picture in pipeline.generate(together)]

    def check(request: Request) -> None:
        assert [pipeline.generate(single)[0].tobytes() for single in request.singles()] == pictures

    check(together)
    assert_detects(check, together.replace(negative_prompt=""))
    pag = together.replace(pag_scale=2.0)
    many = [picture.tobytes() for picture in pipeline.generate(pag)]
    assert many == [pipeline.generate(single)[0].tobytes() for single in pag.singles()]
    assert many != pictures
