"""`sana generate --best-of N`: the flags of a search, their rules, and the judge."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from sana.errors import RequestError
from sana.scaling import Search

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress as Bar

    from sana.cli.progress import Previews
    from sana.pipelines.pipeline import Pictures, Pipeline
    from sana.request import Request
    from sana.scaling import Candidate, Judge, Referee

CHOOSING = Group("Choose the best of many", sort_key=5.5)
JUDGES: MappingProxyType[str, str] = MappingProxyType(
    {
        "sticker": "the detector.safetensors that `sana train sticker-detector` wrote",
        "alignment": "the alignment.safetensors that `sana train sticker-alignment` wrote",
        "clip": "a folder or hub name of a CLIP model, such as openai/clip-vit-large-patch14",
        "image-reward": "a folder or hub name with ImageReward.pt, such as THUDM/ImageReward",
        "vlm": "a folder or hub name of an image-text-to-text model of transformers",
        "vlm-tournament": "a folder or hub name of an image-text-to-text model of transformers",
    }
)
"""Each judge and what its --judge-model is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """The flags of a search."""

    best_of: Annotated[
        int | None,
        Parameter(help="draw so many, from seeds s, s+1, ..., and keep the best", group=CHOOSING),
    ] = None
    judge: Annotated[
        str | None,
        Parameter(help=f"who chooses: {', '.join(JUDGES)}", group=CHOOSING),
    ] = None
    judge_model: Annotated[
        str | None, Parameter(help="the judge's file, folder or hub name", group=CHOOSING)
    ] = None
    drafts: Annotated[
        int | None,
        Parameter(
            help="steps of a candidate; those kept are then drawn in full [default: all]",
            group=CHOOSING,
        ),
    ] = None
    keep: Annotated[int | None, Parameter(help="how many to keep [default: 1]", group=CHOOSING)] = (
        None
    )

    def search(self) -> Search | None:
        """The search that is asked for, if one is; `RequestError` for flags that do not fit."""
        if self.best_of is None:
            for name in ("judge", "judge_model", "drafts", "keep"):
                if getattr(self, name) is not None:
                    flag = "--" + name.replace("_", "-")
                    raise RequestError(
                        f"{flag} is {getattr(self, name)!r} and there is no search; it has an "
                        f"effect only with --best-of, so give that or leave {flag} out"
                    )
            return None
        known = ", ".join(JUDGES)
        if self.judge is None:
            raise RequestError(
                f"best_of is {self.best_of} and there is no judge; name one with --judge: {known}"
            )
        if self.judge not in JUDGES:
            near = difflib.get_close_matches(self.judge, JUDGES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {known}"
            raise RequestError(f"judge is {self.judge!r}, which is no judge; {hint}")
        if self.judge_model is None:
            raise RequestError(
                f"judge is {self.judge} and there is no judge_model; give "
                f"{JUDGES[self.judge]} with --judge-model"
            )
        return Search(
            count=self.best_of,
            keep=1 if self.keep is None else self.keep,
            drafts=self.drafts,
        )

    def load(self, device: str) -> Judge | Referee:
        """The judge, on `device`."""
        from sana.evaluation.judges import load_judge

        assert self.judge is not None and self.judge_model is not None, "checked by search"
        judge: Judge | Referee = load_judge(self.judge, self.judge_model, device)
        return judge


@dataclass(frozen=True, slots=True)
class Hunt:
    """A search under way: what it draws with, who judges, and where progress is shown."""

    pipeline: Pipeline
    judge: Judge | Referee
    search: Search
    bar: Bar
    previews: Previews | None
    target: Callable[[int], Path]
    """Where the picture of a seed would go; its previews are named after it."""

    def chosen(self, request: Request, images: Pictures) -> list[Candidate]:
        """The kept pictures, with progress shown after every step."""
        from sana.scaling import choose

        steps = choose(self.pipeline, request, self.judge, self.search, images)
        task, stage = self.bar.task_ids[0], ""
        while True:
            try:
                at = next(steps)
            except StopIteration as end:
                kept: list[Candidate] = end.value
                return kept
            if at.stage != stage:
                stage = at.stage
                total = at.step.count * at.count
                self.bar.reset(task, total=total, description=stage)
            self.bar.update(task, advance=1)
            if self.previews is not None:
                self.previews.save(self.pipeline, at.step, self.target(at.request.image_seeds[0]))
