"""Times the contestants of one cell side by side and writes their records.

Every contestant has modules (several, where their weights must not stay in the L2 cache) that take
the rotating inputs in turn. A training step is the forward and the gradients of the input and of
all parameters, taken by ``torch.autograd.grad`` so that nothing accumulates between calls. Before a
contestant is timed, its output and gradients are compared with its own module in float64.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import floors as least
from benchmarks.gpu.bench import Bench, said
from benchmarks.gpu.timer import Call, Captured, Repeated, Timing
from benchmarks.records import TOLERANCE

Build = Callable[[], nn.Module]
# Inputs and weights that take turns at the most; small ones stay in the L2 cache all the same.
MOST_INPUTS, MOST_WEIGHTS = 32, 80


class NotApplicableError(Exception):
    """The contestant cannot do this cell; the message says why."""


@contextmanager
def cudnn_by_trial(on: bool) -> Iterator[None]:
    """Whether cuDNN chooses its kernels by trying them all."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def in_double(module: nn.Module) -> nn.Module:
    """A copy in float64."""
    return copy.deepcopy(module).double()


@dataclass(frozen=True)
class Contestant:
    """Who competes.

    Args:
        name: as records and tables know it.
        family: ``"ours"``, ``"dense"``, ``"pair"``, ``"tltorch"``, ``"aten"`` or ``"plan"``.
        build: makes one module on the device; raises NotApplicableError or ModuleNotFoundError.
        inside: a context that it is built, captured and called in; entered outside what is timed.
        inference: whether it has no backward worth timing.
        copies: modules with weights of their own, None for as many as there are inputs.
        explained: a call (module, training) that returns the plan and its predicted seconds.
        exact: makes the float64 copy of a module that its numbers are held against.
        launches: ``"graph"`` and ``"eager"``, or one of them.
    """

    name: str
    family: str
    build: Build
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext
    inference: bool = False
    copies: int | None = None
    explained: Callable[[nn.Module, bool], tuple[str, float]] | None = None
    exact: Callable[[nn.Module], nn.Module] = in_double
    launches: tuple[str, ...] = ("graph", "eager")


@dataclass(frozen=True)
class Cell:
    """What is computed.

    Args:
        name: unique among all cells.
        title: for people.
        layer: ``"linear"``, ``"embedding"`` or ``"conv"``.
        group: the phase's group of cells.
        x_shape: of the input.
        y_shape: of the output.
        rank: R.
        inputs: makes one input.
        grad: makes one gradient of the output.
        floors: least bytes and FLOPs by mode and route.
        modes: what is timed.
        x_bytes: bytes of one input and its output, by which inputs rotate.
        weight_bytes: of the dense weight, by which they rotate where there are few rows.
        facts: what else the record should say.
    """

    name: str
    title: str
    layer: str
    group: str
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    rank: int
    inputs: Callable[[], Tensor]
    grad: Callable[[], Tensor]
    floors: least.Floors
    modes: tuple[str, ...] = least.MODES
    x_bytes: int = 0
    weight_bytes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def r_elements(self) -> int:
        """Elements of the R-channel map between the in and the out factors."""
        return math.prod(self.x_shape) // max(1, self.facts.get("in", self.x_shape[-1])) * self.rank


