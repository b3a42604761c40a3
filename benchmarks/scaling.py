"""How do time and memory grow with pixels, pictures and depth? And where does softmax cost more?

    python benchmarks/scaling.py --write benchmarks/results    # on a GPU: 1.6B, about a minute
    python benchmarks/scaling.py --tiny                        # small, on any machine

Random weights in bf16 (fp32 on a CPU). Forward passes of the transformer with guidance (a batch of
two): against the tokens of 512 to 4096 px, against 1 to 32 pictures at 1024 px, against 5 to 60
blocks; decoding against pixels; and one attention alone, 2 x N tokens of the same width: ours in
O(N), softmax by flash attention (20 heads of 112, as a transformer of that width would have; on a
GPU by cuDNN's too), and softmax that keeps its scores. Each is checked by its definition first.
Memory is what a call holds beside its weights and inputs. Slopes are fitted in the logarithms over
the three largest sizes; the crossing is where ours becomes, and stays, the faster one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import live_bytes  # noqa: E402
from benchmarks.commands import command  # noqa: E402
from benchmarks.curves import Curve, Point, crossing, plot  # noqa: E402
from benchmarks.parity import filled, random_like, rel_rms  # noqa: E402
from benchmarks.rigs import model_config  # noqa: E402
from sana.kernels.ops import linear_attention  # noqa: E402
from sana.kernels.reference import linear_attention as plain_attention  # noqa: E402
from sana.models.dcae import DCAE  # noqa: E402
from sana.models.dit import LinearDiT  # noqa: E402
from sana.pipelines.timing import forget_peak, timed  # noqa: E402

MODEL = "sana-1600m-1024-bf16"
SCORES = 24 * 2**30
"""Softmax that keeps its scores is not tried where they alone would take more."""
BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
LINEAR, FLASH, KEPT = "linear", "softmax, flash", "softmax, scores kept"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured."""

    pixels: tuple[int, ...] = (512, 1024, 2048, 4096)
    pictures: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    depths: tuple[int, ...] = (5, 10, 20, 40, 60)
    tokens: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    width: int = 2240
    head_dims: tuple[int, int] = (32, 112)
    """Of linear and of softmax attention."""
    seconds: float = 0.3
    """For each point, after its first three times."""


TINY = Sizes(
    pixels=(64, 128, 256),
    pictures=(1, 2, 4),
    depths=(1, 2, 4),
    tokens=(64, 128, 256, 512, 1024),
    width=64,
    head_dims=(32, 64),
    seconds=0.02,
)


