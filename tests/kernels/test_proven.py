"""Only what a card has proven is used without being asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sana.kernels import ops
from sana.kernels.proven import REPORTS, UNPROVEN

ROOT = Path(__file__).parents[2]


def test_every_proof_is_a_report_that_is_here() -> None:
    for way, report in REPORTS.items():
        assert report is None or (ROOT / report).is_file(), way
        assert ops.allows(way) == (report is not None)


def test_what_is_tried_is_used_inside_alone() -> None:
    for way in UNPROVEN:
        with pytest.raises(KeyError), ops.trying(way):
            assert ops.allows(way)
            raise KeyError
        assert not ops.allows(way)


def test_what_is_proven_can_be_left_out() -> None:
    with ops.trying("cross_attention", without=["laid_text"]):
        assert ops.allows("cross_attention") and not ops.allows("laid_text")
    assert ops.allows("laid_text")


def test_unproven_kernels_do_not_run_and_fp32_is_not_approximated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cross = pytest.importorskip("sana.kernels.cross_attention", reason="triton is for Linux only")
    glumbconv = pytest.importorskip("sana.kernels.glumbconv")
    used: list[object] = []

    def attend(q: Tensor, *_: object) -> Tensor:
        used.append("cross_attention")
        return q

    def mix(x: Tensor, _weight: Tensor, _bias: Tensor, fast: bool) -> Tensor:
        used.append(fast)
        return x

    monkeypatch.setattr(cross, "cross_attention", attend)
    monkeypatch.setattr(glumbconv, "glu_depthwise", mix)
    q, inputs = torch.ones(1, 1, 2, 16).half(), (torch.ones(1, 2, 2, 4), torch.ones(4, 1, 3, 3))
    with ops.force("triton"):
        ops.cross_attention(q, q, q, None)
        ops.glu_depthwise(*inputs, torch.ones(4))
        ops.glu_depthwise(*(x.bfloat16() for x in inputs), torch.ones(4).bfloat16())
        with ops.trying(*UNPROVEN):
            ops.cross_attention(q, q, q, None)
    assert used == [False, True, "cross_attention"]
