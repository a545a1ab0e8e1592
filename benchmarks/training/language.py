"""A byte-level language model whose linear layers are made by a contestant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.layers import Make

BYTES = 256


class Block(nn.Module):
    """Causal attention and a gated-free MLP of four times the width, each behind a layer norm."""

    def __init__(self, width: int, heads: int, make: Make) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = make(width, 3 * width), make(width, width)
        self.up, self.down = make(width, 4 * width), make(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.between(x))))


class LanguageModel(nn.Module):
    """Bytes (batch, length) to the logits (batch, length, 256) of the byte that follows each.

    The embedding, the positions and the head are dense in every contestant; what is compared, and
    counted as block parameters, stands in ``blocks``.
    """

    def __init__(self, make: Make, *, blocks: int, width: int, length: int, heads: int = 4) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        nn.init.normal_(self.bytes.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, make) for _ in range(blocks))
        self.after = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.after(x))
        return logits

    def block_parameters(self) -> int:
        """Parameters of all blocks."""
        return sum(parameter.numel() for parameter in self.blocks.parameters())
