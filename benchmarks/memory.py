"""How much GPU memory does a picture take, and how long is it to the first step? Random weights.

    python benchmarks/memory.py                       # on a GPU: 1.6B at 1024 and 4096 px
    python benchmarks/memory.py --tiny                # the same at small size, on any machine
    python benchmarks/memory.py --write benchmarks/results
    python benchmarks/memory.py --models runs/models --only 4,cold --seconds 120

Writes models of the official sizes in sana's own layout (bf16, 9 GB; the tokenizer is a small
stand-in), then draws each case from the files in a process of its own, so that nothing of an
earlier case is counted. Peaks are the allocator's, from loading to the finished picture. Every
case at 1024 px must draw the same pixels as the resident one: moving weights changes no bit. Cold
start is the time from starting the process of `sana generate` to its first step, with the files in
the page cache; the best of three processes. A case that fails or takes too long is named and the
others go on; with --write what is known is on disk after each. Fails if a bar of issue 3 is missed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]

from benchmarks.commands import command  # noqa: E402

GIB = 2**30
PROMPT = "a red fox in the snow"
COLD_START_BAR = 8.0
COLD_START = """
import sys, time
def mark(what):
    print("mark", what, time.time(), flush=True)
mark("python")
from sana.cli.main import main
import torch
from sana.pipelines.pipeline import Pipeline
mark("import")
plain = Pipeline.steps
def steps(self, *inputs):
    mark("load")
    for number, step in enumerate(plain(self, *inputs), start=1):
        step.latent.sum().item()
        if number <= 3:
            mark(f"step_{number}")
        yield step
Pipeline.steps = steps
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to draw one picture."""

    name: str
    model: str
    memory: str | None
    bar: float | None = None
    """GiB that the allocator may reach."""


CASES = (
    Case(name="1.6B, 1024 px, all resident", model="medium", memory=None, bar=9.5),
    Case(name="1.6B, 1024 px, offloaded", model="medium", memory="5.8GiB", bar=5.3),
    Case(name="1.6B, 1024 px, in 4 GiB", model="medium", memory="4GiB", bar=3.5),
    Case(name="1.6B, 1024 px, in 2.5 GiB", model="medium", memory="2.5GiB", bar=2.0),
    Case(name="1.6B, 4096 px, tiled, offloaded", model="large", memory="7.5GiB", bar=7.0),
)


def main() -> int:
    """Run the chosen cases and print the table; 1 if a bar is missed or pixels differ."""
    options = _options()
    if options.case is not None:
        print(json.dumps(draw(CASES[options.case], options.folder, is_tiny=options.tiny)))
        return 0
    began = time.perf_counter()
    chosen = options.only.split(",")
    with tempfile.TemporaryDirectory(prefix="sana-memory-") as name:
        folder = options.models or Path(name)
        ensure_models(folder, is_tiny=options.tiny)
        print(f"models written after {time.perf_counter() - began:.0f} s", file=sys.stderr)
        report = Report(options, folder)
        if "cold" in chosen:
            report.take_cold(began + options.seconds)
        for index in (int(word) for word in chosen if word != "cold"):
            left = began + options.seconds - time.perf_counter()
            report.take(index, min(left, options.limit))
    print("\n".join(report.lines()))
    print(json.dumps({"device": report.device, "cold": report.colds, "cases": report.results}))
    print(f"{time.perf_counter() - began:.0f} s in all", file=sys.stderr)
    return 1 if report.failures() else 0


class Report:
    """What has been measured so far, on disk after each case if that is wanted."""

    def __init__(self, options: Any, folder: Path) -> None:
        import torch

        self.options, self.folder = options, folder
        has_gpu = torch.cuda.is_available()
        self.device = torch.cuda.get_device_name() if has_gpu else "CPU"
        self.results: dict[int, dict[str, Any]] = {}
        self.colds: list[dict[str, float]] = []
        self.failed: list[str] = []

    def take(self, index: int, seconds: float) -> None:
        """One case, in a process of its own that is ended after `seconds`."""
        name = CASES[index].name
        if seconds <= 0:
            self.failed.append(f"{name}: no time was left")
            return
        try:
            self.results[index] = _in_own_process(index, self.folder, self.options, seconds)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            self.failed.append(f"{name}: {error}"[:300])
        self._write()

    def take_cold(self, deadline: float) -> None:
        """Three processes of `sana generate`, the first of which fills Triton's cache."""
        for number in range(3):
            left = deadline - time.perf_counter()
            try:
                self.colds.append(cold_start(self.folder, f"cold{number}.png", left))
            except (SystemExit, subprocess.TimeoutExpired) as error:
                self.failed.append(f"cold start: {error}"[:300])
                break
            print(json.dumps(self.colds[-1]), file=sys.stderr, flush=True)
            self._write()

    @property
    def cold(self) -> dict[str, float] | None:
        """The fastest start."""
        return min(self.colds, key=lambda marks: marks["step_1"], default=None)

    def failures(self) -> list[str]:
        """Bars that are missed, pixels that differ, and what did not run."""
        differing = _differences(self.results, self.folder)
        missed = _failures(self.results, self.cold, is_tiny=self.options.tiny)
        return [*self.failed, *differing, *missed]

    def lines(self) -> list[str]:
        """The page."""
        return list(page(self.results, self.cold, self.device, self.failures()))

    def _write(self) -> None:
        folder = self.options.write
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            stem = f"{datetime.date.today()}-memory-{self.device.replace(' ', '-')}".lower()
            (folder / f"{stem}.md").write_text("\n".join(self.lines()) + "\n")


