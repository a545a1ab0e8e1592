"""The steps of the pieces of the multilinear form: a mirror of ``kernels.multilinear`` on sizes.

Khatri-Rao matrices of half-precision factors are formed in float32 and rounded once. Each cast is
an operation that has to be launched, so the casts are steps too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from polyadic.formats import Shape
from polyadic.planner.request import Request
from polyadic.planner.steps import Step, casts, gemm, product_and_sum, stream
from polyadic.plans import Groups


def grouped(sizes: Sequence[int], groups: Groups) -> list[Shape]:
    """Cut mode sizes into groups of these lengths."""
    pieces, start = [], 0
    for length in groups:
        pieces.append(tuple(sizes[start : start + length]))
        start += length
    return pieces


def _wide(request: Request) -> int:
    """Count the bytes of an element of a tensor that is kept in at least float32."""
    return max(request.item, 4)


def khatri_rao_steps(request: Request, name: str, sizes: Sequence[int], rank: int) -> list[Step]:
    """List the steps that form a Khatri-Rao matrix (Π sizes, R)."""
    steps = casts(request, f"{name}: factors", len(sizes), sum(sizes) * rank)
    steps += _growing(request, name, sizes, rank)
    return steps + casts(request, name, 1, math.prod(sizes) * rank)


def _growing(request: Request, name: str, sizes: Sequence[int], rank: int) -> list[Step]:
    """List the products that build (Π sizes, R) from wide factors; one factor needs none."""
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
                # Where the inner loop is short, each outer iteration adds to the time.
                rows=rows if size * rank < 2048 else 0,
            )
        )
        rows *= size
    return steps


def _prefixes(request: Request, name: str, sizes: Sequence[int], rank: int) -> list[Step]:
    """List the steps that widen the factors and make the products of the first d < D of them."""
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
    """List the steps that make the factors' gradients from dK (Π sizes, R), last mode first.

    Args:
        request: says dtype and device.
        name: starts the names of the steps.
        sizes: modes of the factors.
        rank: R.
        wide: whether dK is in float32 already.
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
    """List the steps that make the factors' gradients from dK, with the prefixes made anew."""
    return [
        *_prefixes(request, name, sizes, rank),
        *mttkrp_steps(request, name, sizes, rank, wide=wide),
    ]


def _matrices(request: Request, pieces: Sequence[Shape], rank: int) -> list[Step]:
    """List the steps that form each group's Khatri-Rao matrix, the last in the GEMM's dtype."""
    modes = [size for piece in pieces for size in piece]
    steps = casts(request, "factors", len(modes), sum(modes) * rank)
    for piece in pieces:
        name = f"Khatri-Rao of modes {'x'.join(map(str, piece))}"
        steps += _growing(request, name, piece, rank)
    return steps + casts(request, "Khatri-Rao", 1, math.prod(pieces[-1]) * rank)


def contract_steps(
    request: Request, rows: int, sizes: Shape, rank: int, groups: Groups
) -> list[Step]:
    """List the steps of Z = X K."""
    pieces = grouped(sizes, groups)
    return [*_matrices(request, pieces, rank), *_sum_right(request, rows, pieces, rank)]


def _sum_right(request: Request, rows: int, pieces: Sequence[Shape], rank: int) -> list[Step]:
    """List the steps that contract X with the groups from the right: a GEMM, then weighted sums."""
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
    """List the steps that make Q: Z multiplied by all groups but the last."""
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
    """List the steps of X = Z Kᵀ."""
    pieces = grouped(sizes, groups)
    return [
        *_matrices(request, pieces, rank),
        *_spread(request, rows, pieces, rank),
        _expand_last(request, rows, pieces, rank),
    ]


def _expand_last(request: Request, rows: int, pieces: Sequence[Shape], rank: int) -> Step:
    """Price the GEMM of Q with the matrix of the last group."""
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
    """List the steps that make the gradients of one side: of its factors and of X or Z.

    The tags are the terms of ``kernels.multilinear.partials``.

    Args:
        request: says dtype and device.
        rows: B.
        sizes: modes of the side.
        rank: R.
        groups: lengths of the groups of modes.
        wrt_x: whether the gradient of X is wanted.
        wrt_z: whether the gradient of Z is wanted.
        matrices_kept: whether the Khatri-Rao matrices were kept by the forward.
    """
    pieces = grouped(sizes, groups)
    outer, last = math.prod(map(math.prod, pieces[:-1])), math.prod(pieces[-1])
    steps = [] if matrices_kept else _matrices(request, pieces, rank)
    steps += _spread(request, rows, pieces, rank)  # Q_j
    if wrt_x:
        steps.append(_expand_last(request, rows, pieces, rank))  # ∂T/∂X = Q K_kᵀ
    if wrt_z or len(groups) > 1:
        steps += _sum_right(request, rows, pieces, rank)  # P_j, of which P_0 = ∂T/∂Z
    before = 1
    for j, piece in enumerate(pieces[:-1]):
        elements = rows * before * math.prod(piece) * rank
        nbytes = 4 * _wide(request) * elements
        if j == 0:
            steps += casts(request, "Z", 1, rows * rank)
        if j == len(pieces) - 2:
            steps += casts(request, "P", 1, elements)
        # ∂T/∂K_j = Σ P_j ∘ Q_{j-1}
        steps.append(product_and_sum("dK of a group", nbytes, elements, rows * before, views=1))
        steps += mttkrp_steps(request, "MTTKRP", piece, rank, wide=True)
        before *= math.prod(piece)
    # ∂T/∂K_k. The GEMM for dX has made the view of Q that this one reads.
    views = 1 if len(groups) == 1 or wrt_x else 2
    steps.append(gemm(request, "dK of the last group", last, rows * outer, rank, views=views))
    return steps + mttkrp_steps(request, "MTTKRP", pieces[-1], rank)
