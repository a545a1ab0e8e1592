"""Is a contestant right, what does it keep and need, and how long does it take."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench.problem import Built, Form, Problem, apply_dense, dense_weight
from benchmarks.records import spread
from polyadic.testing import KeptBytes, LiveBytes


class Gate:
    """The float64 answers of one problem; each format of the parameters is worked out once."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._answers: dict[Form, tuple[Tensor, ...]] = {}

    def errors(self, built: Built, y_infer: Tensor, step: Step | None = None) -> dict[str, float]:
        """Relative L2 errors; NaN and infinity count as infinite error.

        Args:
            built: the contestant.
            y_infer: its output without autograd.
            step: its training step, where it has one.
        """
        right_y, *right_grads = self._answer(built)
        errors = {"y": _error(y_infer, right_y)}
        if step is None:
            return errors
        errors["y under autograd"] = _error(step.y, right_y)
        names = ["x", *[f"parameter {i}" for i in range(len(built.parameters))]]
        for name, got, right in zip(names, step.grads, right_grads, strict=True):
            errors[f"gradient of {name}"] = _error(got, right)
        return errors

    def _answer(self, built: Built) -> tuple[Tensor, ...]:
        if built.form not in self._answers:
            case = self._problem.case
            leaves = [
                t.detach().double().contiguous().requires_grad_()
                for t in (built.x, *built.parameters)
            ]
            y = apply_dense(case, leaves[0], dense_weight(case, built.form, leaves[1:]))
            grads = torch.autograd.grad(y, leaves, self._problem.grad.double())
            self._answers[built.form] = (y.detach(), *grads)
        return self._answers[built.form]


def _error(got: Tensor, right: Tensor) -> float:
    if got.shape != right.shape:
        return float("inf")
    size = float(right.norm())
    error = float((got.detach().double() - right).norm()) / (size or 1.0)
    return error if error < float("inf") else float("inf")


def like(grad: Tensor, y: Tensor) -> Tensor:
    """Copy the numbers into y's strides, as the next layer's backward would hand them."""
    return torch.empty_like(y).copy_(grad).detach()


@dataclass(frozen=True)
class Step:
    """One training step, and what it needed.

    Args:
        y: the output.
        grads: gradients of x and of every parameter.
        kept: bytes autograd keeps from forward to backward: distinct storages, parameters left
            out. The input counts, since the layer keeps it alive. None where it was not asked.
        peak: most bytes live at once: parameters, x, gradient of y, and all the step makes.
    """

    y: Tensor
    grads: tuple[Tensor, ...]
    kept: int | None = None
    peak: int | None = None


def plain_step(built: Built, grad: Tensor) -> Step:
    """One training step, its memory not looked at."""
    y = built.forward(built.x)
    return Step(y.detach(), torch.autograd.grad(y, (built.x, *built.parameters), grad))


def observed_step(built: Built, grad: Tensor) -> Step:
    """One training step with its bytes counted; far slower where its tensors are small."""
    with LiveBytes([built.x, grad, *built.parameters]) as live:
        with KeptBytes(leave_out=built.parameters) as kept:
            y = built.forward(built.x)
        bytes_kept = kept.total
        grads = torch.autograd.grad(y, (built.x, *built.parameters), grad)
    return Step(y.detach(), grads, bytes_kept, live.peak)


@dataclass(frozen=True)
class Patience:
    """How long contestants are timed.

    Args:
        seconds: that each gets at least, unless it is stopped early.
        repeats: that each gets at least.
        block: seconds one repeat should last; shorter steps are called several times in it.
        limit: seconds after which three repeats are enough.
        close: contestants within this factor of the best go on until all of them have had
            enough; the others, on whom no decision hangs, get half of these seconds.
        hopeless: a contestant this many times slower than the best is stopped once it has had a
            third of its seconds and three repeats, or all its seconds.
    """

    seconds: float = 0.25
    repeats: int = 7
    block: float = 1e-3
    limit: float = 1.5
    close: float = 1.3
    hopeless: float = 4.0


@dataclass
class Timing:
    """Seconds per call, one entry per repeat.

    Args:
        calls: in one repeat.
        warm: whether a call goes ahead of each repeat without being counted.
    """

    calls: int = 1
    warm: bool = True
    samples: list[float] = field(default_factory=list)
    stopped_early: bool = False

    @property
    def elapsed(self) -> float:
        """Seconds spent in all, uncounted calls included."""
        return (self.calls + self.warm) * sum(self.samples)

    def record(self) -> dict[str, Any]:
        """Median, least and quartiles in seconds."""
        return {
            **spread(self.samples),
            "calls_per_repeat": self.calls,
            "stopped_early": self.stopped_early,
        }


def time_interleaved(
    steps: Mapping[str, Callable[[], Any]],
    patience: Patience,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time steps in turns, so that what disturbs the machine disturbs all alike.

    The order is drawn anew in every round. A turn is a block of calls behind one that is not
    counted, since the turn before has emptied the caches and given back other memory; calls so
    long that this cannot matter go without.

    Args:
        steps: by name.
        patience: how long they are timed.
        synchronize: waits for the device.
        clock: seconds; those of the wall by default.
    """
    order = random.Random(0)

    def seconds(step: Callable[[], Any], calls: int) -> float:
        now = clock or time.perf_counter
        synchronize()
        start = now()
        for _ in range(calls):
            step()
        synchronize()
        return (now() - start) / calls

    timings = {name: _prepare(step, patience, seconds) for name, step in steps.items()}
    waiting = dict(steps)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while waiting:
            turns = list(waiting.items())
            order.shuffle(turns)
            for name, step in turns:
                timing = timings[name]
                if timing.warm:
                    step()
                timing.samples.append(seconds(step, timing.calls))
            best = min(min(timing.samples) for timing in timings.values())
            done = {name for name in waiting if _enough(timings[name], best, patience)}
            close = {
                name for name in waiting if min(timings[name].samples) <= best * patience.close
            }
            # Whoever is close to the best is measured through the same disturbances as the best.
            for name in done if close <= done else done - close:
                del waiting[name]
    finally:
        if collecting:
            gc.enable()
    return timings


def _prepare(
    step: Callable[[], Any],
    patience: Patience,
    seconds: Callable[[Callable[[], Any], int], float],
) -> Timing:
    """Settle how often a step is called in a turn, and whether a call goes ahead of it."""
    first = seconds(step, 1)
    if first >= 50 * patience.block:
        return Timing(warm=False)
    best = min(seconds(step, 1) for _ in range(3))
    return Timing(max(1, round(patience.block / best)))


def _enough(timing: Timing, best: float, patience: Patience) -> bool:
    count = len(timing.samples)
    slower = min(timing.samples) / best
    share = 1.0 if slower <= patience.close else 0.5
    patient = patience.seconds / 3 if count >= 3 else patience.seconds
    if slower > patience.hopeless and timing.elapsed >= patient:
        timing.stopped_early = True
        return True
    if count >= patience.repeats and timing.elapsed >= share * patience.seconds:
        return True
    return count >= 3 and timing.elapsed >= share * patience.limit
