"""What a card has proven, and what nobody has run on one: the latter is never the default.

A way of computing is proven once `benchmarks/kernels.py` has found it right on a GPU and a step or
a decode the faster for it. Then its row here names the report, and `ops` uses it by default; until
then only inside `ops.trying`, which is how the benchmark proves it. What is computed on a CPU, in
triton's interpreter for tests, says that a kernel is right, not that a compiler for a GPU takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

Way: TypeAlias = Literal[
    "linear_attention",
    "residual_norm",
    "rms_norm",
    "bias_act",
    "glu_depthwise",
    "cross_attention",
    "doubling",
    "decode_graph",
    "text_graph",
    "start_graph",
    "lone_text",
    "tanh_silu",
    "windows",
    "aggregate",
    "split_attention",
    "gemma_norm",
    "gemma_attention",
    "gemma_gate",
    "gemma_joined",
    "scaled_rows",
    "glu_gradient",
    "norm_gradient",
    "laid_text",
    "lone_rows",
    "whole_heads",
    "pixels",
    "chosen_products",
    "norm_pair",
]

H100 = "benchmarks/results/2026-11-25-kernels-nvidia-h100.md"
H200 = "benchmarks/results/2026-11-27-kernels-nvidia-h200.md"
LATER = "benchmarks/results/2026-11-28-kernels-nvidia-h100.md"
TRAINING = "benchmarks/results/2026-11-28-training-nvidia-h200.md"
STEPS = "benchmarks/results/2026-11-28-steps-nvidia-h100.md"
PRODUCTS = "benchmarks/results/2026-11-28-products-nvidia-h100.md"

REPORTS: Mapping[Way, str | None] = MappingProxyType(
    {
        "linear_attention": H100,
        # In two pieces, 2240 channels as 2048 and 192; rows in fp8 too (PRODUCTS).
        "residual_norm": STEPS,
        "rms_norm": H100,
        "bias_act": H100,
        "glu_depthwise": H100,
        # Ours instead of torch's scaled_dot_product_attention; slower on H200 and H100.
        "cross_attention": None,
        # DC-AE: nearest and 3x3 as a transposed convolution, then `add_repeated_`.
        "doubling": H200,
        # The whole decoder as a CUDA graph (`sana.pipelines.placing`).
        "decode_graph": H200,
        # Gemma-2 behind the instruction as a CUDA graph.
        "text_graph": H200,
        # What the transformer makes of a text and of the times, as CUDA graphs.
        "start_graph": LATER,
        # A text of one token, such as guidance's empty one: its attention is the same everywhere.
        "lone_text": H200,
        # SiLU of the mix-FFN's middle by the tangent's approximation, in bf16.
        "tanh_silu": H200,
        # DC-AE: nearest and 3x3 as a 2x2 convolution to four times the channels, then `spread`.
        "windows": H200,
        # DC-AE: a scale's 5x5 by our kernel, and its groups' product written where it stays.
        "aggregate": LATER,
        # Linear attention's products in bf16, with the summed state in two parts.
        "split_attention": H200,
        # Gemma-2: norm, sum and next norm; rotary, capped attention; gelu(gate) up, each one pass.
        "gemma_norm": LATER,
        "gemma_attention": LATER,
        "gemma_gate": LATER,
        # Gemma-2: queries, keys and values from one product, and gate and up from another.
        "gemma_joined": LATER,
        # fp8 alone: rows and their scales by our kernels, with the norm before them where one is.
        "scaled_rows": LATER,
        # Training: the mix-FFN's middle and its gradients by kernels.
        "glu_gradient": TRAINING,
        # Training: residual, norm and modulation with their gradients by kernels.
        "norm_gradient": TRAINING,
        # A text's keys and values in tiles with their mask, once, and attention that reads them.
        "laid_text": STEPS,
        # The branch of a lone text is a row that the norm behind it adds, and is written nowhere.
        "lone_rows": STEPS,
        # Linear attention with all tokens of a head in one program, where there are heads enough.
        "whole_heads": PRODUCTS,
        # DC-AE: last norm, activation and 3x3 to three channels as one product and a sum.
        "pixels": PRODUCTS,
        # Products of image tokens by algorithms of cuBLASLt that are chosen by `chosen`.
        "chosen_products": PRODUCTS,
        # The norms of query and key in one pass, in the product's memory.
        "norm_pair": PRODUCTS,
    }
)
"""Each way with the report that proves it, or None."""

UNPROVEN: tuple[Way, ...] = tuple(way for way, report in REPORTS.items() if report is None)
