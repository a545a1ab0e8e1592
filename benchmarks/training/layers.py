"""The linear layers that are compared: a name such as ``cp:o3:r64`` to a function that makes one.

dense             nn.Linear
lowrank:r64       two matrices, x A B
cp:o3:r64         CPLinear with three modes a side
tltorch-cp:o3:r64 tltorch's FactorizedLinear as it initialises and contracts it; also
tltorch-tucker:o3:f20, tltorch-btt:o3:f20, asked for 0.020 times dense's parameters
monarch:b128       torch_structured's MonarchLinear of so many blocks
paired:o2:r4      W = Σ_r A_1[:, :, r] ⊗ … ⊗ A_D[:, :, r], in plain torch
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polyadic
from polyadic.formats import tensorize
from polyadic.init import torch_bias_, torch_std

Make = Callable[[int, int], nn.Module]


class LowRank(nn.Module):
    """y = x A B + b, drawn so that the entries of A B have the variance of nn.Linear's."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(in_features, rank))
        self.b = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features))
        polyadic.init.cp_orthonormal_([self.a, self.b], torch_std(in_features))
        torch_bias_(self.bias, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x @ self.a, self.b, self.bias)


class Paired(nn.Module):
    """y = x W + b with W = Σ_r A_1[:, :, r] ⊗ … ⊗ A_D[:, :, r], which has full rank at R = 1."""

    def __init__(self, in_features: int, out_features: int, order: int, rank: int) -> None:
        super().__init__()
        self.ins, self.outs = tensorize(in_features, out_features, order)
        std = (torch_std(in_features) / math.sqrt(rank)) ** (1 / order)
        self.factors = nn.ParameterList(
            nn.Parameter(torch.randn(rank, m, n) * std)
            for m, n in zip(self.ins, self.outs, strict=True)
        )
        self.bias = nn.Parameter(torch.empty(out_features))
        torch_bias_(self.bias, in_features)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[:-1]
        y = x.reshape(1, -1, *self.ins).expand(len(self.factors[0]), -1, *self.ins)
        # The first mode left is contracted, and its out mode goes to the end.
        for factor in self.factors:
            y = torch.einsum("rbm...,rmn->rb...n", y, factor)
        return y.sum(0).reshape(*batch, -1) + self.bias


def parsed(name: str) -> tuple[str, dict[str, int]]:
    """``cp:o3:r64`` as ("cp", {"o": 3, "r": 64}).

    Raises:
        ValueError: it is no such name.
    """
    kind, *options = name.split(":")
    try:
        return kind, {option[0]: int(option[1:]) for option in options}
    except (IndexError, ValueError):
        raise ValueError(f"a layer is named like cp:o3:r64, got {name!r}") from None


def maker(name: str) -> Make:
    """The function (in_features, out_features) → layer of a name.

    Raises:
        ValueError: the kind is unknown.
    """
    kind, options = parsed(name)
    if kind == "dense":
        return nn.Linear
    if kind == "lowrank":
        return lambda m, n: LowRank(m, n, options["r"])
    if kind == "cp":
        return lambda m, n: polyadic.nn.CPLinear(m, n, rank=options["r"], order=options["o"])
    if kind == "paired":
        return lambda m, n: Paired(m, n, options["o"], options["r"])
    if kind == "monarch":
        return lambda m, n: _monarch(m, n, options["b"])
    if kind.startswith("tltorch-"):
        return lambda m, n: _tltorch(kind.removeprefix("tltorch-"), m, n, options)
    raise ValueError(
        f"the layers compared are dense, lowrank, cp, paired, monarch and tltorch-…; got {name!r}"
    )


def _monarch(m: int, n: int, blocks: int) -> nn.Module:
    from torch_structured.monarch.monarch_linear import MonarchLinear

    made: nn.Module = MonarchLinear(m, n, bias=True, nblocks=blocks)
    return made


def _tltorch(kind: str, m: int, n: int, options: dict[str, int]) -> nn.Module:
    import tltorch

    shapes = tensorize(m, n, options["o"])
    factorization = {"cp": "cp", "tucker": "tucker", "btt": "blocktt"}[kind]
    # A fraction of the dense parameters, or a rank.
    rank: Any = options["r"] if "r" in options else options["f"] / 1000
    made: nn.Module = tltorch.FactorizedLinear(
        *shapes, bias=True, factorization=factorization, rank=rank, implementation="factorized"
    )
    return made
