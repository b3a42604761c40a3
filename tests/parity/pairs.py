"""Our network and diffusers' with the same weights, carried through the package's own key maps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sana.config import ControlNetConfig, DCAEConfig, DiTConfig
from sana.models.controlnet import ControlNet
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.weights.keys import NetworkConfig, from_ours, to_ours
from sana.weights.load import assign
from weights.networks import peer


def pair(config: NetworkConfig, seed: int = 0) -> tuple[Any, Any]:
    """(diffusers' network, ours): every weight drawn, so that no gate, norm or end is neutral."""
    theirs = peer(config).eval()
    randomize(theirs, seed)
    return theirs, ours_from(theirs.state_dict(), config)


def ours_from(tensors: dict[str, Tensor], config: NetworkConfig) -> Any:
    """Our network with diffusers' weights, and a check that they go back to the same bytes."""
    made: nn.Module
    if isinstance(config, DCAEConfig):
        made = DCAE(config)
    elif isinstance(config, ControlNetConfig):
        made = ControlNet(config)
    else:
        made = LinearDiT(config)
    assign(made, to_ours(tensors, "diffusers"), "diffusers")
    back = from_ours(made.state_dict(), "diffusers", config)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())
    return made.eval()


def faulty(network: Any, name: str) -> Any:
    """A planted fault: a copy of which one weight tensor is one percent larger."""
    made = copy.deepcopy(network)
    with torch.no_grad():
        made.get_parameter(name).mul_(1.01)
    return made


def randomize(network: nn.Module, seed: int) -> None:
    """Weights that keep activations of order one; norms near one, statistics away from neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "running_var" in name:
            tensor.copy_(0.5 + noise.abs())
        elif tensor.ndim > 1:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        elif name.endswith("weight"):
            tensor.copy_(1 + 0.2 * noise)
        else:
            tensor.copy_(0.1 * noise)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Inputs:
    """What a transformer is asked, in both ways of asking."""

    def __init__(self, config: DiTConfig, grid: tuple[int, int] = (4, 6)) -> None:
        self.latent = draw(3, config.latent_channels, *grid, seed=1)
        self.text = draw(3, 7, config.text_dim, seed=2)
        self.mask: Tensor | None = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]
        self.is_sprint = config.guidance_embedding
        whole = torch.tensor([999.0, 500.0, 17.0])
        self.time = torch.tensor([1.0000037, 0.782708, 0.1]) if self.is_sprint else whole / 1000
        self.peer_time = self.time if self.is_sprint else whole
        self.guidance = torch.tensor([4.5, 1.0, 3.0]) if self.is_sprint else None

    def ours(self, network: Any) -> Tensor:
        """Our velocity."""
        result: Tensor = network(
            self.latent, self.time, self.text, self.mask, guidance=self.guidance
        )
        return result

    def theirs(self, network: Any, **options: Any) -> Tensor:
        """diffusers' velocity."""
        dtype = network.dtype
        if self.guidance is not None:
            options["guidance"] = self.guidance * 0.1
        result: Tensor = network(
            self.latent.to(dtype),
            encoder_hidden_states=self.text.to(dtype),
            timestep=self.peer_time,
            encoder_attention_mask=None if self.mask is None else self.mask.long(),
            return_dict=False,
            **options,
        )[0]
        return result
