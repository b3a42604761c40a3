"""Do full-size networks agree with diffusers'? Random weights, made on the device, bf16 and fp32.

    python benchmarks/parity.py                    # on a GPU: 1.6B, 4.8B, Sprint 1.6B, DC-AE
    python benchmarks/parity.py --tiny             # the same at small size, on any machine
    python benchmarks/parity.py --only dc-ae --write benchmarks/results

Both implementations hold the very same tensors, renamed by `sana.weights.keys`; the weights are
rounded to bf16 once, so the fp32 reference is diffusers' network with what a bf16 file would hold.
Passes if the two agree in fp32 and if ours in bf16 is no farther from fp32 than 1.5 times
diffusers' in bf16. Each network is run again with a planted fault that the first check must catch.
Any installed or importable diffusers serves; 1.6B to 4.8B need 30 GB of device memory.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana.config import DCAEConfig, DiTConfig, ModelConfig, with_reference
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.presets import preset
from sana.weights.configs import write_network
from sana.weights.keys import from_ours

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.commands import command  # noqa: E402

SUBJECTS = {
    "1.6B": "sana-1600m-1024",
    "4.8B": "sana1.5-4800m-1024",
    "sprint": "sana-sprint-1600m-1024",
    "dc-ae": "sana-1600m-1024",
}
FP32_BOUND = 1e-5
RATIO_BOUND = 1.5
TIMES = (0.999, 0.7, 0.4, 0.1)
Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One output to compare, from four networks that share their weights."""

    name: str
    parameters: int
    theirs: Run
    theirs_bf16: Run
    ours: Run
    ours_bf16: Run
    spoil: Callable[[], None]
    """Plants a fault in our fp32 network, for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a case measured; errors are relative RMS."""

    name: str
    parameters: int
    fp32: float
    ours_bf16: float
    theirs_bf16: float
    fault: float
    seconds: float

    @property
    def ratio(self) -> float:
        """Our bf16 error over diffusers'."""
        return self.ours_bf16 / self.theirs_bf16

    @property
    def passes(self) -> bool:
        """Both bounds are kept, and the fault is not mistaken for agreement."""
        is_close = self.fp32 <= FP32_BOUND and self.ratio <= RATIO_BOUND
        return is_close and self.fault > FP32_BOUND


def main() -> int:
    """Run the chosen subjects and print the table; 1 if any row fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SUBJECTS, action="append", help="one subject; repeatable")
    parser.add_argument("--tiny", action="store_true", help="small networks, for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="folder for a dated report")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    results: list[Result] = []
    for subject in options.only or SUBJECTS:
        for case in cases(subject, device, is_tiny=options.tiny):
            results.append(measure(case))
            print(row(results[-1]), file=sys.stderr)
    report = "\n".join(page(results, device))
    print(report)
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        kind = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
        name = f"{datetime.date.today()}-parity-{kind.replace(' ', '-').lower()}.md"
        (options.write / name).write_text(report + "\n", encoding="utf-8")
    return 0 if all(result.passes for result in results) else 1


def cases(subject: str, device: torch.device, *, is_tiny: bool) -> Iterator[Case]:
    """The outputs to compare of one subject, at 1024 px; it is freed when the next one is asked."""
    config = with_reference(preset(SUBJECTS[subject]).config, "diffusers")
    config = shrunk(config) if is_tiny else config
    side = 8 if is_tiny else config.pixels // config.autoencoder.factor
    if subject == "dc-ae":
        yield from _autoencoder_cases(config.autoencoder, side, device)
    else:
        yield _transformer_case(subject, config.dit, side, device)


def measure(case: Case) -> Result:
    """Run the case's networks, then once more with its fault."""
    start = time.perf_counter()
    with torch.inference_mode():
        reference = case.theirs()
        errors = [rel_rms(reference, run()) for run in (case.ours, case.ours_bf16)]
        theirs = rel_rms(reference, case.theirs_bf16())
        case.spoil()
        fault = rel_rms(reference, case.ours())
    return Result(
        name=case.name,
        parameters=case.parameters,
        fp32=errors[0],
        ours_bf16=errors[1],
        theirs_bf16=theirs,
        fault=fault,
        seconds=time.perf_counter() - start,
    )


