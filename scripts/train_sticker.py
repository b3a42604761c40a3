"""Train `sticker-512` from nothing: each recipe in turn for a given time, on a machine's GPUs.

    python scripts/train_sticker.py runs --seconds autoencoder=900 grounding=30 256=300 512=1500

Stages that are not named are skipped; a stage whose folder holds a checkpoint goes on from it.
With `--collect FOLDER` each finished stage's weights are copied there in parts of at most `--part`
MB, as soon as they exist: a machine that is taken away has then given what it finished. `--model
FOLDER` puts the parts of a whole model together.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

STAGES = ("autoencoder", "grounding", "detector", "256", "512")
TEXT = Path(__file__).parent.parent / "src" / "sana" / "assets" / "sticker-512"


def main() -> None:
    options = parse()
    folder = Path(options.folder)
    for stage in STAGES:
        if stage in options.seconds:
            train(stage, folder, options)
            if options.collect:
                collect(folder / stage / "model", stage, Path(options.collect), options.part)
    if options.model:
        assemble(folder, Path(options.model))


def train(stage: str, folder: Path, options: argparse.Namespace) -> None:
    """Run one recipe under torchrun; ends this program if it fails."""
    changes = [
        f"folder={folder / stage}",
        "steps=1000000",
        "save_every=2000",
        f"time_limit={options.seconds[stage]}",
        *options.set,
    ]
    if stage in ("grounding", "256", "512"):
        changes.append(f"flow.autoencoder={folder / 'autoencoder' / 'model'}")
    if stage in ("256", "512"):
        changes.append(f"init={start_of(stage, folder)}")
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node", str(options.gpus), "-m", "sana.training.run"]
    started = time.monotonic()
    done = subprocess.run([*program, f"sticker-{stage}", *changes], check=False)
    print(f"{stage}: {time.monotonic() - started:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"sticker-{stage} ended with code {done.returncode}; its log is above")


def start_of(stage: str, folder: Path) -> str:
    """Weights that a flow stage starts from: the one before it, else the grounded refiner."""
    earlier = ("256", "grounding") if stage == "512" else ("grounding",)
    for name in earlier:
        if (folder / name / "model").is_dir():
            return str(folder / name / "model")
    return ""


def collect(model: Path, stage: str, target: Path, part: int) -> None:
    """Copy a stage's files in parts of `part` MB, named so that `cat` puts them together."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(model.iterdir()):
        content = path.read_bytes()
        size = part * 1_000_000
        for number, start in enumerate(range(0, len(content), size)):
            name = f"{stage}-{path.name}.{number:02d}"
            (target / name).write_bytes(content[start : start + size])


def assemble(folder: Path, model: Path) -> None:
    """One model folder of the autoencoder, the transformer and the text encoder."""
    model.mkdir(parents=True, exist_ok=True)
    for source in (folder / "autoencoder" / "model", folder / "512" / "model", TEXT):
        for path in source.glob("text.*" if source == TEXT else "*.safetensors"):
            shutil.copy(path, model / path.name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", help="where the runs are kept")
    parser.add_argument("--seconds", nargs="+", required=True, metavar="STAGE=SECONDS")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="key=value for every recipe")
    parser.add_argument("--collect", help="folder for finished weights, in parts")
    parser.add_argument("--part", type=int, default=15, help="MB of a part")
    parser.add_argument("--model", help="folder to put the whole model together in")
    options = parser.parse_args()
    options.seconds = dict(pair.split("=", 1) for pair in options.seconds)
    unknown = [name for name in options.seconds if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    return options


if __name__ == "__main__":
    main()
