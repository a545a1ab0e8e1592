"""Run the benchmark: gate, memory, times, one JSON line each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import machine
from benchmarks.bench.cases import MODES, Case, Mode, describe, select
from benchmarks.bench.contestants import contestants
from benchmarks.bench.measure import (
    Gate,
    Patience,
    like,
    observed_step,
    plain_step,
    time_interleaved,
)
from benchmarks.bench.plans import predicted, rates_source
from benchmarks.bench.problem import Built, Contestant, NotApplicableError, Problem, plan_record
from benchmarks.records import TOLERANCE, Record, append, environment

QUICK = Patience(seconds=0.06, repeats=5, limit=0.5)


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        quick: the representative subset with shorter timings.
        only: pattern of the cells' names.
        device: ``"cpu"`` or ``"cuda"``.
        threads: thread counts to time with, one after the other.
        dtype: of all tensors.
        modes: ``"forward"`` (inference) and ``"training"`` (forward and backward).
        compiled: also time dense and our choice under torch.compile.
        patience: how long contestants are timed; shorter in a quick run.
    """

    quick: bool = False
    only: str | None = None
    device: str = "cpu"
    threads: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32
    modes: tuple[Mode, ...] = MODES
    compiled: bool = False
    patience: Patience = field(default=Patience())

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but torch finds none; use 'cpu'")
        if self.dtype not in TOLERANCE:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCE)
            raise ValueError(f"dtype must be one of {known}, got {self.dtype}")
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown or not self.modes:
            raise ValueError(f"modes must be among {', '.join(MODES)}, got {self.modes}")
        if not self.threads or min(self.threads) < 1:
            raise ValueError(f"threads must be positive ints, got {self.threads}")


def run_bench(
    options: Options, out: Path, progress: Callable[[int, int, str], None] = lambda *_: None
) -> Path:
    """Run the cells and write a record of each measurement to a file.

    Until it is done the file's name ends in ``.unfinished``, so that what was stopped is not taken
    for a whole run. A run of the same day, device and part gives way to it then.

    Args:
        options: what to run.
        out: folder of the file, made where it is missing.
        progress: told (cells done, cells in all, name of the next).

    Returns:
        The file, ``<date>-<device>.jsonl``; of a quick or partial run its name says so.

    Raises:
        ValueError: no cell matches the pattern.
        OSError: the folder cannot be written to.
    """
    cases = select(quick=options.quick, only=options.only)
    part = "-quick" if options.quick else "-part" if options.only else ""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{datetime.now(timezone.utc):%Y-%m-%d}-{options.device}{part}.jsonl"
    unfinished = path.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    with _settings():
        for record in _records(cases, options, progress):
            append(unfinished, record)
    unfinished.replace(path)
    return path


@contextmanager
def _settings() -> Iterator[None]:
    """Full float32 on a GPU, a settled allocator, and the caller's threads restored."""
    threads = torch.get_num_threads()
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    # glibc gives freed memory back to the system above a threshold that rises with the largest
    # block freed so far: what is measured would depend on which sizes came before it.
    torch.ones(2**25 - 2**20, dtype=torch.uint8, device="cpu")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = tf32


def _records(
    cases: list[Case], options: Options, progress: Callable[[int, int, str], None]
) -> Iterator[Record]:
    device = torch.device(options.device)
    yield {
        **environment(device, options.dtype),
        "quick": options.quick,
        "only": options.only,
        "threads": list(options.threads),
        "modes": list(options.modes),
        "compiled": options.compiled,
        "tolerance": TOLERANCE[options.dtype],
    }
    rates = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        rates[threads] = machine.measure_rates(device, options.dtype, options.quick)
        yield {
            "kind": "machine",
            "threads": threads,
            "flops": rates[threads].flops,
            "bandwidth": [list(pair) for pair in rates[threads].bandwidth],
            "cost_model": rates_source(device.type, options.dtype),
        }
    for done, case in enumerate(cases):
        progress(done, len(cases), case.name)
        yield from _cell(case, options, rates)
    progress(len(cases), len(cases), "")


def _cell(case: Case, options: Options, rates: dict[int, machine.Rates]) -> Iterator[Record]:
    size = options.dtype.itemsize
    yield {"kind": "cell", **describe(case), "floors": _floors(case, options, rates, size)}
    problem = Problem.draw(case, options.dtype, options.device)
    gate = Gate(problem)
    for threads in options.threads:
        torch.set_num_threads(threads)
        yield from _timed_cell(problem, gate, options, threads)


