"""One model of random weights as three pipelines: ours in bf16, ours in fp32, and diffusers'.

For `generate.py`. All hold the same tensors, drawn on the device; the fp32 ones are the bf16 ones
widened, and are drawn from with the plain ops of `kernels.reference`. Says how far from fp32 a
velocity, a decoded picture and a whole run are in bf16, ours and the peer's. Without diffusers the
peer is our own network with the plain ops. Start reading at `Rig`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.parity import Networks, filled, rel_rms, shrunk
from gemmas import TINY, gemma_tokenizer, peer_tokenizer
from sana.config import GemmaConfig, ModelConfig, TextConfig, with_reference
from sana.kernels.ops import force
from sana.kernels.reference import FP8
from sana.models.gemma import Gemma2
from sana.models.rounding import narrow
from sana.models.tiling import decode_tiled
from sana.pipelines.pipeline import Pipeline
from sana.pipelines.timing import last_latent
from sana.presets import preset
from sana.request import Request
from sana.weights.configs import write_scheduler
from sana.weights.load import Components

Tile: TypeAlias = int | tuple[int, int] | None
NARROW, WIDE = torch.bfloat16, torch.float32
PROMPT = (
    "a photo of a red fox with blue eyes in the snow, left of a cat, with two mountain "
    "and three cat right of the fox"
)
FP32_BOUND = 1e-5
RATIO_BOUND = 1.5
LOOP_BOUND = 2.0
FP8_BOUND = 6.0
"""A run of 20 steps adds up the rounding of each, and two runs that are alike differ by a third.
A product in fp8 is coarser by 16 than one in bf16; a result may be so by `FP8_BOUND`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How far results are from fp32, as relative RMS; what may be printed as agreeing."""

    what: str
    ours: float
    """Ours in bf16, from the reference in fp32."""
    theirs: float
    """Likewise the peer's, or our own with plain ops."""
    bound: float
    """On ours over theirs."""
    wide: float | None = None
    """Ours in fp32 from the peer's in fp32."""

    @property
    def passes(self) -> bool:
        """False for NaN as well."""
        is_wide = self.wide is None or self.wide <= FP32_BOUND
        return is_wide and self.ours <= self.bound * self.theirs < 1

    def __str__(self) -> str:
        wide = "" if self.wide is None else f", fp32 {self.wide:.1e}"
        verdict = "agrees" if self.passes else "DISAGREES"
        return f"{self.what}: ours {self.ours:.2e}, peer {self.theirs:.2e}{wide}: {verdict}"


class Texts:
    """Gemma-2 of random weights for all rigs: ours in both dtypes, and transformers' in bf16."""

    def __init__(self, device: torch.device, *, is_tiny: bool, has_peer: bool) -> None:
        self.config = TINY if is_tiny else GemmaConfig()
        with torch.device("meta"):
            plain = Gemma2(self.config, gemma_tokenizer(), reference="diffusers").model
        generator = torch.Generator(device).manual_seed(5)
        state = {}
        for name, tensor in plain.state_dict().items():
            fan = tensor.shape[-1] if tensor.ndim > 1 else 10
            drawn = torch.randn(tensor.shape, generator=generator, device=device)
            state[name] = (drawn / fan**0.5).to(NARROW)
        self.ours = {dtype: self._ours(state, dtype) for dtype in (NARROW, WIDE)}
        self.theirs = _peer_encoder(self.config, state, device) if has_peer else None
        self.tokenizer = peer_tokenizer() if has_peer else None

    def _ours(self, state: dict[str, Tensor], dtype: torch.dtype) -> Gemma2:
        with torch.device("meta"):
            made = Gemma2(self.config, gemma_tokenizer(), reference="diffusers")
        filled(made.model, {name: tensor.to(dtype) for name, tensor in state.items()})
        return made


