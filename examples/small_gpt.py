"""A small causal transformer with the usual parts; shared by several examples.

checkpoint-planner plan examples/small_gpt.py:make --budget 60%
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 128


class Block(nn.Module):
    """Attention and a feed-forward network, each with a residual connection and dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes in and out: (batch, length, width)."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(F.gelu(self.up(self.norms[1](x)))))


class SmallGPT(nn.Module):
    """Predicts the next token; returns its loss."""

    def __init__(
        self, layers: int = 4, width: int = 64, heads: int = 4, length: int = 64, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids`: (batch, length) integers."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batch(rank: int, step: int, size: int = 8, length: int = 64) -> Tensor:
    """Tokens of one rank and step: counting up from a random start, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    start = torch.randint(0, VOCABULARY, (size, 1), generator=generator)
    return (start + torch.arange(length)) % VOCABULARY


def make() -> tuple[SmallGPT, tuple[Tensor]]:
    """For the command line: the model, and what it is called with."""
    return SmallGPT(), (batch(0, 0),)


def batches() -> tuple[SmallGPT, Callable[[int], tuple[Tensor]]]:
    """For `max-batch`: the model, and a function from a batch size to what it is called with."""
    return SmallGPT(), lambda size: (batch(0, 0, size),)
