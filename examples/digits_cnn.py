"""A small CNN on handwritten digits: once with Conv2d, once with CPConv2d in its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from polyadic.nn import CPConv2d

TEST, BATCH, EPOCHS = 450, 64, 3
Conv = Callable[..., nn.Module]


def network(conv: Conv) -> nn.Sequential:
    """(B, 1, 8, 8) to (B, 10); the first convolution has one channel in and stays dense."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        conv(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Train on all but the first images and return the accuracy on those."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for rows in (torch.randperm(len(x) - TEST) + TEST).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return model(x[:TEST]).argmax(1).eq(labels[:TEST]).float().mean().item()


def main() -> dict[str, float]:
    """Train both and print their parameters and accuracies; returns the latter."""
    torch.manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes))
    x = torch.as_tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    labels = torch.as_tensor(classes)[order]

    convolutions: dict[str, Conv] = {"dense": nn.Conv2d, "CP": partial(CPConv2d, rank=24)}
    accuracies = {}
    for name, conv in convolutions.items():
        model = network(conv)
        accuracies[name] = train(model, x, labels)
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:>5}: {count:6d} parameters, accuracy {100 * accuracies[name]:.1f} %")
    return accuracies


if __name__ == "__main__":
    main()
