"""How long a call keeps the device busy, and how long the processor that launches it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Run = Callable[[], object]


class Clock(Protocol):
    """What calibration asks of a device."""

    def work(self, run: Run) -> float:
        """Seconds that the device works on one call; on a CPU the launches are in it."""

    def host(self, run: Run) -> float:
        """Seconds that the processor spends on one call, which it does not wait for."""


def clock_of(device_type: str) -> Clock:
    """Return the clock for a type of device."""
    return GpuClock() if device_type == "cuda" else CpuClock()


def median(times: list[float]) -> float:
    """Return the median; of an even number of times, the larger of the two in the middle."""
    return sorted(times)[len(times) // 2]


class CpuClock:
    """Times calls one after the other."""

    def work(self, run: Run, budget: float = 0.12) -> float:
        """Median time of one call, after a warm-up; at least five calls."""
        run()
        run()
        times: list[float] = []
        while len(times) < 5 or (sum(times) < budget and len(times) < 400):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return median(times)

    def host(self, run: Run) -> float:
        """Return ``work``, as the processor is the device."""
        return self.work(run)


class GpuClock:
    """Times calls in a CUDA graph, replayed between two events; and launches without waiting."""

    # Calls in one graph: so many that the cost of starting and ending a replay does not count.
    CALLS = 20
    # Launches in a row: fewer than their queue holds, as a full queue stops the processor.
    LAUNCHES = 100
    REPEATS = 7

    def work(self, run: Run) -> float:
        """Median time of one call among those of a replayed graph."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        # Kernels are chosen and loaded and memory is allocated at the first call, which therefore
        # must come before the capture.
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.CALLS):
                run()
        times: list[float] = []
        for _ in range(self.REPEATS):
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / self.CALLS)
        return median(times)

    def host(self, run: Run) -> float:
        """Median time of the processor for one call among many, with nothing left in the queue."""
        run()
        times: list[float] = []
        for _ in range(self.REPEATS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(self.LAUNCHES):
                run()
            times.append((time.perf_counter() - start) / self.LAUNCHES)
            torch.cuda.synchronize()
        return median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
