"""The named cells: which layers are measured, at which batch."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from polyadic.formats import ConvFormat, LinearFormat, Shape, tensorize

Group = Literal["grid", "scaling"]
Mode = Literal["forward", "training"]
MODES: tuple[Mode, ...] = ("forward", "training")


def _modes_name(shape: Shape) -> str:
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class LinearCase:
    """A linear layer and its batch, both without bias.

    Args:
        in_shape: in modes.
        out_shape: out modes.
        rank: R.
        batch: rows B.
        group: ``"grid"`` for the cells of the tables, ``"scaling"`` for the sweeps behind the
            fitted exponents, where only a few contestants run.
        quick: part of the quick subset.
    """

    in_shape: Shape
    out_shape: Shape
    rank: int
    batch: int
    group: Group = "grid"
    quick: bool = False

    @property
    def kind(self) -> str:
        """``"linear"``."""
        return "linear"

    @property
    def name(self) -> str:
        """Group, modes in, modes out, rank and batch."""
        shapes = f"{_modes_name(self.in_shape)}_{_modes_name(self.out_shape)}"
        label = "linear" if self.group == "grid" else self.group
        return f"{label}_{shapes}_R{self.rank}_B{self.batch}"

    @property
    def title(self) -> str:
        """The same for people."""
        f = self.format
        return f"{f.in_features}→{f.out_features} R={self.rank} B={self.batch}"

    @property
    def format(self) -> LinearFormat:
        """Shapes and rank."""
        return LinearFormat(self.in_shape, self.out_shape, self.rank)

    @property
    def tensorized_shape(self) -> tuple[Shape, ...]:
        """(in, out), the groups of the CP tensor."""
        return self.in_shape, self.out_shape

    @property
    def x_shape(self) -> Shape:
        """(B, M)."""
        return self.batch, self.format.in_features

    @property
    def y_shape(self) -> Shape:
        """(B, N)."""
        return self.batch, self.format.out_features

    @property
    def r_shape(self) -> Shape:
        """(B, R), the intermediate between in and out factors."""
        return self.batch, self.rank


@dataclass(frozen=True)
class ConvCase:
    """A 2-D convolution with padding k//2 and its input, without bias.

    Args:
        out_shape: out modes.
        in_shape: in modes.
        kernel: taps k of the k×k kernel.
        rank: R.
        batch: images B.
        size: height and width of the images.
        stride: of both dimensions.
        label: put in front of the name.
        group: as of a linear case.
        quick: part of the quick subset.
    """

    out_shape: Shape
    in_shape: Shape
    kernel: int
    rank: int
    batch: int
    size: int
    stride: int = 1
    label: str = "conv"
    group: Group = "grid"
    quick: bool = False

    @property
    def kind(self) -> str:
        """``"conv"``."""
        return "conv"

    @property
    def name(self) -> str:
        """Modes out, modes in, kernel, rank, batch, size and stride."""
        shapes = f"{_modes_name(self.out_shape)}_{_modes_name(self.in_shape)}_k{self.kernel}"
        stride = f"_stride{self.stride}" if self.stride > 1 else ""
        return f"{self.label}_{shapes}_R{self.rank}_B{self.batch}_S{self.size}{stride}"

    @property
    def title(self) -> str:
        """The same for people."""
        f = self.format
        name = "" if self.label == "conv" else f"{self.label.replace('_', ' ')}: "
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return (
            f"{name}{f.in_channels}→{f.out_channels} {self.kernel}×{self.kernel} "
            f"{self.size}²{stride} R={self.rank} B={self.batch}"
        )

    @property
    def format(self) -> ConvFormat:
        """Shapes and rank."""
        return ConvFormat(self.out_shape, self.in_shape, (self.kernel, self.kernel), self.rank)

    @property
    def tensorized_shape(self) -> tuple[Shape, ...]:
        """(out, in, kernel), the groups of the CP tensor."""
        return self.out_shape, self.in_shape, (self.kernel, self.kernel)

    @property
    def padding(self) -> int:
        """Zeros on each side."""
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def x_shape(self) -> Shape:
        """(B, Cin, H, W)."""
        return self.batch, self.format.in_channels, self.size, self.size

    @property
    def y_shape(self) -> Shape:
        """(B, Cout, H', W')."""
        return self.batch, self.format.out_channels, self.out_size, self.out_size

    @property
    def r_shape(self) -> Shape:
        """(B, R, H, W), the intermediate behind the in factors."""
        return self.batch, self.rank, self.size, self.size


Case = LinearCase | ConvCase


def describe(case: Case) -> dict[str, Any]:
    """Return the case as a record."""
    fmt = case.format
    axes: dict[str, Any] = {
        "tensorized_shape": [list(group) for group in case.tensorized_shape],
        "rank": case.rank,
        "batch": case.batch,
        "x_shape": list(case.x_shape),
        "y_shape": list(case.y_shape),
        "r_elements": math.prod(case.r_shape),
    }
    if isinstance(case, ConvCase):
        axes |= {"stride": case.stride, "padding": case.padding}
    return {
        "cell": case.name,
        "title": case.title,
        "layer": case.kind,
        "group": case.group,
        **axes,
        "parameters": fmt.parameters,
        "dense_parameters": fmt.dense_parameters,
    }


def _linear(
    ins: Shape, outs: Shape, ranks: Sequence[int], batches: Sequence[int], quick: tuple[int, int]
) -> list[Case]:
    return [LinearCase(ins, outs, r, b, "grid", (r, b) == quick) for r in ranks for b in batches]


def _resnet_stage(stage: int, channels: int, size: int, rank: int) -> ConvCase:
    out_shape, in_shape = tensorize(channels, channels, order=2)
    return ConvCase(
        out_shape, in_shape, 3, rank, 4, size, label=f"resnet18_stage{stage}", quick=stage == 4
    )


def _scaling() -> list[Case]:
    """Sweeps of B, of R and of M = N, each large enough to be bound by its GEMMs."""
    square = (8, 8, 16)
    axes = [
        *[(square, 128, b) for b in (256, 512, 1024, 2048)],
        *[(square, r, 1024) for r in (64, 128, 256, 512)],
        *[(s, 128, 512) for s in ((8, 8, 8), square, (8, 16, 16), (16, 16, 16))],
    ]
    return [LinearCase(s, s, r, b, "scaling") for s, r, b in dict.fromkeys(axes)]


def all_cases() -> tuple[Case, ...]:
    """Every cell, small layers first."""
    small, wide = (4, 4, 16), (16, 16, 16)
    return (
        *_linear(small, (4, 4, 8), (16, 100), (32,), (100, 32)),
        *_linear((4, 4), (2, 5), (2,), (4,), (2, 4)),
        *_linear((8, 8, 16), (8, 8, 16), (32, 128, 512), (1, 32, 256, 1024), (128, 256)),
        *_linear((8, 8, 12), (12, 16, 16), (64, 365), (512,), (64, 512)),
        *_linear(wide, wide, (64, 256), (1, 8, 256), (256, 1)),
        *_linear((32, 32), (32, 32), (64,), (1024,), (0, 0)),
        *_linear((1024,), (1024,), (64,), (256,), (0, 0)),
        ConvCase((4, 8), (4, 4), 3, 100, 1, 32, quick=True),
        ConvCase((8, 8), (8, 8), 3, 32, 8, 32),
        ConvCase((8, 8), (8, 8), 3, 64, 8, 32, quick=True),
        ConvCase((16, 16), (16, 16), 3, 64, 8, 14),
        ConvCase((16, 16), (16, 16), 3, 128, 8, 14),
        ConvCase((16, 32), (16, 32), 3, 128, 8, 7),
        ConvCase((8, 16), (8, 8), 3, 64, 8, 32, stride=2, quick=True),
        ConvCase((8, 8), (8, 8), 5, 64, 8, 32),
        _resnet_stage(1, 64, 56, 89),
        _resnet_stage(2, 128, 28, 182),
        _resnet_stage(3, 256, 14, 368),
        _resnet_stage(4, 512, 7, 741),
        *_scaling(),
    )


def select(*, quick: bool = False, only: str | None = None) -> list[Case]:
    """Choose cells.

    Args:
        quick: the representative subset instead of all.
        only: a pattern of the name with * and ?, or a part of it.

    Raises:
        ValueError: no cell has such a name, or the pattern is empty.
    """
    cases = [case for case in all_cases() if case.quick or not quick]
    if only is None:
        return cases
    if not only:
        raise ValueError("the pattern of cells must not be empty; leave it out for all of them")
    pattern = only if set(only) & set("*?[") else f"*{only}*"
    # A pattern is obeyed among all cells: a name given in full need not be in the quick subset.
    chosen = [case for case in all_cases() if fnmatch.fnmatchcase(case.name, pattern)]
    if not chosen:
        names = ", ".join(case.name for case in all_cases())
        raise ValueError(f"no cell matches {only!r}; the cells are {names}")
    return chosen
