"""What the sticker exam shows: every verdict, some pictures of each kind, six that stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from sana.data.stickers.scene import TASKS, Task
from sana.evaluation.exam_drawing import read_all
from sana.evaluation.report import Labelled, contact_sheet, write_json
from sana.evaluation.stickers import Verdict

SHOWN, SIDE = 20, 160
SIX, LARGE = 3, 320
"""So many of the best and of the failures, with this side."""


def write_sheets(
    folder: Path, verdicts: Mapping[str, Sequence[Verdict]], paths: Sequence[Sequence[Path]]
) -> None:
    """verdicts.json: what is wrong with each picture; sheet.png: some of each kind; six.png.

    `paths` are the files of the first of the sets of verdicts, in the same order.
    """
    rows = {
        name: [
            {"kind": v.case.kind, "prompt": v.case.prompt, "seed": v.seed, "fault": v.fault}
            for v in judged
        ]
        for name, judged in verdicts.items()
    }
    write_json(folder / "verdicts.json", rows)
    first = next(iter(verdicts.values()))
    files = [path for row in paths for path in row]
    firsts = [
        [n for n in range(0, len(first), len(paths[0])) if first[n].case.kind == kind][:SHOWN]
        for kind in TASKS
    ]
    _show([n for numbers in firsts for n in numbers], first, files, SIDE, 10).save(
        folder / "sheet.png"
    )
    _show(six(first), first, files, LARGE, SIX).save(folder / "six.png")


def six(verdicts: Sequence[Verdict]) -> list[int]:
    """Numbers of three of the best pictures, then of three typical failures.

    Best: of the three kinds that fail most, the right picture whose faintest wanted object the
    judge is surest of. Typical: of the same kinds, the wrong one in the middle by that measure, so
    that neither the judge's doubts nor its surest finds are picked.
    """
    by_kind = {kind: [n for n, v in enumerate(verdicts) if v.case.kind == kind] for kind in TASKS}

    def share(kind: Task) -> float:
        numbers = by_kind[kind]
        return sum(verdicts[n].is_right for n in numbers) / len(numbers)

    best, failures = [], []
    for kind in sorted((kind for kind in TASKS if by_kind[kind]), key=share):
        ranked = sorted(by_kind[kind], key=lambda n: -_sureness(verdicts[n]))
        right = [n for n in ranked if verdicts[n].is_right]
        wrong = [n for n in ranked if not verdicts[n].is_right]
        best += right[:1]
        failures += wrong[len(wrong) // 2 :][:1]
    return best[:SIX] + failures[:SIX]


def _sureness(verdict: Verdict) -> float:
    wanted = {expected.concept for expected in verdict.case.expected}
    return min((f.score for f in verdict.found if f.concept in wanted), default=0.0)


def _show(
    numbers: Sequence[int], verdicts: Sequence[Verdict], files: Sequence[Path], side: int, wide: int
) -> Image.Image:
    entries = []
    for n in numbers:
        verdict = verdicts[n]
        text = verdict.case.prompt + (f" [{verdict.fault}]" if verdict.fault else "")
        entries.append(
            Labelled(picture=read_all([files[n]])[0], text=text, is_right=verdict.is_right)
        )
    return contact_sheet(entries, columns=wide, side=side)
