"""Scenes: never a held-out combination in training, a pure function, boxes that hold the pixels."""

import dataclasses
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from numerics import assert_detects, assert_matches
from sana.data.stickers import backgrounds
from sana.data.stickers.compose import (
    COLORS,
    Composer,
    Renderer,
    Scene,
    SceneTensors,
    draw_scene,
    render,
)
from sana.data.stickers.landscapes import PAINTERS
from sana.data.stickers.prompts import held_out_prompts
from sana.data.stickers.scene import TASKS
from sana.data.stickers.splits import is_held_out_color, is_held_out_pair, is_held_out_style
from sana.data.stickers.tiny import tiny_world
from sana.data.stickers.world import Concept, World

TINY = tiny_world()


def big_world(count: int = 400) -> World:
    """Names without pictures: many concepts, eight styles with gaps."""
    concepts = tuple(
        Concept(
            key=f"thing-{index}",
            label=f"thing{index}",
            plural=f"things{index}",
            synonyms=(),
            tags=(),
            group="objects",
            recolorable=index % 3 != 0,
            color=COLORS[index % 10] if index % 4 == 0 else None,
        )
        for index in range(count)
    )
    sprite_of = np.arange(count * 8).reshape(count, 8)
    sprite_of[::5, 3:] = -1
    styles = ("3D", "flat", "glossy", "retro", "simple", "cartoon", "outlined", "silhouette")
    return replace(
        TINY,
        concepts=concepts,
        styles=styles,
        sprite_of=sprite_of,
        extents=np.full((count * 8, 2), 244 / 256, np.float32),
    )


BIG = big_world()


def held_out(world: World, scene: Scene) -> list[str]:
    """Which held-out combinations a scene shows."""
    keys = [world.concepts[placed.concept].key for placed in scene.objects]
    found = ["pair" for key in keys[1:] if is_held_out_pair(keys[0], key)]
    for key, placed in zip(keys, scene.objects, strict=True):
        if placed.color and is_held_out_color(placed.color, key):
            found.append("color")
        if is_held_out_style(key, world.styles[placed.style]):
            found.append("style")
    return found


@pytest.mark.parametrize("world", [TINY, BIG], ids=["tiny", "big"])
def test_training_never_shows_a_held_out_combination(world: World) -> None:
    composer = Composer(world)

    def check(split: str) -> None:
        for index in range(3000):
            assert held_out(world, composer.draw(index, seed=11, split=split)) == []

    check("train")
    assert_detects(check, "held_out")


def test_the_held_out_split_shows_something_new_in_every_scene_and_sticker() -> None:
    composer = Composer(BIG)

    def check(split: str) -> None:
        scenes = [composer.draw(index, seed=5, split=split) for index in range(600)]
        assert all(held_out(BIG, scene) for scene in scenes if scene.kind != "avatar")

    check("held_out")
    assert_detects(check, "train")


def test_training_and_held_out_portraits_are_different_ones() -> None:
    composer = Composer(replace(TINY, avatars=TINY.avatars * 15))
    used = {
        split: {composer.draw(i, seed=1, split=split, kind="avatar").avatar for i in range(400)}
        for split in ("train", "held_out")
    }
    assert len(used["train"]) == 57 and len(used["held_out"]) == 3
    assert used["train"].isdisjoint(used["held_out"])


def test_a_scene_depends_on_its_numbers_alone() -> None:
    composer = Composer(BIG)
    first = [composer.draw(index, seed=7) for index in range(50)]
    copy = pickle.loads(pickle.dumps(composer))
    again = [copy.draw(index, seed=7) for index in reversed(range(50))]
    assert first == again[::-1]
    assert first != [composer.draw(index, seed=8) for index in range(50)]
    assert first != [composer.draw(index + 1, seed=7) for index in range(50)]
    assert first != [composer.draw(index, seed=7, split="held_out") for index in range(50)]
    assert draw_scene(BIG, 3, seed=7, split="train") == first[3]


