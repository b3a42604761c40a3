"""A BERT encoder (arXiv 1810.04805) without its pooler, for inference: no dropout.

Submodules have the names of transformers' BertModel (hence `LayerNorm` and `self`), so its weights
load unchanged. It is written out here because importing transformers takes longer than reading a
prompt. Start reading at `Bert`.

Shapes: B prompts, T tokens, W width, H heads, D = W / H.
Precision: the dtype of the weights or of autocast, throughout.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sana.config import TextConfig

EPS = 1e-12


class Bert(nn.Module):
    """Token numbers to last hidden states; one token type, learned positions, post-norm blocks."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, T] and mask bool [B, T], true for tokens to attend to -> [B, T, W].

        T is at most `max_tokens`, and every prompt has a real token.
        """
        states: Tensor = self.encoder(self.embeddings(ids), mask[:, None, None, :])
        return states


class Embeddings(nn.Module):
    """Token numbers [B, T] -> normed sum of word, position and token type vectors [B, T, W]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.width)
        self.position_embeddings = nn.Embedding(config.max_tokens, config.width)
        self.token_type_embeddings = nn.Embedding(1, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=EPS)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: ids.shape[1]]  # [T, W]
        token_type = self.token_type_embeddings.weight[0]  # [W]
        embedded: Tensor = self.LayerNorm(self.word_embeddings(ids) + positions + token_type)
        return embedded


class Encoder(nn.Module):
    """The blocks, one after another."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Layer(nn.Module):
    """Attention, then a two-layer perceptron with the exact GELU; x [B, T, W]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.mlp_width, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention(x, mask)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class Attention(nn.Module):
    """Self-attention with its output projection, residual and norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.output(self.self(x, mask), x)
        return out


class SelfAttention(nn.Module):
    """Softmax attention of H heads; mask bool [B, 1, 1, T]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, D]
            for projection in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).flatten(2)  # [B, T, W]


class Intermediate(nn.Module):
    """The perceptron's first layer with its GELU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Output(nn.Module):
    """A linear layer, then the norm of its sum with the residual."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim_in, dim_out)
        self.LayerNorm = nn.LayerNorm(dim_out, eps=EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dense(x) + residual)
        return normed
