"""Pictures that come in: every kind is converted or refused by name, whatever the file says."""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sana.errors import RequestError
from sana.pipelines.reading import converted, digests, named, read_picture, read_pictures
from sana.request import Request

RAMP = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3
RGB = Image.fromarray(RAMP)
GREY = RGB.convert("L")


def read(
    tmp_path: Path, image: Image.Image, name: str, role: str = "image", **how: object
) -> Image:
    path = tmp_path / name
    image.save(path, **how)
    return read_picture(path, role, name)


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.mode == second.mode and np.array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp"])
def test_lossless_files_come_back_exactly(tmp_path: Path, name: str) -> None:
    how = {"lossless": True} if name.endswith("webp") else {}
    assert same(read(tmp_path, RGB, name, **how), RGB)
    assert same(read_picture(io.BytesIO((tmp_path / name).read_bytes()), "image", name), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read(tmp_path, RGB, "a.png", exif=exif)
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }
    assert np.array_equal(np.asarray(got), turns[orientation](RAMP))
    assert same(got, converted(got, "image", "again"))


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    got = read(tmp_path, Image.fromarray(levels), "a.png")
    assert np.asarray(got)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert same(got, converted(Image.fromarray(levels), "image", "in memory"))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = read(tmp_path, Image.fromarray(levels), "b.png", exif=exif)
    assert np.array_equal(np.asarray(turned), np.asarray(got)[:, ::-1])


def test_alpha_goes_over_white_and_in_a_mask_over_black(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 255, 255, 255))
    clear.putpixel((1, 1), (0, 0, 0, 127))
    got = np.asarray(read(tmp_path, clear, "a.png"))
    assert got[..., 0].tolist() == [[255, 255], [255, 128]]
    mask = read(tmp_path, clear, "a.png", "mask")
    assert np.asarray(mask).tolist() == [[255, 0], [0, 0]]


def test_palettes_grey_and_black_and_white(tmp_path: Path) -> None:
    palette = RGB.convert("P", palette=Image.Palette.ADAPTIVE)
    assert same(read(tmp_path, palette, "a.png"), palette.convert("RGB"))
    assert same(read(tmp_path, palette, "a.gif"), palette.convert("RGB"))
    assert same(read(tmp_path, GREY, "a.png"), GREY.convert("RGB"))
    ink = GREY.point([0] * 60 + [255] * 196).convert("1")
    assert same(read(tmp_path, ink, "a.png"), ink.convert("RGB"))
    clear = Image.new("P", (2, 1), 0)
    clear.putpalette([10, 20, 30, 40, 50, 60])
    clear.putpixel((1, 0), 1)
    got = read(tmp_path, clear, "a.png", transparency=0)
    assert np.asarray(got)[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_cmyk_is_converted(tmp_path: Path) -> None:
    got = read(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg", quality=95)
    red = np.asarray(got).reshape(-1, 3).mean(0)
    assert red[0] > 240 and max(red[1:]) < 15


def test_a_mask_is_black_or_white(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert np.asarray(read(tmp_path, grey, "a.png", "mask")).tolist() == [[0, 0, 255, 255]]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def text_bomb() -> bytes:
    text = b"Comment\0\0" + zlib.compress(b"a" * 2**21)
    crc = struct.pack(">I", zlib.crc32(b"zTXt" + text))
    whole = bomb(1, 1)
    return whole[:33] + struct.pack(">I", len(text)) + b"zTXt" + text + crc + whole[33:]


def animation(kind: str) -> bytes:
    buffer = io.BytesIO()
    RGB.save(buffer, kind, save_all=True, append_images=[RGB.rotate(90), RGB.rotate(180)])
    return buffer.getvalue()


def encoded(kind: str, image: Image.Image = RGB) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (bomb(50_000, 50_000), "declares far more than 67108864 pixels; make it smaller"),
        (bomb(9_500, 9_500), "declares far more than 67108864 pixels"),
        (bomb(9_000, 8_000), "is 9000 x 8000, 72000000 pixels; at most 67108864"),
        (bomb(4, 4), "cannot be read .*; if it is a picture it is damaged, cut off"),
        (encoded("PNG")[:-30], "cannot be read"),
        (encoded("JPEG")[:-40], "cannot be read .*[Tt]runcated"),
        (encoded("PNG")[:20], "cannot be read|is no picture"),
        (animation("GIF"), "holds 3 pictures, an animation or several pages"),
        (animation("PNG"), "holds 3 pictures"),
        (animation("WEBP"), "holds 3 pictures"),
        (encoded("TIFF"), "is no picture that can be read; it must be PNG"),
        (text_bomb(), "cannot be read"),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "is no picture that can be read; it must be",
        ),
        (encoded("PPM"), "is no picture that can be read"),
        (b"", "is no picture that can be read"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=f"image .*odd.png {message}"):
        read_picture(path, "image", str(path))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_samples_of_unknown_range_are_refused(mode: str) -> None:
    with pytest.raises(RequestError, match=f"control x has 32-bit samples .mode {mode}."):
        converted(Image.new(mode, (4, 4)), "control", "x")


SOURCES = {
    "png": encoded("PNG"),
    "palette": encoded("PNG", RGB.convert("P")),
    "alpha": encoded("PNG", RGB.convert("RGBA")),
    "deep": encoded("PNG", Image.fromarray(np.arange(24, dtype=np.uint16).reshape(6, 4) * 999)),
    "jpeg": encoded("JPEG"),
    "cmyk": encoded("JPEG", RGB.convert("CMYK")),
    "webp": encoded("WEBP"),
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
}


@given(
    kind=st.sampled_from(sorted(SOURCES)),
    end=st.none() | st.integers(0, 400),
    changes=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=5),
)
def test_damaged_files_are_read_or_refused(
    kind: str, end: int | None, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(SOURCES[kind][:end])
    for place, value in changes:
        if content:
            content[place % len(content)] = value
    for role in ("image", "mask"):
        with contextlib.suppress(RequestError):
            read = read_picture(io.BytesIO(bytes(content)), role, "x")
            assert read.mode == ("L" if role == "mask" else "RGB")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="mask no.png is not there"):
        read_picture(tmp_path / "no.png", "mask", "no.png")
    with pytest.raises(RequestError, match="control here cannot be read .Is a directory."):
        read_picture(tmp_path, "control", "here")


def test_a_request_names_its_pictures(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    GREY.save(tmp_path / "m.png")
    request = Request(prompt="x", image=str(tmp_path / "a.png"), mask=str(tmp_path / "m.png"))
    images = read_pictures(request)
    assert list(images) == [request.image, request.mask]
    assert same(named(images, request, "image"), RGB)
    assert named(images, request, "control") is None
    with pytest.raises(RequestError, match="image is .*a.png', and the pictures .* are 'b'; give"):
        named({"b": RGB}, request, "image")
    digest = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert digests(request)[request.image] == digest
    assert digests(Request(prompt="x", image="in memory")) == {}
