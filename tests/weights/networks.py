"""Small networks of every official kind, as configs of ours and as diffusers' own classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sana.config import ControlNetConfig, DCAEConfig, DiTConfig, StageConfig
from sana.models.controlnet import ControlNet
from sana.models.dcae import DCAE
from sana.models.dit import LinearDiT
from sana.weights.keys import NetworkConfig

BASE = DiTConfig(width=64, depth=2, cross_heads=2, text_dim=24, latent_channels=8)
DITS = {
    "600m": replace(BASE, width=96, depth=3, cross_heads=4),
    "1600m": BASE,
    "normed": replace(BASE, qk_norm=True),
    "sprint": replace(BASE, qk_norm=True, guidance_embedding=True),
    "positions": replace(BASE, position_scale=2.0, position_base=8),
    "patched": replace(BASE, patch_size=2, qk_norm=True),
}
CONTROLNET = ControlNetConfig(dit=BASE, depth=2)


def stages(depths: tuple[int, ...], attends_from: int, **fields: Any) -> tuple[StageConfig, ...]:
    widths = (16, 32, 32, 64)[: len(depths)]
    plain = {name: fields.pop(name) for name in ("norm", "activation") if name in fields}
    return tuple(
        StageConfig(width=width, depth=depth, block="efficientvit", **fields)
        if index >= attends_from
        else StageConfig(width=width, depth=depth, **plain)
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True))
    )


_SANA_ENCODER = stages((1, 2, 1), 1, scales=(5,))
DCAES = {
    "sana": DCAEConfig(
        latent_channels=8, encoder=_SANA_ENCODER, decoder=stages((2, 1, 2), 1, scales=(5,))
    ),
    "lite": DCAEConfig(
        latent_channels=8,
        encoder=_SANA_ENCODER,
        decoder=stages((0, 2, 1), 3),
        up="pixel_shuffle",
        out_activation="silu",
    ),
    "imagenet": DCAEConfig(
        latent_channels=8,
        encoder=stages((0, 2, 1, 1), 2),
        decoder=stages((0, 1, 2, 1), 2, norm="batch", activation="relu"),
        down="pixel_unshuffle",
        up="pixel_shuffle",
    ),
    "strided stem": DCAEConfig(
        latent_channels=8,
        encoder=stages((0, 2, 1), 2, scales=(3, 5)),
        decoder=stages((0, 1, 2), 2, scales=(3, 5)),
    ),
}
ALL: dict[str, NetworkConfig] = {**DITS, "controlnet": CONTROLNET, **DCAES}


def transformer_arguments(config: DiTConfig) -> dict[str, Any]:
    """diffusers' constructor arguments for the same network."""
    return {
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_attention_heads": config.width // config.head_dim,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "num_cross_attention_heads": config.cross_heads,
        "cross_attention_head_dim": config.width // config.cross_heads,
        "cross_attention_dim": config.width,
        "caption_channels": config.text_dim,
        "mlp_ratio": config.mlp_ratio,
        "sample_size": config.position_base,
        "patch_size": config.patch_size,
        "interpolation_scale": config.position_scale,
    }


def autoencoder_arguments(config: DCAEConfig) -> dict[str, Any]:
    """diffusers' constructor arguments for the same network."""
    found: dict[str, Any] = {
        "latent_channels": config.latent_channels,
        "attention_head_dim": config.head_dim,
        "downsample_block_type": config.down,
        "upsample_block_type": config.up,
        "decoder_norm_types": tuple(
            "batch_norm" if s.norm == "batch" else "rms_norm" for s in config.decoder
        ),
        "decoder_act_fns": tuple(s.activation for s in config.decoder),
        "decoder_conv_act_fn": config.out_activation,
        "scaling_factor": config.latent_scale[0],
    }
    for side in ("encoder", "decoder"):
        part = getattr(config, side)
        kinds = {"efficientvit": "EfficientViTBlock", "residual": "ResBlock"}
        found[f"{side}_block_types"] = tuple(kinds[s.block] for s in part)
        found[f"{side}_block_out_channels"] = tuple(s.width for s in part)
        found[f"{side}_layers_per_block"] = tuple(s.depth for s in part)
        found[f"{side}_qkv_multiscales"] = tuple(s.scales for s in part)
    return found


def peer(config: NetworkConfig) -> nn.Module:
    """diffusers' network of the same description, with its own random weights."""
    import diffusers

    made: nn.Module
    if isinstance(config, DCAEConfig):
        made = diffusers.AutoencoderDC(**autoencoder_arguments(config))
    elif isinstance(config, ControlNetConfig):
        arguments = transformer_arguments(replace(config.dit, depth=config.depth))
        made = diffusers.SanaControlNetModel(**arguments)
    else:
        made = diffusers.SanaTransformer2DModel(
            **transformer_arguments(config),
            qk_norm="rms_norm_across_heads" if config.qk_norm else None,
            guidance_embeds=config.guidance_embedding,
        )
    return made


def random_tensors(config: NetworkConfig) -> dict[str, Tensor]:
    """Every tensor of the network in our names, with distinct values."""
    if isinstance(config, ControlNetConfig):
        shapes = ControlNet(config).state_dict()
    elif isinstance(config, DCAEConfig):
        shapes = DCAE(config).state_dict()
    else:
        shapes = LinearDiT(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in shapes.items()
    }
