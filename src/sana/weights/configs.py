"""diffusers' config.json, two ways: what it says of a network, and what to write for one of ours.

Values that no released model has (another epsilon, an attention bias) are refused by name, since
the networks here do not have them. Start reading at `read_transformer`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sana.config import (
    Activation,
    BlockKind,
    ControlNetConfig,
    DCAEConfig,
    DiTConfig,
    GemmaConfig,
    NormKind,
    SamplingConfig,
    StageConfig,
    TextConfig,
)
from sana.errors import CheckpointError
from sana.weights.keys import NetworkConfig

Json = Mapping[str, Any]
QK_NORM = "rms_norm_across_heads"
# What every network here has; other values in a config.json are refused.
FIXED_TRANSFORMER: Json = {
    "dropout": 0.0,
    "attention_bias": False,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "guidance_embeds_scale": 0.1,
}
FIXED_AUTOENCODER: Json = {
    "in_channels": 3,
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
}
CLASSES: Mapping[str, str] = {
    "transformer": "SanaTransformer2DModel",
    "controlnet": "SanaControlNetModel",
    "autoencoder": "AutoencoderDC",
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}; copy the whole folder again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); get it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object; get it again")
    return found


def read_transformer(data: Json, source: str) -> DiTConfig:
    """The config of a SanaTransformer2DModel, with diffusers' defaults where a key is absent."""
    _require_fixed(data, FIXED_TRANSFORMER, source)
    with _naming(source):
        width = int(data.get("num_attention_heads", 70)) * int(data.get("attention_head_dim", 32))
        channels, patch = int(data.get("in_channels", 32)), int(data.get("patch_size", 1))
        scale = data.get("interpolation_scale")
        cross = int(data.get("num_cross_attention_heads") or 20)
        wanted = {
            "cross_attention_dim": width,
            "cross_attention_head_dim": width // cross,
            "out_channels": channels,
        }
        guided = bool(data.get("guidance_embeds", False))
        qk_norm = data.get("qk_norm")
        if qk_norm not in (None, QK_NORM):
            raise CheckpointError(f"qk_norm is {qk_norm!r}; known are null and {QK_NORM!r}")
        _require_fixed(data, wanted, source)
        config = DiTConfig(
            width=width,
            depth=int(data.get("num_layers", 20)),
            cross_heads=cross,
            text_dim=int(data.get("caption_channels", 2304)),
            latent_channels=channels,
            head_dim=int(data.get("attention_head_dim", 32)),
            mlp_ratio=float(data.get("mlp_ratio", 2.5)),
            patch_size=patch,
            qk_norm=qk_norm is not None,
            guidance_embedding=guided,
            time_scale=1000.0 if guided else 1000.0 * float(data.get("timestep_scale", 1.0)),
        )
        if scale is None:
            return config
        base = int(data.get("sample_size", 32)) // patch
        return dataclasses.replace(config, position_scale=float(scale), position_base=base)


def read_controlnet(data: Json, source: str) -> ControlNetConfig:
    """The config of a SanaControlNetModel; the depth of its base is not said there."""
    dit = read_transformer({"num_layers": 7, **data}, source)
    return ControlNetConfig(dit=dit, depth=dit.depth)


def read_autoencoder(data: Json, source: str) -> DCAEConfig:
    """The config of an AutoencoderDC, with diffusers' defaults where a key is absent."""
    _require_fixed(data, FIXED_AUTOENCODER, source)
    with _naming(source):
        count = len(data["encoder_block_out_channels"])
        encoder = _read_stages(data, "encoder", ["rms_norm"] * count, ["silu"] * count)
        norms = _spread(data.get("decoder_norm_types", "rms_norm"), count)
        acts = _spread(data.get("decoder_act_fns", "silu"), count)
        return DCAEConfig(
            latent_channels=int(data.get("latent_channels", 32)),
            encoder=encoder,
            decoder=_read_stages(data, "decoder", norms, acts),
            down=_DOWNS[data.get("downsample_block_type", "pixel_unshuffle")],
            up=_UPS[data.get("upsample_block_type", "pixel_shuffle")],
            out_activation=_ACTIVATIONS[data.get("decoder_conv_act_fn", "relu")],
            head_dim=int(data.get("attention_head_dim", 32)),
            latent_scale=(float(data.get("scaling_factor", 1.0)),),
        )