def test_kinds_and_tasks_come_in_their_shares() -> None:
    composer = Composer(BIG)
    scenes = [composer.draw(index, seed=2) for index in range(3000)]
    kinds = [scene.kind for scene in scenes]
    for kind, share in (("scene", 0.76), ("sticker", 0.11), ("avatar", 0.13)):
        assert abs(kinds.count(kind) / 3000 - share) < 0.03
    assert {scene.task for scene in scenes if scene.kind == "scene"} == set(TASKS)
    assert {len(scene.objects) for scene in scenes} == {0, 1, 2, 3, 4}


def test_styles_of_training_come_in_their_shares() -> None:
    world = tiny_world()
    composer = Composer(world)
    drawn = [composer.draw(index, seed=3, kind="sticker") for index in range(2000)]
    styles = [world.styles[scene.objects[0].style] for scene in drawn]
    counts = [
        sum(
            world.sprite_of[c, s] >= 0 and not is_held_out_style(concept.key, style)
            for c, concept in enumerate(world.concepts)
        )
        for s, style in enumerate(world.styles)
    ]
    weights = [counts[0] ** 0.5 * 0.3, counts[1] ** 0.5]
    assert abs(styles.count("flat") / 2000 - weights[1] / sum(weights)) < 0.03


def test_objects_stay_inside_and_apart_and_stand_as_the_relation_says() -> None:
    composer = Composer(BIG)
    for index in range(3000):
        scene = composer.draw(index, seed=9)
        boxes = [placed.box for placed in scene.objects]
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= 512 and 0 <= y0 < y1 <= 512
        for number, a in enumerate(boxes):
            for b in boxes[:number]:
                apart = max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
                assert apart >= 8
        if scene.relation:
            (ax, ay), (bx, by) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes)
            across, down = ax - bx, ay - by
            if scene.relation in ("left", "right"):
                assert (across < -150) == (scene.relation == "left") and abs(across) > 150
                assert abs(down) < 60
            else:
                assert (down < -150) == (scene.relation == "above") and abs(down) > 150
                assert abs(across) < 60


def on_white(scene: Scene) -> Scene:
    return replace(scene, background=backgrounds.plain("white"))


def test_boxes_hold_the_drawn_pixels_and_no_more() -> None:
    composer = Composer(TINY)
    scenes = [composer.draw(i, seed=6, kind="scene") for i in range(24)]
    scenes = [on_white(s) for s in scenes if all(p.color != "white" for p in s.objects)]
    images = render(TINY, scenes, 512)

    def check(shift: int) -> None:
        for scene, image in zip(scenes, images, strict=True):
            drawn = (image < 0.9).any(0)
            inside = torch.zeros_like(drawn)
            for x0, y0, x1, y1 in (placed.box for placed in scene.objects):
                # A sprite is centred to half a pixel, and enlarging bleeds by up to one.
                inside[y0 + shift - 2 : y1 + shift + 2, x0 - 2 : x1 + 2] = True
                assert drawn[y0 + 3, x0:x1].any() and drawn[y1 - 4, x0:x1].any()
                assert drawn[y0:y1, x0 + 3].any() and drawn[y0:y1, x1 - 4].any()
            assert not (drawn & ~inside).any()

    check(0)
    assert_detects(check, 6)


# Floor 0.0: every picture is drawn by itself.
@pytest.mark.parametrize("bound", [0.0])
def test_a_batch_equals_its_singles(bound: float) -> None:
    composer, renderer = Composer(TINY), Renderer(TINY)
    scenes = [composer.draw(index, seed=1) for index in range(10)]
    together = renderer.render(composer.to_tensors(scenes), 128)
    single = torch.cat([renderer.render([scene], 128) for scene in scenes])
    assert together.shape == (10, 3, 128, 128) and together.dtype == torch.float32
    assert together.min() >= -1 and together.max() <= 1
    assert_matches(single, together, bound)
    moved = renderer.render([composer.draw(index, seed=2) for index in range(10)], 128)
    assert_detects(lambda images: assert_matches(single, images, bound), moved)


