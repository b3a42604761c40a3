"""Kernels of one CUDA graph in their order, the gaps between them, and what other ways make of it.

    python benchmarks/gaps.py                                   # on a GPU: a step of 1.6B
    python benchmarks/gaps.py --of sana-600m-1024 --variants "; cross_attention; -norm_pair"
    python benchmarks/gaps.py --of dc-ae --profile              # kernels and gaps of first and last
    python benchmarks/gaps.py --tiny                            # the same, small, on any machine

A variant is a list of words: ways of `sana.kernels.proven` to be tried, with a minus to be left
out, and constants of a module of `sana.kernels`, as glumbconv.BLOCK_F=64. Each gets a graph; then
all are replayed in turn, some times one behind the other, some times one by one, so that they see
the same clocks. Printed are medians in ms, how far the result is from fp32, and whether it is the
same bits as the first variant's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.errors import rel_rms  # noqa: E402
from benchmarks.kernels import (  # noqa: E402
    TEXT,
    Draw,
    patched,
    random_network,
    table,
    tiny_decoder,
)
from sana.kernels import ops  # noqa: E402
from sana.kernels.proven import REPORTS, Way  # noqa: E402
from sana.kernels.reference import FP8  # noqa: E402
from sana.models.dcae import DCAE  # noqa: E402
from sana.models.dit import LinearDiT  # noqa: E402
from sana.models.rounding import narrow  # noqa: E402
from sana.pipelines.graphs import cuda_capture  # noqa: E402
from sana.presets import preset  # noqa: E402


@dataclass(kw_only=True)
class Variant:
    """Ways and constants, the graph with them, and its times in ms."""

    words: str
    replay: Callable[[], None]
    result: Tensor
    rows: list[float] = field(default_factory=list)
    """Of one of several in a row."""
    alone: list[float] = field(default_factory=list)


def main() -> int:
    """Measure each of the things named; 1 if a variant failed or gave another result."""
    options = _options()
    failed = False
    for name in options.of.split(","):
        with torch.inference_mode():
            failed |= measure(name, options)
    return int(failed)


def measure(name: str, options: argparse.Namespace) -> bool:
    """One network: its table, and with --profile its kernels."""
    device = torch.device("cpu" if options.tiny else "cuda")
    call, exact = subject(name, device, options.tokens, is_tiny=options.tiny)
    variants: list[Variant] = []
    failed = False
    for words in options.variants.split(";"):
        if time.monotonic() > options.until:
            print(f"{words}: no time left", flush=True)
            continue
        try:
            variants.append(_captured(" ".join(words.split()), call, options))
        except Exception as error:  # what no card has run may fail there
            failed = True
            print(f"{words}: {type(error).__name__}: {error}"[:300], flush=True)
    for _ in range(options.rounds):
        for variant in variants:
            _time(variant, options)
    rows = [(name, "in a row", "alone", "error", "")]
    for variant in variants:
        error = rel_rms(exact, variant.result)
        is_same = torch.equal(variant.result, variants[0].result)
        failed |= not error < 3e-2  # so that NaN fails too
        times = [f"{statistics.median(x):.3f}" for x in (variant.rows, variant.alone)]
        same = "same bits" if is_same else ""
        rows.append((variant.words or "(as it is)", *times, f"{error:.3e}", same))
    if options.profile and variants and not options.tiny:
        for variant in (variants[0], variants[-1]):
            _profile(f"{name}: {variant.words or 'as it is'}", variant.replay)
    print(*table(rows), sep="\n", flush=True)
    return failed


def subject(
    name: str, device: torch.device, tokens: int, *, is_tiny: bool
) -> tuple[Callable[[], Tensor], Tensor]:
    """What is computed, and its result in fp32 by plain ops."""
    rand = Draw(device)
    if name == "dc-ae":
        config = tiny_decoder() if is_tiny else preset("sana-1600m-1024").config.autoencoder
        decoder = random_network(lambda: DCAE(config), device)
        decoder.to(memory_format=torch.channels_last)
        side = 2 if is_tiny else 32
        latent = rand(1, config.latent_channels, side, side)
        with ops.force("reference"):
            return lambda: decoder.decode(latent), copy.deepcopy(decoder).float().decode(
                latent.float()
            )
    name, in_fp8, _ = name.partition("+fp8")
    name, _, width = name.partition("@")
    name, _, batch = name.partition("*")
    c = preset("tiny" if is_tiny else name).config.dit
    network = random_network(lambda: LinearDiT(c), device)
    count = int(batch or (1 if c.guidance_embedding else 2))
    side = int(width or (3 if is_tiny else 32))
    latent = rand(count, c.latent_channels, side, side).float()
    text = rand(count, 5 if is_tiny else tokens, c.width)
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
    mask[: count // 2, 1:] = False
    guidance = 4.5 if c.guidance_embedding else None
    [moment] = network.embed_times(torch.tensor([0.7]), guidance).values()
    prepared: dict[tuple[bool, ...], Any] = {}

    def call() -> Tensor:
        # Made once for each of the ways to have a text, outside of graphs.
        ways = ops.allows("laid_text"), ops.allows("lone_text")
        if ways not in prepared:
            prepared[ways] = network.prepare(text, mask)
        result: Tensor = network.denoise(latent, moment, prepared[ways], None)
        return result

    with ops.force("reference"):
        wide = copy.deepcopy(network).float()
        plain = wide.prepare(text.float(), mask)
        exact = wide.denoise(latent, type(moment)(*(x.float() for x in moment)), plain, None)
    if in_fp8:
        narrow(network, FP8)
    return call, exact


def _captured(words: str, call: Callable[[], Tensor], options: argparse.Namespace) -> Variant:
    """The variant after one call without a graph and its capture."""
    with _chosen(words):
        result = call()
        if options.tiny:
            return Variant(words=words, replay=lambda: None, result=result)
        torch.cuda.synchronize()
        replay, output = cuda_capture()(call)
    output.fill_(float("nan"))
    replay()
    torch.cuda.synchronize()
    result = output.clone()
    for _ in range(2 * options.row):
        replay()
    torch.cuda.synchronize()
    if not torch.equal(output, result):
        raise RuntimeError("a replay gave other bits than the one before")
    return Variant(words=words, replay=replay, result=result)


@contextlib.contextmanager
def _chosen(words: str) -> Iterator[None]:
    """The ways and constants of a variant."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(ops.force("triton"))
        for word in words.split():
            way = cast("Way", word.removeprefix("-"))
            if way in REPORTS:
                is_without = word != way
                trying = ops.trying(without=[way]) if is_without else ops.trying(way)
                stack.enter_context(trying)
                continue
            place, _, value = word.partition("=")
            module, _, constant = place.rpartition(".")
            known = importlib.import_module(f"sana.kernels.{module}")
            stack.enter_context(patched(known, {constant: int(value)}))
        yield


