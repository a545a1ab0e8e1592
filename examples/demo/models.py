"""The models that are compared: an MLP and a CNN, each dense, narrow and with CP layers."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import NamedTuple

from torch import nn

from polyadic.nn import CPConv2d, CPLinear

CLASSES = 10
# The narrow models are dense, with about as many parameters as the CP models of this rank.
NARROW_LIKE_RANK = 16


def build_mlp(width: int, rank: int | None = None) -> nn.Module:
    """Make an MLP from (B, 1, 8, 8) to (B, 10), its hidden layers dense, or CP layers of a rank.

    The in-modes of the first CP layer are the image's rows and columns, (8, 8), so that its factors
    can be looked at, and its out-modes the square roots of the width.
    """
    if rank is None:
        hidden: list[nn.Module] = [nn.Linear(64, width), nn.Linear(width, width)]
    else:
        out_shape = (isqrt(width), isqrt(width))
        first = CPLinear(64, width, rank=rank, in_shape=(8, 8), out_shape=out_shape)
        hidden = [first, CPLinear(width, width, rank=rank)]
    layers = [nn.Flatten(), hidden[0], nn.ReLU(), hidden[1], nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def build_cnn(channels: int, rank: int | None = None) -> nn.Module:
    """Make a CNN from (B, 1, 8, 8) to (B, 10), two of its convolutions dense, or CP of a rank."""

    def conv(into: int, out: int) -> nn.Module:
        if rank is None:
            return nn.Conv2d(into, out, 3, padding=1)
        return CPConv2d(into, out, 3, padding=1, rank=rank)

    first = [nn.Conv2d(1, channels // 2, 3, padding=1), nn.ReLU()]
    second = [conv(channels // 2, channels), nn.ReLU(), nn.AvgPool2d(2)]
    third = [conv(channels, channels), nn.ReLU(), nn.AvgPool2d(2)]
    head = [nn.Flatten(), nn.Linear(4 * channels, CLASSES)]
    return nn.Sequential(*first, *second, *third, *head)


class Family(NamedTuple):
    """What the models of one family share; ``converted`` names the layers that become CP layers."""

    build: Callable[[int, int | None], nn.Module]
    unit: str
    size: int
    ranks: tuple[int, ...]
    narrow_sizes: range
    converted: tuple[str, str]


FAMILIES = {
    "MLP": Family(build_mlp, "wide", 256, (4, 16, 48), range(8, 128), ("1", "3")),
    "CNN": Family(build_cnn, "channels", 64, (16, 48), range(8, 48, 2), ("2", "5")),
}


class Contestant(NamedTuple):
    """A model of the comparison: its kind is "dense", "narrow", or "cp" where it has a rank."""

    family: str
    kind: str
    size: int
    rank: int | None = None

    @property
    def label(self) -> str:
        """Name in tables and legends."""
        dense = f"dense, {self.size} {FAMILIES[self.family].unit}"
        return dense if self.rank is None else f"CP, rank {self.rank}"

    def build(self) -> nn.Module:
        """Make the model anew from torch's global generator."""
        return FAMILIES[self.family].build(self.size, self.rank)


def contestants(*, quick: bool = False) -> list[Contestant]:
    """List the models: of each family the dense, the narrow, and CP of each rank.

    A quick comparison leaves out the highest rank.
    """
    found = []
    for name, family in FAMILIES.items():
        target = parameters(family.build(family.size, NARROW_LIKE_RANK))
        sizes = {abs(parameters(family.build(n, None)) - target): n for n in family.narrow_sizes}
        found.append(Contestant(name, "dense", family.size))
        found.append(Contestant(name, "narrow", sizes[min(sizes)]))
        ranks = family.ranks[:-1] if quick else family.ranks
        found += [Contestant(name, "cp", family.size, rank) for rank in ranks]
    return found


def parameters(module: nn.Module) -> int:
    """Count a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
