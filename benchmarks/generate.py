"""How fast is a picture? Ours and diffusers' in one process, on the same random weights.

    python benchmarks/generate.py                              # on a GPU: every row of issue 4
    python benchmarks/generate.py --only 1.6B-b1,dc-ae --seconds 150 --write benchmarks/results
    python benchmarks/generate.py --peer compiled              # torch.compile for the peer: minutes
    python benchmarks/generate.py --tiny                       # the same, small, on any machine

A row is checked before it is timed, and a row that fails its check prints no time: in bf16, ours
may be no farther from fp32 than 1.5 times the peer (a velocity, a decoded picture) or twice the
peer (the latent after all steps, for two prompts), in fp8 six times; in fp32 the two agree to
1e-5. Times are of the
wall clock, prompt to pixels in the host's memory, text included; `first` is the first picture of
its kind in the process. Peaks are the allocator's without what is held for the comparison. Rows go
one by one: one that fails or no longer fits --seconds is named as such and the others go on, and
with --write the results so far are on disk after each. The last thing printed is the table.
What no card has proven (`sana.kernels.proven`) is left out, or used with --try.
Without diffusers there is no peer, and checks compare with the plain ops of `kernels.reference`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.commands import named_ways  # noqa: E402
from benchmarks.parity import Networks, rel_rms  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from benchmarks.rigs import (  # noqa: E402
    NARROW,
    Check,
    Rig,
    Texts,
    Tile,
    check_decoding,
    decode,
    model_config,
)
from benchmarks.rows import ROWS, Row, chosen  # noqa: E402
from sana.kernels import ops  # noqa: E402
from sana.kernels.proven import UNPROVEN, Way  # noqa: E402
from sana.pipelines.graphs import Graphs, cuda_capture  # noqa: E402
from sana.pipelines.timing import (  # noqa: E402
    Spread,
    forget_peak,
    peak_bytes,
    synchronize,
    time_request,
    timed,
)

TILES: tuple[Tile, ...] = ((2368, 4096), (1664, 4096), 1024)
"""Sides of square tiles, or height and width."""
MEMORY = 8 * 2**30
"""What decoding 4096 px may take."""


class Disagreement(Exception):
    """A check failed, so there is nothing to time."""


@dataclass(kw_only=True)
class Bench:
    """What the rows share: networks that are drawn once, the options, the clock."""

    options: Any
    device: torch.device
    deadline: float
    has_peer: bool
    _made: dict[str, Any] = field(default_factory=dict)

    def texts(self) -> Texts:
        """Gemma-2, ours and theirs."""
        return self._once("texts", lambda: Texts(
            self.device, is_tiny=self.options.tiny, has_peer=self.has_peer
        ))  # fmt: skip

    def autoencoder(self) -> Networks:
        """The DC-AE that all official models share."""
        config = model_config("sana-1600m-1024", is_tiny=self.options.tiny).autoencoder
        return self._once(
            "autoencoder", lambda: Networks(config, self.device, has_peer=self.has_peer)
        )

    def rig(self, row: Row) -> Rig:
        """The row's model; the one before it is let go."""
        key = f"{row.model}{' in fp8' * row.in_fp8} of {row.batch}"
        if key not in self._made:
            self.forget_rigs()
        config = model_config(row.model, is_tiny=self.options.tiny)
        return self._once(
            key,
            lambda: Rig(
                row.model,
                self.texts(),
                self.autoencoder(),
                config,
                batch=row.batch,
                in_fp8=row.in_fp8,
            ),
        )

    def forget_rigs(self) -> None:
        """Let go of models, with their graphs."""
        for old in [name for name in self._made if " of " in name]:
            del self._made[old]
        release(self.device)

    def share(self) -> float:
        """Seconds for one set of repetitions."""
        return 0.2 if self.options.tiny else min(2.0, max(0.3, self.left() / 60))

    def left(self) -> float:
        """Seconds until no row may begin."""
        return self.deadline - time.perf_counter()

    def peak(self, reference: int) -> int | None:
        """Bytes since the last `forget_peak`, less those of the fp32 networks."""
        return peak_bytes(self.device) - reference if self.device.type == "cuda" else None

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def main() -> int:
    """Run the chosen rows and print the table; 1 if one failed, disagreed or missed its target."""
    options = _options()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    began = time.perf_counter()
    bench = Bench(
        options=options,
        device=device,
        deadline=began + options.seconds,
        has_peer=options.peer != "none" and importlib.util.find_spec("diffusers") is not None,
    )
    report = Report(device=device, folder=options.write, peer=_peer_name(options, bench))
    tried = named_ways(options.tried)
    print(f"tried: {', '.join(tried) or 'nothing that is not proven'}", file=sys.stderr)
    for row in chosen(options.only):
        report.add(row, run_trying(row, bench, tried))
        print(f"  {time.perf_counter() - began:.0f} s so far", file=sys.stderr, flush=True)
    print("\n".join(report.page()))
    return 0 if report.is_good else 1


