"""The kept pictures of a pack: fewer portraits are a part of more, and nothing is drawn twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sana.data.stickers.sprites import _keep, _kept
from tests.numerics import assert_detects


def test_the_smallest_array_that_is_large_enough(tmp_path: Path) -> None:
    arrays = {count: np.full((count, 2, 2, 4), count, np.uint8) for count in (3, 5, 9)}
    for count, array in arrays.items():
        _keep(tmp_path, f"v-avatars-{count}.npy", array)

    def check(count: int) -> None:
        found = _kept(tmp_path, "v-avatars-*.npy", count)
        assert found is not None and len(found) == count and (found == 5).all()

    check(4)
    check(5)
    assert_detects(check, 3)
    assert _kept(tmp_path, "v-avatars-*.npy", 10) is None
    assert _kept(tmp_path, "w-avatars-*.npy", 1) is None
    assert _kept(None, "v-avatars-*.npy", 1) is None
    _keep(None, "v-avatars-1.npy", arrays[3])
    assert len(list(tmp_path.iterdir())) == 3
