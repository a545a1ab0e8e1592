"""``polyadic.tune``: time the plans of a model's layers at a call's shapes; use the fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyadic.batches import evaluating
from polyadic.checks import check_flag, check_module
from polyadic.kernels.backend import is_computed
from polyadic.nn.shared import CPSharedInput
from polyadic.nn.weight import Weighted
from polyadic.planner import choice, tuned
from polyadic.planner.choice import Plan
from polyadic.planner.request import Request

# Rounds in which every plan is timed once. A plan drops out whose least time is so many times the
# least of all.
ROUNDS, DROPPED_BEYOND = 7, 1.25
# After these rounds only plans go on whose medians are at most so many times the best, for at most
# so many rounds in all. No plan is judged by its median before so many seconds are over, because a
# disturbance of the machine may last longer than all rounds of a small layer.
CLOSE, MOST_ROUNDS, LEAST_SECONDS = 1.06, 25, 0.5
# The plan that was followed stays where no other is faster by more than this.
SAME = 1.01
# Seconds that one sample should last at least.
SAMPLE = 2e-3


@dataclass(frozen=True)
class TunedLayer:
    """What was found for one request.

    Attributes:
        layer: name of the first layer that makes the request.
        request: the format and the batch in words.
        before: the plan that was followed.
        after: the fastest plan, followed from now on.
        seconds_before: seconds of a call by the plan before.
        seconds_after: seconds of a call by the plan after.
    """

    layer: str
    request: str
    before: Plan
    after: Plan
    seconds_before: float
    seconds_after: float

    @property
    def changed(self) -> bool:
        """Whether another plan is followed from now on."""
        return self.before != self.after


@dataclass(frozen=True)
class TuneReport:
    """What ``tune`` found; ``str()`` of it is the report.

    Attributes:
        layers: one entry for each request that the model's layers made.
        training: whether steps with gradients were timed, or forwards alone.
    """

    layers: tuple[TunedLayer, ...]
    training: bool

    def __str__(self) -> str:
        what = "forward and backward" if self.training else "forward"
        changed = sum(found.changed for found in self.layers)
        lines = [f"{changed} of {len(self.layers)} plans changed, by time of {what}"]
        for found in self.layers:
            lines.append(f"{found.layer}: {found.request}")
            times = f"{1e6 * found.seconds_before:.1f} µs"
            if found.changed:
                gain = found.seconds_before / found.seconds_after
                lines += [f"  was  {found.before}: {times}"]
                times = f"{1e6 * found.seconds_after:.1f} µs, {gain:.2f}x as fast"
            lines.append(f"  now  {found.after}: {times}")
        return "\n".join(lines)


def tune(
    model: nn.Module, *inputs: Any, training: bool | None = None, store: bool = False, **named: Any
) -> TuneReport:
    """Time the plans of every CP layer at the shapes that a call meets, and use the fastest.

    The model is called once on the inputs, in evaluation mode and without gradients, to see what
    each layer is given. Then each layer runs by every plan that the planner weighs, in turns, and
    the fastest is what the planner chooses from now on for the same sizes, dtype, device, threads
    and ``memory``, for all batches up to the next power of two, in this layer and any other. It
    takes seconds for each kind of layer. Another plan may change the last bits of a result. Graphs
    that are already compiled or captured keep theirs. Call it in the autocast context that the
    model will run in.

    Args:
        model: a module that holds CP layers, or is one.
        inputs: what the model is called with.
        training: whether forward and backward are timed, or forward alone; the model's
            ``training`` by default.
        store: whether the plans are kept in the user's cache folder too, for this processor and
            version of torch.
        named: further arguments of the call.

    Returns:
        What was measured and changed.

    Raises:
        TypeError: ``model`` is not a module, or ``training`` or ``store`` is no flag.
        ValueError: the call reaches no CP layer that follows a plan.
    """
    check_module(model)
    store = check_flag(store, "store")
    training = model.training if training is None else check_flag(training, "training")
    calls = _calls(model, inputs, named)
    found: dict[str, TunedLayer] = {}
    kept: dict[Any, dict[str, Plan]] = {}
    for name, layer, args in calls:
        run = _runner(layer, args, training)
        with choice.requests_asked() as asked:
            run()
        for request in dict.fromkeys(asked):
            key = tuned.key_of(request)
            if key in found:
                continue
            found[key] = _tuned(name, request, run)
            kept.setdefault(request.place, {})[key] = found[key].after
    if not found:
        raise ValueError(
            f"the call of {type(model).__name__} reaches no CP layer that follows a plan (frozen "
            f"layers follow none), so there is nothing to tune"
        )
    if store:
        for place, plans in kept.items():
            tuned.store(place, plans)
    return TuneReport(tuple(found.values()), training)


def untune(*, stored: bool = True) -> None:
    """Forget what ``tune`` has found; the planner predicts again.

    Args:
        stored: whether what was stored for later sessions is removed too.

    Raises:
        TypeError: ``stored`` is no flag.
    """
    tuned.forget(check_flag(stored, "stored"))
    choice.forget()


def _calls(model: nn.Module, inputs: Any, named: Any) -> list[tuple[str, nn.Module, Any]]:
    """Return each CP layer with what it is given."""
    calls: list[tuple[str, nn.Module, Any]] = []
    handles = []
    for name, module in model.named_modules():
        frozen = getattr(module, "frozen", None) is not None
        if isinstance(module, (Weighted, CPSharedInput)) and not frozen:

            def note(layer: nn.Module, args: Any, name: str = name) -> None:
                calls.append((name or type(layer).__name__, layer, args))

            handles.append(module.register_forward_pre_hook(note))
    try:
        with evaluating(model):
            model(*inputs, **named)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _runner(layer: nn.Module, args: Any, training: bool) -> Callable[[], object]:
    """Return a call of a layer on what it was given; in training, with all gradients."""
    given = [a.detach() if isinstance(a, Tensor) else a for a in args]
    if not training:

        def forward() -> object:
            with torch.no_grad():
                return layer(*given)

        return forward
    given = [
        a.requires_grad_() if isinstance(a, Tensor) and is_computed(a.dtype) else a for a in given
    ]
    wanted = [a for a in given if isinstance(a, Tensor) and a.requires_grad]
    wanted += [p for p in layer.parameters() if p.requires_grad]
    with torch.enable_grad():
        grads = [torch.ones_like(y) for y in _outputs(layer(*given))]

    def step() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(_outputs(layer(*given)), wanted, grads)

    return step if wanted else lambda: layer(*given)


def _outputs(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def _tuned(name: str, request: Request, run: Callable[[], object]) -> TunedLayer:
    """Time the plans of one request and hold the fastest."""
    before: Plan = choice.choose(request)
    candidates = list(dict.fromkeys([before, *choice.kind_of(request).candidates(request)]))
    try:
        times = _timed(request, candidates, run)
    except BaseException:
        _follow(request, None)
        raise
    after = min(times, key=times.__getitem__)
    if times[before] <= SAME * times[after]:
        after = before
    _follow(request, after)
    words = choice.kind_of(request).describe(request)
    return TunedLayer(name, words, before, after, times[before], times[after])


def _timed(request: Request, plans: list[Plan], run: Callable[[], object]) -> dict[Plan, float]:
    """Return the median seconds of each plan that is not far off, timed in turns.

    A machine is slower at one moment than at another, so that all plans that are still in question
    are timed in every round. After ``ROUNDS`` rounds only plans go on that are so close to the best
    that noise may have decided. The first plan is always timed.
    """
    waiting, first = list(plans), plans[0]
    samples: dict[Plan, list[float]] = {plan: [] for plan in plans}
    start, turn = time.monotonic(), 0
    while turn < MOST_ROUNDS or time.monotonic() - start < LEAST_SECONDS:
        for plan in waiting:
            _follow(request, plan)
            run()
            samples[plan].append(seconds_of(plan, run, request.device))
        least = min(map(min, samples.values()))
        # Caches are cold in the first round, which therefore drops only plans that are far off.
        limit = least * (2 * DROPPED_BEYOND if turn == 0 else DROPPED_BEYOND)
        waiting = [plan for plan in waiting if plan is first or min(samples[plan]) <= limit]
        turn += 1
        if turn >= ROUNDS and time.monotonic() - start >= LEAST_SECONDS:
            best = min(statistics.median(samples[plan]) for plan in waiting)
            waiting = [
                plan
                for plan in waiting
                if plan is first or statistics.median(samples[plan]) <= CLOSE * best
            ]
        if len(waiting) == 1:
            break
    return {plan: statistics.median(samples[plan]) for plan in waiting}


def _follow(request: Request, plan: Plan | None) -> None:
    tuned.hold(request, plan)
    choice.forget()


def seconds_of(plan: Plan, run: Callable[[], object], device: str) -> float:
    """Return the seconds of a call; short calls are timed several in a row.

    On a CPU with one thread they are the thread's own, to which other processes add nothing.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter

    def timed(calls: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    once = timed(1)
    calls = min(100, round(SAMPLE / max(once, 1e-9)))
    return once if calls <= 1 else timed(calls) / calls
