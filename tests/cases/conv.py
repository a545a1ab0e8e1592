"""Convolutions of one to three dimensions, with every option, and plans for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cases.linear import named_gradients
from cases.protocol import COMPLEX, HALVES, Case, Forced, Leaves, Shape, paired
from cases.weights import khatri_rao
from polyadic import ConvPlan, ConvRoute
from polyadic import functional as PF
from polyadic.nn import CPConv1d, CPConv2d, CPConv3d

ROUTES = [
    *(ConvRoute(layout, depthwise) for layout, depthwise in itertools.product(
        ("channels_last", "channels_first"), ("merged", "separable"))),
    ConvRoute("channels_last", kind="dense"),
    ConvRoute("channels_first", kind="dense"),
]  # fmt: skip


def conv_plans() -> Iterator[Forced]:
    """Every route forward and backward, with no, one or two intermediate maps kept."""
    for (forward, backward), keep in itertools.product(paired(ROUTES), (1, 0, 2)):
        yield {"plan": ConvPlan(forward, backward, keep)}


def spread(value: Any, dims: int) -> Shape:
    """An option for each dimension."""
    return value if isinstance(value, tuple) else (value,) * dims


@dataclass(frozen=True)
class ConvCase(Case):
    """A convolution; its groups of modes are out (of all groups), in (of one) and the taps."""

    @property
    def cls(self) -> type[nn.Module]:
        return (CPConv1d, CPConv2d, CPConv3d)[len(self.size) - 1]

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution, whose in modes come first."""
        return False

    @property
    def channel_groups(self) -> int:
        """Option ``groups``."""
        return self.options.get("groups", 1)

    @property
    def in_features(self) -> int:
        """Cin."""
        return math.prod(self.tensorized_shape[1]) * self.channel_groups

    @property
    def out_features(self) -> int:
        return math.prod(self.tensorized_shape[0])

    @property
    def kernel(self) -> Shape:
        """Taps in each dimension."""
        return self.tensorized_shape[2]

    @property
    def fan_in(self) -> int:
        return math.prod(self.tensorized_shape[1]) * math.prod(self.kernel)

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_features,
            "out_channels": self.out_features,
            "kernel_size": self.kernel,
            "bias": self.bias,
        }

    @property
    def shapes(self) -> dict[str, Shape]:
        return {"out_shape": self.tensorized_shape[0], "in_shape": self.tensorized_shape[1]}

    @property
    def x_shape(self) -> Shape:
        return (*self.lead, self.in_features, *self.size)

    @property
    def explicit(self) -> bool:
        return self.options.get("padding_mode", "zeros") == "zeros"

    @property
    def rows(self) -> int:
        """Positions of the in-projection: of a pointwise convolution those alone it reads."""
        size = self.size
        if math.prod(self.kernel) == 1 and not self.options.get("padding"):
            strides = spread(self.options.get("stride", 1), len(size))
            size = tuple(-(-n // s) for n, s in zip(size, strides, strict=True))
        return math.prod(self.lead) * math.prod(size) * self.channel_groups

    def weight(self, leaves: Leaves) -> Tensor:
        return self.matrix(leaves).unflatten(-1, self.kernel)

    def cp(self, leaves: Leaves, **forced: Any) -> Tensor:
        groups = self.groups(leaves.factors)
        return PF.cp_conv(
            leaves.x, *groups, leaves.bias, weights=leaves.weights, **self.options, **forced
        )

    def cp_forward(self, leaves: Leaves, **forced: Any) -> tuple[Tensor, Any]:
        """The explicit forward, which has no bias."""
        groups = self.groups(leaves.factors)
        # The pair pads with zeros alone and has no option for it.
        options = {k: v for k, v in self.options.items() if k != "padding_mode"}
        return PF.cp_conv_forward(leaves.x, *groups, weights=leaves.weights, **options, **forced)

    def cp_backward(self, grad_y: Tensor, saved: Any) -> dict[str, Tensor]:
        """The explicit backward, its results by the names of ``Leaves.named``."""
        return named_gradients(*PF.cp_conv_backward(grad_y, saved), weights=self.weights)

    def in_other_orders(self, leaves: Leaves) -> Iterator[Tensor]:
        """The kernel at once on the other layout of memory; then channels, taps, channels."""
        x, weight = leaves.x, self.weight(leaves)
        if len(self.size) > 1:
            last = (torch.channels_last, torch.channels_last_3d)[len(self.size) - 2]
            other = torch.contiguous_format if self.strides == "channels_last" else last
            yield self.apply(
                x.contiguous(memory_format=other),
                weight.contiguous(memory_format=other),
                leaves.bias,
            )
        groups, all_of_them = self.channel_groups, self.channel_groups * self.rank
        first, second, *taps = (khatri_rao(group) for group in self.groups(leaves.factors))
        into, out = (first, second) if self.transposed else (second, first)
        into = into.unflatten(0, (-1, self.in_features // groups)).expand(groups, -1, -1)
        out = out.unflatten(0, (-1, self.out_features // groups)).expand(groups, -1, -1)
        z = torch.einsum("bgc...,gcr->bgr...", x.unflatten(1, (groups, -1)), into).flatten(1, 2)
        sizes = {"in_channels": all_of_them, "out_channels": all_of_them, "groups": all_of_them}
        options = {**self.options, **sizes, "kernel_size": self.kernel, "bias": False}
        stage = self.kind.dense(device="meta", **options)
        kernel = taps[0].t().reshape(self.rank, 1, *self.kernel)
        z = functional_call(stage, {"weight": kernel.repeat(groups, *[1] * (kernel.ndim - 1))}, z)
        if leaves.weights is not None:
            z = z * leaves.weights.repeat(groups).view(-1, *[1] * len(self.size))
        y = torch.einsum("bgr...,gnr->bgn...", z.unflatten(1, (groups, -1)), out).flatten(1, 2)
        bias = leaves.bias
        yield y if bias is None else y + bias.view(-1, *[1] * len(self.size))

    def plans(self) -> Iterator[Forced]:
        yield from conv_plans()


def conv(
    name: str,
    out_shape: Shape,
    in_shape: Shape,
    kernel: Shape,
    rank: int,
    lead: Shape,
    size: Shape,
    **kwargs: Any,
) -> ConvCase:
    """A row of the table; ``in_shape`` are the modes of one group's channels."""
    own = {k: kwargs.pop(k) for k in list(kwargs) if k in Case.__dataclass_fields__}
    shape = (out_shape, in_shape, kernel)
    return ConvCase(f"conv-{name}", shape, rank, lead, size, options=kwargs, **own)


# 128 → 96 channels on 2·7·7 positions: the kernel has 110,592 entries.
COUNTED = [
    conv("count", (8, 12), (8, 16), (3, 3), 5, (2,), (7, 7), padding=1, weights=True),
    conv("count-groups", (8, 24), (6, 16), (3, 3), 3, (2,), (7, 7), padding=1, groups=2),
]

CONV = [
    conv("1d-k1", (3,), (4,), (1,), 3, (2,), (5,)),
    conv("1d-k1-stride", (3,), (2, 2), (1,), 3, (2,), (7,), stride=3, weights=True),
    conv("1d-k1-pad", (3,), (2, 2), (1,), 3, (2,), (5,), padding=2),
    conv("1d-k3", (2, 3), (5,), (3,), 4, (2,), (9,), padding=1),
    conv("1d-k4-same", (2, 2), (3, 1), (4,), 3, (2,), (8,), padding="same", weights=True),
    conv("1d-k5-all-options", (5,), (3,), (5,), 2, (3,), (17,), stride=2, padding=3, dilation=2),
    conv("1d-unbatched", (3,), (2, 2), (3,), 3, (), (6,), padding="same", bias=False),
    conv("1d-k7-longer-than-input", (3,), (2,), (7,), 3, (2,), (3,), padding=3),
    conv("1x1", (3,), (2,), (1, 1), 1, (1,), (5, 4)),
    conv("1x1-rank-above-m", (2, 2), (3,), (1, 1), 13, (2,), (3, 4), weights=True),
    conv("1x1-stride", (2, 2), (3, 2), (1, 1), 5, (2,), (7, 6), stride=(2, 3)),
    conv("1x1-pad-stride", (2, 2), (3, 2), (1, 1), 3, (2,), (5, 4), stride=2, padding=(1, 2)),
    conv("1x1-unbatched-channels-last-batch1", (5,), (2, 3), (1, 1), 4, (1,), (4, 3),
         strides="channels_last"),
    conv("1x3", (2, 3), (5, 1), (1, 3), 3, (2,), (3, 5), padding="same"),
    conv("1x3-stride-on-both", (2, 3), (5, 1), (1, 3), 3, (2,), (7, 8), stride=2, padding=(0, 1)),
    conv("3x1-valid-lambda", (7,), (3, 2), (3, 1), 4, (2,), (5, 3), padding="valid", weights=True),
    conv("3x1-pad-on-1", (3,), (2, 2), (3, 1), 3, (2,), (4, 4), padding=(0, 2), stride=(1, 2)),
    conv("3x3", (3,), (2,), (3, 3), 7, (2,), (5, 6)),
    conv("3x3-rank1", (2, 2), (3, 1), (3, 3), 1, (2,), (4, 5), padding=1),
    conv("3x3-one-channel", (1,), (1,), (3, 3), 2, (2,), (4, 7), padding="same"),
    conv("3x3-one-pixel", (3,), (2,), (3, 3), 4, (2,), (1, 1), padding=1),
    conv("3x3-batch0", (2, 2), (3, 1), (3, 3), 3, (0,), (5, 4), padding=1, weights=True),
    conv("3x3-unbatched-lambda", (2, 2), (3, 2), (3, 3), 4, (), (5, 4), padding=1, weights=True),
    conv("3x3-stride-tuple", (2, 2), (3, 2), (3, 3), 4, (2,), (9, 8), stride=(2, 3), padding=1),
    conv("3x3-dilation", (3, 2), (2, 2), (3, 3), 3, (1,), (8, 9), dilation=(2, 3), padding="same"),
    conv("3x3-all-options", (2, 3), (4,), (3, 3), 5, (3,), (11, 9), stride=(3, 2), padding=(2, 1),
         dilation=(1, 2), weights=True),
    conv("3x3-channels-last", (3, 2), (2, 3), (3, 3), 4, (2,), (5, 6), padding=1,
         strides="channels_last"),
    conv("3x3-channels-last-lambda", (3,), (2, 3), (3, 3), 4, (3,), (6, 5), stride=2, weights=True,
         strides="channels_last", bias=False),
    conv("3x3-transposed", (3, 2), (2, 2), (3, 3), 4, (2,), (5, 6), padding=1,
         strides="transposed"),
    conv("3x3-sliced", (3, 2), (2, 2), (3, 3), 4, (2,), (5, 6), strides="sliced"),
    conv("3x3-expanded", (3, 2), (2, 2), (3, 3), 4, (3,), (5, 4), strides="expanded"),
    conv("3x3-order3", (1, 2, 3), (2, 1, 2), (3, 3), 4, (2,), (5, 3), padding=1),
    conv("3x3-order4-unequal", (1, 2, 1, 3), (2, 2), (3, 3), 4, (1,), (4, 3), padding=(1, 0)),
    conv("5x3", (2, 1), (1, 2), (5, 3), 4, (1,), (7, 5)),
    conv("5x3-same-primes", (5,), (7,), (5, 3), 3, (2,), (6, 5), padding="same", bias=False),
    conv("4x4-same", (2, 2), (3, 1), (4, 4), 5, (2,), (6, 7), padding="same"),
    conv("4x4-same-dilation", (3,), (2,), (4, 4), 2, (1,), (7, 8), padding="same", dilation=3),
    conv("4x4-stride", (2, 2), (3,), (4, 4), 3, (2,), (8, 9), stride=4, weights=True),
    conv("4x2-same-mixed", (3,), (2, 2), (4, 3), 3, (2,), (5, 5), padding="same",
         strides="channels_last"),
    conv("3d-2x3x2", (2, 2), (3,), (2, 3, 2), 3, (2,), (4, 5, 3)),
    conv("3d-2x3x2-same", (3,), (2, 2), (2, 3, 2), 4, (1,), (3, 4, 3), padding="same",
         weights=True),
    conv("3d-1x1x1", (3,), (2, 2), (1, 1, 1), 4, (2,), (2, 3, 2), stride=(1, 2, 1)),
    conv("3d-1x3x1-stride", (3,), (2,), (1, 3, 1), 3, (2,), (3, 5, 4), stride=2, padding=(0, 1, 1)),
    conv("3d-channels-last", (2, 2), (3,), (2, 1, 3), 3, (2,), (3, 3, 4), dilation=(2, 1, 1),
         strides="channels_last"),
    conv("3d-unbatched", (2,), (3,), (2, 2, 2), 3, (), (3, 3, 4), padding=1, bias=False),
    conv("complex-all-options", (2, 2), (3,), (3, 2), 3, (2,), (7, 6), stride=(2, 1),
         padding=(1, 2), dilation=(1, 2), groups=2, weights=True, **COMPLEX),
    conv("complex-small", (2,), (1,), (2,), 2, (1,), (3,), padding="same", **COMPLEX),
    conv("notebook", (4, 8), (4, 4), (3, 3), 100, (2,), (8, 8), padding="same", dtypes=HALVES),
    conv("1x1-large", (4, 8), (5, 5), (1, 1), 20, (3,), (9, 8), weights=True, dtypes=HALVES),
    conv("5x3-large", (5, 4), (3, 7), (5, 3), 24, (3,), (12, 10), stride=(1, 2), padding=(2, 1),
         dtypes=HALVES),
    conv("4x4-large-channels-last", (6, 3), (4, 4), (4, 4), 16, (3,), (9, 11), padding="same",
         weights=True, strides="channels_last", dtypes=HALVES),
    conv("1d-k5-large", (5, 5), (4, 7), (5,), 32, (6,), (40,), padding=2, dilation=1,
         dtypes=HALVES),
    conv("3d-2x3x2-large", (4, 3), (2, 5), (2, 3, 2), 16, (3,), (4, 5, 4), padding=(1, 1, 0),
         dtypes=HALVES),
    conv("reflect", (2, 2), (3,), (3, 3), 3, (2,), (5, 4), padding=(2, 1), padding_mode="reflect"),
    conv("replicate-wide", (4,), (3,), (3, 3), 3, (2,), (2, 3), padding=5,
         padding_mode="replicate"),
    conv("circular-once-round", (4,), (3,), (3, 2), 3, (2,), (4, 3), padding=3,
         padding_mode="circular", strides="channels_last"),
    conv("circular-same-even", (4,), (1, 3), (4, 2), 3, (2,), (6, 5), padding="same",
         padding_mode="circular"),
    conv("reflect-1d-stride", (2, 3), (2, 2), (5,), 3, (2,), (9,), stride=2, padding=4, dilation=2,
         padding_mode="reflect", weights=True),
    conv("replicate-3d", (2,), (3,), (2, 3, 2), 3, (2,), (3, 4, 3), padding=(1, 2, 0),
         padding_mode="replicate"),
    conv("circular-valid", (2,), (3,), (3, 3), 3, (2,), (5, 5), padding="valid",
         padding_mode="circular"),
    conv("reflect-unbatched", (2,), (3,), (3, 3), 3, (), (5, 4), padding=1, padding_mode="reflect"),
    conv("replicate-1x1", (2, 2), (3,), (1, 1), 3, (2,), (3, 4), padding=2, stride=2,
         padding_mode="replicate"),
    conv("reflect-batch0", (2,), (3,), (3, 3), 3, (0,), (5, 4), padding=1,
         padding_mode="replicate"),
    conv("groups2", (2, 3), (2, 2), (3, 3), 3, (2,), (5, 4), groups=2, padding=1),
    conv("groups2-channels-last", (2, 3), (2, 2), (3, 3), 3, (2,), (5, 4), groups=2,
         strides="channels_last"),
    conv("groups3-lambda", (3, 4), (2, 2), (3, 2), 3, (2,), (5, 6), groups=3, stride=2,
         padding="valid", weights=True, bias=False),
    conv("depthwise", (2, 3), (1,), (3, 3), 3, (2,), (5, 4), groups=6, padding="same"),
    conv("depthwise-multiplier", (2, 5), (1, 1), (5, 3), 3, (2,), (7, 5), groups=5, padding=(2, 1)),
    conv("groups-1x1", (4, 3), (2, 2), (1, 1), 3, (2,), (4, 5), groups=2, stride=(2, 1)),
    conv("groups-1x1-pad", (4,), (3,), (1, 1), 3, (2,), (4, 5), groups=4, padding=1),
    conv("groups-1d", (2, 2), (3,), (4,), 3, (3,), (9,), groups=2, padding="same"),
    conv("groups-1d-unbatched", (2, 2), (3,), (3,), 3, (), (9,), groups=2),
    conv("groups-3d", (4,), (1, 2), (2, 3, 2), 3, (2,), (3, 4, 3), groups=2, padding=1,
         weights=True),
    conv("groups-batch0", (4,), (2,), (3, 3), 3, (0,), (5, 4), groups=2),
    conv("groups-circular", (2, 3), (2, 2), (3, 3), 3, (2,), (5, 4), groups=3, padding=(2, 1),
         stride=(1, 2), dilation=(2, 1), padding_mode="circular", strides="channels_last"),
    conv("groups-odd-modes", (3, 2), (2,), (3, 3), 3, (2,), (4, 4), groups=2, padding=1),
    conv("groups-large", (6, 5), (4, 4), (3, 3), 24, (3,), (9, 8), groups=5, padding=1,
         weights=True, dtypes=HALVES),
    conv("circular-large", (5, 4), (4, 6), (3, 4), 20, (3,), (9, 8), padding=(2, 1),
         padding_mode="circular", dtypes=HALVES),
    conv("small-groups", (2,), (1,), (2, 2), 2, (1,), (3, 3), groups=2, padding=1),
    conv("small-reflect", (2,), (1,), (3,), 2, (1,), (4,), weights=True, padding=2,
         padding_mode="reflect"),
    conv("small-circular", (2,), (1,), (2, 1), 2, (1,), (2, 2), padding=1,
         padding_mode="circular"),
]  # fmt: skip
