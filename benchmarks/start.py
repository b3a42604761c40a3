"""Where a warm Sprint picture's time goes on the host: milliseconds and launches of each stage.

    python benchmarks/start.py                              # on a GPU: Sprint 1.6B, one step
    python benchmarks/start.py --model sana-sprint-600m-1024 --steps 4 --try start_graph
    python benchmarks/start.py --tiny                       # the same, small, on any machine

Stages are torch.profiler's ranges around the parts of `Pipeline.generate`; one may be inside
another. Launches are calls of the CUDA runtime (kernels, graphs, copies), waits synchronizations.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

from benchmarks.commands import named_ways  # noqa: E402
from benchmarks.parity import Networks  # noqa: E402
from benchmarks.rigs import Rig, Texts, model_config  # noqa: E402
from sana.kernels import ops  # noqa: E402
from sana.pipelines import denoising, pipeline  # noqa: E402
from sana.pipelines.pipeline import Pipeline  # noqa: E402
from sana.pipelines.timing import synchronize  # noqa: E402

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WORDS = ("red", "blue", "green", "black", "small", "large", "old", "young")
WARM = 4
"""Pictures before: the second of a shape captures, the third may still make a plan."""


def main() -> int:
    """Draw warm pictures, then one in the profiler, and print its stages."""
    options = _options()
    device = torch.device(options.device)
    config = model_config(options.model, is_tiny=options.tiny)
    autoencoder = Networks(
        model_config("sana-1600m-1024", is_tiny=options.tiny).autoencoder, device, has_peer=False
    )
    texts = Texts(device, is_tiny=options.tiny, has_peer=False)
    with ops.trying(*named_ways(options.tried)):
        rig = Rig(options.model, texts, autoencoder, config, batch=1)
        rig.ours.components.autoencoder.to(memory_format=torch.channels_last)
        request = rig.request(options.steps, options.count)
        for _ in range(WARM):
            rig.ours.generate(request)
        took = []
        for _ in range(5):
            synchronize(device)
            began = time.perf_counter()
            rig.ours.generate(request)
            took.append(1000 * (time.perf_counter() - began))
        print(
            f"{options.model}, {options.steps} steps, {options.count} pictures: {min(took):.2f} ms"
        )
        _report(rig, request, device)
        return _check(rig, request)


def _check(rig: Rig, request: Any) -> int:
    """1 if any of eight prompts of one shape, in a graph from the third on, is another picture."""
    made = [request.model_copy(update={"prompt": f"{word} fox"}) for word in WORDS]
    plain = Pipeline(rig.ours.components, graph=False)
    with_graphs = [rig.ours.generate(one)[0].tobytes() for one in made]
    without = [plain.generate(one)[0].tobytes() for one in made]
    same = sum(a == b for a, b in zip(with_graphs, without, strict=True))
    print(f"{same} of {len(made)} pictures the same as without graphs, {len(set(without))} differ")
    return int(same < len(made) or len(set(without)) < len(made))


def _report(rig: Rig, request: Any, device: torch.device) -> None:
    made, whole = rig.ours, rig.ours.components
    stages = [
        (made, "_plan", "request"),
        (made, "_prepare", "memory plan"),
        (whole.text, "encode", "text"),
        (whole.text, "encode_negative", "negative text"),
        (denoising, "_moments", "times"),
        (denoising, "_embedded", "embed text"),
        (made._placing.texts, "present", "prepare (graph)"),
        (whole.dit, "prepare", "prepare"),
        (pipeline, "draw_noise", "noise"),
        (pipeline, "make_denoiser", "denoiser"),
        (made._placing, "graphs", "step"),
        (made._placing, "begin_decoding", "decode"),
        (pipeline, "from_levels", "to PIL"),
    ]
    names = [_named(*stage) for stage in stages]
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as found:
        with record_function("# all"):
            made.generate(request)
        synchronize(device)
    events = [
        event for event in found.events() if event.device_type == torch.autograd.DeviceType.CPU
    ]
    print(f"{'stage':20}{'times':>6}{'host ms':>9}{'launches':>9}{'waits':>6}")
    for name in ["all", *names]:
        spans = [event.time_range for event in events if event.name == f"# {name}"]
        inside = [
            event.name
            for event in events
            if any(s.start <= event.time_range.start <= s.end for s in spans)
        ]
        launches = sum(name.startswith(LAUNCHES) for name in inside)
        waits = sum("Synchronize" in name for name in inside)
        took = sum(span.end - span.start for span in spans) / 1000
        print(f"{name:20}{len(spans):6}{took:9.2f}{launches:9}{waits:6}")


def _named(owner: Any, attribute: str, name: str) -> str:
    """Have its calls in a range of that name from now on."""
    call: Callable[..., Any] = getattr(owner, attribute)

    class Ranged:
        """The callable with all that it has."""

        def __call__(self, *inputs: Any, **options: Any) -> Any:
            with record_function(f"# {name}"):
                return call(*inputs, **options)

        def __getattr__(self, other: str) -> Any:
            return getattr(call, other)

    setattr(owner, attribute, Ranged())
    return name


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small networks, for trying it out")
    parser.add_argument("--model", default="sana-sprint-1600m-1024", help="a preset")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--count", type=int, default=1, help="pictures")
    parser.add_argument("--try", dest="tried", default="", help="ways, with commas between")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
