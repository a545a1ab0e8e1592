"""Tables of the kernel that adds up partial sums."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from compiled import Form, pointers_to
from data import draw, dtypes_of, judge, poisoned, repeats, short

from polyadic.kernels.triton import sums as subject

# Splits, heights of the matrices, width.
SHAPES = ((1, (3,), 5), (7, (1, 4), 17), (130, (2, 3, 1), 70))


def check() -> Iterator[str]:
    """Each row of the table that holds."""
    for number, (splits, heights, width) in enumerate(SHAPES):
        for dtype in dtypes_of(number):
            for integers in (True, False):
                name = f"{short(dtype)} {splits} of {heights} by {width} {integers=}"
                partial = draw((splits, sum(heights), width), torch.float32, integers)
                with poisoned():
                    once = subject.add_up(partial, heights, dtype)
                    again = subject.add_up(partial, heights, dtype) if repeats(dtype) else once
                pieces = partial.cpu().split(heights, 1)
                for numbers, repeated, piece in zip(once, again, pieces, strict=True):
                    assert torch.equal(numbers, repeated), f"{name}: differs from run to run"
                    judge(name, numbers, piece.double().sum(0), piece.sum(0).to(dtype), integers)
                yield name


def forms() -> Iterator[Form]:
    """What is compiled ahead of time."""
    for heights, width in (((37, 37, 37), 64), ((9,), 184), ((1, 225, 224), 89)):
        # Half precisions make the same code but for the names of instructions.
        for dtype in (torch.bfloat16, torch.float32):
            yield Form(
                f"{heights} by {width} {short(dtype)}",
                subject.add_kernel,
                ("*fp32", pointers_to(dtype, len(heights)), "i32"),
                subject.form_of(heights, width).constants,
                warps=subject.WARPS,
                wide_loads=width % 4 == 0,
            )