class Rig:
    """A model by the name of its preset, of random weights, ours and the peer's."""

    def __init__(
        self,
        name: str,
        texts: Texts,
        autoencoder: Networks,
        config: ModelConfig,
        *,
        batch: int,
        in_fp8: bool = False,
    ) -> None:
        self.name, self.texts, self.autoencoder, self.config = name, texts, autoencoder, config
        self.device = autoencoder.ours[NARROW].decoder.stem.weight.device
        self.has_peer = texts.theirs is not None
        self.dit = Networks(config.dit, self.device, has_peer=self.has_peer)
        self.narrow = FP8 if in_fp8 else NARROW
        if in_fp8:
            self.dit.ours[FP8] = copy.deepcopy(self.dit.ours[NARROW])
            narrow(self.dit.ours[FP8], FP8)
        self.ours = Pipeline(self._components(self.narrow), batch=batch)
        self.peer: Any = self._peer() if self.has_peer else None

    @property
    def reference_bytes(self) -> int:
        """What is held for the comparison alone."""
        networks = (self.dit.ours[WIDE], self.autoencoder.ours[WIDE], self.texts.ours[WIDE])
        return sum(p.nbytes for network in networks for p in network.parameters())

    def request(self, steps: int, batch: int = 1, **changes: Any) -> Request:
        """What every run draws."""
        fields = {"prompt": PROMPT, "seeds": 7, "count": batch, "steps": steps}
        fields |= {"guidance": 4.5, "binning": False, **changes}
        return Request(**fields)

    def ask_peer(self, request: Request, output: str = "pil") -> Any:
        """diffusers' answer to the same request: its pictures, or its last latents."""
        assert self.peer is not None
        sprint = self.config.dit.guidance_embedding
        options = {"intermediate_timesteps": None} if sprint and request.steps != 2 else {}
        side = self.config.pixels
        return self.peer(
            prompt=request.prompt,
            height=side,
            width=side,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            num_images_per_prompt=len(request.image_seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in request.image_seeds],
            use_resolution_binning=False,
            output_type=output,
            **options,
        ).images

    def check_velocity(self, side: int, count: int = 2) -> Check:
        """One forward pass of the transformer on latents of `side` cells, text of 300 slots."""
        velocity = self.velocity(side, count)
        with torch.inference_mode():
            if self.has_peer:
                reference = velocity("theirs", WIDE)
                wide = rel_rms(reference, velocity("ours", WIDE))
                theirs = rel_rms(reference, velocity("theirs", NARROW))
            else:
                with force("reference"):
                    reference, wide = velocity("ours", WIDE), None
                    theirs = rel_rms(reference, velocity("ours", NARROW))
            ours = rel_rms(reference, velocity("ours", self.narrow))
        bound = self._bound(RATIO_BOUND)
        return Check(what="velocity", ours=ours, theirs=theirs, bound=bound, wide=wide)

    def velocity(self, side: int, count: int = 2) -> Callable[[str, torch.dtype], Tensor]:
        """(ours or theirs, dtype) -> velocity of the same latents, times and texts."""
        config, device = self.config.dit, self.device
        generator = torch.Generator(device).manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        latent = draw(count, config.latent_channels, side, side)
        text = draw(count, 300, config.text_dim)
        lengths = torch.linspace(60, 2, count, device=device).int()
        mask = torch.arange(300, device=device) < lengths[:, None]
        # Whole thousandths: diffusers' network is told no others.
        time = torch.linspace(900, 400, count, device=device).round() / 1000
        scale = torch.full((count,), 4.5, device=device) if config.guidance_embedding else None

        def run(whose: str, dtype: torch.dtype) -> Tensor:
            if whose == "ours":
                result: Tensor = self.dit.ours[dtype](latent, time, text, mask, guidance=scale)
                return result
            options = {} if scale is None else {"guidance": (scale * 0.1).to(dtype)}
            result = self.dit.theirs[dtype](
                latent.to(dtype),
                encoder_hidden_states=text.to(dtype),
                timestep=time if scale is not None else (time * 1000).round(),
                encoder_attention_mask=mask.long(),
                return_dict=False,
                **options,
            )[0]
            return result

        return run

    def check_run(self, request: Request) -> Check:
        """The last latents of two whole runs; the second with other words and another seed.

        Of several pictures, in one run, the first and the last are compared. A run that gives an
        earlier one's result, or another picture's, is far from its own reference.
        """
        exact = Pipeline(self._components(WIDE))
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        reference: list[Tensor] = []
        requests = [request]
        if request.count == 1:
            requests.append(request.replace(prompt="a cat in the snow", seeds=(90,)))
        for asked in requests:
            got = last_latent(self.ours, asked)
            plain = self.ask_peer(asked, "latent") if self.has_peer else self._plain(asked)
            singles = asked.singles()
            for place in sorted({0, len(singles) - 1}):
                with force("reference"):
                    reference.append(last_latent(exact, singles[place]))
                ours.append(got[place : place + 1])
                theirs.append(plain[place : place + 1])
        expected = torch.cat(reference)
        return Check(
            what=f"{request.steps} step" + "s" * (request.steps != 1),
            ours=rel_rms(expected, torch.cat(ours)),
            theirs=rel_rms(expected, torch.cat(theirs)),
            bound=self._bound(LOOP_BOUND),
        )

    def _plain(self, request: Request) -> Tensor:
        with force("reference"):
            return last_latent(Pipeline(self._components(NARROW)), request)

    def _bound(self, of_bf16: float) -> float:
        return FP8_BOUND if self.narrow == FP8 else of_bf16

    def _components(self, dtype: torch.dtype) -> Components:
        beside = NARROW if dtype == FP8 else dtype
        return Components(
            config=self.config,
            dit=self.dit.ours[dtype],
            autoencoder=self.autoencoder.ours[beside],
            text=self.texts.ours[beside],
            header={},
        )

    def _peer(self) -> Any:
        import diffusers

        data = write_scheduler(self.config.sampling)
        scheduler = getattr(diffusers, data["_class_name"]).from_config(data)
        sprint = self.config.dit.guidance_embedding
        kind: Any = diffusers.SanaSprintPipeline if sprint else diffusers.SanaPipeline
        made = kind(
            tokenizer=self.texts.tokenizer,
            text_encoder=self.texts.theirs,
            vae=self.autoencoder.theirs[NARROW],
            transformer=self.dit.theirs[NARROW],
            scheduler=scheduler,
        )
        made.set_progress_bar_config(disable=True)
        return made