def _time(variant: Variant, options: argparse.Namespace) -> None:
    """One round: some replays one behind the other, and two that are waited for."""
    for times, count in ((variant.rows, options.row), (variant.alone, 1), (variant.alone, 1)):
        times.append(replayed(variant.replay, count, waits=not options.tiny))


def replayed(replay: Callable[[], None], count: int, *, waits: bool = True) -> float:
    """Milliseconds of one of `count` replays, one behind the other."""
    began = time.perf_counter()
    for _ in range(count):
        replay()
    if waits:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1000 / count


def _profile(title: str, replay: Callable[[], None]) -> None:
    """Kernels by name with mean time and gap before, and some of the middle in their order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    found = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    found.sort(key=lambda e: e.time_range.start)
    by_name: dict[str, list[tuple[float, float]]] = defaultdict(list)
    lines, end = [], found[0].time_range.start
    for event in found:
        took, gap = event.time_range.elapsed_us(), event.time_range.start - end
        end = event.time_range.end
        by_name[event.name].append((took, gap))
        lines.append(f"  {gap:6.1f} {took:7.1f}  {event.name[:70]}")
    busy = sum(e.time_range.elapsed_us() for e in found) / 1000
    span = (end - found[0].time_range.start) / 1000
    print(f"{title}: {len(found)} launches, {busy:.3f} ms of work in {span:.3f} ms")
    middle = len(lines) // 2
    print("  gap us, us, in order:", *lines[middle : middle + 20], sep="\n")
    print("  ms, count, us, gap us")
    for name, pairs in sorted(by_name.items(), key=lambda pair: -sum(t for t, _ in pair[1])):
        if len(pairs) > 4 or sum(t for t, _ in pairs) > 50:
            times, gaps = zip(*pairs, strict=True)
            print(
                f"  {sum(times) / 1000:7.3f} {len(pairs):4d} {statistics.mean(times):7.1f}"
                f" {statistics.mean(gaps):6.2f}  {name[:70]}"
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--of", default="sana-1600m-1024", help="PRESET*BATCH@SIDE+fp8, or dc-ae")
    parser.add_argument("--variants", default="", help="separated by ;")
    parser.add_argument("--tokens", type=int, default=TEXT, help="of the text")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--row", type=int, default=10, help="replays one behind the other")
    parser.add_argument("--seconds", type=float, default=60, help="later no variant is begun")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.until = time.monotonic() + options.seconds
    return options


if __name__ == "__main__":
    sys.exit(main())
