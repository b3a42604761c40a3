"""How fast is a training step of the official 0.6B transformer? Ours, plain PyTorch, compiled.

    python benchmarks/flow_step.py --seconds 50      # on a GPU, random weights and latents
    python benchmarks/flow_step.py --ways compiled,around --sizes 512 --profile
    python benchmarks/flow_step.py --try all         # with what no card has proven
    python benchmarks/flow_step.py --tiny            # the same at small size, on any machine

Flow loss, backward and AdamW (fused on a GPU) under bf16 autocast with fp32 weights, at 512 and
1024 px. Ours has kernels in both directions; `plain` is the definition in `kernels.reference`, and
`compiled` that by torch.compile, block by block; `around` is ours with the compiler around the
kernels, and with `-graph` behind its name a way is captured as one CUDA graph. Says milliseconds a
step (median, waited for one by one; and in a row, waited for once), the most memory, and how far
gradients lie from those in fp32, for the worst of some parameters. With --profile a way is followed
by what one step does on the device, kernel by kernel.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.commands import named_ways  # noqa: E402
from benchmarks.errors import rel_rms  # noqa: E402
from sana.kernels import ops  # noqa: E402
from sana.models.dit import LinearDiT  # noqa: E402
from sana.pipelines.timing import synchronize  # noqa: E402
from sana.presets import preset  # noqa: E402


class Way(NamedTuple):
    """How a step is computed."""

    name: str
    backend: Any
    is_compiled: bool = False
    is_graph: bool = False


WAYS = {
    "plain": Way("plain", "reference"),
    "ours": Way("ours", "auto"),
    "compiled": Way("compiled", "reference", is_compiled=True),
    "around": Way("ours, compiled around", "auto", is_compiled=True),
    "plain-graph": Way("plain, one graph", "reference", is_graph=True),
    "ours-graph": Way("ours, one graph", "auto", is_graph=True),
    "compiled-graph": Way("compiled, one graph", "reference", is_compiled=True, is_graph=True),
    "around-graph": Way("ours, compiled, one graph", "auto", is_compiled=True, is_graph=True),
}
USUAL = "plain,ours,compiled,around"
SIZES = {512: (16, 32), 1024: (32, 8)}
"""Pixels: latent's side and batch."""
WATCHED = (
    "blocks.0.attention.qkv.weight",
    "blocks.0.table",
    "blocks.1.feed_forward.expand.weight",
    "blocks.1.feed_forward.depthwise.weight",
    "blocks.1.feed_forward.depthwise.bias",
    "blocks.1.cross_attention.query.weight",
    "modulation.weight",
    "patch_embed.projection.weight",
)
"""Parameters whose gradients are compared."""
GROUPS = {
    "products": r"gemm|nvjet|cublas|splitK",
    "attention to the text": r"fmha|flash|attention|sdpa|softmax",
    "convolution": r"conv|dgrad|wgrad|cudnn",
    "mix-FFN's middle": r"glu_depthwise|_depthwise_gradients|_input_gradients",
    "linear attention": r"_sum_keys|_apply_queries|_query_gradients|_key_gradients",
    "norms": r"_residual_norm|_norm_gradients|layer_norm|LayerNorm|RowwiseMoments",
    "optimizer": r"adam|multi_tensor",
    "compiler's kernels": r"^triton_",
    "copies, clearing": r"[Mm]emcpy|[Mm]emset|copy|CatArray|[Ff]ill",
}
"""Kernels by what their names say; the first that fits."""


