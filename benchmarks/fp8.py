"""Would the transformer's large products pay in fp8 (e4m3)? What they cost in accuracy and time.

    python benchmarks/fp8.py                 # on a GPU of capability 8.9 or newer: right? how fast?
    python benchmarks/fp8.py --picture       # on any machine: sticker-512 drawn with emulated fp8
    python benchmarks/fp8.py --step          # on such a GPU: a whole step of 1.6B in a CUDA graph
    python benchmarks/fp8.py --interpret     # the row kernel in triton's interpreter, on a CPU

The experiment behind `--dtype fp8`; --step draws by `sana.models.rounding.Scaled` itself, --picture
in all blocks, which is more than that does. Each row of an input (a token) and
each row of a weight (an output channel) has a scale of its own, its largest value over 448; the
product of the two fp8 matrices is summed in fp32 and scaled back. `emulated` does exactly that in
plain PyTorch, and is what the GPU's product is held against. Products of the blocks alone are in
fp8, without keys and values of the text, which are made once a picture; stem, times, text and
output stay as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.commands import named_ways  # noqa: E402
from benchmarks.errors import rel_rms  # noqa: E402
from sana.kernels import reference  # noqa: E402
from sana.kernels.reference import FP8  # noqa: E402
from sana.models.rounding import SCALED, scaled_weight  # noqa: E402

PROMPTS = ("a red fox", "a smiling person with glasses", "two blue whales", "a green apple")


def emulated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) and weight (N, K) -> (..., N) by way of fp8, with products summed in fp32."""
    return reference.scaled_product(reference.scaled_rows(x), *scaled_weight(weight), bias, x.dtype)


class Emulated(nn.Module):
    """A linear layer in emulated fp8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return emulated(x, self.weight, self.bias)


def emulate(network: nn.Module) -> int:
    """Put the blocks' products of `network` in emulated fp8; how many there were."""
    count = 0
    blocks = network.blocks
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        for path in SCALED:
            parent, name = path.split(".")
            owner = block.get_submodule(parent)
            setattr(owner, name, Emulated(owner.get_submodule(name)))  # type: ignore[arg-type]
            count += 1
    return count


