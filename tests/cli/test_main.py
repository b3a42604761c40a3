"""Exit codes and messages of the whole command, and what starting it costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from numerics import assert_detects
from sana import __version__
from sana.cli import main as cli
from sana.cli.main import VERBS, main
from sana.errors import CheckpointError, MissingExtra, NumericsError, RequestError, TrainingError

SOURCE = str(Path(__file__).parents[2] / "src")
ENVIRONMENT = {**os.environ, "PYTHONPATH": SOURCE, "PYTHONUNBUFFERED": "1"}


def in_clean_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        check=True,
    )
    return done.stdout


WITHOUT_TORCH = {
    "": 0,
    "--help": 0,
    "--version": 0,
    "generate --help": 0,
    "generate fox --steps 0": 2,
    "generate fox --stpes 3": 2,
    "generate fox --width 50": 2,
    "generate fox --output x.jpg": 2,
    "info": 0,
    "info tiny": 0,
    "info missing.png": 2,
    "info --help": 0,
    "train --help": 0,
    "data stickers --help": 0,
    "evaluate --help": 0,
    "evaluate draw --help": 0,
    "evaluate score --help": 0,
    "evaluate score folder --metrics fid": 2,
    "evaluate score folder --metrics fdi": 2,
    "nonsense": 2,
}


def test_no_torch_for_help_or_a_bad_request() -> None:
    out = in_clean_process(
        "import sys; from sana.cli.main import main\n"
        f"codes = [main(line.split()) for line in {list(WITHOUT_TORCH)!r}]\n"
        "print(); print(codes); print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert out.splitlines()[-2:] == [str(list(WITHOUT_TORCH.values())), "set()"]


def test_importing_sana_imports_next_to_nothing() -> None:
    out = in_clean_process(
        "import sys; import sana; print({'torch', 'pydantic', 'PIL', 'rich'} & set(sys.modules))"
    )
    assert out.strip() == "set()"


def test_a_process_of_its_own_seldom_looks_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds: list[int] = []
    at_end: list[Any] = []
    monkeypatch.setattr(cli.gc, "set_threshold", thresholds.append)
    monkeypatch.setattr(cli.atexit, "register", at_end.append)
    monkeypatch.setattr(sys, "argv", ["sana", "generate", "--steps", "none"])
    assert main(sys.argv[1:]) == 2
    # What is imported meanwhile may have something to do at the end as well.
    assert thresholds == [] and cli._end not in at_end
    assert main() == 2
    assert thresholds == [cli.SELDOM] and at_end.count(cli._end) == 1


def test_what_triton_prints_after_the_end_is_not_shown(tmp_path: Path) -> None:
    """Python's own words about an object that dies then stand for those of triton's bindings."""

    def ends_quietly(name: str) -> None:
        program = (
            "import sys, types\n"
            f"sys.modules[{name!r}] = types.ModuleType({name!r})\n"
            "from sana.cli.main import main\n"
            "class Loud:\n"
            "    def __del__(self, write=__import__('os').write):\n"
            "        write(2, b'leaked')\n"
            "sys.kept = Loud()\n"
            "print('before', file=sys.stderr)\n"
            "sys.argv = ['sana', '--version']\n"
            "raise SystemExit(main() + 3)\n"
        )
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert ended.returncode == 3 and ended.stderr == "before\n"

    ends_quietly("triton")
    assert_detects(ends_quietly, "another")


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gnerate"], 'Unknown command "gnerate". Did you mean "generate"?'),
        (["generate", "x", "--stpes", "3"], "Unknown option: --stpes. Did you mean --steps?"),
        (["generate", "a", "red", "fox"], "'red fox' is left over; put a sentence"),
        (["generate", "x", "--steps", "many"], 'unable to convert "many" into int'),
        (["generate", "x", "--sampler", "ddim"], 'Choose from: "dpm", "euler"'),
        (["generate"], "there is no prompt"),
        (["generate", ""], "prompt is empty"),
        (["generate", "x" * 10_000], "prompt is 10000 characters long"),
        (["generate", "x", "--steps", "0"], "steps is 0; it must be"),
        (["generate", "x", "--width", "50"], "width is 50; it must be a whole number from 64"),
        (["data", "stickers"], "--output requires an argument"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line_on_stderr(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("sana: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error, code, message",
    [
        (RequestError("steps is 0"), 2, "steps is 0"),
        (CheckpointError("bad file"), 1, "bad file"),
        (NumericsError("NaN"), 1, "NaN"),
        (TrainingError("bad plan"), 1, "bad plan"),
        (MissingExtra("install it"), 1, "install it"),
        (PermissionError(13, "Permission denied", "/root/x"), 1, "/root/x: Permission denied"),
        (OSError(28, "no space left to write x"), 1, "no space left to write x"),
        (OSError("odd"), 1, "odd"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory; ask"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_failures_have_a_code_and_no_traceback(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.delenv("SANA_DEBUG", raising=False)
    assert main(["info"]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"sana: {message}")
    assert "Traceback" not in err
    monkeypatch.setenv("SANA_DEBUG", "1")
    assert main(["info"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m sana.cli.main info | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
