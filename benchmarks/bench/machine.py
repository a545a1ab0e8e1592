"""What the machine can do, measured in the same run, and the floor no layer can go below."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.bench.cases import Case, LinearCase, Mode

GEMM_SIZES = (512, 1024, 1536, 2048)
COPY_BYTES = tuple(2**p for p in (16, 18, 20, 22, 24, 26, 28))


@dataclass(frozen=True)
class Rates:
    """What one machine reaches with a thread count and dtype.

    Args:
        flops: per second, of the best square GEMM.
        bandwidth: (working set in bytes, bytes per second read and written by a copy), ascending.
    """

    flops: float
    bandwidth: tuple[tuple[int, float], ...]

    def bytes_per_second(self, working_set: float) -> float:
        """Of the best copy whose working set is no smaller: a bound from above, caches and all."""
        fitting = [rate for size, rate in self.bandwidth if size >= working_set]
        return max(fitting, default=self.bandwidth[-1][1])


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return what waits for the device."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _best(step: Callable[[], Any], seconds: float, synchronize: Callable[[], None]) -> float:
    """Shortest time of a step among those that fit into some seconds, at least three."""
    step()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_rates(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Rates:
    """GEMM peak of torch's BLAS and copy bandwidth with the threads set now."""
    seconds, synchronize = 0.1 if quick else 0.5, synchronizer(device)
    flops = 0.0
    sizes = GEMM_SIZES if device.type == "cpu" else (2048, 4096, 8192)
    for n in sizes[:2] if quick else sizes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        by_blas = partial(torch.mm, a, b, out=out)
        with torch.no_grad():
            best = _best(by_blas, seconds, synchronize)
        flops = max(flops, 2 * n**3 / best)
    bandwidth = []
    for size in COPY_BYTES[::2] if quick else COPY_BYTES:
        half = torch.ones(size // 2, device=device, dtype=torch.uint8)
        target = torch.empty_like(half)
        repeats = max(1, 2**20 // size)

        def copy(half: torch.Tensor = half, out: torch.Tensor = target, n: int = repeats) -> None:
            for _ in range(n):
                out.copy_(half)

        bandwidth.append((size, repeats * size / _best(copy, seconds / 4, synchronize)))
    return Rates(flops, tuple(bandwidth))


@dataclass(frozen=True)
class Work:
    """FLOPs and least bytes of a cell by one route."""

    flops: int
    bytes: int

    def floor(self, rates: Rates) -> float:
        """Seconds below which no implementation of the route can go on this machine."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes_per_second(self.bytes))


def work(case: Case, mode: Mode, element_size: int) -> dict[str, Work]:
    """FLOPs and least bytes of ``"factorized"`` (its cheapest route), ``"rebuild"``, ``"dense"``.

    The factorized route is whichever of contracting factor by factor and rebuilding the weight
    needs fewer FLOPs. A training step is three times the forward: the gradients of x and of the
    parameters cost as much each. Khatri-Rao products and MTTKRPs, independent of the batch, are
    left out. Least bytes: x, the gradient of y and the parameters read once, y and all gradients
    written once.
    """
    steps = 3 if mode == "training" else 1
    x, y = math.prod(case.x_shape), math.prod(case.y_shape)
    fmt, rank = case.format, case.rank
    if isinstance(case, LinearCase):
        rows_out, taps = case.batch, 0
    else:
        rows_out = case.batch * case.out_size**2
        taps = rows_out * rank * case.format.depthwise_taps
    dense = 2 * rows_out * fmt.dense_parameters
    contract = 2 * (rank * (x + y) + taps)
    rebuild = 2 * rank * fmt.dense_parameters + dense

    def least(parameters: int) -> int:
        maps = 2 * (x + y) if mode == "training" else x + y
        return element_size * (maps + (2 if mode == "training" else 1) * parameters)

    own = least(fmt.parameters)
    return {
        "contract": Work(steps * contract, own),
        "rebuild": Work(steps * rebuild, own),
        "factorized": Work(steps * min(contract, rebuild), own),
        "dense": Work(steps * dense, least(fmt.dense_parameters)),
    }