def read_text(data: Json, source: str, *, max_tokens: int = 300) -> TextConfig:
    """The config.json of a Gemma-2."""
    if data.get("model_type") != "gemma2":
        raise CheckpointError(
            f"{source} is of a {data.get('model_type')!r}; the text encoder of a Sana model is a "
            "'gemma2'; copy the text_encoder folder of the model again"
        )
    with _naming(source):
        return TextConfig(
            kind="gemma2",
            width=int(data["hidden_size"]),
            max_tokens=max_tokens,
            layers=int(data["num_hidden_layers"]),
            heads=int(data["num_attention_heads"]),
            mlp_width=int(data["intermediate_size"]),
            vocabulary=int(data["vocab_size"]),
        )


def read_sampling(data: Json, default: SamplingConfig, source: str) -> SamplingConfig:
    """What a scheduler_config.json changes of a model's defaults: the sampler and its shift."""
    kind = str(data.get("_class_name"))
    if kind == "SCMScheduler":
        return dataclasses.replace(default, sampler="scm", shift=1.0, integer_times=False)
    keys = {"DPMSolverMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
    if kind not in keys:
        raise CheckpointError(
            f"{source} names the scheduler {kind!r}; known are SCMScheduler, {', '.join(keys)}: "
            "put the model's own scheduler_config.json back"
        )
    with _naming(source):
        shift = float(data.get(keys[kind], default.shift))
        return dataclasses.replace(
            default,
            shift=shift,
            sampler="dpm" if kind.startswith("DPM") else "euler",
            integer_times=kind.startswith("DPM"),
        )


def write_network(config: NetworkConfig, *, sample_size: int = 32) -> dict[str, Any]:
    """The config.json that diffusers builds the same network from."""
    version = {"_diffusers_version": "0.32.0"}
    if isinstance(config, DCAEConfig):
        return {"_class_name": CLASSES["autoencoder"], **version, **_write_autoencoder(config)}
    if isinstance(config, ControlNetConfig):
        dit = dataclasses.replace(config.dit, depth=config.depth)
        data = _write_transformer(dit, sample_size)
        for key in ("qk_norm", "guidance_embeds", "guidance_embeds_scale", "timestep_scale"):
            del data[key]
        return {"_class_name": CLASSES["controlnet"], **version, **data}
    if config.refiner is not None:
        raise CheckpointError(
            "this transformer has a refiner of text states, which no official model has; it can be "
            "kept in our layout only"
        )
    return {
        "_class_name": CLASSES["transformer"],
        **version,
        **_write_transformer(config, sample_size),
    }


def write_scheduler(sampling: SamplingConfig) -> dict[str, Any]:
    """The scheduler_config.json with a model's defaults."""
    if sampling.sampler == "scm":
        return {
            "_class_name": "SCMScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "trigflow",
            "sigma_data": 0.5,
        }
    if sampling.sampler == "euler":
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": sampling.shift,
        }
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": sampling.shift,
    }


def write_gemma() -> dict[str, Any]:
    """The config.json of Gemma-2-2B, for files that came without one."""
    config = GemmaConfig()
    return {
        "architectures": ["Gemma2Model"],
        "model_type": "gemma2",
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "vocab_size": config.vocabulary,
        "query_pre_attn_scalar": int(config.query_scale),
        "attn_logit_softcapping": config.soft_cap,
        "sliding_window": config.window,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
    }


def _write_transformer(config: DiTConfig, sample_size: int) -> dict[str, Any]:
    if config.position_scale is not None:
        sample_size = config.position_base * config.patch_size
    return {
        **FIXED_TRANSFORMER,
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
        "sample_size": sample_size,
        "patch_size": config.patch_size,
        "interpolation_scale": config.position_scale,
        "qk_norm": QK_NORM if config.qk_norm else None,
        "guidance_embeds": config.guidance_embedding,
        "timestep_scale": config.time_scale / 1000.0,
    }


