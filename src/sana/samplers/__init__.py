"""Samplers as coroutines, their times and denoisers; a new sampler is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from sana.samplers.denoisers import Text, guided, one_by_one
from sana.samplers.dpm import dpm
from sana.samplers.euler import euler
from sana.samplers.query import Denoiser, Query, Sampler, Step, run
from sana.samplers.schedule import euler_times, flow_times, truncated


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A sampler with the grid it was designed for."""

    start: Callable[[Tensor, Tensor], Sampler]
    times: Callable[[int, float], Tensor]
    takes_integer_times: bool
    """Whether the official scheduler of this name tells the network whole thousandths."""


METHODS = MappingProxyType(
    {
        "dpm": Method(start=dpm, times=flow_times, takes_integer_times=True),
        "euler": Method(start=euler, times=euler_times, takes_integer_times=False),
    }
)

__all__ = [
    "METHODS",
    "Denoiser",
    "Method",
    "Query",
    "Sampler",
    "Step",
    "Text",
    "dpm",
    "euler",
    "euler_times",
    "flow_times",
    "guided",
    "one_by_one",
    "run",
    "truncated",
]
