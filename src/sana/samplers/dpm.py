"""Flow-DPM-Solver: multistep DPM-Solver++ on a flow, orders 1 and 2 (papers.md 2.5, midpoint form).

With sigma = t, alpha = 1 - t and lambda = ln(alpha / sigma), a step from t to t' is linear in x, in
the clean estimate D = x - t v and, at order 2, in the previous estimate. The first step has no
previous one and the step to t' = 0 spans an infinite lambda: both are of order 1. Order 1
everywhere is Euler.
"""

from __future__ import annotations

import math

from torch import Tensor

from sana.samplers.query import Query, Sampler


def dpm(latent: Tensor, times: Tensor, order: int = 2) -> Sampler:
    """Integrate from times[0] down to times[-1]; latent [B,C,h,w] in fp32 or fp64; order 1 or 2."""
    if order not in (1, 2):
        raise ValueError(f"order is {order}; Flow-DPM-Solver is written for orders 1 and 2")
    grid = times.double().tolist()
    previous: Tensor | None = None
    for index, (time, following) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        velocity = yield Query(index=index, count=len(grid) - 1, latent=latent, time=time)
        clean = latent - time * velocity
        estimate = clean
        if order == 2 and previous is not None and following > 0:
            width = _log_ratio(following) - _log_ratio(time)
            previous_width = _log_ratio(time) - _log_ratio(grid[index - 1])
            estimate = clean + 0.5 * width / previous_width * (clean - previous)
        # alpha' (1 - exp(-h)), without exponentials: exact at t = 1 and at t' = 0.
        weight = (1 - following) - (1 - time) * following / time
        latent = following / time * latent + weight * estimate
        previous = clean
    return latent


def _log_ratio(time: float) -> float:
    return -math.inf if time >= 1 else math.log((1 - time) / time)
