"""A judge for tests: the tiny world, and a detector that reads the truth instead of the picture."""

from __future__ import annotations

from functools import cache

import torch

from sana.data.stickers.prompts import Expected, PromptCase, Relation
from sana.data.stickers.stream import Studio
from sana.data.stickers.tiny import tiny_world
from sana.data.stickers.world import World
from sana.evaluation.detector import Box, Found
from sana.evaluation.stickers import Judge
from sana.models.detector import Detector

CPU = torch.device("cpu")
WIDTHS, DEPTHS = (16, 24, 32, 32), (1, 1, 1, 1)


@cache
def world() -> World:
    return tiny_world()


@cache
def studio() -> Studio:
    return Studio.open(world(), CPU)


def small_detector(concepts: int = 12) -> Detector:
    torch.manual_seed(0)
    return Detector(concepts, 11, widths=WIDTHS, depths=DEPTHS)


def judge(detector: Detector | None = None) -> Judge:
    return Judge(detector=detector or small_detector(), world=world(), studio=studio())


def case(
    kind: str, *expected: tuple[int, str | None, int], relation: Relation | None = None
) -> PromptCase:
    wanted = tuple(Expected(*values) for values in expected)
    return PromptCase(kind=kind, prompt=kind, expected=wanted, relation=relation)  # type: ignore[arg-type]


def seen(concept: int, color: str | None = None, box: Box = (0.3, 0.3, 0.6, 0.6)) -> Found:
    return Found(concept=concept, color=color, score=0.9, box=box)