class Training:
    """A network, its optimizer and one batch."""

    def __init__(self, device: torch.device, side: int, batch: int, *, is_tiny: bool) -> None:
        config = preset("sana-600m-1024").config.dit
        if is_tiny:
            config = replace(config, width=64, depth=2, cross_heads=2, text_dim=32)
        torch.manual_seed(0)
        with torch.device(device):
            self.network = LinearDiT(config)
        torch.nn.init.normal_(self.network.output.weight, std=0.02)
        is_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=1e-4, fused=is_gpu, capturable=is_gpu
        )
        shape = (batch, config.latent_channels, side, side)
        self.latent, self.noise = (torch.randn(shape, device=device) for _ in range(2))
        self.text = torch.randn(batch, 64, config.text_dim, device=device)
        self.mask = torch.ones(batch, 64, dtype=torch.bool, device=device)
        self.time = torch.rand(batch, device=device)
        self.device = device

    def gradients(self, dtype: torch.dtype | None = torch.bfloat16) -> None:
        """Of the flow loss, into the parameters; under autocast if there is a dtype."""
        self.optimizer.zero_grad()
        t = self.time[:, None, None, None]
        narrow = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with torch.enable_grad(), narrow:
            velocity = self.network(
                (1 - t) * self.latent + t * self.noise, self.time, self.text, self.mask
            )
            loss = (velocity.float() - (self.noise - self.latent)).square().mean()
        loss.backward()

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()

    def captured(self) -> Callable[[], None]:
        """The step as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def watched(self) -> dict[str, Tensor]:
        """Copies of the gradients of `WATCHED`."""
        grads = {name: self.network.get_parameter(name).grad for name in WATCHED}
        return {name: grad.double() for name, grad in grads.items() if grad is not None}


def main() -> int:
    """Time each way at each size; a way that fails is named and the others go on."""
    options = _options()
    began = time.perf_counter()
    tried = named_ways(options.tried)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines: list[str] = []
    sizes = [SIZES[int(size)] for size in options.sizes.split(",")]
    for side, batch in [(2, 2)] if options.tiny else sizes:
        exact = _exact(device, side, batch, is_tiny=options.tiny)
        for way in (WAYS[name] for name in options.ways.split(",")):
            name = f"{side * 32} px, batch {batch}, {way.name}"
            if time.perf_counter() - began > options.seconds:
                lines.append(f"{name}: no time left")
                continue
            try:
                with ops.trying(*tried):
                    line = _measure(device, side, batch, way, exact, options)
            except Exception as error:
                line = f"{type(error).__name__}: {error}"[:300]
            lines.append(f"{name}: {line}")
            print(lines[-1], flush=True)
            if options.write:
                options.write.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def _exact(device: torch.device, side: int, batch: int, *, is_tiny: bool) -> dict[str, Tensor]:
    """Gradients by plain ops in fp32."""
    training = Training(device, side, batch, is_tiny=is_tiny)
    with ops.force("reference"), torch.backends.cudnn.flags(allow_tf32=False):
        training.gradients(None)
    return training.watched()


def _measure(
    device: torch.device, side: int, batch: int, way: Way, exact: dict[str, Tensor], options: Any
) -> str:
    _empty(device)
    training = Training(device, side, batch, is_tiny=options.tiny)
    first = time.perf_counter()
    if way.is_compiled:
        for block in training.network.blocks:
            block.compile(dynamic=False)
    with ops.force(way.backend):
        training.gradients()
        synchronize(device)
        first = time.perf_counter() - first
        got = training.watched()
        step = training.captured() if way.is_graph else training.step
        one, row = _timed(step, device)
        if options.profile and device.type == "cuda":
            for line in _profile(step, one, options.top):
                print(line, flush=True)
    breaks = f", breaks: {_breaks()}" if way.is_compiled else ""
    apart = {name: rel_rms(exact[name], got[name]) for name in exact}
    worst = max(apart, key=lambda name: apart[name])
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return (
        f"{1000 * one:.1f} ms a step ({1000 * row:.1f} in a row), {batch / one:.1f}/s, "
        f"{memory:.1f} GB (first {first:.1f} s{breaks}); gradients {_mean(apart):.1e} from fp32, "
        f"at worst {apart[worst]:.1e}, {worst}"
    )


def _timed(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Median seconds of a step that is waited for, and seconds of one in a row."""
    count, times = (2 if device.type == "cpu" else 9), []
    for _ in range(count):
        began = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return sorted(times)[len(times) // 2], (time.perf_counter() - began) / count


def _profile(step: Callable[[], None], seconds: float, top: int) -> Iterator[str]:
    """What one step does on the device: by groups, and its costliest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    yield from kernel_lines(profiler, seconds, top)


def kernel_lines(profiler: Any, seconds: float, top: int, steps: int = 1) -> Iterator[str]:
    """A step's groups and costliest kernels, from a profile of `steps` that take `seconds` each.

    Where nothing ran on a device, those are ops on the host.
    """
    averages = profiler.key_averages()
    took = {event.key: event.self_device_time_total / 1000 / steps for event in averages}
    if not any(took.values()):
        took = {event.key: event.self_cpu_time_total / 1000 / steps for event in averages}
    events = [event for event in averages if took[event.key] > 0]
    events.sort(key=lambda event: -took[event.key])
    launches = sum(event.count for event in events) / steps
    total = sum(took.values())
    yield f"  {total:.1f} ms on the device of {1000 * seconds:.1f}, {launches:.0f} launches"
    sums: dict[str, float] = {}
    for event in events:
        fitting = (name for name, words in GROUPS.items() if re.search(words, event.key))
        group = next(fitting, "other")
        sums[group] = sums.get(group, 0.0) + took[event.key]
    ordered = sorted(sums.items(), key=lambda pair: -pair[1])
    yield "  " + ", ".join(f"{name} {part:.1f}" for name, part in ordered)
    for event in events[:top]:
        yield f"  {took[event.key]:8.3f} ms {event.count / steps:5.0f} x {event.key[:96]}"


def _breaks() -> str:
    """Where the compiler gave up within a block."""
    from torch._dynamo.utils import counters

    found = counters["graph_break"]
    return f"{sum(found.values())} {' | '.join(str(reason)[:100] for reason in found)}".strip()


def _empty(device: torch.device) -> None:
    """Forget what was compiled and kept for the way before."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _mean(apart: dict[str, float]) -> float:
    return sum(apart.values()) / len(apart)


def _options() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small networks, for trying it out")
    parser.add_argument("--seconds", type=float, default=60.0, help="no way begins after these")
    parser.add_argument("--try", dest="tried", default="", help="ways, with commas between")
    parser.add_argument("--ways", default=USUAL, help=f"of {', '.join(WAYS)}")
    parser.add_argument("--sizes", default="512,1024", help="pixels, with commas between")
    parser.add_argument("--profile", action="store_true", help="kernels of one step of each way")
    parser.add_argument("--top", type=int, default=25, help="so many kernels")
    parser.add_argument("--write", type=Path, help="file for what was measured so far")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
