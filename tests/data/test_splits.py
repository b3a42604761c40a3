"""The held-out split: about one in ten, the same in every process, blind to the order of a pair."""

import itertools
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from sana.data.stickers.splits import is_held_out_color, is_held_out_pair, is_held_out_style

KEYS = [f"concept-{index}" for index in range(600)]
STYLES = ["flat", "glossy", "retro", "simple", "cartoon", "outlined", "silhouette"]
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


def test_one_style_pair_in_ten_is_held_out():
    assert 0.08 < share(is_held_out_style(k, s) for k in KEYS for s in STYLES) < 0.12


def test_one_color_pair_in_ten_is_held_out():
    assert 0.08 < share(is_held_out_color(c, k) for k in KEYS for c in COLORS) < 0.12


def test_one_object_pair_in_ten_is_held_out():
    pairs = itertools.combinations(KEYS[:150], 2)
    assert 0.09 < share(is_held_out_pair(a, b) for a, b in pairs) < 0.11


def test_the_main_style_is_never_held_out():
    assert not any(is_held_out_style(key, "3D") for key in KEYS)


@given(st.text(max_size=12), st.text(max_size=12))
def test_pairs_are_unordered_and_never_reflexive(first, second):
    assert is_held_out_pair(first, second) == is_held_out_pair(second, first)
    assert not is_held_out_pair(first, first)


def test_another_process_with_another_hash_seed_agrees():
    code = (
        "from sana.data.stickers.splits import *\n"
        "print(''.join(str(int(f)) for k in range(40) for f in ("
        "is_held_out_style(f'concept-{k}', 'flat'), is_held_out_color('red', f'concept-{k}'),"
        "is_held_out_pair(f'concept-{k}', 'fox'))))"
    )
    here = "".join(
        str(int(flag))
        for k in range(40)
        for flag in (
            is_held_out_style(f"concept-{k}", "flat"),
            is_held_out_color("red", f"concept-{k}"),
            is_held_out_pair(f"concept-{k}", "fox"),
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == here
    assert "1" in here


def test_the_split_has_not_moved():
    keys = ("fox", "cat", "dog", "red-apple", "automobile", "robot", "crown")
    held = {(key, color) for key in keys for color in COLORS if is_held_out_color(color, key)}
    assert held == {
        ("fox", "pink"),
        ("fox", "black"),
        ("cat", "red"),
        ("cat", "green"),
        ("cat", "brown"),
        ("cat", "black"),
        ("cat", "white"),
        ("dog", "red"),
        ("robot", "purple"),
    }