def _timed_cell(problem: Problem, gate: Gate, options: Options, threads: int) -> Iterator[Record]:
    """Admit the contestants of a cell, then time those let in, one mode after the other."""
    case, ready = problem.case, {}
    if options.compiled:
        # torch stops compiling one function after a few shapes; each cell starts anew.
        torch._dynamo.reset()
    for contestant in contestants(case, compiled=options.compiled):
        base = {
            "kind": "measurement",
            "cell": case.name,
            "contestant": contestant.name,
            "family": contestant.family,
            "layout": contestant.layout,
            "compiled": contestant.compiled,
            "inference": contestant.inference,
            "threads": threads,
        }
        built, found = admit(contestant, problem, gate, options.dtype)
        if built is None:
            yield {**base, **found}
        else:
            ready[contestant.name] = built, {**base, **found}
    patience = QUICK if options.quick else options.patience
    synchronize = machine.synchronizer(problem.x.device)
    for mode in options.modes:
        steps = _steps(ready, mode, problem)
        for name in steps:
            if ready[name][1]["compiled"]:
                # Compiles for this mode.
                steps[name]()
        times = time_interleaved(steps, patience, synchronize)
        for name, timing in times.items():
            built, record = ready[name]
            seconds = None
            if built.plan is not None and not record["compiled"]:
                seconds = predicted(case, built.plan, mode, built.x)
            yield {
                **record,
                "mode": mode,
                "status": "timed",
                "predicted": seconds,
                **timing.record(),
            }


def _floors(
    case: Case, options: Options, rates: dict[int, machine.Rates], size: int
) -> list[Record]:
    return [
        {
            "mode": mode,
            "threads": threads,
            "route": route,
            "flops": w.flops,
            "bytes": w.bytes,
            "seconds": w.floor(rates[threads]),
        }
        for mode in options.modes
        for route, w in machine.work(case, mode, size).items()
        for threads in options.threads
    ]


def admit(
    contestant: Contestant, problem: Problem, gate: Gate, dtype: torch.dtype
) -> tuple[Built | None, Record]:
    """Build a contestant and check it; None where it is not to be timed, and why."""
    try:
        if contestant.memory is not None:
            _ask_on_meta(contestant, problem)
        built = contestant.build(problem)
    except ModuleNotFoundError as error:
        return None, {"status": "skipped", "reason": f"{error.name} is not installed"}
    except NotApplicableError as error:
        return None, {"status": "skipped", "reason": str(error)}
    step = None
    try:
        y = built.infer()
        if not contestant.inference:
            # A dispatch mode would send compiled code back to eager.
            run_once = plain_step if contestant.compiled else observed_step
            step = run_once(built, like(problem.grad, y))
        errors = gate.errors(built, y, step)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return None, {"status": "failed", "reason": f"{type(error).__name__}: {text}"}
    worst = max(errors, key=errors.__getitem__)
    # JSON has no infinity.
    largest = errors[worst] if math.isfinite(errors[worst]) else None
    found: Record = {"error": largest, "error_of": worst}
    if not errors[worst] <= TOLERANCE[dtype]:
        return None, {
            **found,
            "status": "refused",
            "reason": f"relative error {errors[worst]:.1e} of {worst} against float64 autograd",
        }
    found |= {
        "parameter_bytes": sum(p.numel() * p.element_size() for p in built.parameters),
        "plan": plan_record(built.plan),
    }
    if step is not None and step.peak is not None:
        found |= {"kept_bytes": step.kept, "peak_bytes": step.peak}
    return built, found


def _ask_on_meta(contestant: Contestant, problem: Problem) -> None:
    """Refuse what would need more memory than it may, without running it."""
    meta = problem.on_meta()
    needed = observed_step(contestant.build(meta), meta.grad).peak or 0
    if contestant.memory is not None and needed > contestant.memory:
        raise NotApplicableError(f"would need {needed / 2**30:.1f} GiB in one training step")


def _steps(
    ready: dict[str, tuple[Built, Record]], mode: Mode, problem: Problem
) -> dict[str, Callable[[], Any]]:
    """List what is timed; plans that differ in the backward alone run forward once."""
    if mode == "training":
        return {
            name: step_of(built, mode, problem)
            for name, (built, record) in ready.items()
            if not record["inference"]
        }
    steps: dict[str, Callable[[], Any]] = {}
    seen = set()
    for name, (built, record) in ready.items():
        if record["family"] == "plan":
            if built.plan.forward in seen:
                continue
            seen.add(built.plan.forward)
        steps[name] = step_of(built, mode, problem)
    return steps


def step_of(built: Built, mode: Mode, problem: Problem) -> Callable[[], Any]:
    """What is timed of one contestant."""
    if mode == "forward":
        return built.infer
    return partial(built.train, like(problem.grad, built.infer()))
