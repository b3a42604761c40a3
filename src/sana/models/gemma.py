"""Gemma-2 as a text encoder: a prompt's states after the instruction.

`Gemma2` puts the instruction before a prompt and keeps the states of the first token and of those
behind the instruction. Attention is causal, so the instruction's keys and values are the same for
every prompt: they are computed once. Nothing is padded, except where NVIDIA's convention reads
padding. The network is `gemma_decoder`'s.

Shape letters: B prompts, P tokens before, T tokens, W width, K key heads, D head width.
Precision: that of the network; in fp16 the states overflow, so it is refused, and autocast is
switched off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sana.config import GemmaConfig, Reference
from sana.errors import CheckpointError
from sana.models.gemma_decoder import GemmaDecoder, Memory, adjoin, joins
from sana.models.instruction import INSTRUCTIONS
from sana.models.sending import sent
from sana.models.text import PromptTokenizer, TextStates

logger = logging.getLogger(__name__)

PADDING = 0
"""Gemma's token number of <pad>."""
BLOCK = 64
"""With a `Replay`, tokens are padded to multiples of so many, so that prompts share its shapes."""
Replay: TypeAlias = Callable[..., Tensor]
"""(function, owner of its weights, *inputs) -> its result, perhaps from a graph of the call."""


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The instruction but for its last token, which may melt into the prompt's first word."""

    ids: list[int]
    first: Tensor  # [1, W], the state of the first token
    memory: Memory


