"""Mistakes that a type checker sees; ``make lint`` fails where an ignore is not needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    import polyadic
    from polyadic import finetune
    from polyadic.nn import CPConvTranspose1d, CPLinear

    DENSE, UP, X = nn.Linear(8, 8), nn.ConvTranspose1d(8, 8, 2), torch.ones(2, 8)
    CPLinear(8, 8, rank="break_even")  # type: ignore[arg-type]
    CPLinear(8, 8, rank=2, memory="small")  # type: ignore[arg-type]
    CPLinear.from_linear(DENSE, rank=2, iteration=5)  # type: ignore[call-arg]
    CPLinear.joint(2, 8, 8, rank=2, memry="fast")  # type: ignore[call-arg]
    CPLinear.joint(2, 8, 8, rank="break_even")  # type: ignore[arg-type]
    CPLinear.joint_from([DENSE], rank=2, iteration=5)  # type: ignore[call-arg]
    CPConvTranspose1d.from_conv_transpose(UP, rank=2, iteration=5)  # type: ignore[call-arg]
    polyadic.compress(DENSE, ratio=2, iteration=5)  # type: ignore[call-arg]
    polyadic.compress(DENSE, ratio=2, speed="fast")  # type: ignore[arg-type]
    polyadic.decompose(DENSE.weight, ((8,), (8,)), 2, start="best")  # type: ignore[arg-type]
    polyadic.explain(CPLinear(8, 8, rank=2), bacth=3)  # type: ignore[call-overload]
    finetune.distill(DENSE, DENSE, [X], steps=1, loss="mae")  # type: ignore[arg-type]
    finetune.distill(DENSE, DENSE, [X], steps=1, schedule="cosin")  # type: ignore[arg-type]
