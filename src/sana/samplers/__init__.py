"""Samplers as coroutines, their times and denoisers; a new sampler is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from sana.samplers.denoisers import (
    Guidance,
    Text,
    borrow_mask,
    distilled,
    guided,
    in_groups,
    padded,
)
from sana.samplers.dpm import dpm
from sana.samplers.euler import euler
from sana.samplers.query import Denoiser, Fresh, Query, Sampler, Step, draw_noise, run
from sana.samplers.schedule import (
    euler_times,
    first_step,
    flow_times,
    scm_times,
    shifted,
    truncated,
)
from sana.samplers.scm import scm


class Start(Protocol):
    """Makes a sampler's coroutine from a latent and its times; some draw `fresh` noise."""

    def __call__(self, latent: Tensor, times: Tensor, fresh: Fresh | None = None, /) -> Sampler: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A sampler with the grid it was designed for."""

    start: Start
    times: Callable[[int, float], Tensor]
    takes_integer_times: bool
    """Whether the official scheduler of this name tells the network whole thousandths."""
    draws: bool = False
    """Whether it draws new noise on its way."""


METHODS = MappingProxyType(
    {
        "dpm": Method(
            start=lambda latent, times, fresh=None: dpm(latent, times),
            times=flow_times,
            takes_integer_times=True,
        ),
        "euler": Method(
            start=lambda latent, times, fresh=None: euler(latent, times),
            times=euler_times,
            takes_integer_times=False,
        ),
        "scm": Method(start=scm, times=scm_times, takes_integer_times=False, draws=True),
    }
)

__all__ = [
    "METHODS",
    "Denoiser",
    "Fresh",
    "Guidance",
    "Method",
    "Query",
    "Sampler",
    "Step",
    "Text",
    "borrow_mask",
    "distilled",
    "dpm",
    "draw_noise",
    "euler",
    "euler_times",
    "first_step",
    "flow_times",
    "guided",
    "in_groups",
    "padded",
    "run",
    "scm",
    "scm_times",
    "shifted",
    "truncated",
]
