"""The built wheel holds what it needs and its console command runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's own files."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(
        *pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT), cwd=folder
    )
    [wheel] = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel), cwd=folder)
    return folder / "site"


@pytest.mark.slow
def test_console_command_runs(installed: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    where = run(sys.executable, "-c", "import sana; print(sana.__file__)", cwd=tmp_path, env=env)
    assert where.startswith(str(installed))
    text = run(sys.executable, str(installed / "bin" / "sana"), "--help", cwd=tmp_path, env=env)
    assert "generate" in text and "info" in text


@pytest.mark.slow
def test_package_data_is_in_the_wheel(installed: Path) -> None:
    for file in (ROOT / "src" / "sana").rglob("*"):
        if file.is_file() and file.suffix != ".pyc":
            assert (installed / file.relative_to(ROOT / "src")).exists(), f"{file} is not shipped"
