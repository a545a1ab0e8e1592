"""The vocabulary of a plan's steps: what one operation, or a few that belong together, costs.

The modules beside this one list the steps of each kind of layer. They mirror the modules of
``polyadic.kernels`` that have the same names, on sizes alone, for the device of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from polyadic.planner.request import Request

StepKind = Literal["gemm", "stream", "depthwise", "conv", "layout", "fused"]


@dataclass(frozen=True)
class Step:
    """One operation (or a few that belong together) of a plan.

    Args:
        name: what it computes, in the axes of the kernels.
        kind: which rate of the machine it runs at; ``"fused"`` is a kernel of the library's own.
        flops: multiply-adds counted twice; only of GEMMs and convolutions, as torch counts them.
        nbytes: least bytes read and written.
        launches: torch operations dispatched that touch memory; of a convolution, calls of torch's.
        views: torch operations dispatched that make a view.
        sums: of the launches those that sum; calling one takes a CPU as long as two others.
        rows: outer iterations of an elementwise step whose inner loop is short.
        elements: elements of the largest tensor written.
        padded_flops: FLOPs at the width the vector units work in, or of a convolution those that
            take as long at the forward's rate; ``flops`` by default.
        channels_last: of a convolution, the layout.
        slowed: how many times as long a GPU takes as for rows that begin at multiples of 16 bytes.
    """

    name: str
    kind: StepKind
    flops: int = 0
    nbytes: int = 0
    launches: int = 1
    views: int = 0
    sums: int = 0
    rows: int = 0
    elements: int = 0
    padded_flops: int = 0
    channels_last: bool = True
    slowed: float = 1.0


# Without measurement: cuBLAS has slower products for half-precision rows that are not aligned.
SLOWED_BY_MISALIGNED_ROWS = 2.0


def gemm(request: Request, name: str, m: int, k: int, n: int, *, views: int = 0) -> Step:
    """(m, k) @ (k, n), with so many views before and after it."""
    misaligned = request.is_half and not request.on_cpu and (k % 8 or n % 8)
    return Step(
        name,
        "gemm",
        2 * m * k * n,
        request.item * (m * k + k * n + m * n),
        views=views,
        elements=m * n,
        padded_flops=2 * m * k * request.padded(n),
        slowed=SLOWED_BY_MISALIGNED_ROWS if misaligned else 1.0,
    )


def stream(name: str, nbytes: int, elements: int, **counts: Any) -> Step:
    """Elementwise work that reads and writes so many bytes."""
    return Step(name, "stream", 0, nbytes, elements=elements, **counts)


def product_and_sum(name: str, nbytes: int, elements: int, rows: int, *, views: int = 0) -> Step:
    """A product of the largest tensor with a smaller one, and its sum over some dimensions."""
    return stream(name, nbytes, elements, launches=2, sums=1, views=views, rows=rows)


def transpose(request: Request, name: str, elements: int) -> Step:
    """A copy that reads or writes with a stride: about half the bandwidth of a plain one."""
    return Step(name, "layout", 0, 4 * request.item * elements, elements=elements)


def casts(request: Request, name: str, tensors: int, elements: int) -> list[Step]:
    """So many half-precision tensors made wide, or back, with so many elements in all."""
    if not (request.is_half and tensors):
        return []
    nbytes = (request.item + 4) * elements
    return [stream(f"{name}, cast", nbytes, elements, launches=tensors)]
