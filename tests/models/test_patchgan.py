"""PatchGAN: a score for each patch, which neither other pictures nor far pixels change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches
from sana.models.patchgan import PatchGAN


def make_network() -> PatchGAN:
    torch.manual_seed(0)
    return PatchGAN(width=16)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (63, 100)])
def test_scores_lie_on_an_eighth_grid_less_two(height: int, width: int) -> None:
    scores = make_network()(torch.zeros(2, 3, height, width))
    assert scores.shape == (2, 1, height // 8 - 2, width // 8 - 2)


# Floor 0.0 on the CPU; another order of sums gives about 1e-7.
@pytest.mark.parametrize("bound", [1e-6])
def test_a_score_does_not_depend_on_the_neighbours(bound: float) -> None:
    network = make_network()
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    alone = torch.cat([network(picture[None]) for picture in pictures])

    def check(scores: Tensor) -> None:
        assert_matches(alone, scores, bound)

    check(network(pictures))
    blended = pictures.clone()
    blended[0] = 0.99 * pictures[0] + 0.01 * pictures[1]
    assert_detects(check, network(blended))