def model_config(name: str, *, is_tiny: bool) -> ModelConfig:
    """A preset by diffusers' rules, without the clamp of fp16, which bf16 does not need."""
    config = with_reference(preset(name).config, "diffusers")
    config = replace(config, dit=replace(config.dit, clamps=False), trained_on_bins=False)
    if not is_tiny:
        return config
    config = shrunk(config)
    text = TextConfig(
        kind="gemma2",
        width=TINY.width,
        max_tokens=300,
        layers=TINY.layers,
        heads=TINY.heads,
        mlp_width=TINY.mlp_width,
        vocabulary=TINY.vocabulary,
    )
    return replace(
        config, text=text, dit=replace(config.dit, text_dim=TINY.width), pixels=64, max_pixels=256
    )


def check_decoding(
    networks: Networks, latent: Tensor, tile: Tile = None, *, with_peer: bool
) -> Check:
    """A decoded picture, or one in tiles, whose joins the peer makes otherwise.

    Without the peer it is compared with our own plain ops.
    """

    with torch.inference_mode():
        has_peer = with_peer and bool(networks.theirs)
        plain = contextlib.nullcontext() if has_peer else force("reference")
        pair = networks.theirs if has_peer else networks.ours
        with plain:
            reference = decode(pair[WIDE], latent, tile)
            theirs = rel_rms(reference, decode(pair[NARROW], latent, tile))
        wide = rel_rms(reference, decode(networks.ours[WIDE], latent, tile)) if has_peer else None
        ours = rel_rms(reference, decode(networks.ours[NARROW], latent, tile))
    return Check(what="pixels", ours=ours, theirs=theirs, bound=RATIO_BOUND, wide=wide)


def decode(network: Any, latent: Tensor, tile: Tile = None) -> Tensor:
    """The pixels of either implementation's autoencoder; in tiles only ours."""
    if tile is not None:
        return decode_tiled(network, latent, tile=tile)
    result = network.decode(latent.to(next(network.parameters()).dtype))
    return result if isinstance(result, Tensor) else result.sample


def _peer_encoder(config: GemmaConfig, state: dict[str, Tensor], device: torch.device) -> Any:
    """transformers' network around the same tensors; eager attention, for its soft cap."""
    from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Model

    data = Gemma2Config(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        head_dim=config.head_dim,
        query_pre_attn_scalar=int(config.query_scale),
        attn_logit_softcapping=config.soft_cap,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = Gemma2Model(data)
    # What is computed from the config and is in no file.
    model.rotary_emb = type(model.rotary_emb)(data).to(device)
    model.embed_tokens.embed_scale = torch.tensor(config.width**0.5, device=device)
    return filled(model, state)
