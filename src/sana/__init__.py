"""Sana text-to-image models in plain PyTorch.

    import sana
    pipeline = sana.load("sticker-512")
    [image] = pipeline.generate(sana.Request(prompt="a red fox"))

The names below are looked up when first used, so that `import sana` costs no torch. `docs/tour.md`
says where to start reading.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana import presets as presets
    from sana.pipelines.pipeline import Pipeline as Pipeline
    from sana.pipelines.pipeline import load as load
    from sana.request import Request as Request

__version__ = "0.1.0"
__all__ = ["Pipeline", "Request", "__version__", "load", "presets"]

_HOMES = {
    "load": "sana.pipelines.pipeline",
    "Pipeline": "sana.pipelines.pipeline",
    "Request": "sana.request",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "presets":
        return importlib.import_module("sana.presets")
    raise AttributeError(f"module 'sana' has no attribute {name!r}; it has {', '.join(__all__)}")
