"""What the README shows runs: every fenced `sana` command, the Python block, the example program.

Commands run in one process on `tiny`, in a temporary folder and in the README's order, since a
later one may use an earlier one's file.
"""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def sana_commands() -> list[list[str]]:
    lines = [line for block in fenced("") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if re.match(r"\S*\bsana ", line)]


def run_command(arguments: list[str]) -> int:
    """Run `sana` in this process; its exit code."""
    from sana.cli.main import main

    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    return int(code or 0)


def made_tiny(arguments: list[str]) -> list[str]:
    """The same command on the `tiny` model with two steps."""
    if arguments[0] != "generate" or "--again" in arguments:
        return arguments
    if "--steps" in arguments:
        place = arguments.index("--steps") + 1
        arguments = [*arguments[:place], "2", *arguments[place + 1 :]]
    else:
        arguments = [*arguments, "--steps", "2"]
    model = "tiny"
    if "--model" in arguments:
        place = arguments.index("--model")
        kinds = [kind for kind in ("controlnet", "sprint") if kind in arguments[place + 1]]
        model = f"tiny-{kinds[0]}"
        arguments = arguments[:place] + arguments[place + 2 :]
    return [*arguments, "--model", model]


def write_inputs(folder: Path) -> None:
    """The files that the README's reader is taken to have: a mask and a LoRA."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(folder / "mask.png")
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    weights = {"lora_A": torch.ones(2, 64), "lora_B": torch.ones(64, 2)}
    named = {f"{layer}.{name}.weight": tensor for name, tensor in weights.items()}
    save_file(named, folder / "style.safetensors")


def test_the_readme_shows_commands() -> None:
    verbs = {arguments[0] for arguments in sana_commands()}
    assert {"generate", "info"} <= verbs
    assert sum(arguments[0] == "generate" for arguments in sana_commands()) >= 5


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    for arguments in sana_commands():
        assert run_command(made_tiny(arguments)) == 0, f"sana {shlex.join(arguments)} failed"
    assert (tmp_path / "apples.png").exists()


@pytest.mark.slow
def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(image))
    [code] = fenced("python")
    code = code.replace('sana.load("sticker-512")', 'sana.load("tiny")')
    code = code.replace("sana.Request(", 'sana.Request(model="tiny", steps=2, ')
    exec(compile(code, "README.md", "exec"), {})
    assert len(shown) == 3


def test_the_example_draws_the_readmes_prompts(tmp_path: Path) -> None:
    program = runpy.run_path(str(ROOT / "examples" / "first_pictures.py"))
    for prompt in program["PROMPTS"]:
        assert f'"{prompt}"' in README
    program["main"](tmp_path / "demo", model="tiny", steps=2)
    assert len(list((tmp_path / "demo").glob("*.png"))) == len(program["PROMPTS"])


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(((?!http)[^)#]+)", README)
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