def run_trying(row: Row, bench: Bench, tried: list[Way]) -> dict[str, Any]:
    """The row with what is tried; where that fails or is wrong, that is said, and without it."""
    with ops.trying(*tried):
        result = run(row, bench)
    bad = [f"{word}: {result[word]}" for word in ("failed", "disagrees") if word in result]
    if not bad or not tried:
        return result
    print(f"{row.name}, tried: {bad[0]}", file=sys.stderr, flush=True)
    bench.forget_rigs()
    result = run(row, bench)
    return {**result, "checks": [*result.get("checks", ()), f"with what was tried, {bad[0]}"]}


def run(row: Row, bench: Bench) -> dict[str, Any]:
    """What the row measured, or why it did not: `skipped`, `disagrees` or `failed`."""
    if bench.left() < 0:
        return {"skipped": f"{bench.options.seconds:g} s were over"}
    measure = {
        "picture": measure_picture,
        "decode": measure_decoding,
        "forward": measure_forward,
        "cold": measure_cold,
    }[row.kind]
    try:
        return measure(row, bench)
    except Disagreement as error:
        return {"disagrees": str(error)}
    except Exception as error:
        # One row must not take the others with it: out of memory, a kernel that does not compile.
        if bench.options.trace:
            raise
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    finally:
        release(bench.device)


def measure_picture(row: Row, bench: Bench) -> dict[str, Any]:
    """Prompt to pixels, with `row.batch` pictures of one prompt."""
    rig = bench.rig(row)
    side = rig.config.pixels // rig.config.autoencoder.factor
    request = rig.request(row.steps, row.batch)
    checks = [rig.check_velocity(side, 2 * row.batch if row.batch > 1 else 2)]
    checks.append(rig.check_run(request))
    require(checks)
    release(bench.device)
    least = 3 if row.batch == 1 else 2
    ours = time_request(rig.ours, request, seconds=bench.share(), least=least).as_json()
    peak = bench.peak(rig.reference_bytes)
    result: dict[str, Any] = {
        "checks": [str(check) for check in checks],
        "ours": {**ours["whole"], **ours, "peak_bytes": peak},
    }
    if rig.has_peer and not row.in_fp8:  # its bf16 is timed in the row before
        result["peer"] = time_peer(row, rig, bench)
    return result