def check_kernel(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> bool:
    """The kernel against its definition: values within a step of e4m3, scales to fp32's digits."""
    from sana.kernels.rows import scaled_rows

    x = torch.randn(shape, device=device).to(dtype)
    x[0] = 0
    (q, scale), exact = scaled_rows(x), reference.scaled_rows(x)
    scales = rel_rms(exact.scale, scale)
    differing = float((q.float() != exact.values.float()).double().mean())
    values = rel_rms(exact.values.float() * exact.scale, q.float() * scale)
    is_right = scales < 1e-6 and values < 2e-3 and differing < 1e-3
    print(f"rows {shape}: scales {scales:.1e}, values {values:.1e}, {differing:.1e} of them differ")
    print("  right" if is_right else "  WRONG")
    return is_right


def run_gpu() -> bool:
    """Each product of a 1.6B block for two samples of 1024 px, right and timed against bf16."""
    from triton.testing import do_bench

    from sana.kernels.rows import scaled_rows
    from sana.presets import preset

    config = preset("sana-1600m-1024").config.dit
    width, hidden, rows = config.width, config.mlp_width, 2 * 1024
    good = check_kernel("cuda", torch.bfloat16, (rows, width))
    total = [0.0, 0.0]
    shapes = {"qkv": (width, 3 * width), "width": (width, width)}
    shapes |= {"expand": (width, 2 * hidden), "project": (hidden, width)}
    for name, (into, out) in shapes.items():
        x = torch.randn(rows, into, device="cuda").bfloat16()
        weight = (torch.randn(out, into, device="cuda") / into**0.5).bfloat16()
        bias = torch.randn(out, device="cuda").bfloat16()
        b, b_scale = scaled_weight(weight)
        b = b.t()

        def product(q: Tensor, scale: Tensor, b=b, b_scale=b_scale, bias=bias) -> Tensor:
            options = {"out_dtype": torch.bfloat16, "bias": bias}
            return torch._scaled_mm(q, b, scale_a=scale, scale_b=b_scale, **options)

        error = rel_rms(emulated(x, weight, bias), product(*scaled_rows(x)))
        good &= error < 5e-3  # the result's own digits leave 1.7e-3
        plain = do_bench(lambda x=x, w=weight, o=bias: F.linear(x, w, o), return_mode="median")
        alone = scaled_rows(x)
        times = [
            do_bench(call, return_mode="median")
            for call in (lambda x=x: scaled_rows(x), lambda f=product, q=alone: f(*q))
        ]
        against = rel_rms(
            F.linear(x.double(), weight.double(), bias.double()), emulated(x, weight, bias)
        )
        print(
            f"{name:8} {into:5} -> {out:5}: off the emulation {error:.1e}, off the product "
            f"{against:.1e}; bf16 {plain:.4f} ms, rows {times[0]:.4f}, product {times[1]:.4f}"
        )
        count = 3 if name == "width" else 1
        total = [total[0] + count * plain, total[1] + count * sum(times)]
    print(f"a block: bf16 {total[0]:.3f} ms, fp8 {total[1]:.3f} ms; kernels alone, no graph")
    return good


def run_step() -> bool:
    """One step of 1.6B for two samples of 1024 px, and 20 by Euler: how far off, and how long."""
    from benchmarks.kernels import Bench, Step, breakdown, clock, sizes
    from sana.kernels import ops
    from sana.models.rounding import narrow
    from sana.pipelines.graphs import Graphs, cuda_capture

    options = argparse.Namespace(write=None, ways=None, without="")
    bench = Bench(torch.device("cuda"), False, float("inf"), options)
    step = Step(bench, sizes(bench)[0])
    exact = step.in_fp32()
    step.prepared = step.network.prepare(step.text, step.mask)

    def measure() -> tuple[Tensor, float, Tensor]:
        step.graphs = Graphs(cuda_capture())
        with ops.force("triton"):
            velocity = [step.graph() for _ in range(3)][-1]
            took = clock(bench, step.graph, is_step=True)
            return velocity, took, walked()

    def walked() -> Tensor:
        """The latent after 20 Euler steps; the time told stays, which is enough to compare."""
        start, latent = step.latent, step.latent
        for _ in range(20):
            step.latent = latent
            latent = latent - step.graph() / 20
        step.latent = start
        return latent

    plain, before, latent = measure()
    print(f"bf16: {before:.2f} ms, velocity off fp32 by {rel_rms(exact, plain):.1e}", flush=True)
    narrow(step.network, FP8)
    step.prepared = step.network.prepare(step.text, step.mask)
    velocity, took, moved = measure()
    print(
        f"fp8: {took:.2f} ms, velocity off fp32 by {rel_rms(exact, velocity):.1e}, latent after 20 "
        f"steps off bf16's by {rel_rms(latent, moved):.1e}; 20 steps {20 * took:.0f} ms",
        flush=True,
    )
    with ops.force("triton"):
        breakdown("fp8 in a graph", step.graph)
    return True


def run_picture() -> bool:
    """sticker-512 as it is and with emulated fp8: what the second step changes, the pictures."""
    import numpy as np

    import sana
    from sana.models.dit import LinearDiT

    pipeline = sana.load("sticker-512", device="cpu")
    request = [sana.Request(prompt=prompt, seeds=7) for prompt in PROMPTS]
    plain = [(first_latent(pipeline, one), pipeline.generate(one)[0]) for one in request]
    network = pipeline.components.dit
    assert isinstance(network, LinearDiT)
    print(f"{emulate(network)} products of {len(network.blocks)} blocks in emulated fp8")
    for one, (latent, picture) in zip(request, plain, strict=True):
        error = rel_rms(latent[1] - latent[0], first_latent(pipeline, one)[1] - latent[0])
        got = np.asarray(pipeline.generate(one)[0], dtype=float)
        wrong = got - np.asarray(picture, dtype=float)
        psnr = 20 * np.log10(255 / max(1e-9, float(np.sqrt((wrong**2).mean()))))
        print(
            f"{one.prompt}: second step's change off by {error:.1e}, PSNR {psnr:.1f} dB", flush=True
        )
    return True


def first_latent(pipeline: object, request: object) -> tuple[Tensor, Tensor]:
    """The latents of the first and second step."""
    steps = pipeline.steps(request)  # type: ignore[attr-defined]
    return tuple(next(steps).latent.clone() for _ in range(2))  # type: ignore[return-value]


def main() -> int:
    """1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--try", dest="tried", default="", help="ways beside it, as generate.py's")
    parser.add_argument("--interpret", action="store_true")
    options = parser.parse_args()
    # Only now, since triton reads what --interpret sets when it is first imported.
    from sana.kernels import ops

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if options.picture:
        return int(not run_picture())
    if options.interpret:
        shapes = ((3, 16), (5, 300))
        return int(not all(check_kernel("cpu", torch.float32, shape) for shape in shapes))
    right = run_gpu()
    if options.step:
        with ops.trying(*named_ways(options.tried)):
            right &= run_step()
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
