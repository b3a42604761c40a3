"""Inference-time scaling: draw many candidates of one request, judge each once, keep the best.

Sana-1.5 (Xie et al. 2025, section 2.4) draws N pictures and lets a verifier choose. A judge is any
callable that scores pictures; a referee is one that compares two. Candidate i starts from seed
s + i and is drawn alone, so each can be drawn again by itself, bit for bit. Start reading at
`best_of`; `choose` is the same as a generator, for progress bars.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from PIL import Image

from sana.errors import NumericsError, RequestError
from sana.request import SEED_LIMIT, STEP_LIMIT, Request

if TYPE_CHECKING:
    from sana.pipelines.pipeline import Pictures, Pipeline
    from sana.samplers import Step

LIMIT = 4096
"""The most candidates of one search; the papers go to 2048."""


@runtime_checkable
class Judge(Protocol):
    """Scores pictures of a prompt, a finite number for each; higher is better."""

    name: str

    def __call__(self, prompt: str, pictures: Sequence[Image.Image]) -> Sequence[float]: ...


@runtime_checkable
class Referee(Protocol):
    """Compares two pictures of a prompt: over 0 if the first is better, under 0 if the second.

    Where it says 0, the first goes on.
    """

    name: str

    def compare(self, prompt: str, first: Image.Image, second: Image.Image) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How wide to look: `count` candidates, of which `keep` are kept.

    With `drafts`, candidates are drawn in so many steps, and the kept ones once more in all steps.
    """

    count: int
    keep: int = 1
    drafts: int | None = None

    def __post_init__(self) -> None:
        _check_whole("best_of", self.count, 1, LIMIT, "16 is a good start")
        _check_whole("keep", self.keep, 1, self.count, "no more can be kept than are drawn")
        if self.drafts is not None:
            _check_whole("drafts", self.drafts, 1, STEP_LIMIT, "leave it out for no drafts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One picture of a search; `request` draws it again, without the search.

    `number` counts from 0 in the order of the seeds. `score` is the judge's, of the draft where
    there was one, and None where a referee only compared.
    """

    request: Request
    number: int
    image: Image.Image
    score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A step of picture `number` of `count` is done; stages are drawing, drafting, finishing."""

    stage: str
    number: int
    count: int
    request: Request
    step: Step


def best_of(
    pipeline: Pipeline,
    request: Request,
    judge: Judge | Referee,
    search: Search,
    images: Pictures | None = None,
) -> list[Candidate]:
    """The `search.keep` best of `search.count` pictures of `request`, the best first.

    A judge scores each picture once, and equal scores go to the lower seed. A referee that is no
    judge holds a knock-out: candidates are split into `keep` groups in the order of their seeds,
    and each group's winner is kept. At most keep + log2(count) + 2 pictures are held at once.
    Raises `RequestError`, and `NumericsError` when the judge's answer is no score.
    """
    steps = choose(pipeline, request, judge, search, images)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            kept: list[Candidate] = end.value
            return kept


def choose(
    pipeline: Pipeline,
    request: Request,
    judge: Judge | Referee,
    search: Search,
    images: Pictures | None = None,
) -> Generator[Progress, None, list[Candidate]]:
    """As `best_of`, yielding after every step of every picture; stop pulling to stop the search."""
    full = _checked(pipeline.resolve(request, images), search)
    quick = full if search.drafts is None else full.replace(steps=search.drafts)
    pool: _Pool = _Best(judge, search) if isinstance(judge, Judge) else _Knockout(judge, search)
    for number in range(search.count):
        single = _of_seed(quick, number)
        stage = "drawing" if search.drafts is None else "drafting"
        place = (stage, number, search.count)
        image = yield from _draw(pipeline, single, images, place)
        pool.add(Candidate(request=single, number=number, image=image, score=None))
    kept = pool.kept()
    if search.drafts is None or search.drafts == full.steps:
        return kept
    finished = []
    for index, draft in enumerate(kept):
        single = _of_seed(full, draft.number)
        place = ("finishing", index, len(kept))
        image = yield from _draw(pipeline, single, images, place)
        finished.append(replace(draft, request=single, image=image))
    return finished


def record(chosen: Candidate, judge: Judge | Referee, search: Search) -> dict[str, Any]:
    """What a chosen picture's metadata says of its search; the request itself draws it again."""
    return {
        "judge": judge.name,
        "of": search.count,
        "keep": search.keep,
        "number": chosen.number,
        "score": chosen.score,
        "drafts": search.drafts,
    }


def score_one(judge: Judge, prompt: str, image: Image.Image) -> float:
    """One picture's score; `NumericsError` unless the judge gives one finite number."""
    scores = list(judge(prompt, [image]))
    if len(scores) != 1:
        raise NumericsError(
            f"judge {judge.name!r} gave {len(scores)} scores for 1 picture; a judge gives exactly "
            "one for each, so mend the judge or take another"
        )
    score = float(scores[0])
    if not math.isfinite(score):
        raise NumericsError(
            f"judge {judge.name!r} gave {score} for a picture of {prompt[:60]!r}; a score must be "
            "a finite number, so look at the judge's weights, or load it in float32"
        )
    return score


class _Pool(Protocol):
    """Takes candidates in order and keeps few of them."""

    def add(self, candidate: Candidate) -> None: ...

    def kept(self) -> list[Candidate]: ...


class _Best:
    """The top k by score."""

    def __init__(self, judge: Judge, search: Search) -> None:
        self.judge, self.size = judge, search.keep
        self.heap: list[tuple[float, int, Candidate]] = []

    def add(self, candidate: Candidate) -> None:
        score = score_one(self.judge, candidate.request.prompt, candidate.image)
        entry = (
            score,
            -candidate.number,
            replace(candidate, score=score),
        )  # no two numbers are equal
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        else:
            heapq.heappushpop(self.heap, entry)

    def kept(self) -> list[Candidate]:
        return [candidate for _, _, candidate in sorted(self.heap, reverse=True)]


class _Knockout:
    """Single elimination of neighbours in each of `keep` groups, played as candidates come.

    For powers of two these are the matches that Sana-1.5's script plays: neighbours meet until
    `keep` are left. `waiting` holds winners by how many candidates they stand for.
    """

    def __init__(self, referee: Referee, search: Search) -> None:
        self.referee, self.search = referee, search
        self.waiting: list[tuple[int, Candidate]] = []
        self.winners: list[Candidate] = []

    def add(self, candidate: Candidate) -> None:
        size, rest = 1, candidate
        while self.waiting and self.waiting[-1][0] == size:
            _, earlier = self.waiting.pop()
            rest, size = self._better(earlier, rest), size * 2
        self.waiting.append((size, rest))
        group = candidate.number * self.search.keep // self.search.count
        following = (candidate.number + 1) * self.search.keep // self.search.count
        if group != following:
            self._close()

    def kept(self) -> list[Candidate]:
        return self.winners

    def _close(self) -> None:
        """The group is complete: those that had no opponent meet now."""
        _, winner = self.waiting.pop()
        while self.waiting:
            _, earlier = self.waiting.pop()
            winner = self._better(earlier, winner)
        self.winners.append(winner)

    def _better(self, first: Candidate, second: Candidate) -> Candidate:
        prompt = first.request.prompt
        lead = float(self.referee.compare(prompt, first.image, second.image))
        if math.isnan(lead):
            raise NumericsError(
                f"referee {self.referee.name!r} gave nan for two pictures of {prompt[:60]!r}; it "
                "must give a number, over 0 where the first is better, so look at its weights"
            )
        return second if lead < 0 else first


def _checked(request: Request, search: Search) -> Request:
    """The resolved request, if a search can start from it."""
    if len(request.image_seeds) != 1:
        raise RequestError(
            f"best_of is {search.count} and the request asks for {len(request.image_seeds)} "
            "pictures; a search starts at one seed, so give one, and keep for more pictures"
        )
    first = request.image_seeds[0]
    if first + search.count - 1 > SEED_LIMIT:
        raise RequestError(
            f"best_of is {search.count} from seed {first}; the last seed may be at most "
            f"{SEED_LIMIT}, so start at a smaller one"
        )
    steps = request.steps
    if search.drafts is not None and steps is not None and search.drafts > steps:
        raise RequestError(
            f"drafts is {search.drafts} and a picture takes {steps} steps; drafts are there to be "
            f"cheap, so give at most {steps}, or leave it out"
        )
    return request


def _of_seed(request: Request, number: int) -> Request:
    return request.replace(seeds=(request.image_seeds[0] + number,), count=1)


def _draw(
    pipeline: Pipeline, single: Request, images: Pictures | None, place: tuple[str, int, int]
) -> Generator[Progress, None, Image.Image]:
    stage, number, count = place
    latent = None
    for step in pipeline.steps(single, images):
        latent = step.latent
        yield Progress(stage=stage, number=number, count=count, request=single, step=step)
    assert latent is not None, "a schedule has at least one step"
    [image] = pipeline.finish(single, latent, images)
    return image


def _check_whole(name: str, value: object, least: int, most: int, hint: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RequestError(
            f"{name} is {value!r}; it must be a whole number from {least} to {most}; {hint}"
        )
