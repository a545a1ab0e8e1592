"""Steps of a layer or a model, forward and backward, of neuraloperator's formats and of ours.

Every contestant of a cell computes with the same input; the CP contestants also with the same
weight, and their results are compared before anything is timed. Contestants take turns, one step
each. With one thread a time is that of the thread on the processor, so that what else runs on the
machine weighs little; with more it is the wall clock's. What is told is the lower quartile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from neuralop.layers.spectral_convolution import SpectralConv
from neuralop.models import FNO, TFNO
from torch import Tensor, nn

import polyadic
from benchmarks.records import append, environment, read
from benchmarks.spectral.equal import nearest_share
from polyadic.functional import cp_spectral_conv
from polyadic.nn import CPSpectralConv1d, CPSpectralConv2d, CPSpectralConv3d
from polyadic.planner import choice
from polyadic.planner import spectral as planner

LAYERS = {1: CPSpectralConv1d, 2: CPSpectralConv2d, 3: CPSpectralConv3d}
THEIRS = "cp factorized"
# Results of all CP contestants agree to this part of the largest entry.
TOLERANCE = 2e-5
LEAST_ROUNDS = 3
# Contestants this many times slower than the fastest get three rounds alone.
HOPELESS = 4.0


@dataclass(frozen=True)
class Cell:
    """One size of layer.

    Args:
        dims: number of spatial dimensions.
        width: in and out channels.
        batch: maps.
        modes: kept modes of each dimension, as neuraloperator counts them.
        grid: positions of each dimension.
        rank: share of the dense weight's parameters.
    """

    dims: int
    width: int
    batch: int
    modes: int
    grid: int
    rank: float

    @property
    def name(self) -> str:
        """Name in records and on the command line."""
        return f"{self.dims}d-{self.width}ch-b{self.batch}-{self.modes}of{self.grid}-{self.rank:g}"

    def contestants(self) -> list[Contestant]:
        """Make all contestants."""
        return contestants(self)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Make an input, and a gradient of the output."""
        torch.manual_seed(1)
        x = torch.randn(self.batch, self.width, *[self.grid] * self.dims, requires_grad=True)
        return x, torch.randn_like(x)


