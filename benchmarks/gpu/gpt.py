"""A small GPT whose linear layers in the blocks are dense or CP; embeddings and head are dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Of the model and its batch."""

    blocks: int = 12
    width: int = 1024
    heads: int = 16
    vocabulary: int = 50304
    context: int = 1024
    batch: int = 8

    @property
    def tokens(self) -> int:
        """Tokens in one step."""
        return self.batch * self.context


Make = Callable[[int, int], nn.Module]


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, size: Size, linear: Make, where: dict[str, Any]) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, **where) for _ in range(2))
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) → (B, L, width)."""
        B, L, width = x.shape
        q, k, v = (
            part.view(B, L, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, L, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Tokens to logits of the next token."""

    def __init__(self, size: Size, linear: Make, where: dict[str, Any]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width, **where)
        self.places = nn.Embedding(size.context, size.width, **where)
        self.blocks = nn.ModuleList(Block(size, linear, where) for _ in range(size.blocks))
        self.norm = nn.LayerNorm(size.width, **where)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False, **where)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) → (B, L, vocabulary)."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Training:
    """A model with its optimizer and static inputs; ``step`` is one whole training step."""

    def __init__(
        self, size: Size, linear: Make, where: dict[str, Any], compiler: str | None = None
    ) -> None:
        self.model: Any = GPT(size, linear, where)
        self.loss = self._loss if compiler is None else torch.compile(self._loss, backend=compiler)
        on_gpu = torch.device(where["device"]).type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, fused=on_gpu, capturable=on_gpu
        )
        shape = (size.batch, size.context)
        self.ids, self.targets = (
            torch.randint(size.vocabulary, shape, device=where["device"]) for _ in range(2)
        )

    def _loss(self) -> Tensor:
        logits = self.model(self.ids)
        return F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())

    def step(self) -> Tensor:
        """Forward, loss, backward, optimizer; the loss is returned and read by nobody."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