def test_small_pictures_are_the_large_ones_scaled_down() -> None:
    composer, renderer = Composer(TINY), Renderer(TINY)
    plain = [composer.draw(index, seed=3, kind="scene") for index in range(12)]
    plain = [on_white(scene) for scene in plain]
    large, small = renderer.render(plain, 512), renderer.render(plain, 256)
    reduced = torch.nn.functional.avg_pool2d(large, 2)
    # Floor 0.0061, from the edges.
    assert_matches(reduced, small, 0.03)
    shifted = small.roll(2, -1)
    assert_detects(lambda images: assert_matches(reduced, images, 0.03), shifted)


def test_red_turned_to_blue_is_blue_and_keeps_its_shading() -> None:
    composer, renderer = Composer(TINY), Renderer(TINY)
    square = (16, 16, 480)
    circle = [composer.place(0, 0, color, square) for color in COLORS]
    base = on_white(composer.draw(0, seed=0, kind="scene"))
    scenes = [replace(base, objects=(placed,)) for placed in circle]
    images = dict(zip(COLORS, (renderer.render(scenes, 128) + 1) / 2, strict=True))
    middle = {name: image[:, 40:90, 40:90].mean((1, 2)) for name, image in images.items()}

    def is_blue(name: str) -> None:
        red, green, blue = middle[name].tolist()
        assert blue > 1.5 * green > 1.5 * red

    is_blue("blue")
    assert_detects(is_blue, "purple")
    assert middle["black"].max() < 0.25 and middle["white"].min() > 0.8
    red, green, blue = middle["yellow"].tolist()
    assert red > 0.85 and green > 0.65 and blue < 0.5
    for image in images.values():
        rows = image.mean(0)[30:100, 64]
        assert rows[0] > rows[-1] + 0.03


@pytest.mark.parametrize("name", [*PAINTERS, "gradient"])
def test_backgrounds_paint_finite_pictures_that_follow_their_knobs(name: str) -> None:
    base = on_white(Composer(TINY).draw(0, seed=0, kind="scene"))
    pictures = []
    for knob in (0.1, 0.8):
        behind = replace(
            base.background, kind=name, knobs=(knob,) * 6, top=(9, 9, 9), bottom=(250, 90, 9)
        )
        pictures.append(render(TINY, [replace(base, background=behind, objects=())], 64))
    assert torch.isfinite(pictures[0]).all() and pictures[0].abs().max() <= 1
    assert not torch.equal(*pictures)


def test_tensors_can_be_cut_and_joined() -> None:
    composer = Composer(TINY)
    whole = composer.to_tensors([composer.draw(index, seed=1) for index in range(6)])
    joined = SceneTensors.cat([whole.rows(slice(0, 2)), whole.rows(torch.tensor([2, 3, 4, 5]))])
    assert all(torch.equal(a, b) for a, b in zip(whole, joined, strict=True))


def test_a_size_off_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="500 px.*multiple of 64"):
        render(TINY, [Composer(TINY).draw(0, seed=0)], 500)


def test_prompts_are_balanced_new_and_fixed() -> None:
    cases = held_out_prompts(BIG, 60, 1)
    assert cases == held_out_prompts(BIG, 60, 1)
    assert cases != held_out_prompts(BIG, 60, 2)
    assert [case.kind for case in cases] == list(TASKS) * 10
    assert len({case.prompt for case in cases}) == 60

    def check(kind: str) -> None:
        for case in cases:
            keys = [BIG.concepts[thing.concept].key for thing in case.expected]
            colors = [thing.color for thing in case.expected]
            if case.kind == kind or case.kind == "color_attribution":
                assert is_held_out_pair(*keys)
            if case.kind in ("colors", "color_attribution"):
                assert any(is_held_out_color(c, k) for c, k in zip(colors, keys, strict=True))
            assert (case.relation is not None) == (case.kind == "position")

    check("two")
    check("position")
    tampered = [dataclasses.replace(cases[4], relation=None)]
    cases = (*cases[:4], *tampered, *cases[5:])
    assert_detects(check, "position")


def test_prompts_exist_for_the_tiny_world() -> None:
    assert len(held_out_prompts(TINY, 12, 0)) == 12
