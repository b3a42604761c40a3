"""Whole pipelines against diffusers' on one tiny set of components, from a prompt to the latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gemmas import TINY, peer_of, peer_tokenizer, tiny_gemma
from numerics import assert_detects, assert_matches
from parity.pairs import pair
from sana.config import ControlNetConfig, ModelConfig, SamplingConfig, TextConfig, with_reference
from sana.models.instruction import INSTRUCTIONS
from sana.pipelines.pipeline import Pipeline
from sana.request import Request
from sana.weights.load import Components
from weights.networks import BASE, DCAES

pytestmark = [
    pytest.mark.parity,
    # diffusers' DPM-Solver passes tensors to numpy in a way that numpy 2 deprecates.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"),
]

HEIGHT, WIDTH = 64, 96
PROMPT, NEGATIVE = "a red fox in the snow", "blurry"
DIT = replace(BASE, depth=3, text_dim=TINY.width)
SPRINT = replace(DIT, qk_norm=True, guidance_embedding=True)
CONTROL = ControlNetConfig(dit=DIT, depth=2)
AUTOENCODER = replace(DCAES["sana"], latent_scale=(0.41407,))


class Rig:
    """Our pipeline, and what diffusers' pipelines are built from, with the same weights."""

    def __init__(self, dit: Any, **fields: Any) -> None:
        text = TextConfig(
            kind="gemma2",
            width=TINY.width,
            max_tokens=300,
            layers=TINY.layers,
            heads=TINY.heads,
            mlp_width=TINY.mlp_width,
            vocabulary=TINY.vocabulary,
        )
        config = ModelConfig(
            name="parity",
            dit=dit,
            autoencoder=AUTOENCODER,
            text=text,
            pixels=64,
            max_pixels=128,
            controlnet=CONTROL,
            **fields,
        )
        gemma = tiny_gemma(reference="diffusers")
        self.transformer, ours = pair(dit)
        self.vae, autoencoder = pair(AUTOENCODER)
        self.controlnet, controlnet = pair(CONTROL, seed=5)
        self.text_encoder, self.tokenizer = peer_of(gemma), peer_tokenizer()
        self.components = Components(
            config=with_reference(config, "diffusers"),
            dit=ours,
            autoencoder=autoencoder,
            text=gemma,
            header={},
            controlnet=controlnet,
        )

    def peer(self, kind: Any, scheduler: Any, **more: Any) -> Any:
        """One of diffusers' pipelines, silent."""
        made = kind(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            transformer=self.transformer,
            scheduler=scheduler,
            **more,
        )
        made.set_progress_bar_config(disable=True)
        return made

    def latent(self, images: dict[str, Image.Image] | None = None, **fields: Any) -> Tensor:
        """Our last latent."""
        request = Request(
            **{"prompt": PROMPT, "seeds": 7, "height": HEIGHT, "width": WIDTH, **fields}
        )
        *_, last = Pipeline(self.components).steps(request, images)
        return last.latent


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(DIT)


@pytest.fixture(scope="module")
def sprint() -> Rig:
    sampling = SamplingConfig(shift=1.0, steps=2, sampler="scm", integer_times=False)
    return Rig(SPRINT, sampling=sampling)


def flow_scheduler(shift: float = 3.0) -> Any:
    return diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def asked(pipeline: Any, **options: Any) -> Tensor:
    """The peer's last latent, its noise from the same seed as ours."""
    result: Tensor = pipeline(
        **{"prompt": PROMPT, **options},
        height=HEIGHT,
        width=WIDTH,
        generator=[torch.Generator().manual_seed(7)],
        output_type="latent",
        use_resolution_binning=False,
    ).images
    return result


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def compare(expected: Tensor, latent: Callable[..., Tensor], **faults: Any) -> None:
    """Equal as it is, and unequal with any one of `faults` in the request."""

    def check(changes: dict[str, Any]) -> None:
        assert_matches(expected, latent(**changes), 1e-5)  # floor 2.9e-6

    check({})
    for name, value in faults.items():
        assert_detects(check, {name: value})


@pytest.mark.parametrize("shift", [3.0, 4.0])
@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_text_to_image(rig: Rig, negative: str, shift: float) -> None:
    peer = rig.peer(diffusers.SanaPipeline, flow_scheduler(shift))
    options = {"num_inference_steps": 4, "guidance_scale": 4.5}
    expected = asked(peer, negative_prompt=negative, **options)

    def latent(**changes: Any) -> Tensor:
        fields = {"steps": 4, "guidance": 4.5, "shift": shift, "negative_prompt": negative}
        return rig.latent(**{**fields, **changes})

    compare(expected, latent, guidance=4.51, shift=shift + 0.1, seeds=8, negative_prompt="fog")