def draw(case: Case, folder: Path, *, is_tiny: bool) -> dict[str, Any]:
    """Load the model within the case's memory and draw a picture; what it took."""
    import torch

    import sana

    has_cuda = torch.cuda.is_available()
    began = time.perf_counter()
    memory = None if is_tiny else case.memory
    pipeline = sana.load(str(folder / case.model), memory=memory)
    request = sana.Request(prompt=PROMPT, seeds=7, steps=20 if case.model == "medium" else 4)
    loaded = time.perf_counter()
    plan = str(pipeline.memory_plan(request))
    pipeline.generate(request)
    if has_cuda:
        torch.cuda.synchronize()
    first = time.perf_counter()
    [picture] = pipeline.generate(request)  # what moves is gathered in page-locked memory now
    drawn = again = time.perf_counter()
    if case.model == "medium":
        [picture] = pipeline.generate(request)
        again = time.perf_counter()
    picture.save(folder / f"{CASES.index(case)}.png")
    return {
        "case": case.name,
        "plan": plan,
        "dtype": pipeline.dtype,
        "peak": torch.cuda.max_memory_allocated() if has_cuda else None,
        "reserved": torch.cuda.max_memory_reserved() if has_cuda else None,
        "load_seconds": loaded - began,
        "first_seconds": first - loaded,
        "second_seconds": drawn - first,
        "seconds": again - drawn if again > drawn else drawn - first,
        "pixels": hashlib.sha256(picture.tobytes()).hexdigest()[:16],
    }


def cold_start(
    folder: Path, picture: str = "cold.png", seconds: float | None = None
) -> dict[str, float]:
    """Seconds from starting `sana generate` to its first step, and to its end.

    SystemExit if it fails, TimeoutExpired if it takes longer than `seconds`.
    """
    line = ["generate", PROMPT, "--model", str(folder / "medium"), "--seed", "7"]
    line += ["--output", str(folder / picture)]
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", COLD_START, *line],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    if done.returncode:
        raise SystemExit(f"sana generate failed: {done.stderr}")
    ended = time.time()
    marks = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("mark ")]
    return {**{what: float(when) - began for what, when in marks}, "end": ended - began}


def ensure_models(
    folder: Path, *, is_tiny: bool, names: tuple[str, ...] = ("medium", "large")
) -> None:
    """`write_models`, unless an earlier program has written them there."""
    mark = folder / "written"
    if mark.is_file() and {*names} <= {*mark.read_text().split()}:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_models(folder, is_tiny=is_tiny, names=names)
    mark.write_text(" ".join(names))


