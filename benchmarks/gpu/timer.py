"""Seconds of a call on a GPU: in a CUDA graph over rotating inputs, and eagerly.

In a graph the GPU's own time is seen and nothing else: many calls on different inputs, together
larger than the L2 cache, are captured in one graph, whose replays are timed between two events.
Eagerly the wall clock is read around the same calls with one synchronisation at the end, which is
what a user waits for. On a CPU both are the wall clock, so that the benchmark can be tried there.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.records import spread

Call = Callable[[], Any]
Context = Callable[[], AbstractContextManager[Any]]
WARM_CALLS = 3
# An eager sample lasts so many blocks, as its one synchronisation takes some microseconds.
EAGER_BLOCKS = 4


@dataclass(frozen=True)
class Patience:
    """How long each contestant is timed.

    Args:
        seconds: after which it has had enough, unless it has too few samples.
        samples: the least number of samples.
        block: seconds that one sample should last at least.
    """

    seconds: float = 0.03
    samples: int = 7
    block: float = 1e-3


@dataclass
class Timing:
    """Seconds per call, one entry a sample.

    Args:
        calls: in one sample.
        samples: seconds per call.
    """

    calls: int
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)

    @property
    def elapsed(self) -> float:
        """Seconds spent in all."""
        return self.calls * sum(self.samples)

    def record(self) -> dict[str, Any]:
        """Median, least and quartiles in seconds, with the fields of the CPU benchmark."""
        return {
            **spread(self.samples),
            "calls_per_repeat": self.calls,
            "stopped_early": False,
        }


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector from a sample, and from freeing a graph while another is captured."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Captured:
    """Calls captured in one CUDA graph; what they return is held, so that it can be compared.

    Attributes:
        calls: how many calls one replay makes.
        outputs: what each call returned; a replay overwrites it.
    """

    def __init__(self, calls: Sequence[Call], side: torch.cuda.Stream) -> None:
        """Warm the calls up on a side stream, then capture them.

        Args:
            calls: what is captured.
            side: the stream; always the same one, as cuBLAS takes memory for each.

        Raises:
            RuntimeError: a call cannot be captured.
        """
        self.calls = len(calls)
        # What an earlier step left in a cycle may belong to another stream: no capture allows that.
        gc.collect()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:WARM_CALLS]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would collect garbage and empty the allocator's cache at every capture,
        # which takes longer than the timing.
        with _no_collection(), torch.cuda.stream(side):
            self._graph.capture_begin()
            try:
                self.outputs = [call() for call in calls]
            except BaseException:
                # The end of a broken capture raises too, and says less.
                with suppress(RuntimeError):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        self.replay()
        torch.cuda.synchronize()

    def replay(self) -> None:
        """Run the calls again."""
        self._graph.replay()


class Repeated:
    """The same calls one after the other, where there are no graphs."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = len(calls)
        self._run = list(calls)
        self.outputs = [call() for call in calls]

    def replay(self) -> None:
        """Run the calls again."""
        self.outputs = [call() for call in self._run]


class Timer:
    """Times calls on one device.

    Args:
        device: the calls' device.
        patience: how long each contestant is timed.
    """

    def __init__(self, device: torch.device, patience: Patience | None = None) -> None:
        self.on_gpu = device.type == "cuda"
        self.patience = patience or Patience()
        self._side = torch.cuda.Stream() if self.on_gpu else None

    def synchronize(self) -> None:
        """Wait for the GPU; raises what an earlier kernel did wrong."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def capture(self, calls: Sequence[Call]) -> Captured | Repeated:
        """Calls as one replayable piece."""
        return Repeated(calls) if self._side is None else Captured(calls, self._side)

    def graph(self, calls: Sequence[Call]) -> Timing:
        """Time calls in a graph of their own."""
        return self.graphs({"": self.capture(calls)})[""]

    def graphs(self, pieces: Mapping[str, Captured | Repeated]) -> dict[str, Timing]:
        """Time captured pieces in turns."""
        clock = self._by_events if self.on_gpu else self._by_wall
        return self._in_turns({n: (p.replay, p.calls) for n, p in pieces.items()}, clock)

    def eager(self, calls: Sequence[Call]) -> Timing:
        """Time calls by the wall clock."""
        return self.eagers({"": calls})[""]

    def eagers(
        self, pieces: Mapping[str, Sequence[Call]], inside: Mapping[str, Context] | None = None
    ) -> dict[str, Timing]:
        """Time lists of calls by the wall clock in turns.

        Args:
            pieces: the calls of each.
            inside: contexts that some run in, entered and left while no clock runs.
        """
        turns = {name: (_repeat(calls), len(calls)) for name, calls in pieces.items()}
        return self._in_turns(turns, self._by_wall, EAGER_BLOCKS, inside)

    def _in_turns(
        self,
        turns: Mapping[str, tuple[Call, int]],
        clock: Callable[[Call, int], float],
        blocks: int = 1,
        inside: Mapping[str, Context] | None = None,
    ) -> dict[str, Timing]:
        """Sample everybody once a round, so that a warmer or slower chip disturbs all alike."""
        timings, inner = {}, {}
        context = {name: (inside or {}).get(name, nullcontext) for name in turns}
        for name, (run, calls) in turns.items():
            with context[name]():
                run()
                seconds = clock(run, 1)
            inner[name] = max(1, min(50, round(blocks * self.patience.block / max(seconds, 1e-9))))
            timings[name] = Timing(calls * inner[name])
        waiting = dict(turns)
        while waiting:
            for name, (run, _) in list(waiting.items()):
                timing = timings[name]
                with context[name](), _no_collection():
                    timing.samples.append(clock(run, inner[name]) / timing.calls)
                enough = len(timing.samples) >= self.patience.samples
                if enough and timing.elapsed >= self.patience.seconds:
                    del waiting[name]
        return timings

    def _by_events(self, run: Call, times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _by_wall(self, run: Call, times: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            run()
        self.synchronize()
        return time.perf_counter() - start


def _repeat(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run
