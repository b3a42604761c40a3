"""Rules of the house that no linter knows: no effect on import, one weight loader, one version."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sana

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "sana"

# Runs in a clean process in an empty folder; first imports what must not cost torch.
IMPORT_ALL = """
import importlib, os, pkgutil, sys

before = dict(os.environ)
import sana

for name in ("errors", "config", "presets", "request", "cli.main"):
    importlib.import_module(f"sana.{name}")
    assert "torch" not in sys.modules, f"importing sana.{name} imports torch"

missing = []
for module in pkgutil.walk_packages(sana.__path__, "sana."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        missing.append(f"{module.name}: {error}")
assert not missing, f"not importable: {missing}"
assert not os.listdir("."), f"importing sana wrote {os.listdir('.')}"

import torch

keys = before.keys() | os.environ.keys()
changed = {key for key in keys if before.get(key) != os.environ.get(key)}
# Written by third parties on import, none by this package.
changed = {key for key in changed if not key.startswith(("KMP_", "TORCHINDUCTOR_", "TRITON_"))}
assert not changed, f"importing sana changed the environment: {sorted(changed)}"
assert not torch.cuda.is_initialized(), "importing sana initialized a device"
assert torch.get_default_dtype() is torch.float32
"""


@pytest.mark.slow
def test_importing_has_no_effect(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(ROOT / "src"),
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path / "home"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "home").exists()


def test_version_is_the_changelogs() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == sana.__version__


def test_weights_enter_by_one_door() -> None:
    strays = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "weights"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if ".load_state_dict(" in line and "optimizer.load_state_dict(" not in line
    ]
    assert not strays, f"only sana.weights puts weights into a network; found {strays}"


def test_no_homeless_modules() -> None:
    homeless = {"utils", "common", "helpers", "misc"}
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in homeless]


def test_every_module_says_what_it_is() -> None:
    undocumented = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.read_text().strip() and not path.read_text().startswith(('"""', 'r"""'))
    ]
    assert not undocumented


def test_unknown_public_name_lists_the_known() -> None:
    with pytest.raises(AttributeError, match="Pipeline"):
        _ = sana.pipe  # type: ignore[attr-defined]
