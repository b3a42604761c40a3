"""The frozen encoder of a transformer's training: in one dtype, so that its norms have kernels."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from sana.training.recipes import plan
from sana.training.run import make_task
from sana.training.tasks.flow import FlowTask
from tests.numerics import assert_detects, assert_matches
from tests.training.lines import CPU
from tests.training.small import SMALL

PLACE = replace(CPU, device=torch.device("cuda", 0)) if torch.cuda.is_available() else CPU


def test_the_encoder_is_narrow_and_the_decoder_is_not() -> None:
    changes = [*SMALL, "init="]
    wide = make_task(plan("sticker-256", changes), CPU)
    narrow = make_task(plan("sticker-256", [*changes, "precision=bf16"]), PLACE)
    assert isinstance(wide, FlowTask) and isinstance(narrow, FlowTask)
    assert {p.dtype for p in narrow.autoencoder.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in narrow.autoencoder.decoder.parameters()} == {torch.float32}
    item = wide.dataset()[0]
    latents = wide.encode(item).latents

    def check(autoencoder: nn.Module) -> None:
        narrow.autoencoder = autoencoder  # type: ignore[assignment]
        assert_matches(latents, narrow.encode(item).latents.float().cpu(), 0.05)  # floor 5.7e-3

    check(narrow.autoencoder)
    fault = copy.deepcopy(narrow.autoencoder)
    head = fault.encoder.head
    assert isinstance(head, nn.Conv2d) and head.bias is not None
    head.bias += 0.3 * latents.abs().mean().item()
    assert_detects(check, fault)
