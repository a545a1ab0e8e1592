"""The steps of the multilinear form's pieces: a mirror of ``kernels.multilinear`` on sizes.

Khatri-Rao matrices of half-precision factors are formed in float32 and rounded once: the casts are
steps too, as each is a kernel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from polyadic.formats import Shape
from polyadic.planner.request import Request
from polyadic.planner.steps import Step, casts, gemm, product_and_sum, stream
from polyadic.plans import Groups


def grouped(sizes: Sequence[int], groups: Groups) -> list[Shape]:
    """The mode sizes of each group."""
    pieces, start = [], 0
    for length in groups:
        pieces.append(tuple(sizes[start : start + length]))
        start += length
    return pieces


def _wide(request: Request) -> int:
    """Bytes of an element of what is multiplied and summed in at least float32."""
    return max(request.item, 4)


def khatri_rao_steps(request: Request, name: str, sizes: Sequence[int], rank: int) -> list[Step]:
    """(Π sizes, R) from its factors."""
    steps = casts(request, f"{name}: factors", len(sizes), sum(sizes) * rank)
    steps += _growing(request, name, sizes, rank)
    return steps + casts(request, name, 1, math.prod(sizes) * rank)


def _growing(request: Request, name: str, sizes: Sequence[int], rank: int) -> list[Step]:
    """The products that build (Π sizes, R) from wide factors; none for one factor."""
    steps, rows = [], sizes[0]
    for mode, size in enumerate(sizes[1:], 2):
        elements = rows * size * rank
        steps.append(
            stream(
                name,
                # The product is written once; its two small operands come from the cache.
                _wide(request) * elements,
                elements,
                views=1 + (mode == len(sizes)),
                # Outer iterations cost something of their own where the inner loop is short.
                rows=rows if size * rank < 2048 else 0,
            )
        )
        rows *= size
    return steps


def _prefixes(request: Request, name: str, sizes: Sequence[int], rank: int) -> list[Step]:
    """Wide factors, and the products of the first of them without the last."""
    steps = casts(request, f"{name}: factors", len(sizes), sum(sizes) * rank)
    others = len(sizes) - 1
    if others:
        elements = math.prod(sizes[:-1]) * rank
        counts = {"launches": others - 1, "views": others}
        steps.append(stream(f"{name}: prefixes", _wide(request) * elements, elements, **counts))
    return steps


def mttkrp_steps(
    request: Request, name: str, sizes: Sequence[int], rank: int, *, wide: bool = False
) -> list[Step]:
    """Gradients of the factors from dK (Π sizes, R), mode by mode from the right.

    Args:
        request: dtype and device.
        name: of the steps.
        sizes: modes of the factors.
        rank: R.
        wide: dK is in float32 already.
    """
    # A GPU hands dK out in float32.
    wide = wide or request.device == "cuda"
    steps = [] if wide else casts(request, "dK", 1, math.prod(sizes) * rank)
    for mode in range(len(sizes) - 1, 0, -1):
        left = math.prod(sizes[:mode])
        elements = left * sizes[mode] * rank
        nbytes = 4 * _wide(request) * elements
        first = mode == len(sizes) - 1
        for half, views in (("factor", int(first)), ("rest", 0)):
            label = f"{name} mode {mode + 1}, {half}"
            steps.append(product_and_sum(label, nbytes, elements, left, views=views))
    return steps + casts(request, f"{name}: gradients", len(sizes), sum(sizes) * rank)


def khatri_rao_backward_steps(
    request: Request, name: str, sizes: Sequence[int], rank: int, *, wide: bool = False
) -> list[Step]:
    """Gradients of the factors from dK, whose prefixes are made anew."""
    return [
        *_prefixes(request, name, sizes, rank),
        *mttkrp_steps(request, name, sizes, rank, wide=wide),
    ]


def _matrices(request: Request, pieces: Sequence[Shape], rank: int) -> list[Step]:
    """The Khatri-Rao matrix of each group; the last one in the dtype of the GEMM."""
    modes = [size for piece in pieces for size in piece]
    steps = casts(request, "factors", len(modes), sum(modes) * rank)
    for piece in pieces:
        name = f"Khatri-Rao of modes {'x'.join(map(str, piece))}"
        steps += _growing(request, name, piece, rank)
    return steps + casts(request, "Khatri-Rao", 1, math.prod(pieces[-1]) * rank)


def contract_steps(
    request: Request, rows: int, sizes: Shape, rank: int, groups: Groups
) -> list[Step]:
    """Z = X K."""
    pieces = grouped(sizes, groups)
    return [*_matrices(request, pieces, rank), *_sum_right(request, rows, pieces, rank)]


def _sum_right(request: Request, rows: int, pieces: Sequence[Shape], rank: int) -> list[Step]:
    outer, last = math.prod(map(math.prod, pieces[:-1])), math.prod(pieces[-1])
    views = 0 if len(pieces) == 1 else 2
    steps = [gemm(request, "contract the last group", rows * outer, last, rank, views=views)]
    for piece in reversed(pieces[:-1]):
        elements = rows * outer * rank
        outer //= math.prod(piece)
        nbytes = 4 * _wide(request) * elements
        steps.append(product_and_sum("weighted sum over a group", nbytes, elements, rows * outer))
    return steps + (casts(request, "Z", 1, rows * rank) if len(pieces) > 1 else [])


def _spread(request: Request, rows: int, pieces: Sequence[Shape], rank: int) -> list[Step]:
    """Q: Z multiplied by all groups but the last."""
    steps: list[Step] = []
    outer = 1
    for piece in pieces[:-1]:
        before, outer = outer, outer * math.prod(piece)
        elements = rows * outer * rank
        nbytes = 2 * _wide(request) * elements
        steps.append(stream("spread over a group", nbytes, elements, views=1, rows=rows * before))
    return steps + (casts(request, "Q", 1, rows * outer * rank) if len(pieces) > 1 else [])


def expand_steps(
    request: Request, rows: int, sizes: Shape, rank: int, groups: Groups
) -> list[Step]:
    """X = Z Kᵀ."""
    pieces = grouped(sizes, groups)
    return [
        *_matrices(request, pieces, rank),
        *_spread(request, rows, pieces, rank),
        _expand_last(request, rows, pieces, rank),
    ]


def _expand_last(request: Request, rows: int, pieces: Sequence[Shape], rank: int) -> Step:
    outer, last = math.prod(map(math.prod, pieces[:-1])), math.prod(pieces[-1])
    views = 1 if len(pieces) == 1 else 3
    return gemm(request, "expand the last group", rows * outer, rank, last, views=views)


def partials_steps(
    request: Request,
    rows: int,
    sizes: Shape,
    rank: int,
    groups: Groups,
    *,
    wrt_x: bool,
    wrt_z: bool,
    matrices_kept: bool = False,
) -> list[Step]:
    """Gradients of one side: of its factors and of X or Z.

    Args:
        request: dtype and device.
        rows: B.
        sizes: modes of the side.
        rank: R.
        groups: lengths of the groups of modes.
        wrt_x: the gradient of X is wanted.
        wrt_z: that of Z is wanted.
        matrices_kept: the Khatri-Rao matrices are there from the forward.
    """
    pieces = grouped(sizes, groups)
    outer, last = math.prod(map(math.prod, pieces[:-1])), math.prod(pieces[-1])
    steps = [] if matrices_kept else _matrices(request, pieces, rank)
    steps += _spread(request, rows, pieces, rank)
    if wrt_x:
        steps.append(_expand_last(request, rows, pieces, rank))
    if wrt_z or len(groups) > 1:
        steps += _sum_right(request, rows, pieces, rank)
    before = 1
    for j, piece in enumerate(pieces[:-1]):
        elements = rows * before * math.prod(piece) * rank
        nbytes = 4 * _wide(request) * elements
        if j == 0:
            steps += casts(request, "Z", 1, rows * rank)
        if j == len(pieces) - 2:
            steps += casts(request, "P", 1, elements)
        steps.append(product_and_sum("dK of a group", nbytes, elements, rows * before, views=1))
        steps += mttkrp_steps(request, "MTTKRP", piece, rank, wide=True)
        before *= math.prod(piece)
    # Its rows of Z are those that give dX.
    views = 1 if len(groups) == 1 or wrt_x else 2
    steps.append(gemm(request, "dK of the last group", last, rows * outer, rank, views=views))
    return steps + mttkrp_steps(request, "MTTKRP", pieces[-1], rank)
