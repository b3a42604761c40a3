"""Mask2Former (Cheng et al. 2022) as GenEval uses it: the objects in a picture with their pixels.

Preprocessing and the choice of instances are MMDetection 2's, which the published program runs: at
most 1333 x 800, sides padded to 32, the 100 best of query x class, and for each the class's
probability times the mean probability inside its mask. The network is transformers', whose weights
are Meta's own training; MMDetection's are another, so scores may differ a little.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sana.errors import CheckpointError, MissingExtra
from sana.evaluation.geneval import SURE, Seen
from sana.evaluation.networks import Network, find_network, load_transformers
from sana.evaluation.sight import to_levels

LONG, SHORT, MULTIPLE = 1333, 800, 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
INSTANCES = 100
COCO = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant "
    "stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe "
    "backpack umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat "
    "baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon "
    "bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch "
    "potted_plant bed dining_table toilet tv laptop mouse remote keyboard cell_phone microwave "
    "oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"
)
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
CLASSES = tuple(RENAMED.get(word, word.replace("_", " ")) for word in COCO.split())
"""GenEval's names of COCO's 80 classes, in COCO's order."""


class Segmenter:
    """`find` gives every object over GenEval's threshold, by class."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    @staticmethod
    def load(
        source: str, device: str = "cpu", *, is_offline: bool = False
    ) -> tuple[Segmenter, Network]:
        """From a folder or a repository; it must know COCO's 80 classes, in their order."""
        try:
            import scipy  # noqa: F401
        except ImportError:
            raise MissingExtra(
                "transformers' Mask2Former needs scipy; pip install 'sana-torch[eval]'"
            ) from None
        network = find_network("detector", source, is_offline=is_offline)
        model = load_transformers("Mask2FormerForUniversalSegmentation", network, device)
        _check_classes(model.config.id2label, source)
        return Segmenter(model), network

    @torch.inference_mode()
    def find(self, image: Image.Image) -> dict[str, list[Seen]]:
        """The objects in a picture; masks have the picture's size."""
        pixels, inner = prepare(image)
        output = self.model(pixel_values=pixels[None].to(self.device))
        size = (image.height, image.width)
        classes, masks = output.class_queries_logits[0], output.masks_queries_logits[0]
        found = instances(classes.float(), masks.float(), tuple(pixels.shape[1:]), inner, size)
        listed: dict[str, list[Seen]] = {}
        for label, seen in found:
            listed.setdefault(CLASSES[label], []).append(seen)
        return listed


def prepare(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """Pixels (3, H, W) for the network, and which height and width of them are the picture."""
    levels = to_levels(image)
    height, width = levels.shape[1:]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    inner = (int(height * scale + 0.5), int(width * scale + 0.5))
    # As OpenCV: neighbours only, no antialiasing, and whole levels after it.
    resized = F.interpolate(levels[None], inner, mode="bilinear", align_corners=False)[0].round()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pad = (0, -inner[1] % MULTIPLE, 0, -inner[0] % MULTIPLE)
    return F.pad((resized - mean) / std, pad), inner


def instances(
    classes: Tensor,
    masks: Tensor,
    padded: tuple[int, ...],
    inner: tuple[int, int],
    size: tuple[int, int],
) -> list[tuple[int, Seen]]:
    """(class, object) of logits (Q, C + 1) and (Q, h, w), for a picture of `size`.

    `padded` is what the network saw and `inner` the picture's part of it. What cannot come over the
    threshold is left out.
    """
    known = classes.shape[1] - 1
    scores, places = (
        classes.softmax(-1)[:, :-1].flatten().topk(min(INSTANCES, known * len(classes)))
    )
    found = []
    for score, place in zip(scores.tolist(), places.tolist(), strict=True):
        if score <= SURE:
            break
        logits = _scaled(masks[place // known], padded, inner, size)
        mask = logits > 0
        if not bool(mask.any()):
            continue
        inside = logits.sigmoid()[mask]
        sure = score * (inside.sum() / (mask.sum() + 1e-6)).item()
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = (
            float(columns[0].item()),
            float(rows[0].item()),
            float(columns[-1].item()) + 1,
            float(rows[-1].item()) + 1,
        )
        found.append((place % known, Seen(box=box, score=sure, mask=mask.cpu().numpy())))
    return found


def _scaled(
    mask: Tensor, padded: tuple[int, ...], inner: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    whole = F.interpolate(mask[None, None], padded, mode="bilinear", align_corners=False)
    cut = whole[..., : inner[0], : inner[1]]
    return F.interpolate(cut, size, mode="bilinear", align_corners=False)[0, 0]


def _check_classes(labels: dict[int, str], source: str) -> None:
    names = [labels[index] for index in sorted(labels)]
    are_named = not all(name.startswith("LABEL_") for name in names)
    if len(names) != len(CLASSES) or (
        are_named and names != [w.replace("_", " ") for w in COCO.split()]
    ):
        raise CheckpointError(
            f"{source} knows {len(names)} classes, the first being {names[0]!r}; GenEval asks for "
            "COCO's 80 in their order: give a Mask2Former for COCO instances, such as "
            "facebook/mask2former-swin-small-coco-instance"
        )