def test_text_to_image_without_guidance(rig: Rig) -> None:
    peer = rig.peer(diffusers.SanaPipeline, flow_scheduler())
    expected = asked(peer, num_inference_steps=3, guidance_scale=1.0)

    def latent(**changes: Any) -> Tensor:
        return rig.latent(**{"steps": 3, "guidance": 1.0, **changes})

    compare(expected, latent, guidance=1.01)


def test_euler(rig: Rig) -> None:
    peer = rig.peer(diffusers.SanaPipeline, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    expected = asked(peer, num_inference_steps=3, guidance_scale=4.5)

    def latent(**changes: Any) -> Tensor:
        return rig.latent(**{"steps": 3, "guidance": 4.5, "sampler": "euler", **changes})

    compare(expected, latent, sampler="dpm")


def test_perturbed_attention_guidance(rig: Rig) -> None:
    peer = rig.peer(
        diffusers.SanaPAGPipeline, flow_scheduler(), pag_applied_layers="transformer_blocks.1"
    )
    expected = asked(peer, num_inference_steps=3, guidance_scale=4.5, pag_scale=2.0)

    def latent(**changes: Any) -> Tensor:
        fields = {"steps": 3, "guidance": 4.5, "pag_scale": 2.0, "pag_blocks": (1,)}
        return rig.latent(**{**fields, **changes})

    compare(expected, latent, pag_scale=2.01, pag_blocks=(0,))


def test_controlnet(rig: Rig) -> None:
    peer = rig.peer(diffusers.SanaControlNetPipeline, flow_scheduler(), controlnet=rig.controlnet)
    expected = asked(
        peer,
        control_image=picture(1),
        num_inference_steps=3,
        guidance_scale=4.5,
        controlnet_conditioning_scale=0.7,
    )

    def latent(**changes: Any) -> Tensor:
        fields = {"steps": 3, "guidance": 4.5, "control": "edges", "control_scale": 0.7}
        return rig.latent({"edges": picture(1), "other": picture(2)}, **{**fields, **changes})

    compare(expected, latent, control_scale=0.71, control="other")


def test_nvidias_convention(rig: Rig) -> None:
    """Double quotes, no lower case, and the prompt's mask for both halves, given to the peer."""
    peer = rig.peer(diffusers.SanaPipeline, flow_scheduler())
    states, mask, negative, _ = peer.encode_prompt(
        PROMPT,
        negative_prompt=NEGATIVE,
        device=torch.device("cpu"),
        complex_human_instruction=INSTRUCTIONS["nvidia"].split("\n"),
    )
    expected = asked(
        peer,
        prompt=None,
        negative_prompt=None,
        prompt_embeds=states,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=mask,
        num_inference_steps=3,
        guidance_scale=4.5,
    )
    request = Request(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        seeds=7,
        height=HEIGHT,
        width=WIDTH,
        steps=3,
        guidance=4.5,
    )
    config = with_reference(rig.components.config, "nvidia")
    nvidia = replace(rig.components, config=config, text=tiny_gemma(reference="nvidia"))

    def check(components: Components) -> None:
        *_, last = Pipeline(components).steps(request)
        assert_matches(expected, last.latent, 7e-6)  # floor 7.8e-7

    check(nvidia)
    assert_detects(check, replace(nvidia, config=rig.components.config))
    assert_detects(check, replace(nvidia, text=rig.components.text))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sprint(sprint: Rig, steps: int) -> None:
    peer = sprint.peer(diffusers.SanaSprintPipeline, diffusers.SCMScheduler())
    options = {} if steps == 2 else {"intermediate_timesteps": None}
    expected = asked(peer, num_inference_steps=steps, guidance_scale=4.5, **options)

    def latent(**changes: Any) -> Tensor:
        return sprint.latent(**{"steps": steps, "guidance": 4.5, **changes})

    compare(expected, latent, guidance=4.6, seeds=8, steps=3)


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.5), (2, 0.6), (4, 0.6)])
def test_sprint_image_to_image(sprint: Rig, steps: int, strength: float) -> None:
    peer = sprint.peer(diffusers.SanaSprintImg2ImgPipeline, diffusers.SCMScheduler())
    options = {} if steps == 2 else {"intermediate_timesteps": None}
    expected = asked(
        peer,
        image=picture(3),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=4.5,
        **options,
    )

    def latent(**changes: Any) -> Tensor:
        fields = {"steps": steps, "guidance": 4.5, "image": "start", "strength": strength}
        return sprint.latent({"start": picture(3), "other": picture(4)}, **{**fields, **changes})

    faults = {"guidance": 4.6} if (steps, strength) == (2, 0.6) else {"image": "other"}
    compare(expected, latent, **faults)
