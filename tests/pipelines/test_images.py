"""Picture files: levels, metadata there and back, and never a half-written or replaced file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.errors import RequestError
from sana.pipelines.images import read_metadata, save_png, to_pil

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
METADATA = {"request": {"prompt": "ein Bär 🐻\n\"'"}, "sana": "0.1.0"}


def test_levels_are_rounded_and_clamped() -> None:
    pixels = torch.tensor([-3.0, -1.0, 0.0, 1 / 255, 0.5, 1.0, 2.0]).expand(3, 1, 7)
    levels = np.asarray(to_pil(pixels))
    assert levels.shape == (1, 7, 3)
    assert levels[0, :, 0].tolist() == [0, 0, 128, 128, 191, 255, 255]


def test_every_level_survives() -> None:
    levels = torch.arange(256).expand(3, 1, 256)
    assert np.array_equal(np.asarray(to_pil(levels / 127.5 - 1))[..., 1], levels[0].numpy())


def test_metadata_there_and_back(tmp_path: Path) -> None:
    path = save_png(PICTURE, tmp_path / "new" / "a.png", METADATA)
    assert read_metadata(path) == METADATA
    with Image.open(path) as again:
        assert np.array_equal(np.asarray(again), np.asarray(PICTURE))
    assert os.listdir(path.parent) == ["a.png"]
    assert path.stat().st_mode & 0o400


def test_no_file_is_replaced(tmp_path: Path) -> None:
    written = [save_png(PICTURE, tmp_path / "a.png", METADATA).name for _ in range(3)]
    assert written == ["a.png", "a-2.png", "a-3.png"]
    assert sorted(os.listdir(tmp_path)) == ["a-2.png", "a-3.png", "a.png"]


def test_no_file_is_replaced_where_links_are_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    written = [save_png(PICTURE, tmp_path / "a.png", METADATA).name for _ in range(2)]
    assert written == ["a.png", "a-2.png"]
    assert sorted(os.listdir(tmp_path)) == ["a-2.png", "a.png"]


@pytest.mark.parametrize(
    "code, message",
    [(errno.ENOSPC, "no space left to write .*a.png; free some"), (errno.EIO, "cannot write")],
)
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=message) as caught:
        save_png(PICTURE, tmp_path / "a.png", METADATA)
    assert caught.value.errno == code
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda self, mode: open("/dev/full", mode))
    with pytest.raises(OSError, match="no space left"):
        save_png(PICTURE, tmp_path / "a.png", METADATA)


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*choose another place"):
        save_png(PICTURE, tmp_path / "file" / "a.png", METADATA)


def test_foreign_pictures_are_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    PICTURE.save(plain)
    jpeg = tmp_path / "a.jpg"
    PICTURE.save(jpeg)
    cut = tmp_path / "cut.png"
    cut.write_bytes(plain.read_bytes()[:20])
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    odd = save_png(PICTURE, tmp_path / "odd.png", {"request": "none"})
    for path, message in [
        (plain, "does not say how it was made"),
        (jpeg, "does not say how it was made"),
        (odd, "does not say how it was made"),
        (cut, "cannot be read as a picture"),
        (text, "cannot be read as a picture"),
        (tmp_path, "cannot be read as a picture"),
        (tmp_path / "missing.png", "there is no file"),
    ]:
        with pytest.raises(RequestError, match=message):
            read_metadata(path)
