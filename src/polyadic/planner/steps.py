"""The vocabulary in which plans are priced: a step, and the usual kinds of steps.

A step is one operation of torch, or a few that belong together, with its FLOPs, its bytes and its
launches. ``linear``, ``conv`` and ``embedding`` beside this module list the steps of their kind of
layer. Each mirrors the module of ``polyadic.kernels`` that has its name: it goes through the
operations that the kernel would call, but on sizes alone, for the device of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from polyadic.planner.request import Request

StepKind = Literal["gemm", "stream", "depthwise", "conv", "layout", "fused", "fft"]


@dataclass(frozen=True)
class Step:
    """One operation (or a few that belong together) of a plan.

    Args:
        name: what it computes, in the axes of the kernels.
        kind: which rate of the machine it runs at; ``"fused"`` is a kernel of the library's own.
        flops: multiply-adds of real numbers counted twice, four in one of complex numbers; only of
            GEMMs and convolutions, as ``polyadic.testing.Flops`` counts them.
        nbytes: the least number of bytes that must be read and written.
        launches: number of torch operations that touch memory; for a convolution, number of calls.
        views: number of torch operations that only make a view.
        sums: how many of the launches are sums, whose call takes a CPU as long as two others.
        rows: number of outer iterations of an elementwise step whose inner loop is short.
        elements: number of elements of the largest tensor that is written.
        padded_flops: FLOPs including those on the padding up to the width of the vector units; of
            a fast transform, which torch does not count, its operations; for a convolution, the
            FLOPs that take as long at the rate of a forward convolution. Equal to ``flops`` by
            default.
        channels_last: whether a convolution works in this layout.
        slowed: factor by which a GPU is slower than for rows that begin at multiples of 16 bytes.
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


# cuBLAS multiplies half-precision rows more slowly where they do not begin at multiples of 16
# bytes. The factor is an estimate and has not been measured.
SLOWED_BY_MISALIGNED_ROWS = 2.0


def gemm(request: Request, name: str, m: int, k: int, n: int, *, views: int = 0) -> Step:
    """Price the product (m, k) @ (k, n), and the ``views`` made for it."""
    misaligned = request.is_half and not request.on_cpu and (k % 8 or n % 8)
    return Step(
        name,
        "gemm",
        2 * m * k * n * request.multiply_adds,
        request.item * (m * k + k * n + m * n),
        views=views,
        elements=m * n,
        padded_flops=2 * m * k * request.padded(n) * request.multiply_adds,
        slowed=SLOWED_BY_MISALIGNED_ROWS if misaligned else 1.0,
    )


def stream(name: str, nbytes: int, elements: int, **counts: Any) -> Step:
    """Price elementwise work that reads and writes ``nbytes`` bytes."""
    return Step(name, "stream", 0, nbytes, elements=elements, **counts)


def product_and_sum(name: str, nbytes: int, elements: int, rows: int, *, views: int = 0) -> Step:
    """Price a product of the largest tensor with a smaller one, and a sum over some dimensions."""
    return stream(name, nbytes, elements, launches=2, sums=1, views=views, rows=rows)


def transpose(request: Request, name: str, elements: int) -> Step:
    """Price a copy that reads or writes with a stride, at half the bandwidth of a plain one."""
    return Step(name, "layout", 0, 4 * request.item * elements, elements=elements)


def casts(request: Request, name: str, tensors: int, elements: int) -> list[Step]:
    """Price casts of half-precision tensors to float32 or back, of ``elements`` in all."""
    if not (request.is_half and tensors):
        return []
    nbytes = (request.item + 4) * elements
    return [stream(f"{name}, cast", nbytes, elements, launches=tensors)]
