"""The models the demo compares: an MLP and a CNN, each dense, narrow and with CP layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt

import torch
from torch import nn

from polyadic.nn import CPConv2d, CPLinear

CLASSES = 10
NARROW_PARTNER = 16
_DTYPE = torch.float32


@dataclass(frozen=True)
class Contestant:
    """One model of the comparison.

    Attributes:
        key: Unique name in files, such as ``"mlp-cp-16"``.
        family: ``"MLP"`` or ``"CNN"``.
        kind: ``"dense"``, ``"narrow"`` (dense, about as many parameters as a CP model) or ``"cp"``.
        label: Name in tables and legends, unique in its family.
        rank: CP rank of the converted layers, None for the dense models.
        converted: Names of the layers that are CP in the CP models of the family.
        build: Makes a freshly initialised model from torch's global generator.
    """

    key: str
    family: str
    kind: str
    label: str
    rank: int | None
    converted: tuple[str, ...]
    build: Callable[[], nn.Module]


def build_mlp(width: int, rank: int | None = None) -> nn.Sequential:
    """Make the MLP 64-width-width-10.

    The modes of the first CP layer are the image's rows and columns, (8, 8), so that its factors
    can be looked at; the second takes the default factorization of order 3.

    Args:
        width: Width of both hidden layers, a square number where ``rank`` is given.
        rank: CP rank of the hidden layers; None for dense ones.

    Returns:
        Model from ``(B, 1, 8, 8)`` to ``(B, 10)`` logits.
    """
    hidden1: nn.Module
    hidden2: nn.Module
    if rank is None:
        hidden1 = nn.Linear(64, width, device="cpu", dtype=_DTYPE)
        hidden2 = nn.Linear(width, width, device="cpu", dtype=_DTYPE)
    else:
        sides = (isqrt(width), isqrt(width))
        hidden1 = CPLinear(
            64, width, rank=rank, in_shape=(8, 8), out_shape=sides, device="cpu", dtype=_DTYPE
        )
        hidden2 = CPLinear(width, width, rank=rank, device="cpu", dtype=_DTYPE)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden1=hidden1,
            relu1=nn.ReLU(),
            hidden2=hidden2,
            relu2=nn.ReLU(),
            head=nn.Linear(width, CLASSES, device="cpu", dtype=_DTYPE),
        )
    )


def build_cnn(channels: int, rank: int | None = None) -> nn.Sequential:
    """Make the CNN: conv 1 to channels/2, conv to channels, pool, conv to channels, pool, linear.

    Args:
        channels: Channels of the second and third convolution, an even number.
        rank: CP rank of the second and third convolution; None for dense ones.

    Returns:
        Model from ``(B, 1, 8, 8)`` to ``(B, 10)`` logits.
    """
    first = channels // 2

    def conv(into: int, out: int) -> nn.Module:
        if rank is None:
            return nn.Conv2d(into, out, 3, padding=1, device="cpu", dtype=_DTYPE)
        return CPConv2d(into, out, 3, padding=1, rank=rank, device="cpu", dtype=_DTYPE)

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, first, 3, padding=1, device="cpu", dtype=_DTYPE),
            relu1=nn.ReLU(),
            conv2=conv(first, channels),
            relu2=nn.ReLU(),
            pool1=nn.AvgPool2d(2),
            conv3=conv(channels, channels),
            relu3=nn.ReLU(),
            pool2=nn.AvgPool2d(2),
            flatten=nn.Flatten(),
            head=nn.Linear(4 * channels, CLASSES, device="cpu", dtype=_DTYPE),
        )
    )


def parameter_count(module: nn.Module) -> int:
    """Count a module's parameters.

    Args:
        module: Any module.

    Returns:
        Number of elements over all parameters.
    """
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class _Family:
    """What the contestants of one family share."""

    name: str
    unit: str
    size: int
    ranks: tuple[int, ...]
    narrow_sizes: range
    converted: tuple[str, ...]
    build: Callable[[int, int | None], nn.Module]


_FAMILIES = (
    _Family("MLP", "wide", 256, (4, 16, 64), range(8, 128), ("hidden1", "hidden2"), build_mlp),
    _Family("CNN", "channels", 64, (16, 64), range(8, 48, 2), ("conv2", "conv3"), build_cnn),
)


def _nearest(target: int, build: Callable[[int, int | None], nn.Module], sizes: range) -> int:
    """Size of the dense model whose parameter count is nearest to ``target``."""
    return min(sizes, key=lambda size: abs(parameter_count(build(size, None)) - target))


def contestants(*, quick: bool = False) -> tuple[Contestant, ...]:
    """List the models, dense first in each family.

    Args:
        quick: Leave out the CP models of the highest ranks.

    Returns:
        The contestants. The narrow ones are dense with about the parameters of CP rank 16.
    """
    found: list[Contestant] = []
    for family in _FAMILIES:
        ranks = family.ranks[:-1] if quick else family.ranks
        target = parameter_count(family.build(family.size, NARROW_PARTNER))
        narrow = _nearest(target, family.build, family.narrow_sizes)
        rows: list[tuple[str, int, int | None]] = [
            ("dense", family.size, None),
            ("narrow", narrow, None),
            *(("cp", family.size, rank) for rank in ranks),
        ]
        for kind, size, rank in rows:
            cp = rank is not None
            found.append(
                Contestant(
                    key=f"{family.name.lower()}-{kind}" + (f"-{rank}" if cp else ""),
                    family=family.name,
                    kind=kind,
                    label=f"CP, rank {rank}" if cp else f"dense, {size} {family.unit}",
                    rank=rank,
                    converted=family.converted,
                    build=partial(family.build, size, rank),
                )
            )
    return tuple(found)