class Gemma2(nn.Module):
    """Prompts to the last normed states of Gemma-2, `max_tokens` of them at most.

    `reference` chooses the quotes in the instruction, and diffusers' prompts are lower-cased.
    """

    def __init__(
        self,
        config: GemmaConfig,
        tokenizer: str,
        *,
        max_tokens: int = 300,
        reference: Reference = "nvidia",
    ) -> None:
        super().__init__()
        self.width = config.width
        self.max_tokens = max_tokens
        self.instruction = INSTRUCTIONS[reference]
        self.lowers = reference == "diffusers"
        self.tokenizer = PromptTokenizer(tokenizer, max_tokens)
        _check_tokenizer(self.tokenizer, config)
        self.model = GemmaDecoder(config)
        self._prefix: _Prefix | None = None
        self._empty: tuple[tuple[object, ...], Tensor] | None = None
        register: Any = self.register_load_state_dict_post_hook
        register(_forget_prefix)
        self.requires_grad_(False)
        self.eval()

    def tokenize(self, prompts: Sequence[str], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """Token numbers and mask without the instruction; see `PromptTokenizer.tokenize`."""
        return self.tokenizer.tokenize(prompts, pad_to)

    @torch.no_grad()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last normed states [B, T, W] of ids [B, T]; `CheckpointError` in float16."""
        return self._run(ids, mask)[0]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, replay: Replay | None = None) -> TextStates:
        """Each prompt after the instruction: its first token's state and those of the prompt.

        With `replay` each is read through it in one of few lengths, padding behind it unread.
        """
        return _padded([self._after_instruction(self._clean(prompt), replay) for prompt in prompts])

    @torch.no_grad()
    def encode_negative(
        self,
        prompts: Sequence[str],
        length: int | None = None,
        *,
        replay: Replay | None = None,
    ) -> TextStates:
        """Prompts without the instruction, as unconditional texts are.

        With `length`, states go on over padding up to there; the mask still ends at the prompt.
        """
        rows, masks = [], []
        for prompt in map(self._clean, prompts):
            ids, _ = self.tokenizer.tokenize([prompt])
            missing = max(0, (length or 0) - ids.shape[1])
            mask = F.pad(torch.ones_like(ids, dtype=torch.bool), (0, missing))
            ids = F.pad(ids, (0, missing), value=PADDING)
            read = partial(self._read, ids, mask if missing else None, None, replay)
            rows.append(read()[0] if prompt else self._nothing(missing, read))
            masks.append(mask[0])
        return TextStates(
            states=pad_sequence(rows, batch_first=True), mask=pad_sequence(masks, batch_first=True)
        )

    def _nothing(self, missing: int, read: Callable[[], Tensor]) -> Tensor:
        """States [T, W] of the empty prompt before so much padding; the last are kept."""
        weight = self.model.embed_tokens.weight
        key = (missing, weight.device, weight.dtype)
        if self._empty is None or self._empty[0] != key:
            self._empty = key, read()[0].clone()
        return self._empty[1]

    def _clean(self, prompt: str) -> str:
        return prompt.lower().strip() if self.lowers else prompt.strip()

    def _after_instruction(self, prompt: str, replay: Replay | None) -> Tensor:
        """[T, W]: position 0 and the last `max_tokens` - 1 that instruction and prompt can have.

        The first of those last is the instruction's final token, a space that may melt into the
        prompt's first word (family-spec section 4).
        """
        prefix = self._instruction_prefix()
        end = len(prefix.ids)
        ids = self.tokenizer.numbers(self.instruction + prompt)
        excess = len(ids) - (end + self.max_tokens - 1)
        if excess > 0:
            logger.warning(
                "the prompt %r has %d tokens and %d are read: its end is ignored, so shorten it",
                prompt[:60],
                len(ids) - end,
                self.max_tokens - 1,
            )
            ids = ids[:-excess]
        shared = _common(prefix.ids, ids)
        if shared == len(ids):
            return prefix.first
        memory = prefix.memory
        if shared < end:
            memory = [(key[:, :, :shared], value[:, :, :shared]) for key, value in memory]
        states = self._read(torch.tensor([ids[shared:]]), None, memory, replay)
        return torch.cat([prefix.first, states[0, end - shared :]])

    def _instruction_prefix(self) -> _Prefix:
        """Computed at the first prompt, and again after other weights or another device or dtype.

        A memory of the weights alone: no prompt changes it.
        """
        weight = self.model.embed_tokens.weight
        kept = self._prefix
        if kept is None or (kept.first.device, kept.first.dtype) != (weight.device, weight.dtype):
            ids = self.tokenizer.numbers(self.instruction)[:-1]
            states, memory = self._run(torch.tensor([ids]), keeps=True)
            kept = _Prefix(ids=ids, first=states[0, :1].clone(), memory=memory)
            self._prefix = kept
        return kept

    def _read(
        self, ids: Tensor, mask: Tensor | None, memory: Memory | None, replay: Replay | None
    ) -> Tensor:
        """States [B, T, W], through `replay` if there is one."""
        if replay is None:
            return self._run(ids, mask, memory)[0]
        length, device = ids.shape[1], self.model.embed_tokens.weight.device
        # Attention is causal: what is behind a token never reaches it.
        ids = sent(F.pad(ids, (0, -length % BLOCK), value=PADDING), device)
        marks: Any = ()
        if mask is not None:
            marks = sent(F.pad(mask, (0, -length % BLOCK)), device)
        return replay(self._replayed, self.model, ids, marks, tuple(memory or ()))[:, :length]

    def _replayed(self, ids: Tensor, marks: Any, memory: tuple[Any, ...]) -> Tensor:
        return self._run(ids, marks if isinstance(marks, Tensor) else None, list(memory) or None)[0]

    def _run(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        memory: Memory | None = None,
        *,
        keeps: bool = False,
    ) -> tuple[Tensor, Memory]:
        """States, and with `keeps` the memory of all tokens for those that follow."""
        weight = self.model.embed_tokens.weight
        if weight.dtype == torch.float16:
            raise CheckpointError(
                "Gemma-2 is in float16, where its states overflow to infinity; use bfloat16 or "
                "float32"
            )
        with torch.autocast(weight.device.type, enabled=False):
            mask = None if mask is None else mask.to(weight.device)
            if joins(weight):
                adjoin(self.model)
            result: tuple[Tensor, Memory]
            result = self.model(ids.to(weight.device), mask, memory, keeps=keeps)
        return result


def gemma_config(data: Mapping[str, Any], source: str) -> GemmaConfig:
    """From a transformers config.json, of version 4 or 5; `CheckpointError` if it is another's."""
    if data.get("model_type") != "gemma2":
        raise CheckpointError(
            f"{source} describes a {data.get('model_type')!r} model; Sana reads its prompts with "
            "gemma2; give the folder of Gemma-2-2B-it"
        )
    rope = data.get("rope_parameters") or {}
    try:
        return GemmaConfig(
            width=data["hidden_size"],
            layers=data["num_hidden_layers"],
            heads=data["num_attention_heads"],
            key_heads=data["num_key_value_heads"],
            head_dim=data["head_dim"],
            mlp_width=data["intermediate_size"],
            vocabulary=data["vocab_size"],
            query_scale=data.get("query_pre_attn_scalar", 256),
            soft_cap=data.get("attn_logit_softcapping") or torch.inf,
            window=data.get("sliding_window") or 4096,
            rope_theta=rope.get("rope_theta") or data.get("rope_theta", 10000.0),
            norm_eps=data.get("rms_norm_eps", 1e-6),
        )
    except KeyError as error:
        raise CheckpointError(f"{source} has no {error}; get it again") from None


def _check_tokenizer(tokenizer: PromptTokenizer, config: GemmaConfig) -> None:
    if tokenizer.size > config.vocabulary:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.size} tokens and Gemma-2 has rows for "
            f"{config.vocabulary}; use the tokenizer that the weights came with"
        )
    empty = tokenizer.numbers("")
    if len(empty) != 1:
        raise CheckpointError(
            f"the tokenizer makes tokens {empty} of an empty prompt; Gemma's makes <bos> alone; "
            "use the tokenizer that the weights came with"
        )


def _forget_prefix(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, Gemma2)
    module._prefix = None
    module._empty = None


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _padded(rows: Sequence[Tensor]) -> TextStates:
    """Rows [T, W] of different lengths, side by side."""
    ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    mask = pad_sequence(ones, batch_first=True)
    return TextStates(states=pad_sequence(list(rows), batch_first=True), mask=mask)