def time_peer(row: Row, rig: Rig, bench: Bench) -> dict[str, Any]:
    """The same by diffusers, all of it and in stages; compiled as an expert would, if asked."""
    request = rig.request(row.steps, row.batch)
    if bench.options.peer == "compiled":
        torch.backends.cudnn.benchmark = True
        rig.peer.vae.to(memory_format=torch.channels_last)
        rig.peer.transformer.compile(**compiling(bench))
        rig.peer.vae.decoder.compile(**compiling(bench))
    forget_peak(bench.device)
    began = time.perf_counter()
    with torch.inference_mode():
        rig.ask_peer(request)
    first = time.perf_counter() - began
    share = bench.share()
    least = 3 if row.batch == 1 else 1
    whole = timed(lambda: rig.ask_peer(request), bench.device, seconds=share, least=least)
    peak = bench.peak(rig.reference_bytes)
    if row.batch > 1:
        return {**whole.as_json(), "first_ms": 1000 * first, "peak_bytes": peak}
    latent = timed(
        lambda: rig.ask_peer(request, "latent"), bench.device, seconds=share / 4, least=2
    )
    sprint = rig.config.dit.guidance_embedding
    more = {} if sprint else {"do_classifier_free_guidance": True}
    text = timed(
        lambda: rig.peer.encode_prompt(request.prompt, device=bench.device, **more),
        bench.device,
        seconds=share / 4,
    )
    torch.backends.cudnn.benchmark = False
    stages = {
        "text": text.as_json(),
        "steps": {"median_ms": round(1000 * (latent.median - text.median), 2)},
        "decode": {"median_ms": round(1000 * (whole.median - latent.median), 2)},
    }
    return {**whole.as_json(), "first_ms": round(1000 * first, 2), "peak_bytes": peak, **stages}


def measure_decoding(row: Row, bench: Bench) -> dict[str, Any]:
    """The decoder alone, latents and pixels on the device; large pictures in at most `MEMORY`.

    A large one is compared with our own plain ops: the peer's in fp32 would not fit.
    """
    networks = bench.autoencoder()
    latent = _random_latent(row, networks, bench)
    # As `Pipeline` does with the model that it is given.
    ours = networks.ours[NARROW].to(memory_format=torch.channels_last)
    checks, ways = [], {}
    for given in TILES if row.is_large else (None,):
        tile = _shrunk(given) if bench.options.tiny else given
        checks.append(check_decoding(networks, latent, tile, with_peer=not row.is_large))
        require(checks[-1:])
        name = "whole" if tile is None else f"{tile} px tiles"
        ways[name] = _decoding(lambda tile=tile: decode(ours, latent, tile), ours.decoder, bench)
        print(f"  {name}: {ways[name]}", file=sys.stderr, flush=True)
    if not row.is_large and ops.allows("decode_graph") and bench.device.type == "cuda":
        ways["a graph"] = _decoding(graphed(ours, latent), ours.decoder, bench)
    fitting = [way for way in ways.values() if (way["peak_bytes"] or 0) <= MEMORY]
    if not fitting:
        raise Disagreement(f"nothing decodes in {MEMORY / 2**30:g} GiB: {ways}")
    best = min(fitting, key=lambda way: way["median_ms"])
    result = {"checks": [str(check) for check in checks], "ours": {**best, "ways": ways}}
    if networks.theirs:
        vae = networks.theirs[NARROW]
        if row.is_large:
            vae.enable_tiling()
        elif bench.options.peer == "compiled":
            vae.to(memory_format=torch.channels_last)
            vae.decoder.compile(**compiling(bench))
        narrow = latent.to(NARROW)
        result["peer"] = _decoding(
            lambda: vae.decode(narrow, return_dict=False), vae.decoder, bench
        )
        vae.disable_tiling()
    return result


def graphed(network: Any, latent: Tensor) -> Callable[[], Tensor]:
    """Decoding as a CUDA graph, as a pipeline does it; `Disagreement` if its pixels are others."""
    graphs = Graphs(cuda_capture())

    def replay() -> Tensor:
        return graphs(lambda raw, _: network.decode(raw), network, latent)

    with torch.inference_mode():
        expected, *others = (replay() for _ in range(4))
    if not all(rel_rms(expected, other) < 1e-3 for other in others):
        raise Disagreement("a graph of the decoder gives other pixels")
    return replay


def _shrunk(tile: Tile) -> Tile:
    if tile is None or isinstance(tile, int):
        return tile and tile // 16
    return tile[0] // 16 // 32 * 32, tile[1] // 16


