"""An autoencoder on a folder of pictures: PSNR, SSIM, LPIPS and rFID of what comes out of it.

Every picture is cropped, encoded, decoded and saved beside its crop, 8 bits each, so that a run
that was stopped goes on and everything can be looked at. Start reading at `score_autoencoder`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sana.errors import CheckpointError, MissingExtra, NumericsError, RequestError
from sana.evaluation.distances import ROUNDS, frechet_interval, moments
from sana.evaluation.features import fingerprint, folder_features, load_extractor
from sana.evaluation.folders import agree, list_pictures, one_at_a_time
from sana.evaluation.networks import Network, find_network, read_weights
from sana.evaluation.notes import Notes
from sana.evaluation.plan import SEED, Report
from sana.evaluation.record import Score, write_record
from sana.evaluation.report import Labelled, bootstrap, contact_sheet
from sana.evaluation.sight import cropped, open_picture
from sana.models.dcae import DCAE
from sana.models.lpips import Lpips, from_published
from sana.models.metrics import psnr, ssim
from sana.pipelines.images import save_png, to_pil, to_tensor
from sana.weights.assign import assign
from sana.weights.load import find_model, load, load_autoencoder

CROPS, REBUILT = "crops", "rebuilt"
SHOWN, SIDE = 50, 256
NAMES = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips": "LPIPS (VGG-16)"}
RULES = {
    "psnr": "10 log10(255^2 / mean squared error) of each picture",
    "ssim": "Wang et al. 2004, Gaussian window of 11 with sigma 1.5, of each picture",
    "lpips": "version 0.1 with VGG-16, of each picture",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is asked for: `model` is a preset, a model's folder, or an autoencoder's folder or file.

    `lpips` and `features` are networks as `find_network` takes them; without one there is no such
    score.
    """

    model: str
    pictures: Path
    output: Path
    size: int = 512
    lpips: str | None = None
    features: str | None = None
    device: str = "cpu"
    is_offline: bool = False


def score_autoencoder(
    task: Task, report: Report = lambda what, done, total: None
) -> tuple[Path, str]:
    """Rebuild and score; the record's path and the table. Raises `RequestError`."""
    paths = list_pictures(task.pictures)
    with one_at_a_time(task.output):
        networks = _networks(task)
        least = networks[1].width + 1 if networks[1] else 1
        if len(paths) < least:
            raise RequestError(
                f"{task.pictures} holds {len(paths)} pictures and rfid needs at least {least}; "
                "give more, or leave --features out"
            )
        model = open_autoencoder(task)
        pairs = _rebuild(task, model, paths, report)
        scores = _pair_scores(task, networks[0], pairs, report)
        if task.features is not None:
            scores.append(_rfid(task, pairs, report))
        _sheet(pairs).save(task.output / "sheet.png")
        facts = {
            "model": task.model,
            "weights": weights_of(model),
            "folder": str(task.pictures),
            "pictures": len(paths),
            "size": task.size,
            "resampling_seed": SEED,
            "device": task.device,
        }
        return write_record(scores, facts, task.output)


def open_autoencoder(task: Task) -> DCAE:
    """The autoencoder alone, in fp32; `RequestError` if the size is none that it takes."""
    place = find_model(task.model, is_offline=task.is_offline)
    if isinstance(place, str):
        model = load(place, device=task.device).autoencoder
    else:
        like = place.like.config.autoencoder if place.like else None
        model = load_autoencoder(place.path, device=task.device, like=like)
    factor = model.config.factor
    if task.size < factor or task.size % factor:
        raise RequestError(
            f"size is {task.size}; {task.model} takes multiples of {factor}, so give "
            f"{max(1, round(task.size / factor)) * factor}"
        )
    return model


def load_lpips(source: str, device: str, *, is_offline: bool = False) -> tuple[Lpips, Network]:
    """LPIPS with the VGG-16 in a file as torchvision has it; `CheckpointError` if it is another."""
    try:
        heads = files("torchmetrics").joinpath("functional/image/lpips_models/vgg.pth")
    except ModuleNotFoundError:
        raise MissingExtra(
            "LPIPS's channel weights are in torchmetrics; pip install 'sana-torch[eval]'"
        ) from None
    network = find_network("lpips", source, is_offline=is_offline)
    module = Lpips()
    try:
        tensors = from_published(read_weights(network.path), read_weights(Path(str(heads))))
    except KeyError as error:
        raise CheckpointError(
            f"{source} has no {error.args[0]}; --lpips takes torchvision's vgg16-397923af.pth"
        ) from None
    assign(module, {name: tensor.float() for name, tensor in tensors.items()}, source)
    return module.to(device).eval(), network


