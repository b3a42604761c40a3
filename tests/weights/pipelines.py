"""A whole tiny SanaPipeline saved by diffusers: Gemma-2, its tokenizer, DC-AE, transformer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from gemmas import peer_of, peer_tokenizer, tiny_gemma
from sana.config import DCAEConfig, DiTConfig
from weights.networks import DCAES, DITS, peer

DIT = replace(DITS["normed"], text_dim=32)


def make_pipeline(dit: DiTConfig = DIT, autoencoder: DCAEConfig = DCAES["sana"]) -> Any:
    """Random weights, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind: Any = diffusers.SanaPipeline
        return kind(
            tokenizer=peer_tokenizer(),
            text_encoder=peer_of(tiny_gemma()),
            vae=peer(autoencoder).eval(),
            transformer=peer(dit).eval(),
            scheduler=diffusers.DPMSolverMultistepScheduler(
                flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
            ),
        )


def save_pipeline(folder: Path, **settings: Any) -> Any:
    """Write it as people have it; returns it."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder, **settings)
    return pipeline
