"""Two text classifiers over token ids x (B, length) int64, where 0 is padding: a bag of embeddings and a transformer.

Neither has running statistics or control flow that depends on the data, so `torch.func.vmap` maps both over clients.
For two classes both return logits (B,), otherwise (B, classes).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PADDING = 0


class BagOfEmbeddings(nn.Module):
    """The sum of the token embeddings over the root of their number, and a linear layer (Joulin et al., EACL 2017)."""

    def __init__(self, buckets: int, classes: int, dim: int = 32, dropout: float = 0.5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(buckets, dim)
        # A token that no client has trained yet should weigh little beside those that were.
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, 1 if classes == 2 else classes)

    def forward(self, x: Tensor) -> Tensor:
        states = self.embedding(x)
        written = (x != PADDING).to(states.dtype).unsqueeze(-1)
        # The root and not the number: with a mean, gradients are so small that plain SGD stands still for many rounds.
        bag = (states * written).sum(dim=1) / written.sum(dim=1).clamp(min=1).sqrt()
        return self.out(self.dropout(bag)).squeeze(-1)


class _Block(nn.Module):
    """One transformer layer, normalised before each part (Xiong et al., ICML 2020): it trains without a warm-up.

    Not nn.TransformerEncoder: in evaluation mode it takes fused kernels and nested tensors, for which vmap has no rule.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attended = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, blocked: Tensor) -> Tensor:
        """Return the next states (B, length, dim); `blocked` (B, 1, 1, length) is added to the attention scores."""
        batch, length, dim = states.shape
        qkv = self.qkv(self.attention_norm(states)).reshape(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) / math.sqrt(dim // self.heads) + blocked
        mixed = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(batch, length, dim)
        states = states + self.dropout(self.attended(mixed))
        return states + self.dropout(self.feed_forward(self.feed_forward_norm(states)))


class TextTransformer(nn.Module):
    """Token and learnt position embeddings, one transformer layer, and the mean of the tokens' last states."""

    def __init__(
        self, buckets: int, classes: int, length: int, dim: int = 32, heads: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(buckets, dim)
        self.positions = nn.Parameter(torch.zeros(length, dim))
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.normal_(self.positions, std=0.02)
        self.block = _Block(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, 1 if classes == 2 else classes)

    def forward(self, x: Tensor) -> Tensor:
        written = (x != PADDING).to(self.positions.dtype)
        # Finite, so that a text without any token gets even attention and not nan.
        blocked = ((1 - written) * -1e4)[:, None, None, :]
        states = self.block(self.embedding(x) + self.positions, blocked)
        weights = written.unsqueeze(-1)
        mean = (self.norm(states) * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return self.out(self.dropout(mean)).squeeze(-1)
