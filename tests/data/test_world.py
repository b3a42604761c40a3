"""Concept names, sprite fitting, and reading packs (a small one written here, not the real one)."""

import io
import json
import lzma
import re
import zipfile
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image

from sana.data.stickers import paint, sprites
from sana.data.stickers.pack import slug
from sana.data.stickers.tiny import tiny_world
from sana.errors import RequestError

COLORS = {
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray",
}  # fmt: skip
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10">'
    '<rect width="20" height="10" fill="#f00" fill-opacity="0.5"/></svg>'
)


def concept_rows():
    return json.loads(files("sana.data.stickers").joinpath("concepts.json").read_text("utf-8"))


def write_pack(path, *, format=1):
    picture = io.BytesIO()
    canvas = Image.new("RGBA", (256, 256))
    canvas.paste((0, 0, 255, 255), (40, 100, 140, 150))
    canvas.save(picture, "WEBP", lossless=True)
    row = {"key": "bar", "label": "bar", "plural": "bars", "synonyms": ["stick"], "tags": []}
    row |= {"group": "objects", "recolorable": True, "color": "blue"}
    manifest = {"format": format, "version": "test", "styles": ["3D", "flat"], "concepts": [row]}
    manifest["sprites"] = {"3D": ["bar"], "flat": ["bar"]}
    looks = [{"look": "cartoon", "attributes": {"person": "man"}}] * 3
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("manifest.json", json.dumps(manifest))
        pack.writestr("3d/bar.webp", picture.getvalue())
        pack.writestr("svg/flat.xz", lzma.compress(SVG.encode()))
        pack.writestr("avatars.json.xz", lzma.compress(json.dumps(looks).encode()))
        pack.writestr("avatars.svg.xz", lzma.compress("\0".join([SVG] * 3).encode()))


def test_every_name_means_one_concept():
    rows = concept_rows()
    assert 450 <= len(rows) <= 700
    owner = {}
    for row in rows:
        for name in {row["label"].lower(), *(word.lower() for word in row["synonyms"])}:
            assert owner.setdefault(name, row["source"]) == row["source"], name


def test_names_are_clean():
    for row in concept_rows():
        assert row["group"] in {"animals", "food", "travel", "activities", "objects", "characters"}
        assert row["color"] is None or row["color"] in COLORS
        assert row["label"] not in row["synonyms"]
        for name in (row["label"], row["plural"], *row["synonyms"]):
            assert re.fullmatch(r"[A-Za-z][A-Za-zñ' .\-]*", name), name


def test_matched_icons_belong_to_concepts():
    table = json.loads(files("sana.data.stickers").joinpath("matches.json").read_text("utf-8"))
    slugs = {slug(row["source"]) for row in concept_rows()}
    assert set(table) == {"outlined", "silhouette"}
    assert all(set(matched) <= slugs for matched in table.values())


def test_vector_sprite_is_centred_straight_alpha():
    sprite = paint.centred(paint.rasterise(SVG, *paint.sprite_size(20, 10)))
    assert paint.opaque_box(sprite) == (6, 67, 250, 189)
    assert np.abs(sprite[128, 128].astype(int) - (255, 0, 0, 128)).max() <= 2
    premultiplied = sprite[128, 128, :3].astype(int) * sprite[128, 128, 3] // 255
    assert np.abs(premultiplied - (255, 0, 0)).max() > 2


def test_bitmap_sprite_fills_the_frame():
    bitmap = np.zeros((256, 256, 4), np.uint8)
    bitmap[100:150, 40:140] = (0, 0, 255, 255)
    sprite = paint.fitted(bitmap)
    assert paint.opaque_box(sprite) == (6, 67, 250, 189)
    assert tuple(sprite[128, 128]) == (0, 0, 255, 255)


@pytest.mark.parametrize(
    ("rgb", "word"),
    [((220, 40, 40), "red"), ((245, 130, 30), "orange"), ((250, 215, 60), "yellow"),
     ((60, 170, 80), "green"), ((50, 110, 220), "blue"), ((130, 70, 200), "purple"),
     ((240, 110, 180), "pink"), ((120, 75, 45), "brown"), ((20, 20, 24), "black"),
     ((245, 245, 248), "white"), ((140, 140, 145), "gray")],
)  # fmt: skip
def test_color_words(rgb, word):
    assert paint.color_word(*rgb) == word


def test_pack_loads_into_a_world(tmp_path):
    write_pack(tmp_path / "p.pack")
    world = sprites.load_world(tmp_path / "p.pack", avatars=2, workers=1)
    assert world.styles == ("3D", "flat") and world.version == "test"
    assert world.sprites.shape == (2, 256, 256, 4) and world.sprites.dtype == torch.uint8
    assert world.sprite_of.tolist() == [[0, 1]]
    assert np.allclose(world.extents, [244 / 256, 122 / 256])
    assert world.avatar_images.shape == (2, 384, 384, 4) and len(world.avatars) == 2


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_what_is_not_a_pack_is_refused(tmp_path, content):
    path = tmp_path / "p.pack"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match="sana data stickers"):
        sprites.load_world(path)


def test_truncated_and_foreign_packs_are_refused(tmp_path):
    write_pack(tmp_path / "whole.pack")
    (tmp_path / "cut.pack").write_bytes((tmp_path / "whole.pack").read_bytes()[:-200])
    with pytest.raises(RequestError, match="whole sticker pack"):
        sprites.load_world(tmp_path / "cut.pack")
    write_pack(tmp_path / "later.pack", format=99)
    with pytest.raises(RequestError, match="format 99"):
        sprites.load_world(tmp_path / "later.pack")


def test_tiny_world_obeys_the_rules_of_a_world():
    world = tiny_world()
    assert len(world.concepts) == 12 and world.styles[0] == "3D"
    assert world.sprites.shape == (24, 256, 256, 4) and world.avatar_images.shape == (
        4,
        384,
        384,
        4,
    )
    assert np.allclose(world.extents.max(axis=1), 244 / 256, atol=1 / 128)
    assert (world.sprite_of >= 0).all()
    again = tiny_world()
    assert torch.equal(world.sprites, again.sprites)
