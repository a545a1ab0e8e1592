"""Tables of the kernel that makes the gradients of both Khatri-Rao matrices of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import torch
from compiled import Form, pointers_to
from data import draw, judge, poisoned, short
from torch import Tensor

from polyadic.kernels.triton import outer as subject

HALVES = (torch.float16, torch.bfloat16)
# Rows of the batch, in and out features, columns, and programs that are to fill the GPU; more of
# them divide the batch into pieces.
SHAPES = (
    (1, 8, 16, 8, 256),
    (37, 72, 64, 24, 256),
    (64, 16, 136, 64, 256),
    (700, 80, 8, 16, 256),
    (1030, 24, 200, 40, 13),
)


def check() -> Iterator[str]:
    """Each row of the table that holds."""
    for dtype in HALVES:
        for rows, ins, outs, padded, many in SHAPES:
            for integers in (True, False):
                name = f"{short(dtype)} {rows} rows {ins} to {outs} by {padded} {integers=}"
                with mock.patch.object(subject, "MANY_PROGRAMS", many):
                    _check_one(name, rows, ins, outs, padded, dtype, integers)
                yield name


def _check_one(
    name: str, rows: int, ins: int, outs: int, padded: int, dtype: torch.dtype, integers: bool
) -> None:
    x, d_y = draw((rows, ins), dtype, integers), draw((rows, outs), dtype, integers)
    g, z = draw((rows, padded), dtype, integers), draw((rows, padded), dtype, integers)
    with poisoned():
        once = subject.outer(x, g, d_y, z, biased=True)
        again = subject.outer(x, g, d_y, z, biased=True)
        bare = subject.outer(x, g, d_y, z, biased=False)
    assert bare[2] is None
    assert torch.equal(bare[0], once[0]), f"{name}: dKA depends on the bias"
    assert torch.equal(bare[1], once[1]), f"{name}: dKC depends on the bias"

    def way(wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """DKA, dKC and the gradient of the bias."""
        left, right, first, second = (t.cpu().to(wide) for t in (x, d_y, g, z))
        return left.t() @ first, right.t() @ second, right.sum(0)

    exact, torchs = way(torch.float64), way(torch.float32)
    for what, found, repeated, wanted, given in zip(
        ("dka", "dkc", "sums"), once, again, exact, torchs, strict=True
    ):
        assert found is not None
        assert repeated is not None
        assert torch.equal(found, repeated), f"{name}: {what} differs from run to run"
        judge(f"{name} {what}", found.sum(0), wanted, given, integers)


def forms() -> Iterator[Form]:
    """What is compiled ahead of time."""
    for padded, biased in ((64, True), (64, False), (24, True), (16, False)):
        # Half precisions make the same code but for the names of instructions.
        yield Form(
            f"{padded} columns {biased=}",
            subject.outer_kernel,
            (*pointers_to(torch.bfloat16, 4), *("*fp32",) * 3, *("i32",) * 4),
            subject.constants_of(padded, biased),
            warps=subject.WARPS,
            stages=subject.STAGES,
            tensor_cores=True,
            # It runs where it was measured (see ``fused_linear``).
            capabilities=(90,),
        )