def _write_autoencoder(config: DCAEConfig) -> dict[str, Any]:
    if len(config.latent_scale) > 1 or any(config.latent_mean):
        raise CheckpointError(
            "this autoencoder has its own mean or scale for each latent channel, and diffusers "
            "knows one scale for all; it can be kept in our layout only"
        )
    data: dict[str, Any] = {
        **FIXED_AUTOENCODER,
        "latent_channels": config.latent_channels,
        "attention_head_dim": config.head_dim,
        "downsample_block_type": config.down,
        "upsample_block_type": config.up,
        "decoder_norm_types": [_NORM_NAMES[stage.norm] for stage in config.decoder],
        "decoder_act_fns": [stage.activation for stage in config.decoder],
        "decoder_conv_act_fn": config.out_activation,
        "scaling_factor": config.latent_scale[0],
    }
    for side, stages in (("encoder", config.encoder), ("decoder", config.decoder)):
        data[f"{side}_block_types"] = [_BLOCK_NAMES[stage.block] for stage in stages]
        data[f"{side}_block_out_channels"] = [stage.width for stage in stages]
        data[f"{side}_layers_per_block"] = [stage.depth for stage in stages]
        data[f"{side}_qkv_multiscales"] = [list(stage.scales) for stage in stages]
    return data


def _read_stages(
    data: Json, side: str, norms: Sequence[str], acts: Sequence[str]
) -> tuple[StageConfig, ...]:
    widths = data[f"{side}_block_out_channels"]
    kinds = _spread(data[f"{side}_block_types"], len(widths))
    depths, scales = data[f"{side}_layers_per_block"], data[f"{side}_qkv_multiscales"]
    stages = []
    for index, width in enumerate(widths):
        attends = _BLOCKS[kinds[index]] == "efficientvit"
        stages.append(
            StageConfig(
                width=int(width),
                depth=int(depths[index]),
                block=_BLOCKS[kinds[index]],
                scales=tuple(map(int, scales[index])) if attends else (),
                norm=_NORMS[norms[index]],
                # The blocks with attention use SiLU whatever is said.
                activation="silu" if attends else _ACTIVATIONS[acts[index]],
            )
        )
    return tuple(stages)


def _spread(value: Any, count: int) -> list[str]:
    """One value for all stages, or one for each."""
    return [value] * count if isinstance(value, str) else list(value)


def _require_fixed(data: Json, fixed: Json, source: str) -> None:
    for key, value in fixed.items():
        given = data.get(key, value)
        if given != value and given is not None:
            raise CheckpointError(
                f"{source} has {key} {given!r}; the networks here have {value!r} and no other: use "
                "a model of the official family"
            )


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """What is absent, misspelt or of the wrong type becomes one sentence about `source`."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{source} lacks or does not know {error}; get it again") from None
    except (TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} has a value of the wrong kind ({error})") from None


_ACTIVATIONS: Mapping[str, Activation] = {"relu": "relu", "silu": "silu"}
_NORMS: Mapping[str, NormKind] = {"rms_norm": "rms", "batch_norm": "batch"}
_NORM_NAMES = {kind: name for name, kind in _NORMS.items()}
_BLOCKS: Mapping[str, BlockKind] = {"ResBlock": "residual", "EfficientViTBlock": "efficientvit"}
_BLOCK_NAMES = {kind: name for name, kind in _BLOCKS.items()}
_DOWNS: Mapping[str, Literal["conv", "pixel_unshuffle"]] = {
    "conv": "conv",
    "Conv": "conv",
    "pixel_unshuffle": "pixel_unshuffle",
}
_UPS: Mapping[str, Literal["interpolate", "pixel_shuffle"]] = {
    "interpolate": "interpolate",
    "pixel_shuffle": "pixel_shuffle",
}