def write_models(
    folder: Path, *, is_tiny: bool, names: tuple[str, ...] = ("medium", "large")
) -> None:
    """Two folders of one random model: `medium`, and `large` whose config draws 4096 px."""
    import torch

    from gemmas import TINY, gemma_tokenizer
    from sana.config import GemmaConfig, to_json
    from sana.models.dcae import DCAE
    from sana.models.dit import LinearDiT
    from sana.models.gemma_decoder import GemmaDecoder
    from sana.presets import preset

    gemma = TINY if is_tiny else GemmaConfig()
    medium = preset("sana-1600m-1024-bf16").config
    large = preset("sana-1600m-4096").config
    if is_tiny:
        medium, large = (_shrunk(config, gemma.width) for config in (medium, large))
    transformer = random_state(lambda: LinearDiT(medium.dit))
    autoencoder = random_state(lambda: DCAE(medium.autoencoder))
    for name, config in {"medium": medium, "large": large}.items():
        if name not in names:
            continue
        target = folder / name
        target.mkdir()
        header = {"config": to_json(config)}
        file = target / "transformer-00001-of-00001.safetensors"
        _write(file, transformer, {**header, "digest": "random"})
        _write(target / "autoencoder.safetensors", autoencoder, header)
    text = folder / "medium" / "text"
    text.mkdir()
    states = random_state(lambda: GemmaDecoder(gemma))
    _write(text / "model.safetensors", states, {"format_of": "transformers"})
    (text / "config.json").write_text(json.dumps(_gemma_json(gemma)))
    (text / "tokenizer.json").write_text(gemma_tokenizer())
    if "large" in names:
        (folder / "large" / "text").symlink_to(text, target_is_directory=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(path: Path, tensors: dict[str, Any], header: dict[str, Any]) -> None:
    """A weight file, straight to the disk: `to_bytes` would hold three copies of it."""
    import safetensors.torch

    from sana.weights.files import FORMAT, HEADER_KEY

    text = json.dumps({"format": FORMAT, **header}, default=str)
    safetensors.torch.save_file(tensors, path, metadata={HEADER_KEY: text})


def random_state(make: Any) -> dict[str, Any]:
    """bf16 tensors for the network that `make` builds, drawn where it is fast, kept on the CPU.

    Matrices keep the size of what passes them, norms stay near one: the states stay finite.
    """
    import torch

    from sana.weights.load import meta_parameters

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(3)
    with meta_parameters():
        state = make().state_dict()
    drawn = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            drawn[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            continue
        values = torch.randn(tensor.shape, generator=generator, device=device)
        if tensor.ndim > 1 and "table" not in name:
            values /= tensor[0].numel() ** 0.5
        else:
            values = 0.1 * values + (1.0 if name.endswith("weight") and "norm" in name else 0.0)
        drawn[name] = values.bfloat16().cpu()
    return drawn


def page(
    results: dict[int, dict[str, Any]],
    cold: dict[str, float] | None,
    device: str,
    failures: list[str],
) -> Iterator[str]:
    """The report, line by line."""
    import torch

    yield f"# Memory of a picture, {datetime.date.today()}, {device}"
    yield ""
    yield f"torch {torch.__version__}; `{command()}`; random weights of the"
    yield "official sizes; peaks by the allocator from loading to the picture, CUDA's own 0.5 GiB"
    yield "not counted; seconds of the first and the last picture (20 steps, at 4096 px 4 steps)."
    yield ""
    yield "| case | stated | peak GiB | at most | reserved GiB | load s | 1st s | last s | pixels |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---|"
    for index, got in results.items():
        case = CASES[index]
        bar = "" if case.bar is None else f"{case.bar:g}"
        yield (
            f"| {case.name} | {case.memory or '-'} | {_gib(got['peak'])} | {bar} | "
            f"{_gib(got['reserved'])} | {got['load_seconds']:.1f} | {got['first_seconds']:.1f} | "
            f"{got['seconds']:.2f} | "
            f"{got['pixels'][:8]} |"
        )
    yield ""
    for index, got in results.items():
        yield f"- {CASES[index].name}: {got['plan']}."
    yield ""
    if cold is not None:
        yield (
            f"Cold start of `sana generate`, to the first step: {cold['step_1']:.1f} s "
            f"(at most {COLD_START_BAR:g}); to the file: {cold['end']:.1f} s."
        )
        yield "Seconds from the start: " + ", ".join(f"{k} {v:.1f}" for k, v in cold.items()) + "."
        yield ""
    yield "All bars held." if not failures else "Missed: " + "; ".join(failures) + "."


def _differences(results: dict[int, dict[str, Any]], folder: Path) -> Iterator[str]:
    """Cases of one request whose pixels are not those of the first, and by how much."""
    import numpy as np
    from PIL import Image

    if 0 not in results:
        return
    first = np.asarray(Image.open(folder / "0.png"), dtype=float)
    for index, got in results.items():
        case = CASES[index]
        if case.model == CASES[0].model and got["pixels"] != results[0]["pixels"]:
            error = np.abs(np.asarray(Image.open(folder / f"{index}.png"), dtype=float) - first)
            psnr = 20 * np.log10(255 / np.sqrt((error**2).mean()))
            yield f"{case.name}: other pixels, up to {error.max():.0f} of 255, PSNR {psnr:.1f} dB"


def _failures(
    results: dict[int, dict[str, Any]], cold: dict[str, float] | None, *, is_tiny: bool
) -> Iterator[str]:
    if is_tiny:
        return
    for index, got in results.items():
        case = CASES[index]
        if got["peak"] is None:
            yield f"{case.name}: no GPU, so no peak"
        elif case.bar is not None and got["peak"] > case.bar * GIB:
            yield f"{case.name}: {_gib(got['peak'])} GiB"
    if cold is not None and cold["step_1"] > COLD_START_BAR:
        yield f"cold start {cold['step_1']:.1f} s"


def _in_own_process(index: int, folder: Path, options: Any, seconds: float) -> dict[str, Any]:
    """The case's result; RuntimeError if it fails, TimeoutExpired if it takes too long."""
    line = [sys.executable, __file__, "--case", str(index), "--folder", str(folder)]
    done = subprocess.run(
        [*line, *(["--tiny"] if options.tiny else [])],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise RuntimeError(f"failed, {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def _shrunk(config: Any, text_width: int) -> Any:
    def thin(stages: Any) -> Any:
        return tuple(replace(s, width=s.width // 16, depth=min(s.depth, 1)) for s in stages)

    autoencoder = config.autoencoder
    dit = replace(config.dit, width=64, depth=3, cross_heads=2, text_dim=text_width)
    return replace(
        config,
        dit=dit,
        autoencoder=replace(
            autoencoder,
            encoder=thin(autoencoder.encoder),
            decoder=thin(autoencoder.decoder),
            head_dim=8,
        ),
        text=replace(config.text, width=text_width),
        pixels=min(config.pixels, 1280) // 4,
        trained_on_bins=False,
    )


def _gemma_json(gemma: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma2",
        "hidden_size": gemma.width,
        "num_hidden_layers": gemma.layers,
        "num_attention_heads": gemma.heads,
        "num_key_value_heads": gemma.key_heads,
        "head_dim": gemma.head_dim,
        "intermediate_size": gemma.mlp_width,
        "vocab_size": gemma.vocabulary,
        "query_pre_attn_scalar": gemma.query_scale,
        "attn_logit_softcapping": gemma.soft_cap,
        "sliding_window": gemma.window,
        "rope_theta": gemma.rope_theta,
        "rms_norm_eps": gemma.norm_eps,
    }


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="small networks, for trying it out")
    parser.add_argument("--write", type=Path, help="folder for the dated report")
    parser.add_argument("--models", type=Path, help="folder where the models are kept for later")
    every = ",".join(["cold", *map(str, range(len(CASES)))])
    parser.add_argument("--only", default=every, help=f"numbers of cases, in order; {every}")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no case goes on after these")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each case")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
