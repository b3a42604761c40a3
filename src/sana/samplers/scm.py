"""SCM: few-step sampling of a consistency-distilled model such as Sprint (papers.md 2.8).

At angle t of TrigFlow a point is x = cos(t) x0 + sin(t) s z with s = 0.5, and one evaluation gives
x0 = cos(t) x - sin(t) F; the next point is drawn anew, cos(t') x0 + sin(t') s z'. Divided by
s (cos t + sin t), x is the flow's point (1 - u) x0 + u z at u = sin t / (cos t + sin t), and the
change of variables around the network (family-spec.md 6.3) cancels to x0 = x - u v. So this is
written on the flow, like the other samplers; the tests hold it against the formulas of the angles.
"""

from __future__ import annotations

from torch import Tensor

from sana.samplers.query import Fresh, Query, Sampler


def scm(latent: Tensor, times: Tensor, fresh: Fresh | None = None) -> Sampler:
    """From noise at times[0] to a picture at times[-1] = 0; `fresh()` is noise like `latent`.

    A single step needs no new noise, so `fresh` may be None there.
    """
    if fresh is None and len(times) > 2:
        raise ValueError(f"{len(times) - 1} steps draw noise on their way: pass a source of it")
    grid = times.double().tolist()
    for index, (time, following) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        velocity = yield Query(index=index, count=len(grid) - 1, latent=latent, time=time)
        latent = latent - time * velocity
        if following > 0:
            assert fresh is not None
            latent = (1 - following) * latent + following * fresh()
    return latent
