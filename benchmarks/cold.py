"""Where the seconds of a first picture go: first calls one by one, then `sana generate` profiled.

    python benchmarks/cold.py              # on a GPU; writes a 1.6B model with random weights
    python benchmarks/cold.py --tiny       # the same at small size, on any machine
    python benchmarks/cold.py --only probe

`probe` does in a new process, in this order, what a first picture meets for the first time, each
twice: what is left after subtracting the second is paid once a process. `generate` runs the whole
command three times in new processes (the first one also fills Triton's cache on the disk), with
the marks of `memory.py`; `profile` once more under cProfile, which slows what runs in Python, and
says whether torch's compiler was imported. Seconds by the clock, the GPU waited for.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src"), str(ROOT / "tests")]

PARTS = ("probe", "generate", "profile")
TOP = 45
PROBE = """
import sys, time
BEGAN = time.perf_counter()
def report(what, call, again=True):
    times = []
    for _ in range(2 if again else 1):
        began = time.perf_counter()
        try:
            call()
            if "torch" in sys.modules and torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except Exception as error:
            print(f"{what:58} failed: {type(error).__name__}: {str(error)[:60]}", flush=True)
            return
        times.append(time.perf_counter() - began)
    print(f"{what:58}" + "".join(f" {took:9.4f}" for took in times), flush=True)
def load_torch():
    global torch, F
    import torch
    import torch.nn.functional as F
def load_pipeline():
    global ops
    import sana.cli.generate
    import sana.pipelines.pipeline
    import sana.weights.load
    from sana.kernels import ops
print(f"{'first calls, seconds':58} {'first':>9} {'second':>9}")
report("import torch", load_torch, again=False)
report("import sana's pipeline and loader", load_pipeline, again=False)
HAS_GPU = torch.cuda.is_available()
place = {"device": "cuda" if HAS_GPU else "cpu", "dtype": torch.bfloat16}
size = 2048 if HAS_GPU else 64
torch.set_grad_enabled(False)
report("a tensor on the device", lambda: torch.ones(1, **place))
made = {}
def make():
    made["x"] = torch.randn(2, size, size, **place)
report("normal numbers", make)
x = made["x"]
weight, bias = x[0].contiguous(), x[0, 0].contiguous()
report("a matrix product with a bias", lambda: F.linear(x, weight, bias))
report("a batched product in fp32", lambda: x.float() @ x.float())
maps = x[:, :64, None].expand(-1, -1, 64, -1).contiguous(memory_format=torch.channels_last)
taps = x[0, :64, :64, None, None].expand(-1, -1, 3, 3).contiguous()
report("a 3x3 convolution, channels last", lambda: F.conv2d(maps, taps, padding=1))
own = x[0, :64, :9].reshape(64, 1, 3, 3).contiguous()
report("a depthwise convolution", lambda: F.conv2d(maps, own, padding=1, groups=64))
from torch.nn.attention import SDPBackend, sdpa_kernel
heads = x[:, :, :1792 if HAS_GPU else 64].unflatten(-1, (16, -1)).transpose(1, 2)
words, hidden = heads[:, :, :64], torch.zeros(2, 1, 1, 64, **place)
def attend(kind=None):
    if kind is None:
        return F.scaled_dot_product_attention(heads, words, words, attn_mask=hidden)
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(heads, words, words, attn_mask=hidden)
report("attention with a mask, as torch chooses", attend)
for kind in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
    report(f"attention with a mask, {kind.name}", lambda: attend(kind))
report("import triton", lambda: __import__("triton"))
def key():
    from triton.runtime.cache import triton_key
    triton_key()
report("triton's hash of itself", key)
if HAS_GPU:
    rows = x[:, :, :1024].contiguous()
    report("the first kernel of ours (rms_norm)", lambda: ops.rms_norm(rows, rows[0, 0], eps=1e-5))
    q = rows.unflatten(-1, (32, 32)).transpose(1, 2)
    report("linear attention", lambda: ops.linear_attention(q, q, q, eps=1e-15))
    wide = x[:, :1024, :1024].reshape(2, 32, 32, 1024).contiguous()
    nine = x[0, :1024, :9].reshape(1024, 1, 3, 3).contiguous()
    report("the middle of the mix-FFN",
           lambda: ops.glu_depthwise(wide, nine, wide[0, 0, 0].contiguous()))
    from sana.pipelines.moving import lock_pages
    gibibyte = []
    report("1 GiB of host memory", lambda: gibibyte.append(torch.zeros(2**30, dtype=torch.uint8)))
    report("copying 1 GiB to the device, pageable", lambda: gibibyte[0].cuda())
    report("page-locking 1 GiB", lambda: lock_pages(gibibyte.pop()))
print("imported:", [n for n in ("torch._dynamo", "torch._inductor", "sympy", "transformers")
                    if n in sys.modules])
report("import torch._dynamo (nothing of ours does)", lambda: __import__("torch._dynamo"))
print(f"in all {time.perf_counter() - BEGAN:.1f} s")
"""
PROFILE = """
import cProfile, pstats, sys
from sana.cli.main import main
profile = cProfile.Profile()
try:
    profile.runcall(main, sys.argv[2:])
except SystemExit as end:
    assert not end.code, end.code
shown = pstats.Stats(profile).strip_dirs()
shown.sort_stats("cumulative").print_stats(int(sys.argv[1]))
shown.sort_stats("tottime").print_stats(int(sys.argv[1]))
print("imported:", [n for n in ("torch._dynamo", "torch._inductor", "sympy", "transformers")
                    if n in sys.modules])
"""


def main() -> int:
    """Run the parts; a part that fails says so and the others go on."""
    options = _options()
    parts = options.only.split(",")
    failed = False
    if "probe" in parts:
        failed |= _run("probe", PROBE, [])
    with tempfile.TemporaryDirectory(prefix="sana-cold-") as name:
        folder = options.models or Path(name)
        if {"generate", "profile"} & {*parts}:
            from memory import ensure_models

            ensure_models(folder, is_tiny=options.tiny, names=("medium",))
        if "generate" in parts:
            failed |= _generate(folder, options.times)
        if "profile" in parts:
            line = ["generate", "a red fox", "--model", str(folder / "medium"), "--seed", "7"]
            line += ["--output", str(folder / "profiled.png")]
            failed |= _run("profile", PROFILE, [str(TOP), *line])
    return int(failed)


def _generate(folder: Path, times: int) -> bool:
    from memory import cold_start

    for number in range(times):
        try:
            marks = cold_start(folder, f"{number}.png")
        except SystemExit as error:
            print(f"generate: {error}", flush=True)
            return True
        shown = ", ".join(f"{what} {when:.1f}" for what, when in marks.items())
        print(f"process {number + 1}, seconds from its start: {shown}", flush=True)
    return False


def _run(what: str, program: str, line: list[str]) -> bool:
    """Whether the program failed, in a process of its own."""
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    print(f"## {what}", flush=True)
    command = [sys.executable, "-c", program, *line]
    return bool(subprocess.run(command, env=environment, check=False).returncode)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small networks, for trying it out")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--times", type=int, default=3, help="processes of `generate`")
    parser.add_argument(
        "--models", type=Path, help="where memory.py has left, or will find, models"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