@dataclass(frozen=True)
class ModelCell:
    """A whole model of four blocks, from one channel to one, whose layers are those of a cell."""

    layer: Cell

    @property
    def name(self) -> str:
        """Name in records and on the command line."""
        return f"model-{self.layer.name}"

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return self.layer.dims

    def contestants(self) -> list[Contestant]:
        """Make all contestants: the FNO, the TFNO as it comes, and the CP model in three ways."""

        def made(name: str, kind: Any, within: Any = contextlib.nullcontext, **rest: Any) -> Any:
            torch.manual_seed(0)
            modes = (self.layer.modes,) * self.dims
            model = kind(modes, 1, 1, self.layer.width, n_layers=4, **rest)
            return Contestant(name, model, list(model.parameters()), within)

        cp = {"factorization": "CP", "rank": self.layer.rank}
        accelerated = polyadic.accelerate_neuralop
        return [
            made("dense", FNO),
            made("tucker", TFNO),
            made(THEIRS, TFNO, **cp),
            made("cp accelerated", TFNO, accelerated, **cp),
            made(
                "cp accelerated with transforms", TFNO, partial(accelerated, transforms=True), **cp
            ),
        ]

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Make an input, and a gradient of the output."""
        torch.manual_seed(1)
        x = torch.randn(self.layer.batch, 1, *[self.layer.grid] * self.dims, requires_grad=True)
        return x, torch.randn_like(x)


CELLS = [
    Cell(3, 32, 2, 8, 32, 0.05),
    Cell(2, 64, 8, 16, 64, 0.05),
    Cell(1, 64, 16, 32, 1024, 0.1),
    Cell(2, 64, 8, 32, 64, 0.05),
    Cell(3, 32, 2, 8, 32, 0.02),
    Cell(2, 64, 8, 16, 64, 0.02),
    Cell(3, 32, 2, 16, 32, 0.02),
    Cell(2, 64, 8, 16, 64, 0.1),
    Cell(2, 64, 8, 32, 64, 0.1),
    Cell(1, 64, 16, 32, 1024, 0.5),
    Cell(3, 64, 4, 8, 32, 0.02),
    Cell(2, 64, 4, 32, 64, 0.05),
]
MODELS = [
    ModelCell(Cell(2, 64, 8, 16, 64, 0.05)),
    ModelCell(Cell(3, 32, 2, 8, 32, 0.02)),
    ModelCell(Cell(1, 64, 16, 32, 1024, 0.1)),
]


@dataclass
class Contestant:
    """Something to be timed.

    Args:
        name: in records.
        forward: the layer, or a function of x.
        parameters: whose gradients are taken.
        within: makes the context in which it runs.
        plan: the plan it follows, where it follows one.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    within: Callable[[], Any] = contextlib.nullcontext
    plan: str = ""

    def step(self, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """Take one step; the output and the gradients of x and the parameters."""
        y = self.forward(x)
        return y.detach(), *torch.autograd.grad(y, [x, *self.parameters], grad)


def theirs(cell: Cell, **options: Any) -> SpectralConv:
    """Make a layer of neuraloperator."""
    torch.manual_seed(0)
    return SpectralConv(cell.width, cell.width, (cell.modes,) * cell.dims, **options)


def tucker_of(cell: Cell, parameters: int) -> SpectralConv:
    """Make the Tucker layer whose number of parameters is nearest to a number."""
    make = partial(theirs, cell, factorization="Tucker", implementation="factorized")

    def count(share: float) -> int:
        return sum(p.numel() for p in make(rank=share).weight.parameters())

    return make(rank=nearest_share(count, parameters))


def forced(cell: Cell, layer: Any) -> list[Contestant]:
    """Our function by every route, with one transform for all dimensions and with those chosen."""
    ins, outs, modes = layer.cp.parts()[0]
    asked = layer.request(cell.batch, cell.grid)
    chosen = choice.choose(asked)
    routes = {plan.forward for plan in planner.candidates(asked)}
    routes |= {dataclasses.replace(r, transforms=chosen.forward.transforms) for r in routes}
    found = []
    for route in sorted(routes, key=str):
        if route.kind == "dense" and cell.dims == 3:
            continue
        plan = polyadic.SpectralPlan(route, route)

        def call(x: Tensor, plan: Any = plan) -> Tensor:
            return cp_spectral_conv(x, ins, outs, modes, layer.bias, plan=plan)

        found.append(Contestant(f"forced: {route}", call, list(layer.parameters()), plan=str(plan)))
    return found


def contestants(cell: Cell) -> list[Contestant]:
    """Make all contestants of a cell."""
    cp = theirs(cell, factorization="CP", rank=cell.rank, implementation="factorized")
    again = theirs(cell, factorization="CP", rank=cell.rank, implementation="reconstructed")
    again.load_state_dict(cp.state_dict())
    weights = sum(p.numel() for p in cp.weight.parameters())
    tucker, dense = tucker_of(cell, weights), theirs(cell)
    with torch.no_grad():
        ours = LAYERS[cell.dims].from_spectral_conv(cp)
        # Without the λ of ones, which their layer trains.
        ours.cp = polyadic.CPTensor.from_factors(ours.cp.tensorized_shape, list(ours.cp.factors))
    accelerated = polyadic.accelerate_neuralop
    plan = str(choice.choose(ours.request(cell.batch, cell.grid)))

    def own(name: str, layer: nn.Module, **rest: Any) -> Contestant:
        return Contestant(name, layer, list(layer.parameters()), **rest)

    found = [
        own("dense", dense),
        own("tucker", tucker),
        own(THEIRS, cp),
        own("cp reconstructed", again),
        own("cp accelerated", cp, within=accelerated),
        own("cp accelerated with transforms", cp, within=partial(accelerated, transforms=True)),
        own("CPSpectralConv", ours, plan=plan),
    ]
    return [*found, *forced(cell, ours)]


def check(
    cell: Cell | ModelCell, every: list[Contestant], x: Tensor, grad: Tensor
) -> dict[str, float]:
    """Compare the results of all CP contestants behind neuraloperator's factorized with its own.

    Raises:
        AssertionError: results differ by more than rounding.
    """
    at = [one.name for one in every].index(THEIRS)
    want, want_x, *_ = every[at].step(x, grad)
    errors = {}
    for one in every[at + 1 :]:
        with one.within():
            got, got_x, *_ = one.step(x, grad)
        pairs = ((got, want), (got_x, want_x))
        errors[one.name] = max(float((g - w).abs().max() / w.abs().max()) for g, w in pairs)
        assert errors[one.name] < TOLERANCE, f"{cell.name}: {one.name} off by {errors[one.name]}"
    return errors


def memory(one: Contestant, x: Tensor, grad: Tensor) -> tuple[int, int]:
    """Bytes that autograd keeps besides parameters, and most bytes that a step adds."""
    from polyadic.testing import KeptBytes, LiveBytes

    gc.collect()
    with one.within(), LiveBytes([x, grad, *one.parameters]) as live:
        before = live.peak
        with KeptBytes(leave_out=one.parameters) as kept:
            y = one.forward(x)
        total = kept.total
        torch.autograd.grad(y, [x, *one.parameters], grad)
    return total, live.peak - before


def timed(every: list[Contestant], x: Tensor, grad: Tensor, seconds: float) -> list[list[float]]:
    """Time steps of all contestants, in turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in every]
    while True:
        best = min((min(spent) for spent in times if spent), default=0.0)
        waiting = [
            (one, spent)
            for one, spent in zip(every, times, strict=True)
            if len(spent) < LEAST_ROUNDS or (sum(spent) < seconds and min(spent) <= HOPELESS * best)
        ]
        if not waiting:
            return times
        for one, spent in waiting:
            with one.within():
                start = clock()
                one.step(x, grad)
                spent.append(clock() - start)


def run(out: Path, only: str, seconds: float, threads: int) -> None:
    """Measure all cells and store the records; cells that the file of this day has are left out."""
    torch.set_num_threads(threads)
    path = out / f"spectral-{date.today()}.jsonl"
    if not path.exists():
        record = environment(torch.device("cpu"), torch.float32)
        append(path, {**record, "tolerance": TOLERANCE})
    done = {(record.get("cell"), record.get("threads")) for record in read(path, growing=True)}
    cells: Sequence[Cell | ModelCell] = [*CELLS, *MODELS]
    for cell in cells:
        if not fnmatch.fnmatch(cell.name, only) or (cell.name, threads) in done:
            continue
        x, grad = cell.inputs()
        every = cell.contestants()
        errors = check(cell, every, x, grad)
        kept = [memory(one, x, grad) for one in every]
        times = timed(every, x, grad, seconds)
        for one, spent, (bytes_kept, peak) in zip(every, times, kept, strict=True):
            ordered = sorted(spent)
            made = {
                "kind": "layer" if isinstance(cell, Cell) else "model",
                "cell": cell.name,
                "dims": cell.dims,
                "threads": threads,
                "contestant": one.name,
                "q1": ordered[len(ordered) // 4],
                "min": ordered[0],
                "steps": len(ordered),
                "kept_bytes": bytes_kept,
                "peak_bytes": peak,
                "plan": one.plan,
                "parameters": sum(p.numel() for p in one.parameters),
                "error": errors.get(one.name),
            }
            append(path, made)
        summary = ", ".join(
            f"{one.name} {1e3 * sorted(spent)[len(spent) // 4]:.1f}"
            for one, spent in zip(every, times, strict=True)
        )
        print(f"{cell.name} (ms): {summary}", flush=True)
