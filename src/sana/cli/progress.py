"""What a person sees while pictures are drawn: a bar on stderr, and previews in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sana.errors import RequestError
from sana.pipelines.images import save_png

if TYPE_CHECKING:
    from rich.progress import Progress

    from sana.pipelines.pipeline import Pipeline
    from sana.samplers import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Previews:
    """A small picture into `folder` after every `interval` steps, named after the picture."""

    folder: Path
    interval: int = 1

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise RequestError(
                f"preview_interval is {self.interval}; it must be 1 or more: 1 previews every step"
            )

    def save(self, pipeline: Pipeline, step: Step, target: Path) -> None:
        """Write the preview of `step` of the picture that goes to `target`, if it is one's turn."""
        if (step.index + 1) % self.interval:
            return
        [image] = pipeline.preview(step.clean)
        name = f"{target.stem}-step-{step.index + 1:02}.png"
        save_png(image, self.folder / name, {"preview": step.index + 1, "of": step.count})


class Watch:
    """The progress of all pictures; how many steps one takes is known at its first."""

    def __init__(self, progress: Progress, pictures: int, previews: Previews | None) -> None:
        self.progress, self.pictures, self.previews = progress, pictures, previews

    def show(self, pipeline: Pipeline, step: Step, target: Path) -> None:
        """One more step of the picture that goes to `target` is done."""
        task = self.progress.task_ids[0]
        self.progress.update(task, total=step.count * self.pictures, advance=1)
        if self.previews is not None:
            self.previews.save(pipeline, step, target)


@contextmanager
def open_progress() -> Iterator[Progress]:
    """A progress display that shows only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress
