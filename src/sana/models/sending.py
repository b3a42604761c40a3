"""Small tensors between host and device, without either waiting for the other.

A copy from or to pageable memory makes the host wait for all that the device was given; one from or
to page-locked memory takes its turn on the stream. Elsewhere than on CUDA these are plain copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same numbers on `device`; the caller may drop or change `tensor` at once."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def arriving(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the host; what is returned waits for it alone, and gives it.

    What was launched afterwards is not waited for, and may change `tensor`.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrival = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> Tensor:
        arrival.synchronize()
        return host

    return wait
