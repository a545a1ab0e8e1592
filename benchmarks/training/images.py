"""A small convolutional network on scikit-learn's digits, its layers made by a contestant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polyadic
from benchmarks.training.layers import parsed


def convolution(name: str, inputs: int, outputs: int) -> nn.Module:
    """A 3×3 convolution of a contestant: ``dense``, ``lowrank:r16`` or ``cp:o2:r16``.

    Raises:
        ValueError: the kind has no convolution here.
    """
    kind, options = parsed(name)
    if kind == "dense":
        return nn.Conv2d(inputs, outputs, 3, padding=1)
    if kind == "lowrank":
        # The best known dense way of few parameters: to R channels by taps, and a 1×1 back.
        return nn.Sequential(
            nn.Conv2d(inputs, options["r"], 3, padding=1, bias=False),
            nn.Conv2d(options["r"], outputs, 1),
        )
    if kind == "cp":
        return polyadic.nn.CPConv2d(
            inputs, outputs, 3, padding=1, rank=options["r"], order=options["o"]
        )
    raise ValueError(f"convolutions are compared as dense, lowrank and cp, got {name!r}")


class DigitsNet(nn.Module):
    """Images (batch, 1, 8, 8) to logits (batch, 10): four 3×3 convolutions, pooled once."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(convolution(name, width, width) for _ in range(4))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for number, (block, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            x = F.relu(norm(block(x)) + x)
            if number == 1:
                x = F.avg_pool2d(x, 2)
        logits: Tensor = self.head(x.mean((-2, -1)))
        return logits

    def block_parameters(self) -> int:
        """Parameters of what is compared."""
        return sum(parameter.numel() for parameter in self.blocks.parameters())


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images in [0, 1] and their digits, to train on and held out (one in five)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
    return (images[train], labels[train]), (images[held_out], labels[held_out])
