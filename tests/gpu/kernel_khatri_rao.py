"""Tables of the kernel that makes all Khatri-Rao matrices of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from compiled import Form, pointers_to
from data import draw, draw_groups, dtypes_of, judge, poisoned, repeats, short

from polyadic.kernels.multilinear import khatri_rao
from polyadic.kernels.pairs import padded_rank
from polyadic.kernels.triton import khatri_rao as subject

# Modes of each group, and the rank: one group and three, a scale of one row, six factors, a rank
# wider than a tile, matrices of several tiles.
SHAPES = (
    (((4, 4), (2, 5)), 3),
    (((13,), (11,)), 5),
    (((2, 3, 4), (5, 3)), 7),
    (((1, 2, 2, 3, 2, 2), (3, 2)), 8),
    (((16, 16), (8, 8, 4)), 16),
    (((1, 8, 9), (4, 2, 3, 2)), 17),
    (((3, 5, 7), (6, 6), (3, 3)), 33),
    (((5, 3),), 130),
)


def check() -> Iterator[str]:
    """Each row of the table that holds."""
    for number, (modes, rank) in enumerate(SHAPES):
        for dtype in dtypes_of(number):
            for result in dict.fromkeys((dtype, torch.float32)):
                for integers in (True, False):
                    name = f"{short(dtype)} to {short(result)} {modes} rank {rank} {integers=}"
                    groups = draw_groups(modes, rank, dtype, integers)
                    padded = padded_rank(rank)
                    with poisoned():
                        matrices, _ = subject.khatri_raos(groups, result, padded)
                    for matrix, group in zip(matrices, groups, strict=True):
                        there = [factor.cpu() for factor in group]
                        exact = khatri_rao([factor.double() for factor in there])
                        torchs = khatri_rao(there, result)
                        real = matrix[:, :rank].cpu()
                        judge(name, real, exact, torchs, integers)
                        assert torch.equal(real, torchs), f"{name}: other bits than torch's"
                        assert not matrix[:, rank:].any(), f"{name}: padding is not zero"
                    yield name
    yield from _with_sums()
    yield from _aligned_or_not()


# Shape of dY, and the modes of the matrices and their rank: one row, a row more than a program
# sums, sums in one strip of columns and in several, matrices wider than a tile.
SUMS = (
    ((1, 5), ((4, 3), (5,)), 8),
    ((129, 130), ((2, 3), (13, 10), (3, 3)), 5),
    ((700, 33), ((3,), (33,)), 130),
)


def _with_sums() -> Iterator[str]:
    """Partial sums of dY beside the matrices, which have the bits that they have without them."""
    for number, (shape, modes, rank) in enumerate(SUMS):
        for dtype in dtypes_of(number):
            for integers in (True, False):
                name = f"{short(dtype)} sums of {shape} beside {modes} rank {rank} {integers=}"
                groups, padded = draw_groups(modes, rank, dtype, integers), padded_rank(rank)
                d_y = draw(shape, dtype, integers)
                with poisoned():
                    alone, _ = subject.khatri_raos(groups, dtype, padded)
                    once, sums = subject.khatri_raos(groups, dtype, padded, d_y)
                    again = sums
                    if repeats(dtype):
                        _, again = subject.khatri_raos(groups, dtype, padded, d_y)
                assert all(map(torch.equal, once, alone)), f"{name}: other matrices"
                assert torch.equal(sums, again), f"{name}: differs from run to run"
                assert sums.dtype == torch.float32
                exact = d_y.cpu().double().sum(0)
                judge(name, sums.sum(0), exact, d_y.cpu().float().sum(0), integers)
                yield name


def _aligned_or_not() -> Iterator[str]:
    """Factors that start at odd addresses, before and after aligned ones of the same sizes."""
    modes, rank = ((4, 6), (3, 5)), 16
    for shift in (1, 0, 3, 0):
        groups = draw_groups(modes, rank, torch.bfloat16, False, shift)
        matrices, _ = subject.khatri_raos(groups, torch.bfloat16, rank)
        for matrix, group in zip(matrices, groups, strict=True):
            expected = khatri_rao([factor.cpu() for factor in group])
            assert torch.equal(matrix.cpu(), expected), f"shifted by {shift}"
        yield f"shifted by {shift}"


def forms() -> Iterator[Form]:
    """What is compiled ahead of time."""
    for modes, rank in (
        (((16, 16, 16), (16, 16, 16)), 64),
        (((1, 8, 8, 16), (32, 32), (3, 3)), 180),
        (((64, 64), (64, 64)), 256),
        (((13, 7), (11,)), 89),
    ):
        # Half precisions make the same code but for the names of instructions.
        for dtype in (torch.bfloat16, torch.float32):
            padded = padded_rank(rank)
            factors = tuple([pointers_to(dtype, len(group)) for group in modes])
            yield Form(
                f"{modes} rank {rank} {short(dtype)}",
                subject.khatri_rao_kernel,
                (factors, pointers_to(dtype, len(modes))),
                subject.form_of(modes, rank, padded).constants,
                warps=subject.WARPS,
                wide_loads=rank * dtype.itemsize % 16 == 0,
            )
            sums = subject.sums_constants(math.prod(modes[1]) if len(modes) > 1 else rank)
            yield Form(
                f"{modes} rank {rank} {short(dtype)} and sums",
                subject.khatri_rao_and_sums_kernel,
                (
                    factors,
                    pointers_to(dtype, len(modes)),
                    *pointers_to(dtype, 1),
                    "*fp32",
                    "i32",
                    "i32",
                ),
                (*subject.form_of(modes, rank, padded).constants, *sums),
                warps=subject.WARPS,
                wide_loads=sums[0] * dtype.itemsize % 16 == 0,
            )
