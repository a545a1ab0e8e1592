"""Tables of the kernel that makes all Khatri-Rao matrices of a layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from compiled import Form, pointers_to
from data import DTYPES, draw_groups, judge, poisoned, short

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
    for dtype in DTYPES:
        for result in dict.fromkeys((dtype, torch.float32)):
            for modes, rank in SHAPES:
                for integers in (True, False):
                    name = f"{short(dtype)} to {short(result)} {modes} rank {rank} {integers=}"
                    groups = draw_groups(modes, rank, dtype, integers)
                    padded = padded_rank(rank)
                    with poisoned():
                        matrices = subject.khatri_rao_matrices(groups, result, padded)
                    for matrix, group in zip(matrices, groups, strict=True):
                        there = [factor.cpu() for factor in group]
                        exact = khatri_rao([factor.double() for factor in there])
                        torchs = khatri_rao(there, result)
                        real = matrix[:, :rank].cpu()
                        judge(name, real, exact, torchs, integers)
                        assert torch.equal(real, torchs), f"{name}: other bits than torch's"
                        assert not matrix[:, rank:].any(), f"{name}: padding is not zero"
                    yield name
    yield from _aligned_or_not()


def _aligned_or_not() -> Iterator[str]:
    """Factors that start at odd addresses, before and after aligned ones of the same sizes."""
    modes, rank = ((4, 6), (3, 5)), 16
    for shift in (1, 0, 3, 0):
        groups = draw_groups(modes, rank, torch.bfloat16, False, shift)
        matrices = subject.khatri_rao_matrices(groups, torch.bfloat16, rank)
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
        for dtype in DTYPES:
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
