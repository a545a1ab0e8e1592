"""The fewest bytes and FLOPs of a layer, and the seconds below which no code can go.

T rows (tokens), M in and N out features, rank R, elements of ``size`` bytes. A pass moves what it
must read and write once. No atomics: sums over rows that several programs share need the whole
operand again, so that the backward of a factorized layer reads the gradient dY twice, once for
G = dY KC and once for dKC = dYᵀ Z. Maps of R channels, which fit in the L2 cache or could stay on
the chip, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MODES = ("forward", "training")


@dataclass(frozen=True)
class Rates:
    """What this GPU reached.

    Args:
        copy: bytes per second, read and written, of a large copy.
        gemm: FLOPs per second of a large square product in the dtype at hand.
        measured: False where they are an H100's datasheet-like readings for want of our own.
    """

    copy: float = 3.0e12
    gemm: float = 7.9e14
    measured: bool = False


@dataclass(frozen=True)
class Work:
    """Least bytes and FLOPs."""

    bytes: int
    flops: int

    def seconds(self, rates: Rates) -> float:
        """The larger of the two times."""
        return max(self.bytes / rates.copy, self.flops / rates.gemm)


Floors = dict[tuple[str, str], Work]


def factorized(x: int, y: int, flops: int, parameters: int, size: int) -> Floors:
    """Any factorized layer: x and y are the elements of its input and output.

    Forward X and Y once; backward dY twice, X once more, dX once, and the parameters with their
    gradients.
    """
    forward = size * (x + y + parameters)
    training = size * (3 * (x + y) + 3 * parameters)
    return {
        ("forward", "factorized"): Work(forward, flops),
        ("training", "factorized"): Work(training, 3 * flops),
    }


def linear(T: int, M: int, N: int, R: int, parameters: int, size: int) -> Floors:
    """A CP linear layer beside the dense one; each of dense's three products moves its operands."""
    found = factorized(T * M, T * N, 2 * T * R * (M + N), parameters, size)
    product = size * (T * M + T * N + M * N)
    found["forward", "dense"] = Work(product, 2 * T * M * N)
    found["training", "dense"] = Work(3 * product, 6 * T * M * N)
    return found


def embedding(T: int, V: int, E: int, R: int, parameters: int, size: int) -> Floors:
    """A lookup of T rows; indices are int64. The dense gradient table is zeroed, then added to."""
    indices = 8 * T
    step = indices + size * (T * E + 2 * T * E + 3 * parameters)
    return {
        ("forward", "factorized"): Work(indices + size * (T * E + parameters), 2 * T * R * E),
        ("training", "factorized"): Work(step, 6 * T * R * E),
        ("forward", "dense"): Work(indices + 2 * size * T * E, 0),
        ("training", "dense"): Work(2 * indices + size * (5 * T * E + V * E), 0),
    }


def conv(
    B: int, C: int, N: int, pixels: int, taps: int, R: int, parameters: int, size: int
) -> Floors:
    """A convolution with stride 1 that keeps the spatial size."""
    maps = B * pixels
    x, y, weight = maps * C, maps * N, C * N * taps
    found = factorized(x, y, 2 * maps * R * (C + N + taps), parameters, size)
    product = size * (x + y + weight)
    found["forward", "dense"] = Work(product, 2 * maps * weight)
    found["training", "dense"] = Work(3 * product, 6 * maps * weight)
    return found


def records(floors: Floors, rates: Rates, threads: int) -> list[dict[str, Any]]:
    """The floors as a cell's record holds them; ``byte_seconds`` leaves the FLOPs out."""
    return [
        {
            "mode": mode,
            "threads": threads,
            "route": route,
            "flops": work.flops,
            "bytes": work.bytes,
            "seconds": work.seconds(rates),
            "byte_seconds": work.bytes / rates.copy,
        }
        for (mode, route), work in floors.items()
    ]
