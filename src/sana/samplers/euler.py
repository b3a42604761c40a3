"""Flow Euler: x' = x + (t' - t) v, order 1 (family-spec.md 6.2)."""

from __future__ import annotations

from torch import Tensor

from sana.samplers.query import Query, Sampler


def euler(latent: Tensor, times: Tensor) -> Sampler:
    """Integrate dx/dt = v from times[0] down to times[-1]; latent [B,C,h,w] in fp32 or fp64."""
    grid = times.double().tolist()
    for index, (time, following) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        velocity = yield Query(index=index, count=len(grid) - 1, latent=latent, time=time)
        latent = latent + (following - time) * velocity
    return latent
