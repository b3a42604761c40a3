"""`tiny`'s networks with random weights and a text encoder without a model, for fast tests."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sana.models.controlnet import ControlNet
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.presets import preset


class Letters:
    """States that depend on the letters alone; counts how often it is asked."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.prompts: list[str] = []

    def encode(self, prompts: Sequence[str]) -> Any:
        self.prompts += prompts
        [prompt] = prompts
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
        length = min(2 + len(prompt.split()), 32)
        states: Tensor = torch.randn(1, length, self.width, generator=generator)
        return SimpleNamespace(states=states, mask=torch.ones(1, length, dtype=torch.bool))

    def encode_negative(self, prompts: Sequence[str], length: int | None = None) -> Any:
        return self.encode(prompts)


def tiny_components(name: str = "tiny") -> Any:
    """Fresh components with every parameter random, so that text and time have an effect."""
    config = preset(name).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dit, autoencoder = LinearDiT(config.dit), DCAE(config.autoencoder)
        controlnet = ControlNet(config.controlnet) if config.controlnet else None
        for network in filter(None, (dit, autoencoder, controlnet)):
            for parameter in network.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        dit.text_norm.weight.data.fill_(1.0)
    return SimpleNamespace(
        config=config,
        dit=dit,
        autoencoder=autoencoder,
        text=Letters(config.text.width),
        controlnet=controlnet,
    )