@dataclass
class Ready:
    """A contestant with its modules and what has been found out about it."""

    contestant: Contestant
    modules: list[nn.Module]
    found: dict[str, Any]

    def forwards(self, xs: Sequence[Tensor]) -> list[Call]:
        """One inference call an input."""
        return [partial(self._forward, i, x) for i, x in enumerate(xs)]

    def steps(self, xs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Call]:
        """One training step an input."""
        pairs = zip(xs, grads, strict=True)
        return [partial(self.step, i, x, grad) for i, (x, grad) in enumerate(pairs)]

    def _forward(self, i: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.modules[i % len(self.modules)](x)
            return y

    def step(self, i: int, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """Output, gradient of x where it has one, gradients of all parameters."""
        module = self.modules[i % len(self.modules)]
        return train(module, x, grad)


def train(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """One training step of one module."""
    wanted = [p for p in (x, *module.parameters()) if p.requires_grad]
    y = module(x)
    return (y.detach(), *torch.autograd.grad(y, wanted, grad))


def compete(bench: Bench, cell: Cell, contestants: Sequence[Contestant]) -> None:
    """Gate and time all contestants of a cell; each failure is recorded and spoils no other."""
    try:
        _compete(bench, cell, contestants)
    finally:
        bench.clean()


def _compete(bench: Bench, cell: Cell, contestants: Sequence[Contestant]) -> None:
    threads = torch.get_num_threads()
    bench.writer.write(
        "cell",
        cell=cell.name,
        title=cell.title,
        layer=cell.layer,
        group=cell.group,
        phase=bench.phase,
        x_shape=cell.x_shape,
        y_shape=cell.y_shape,
        rank=cell.rank,
        r_elements=cell.r_elements(),
        dtype=bench.dtype_name(),
        floors=least.records(cell.floors, bench.rates, threads),
        **cell.facts,
    )
    count = bench.rotations(cell.x_bytes, MOST_INPUTS)
    if cell.x_bytes < cell.weight_bytes:
        count = max(count, bench.rotations(cell.weight_bytes, MOST_WEIGHTS))
    xs = [cell.inputs() for _ in range(count)]
    grads = [cell.grad() for _ in range(count)] if "training" in cell.modes else []
    ready: dict[str, Ready] = {}
    for contestant in contestants:
        with contestant.inside():
            prepared = _prepared(bench, cell, contestant, xs, grads)
        if prepared is not None:
            ready[contestant.name] = prepared
    for mode in cell.modes:
        calls = {
            name: one.forwards(xs) if mode == "forward" else one.steps(xs, grads)
            for name, one in ready.items()
            if mode == "forward" or not one.contestant.inference
        }
        for launch in ("graph", "eager"):
            wanted = {
                name: some
                for name, some in calls.items()
                if launch in ready[name].contestant.launches
            }
            _timed(bench, cell, mode, launch, ready, wanted)


def _fields(cell: Cell, contestant: Contestant, bench: Bench) -> dict[str, Any]:
    return {
        "cell": cell.name,
        "contestant": contestant.name,
        "family": contestant.family,
        "layout": "given",
        "compiled": False,
        "threads": torch.get_num_threads(),
        "dtype": bench.dtype_name(),
    }


def _prepared(
    bench: Bench, cell: Cell, contestant: Contestant, xs: list[Tensor], grads: list[Tensor]
) -> Ready | None:
    """A contestant built and found right; else its record says why not."""
    fields = _fields(cell, contestant, bench)
    training = "training" in cell.modes and not contestant.inference
    start = time.perf_counter()
    try:
        modules = [contestant.build() for _ in range(contestant.copies or len(xs))]
        one = Ready(contestant, modules, {})
        exact = contestant.exact(modules[0])
        error, of = _gate(modules[0], exact, xs[0], grads[0] if training else None)
        del exact
        if not error <= TOLERANCE[bench.dtype]:
            reason = f"relative error {error:.1e} of {of} against float64"
            bench.writer.write(
                "measurement", **fields, status="refused", reason=reason, error=error, error_of=of
            )
            return None
        one.found = {
            "error": error,
            "error_of": of,
            "parameter_bytes": sum(p.numel() * p.element_size() for p in modules[0].parameters()),
        }
        if training:
            one.found["peak_bytes"] = _peak(bench, one, xs[0], grads[0])
        one.found["prepare_seconds"] = time.perf_counter() - start
    except (NotApplicableError, ModuleNotFoundError) as missing:
        bench.writer.write("measurement", **fields, status="skipped", reason=str(missing))
        return None
    except Exception as error:
        bench.writer.write("measurement", **fields, status="failed", reason=said(error))
        del error
        bench.recover()
        return None
    return one


def _gate(module: nn.Module, exact: nn.Module, x: Tensor, grad: Tensor | None) -> tuple[float, str]:
    """The largest relative L2 error against the module in float64, and of what."""
    got: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    if grad is None:
        with torch.no_grad():
            got, right = (module(x),), (exact(_double(x)),)
    else:
        got = train(module, x, grad)
        # Trying all of cuDNN's ways in float64 would take longer than everything else.
        with cudnn_by_trial(False):
            right = train(exact, _double(x), grad.double())
    names = ["y"]
    if grad is not None:
        names += ["gradient of x"] * x.requires_grad
        names += [f"gradient of {name}" for name, _ in module.named_parameters()]
    errors = {name: relative_error(g, r) for name, g, r in zip(names, got, right, strict=True)}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def _double(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def relative_error(got: Tensor, right: Tensor) -> float:
    """Relative L2 error; infinite where it is not a number or shapes differ."""
    if got.shape != right.shape:
        return math.inf
    right = right.double()
    norm = float(right.norm())
    error = float((got.double() - right).norm()) / (norm or 1.0)
    return error if math.isfinite(error) else math.inf


def _peak(bench: Bench, one: Ready, x: Tensor, grad: Tensor) -> int | None:
    """Most bytes one eager step needs: its parameters, x, gradient of y and all that it makes."""
    if bench.device.type != "cuda":
        return None
    one.step(0, x, grad)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = one.step(0, x, grad)
    torch.cuda.synchronize()
    made = torch.cuda.max_memory_allocated() - before
    del held
    given = x.numel() * x.element_size() + grad.numel() * grad.element_size()
    return made + given + int(one.found["parameter_bytes"])


def _timed(
    bench: Bench,
    cell: Cell,
    mode: str,
    launch: str,
    ready: Mapping[str, Ready],
    calls: Mapping[str, Sequence[Call]],
) -> None:
    """Time everybody in one mode, in graphs or eagerly."""
    timings: dict[str, Timing] = {}
    if launch == "eager":
        try:
            inside = {name: ready[name].contestant.inside for name in calls}
            timings = bench.timer.eagers(calls, inside)
        except Exception as error:
            _failed(bench, cell, mode, launch, [ready[name].contestant for name in calls], error)
    else:
        timings = bench.timer.graphs(_captured(bench, cell, mode, ready, calls))
    for name, timing in timings.items():
        one = ready[name]
        floor = cell.floors[mode, "dense" if one.contestant.family == "dense" else "factorized"]
        seconds = floor.seconds(bench.rates)
        plan, predicted = _explained(one, mode)
        bench.writer.write(
            "measurement",
            **_fields(cell, one.contestant, bench),
            status="timed",
            mode=mode,
            launch=launch,
            **timing.record(),
            **one.found,
            predicted=predicted,
            plan=plan,
            floor_bytes=floor.bytes,
            floor_seconds=seconds,
            over_floor=timing.median / seconds,
        )


def _captured(
    bench: Bench,
    cell: Cell,
    mode: str,
    ready: Mapping[str, Ready],
    calls: Mapping[str, Sequence[Call]],
) -> dict[str, Captured | Repeated]:
    """Everybody's graph; who cannot be captured is recorded as failed."""
    pieces = {}
    for name, some in calls.items():
        try:
            with ready[name].contestant.inside():
                pieces[name] = bench.timer.capture(some)
        except Exception as error:  # noqa: PERF203 - the others are still captured
            _failed(bench, cell, mode, "graph", [ready[name].contestant], error)
    return pieces


def _failed(
    bench: Bench, cell: Cell, mode: str, launch: str, who: Sequence[Contestant], error: Exception
) -> None:
    for contestant in who:
        bench.writer.write(
            "measurement",
            **_fields(cell, contestant, bench),
            status="failed",
            mode=mode,
            launch=launch,
            reason=said(error),
        )
    bench.recover()


def _explained(one: Ready, mode: str) -> tuple[str | None, float | None]:
    """The plan and what the cost model expects of it; None where there is no plan."""
    explain = one.contestant.explained
    if explain is None:
        return None, None
    try:
        return explain(one.modules[0], mode == "training")
    except Exception as error:
        return said(error), None
