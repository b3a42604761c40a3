"""How fast is a training step of the official 0.6B transformer? Ours, plain PyTorch, compiled.

    python benchmarks/flow_step.py --seconds 50      # on a GPU, random weights and latents
    python benchmarks/flow_step.py --try glu_gradient # with what no card has proven
    python benchmarks/flow_step.py --tiny            # the same at small size, on any machine

Flow loss, backward and AdamW (fused on a GPU) under bf16 autocast with fp32 weights, at 512 and
1024 px. Ours has the linear attention's kernels in both directions; `plain` is the definition in
`kernels.reference`, and `compiled` that by torch.compile, block by block. Says pictures a second
and how far the gradients of plain and ours lie apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.commands import named_ways  # noqa: E402
from sana.kernels import ops  # noqa: E402
from sana.models.dit import LinearDiT  # noqa: E402
from sana.pipelines.timing import synchronize  # noqa: E402
from sana.presets import preset  # noqa: E402

WAYS: tuple[tuple[str, Any], ...] = (
    ("plain", "reference"),
    ("ours", "auto"),
    ("compiled", "reference"),
    ("ours, compiled around", "auto"),
)


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
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=is_gpu)
        shape = (batch, config.latent_channels, side, side)
        self.latent, self.noise = (torch.randn(shape, device=device) for _ in range(2))
        self.text = torch.randn(batch, 64, config.text_dim, device=device)
        self.mask = torch.ones(batch, 64, dtype=torch.bool, device=device)
        self.time = torch.rand(batch, device=device)
        self.device = device

    def gradients(self) -> None:
        """Of the flow loss, into the parameters."""
        self.optimizer.zero_grad()
        t = self.time[:, None, None, None]
        with torch.enable_grad(), torch.autocast(self.device.type, torch.bfloat16):
            velocity = self.network(
                (1 - t) * self.latent + t * self.noise, self.time, self.text, self.mask
            )
            loss = (velocity.float() - (self.noise - self.latent)).square().mean()
        loss.backward()

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()


def main() -> int:
    """Time each way at each size; a way that fails is named and the others go on."""
    options = _options()
    began = time.perf_counter()
    tried = named_ways(options.tried)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines: list[str] = []
    sizes = ((2, 2),) if options.tiny else ((16, 32), (32, 8))
    for side, batch in sizes:
        expected: Tensor | None = None
        for name, backend in WAYS:
            if time.perf_counter() - began > options.seconds:
                lines.append(f"{side * 32} px, {name}: no time left")
                continue
            try:
                with ops.trying(*tried):
                    line, got = _measure(device, side, batch, name, backend, is_tiny=options.tiny)
            except Exception as error:
                lines.append(f"{side * 32} px, {name}: {type(error).__name__}: {error}"[:200])
                continue
            expected = got if expected is None else expected
            error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            lines.append(f"{line}; gradient {float(error):.1e} from plain")
            print(lines[-1], flush=True)
            if options.write:
                options.write.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def _measure(
    device: torch.device, side: int, batch: int, name: str, backend: Any, *, is_tiny: bool
) -> tuple[str, Tensor]:
    training = Training(device, side, batch, is_tiny=is_tiny)
    first = time.perf_counter()
    if "compiled" in name:
        for block in training.network.blocks:
            block.compile(dynamic=False)
    with ops.force(backend):
        training.gradients()
        synchronize(device)
        first = time.perf_counter() - first
        grad = training.network.blocks[0].attention.qkv.weight.grad
        assert isinstance(grad, Tensor)
        got = grad.float().clone()
        with torch.inference_mode(False):
            took = _timed(training, device)
    rate = batch / took
    line = f"{side * 32} px, batch {batch}, {name}: {1000 * took:.1f} ms a step, {rate:.1f}/s"
    return f"{line} (first {first:.1f} s)", got


def _timed(training: Training, device: torch.device) -> float:
    """Median seconds of a step."""
    times = []
    for _ in range(2 if device.type == "cpu" else 9):
        began = time.perf_counter()
        training.step()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _options() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small networks, for trying it out")
    parser.add_argument("--seconds", type=float, default=60.0, help="no way begins after these")
    parser.add_argument("--try", dest="tried", default="", help="ways, with commas between")
    parser.add_argument("--write", type=Path, help="file for what was measured so far")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
