"""Reading safetensors without trust: every lie of a header is one clear sentence, pickles too."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from numerics import assert_detects
from sana.errors import CheckpointError
from sana.weights import tensors

GOOD = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([True, False]),
    "c": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(7),
}


def content(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - start] if shape is None else shape,
        "data_offsets": [start, end],
    }


def test_values_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(safetensors.torch.save(GOOD, {"sana": "{}"}))
    stored, metadata = tensors.open_index(path)
    assert metadata == {"sana": "{}"} and stored.keys() == GOOD.keys()

    def check(wanted: dict[str, Tensor]) -> None:
        for name, tensor in wanted.items():
            got = tensors.read(stored[name])
            assert got.dtype == tensor.dtype and torch.equal(got, tensor), name

    check(GOOD)
    assert_detects(check, GOOD | {"a": GOOD["a"] * 1.01})
    assert tensors.blank(stored)["c"].shape == (3, 5)


def test_casts_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "PIECE", 8)
    path = tmp_path / "x"
    path.write_bytes(safetensors.torch.save(GOOD))
    stored = tensors.open_index(path)[0]["c"]
    target = torch.full((15,), torch.nan)
    tensors.read_into(stored, target)
    assert torch.equal(target, GOOD["c"].flatten().float())


BAD: dict[str, tuple[bytes, str]] = {
    "length": (struct.pack("<Q", 10**6) + b"{" + b" " * 50, "its header says 1,000,000 bytes"),
    "huge length": (struct.pack("<Q", 2**63) + b"{}", "its header says 9,223"),
    "no json": (content(b"{nonsense"), "not valid JSON"),
    "not utf-8": (content(b'{"\xff": 1}'), "not valid JSON"),
    "nested": (content(b'{"a":' * 50_000), "not valid JSON"),
    "twice": (content(b'{"a": {}, "a": {}}'), "a name stands twice"),
    "metadata": (content({"__metadata__": {"a": 1}}), "metadata are not strings"),
    "no entry": (content({"a": 5}), "a has dtype None"),
    "dtype": (content({"a": entry(0, 4, "C64", [1])}, b"1234"), "a has dtype 'C64', which is none"),
    "dtype list": (content({"a": {"dtype": []}}), "a has dtype \\[\\]"),
    "shape": (content({"a": entry(0, 4, "U8", [-4])}, b"1234"), "a has shape \\[-4\\]"),
    "shape kind": (content({"a": entry(0, 1, "U8", [True])}, b"1"), "a has shape \\[True\\]"),
    "backwards": (content({"a": entry(4, 0, "U8", [4])}, b"1234"), "offsets span -4"),
    "size": (content({"a": entry(0, 4, "F32", [2])}, b"1234"), "takes 8 bytes.* span 4"),
    "overlap": (
        content({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"),
        "b overlaps a",
    ),
    "gap": (content({"a": entry(0, 2), "b": entry(4, 6)}, b"123456"), "b leaves a gap after a"),
    "late": (content({"a": entry(1, 2)}, b"12"), "a leaves a gap after the header"),
    "truncated": (content({"a": entry(0, 9)}, b"12345"), "tensors end at byte"),
    "rest": (content({"a": entry(0, 2)}, b"12345"), "tensors end at byte"),
    "empty": (b"", "does not begin with a header"),
    "short": (b"abc", "does not begin with a header"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(BAD[name][0])
    with pytest.raises(CheckpointError, match=BAD[name][1]) as caught:
        tensors.open_index(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (open, (str(self.trace), "w"))


def pickles(trace: Path) -> dict[str, bytes]:
    zipped, old = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(1)}, "y": Bomb(trace)}, zipped)
    torch.save({"y": Bomb(trace)}, old, _use_new_zipfile_serialization=False)
    plain = {f"protocol {n}": pickle.dumps(Bomb(trace), protocol=n) for n in range(1, 6)}
    return {"zip": zipped.getvalue(), "legacy": old.getvalue(), **plain}


@pytest.mark.parametrize("kind", ["zip", "legacy", *(f"protocol {n}" for n in range(1, 6))])
@pytest.mark.parametrize("extension", ["safetensors", "pth", "bin", "png"])
def test_pickles_are_refused_under_any_name(kind: str, extension: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    data = pickles(trace)[kind]
    path = tmp_path / f"weights.{extension}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is a Python pickle.*sana convert"):
        tensors.open_index(path)
    assert not trace.exists()
    if kind == "protocol 4":
        pickle.loads(data).close()
        assert trace.exists(), "the bomb itself must work, or the test proves nothing"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF\x03\0\0\0", "is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
    ],
)
def test_other_files_are_named(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        tensors.open_index(path)
    with pytest.raises(CheckpointError, match="there is no weight file"):
        tensors.open_index(tmp_path / "nothing")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(safetensors.torch.save(GOOD))
    stored = tensors.open_index(path)[0]
    path.write_bytes(path.read_bytes()[:-40])
    last = max(stored.values(), key=lambda found: found.start)
    with pytest.raises(CheckpointError, match="ended .* bytes early"):
        tensors.read(last)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 60))
def test_damaged_bytes_never_crash(tmp_path: Path, place: int, value: int, cut: int) -> None:
    """A damaged file is refused in words, or all that it says is in it can be read."""
    data = bytearray(safetensors.torch.save(GOOD))
    data[place % len(data)] = value
    path = tmp_path / "x"
    path.write_bytes(bytes(data[: len(data) - cut]))
    try:
        stored, _ = tensors.open_index(path)
    except CheckpointError:
        return
    for found in stored.values():
        assert tensors.read(found).shape == found.shape
