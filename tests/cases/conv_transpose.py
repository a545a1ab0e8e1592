"""Transposed convolutions of one to three dimensions, with every option."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cases.conv import ConvCase
from cases.protocol import COMPLEX, HALVES, Case, Leaves, Shape
from polyadic import functional as PF
from polyadic.nn import CPConvTranspose1d, CPConvTranspose2d, CPConvTranspose3d


@dataclass(frozen=True)
class ConvTransposeCase(ConvCase):
    """A transposed convolution; its groups of modes are in (of all), out (of one) and the taps."""

    @property
    def cls(self) -> type[nn.Module]:
        return (CPConvTranspose1d, CPConvTranspose2d, CPConvTranspose3d)[len(self.size) - 1]

    @property
    def transposed(self) -> bool:
        return True

    @property
    def in_features(self) -> int:
        return math.prod(self.tensorized_shape[0])

    @property
    def out_features(self) -> int:
        return math.prod(self.tensorized_shape[1]) * self.channel_groups

    @property
    def fan_in(self) -> int:
        """About as many products as torch's own layer counts when it draws its weight."""
        return math.prod(self.tensorized_shape[1]) * math.prod(self.kernel)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {"in_shape": self.tensorized_shape[0], "out_shape": self.tensorized_shape[1]}

    @property
    def explicit(self) -> bool:
        return False

    @property
    def rows(self) -> int:
        return math.prod(self.lead) * math.prod(self.size) * self.channel_groups

    def cp(self, leaves: Leaves, **forced: Any) -> Tensor:
        groups = self.groups(leaves.factors)
        return PF.cp_conv_transpose(
            leaves.x, *groups, leaves.bias, weights=leaves.weights, **self.options, **forced
        )


def conv_transpose(
    name: str,
    out_shape: Shape,
    in_shape: Shape,
    kernel: Shape,
    rank: int,
    lead: Shape,
    size: Shape,
    **kwargs: Any,
) -> ConvTransposeCase:
    """A row of the table; ``out_shape`` are the modes of one group's channels."""
    own = {k: kwargs.pop(k) for k in list(kwargs) if k in Case.__dataclass_fields__}
    shape = (in_shape, out_shape, kernel)
    return ConvTransposeCase(
        f"conv-transpose-{name}", shape, rank, lead, size, options=kwargs, **own
    )


# 96 → 128 channels: the kernel has 110,592 entries.
COUNTED = [conv_transpose("count", (8, 16), (8, 12), (3, 3), 5, (2,), (4, 5), stride=2, padding=1)]

CONV_TRANSPOSE = [
    conv_transpose("1d", (2, 2), (3,), (3,), 3, (2,), (5,), stride=2, padding=1, output_padding=1),
    conv_transpose("1d-k1", (2, 2), (3,), (1,), 3, (2,), (5,)),
    conv_transpose("1d-k1-stride", (2, 2), (3,), (1,), 3, (2,), (5,), stride=3),
    conv_transpose("1d-unbatched", (4,), (3,), (4,), 3, (), (5,), stride=2),
    conv_transpose("2d", (2, 3), (2, 2), (3, 3), 3, (2,), (4, 5)),
    conv_transpose("2d-rectangular", (5,), (3,), (4, 2), 3, (2,), (4, 3), stride=(2, 3),
         padding=(1, 0), output_padding=(1, 2), weights=True),
    conv_transpose("2d-dilation", (4,), (3, 1), (3, 2), 3, (2,), (4, 3), dilation=(2, 3),
         output_padding=(1, 2), bias=False),
    conv_transpose("2d-channels-last", (2, 2), (2, 3), (3, 3), 3, (2,), (4, 3), stride=2, padding=1,
         strides="channels_last"),
    conv_transpose("complex", (2,), (3,), (2, 3), 3, (2,), (3, 2), stride=2, output_padding=1,
         **COMPLEX),
    conv_transpose("2d-1x1", (2, 2), (3,), (1, 1), 3, (2,), (4, 3), weights=True),
    conv_transpose("2d-1x1-crop", (2, 2), (3,), (1, 1), 3, (2,), (4, 3), padding=1),
    conv_transpose("2d-1x1-stride-out", (2, 2), (3,), (1, 1), 3, (2,), (4, 3), stride=(2, 3),
         output_padding=1),
    conv_transpose("2d-1x3-stride", (4,), (3,), (1, 3), 3, (2,), (4, 3), stride=2,
         output_padding=(1, 0)),
    conv_transpose("2d-batch0", (4,), (3,), (3, 3), 3, (0,), (4, 3)),
    conv_transpose("3d", (2,), (3,), (2, 3, 2), 3, (2,), (2, 3, 2), stride=(2, 1, 3),
         padding=(0, 1, 0), output_padding=(1, 0, 2)),
    conv_transpose("groups", (2, 2), (2, 3), (3, 3), 3, (2,), (4, 3), groups=3, stride=2,
         output_padding=1),
    conv_transpose("groups-channels-last-lambda", (3,), (4,), (3, 2), 3, (2,), (4, 3), groups=2,
         weights=True, strides="channels_last"),
    conv_transpose("depthwise", (1,), (6,), (3, 3), 3, (2,), (4, 3), groups=6, stride=2),
    conv_transpose("groups-1x1", (3,), (2, 2), (1, 1), 3, (2,), (4, 3), groups=2),
    conv_transpose("groups-1d", (2,), (2, 2), (3,), 3, (), (4,), groups=4),
    conv_transpose("large", (5, 4), (4, 6), (3, 3), 20, (3,), (7, 6), stride=2, padding=1,
                   output_padding=1, weights=True, dtypes=HALVES),
    conv_transpose("groups-large", (4, 3), (5, 6), (2, 4), 20, (4,), (7, 6), groups=3,
                   dtypes=HALVES),
    conv_transpose("small", (2,), (1,), (2, 2), 2, (1,), (2, 2), weights=True, stride=2,
                   output_padding=1),
    conv_transpose("small-groups", (1,), (2,), (3,), 2, (2,), (3,), groups=2, padding=1),
]  # fmt: skip