def page(results: list[Result], device: torch.device) -> Iterator[str]:
    """The Markdown report, line by line."""
    import diffusers

    kind = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    yield f"Command: `{command()}`"
    yield f"Device: {kind}; torch {torch.__version__}, diffusers {diffusers.__version__}."
    yield f"Bounds: fp32 {FP32_BOUND:.0e}, ratio {RATIO_BOUND}. Errors are relative RMS."
    if device.type == "cuda":
        yield f"Peak memory: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB."
    yield ""
    yield (
        "| network | parameters | fp32: ours to diffusers | bf16: ours to fp32 "
        "| bf16: diffusers to fp32 | ratio | planted fault, fp32 | seconds | |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---|"
    yield from (row(result) for result in results)


def row(result: Result) -> str:
    """One line of the table."""
    return (
        f"| {result.name} | {result.parameters:,} | {result.fp32:.1e} | {result.ours_bf16:.2e} "
        f"| {result.theirs_bf16:.2e} | {result.ratio:.3f} | {result.fault:.1e} "
        f"| {result.seconds:.1f} | {'agrees' if result.passes else 'FAILS'} |"
    )


def _transformer_case(name: str, config: DiTConfig, side: int, device: torch.device) -> Case:
    networks = Networks(config, device)
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    count = len(TIMES)
    latent = draw(count, config.latent_channels, side, side)
    text = draw(count, 300, config.text_dim)
    mask = torch.arange(300, device=device) < torch.tensor([300, 60, 20, 2], device=device)[:, None]
    time = torch.tensor(TIMES, device=device)
    scale = torch.full((count,), 4.5, device=device) if config.guidance_embedding else None

    def ours(network: Any) -> Tensor:
        velocity: Tensor = network(latent, time, text, mask, guidance=scale)
        return velocity

    def theirs(network: Any) -> Tensor:
        dtype = network.dtype
        options = {} if scale is None else {"guidance": scale * 0.1}
        velocity: Tensor = network(
            latent.to(dtype),
            encoder_hidden_states=text.to(dtype),
            timestep=time if scale is not None else (time * 1000).round(),
            encoder_attention_mask=mask.long(),
            return_dict=False,
            **options,
        )[0]
        return velocity

    return networks.case(name, ours, theirs, f"blocks.{config.depth // 2}.attention.output.weight")


def _autoencoder_cases(config: DCAEConfig, side: int, device: torch.device) -> Iterator[Case]:
    networks = Networks(config, device)
    generator = torch.Generator(device).manual_seed(1)
    pixels = side * config.factor
    images = torch.rand((1, 3, pixels, pixels), generator=generator, device=device) * 2 - 1
    shape = (1, config.latent_channels, side, side)
    latent = torch.randn(shape, generator=generator, device=device)
    last = len(config.decoder) - 1
    yield networks.case(
        "dc-ae encoder",
        lambda network: network.encode(images),
        lambda network: network.encode(images.to(network.dtype)).latent,
        f"encoder.stages.{last}.0.attention.output.weight",
    )
    yield networks.case(
        "dc-ae decoder",
        lambda network: network.decode(latent),
        lambda network: network.decode(latent.to(network.dtype)).sample,
        f"decoder.stages.{last}.0.attention.output.weight",
    )


class Networks:
    """Ours and diffusers' in fp32 and bf16; each pair shares its tensors.

    Without `has_peer`, `theirs` is empty, and diffusers need not be there.
    """

    def __init__(
        self, config: DiTConfig | DCAEConfig, device: torch.device, *, has_peer: bool = True
    ) -> None:
        with torch.device("meta"):
            plain = LinearDiT(config) if isinstance(config, DiTConfig) else DCAE(config)
        generator = torch.Generator(device).manual_seed(0)
        tensors = {
            name: random_like(name, tensor, generator)
            for name, tensor in plain.state_dict().items()
        }
        self.parameters = sum(parameter.numel() for parameter in plain.parameters())
        self.ours: dict[torch.dtype, Any] = {}
        self.theirs: dict[torch.dtype, Any] = {}
        for dtype in (torch.float32, torch.bfloat16):
            cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            with torch.device("meta"):
                ours = LinearDiT(config) if isinstance(config, DiTConfig) else DCAE(config)
            self.ours[dtype] = filled(ours, cast)
            if has_peer:
                theirs = filled(_peer(config), from_ours(cast, "diffusers", config))
                self.theirs[dtype] = theirs

    def case(
        self,
        name: str,
        ours: Callable[[Any], Tensor],
        theirs: Callable[[Any], Tensor],
        spoilt: str,
    ) -> Case:
        """The four ways to one output; the fault doubles one row of the weight `spoilt`."""
        wide, narrow = torch.float32, torch.bfloat16

        def spoil() -> None:
            weight = self.ours[wide].get_parameter(spoilt)
            weight.data = weight.data.clone()  # diffusers' network holds the same memory
            weight.data[0] *= 2

        return Case(
            name=name,
            parameters=self.parameters,
            theirs=lambda: theirs(self.theirs[wide]),
            theirs_bf16=lambda: theirs(self.theirs[narrow]),
            ours=lambda: ours(self.ours[wide]),
            ours_bf16=lambda: ours(self.ours[narrow]),
            spoil=spoil,
        )


def _peer(config: DiTConfig | DCAEConfig) -> Any:
    """diffusers' network, without memory."""
    import diffusers

    data = write_network(config)
    with torch.device("meta"):
        return getattr(diffusers, data["_class_name"]).from_config(data)


def random_like(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Weights that keep activations of order one, rounded to bf16, in fp32."""
    noise = torch.randn(tensor.shape, generator=generator, device=generator.device)
    if tensor.ndim > 1:
        noise = noise / tensor[0].numel() ** 0.5
    elif name.endswith("weight"):
        noise = 1 + 0.2 * noise
    else:
        noise = 0.1 * noise
    return noise.bfloat16().float()


def filled(network: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The network, built without memory, around `tensors`."""
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same kinds of layers at small size."""
    dit = replace(config.dit, width=64, depth=2, cross_heads=2)

    def thin(stages: Any) -> Any:
        return tuple(replace(stage, width=stage.width // 16, depth=1) for stage in stages)

    old = config.autoencoder
    autoencoder = replace(
        old,
        encoder=thin(old.encoder),
        decoder=thin(old.decoder),
        head_dim=8,
    )
    return replace(config, dit=dit, autoencoder=autoencoder)


def rel_rms(reference: Tensor, got: Tensor) -> float:
    """RMS of the difference over RMS of the reference."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    wide = reference.double()
    return ((got.double() - wide).square().mean().sqrt() / wide.square().mean().sqrt()).item()


if __name__ == "__main__":
    sys.exit(main())
