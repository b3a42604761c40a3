"""The text seat: prompts in, one state for each token and a mask out (family-spec section 4).

Two occupants: `MiniLM` (all-MiniLM-L6-v2, a six-layer BERT), here, for the default model, and
`Gemma2`, in `gemma`, for the official ones. Tokens are padded on the right; the states of real
tokens do not depend on the padding. Both are frozen: no gradients, no dropout. Start reading at
`TextEncoder`.

Shapes: B prompts, T tokens, W width of the states.
Precision: states come in the dtype of the weights (or of autocast).
"""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor, nn

from sana.config import TextConfig
from sana.errors import CheckpointError, RequestError
from sana.models.bert import Bert
from sana.models.sending import sent

logger = logging.getLogger(__name__)

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MARKS = ".,:;!?'\"()-"
_WORDS = (
    "a an the and of on in with two three four left right above below next to sticker flat style "
    "red orange yellow green blue purple pink brown black white background cat dog fox apple car "
    "person smiling wearing glasses hair short long shirt"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStates:
    """Encoded prompts: `states` [B, T, W] on the encoder's device.

    `mask` [B, T], true for real tokens, is on the CPU, where it can be read without waiting.
    """

    states: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """What a pipeline needs of a language model; the empty prompt is the unconditional text.

    `encode_negative` reads the unconditional text, which for Gemma goes without the instruction;
    with `length` it makes states of padding up to there, which NVIDIA's convention needs.
    """

    width: int

    def tokenize(
        self, prompts: Sequence[str], pad_to: int | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def states(self, ids: Tensor, mask: Tensor) -> Tensor: ...

    def encode(self, prompts: Sequence[str]) -> TextStates: ...

    def encode_negative(self, prompts: Sequence[str], length: int | None = None) -> TextStates: ...


class PromptTokenizer:
    """Prompts to padded token numbers; small and picklable, so that data workers can hold one."""

    def __init__(self, definition: str, max_tokens: int) -> None:
        """`definition` is the text of a tokenizer.json; its own padding and truncation are ignored.

        Raises `CheckpointError` if it cannot be read.
        """
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(definition)
        except Exception as error:  # tokenizers raises the bare Exception class
            raise CheckpointError(
                f"the tokenizer definition cannot be read ({error}); it must be the text of a "
                "tokenizer.json; get the weight file again"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.definition = definition
        self.max_tokens = max_tokens

    @property
    def size(self) -> int:
        """One more than the highest token number: the rows that an embedding must have."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def tokenize(self, prompts: Sequence[str], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """Token numbers int64 [B, T] and mask bool [B, T], T = `pad_to` or the longest prompt's.

        Prompts over `max_tokens` (or `pad_to`) lose their end, and one warning says how many did.
        """
        ids, mask, _ = self.tokenize_with_offsets(prompts, pad_to)
        return ids, mask

    def tokenize_with_offsets(
        self, prompts: Sequence[str], pad_to: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `tokenize`, and int64 [B, T, 2]: each token's characters [start, end) in its prompt.

        Special tokens and padding have the empty range (0, 0).
        """
        if isinstance(prompts, str) or not prompts:
            raise RequestError(f"{prompts!r} is not a list of prompts; give at least one in a list")
        limit = self.max_tokens if pad_to is None else min(pad_to, self.max_tokens)
        encodings = self._tokenizer.encode_batch(list(prompts))
        self._warn_if_cut(prompts, encodings, limit)
        kept = [_kept(encoding, limit) for encoding in encodings]
        length = pad_to or max(len(positions) for positions in kept)
        ids = torch.zeros(len(kept), length, dtype=torch.int64)
        mask = torch.zeros(len(kept), length, dtype=torch.bool)
        offsets = torch.zeros(len(kept), length, 2, dtype=torch.int64)
        for row, (encoding, positions) in enumerate(zip(encodings, kept, strict=True)):
            count = len(positions)
            ids[row, :count] = torch.tensor([encoding.ids[i] for i in positions])
            offsets[row, :count] = torch.tensor([encoding.offsets[i] for i in positions])
            mask[row, :count] = True
        return ids, mask, offsets

    def numbers(self, text: str) -> list[int]:
        """All token numbers of one text, special ones included, however long it is."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _warn_if_cut(
        self, prompts: Sequence[str], encodings: Sequence[Encoding], limit: int
    ) -> None:
        over = [index for index, encoding in enumerate(encodings) if len(encoding.ids) > limit]
        if over:
            first = encodings[over[0]]
            logger.warning(
                "%d of %d prompts are longer than the %d tokens that are read; %r has %d: its end "
                "is ignored, so shorten it",
                len(over),
                len(prompts),
                limit,
                prompts[over[0]][:60],
                len(first.ids),
            )


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2 without its pooler; `states` are the last hidden states, width 384.

    The state dict has the names of transformers' BertModel under `bert.`; the position table has
    `max_tokens` rows and the token type table one.
    """

    def __init__(self, config: TextConfig, tokenizer: str) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.tokenizer = PromptTokenizer(tokenizer, config.max_tokens)
        if self.tokenizer.size > config.vocabulary:
            raise CheckpointError(
                f"the tokenizer has {self.tokenizer.size} tokens and the network has "
                f"{config.vocabulary}; every token needs its row; use the tokenizer that the "
                "weights came with"
            )
        self.bert = Bert(config)
        self.requires_grad_(False)
        self.eval()

    def tokenize(self, prompts: Sequence[str], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """See `PromptTokenizer.tokenize`."""
        return self.tokenizer.tokenize(prompts, pad_to)

    def tokenize_with_offsets(
        self, prompts: Sequence[str], pad_to: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PromptTokenizer.tokenize_with_offsets`."""
        return self.tokenizer.tokenize_with_offsets(prompts, pad_to)

    @torch.no_grad()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [B, T, W] of token numbers [B, T], both on the encoder's device."""
        states: Tensor = self.bert(ids, mask)
        return states

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """Tokenize and run."""
        ids, mask = self.tokenize(prompts)
        device = next(self.bert.parameters()).device
        states = self.states(sent(ids, device), sent(mask, device))
        return TextStates(states=states, mask=mask)

    def encode_negative(self, prompts: Sequence[str], length: int | None = None) -> TextStates:
        """As `encode`: this encoder has no instruction, and its padding is never read."""
        return self.encode(prompts)


def small_tokenizer(vocabulary: int) -> str:
    """A WordPiece tokenizer.json of letters, digits, marks and common words, for `tiny` and tests.

    It has at most `vocabulary` tokens, always the same ones; `vocabulary` must hold the letters.
    """
    letters = string.ascii_lowercase + string.digits
    pieces = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *_MARKS]
    if vocabulary < len(pieces):
        raise CheckpointError(
            f"a vocabulary of {vocabulary} is too small to spell words; it needs {len(pieces)}"
        )
    pieces += [word for word in _WORDS if word not in pieces][: vocabulary - len(pieces)]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    ends = {name: {"id": name, "ids": [numbers[name]], "tokens": [name]} for name in _SPECIAL[2:4]}
    first, last = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ends)
    template = [first, {"Sequence": {"id": "A", "type_id": 0}}, last]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": numbers[name], "content": name, "special": True, **flags} for name in _SPECIAL
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}, last],
            "special_tokens": ends,
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": numbers,
        },
    }
    return json.dumps(definition)


def _kept(encoding: Encoding, limit: int) -> list[int]:
    """Positions that stay within `limit`; a closing special token is kept, as in training."""
    count = len(encoding.ids)
    if count <= limit:
        return list(range(count))
    closing = int(encoding.special_tokens_mask[-1])
    return [*range(limit - closing), *range(count - closing, count)]
