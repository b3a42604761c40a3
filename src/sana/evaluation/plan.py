"""What a scoring run is asked for, and all that can be refused before a network is loaded.

`Plan` is the run, `Measure` one metric with what it needs; `check` is the rule book.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from sana.errors import RequestError

SEED = 0
"""Of resampling, and of KID's subsets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one metric needs besides the pictures; `networks` are flags."""

    networks: tuple[str, ...]
    prompts: bool = False
    reference: bool = False
    questions: bool = False


METRICS: MappingProxyType[str, Needs] = MappingProxyType(
    {
        "fid": Needs(networks=("features",), reference=True),
        "kid": Needs(networks=("features",), reference=True),
        "clip-score": Needs(networks=("clip",), prompts=True),
        "image-reward": Needs(networks=("image-reward",), prompts=True),
        "geneval": Needs(networks=("detector", "clip"), prompts=True),
        "dpg": Needs(networks=("vqa",), prompts=True, questions=True),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A scoring run; `sources` says where each network is, by its flag."""

    folder: Path
    output: Path
    metrics: tuple[str, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    prompts: Path | None = None
    reference: Path | None = None
    questions: Path | None = None
    count: int | None = None
    """Pictures that each prompt must have."""
    grid: int | None = None
    """The side of one of four pictures in a 2 x 2 grid, where DPG-Bench's are drawn so."""
    size: int | None = None
    """To which pictures are resized and cropped before FID and KID."""
    kid_subset: int = 1000
    device: str = "cpu"
    is_offline: bool = False

    @property
    def store(self) -> Path:
        """Where results are kept that a killed run goes on from."""
        return self.output / ".scores"


Report = Callable[[str, int, int], None]
"""(metric, how many more are done, of how many)."""


def parse_metrics(text: Sequence[str]) -> tuple[str, ...]:
    """Names from "fid,kid" or several such; raises `RequestError` for an unknown one."""
    names = [name.strip() for part in text for name in part.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(METRICS)}"
            raise RequestError(f"metrics has {name!r}, which is no metric; {hint}")
    if not names:
        raise RequestError(f"metrics is empty; name some of {', '.join(METRICS)}")
    return tuple(dict.fromkeys(names))


def check(plan: Plan) -> None:
    """Raise `RequestError` for what the plan lacks, or has and cannot use."""
    for metric in plan.metrics:
        needs = METRICS[metric]
        for role in needs.networks:
            if role not in plan.sources:
                raise RequestError(
                    f"{metric} needs the network --{role}; give a local folder or file, or a name "
                    "on the hub (docs/evaluation.md says which)"
                )
        if needs.reference and plan.reference is None:
            raise RequestError(
                f"{metric} needs --reference, the folder of pictures to compare with"
            )
        if needs.questions and plan.questions is None:
            raise RequestError(f"{metric} needs --questions, the published dpg_bench.csv")
    used = {role for metric in plan.metrics for role in METRICS[metric].networks}
    for role in plan.sources:
        if role not in used:
            raise RequestError(
                f"--{role} is given and none of {', '.join(plan.metrics)} uses it; leave it out, "
                "or add the metric that does"
            )
    _check_numbers(plan)
    _check_reference(plan)


def _check_numbers(plan: Plan) -> None:
    least = {"count": 1, "grid": 8, "size": 8, "kid_subset": 2}
    for name, low in least.items():
        value = getattr(plan, name)
        if value is not None and value < low:
            raise RequestError(f"{name} is {value}; it must be at least {low}")
    if plan.grid is not None and "dpg" not in plan.metrics:
        raise RequestError(f"grid is {plan.grid}; only dpg looks at grids, so leave it out")


def _check_reference(plan: Plan) -> None:
    if plan.reference is None:
        return
    if plan.reference.is_dir():
        if plan.reference.resolve() == plan.folder.resolve():
            raise RequestError(
                f"reference is {plan.reference}, the very folder that is scored; give other "
                "pictures"
            )
        return
    if plan.reference.suffix != ".npz" or not plan.reference.exists():
        raise RequestError(
            f"reference is {plan.reference}; it must be a folder of pictures, or an .npz of "
            "statistics"
        )
    if "kid" in plan.metrics:
        raise RequestError(
            f"reference is {plan.reference}, statistics without pictures; kid compares pictures, "
            "so give their folder"
        )
