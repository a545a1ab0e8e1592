"""What the host spends on one eager step, taken apart: which piece costs how many microseconds.

Sizes are so small that the GPU waits for the host. Each piece is timed alone, a backward both on
the thread that autograd keeps for the device and on the caller's own. A piece takes longer within a
step than alone, because the processor's caches hold less of it then; so some are timed there too.
The layer's forward and its step are profiled function by function.
"""

from __future__ import annotations

import cProfile
import functools
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.contest import train
from benchmarks.gpu.timer import Call
from polyadic.functional import boundary
from polyadic.functional.boundary import Call as Settled
from polyadic.kernels.linear import LinearMap
from polyadic.kernels.pairs import khatri_rao_pair, mttkrp_pair
from polyadic.nn import CPLinear
from polyadic.plans import Backend, LinearPlan, LinearRoute

ROWS, FEATURES, RANK = 16, 4096, 64
CALLS, PROFILED, MOST_FUNCTIONS = 50, 100, 30


class Nothing(torch.autograd.Function):
    """A function of any number of tensors that computes nothing, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        """Hand x on."""
        ctx.others = others
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Hand the gradient on; the others' are themselves."""
        return (grads[0], *ctx.others)


def run(bench: Bench) -> None:
    """Pieces first, then the profiles."""
    d, R, T = (48, 5, 4) if bench.dry else (FEATURES, RANK, ROWS)
    where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    layer = CPLinear(d, d, False, rank=R, **where)
    x, grad = bench.randn(T, d).requires_grad_(), bench.randn(T, d)
    for name, call in _steps(layer, d, R, x, grad, where):
        _timed(bench, name, call)
    for name, call in _pieces(bench, layer, x, grad):
        _timed(bench, name, call)
    for name, call in _parts(layer, x.detach(), grad, "torch"):
        _timed(bench, f"{name}, by torch", call)
    # Nobody serves a route by "triton" where the benchmark is tried out without a GPU.
    by: Backend = "triton" if bench.device.type == "cuda" else "torch"
    for name, call in _parts(layer, x.detach(), grad, by):
        _timed(bench, name, call)
        with bench.guarded(name):
            _functions(bench, name, call)
    step = partial(train, layer, x, grad)
    alone = partial(_on_one_thread, step)
    whole: list[tuple[str, Call]] = [
        ("ours, forward without grad", partial(_without_grad, layer, x)),
        ("ours, forward with grad", partial(layer, x)),
        ("ours, step on the caller's thread", alone),
    ]
    for name, call in whole:
        with bench.guarded(name):
            _functions(bench, name, call)
    for name, owner, attribute in _timed_within():
        with bench.guarded(name):
            _within(bench, f"{name}, within a step", owner, attribute, step)
            _within(bench, f"{name}, within a step on one thread", owner, attribute, alone)


def _timed(bench: Bench, name: str, call: Call) -> None:
    with bench.guarded(name):
        for _ in range(3):
            call()
        seconds = bench.timer.eager([call] * (2 if bench.dry else CALLS)).median
        bench.writer.write("rate", name=f"overhead: {name}", value=seconds, unit="s")


def _steps(
    layer: CPLinear, d: int, R: int, x: Tensor, grad: Tensor, where: dict[str, Any]
) -> Iterator[tuple[str, Call]]:
    """Whole forwards and steps of our layer, the pair and dense."""
    pair = nn.Sequential(nn.Linear(d, R, bias=False, **where), nn.Linear(R, d, bias=False, **where))
    modules = {"ours": layer, "pair": pair, "dense": nn.Linear(d, d, bias=False, **where)}
    for name, module in modules.items():
        yield f"{name}, forward without grad", partial(_without_grad, module, x)
        yield f"{name}, forward with grad", partial(module, x)
        step = partial(train, module, x, grad)
        yield f"{name}, step", step
        yield f"{name}, step on the caller's thread", partial(_on_one_thread, step)
        yield f"{name}, step by backward()", partial(_by_backward, module, x, grad)


