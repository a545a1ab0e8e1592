"""The planner's door: a request goes in; a plan, its steps and its predicted time come out.

Each kind of format has a module of its own, which stands in the table below. What was chosen is
remembered here, by request, until ``forget``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

from polyadic._torch import not_traced
from polyadic.formats import ConvFormat, EmbeddingFormat, LinearFormat
from polyadic.planner import conv, embedding, linear, tuned
from polyadic.planner.calibrated import machine_for
from polyadic.planner.request import Request
from polyadic.planner.steps import Step
from polyadic.plans import ConvPlan, LinearPlan

Plan = LinearPlan | ConvPlan


class Kind(Protocol):
    """What the module of a kind of layer offers."""

    def candidates(self, request: Request) -> Sequence[Any]:
        """Plans with the same route forward and backward."""

    def simplest(self, request: Request) -> Any:
        """The plan for sizes that are not known."""

    def choose(self, request: Request) -> Any:
        """The cheapest plan."""

    def steps(self, request: Request, plan: Any) -> tuple[list[Step], list[Step]]:
        """Steps of a plan, forward and backward."""

    def kept_elements(self, request: Request, plan: Any) -> int:
        """Elements that a plan keeps for the backward."""

    def dense_steps(self, request: Request) -> tuple[list[Step], list[Step]]:
        """Steps of the dense layer, forward and backward."""

    def dense_kept(self, request: Request) -> int:
        """Elements that the dense layer keeps for the backward."""

    def describe(self, request: Request) -> str:
        """Format and batch in words."""


KINDS: dict[type, Kind] = {
    LinearFormat: cast(Kind, linear),
    EmbeddingFormat: cast(Kind, embedding),
    ConvFormat: cast(Kind, conv),
}
# What is told when choices are forgotten: others remember what they made of a plan.
_told: list[Callable[[], None]] = []
# What is told of each request that is chosen for and not remembered.
_asked: list[Callable[[Request], None]] = []


def kind_of(request: Request) -> Kind:
    """The module of the request's kind of layer."""
    return KINDS[type(request.format)]


def choose(request: Request) -> Any:
    """The cheapest plan for all batches up to the next power of two; remembered."""
    plan = _chosen(request.bucketed())
    # Which in factors are joined is decided for the number of indices itself, which takes no time.
    is_embedding = isinstance(request.format, EmbeddingFormat)
    return embedding.rejoined(request, plan) if is_embedding else plan


@functools.lru_cache(maxsize=4096)
def _chosen(request: Request) -> Any:
    for told in _asked:
        told(request)
    measured = tuned.plan_for(request)
    return kind_of(request).choose(request) if measured is None else measured


@not_traced
def choose_for_constants(constants: tuple[Any, ...]) -> Any:
    """``choose`` for a compiler, which calls it while it traces and keeps the plan."""
    return choose(Request.of_constants(constants))


@contextlib.contextmanager
def requests_asked() -> Iterator[list[Request]]:
    """Note the requests, for batches up to a power of two, that are chosen for within."""
    found: list[Request] = []
    forget()
    _asked.append(found.append)
    try:
        yield found
    finally:
        _asked.remove(found.append)
        forget()


def when_forgotten(call: Callable[[], None]) -> None:
    """Have ``call`` called whenever choices are forgotten."""
    _told.append(call)


def forget() -> None:
    """Forget all choices, as a machine description has changed."""
    _chosen.cache_clear()
    for call in _told:
        call()


def steps(request: Request, plan: Plan) -> tuple[list[Step], list[Step]]:
    """Steps of a plan, forward and backward."""
    return kind_of(request).steps(request, plan)


def predict(request: Request, plan: Plan | None, *, training: bool = True) -> float:
    """Predicted seconds of a plan (None: of the dense layer), without what the call costs."""
    kind = kind_of(request)
    forward, backward = kind.dense_steps(request) if plan is None else kind.steps(request, plan)
    return machine_for(request).total([*forward, *backward] if training else forward)


def predict_inference(request: Request, plan: Plan | None) -> float:
    """Predicted seconds of a call without gradients, the call itself included."""
    machine, kind = machine_for(request), kind_of(request)
    if plan is None:
        return machine.total(kind.dense_steps(request)[0], machine.dense_call)
    return machine.total(kind.steps(request, plan)[0], machine.call)
