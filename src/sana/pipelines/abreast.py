"""Samples of one call side by side on a CPU, each part on its share of the cores.

Between the large products of a step stand many small operations, which end one after another on
all cores and gain little by it. With a part of the samples for each thread, such as guidance's two
halves, threads meet once a step instead (docs/performance.md). Start reading at `abreast`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

Prepare = Callable[[Tensor, Tensor], Any]


def abreast(
    network: Callable[..., Tensor], prepare: Prepare, threads: int
) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], list[Any]]]:
    """The same network for samplers' queries, and what prepares the texts for it, in parts.

    Of B samples there are min(B, `threads`) parts. `network` takes latents [B,C,h,w], times [B],
    the prepared text and the mask [B,T], and perhaps `perturbed`, how many at the end are.
    """

    def prepare_parts(states: Tensor, mask: Tensor) -> list[Any]:
        count = min(threads, len(states))
        return list(map(prepare, states.tensor_split(count), mask.tensor_split(count)))

    def call(
        latent: Tensor, time: Tensor, texts: Sequence[Any], mask: Tensor, **options: Any
    ) -> Tensor:
        count = len(texts)
        if count == 1:
            return network(latent, time, texts[0], mask, **options)
        perturbed = options.pop("perturbed", 0)
        plain = len(latent) - perturbed
        is_inference = torch.is_inference_mode_enabled()

        def part(own: Tensor, time: Tensor, text: Any, mask: Tensor, first: int) -> Tensor:
            its = min(max(first + len(own) - plain, 0), len(own))
            more = {"perturbed": its} if its else {}
            with torch.inference_mode(is_inference):
                return network(own, time, text, mask, **options, **more)

        latents = latent.tensor_split(count)
        firsts = [sum(map(len, latents[:index])) for index in range(count)]
        others = (time.tensor_split(count), texts, mask.tensor_split(count), firsts)
        return torch.cat(list(_pool(count, threads // count).map(part, latents, *others)))

    return call, prepare_parts


@cache
def _pool(parts: int, threads: int) -> ThreadPoolExecutor:
    """`parts` threads whose operations run on `threads` cores each; they stay."""
    before = torch.get_num_threads()
    ready = threading.Barrier(parts + 1)

    def begin() -> None:
        # Asked first, since a thread's first question sets its number.
        torch.get_num_threads()
        torch.set_num_threads(threads)
        ready.wait()

    pool = ThreadPoolExecutor(parts, "sana-abreast", initializer=begin)
    for _ in range(parts):
        pool.submit(int)
    ready.wait()
    # torch takes the number last set anywhere for threads to come.
    torch.set_num_threads(before)
    return pool