def _without_grad(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(x)
        return y


def _on_one_thread(step: Call) -> None:
    with torch.autograd.set_multithreading_enabled(False):
        step()


def _by_backward(module: nn.Module, x: Tensor, grad: Tensor) -> None:
    x.grad = None
    for parameter in module.parameters():
        parameter.grad = None
    module(x).backward(grad)


def _pieces(bench: Bench, layer: CPLinear, x: Tensor, grad: Tensor) -> Iterator[tuple[str, Call]]:
    """What autograd and single operations cost."""
    factors = [f.detach().clone().requires_grad_() for f in layer.cp.factors]
    few = [x, *factors]

    def nothing() -> None:
        torch.autograd.grad(Nothing.apply(*few), few, grad)

    yield "a Function of 7 tensors that does nothing, forward", partial(Nothing.apply, *few)
    yield "a Function of 7 tensors that does nothing, step", nothing
    yield (
        "a Function of 7 tensors that does nothing, step on the caller's thread",
        partial(_on_one_thread, nothing),
    )
    tall, thin = x.detach(), bench.randn(x.shape[0], factors[0].shape[1])
    yield "product Xᵀ G", lambda: tall.t() @ thin
    if bench.device.type == "cuda" and bench.dtype != torch.float32:
        yield (
            "product Xᵀ G, float32 result",
            lambda: torch.mm(tall.t(), thin, out_dtype=torch.float32),
        )
    yield "new_empty", lambda: tall.new_empty((64, 64))
    yield "data_ptr of 7 tensors", lambda: [t.data_ptr() for t in few]
    if bench.device.type == "cuda":
        yield "is_current_stream_capturing", torch.cuda.is_current_stream_capturing
        yield "current_device", torch.cuda.current_device


def _parts(layer: CPLinear, x: Tensor, grad: Tensor, by: Backend) -> Iterator[tuple[str, Call]]:
    """The layer's map called directly, without autograd, on the caller's thread."""
    ins, outs = layer.cp.factor_groups()
    factors = [f.detach() for f in (*ins, *outs)]
    route = LinearRoute((len(ins),), (len(outs),), by=by)
    layer_map = LinearMap(LinearPlan(route, route), len(ins))
    needs = (True,) * (1 + len(factors))
    with torch.no_grad():
        _, kept = layer_map.forward(x, None, factors)
    yield "map, forward", _quietly(lambda: layer_map.forward(x, None, factors))
    yield "map, backward", _quietly(lambda: layer_map.backward(grad, x, kept, factors, needs))
    leaves, settled = [f.clone().requires_grad_() for f in factors], Settled(layer_map, 0)
    yield "map behind autograd, forward", lambda: settled.run(x, (leaves,), None, None)
    groups = (factors[: len(ins)], factors[len(ins) :])
    wide = khatri_rao_pair(groups, torch.float32)
    yield (
        "Khatri-Rao matrices of both sides",
        _quietly(lambda: khatri_rao_pair(groups, x.dtype, by)),
    )
    yield "gradients of all factors", _quietly(lambda: mttkrp_pair(wide, groups, by))


def _timed_within() -> Iterator[tuple[str, Any, str]]:
    """Names of pieces, and the attributes that a step calls for them."""
    yield "settling the call", boundary, "settled"
    yield "map, forward", LinearMap, "forward"
    yield "map, backward", LinearMap, "backward"
    try:
        from polyadic.kernels.triton.driver import Code
    except ImportError:
        return
    yield "starting a kernel", Code, "start"


def _within(bench: Bench, name: str, owner: Any, attribute: str, call: Call) -> None:
    """Time a piece whenever a call comes to it; nothing is written where it does not."""
    seconds: list[float] = []
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        result = original(*args, **kwargs)
        seconds.append(time.perf_counter() - begun)
        return result

    call()
    with mock.patch.object(owner, attribute, watched):
        for _ in range(2 if bench.dry else PROFILED):
            call()
    bench.timer.synchronize()
    if seconds:
        value = statistics.median(seconds)
        bench.writer.write("rate", name=f"overhead: {name}", value=value, unit="s")


def _quietly(call: Callable[[], Any]) -> Call:
    def quiet() -> Any:
        with torch.no_grad():
            return call()

    return quiet


def _functions(bench: Bench, name: str, call: Call) -> None:
    """Python functions by their own time, in microseconds a call."""
    count = 2 if bench.dry else PROFILED
    bench.timer.synchronize()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(count):
        call()
    profiler.disable()
    bench.timer.synchronize()
    found: Any = vars(pstats.Stats(profiler))["stats"]
    rows = [
        [f"{Path(file).name}:{line} {function}", calls / count, 1e6 * own / count]
        for (file, line, function), (_, calls, own, _, _) in found.items()
    ]
    rows.sort(key=lambda row: -row[2])
    bench.writer.write(
        "profile",
        phase=bench.phase,
        of=f"functions of: {name}",
        launches=sum(row[1] for row in rows),
        microseconds=sum(row[2] for row in rows),
        kernels=rows[:MOST_FUNCTIONS],
    )
