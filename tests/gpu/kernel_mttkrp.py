"""Tables of the kernel that makes the gradients of all factors of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from compiled import Form, pointers_to
from data import draw, draw_groups, dtypes_of, judge, poisoned, repeats, short
from torch import Tensor

from polyadic.kernels.pairs import padded_rank
from polyadic.kernels.triton import mttkrp as subject

# Modes of each group, the rank, and in how many pieces each dK comes. The sum for the scale of the
# last but one, and those over the pieces of the last, are longer than what a program takes at once.
# Each dK has as many pieces as it needs.
SHAPES = (
    (((4, 4), (2, 5)), 3, (1, 1)),
    (((13,), (11,)), 5, (1, 1)),
    (((1, 2, 2, 3, 2, 2), (3, 2)), 8, (3, 3)),
    (((1, 4, 5), (2, 3, 2), (3, 3)), 17, (5, 1, 2)),
    (((2, 70), (3, 2)), 33, (1, 1)),
    (((1, 33, 32),), 12, (1,)),
    (((2, 3), (1, 3, 3)), 12, (1, 70)),
)


def gradient(d_matrix: Tensor, group: Sequence[Tensor], own: int, dtype: torch.dtype) -> Tensor:
    """Gradient of one factor, computed in a dtype as the definition says."""
    modes = [factor.shape[0] for factor in group]
    cube = d_matrix.to(dtype).view(*modes, d_matrix.shape[-1])
    for d, factor in enumerate(group):
        if d != own:
            ones = [1] * len(modes)
            ones[d] = modes[d]
            cube = cube * factor.to(dtype).view(*ones, -1)
    others = [d for d in range(len(modes)) if d != own]
    return cube.sum(others) if others else cube


def check() -> Iterator[str]:
    """Each row of the table that holds."""
    for number, (modes, rank, pieces) in enumerate(SHAPES):
        for dtype in dtypes_of(number):
            for low in dict.fromkeys((torch.float32, dtype)):
                for integers in (True, False) if low == torch.float32 else (False,):
                    name = f"{short(dtype)} of {short(low)} {modes} rank {rank} {integers=}"
                    _check_one(name, modes, rank, pieces, dtype, low, integers)
                    yield name
    for number, (count, width) in enumerate(((1, 5), (7, 24), (520, 130))):
        for dtype in dtypes_of(number):
            for integers in (True, False):
                name = f"{short(dtype)} {count} partial sums of {width} {integers=}"
                _check_sums(name, count, width, dtype, integers)
                yield name


def _check_one(
    name: str,
    modes: Sequence[Sequence[int]],
    rank: int,
    pieces: Sequence[int],
    dtype: torch.dtype,
    low: torch.dtype,
    integers: bool,
) -> None:
    groups = draw_groups(modes, rank, dtype, integers)
    rows = [math.prod(group) for group in modes]
    # Columns beyond the rank hold what must not be read.
    sizes = [(p, count, padded_rank(rank)) for p, count in zip(pieces, rows, strict=True)]
    d_matrices = [draw(size, low, integers) for size in sizes]
    for d_matrix in d_matrices:
        d_matrix[..., rank:] = float("nan")
    given = [d_matrix if len(d_matrix) > 1 else d_matrix[0] for d_matrix in d_matrices]
    with poisoned():
        once = subject.mttkrps(given, groups)
        again = subject.mttkrps(given, groups) if repeats(dtype) else once
    for d_matrix, group, gradients, others in zip(d_matrices, groups, once, again, strict=True):
        there = [factor.cpu() for factor in group]
        real = d_matrix.cpu()[..., :rank]
        for d, (numbers, repeated) in enumerate(zip(gradients, others, strict=True)):
            assert torch.equal(numbers, repeated), f"{name}: factor {d} differs from run to run"
            exact = gradient(real.double().sum(0), there, d, torch.float64)
            torchs = gradient(real.float().sum(0), there, d, torch.float32).to(dtype)
            judge(f"{name} factor {d}", numbers, exact, torchs, integers)


def _check_sums(name: str, count: int, width: int, dtype: torch.dtype, integers: bool) -> None:
    """Partial sums beside pieces of another number, and what these give without them."""
    groups = draw_groups(((3, 4), (2, 2)), 16, dtype, integers)
    d_matrices = [draw((3, 12, 16), torch.float32, integers), draw((4, 16), dtype, integers)]
    sums = draw((count, width), torch.float32, integers)
    with poisoned():
        alone = subject.mttkrps(d_matrices, groups)
        *once, (total,) = subject.mttkrps(d_matrices, groups, sums=sums)
        again = total
        if repeats(dtype):
            *_, (again,) = subject.mttkrps(d_matrices, groups, sums=sums)
    for gradients, others in zip(once, alone, strict=True):
        assert all(map(torch.equal, gradients, others)), f"{name}: other gradients of factors"
    assert torch.equal(total, again), f"{name}: differs from run to run"
    there = sums.cpu()
    judge(name, total, there.double().sum(0), there.sum(0).to(dtype), integers)


def forms() -> Iterator[Form]:
    """What is compiled ahead of time."""
    for modes, rank, in_pieces in (
        (((16, 16, 16), (16, 16, 16)), 64, ()),
        (((1, 8, 8, 16), (32, 32), (3, 3)), 180, (2,)),
        (((64, 64), (64, 64)), 256, (0, 1)),
        (((1, 1024, 2), (11,)), 89, ()),
    ):
        # Half precisions make the same code but for the names of instructions.
        for dtype in (torch.bfloat16, torch.float32):
            padded = padded_rank(rank)
            each = (padded,) * len(modes)
            apart = tuple(
                [math.prod(g) * padded if n in in_pieces else 0 for n, g in enumerate(modes)]
            )
            factors = tuple([pointers_to(dtype, len(group)) for group in modes])
            ranks = (rank,) * len(modes)
            if len(modes) < subject.MOST_GROUPS:
                # The sums of a bias, as the last group.
                width = math.prod(modes[-1])
                modes, ranks, each = (*modes, (1,)), (*ranks, width), (*each, width)
                apart, factors = (*apart, width), (*factors, pointers_to(dtype, 1))
            form = subject.form_of(modes, ranks, each, apart)
            yield Form(
                f"{modes} rank {rank} {short(dtype)}, in pieces {in_pieces}",
                subject.mttkrp_kernel,
                (
                    pointers_to(torch.float32, len(modes)),
                    factors,
                    factors,
                    *("i32",) * subject.MOST_GROUPS,
                ),
                form.constants,
                warps=subject.WARPS,
                wide_loads=rank * dtype.itemsize % 16 == 0,
            )