def _random_latent(row: Row, networks: Networks, bench: Bench) -> Tensor:
    config = networks.ours[NARROW].config
    side = (row.pixels // 16 if bench.options.tiny else row.pixels) // config.factor
    generator = torch.Generator(bench.device).manual_seed(1)
    shape = (1, config.latent_channels, side, side)
    return torch.randn(shape, generator=generator, device=bench.device)


def _decoding(decode: Callable[[], Any], decoder: nn.Module, bench: Bench) -> dict[str, Any]:
    """Times, and the peak with the decoder's weights but without what else is held."""
    forget_peak(bench.device)
    held = torch.cuda.memory_allocated(bench.device) if bench.device.type == "cuda" else 0
    took = timed(decode, bench.device, seconds=bench.share())
    own = sum(parameter.nbytes for parameter in decoder.parameters())
    return {**took.as_json(), "peak_bytes": bench.peak(held - own)}


def measure_forward(row: Row, bench: Bench) -> dict[str, Any]:
    """One velocity of the transformer, for two latents with a text of 300 slots each."""
    rig = bench.rig(row)
    side = row.pixels // 16 if bench.options.tiny else row.pixels
    side //= rig.config.autoencoder.factor
    check = rig.check_velocity(side)
    require([check])
    velocity = rig.velocity(side)
    result: dict[str, Any] = {"checks": [str(check)]}
    for whose, name in (("ours", "ours"), ("theirs", "peer")):
        if whose == "theirs" and not rig.has_peer:
            continue
        forget_peak(bench.device)
        took = timed(
            lambda whose=whose: velocity(whose, NARROW), bench.device, seconds=bench.share()
        )
        result[name] = {**took.as_json(), "peak_bytes": bench.peak(rig.reference_bytes)}
    return result


def measure_cold(row: Row, bench: Bench) -> dict[str, Any]:
    """`sana generate` in a process of its own, files in the page cache; the second such process.

    The first one fills the caches of compiled kernels on disk.
    """
    from benchmarks.memory import cold_start, ensure_models

    bench._made.clear()
    release(bench.device)
    with tempfile.TemporaryDirectory(prefix="sana-cold-") as name:
        folder = bench.options.models or Path(name)
        ensure_models(folder, is_tiny=bench.options.tiny, names=("medium",))
        first, *others = (cold_start(folder, picture=f"{i}.png") for i in range(3))
    spread = Spread(seconds=tuple(cold["end"] for cold in others))
    to_step = min(cold["step_1"] for cold in others)
    return {
        "checks": [],
        "ours": {
            **spread.as_json(),
            "first_ms": round(1000 * first["end"], 2),
            "first_step_ms": round(1000 * to_step, 2),
        },
    }


def compiling(bench: Bench) -> dict[str, Any]:
    """How an expert compiles the peer: with CUDA graphs, for one shape."""
    mode = {} if bench.options.tiny else {"mode": "reduce-overhead"}
    return {"dynamic": False, **mode}


def require(checks: list[Check]) -> None:
    """Say what was checked; `Disagreement` if anything is off."""
    for check in checks:
        print(f"  {check}", file=sys.stderr, flush=True)
    bad = [str(check) for check in checks if not check.passes]
    if bad:
        raise Disagreement("; ".join(bad))


def release(device: torch.device) -> None:
    """Give cached memory back."""
    import gc

    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()


def _peer_name(options: Any, bench: Bench) -> str | None:
    if not bench.has_peer:
        return None
    import diffusers

    return f"diffusers {diffusers.__version__}, {options.peer}"


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    known = ", ".join(row.name for row in ROWS)
    parser.add_argument("--only", help=f"rows or their beginnings, with commas; of {known}")
    parser.add_argument("--seconds", type=float, default=600.0, help="no row begins after these")
    parser.add_argument("--peer", choices=("eager", "compiled", "none"), default="eager")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="folder for a dated report and its JSON")
    ways = ", ".join(UNPROVEN)
    parser.add_argument("--try", dest="tried", default="", help=f"all, or some of {ways}")
    parser.add_argument(
        "--models", type=Path, help="where memory.py has left, or will find, models"
    )
    parser.add_argument("--tiny", action="store_true", help="small networks, for trying it out")
    parser.add_argument("--trace", action="store_true", help="stop at a failing row's traceback")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
