"""`sana convert`: weights from any layout into any other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def convert(
    source: Annotated[
        Path, Parameter(help="a model's folder, or one weight file (.safetensors or .pth)")
    ],
    target: Annotated[
        Path, Parameter(help="the folder to write, or the file where there is one network")
    ],
    /,
    *,
    to: Annotated[
        Literal["ours", "diffusers", "original", "single-file"], Parameter(help="the layout")
    ],
    dtype: Annotated[
        str | None, Parameter(help="fp32, fp16 or bf16 to keep floats in; as they are if not given")
    ] = None,
    like: Annotated[
        str | None,
        Parameter(help="the official model that it is, for what its tensors do not say"),
    ] = None,
) -> None:
    """Convert weights between NVIDIA's, diffusers', single-file and our layout.

    Nothing that exists is overwritten, and no file is left half-written. This is the one command
    that reads models from pickles (.pth), and it takes nothing but tensors from them.
    """
    from sana.weights import convert as weights

    report = weights.convert(source, target, to=to, dtype=weights.parse_dtype(dtype), like=like)
    for line in weights.describe_report(report):
        print(line, file=sys.stderr)
    for path in report.files:
        print(path)
