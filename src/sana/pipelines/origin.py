"""What a picture's metadata says besides its request: model, weights, versions, machine, files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sana import __version__
from sana.pipelines.reading import digests

if TYPE_CHECKING:
    from sana.pipelines.pipeline import Pipeline
    from sana.request import Request


def origin(pipeline: Pipeline, request: Request) -> dict[str, Any]:
    """All that the pixels depend on, beside the request."""
    import torch

    found = {
        "model": pipeline.config.name,
        "weights": pipeline.fingerprint,
        "sana": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(pipeline.device),
        "dtype": pipeline.dtype,
    }
    files = digests(request)
    return {**found, "files": files} if files else found
