"""How well embeddings agree with those of the original model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 10


@dataclass(frozen=True)
class Agreement:
    """Embeddings compared with the original's, over the held-out sentences.

    Attributes:
        cosine: Mean cosine between a sentence's two embeddings.
        cosine_low: 5 % of the sentences have a lower one.
        overlap: Mean share of a sentence's ten nearest neighbours that stay among the ten.
        spearman: Mean over the sentences of the rank correlation of its similarities to the others.
    """

    cosine: float
    cosine_low: float
    overlap: float
    spearman: float


def agreement(embeddings: Tensor, original: Tensor) -> Agreement:
    """Compare embeddings (S, E) of unit length, of more than ten sentences."""
    cosines = (embeddings.double() * original.double()).sum(1)
    ours, theirs = _similarities(embeddings), _similarities(original)
    top = [similar.topk(NEIGHBOURS, dim=1).indices for similar in (ours, theirs)]
    shared = (top[0].unsqueeze(2) == top[1].unsqueeze(1)).any(2).double().mean()
    return Agreement(
        cosines.mean().item(),
        cosines.quantile(0.05).item(),
        shared.item(),
        _spearman(ours, theirs).mean().item(),
    )


def _similarities(embeddings: Tensor) -> Tensor:
    """(S, S − 1): of each sentence to each other one."""
    rows = embeddings.double()
    count = len(rows)
    others = ~torch.eye(count, dtype=torch.bool)
    return (rows @ rows.t())[others].view(count, count - 1)


def _spearman(one: Tensor, other: Tensor) -> Tensor:
    """Rank correlation along the rows; ties, which do not occur, would be broken by place."""
    ranks = [values.argsort(1).argsort(1).double() for values in (one, other)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    product = (centred[0] * centred[1]).sum(1)
    correlation: Tensor = product / (centred[0].norm(dim=1) * centred[1].norm(dim=1))
    return correlation
