"""Clocks for calibration: how long a call keeps the device busy, and how long the processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Run = Callable[[], object]


class Clock(Protocol):
    """What calibration measures on a device."""

    def work(self, run: Run) -> float:
        """Measure the seconds that the device works on one call; on a CPU they include launches."""

    def host(self, run: Run) -> float:
        """Measure the seconds that the processor spends on one call without waiting for it."""


def clock_of(device_type: str) -> Clock:
    """Return the clock for a type of device."""
    return GpuClock() if device_type == "cuda" else CpuClock()


def median(times: list[float]) -> float:
    """Return the middle value; of an even number, the larger of the two in the middle."""
    return sorted(times)[len(times) // 2]


class CpuClock:
    """Times calls one after the other, each by itself."""

    def work(self, run: Run, budget: float = 0.12) -> float:
        """Return the median time of at least five calls after a warm-up."""
        run()
        run()
        times: list[float] = []
        while len(times) < 5 or (sum(times) < budget and len(times) < 400):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return median(times)

    def host(self, run: Run) -> float:
        """Return what ``work`` returns, because on a CPU the processor is the device."""
        return self.work(run)


class GpuClock:
    """Times work by replaying a CUDA graph between events, and launches by not waiting for them."""

    # With this many calls in one graph, the start and the end of a replay hardly count.
    CALLS_PER_GRAPH = 20
    # This many launches fit into the queue; if it were full, the processor would stop and wait.
    LAUNCHES_IN_A_ROW = 100
    REPEATS = 7

    def work(self, run: Run) -> float:
        """Return the median time of one call of a replayed graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # The first calls choose, load and allocate things, which a capture does not allow.
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.CALLS_PER_GRAPH):
                run()
        times: list[float] = []
        for _ in range(self.REPEATS):
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / self.CALLS_PER_GRAPH)
        return median(times)

    def host(self, run: Run) -> float:
        """Return the processor's median time for one of many calls, from an empty queue on."""
        run()
        times: list[float] = []
        for _ in range(self.REPEATS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(self.LAUNCHES_IN_A_ROW):
                run()
            times.append((time.perf_counter() - start) / self.LAUNCHES_IN_A_ROW)
            torch.cuda.synchronize()
        return median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
