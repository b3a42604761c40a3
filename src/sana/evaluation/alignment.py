"""The sticker alignment as a judge: how well a caption of the sticker world fits a picture.

`load` reads the file that `AlignmentTask` exports, together with the text encoder that it was
trained on; the network is `sana.models.alignment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sana.config import AlignmentConfig
from sana.errors import CheckpointError
from sana.models.alignment import Alignment, score
from sana.models.detector import fit
from sana.models.text import MiniLM
from sana.pipelines.images import to_tensor
from sana.weights.files import read_config, read_file
from sana.weights.load import TEXT_FILE, assign, find_folder, load, load_text

BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Aligner:
    """The network with its text encoder; captions are cut after `tokens` tokens."""

    network: Alignment
    text: MiniLM
    tokens: int

    @torch.inference_mode()
    def score(self, prompt: str, pictures: Tensor) -> list[float]:
        """Log-odds that the prompt holds of each picture (B, 3, H, W) in -1..1, on the CPU."""
        device = next(self.network.parameters()).device
        ids, mask = self.text.tokenize([prompt], self.tokens)
        states = self.text.states(ids.to(device), mask.to(device))
        words = self.network.read(states, mask.to(device))
        found: list[float] = []
        for part in pictures.split(BATCH):
            seen = self.network.look(fit(part.to(device, torch.float32)))
            rows = torch.arange(len(part), device=device)
            pairs = torch.stack([rows, torch.zeros_like(rows)])
            found += score(self.network.claims(seen, words, pairs)).tolist()
        return found


class AlignmentJudge:
    """The log-odds that the prompt holds of the picture; reads prompts of any kind of sticker."""

    name = "alignment"

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner

    @staticmethod
    def load(path: Path, device: str = "cpu") -> AlignmentJudge:
        return AlignmentJudge(read(path, device)[0])

    def __call__(self, prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        return [
            self.aligner.score(prompt, to_tensor(picture.convert("RGB")))[0] for picture in pictures
        ]


def read(path: str | Path, device: torch.device | str = "cpu") -> tuple[Aligner, dict[str, Any]]:
    """The model in `path` with its text encoder, and the header; raises CheckpointError."""
    header, tensors, _ = read_file(Path(path))
    if header.get("kind") != "alignment":
        raise CheckpointError(
            f"{path} holds {header.get('kind', 'a model')!r}, not an alignment model; give the "
            "alignment.safetensors that `sana train sticker-alignment` wrote"
        )
    network = Alignment(read_config(AlignmentConfig, header.get("config"), Path(path)))
    wide = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    assign(network, wide, str(path))
    text = _text(str(header["text"]))
    if text.width != network.config.text_width:
        raise CheckpointError(
            f"{path} reads text states of width {network.config.text_width}, and those of "
            f"{header['text']} have {text.width}; train it again: `sana train sticker-alignment`"
        )
    network.to(device).eval()
    return Aligner(network=network, text=text.to(device), tokens=int(header["tokens"])), header


def _text(source: str) -> MiniLM:
    """The text encoder of a model; the package's own where the folder has none or is gone."""
    if source == "tiny":
        tiny = load("tiny").text
        assert isinstance(tiny, MiniLM)
        return tiny
    if not (Path(source) / TEXT_FILE).exists():
        source = "sticker-512"
    return load_text(find_folder(source))
