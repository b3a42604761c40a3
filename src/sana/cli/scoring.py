"""The flags of `sana evaluate`: what is scored by which networks, and the plans they make."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from sana.evaluation.exam import Exam
    from sana.evaluation.plan import Plan

NETWORKS = Group("Networks (a local folder or file, or a name on the hub)", sort_key=3)
WHERE = Group("Machine", sort_key=4)
ROLES = ("features", "clip", "image-reward", "detector", "vqa")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Each a flag."""

    metrics: Annotated[
        list[str],
        Parameter(
            help="some of fid, kid, clip-score, image-reward, geneval, dpg, with commas between",
            negative="",
        ),
    ]
    output: Annotated[
        Path | None,
        Parameter(name=["--output", "-o"], help="folder for the record [default: the pictures']"),
    ] = None
    prompts: Annotated[
        Path | None, Parameter(help="the list, if `sana evaluate draw` did not draw the folder")
    ] = None
    reference: Annotated[
        Path | None, Parameter(help="fid, kid: real pictures, or for fid an .npz of statistics")
    ] = None
    questions: Annotated[Path | None, Parameter(help="dpg: the published dpg_bench.csv")] = None
    count: Annotated[
        int | None, Parameter(help="pictures each prompt must have [geneval, dpg: 4]")
    ] = None
    grid: Annotated[
        int | None, Parameter(help="dpg: one picture is a 2 x 2 grid of squares with this side")
    ] = None
    size: Annotated[
        int | None, Parameter(help="fid, kid: resize and crop pictures to this first")
    ] = None
    kid_subset: Annotated[
        int, Parameter(name="--kid-subset", help="kid: pictures in each of 100 subsets")
    ] = 1000
    features: Annotated[
        str | None, Parameter(help="fid, kid: Inception-v3's weights, or others", group=NETWORKS)
    ] = None
    clip: Annotated[str | None, Parameter(help="clip-score, geneval: CLIP", group=NETWORKS)] = None
    image_reward: Annotated[
        str | None,
        Parameter(name="--image-reward", help="image-reward: ImageReward", group=NETWORKS),
    ] = None
    detector: Annotated[
        str | None, Parameter(help="geneval: Mask2Former for COCO", group=NETWORKS)
    ] = None
    vqa: Annotated[str | None, Parameter(help="dpg: BLIP for questions", group=NETWORKS)] = None
    device: Annotated[
        str | None, Parameter(help="cpu, cuda or cuda:1 [default: cuda if there]", group=WHERE)
    ] = None
    offline: Annotated[bool, Parameter(help="fetch nothing", group=WHERE, negative="")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparing:
    """The networks and the machine of `sana evaluate autoencoder`, each a flag."""

    lpips: Annotated[
        str | None, Parameter(help="torchvision's vgg16-397923af.pth", group=NETWORKS)
    ] = None
    features: Annotated[
        str | None, Parameter(help="Inception-v3's weights, or others", group=NETWORKS)
    ] = None
    device: Annotated[
        str | None, Parameter(help="cpu, cuda or cuda:1 [default: cuda if there]", group=WHERE)
    ] = None
    offline: Annotated[bool, Parameter(help="fetch nothing", group=WHERE, negative="")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Examining:
    """What `sana evaluate stickers` draws and how, each a flag."""

    count: Annotated[int, Parameter(help="held-out prompts, six kinds in turn")] = 600
    seeds: Annotated[int, Parameter(help="pictures of each prompt")] = 4
    case_seed: Annotated[int, Parameter(name="--case-seed", help="chooses the prompts")] = 1
    seen: Annotated[bool, Parameter(help="draw prompts of what training showed, too")] = True
    features: Annotated[
        list[str] | None,
        Parameter(help="for Frechet distances to renders; may repeat", negative=""),
    ] = None
    traits: Annotated[
        Path | None, Parameter(help="traits.safetensors of `sana train sticker-traits`")
    ] = None
    alignment: Annotated[
        Path | None, Parameter(help="alignment.safetensors of `sana train sticker-alignment`")
    ] = None
    pictures: Annotated[
        int, Parameter(help="renders of each kind for the autoencoder; 0 leaves it out")
    ] = 64
    trait_count: Annotated[
        int, Parameter(name="--trait-count", help="prompts of stickers, and of portraits")
    ] = 150
    steps: Annotated[int | None, Parameter(help="[default: the model's own]")] = None
    guidance: Annotated[float | None, Parameter(help="[default: the model's own]")] = None
    shift: Annotated[float | None, Parameter(help="[default: the model's own]")] = None
    sampler: Annotated[str | None, Parameter(help="[default: the model's own]")] = None
    batch: Annotated[int, Parameter(help="pictures that are drawn at once")] = 50
    cache: Annotated[Path | None, Parameter(help="folder that keeps the rasterized pack")] = None
    device: Annotated[
        str | None, Parameter(help="cpu, cuda or cuda:1 [default: cuda if there]", group=WHERE)
    ] = None

    def exam(self, model: str, detector: str, pack: str, output: Path, device: str) -> Exam:
        """The exam, on a device that is there."""
        from sana.evaluation.exam import Exam
        from sana.evaluation.sample import Settings

        return Exam(
            model=model,
            detector=detector,
            pack=pack,
            output=output,
            count=self.count,
            seeds=self.seeds,
            case_seed=self.case_seed,
            has_seen=self.seen,
            features=tuple(self.features or ()),
            traits=None if self.traits is None else str(self.traits),
            alignment=None if self.alignment is None else str(self.alignment),
            trait_count=self.trait_count,
            pictures=self.pictures,
            settings=Settings(
                steps=self.steps,
                guidance=self.guidance,
                shift=self.shift,
                sampler=self.sampler,
                batch=self.batch,
            ),
            cache=self.cache,
            device=device,
        )


def make_plan(folder: Path, given: Mapping[str, Any]) -> Plan:
    """The plan of the flags; the device is settled later, when torch is there."""
    from sana.evaluation.plan import Plan, parse_metrics

    flags = Scoring(**given)
    sources = {role: getattr(flags, role.replace("-", "_")) for role in ROLES}
    return Plan(
        folder=folder,
        output=flags.output or folder,
        metrics=parse_metrics(flags.metrics),
        sources={role: source for role, source in sources.items() if source is not None},
        prompts=flags.prompts,
        reference=flags.reference,
        questions=flags.questions,
        count=flags.count,
        grid=flags.grid,
        size=flags.size,
        kid_subset=flags.kid_subset,
        is_offline=flags.offline,
    )


def with_flags(
    command: Callable[..., Any], kind: type, before: Sequence[inspect.Parameter] = ()
) -> inspect.Signature:
    """The command's signature with its **fields replaced by `before` and the fields of `kind`."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "fields"]
    return inspect.Signature([*own, *before, *keywords(kind)])


def keywords(kind: type) -> list[inspect.Parameter]:
    """Each field of a dataclass as a keyword."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            part.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if part.default is MISSING else part.default,
            annotation=hints[part.name],
        )
        for part in fields_of(kind)
    ]