def weights_of(model: nn.Module) -> str:
    """Twelve hex digits of the weights: the first numbers of every tensor, hashed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sample = tensor.detach().flatten()[:64].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    name: str
    crop: Path
    rebuilt: Path


def _networks(task: Task) -> tuple[tuple[Lpips, Network] | None, Any]:
    """Opened first, so that a wrong one is refused before anything is rebuilt."""
    lpips = extractor = None
    if task.lpips is not None:
        lpips = load_lpips(task.lpips, task.device, is_offline=task.is_offline)
    if task.features is not None:
        extractor, _ = load_extractor(task.features, task.device, is_offline=task.is_offline)
    return lpips, extractor


@torch.inference_mode()
def _rebuild(task: Task, model: DCAE, paths: Sequence[Path], report: Report) -> list[_Pair]:
    head = {"weights": weights_of(model), "size": task.size, "pictures": fingerprint(paths)}
    agree(task.output / "rebuilt.json", head)
    pairs = []
    for path in paths:
        name = f"{path.relative_to(task.pictures)}.png"
        pair = _Pair(
            name=name, crop=task.output / CROPS / name, rebuilt=task.output / REBUILT / name
        )
        if not pair.rebuilt.exists():
            crop = cropped(open_picture(path), task.size, Image.Resampling.BICUBIC)
            pixels = model.decode(model.encode(to_tensor(crop).to(task.device))).float()
            if not bool(torch.isfinite(pixels).all()):
                raise NumericsError(
                    f"the autoencoder gave NaN for {path}; look at its weights, or use the CPU"
                )
            if not pair.crop.exists():
                save_png(crop, pair.crop, {"crop_of": str(path)})
            save_png(to_pil(pixels[0]), pair.rebuilt, {"rebuilt_from": str(path), **head})
        pairs.append(pair)
        report("rebuilding", 1, len(paths))
    return pairs


@torch.inference_mode()
def _pair_scores(
    task: Task, lpips: tuple[Lpips, Network] | None, pairs: Sequence[_Pair], report: Report
) -> list[Score]:
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    if lpips is not None:
        measures["lpips"] = lpips[0]
    head = {"pairs": fingerprint([p.rebuilt for p in pairs]), "lpips": lpips and lpips[1].sha256}
    notes = Notes(task.output / ".scores" / "pairs.jsonl", head)
    found: list[dict[str, float]] = []
    for pair in pairs:
        values = notes.get(pair.name)
        if values is None:
            both = [to_tensor(open_picture(p)).to(task.device) for p in (pair.crop, pair.rebuilt)]
            values = {name: measure(*both).item() for name, measure in measures.items()}
            notes.put(pair.name, values)
        found.append(values)
        report("comparing", 1, len(pairs))
    return [_score(name, found, pairs, lpips[1] if lpips else None) for name in measures]


def _score(
    name: str, found: Sequence[dict[str, float]], pairs: Sequence[_Pair], network: Network | None
) -> Score:
    values = [row[name] for row in found]
    worst = values.index(max(values) if name == "lpips" else min(values))
    label = NAMES[name]
    if name == "lpips" and network is not None and not network.is_published:
        label = f"LPIPS-like ({network.label})"
    return Score(
        metric=name,
        name=label,
        share=bootstrap([[value] for value in values], seed=SEED),
        is_better_high=name != "lpips",
        pictures=len(values),
        protocol=f"{RULES[name]}, 8 bits, mean; interval: pictures resampled 2000 times",
        networks=(network,) if name == "lpips" and network else (),
        parts={"worst": values[worst], "worst_picture": pairs[worst].name},
        digits=2 if name == "psnr" else 4,
    )


def _rfid(task: Task, pairs: Sequence[_Pair], report: Report) -> Score:
    assert task.features is not None
    extractor, network = load_extractor(task.features, task.device, is_offline=task.is_offline)

    def features(which: str, paths: list[Path]) -> Tensor:
        store = task.output / ".scores" / f"{which}-features"
        return folder_features(
            extractor,
            network,
            paths,
            store,
            report=lambda count: report(f"rfid, {which}", count, len(paths)),
        )

    crops = features(CROPS, [pair.crop for pair in pairs])
    rebuilt = features(REBUILT, [pair.rebuilt for pair in pairs])
    name = "rFID" if network.is_published else f"Frechet distance ({extractor.label})"
    return Score(
        metric="rfid",
        name=name,
        share=frechet_interval(moments(crops), rebuilt, seed=SEED),
        is_better_high=False,
        pictures=len(rebuilt),
        protocol=(
            f"Frechet distance between {extractor.width} features of {len(pairs)} crops and of "
            f"what was rebuilt; interval: 1.96 deviations over {ROUNDS} resamples"
        ),
        networks=(network,),
    )


def _sheet(pairs: Sequence[_Pair]) -> Image.Image:
    """Each crop with its rebuilt picture to the right."""
    entries = []
    for pair in pairs[:SHOWN]:
        for path, text in ((pair.crop, pair.name), (pair.rebuilt, "rebuilt")):
            small = cropped(open_picture(path), SIDE, Image.Resampling.LANCZOS)
            entries.append(Labelled(picture=to_tensor(small)[0], text=text))
    return contact_sheet(entries, columns=10, side=SIDE)