class Meter:
    """Times calls on one device, and counts what they hold."""

    def __init__(self, device: torch.device, sizes: Sizes, deadline: float) -> None:
        self.device, self.sizes, self.deadline = device, sizes, deadline

    def point(self, size: float, call: Callable[[], Any], repeat: int) -> Point:
        """One size of a curve, by `repeat` calls in a row, so that waiting costs little."""

        def calls() -> None:
            for _ in range(repeat):
                call()

        if self.device.type != "cuda":
            held = live_bytes.peak_bytes(call)
            spread = timed(calls, self.device, seconds=self.sizes.seconds)
        else:
            forget_peak(self.device)
            before = torch.cuda.memory_allocated(self.device)
            spread = timed(calls, self.device, seconds=self.sizes.seconds)
            held = torch.cuda.max_memory_allocated(self.device) - before
        return Point(size=size, seconds=spread.median / repeat, bytes=held)

    def fill(
        self, curve: Curve, cases: Iterator[tuple[float, Callable[[], Any]]], repeat: int = 1
    ) -> Curve:
        """All points that fit; what ends a curve early is said in it, and never ends the run."""
        for size, call in cases:
            if time.perf_counter() > self.deadline:
                curve.stopped = f"no time for {size:g}"
                break
            try:
                curve.points.append(self.point(size, call, repeat))
            except Exception as error:
                curve.stopped = f"{size:g}: {type(error).__name__}: {error}"[:160]
                break
            print(f"  {curve.name}: {curve.points[-1]}", file=sys.stderr, flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return curve


def main() -> int:
    """Measure, print and write; 1 if an attention is wrong or a curve of ours has no slope."""
    options = _options()
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = TINY if options.tiny else Sizes()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    meter = Meter(device, sizes, began + options.seconds)
    curves: list[Curve] = []
    for measure in (attention_curves, transformer_curves, decoder_curves):
        for curve in measure(meter, dtype, options.tiny):
            curves.append(curve)
        print(f"  {time.perf_counter() - began:.0f} s so far", file=sys.stderr, flush=True)
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    lines = list(page(curves, name, dtype))
    print("\n".join(lines))
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
        kind = name.replace(" ", "-").lower()
        stem = options.write / f"{datetime.date.today()}-scaling-{kind}"
        stem.with_suffix(".svg").write_text(plot(curves, f"Scaling, {name}"), encoding="utf-8")
        stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        stem.with_suffix(".json").write_text(json.dumps(as_json(curves), indent=1) + "\n")
    needed = (curve for curve in curves if curve.panel != "One attention" or curve.name == LINEAR)
    return 0 if all(curve.slope("seconds") is not None for curve in needed) else 1


def attention_curves(meter: Meter, dtype: torch.dtype, is_tiny: bool) -> Iterator[Curve]:
    """One attention, of two pictures, against their tokens."""
    sizes, device = meter.sizes, meter.device
    narrow, wide = sizes.head_dims

    for name, attend in attentions(device).items():
        head_dim = narrow if name == LINEAR else wide
        curve = Curve(name=name, panel="One attention", size="tokens")
        try:
            check_attention(attend, name, sizes.width, head_dim, dtype, device)
        except RuntimeError as error:  # a backend that this build or card has not
            curve.stopped = str(error)[:160]
            yield curve
            continue

        def cases(
            name: str = name, head_dim: int = head_dim, attend: Attention = attend
        ) -> Iterator[tuple[float, Callable[[], Any]]]:
            for tokens in sizes.tokens:
                scores = 4 * (sizes.width // head_dim) * tokens**2 * dtype.itemsize
                if name == KEPT and scores > SCORES:
                    yield tokens, too_large
                inputs = heads(tokens, sizes.width, head_dim, dtype, device)
                yield tokens, lambda inputs=inputs: attend(*inputs)

        yield meter.fill(curve, cases(), repeat=10 if device.type == "cuda" else 1)


def attentions(device: torch.device) -> dict[str, Attention]:
    """What is compared, by its name."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, eps=1e-15)

    def kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    def by(backend: SDPBackend) -> Attention:
        def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return softmax

    kinds = {LINEAR: ours, FLASH: by(SDPBackend.FLASH_ATTENTION), KEPT: kept}
    if device.type == "cuda":
        kinds["softmax, cuDNN"] = by(SDPBackend.CUDNN_ATTENTION)
    return kinds


def too_large() -> None:
    """Stands for a call that would take more than it may."""
    raise MemoryError(f"the scores would take over {SCORES / 2**30:g} GiB")


def check_attention(
    attend: Attention, name: str, width: int, head_dim: int, dtype: torch.dtype, device: Any
) -> None:
    """Compare with the definition in fp64, on an odd number of tokens; SystemExit if wrong."""
    q, k, v = heads(333, width, head_dim, dtype, device)
    got = attend(q, k, v)
    q, k, v = (x.double() for x in (q, k, v))
    if name == LINEAR:
        expected = plain_attention(q, k, v, eps=1e-15)
    else:
        expected = (q @ k.mT / head_dim**0.5).softmax(-1) @ v
    error = rel_rms(expected, got)
    if not error <= BOUNDS[dtype]:
        raise SystemExit(f"{name} attention is {error:.1e} from its definition: nothing is timed")
    print(f"  {name}: {error:.1e} from its definition", file=sys.stderr, flush=True)


def heads(
    tokens: int, width: int, head_dim: int, dtype: torch.dtype, device: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of two pictures, (2, H, N, D) as slices of one product's result."""
    generator = torch.Generator(device).manual_seed(3)
    made = torch.randn((2, tokens, 3 * width), generator=generator, device=device).to(dtype)
    q, k, v = made.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
    return q, k, v


def transformer_curves(meter: Meter, dtype: torch.dtype, is_tiny: bool) -> Iterator[Curve]:
    """A forward pass against tokens, pictures and depth."""
    sizes, device = meter.sizes, meter.device
    config = model_config(MODEL, is_tiny=is_tiny)
    factor = config.autoencoder.factor
    deepest = replace(config.dit, depth=max(sizes.depths))
    tensors = random_state(lambda: LinearDiT(deepest), device, dtype)

    def network(depth: int) -> LinearDiT:
        with torch.device("meta"):
            made = LinearDiT(replace(deepest, depth=depth))
        filled(made, {name: tensors[name] for name in made.state_dict()})
        return made

    def case(made: LinearDiT, pixels: int, pictures: int) -> Callable[[], Tensor]:
        count, side = 2 * pictures, pixels // factor
        latent = torch.randn(count, deepest.latent_channels, side, side, device=device)
        text = torch.randn(count, 300, deepest.width, device=device, dtype=dtype)
        mask = torch.ones(count, 300, dtype=torch.bool, device=device)
        clock = torch.full((count,), 0.5, device=device)
        with torch.inference_mode():
            prepared = made.prepare(text, mask)
        return lambda: made.denoise(latent, clock, prepared, mask)

    usual = sizes.pixels[1]
    made = network(config.dit.depth)
    tokens = [(pixels // factor) ** 2 for pixels in sizes.pixels]
    yield meter.fill(
        Curve(name="forward", panel="Pixels", size="tokens (1024 px have 1024)"),
        ((n, case(made, pixels, 1)) for n, pixels in zip(tokens, sizes.pixels, strict=True)),
    )
    yield meter.fill(
        Curve(name="forward", panel="Pictures", size=f"pictures of {usual} px"),
        ((count, case(made, usual, count)) for count in sizes.pictures),
    )
    yield meter.fill(
        Curve(name="forward", panel="Depth", size="blocks"),
        ((depth, case(network(depth), usual, 1)) for depth in sizes.depths),
    )


def decoder_curves(meter: Meter, dtype: torch.dtype, is_tiny: bool) -> Iterator[Curve]:
    """Decoding in one piece against pixels."""
    config = model_config(MODEL, is_tiny=is_tiny).autoencoder
    with torch.device("meta"):
        made: Any = DCAE(config)
    filled(made, random_state(lambda: DCAE(config), meter.device, dtype))
    made.to(memory_format=torch.channels_last)

    def case(pixels: int) -> Callable[[], Tensor]:
        side = pixels // config.factor
        latent = torch.randn(1, config.latent_channels, side, side, device=meter.device)
        return lambda: made.decode(latent)

    yield meter.fill(
        Curve(name="decoding", panel="Pixels", size="tokens (1024 px have 1024)"),
        (((pixels // config.factor) ** 2, case(pixels)) for pixels in meter.sizes.pixels),
    )


def random_state(make: Callable[[], Any], device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors for the network that `make` builds, drawn on the device."""
    with torch.device("meta"):
        plain = make().state_dict()
    generator = torch.Generator(device).manual_seed(0)
    return {name: random_like(name, tensor, generator).to(dtype) for name, tensor in plain.items()}


def page(curves: Sequence[Curve], device: str, dtype: torch.dtype) -> Iterator[str]:
    """The report in Markdown."""
    yield f"# Scaling, {datetime.date.today()}, {device}"
    yield ""
    yield f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, random weights;"
    yield f"`{command()}`. Milliseconds / MiB at work."
    for curve in curves:
        yield ""
        yield f"{curve.panel}: {curve.name}, against {curve.size}"
        yield ""
        yield "| " + " | ".join(f"{point.size:g}" for point in curve.points) + " | slope |"
        yield "|" + "---:|" * (len(curve.points) + 1)
        for of, unit in (("seconds", 1000.0), ("bytes", 2.0**-20)):
            cells = [f"{(getattr(point, of) or 0) * unit:.4g}" for point in curve.points]
            slope = curve.slope(of)
            cells.append("-" if slope is None else f"{slope:.2f}")
            yield "| " + " | ".join(cells) + " |"
        if curve.stopped:
            yield ""
            yield f"It ends here: {curve.stopped}."
    yield ""
    linear, *others = (curve for curve in curves if curve.panel == "One attention")
    for other in others:
        yield f"- {verdict(linear, other)}"


def verdict(linear: Curve, other: Curve) -> str:
    """From which size on linear attention is faster than `other`."""
    pairs = dict(other.values("seconds"))
    both = [(size, pairs[size] / s) for size, s in linear.values("seconds") if size in pairs]
    if not both:
        return f"{other.name}: nothing to compare"
    place = crossing(linear, other)
    if place is not None:
        where = f"linear attention is faster from {place:.0f} tokens on"
    elif all(ratio > 1 for _, ratio in both):
        where = "linear attention is faster at every size"
    else:
        where = "linear attention is not faster at the largest size"
    ratios = ", ".join(f"{size:g}: {ratio:.2f}" for size, ratio in both)
    return f"Against {other.name}, {where}; its time over linear's by tokens: {ratios}."


def as_json(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """All points and slopes."""
    return [
        {
            "name": curve.name,
            "panel": curve.panel,
            "size": curve.size,
            "points": [[point.size, point.seconds, point.bytes] for point in curve.points],
            "slopes": {of: curve.slope(of) for of in ("seconds", "bytes")},
            "stopped": curve.stopped,
        }
        for curve in curves
    ]


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="small networks, for trying it out")
    parser.add_argument("--seconds", type=float, default=60.0, help="no point begins after these")
    parser.add_argument("--write", type=Path, help="folder for the dated report and the plot")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
