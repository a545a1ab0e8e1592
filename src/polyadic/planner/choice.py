"""The planner's door: a request goes in; a plan, its steps and its predicted time come out.

The table below names the module that plans for each class of format. Choices are remembered here by
request, until ``forget`` is called.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

from polyadic._torch import not_traced
from polyadic.formats import ConvFormat, EmbeddingFormat, LinearFormat, SpectralFormat
from polyadic.planner import conv, embedding, linear, spectral, tuned
from polyadic.planner.calibrated import machine_for
from polyadic.planner.request import Request
from polyadic.planner.steps import Step
from polyadic.plans import ConvPlan, LinearPlan, SpectralPlan

Plan = LinearPlan | ConvPlan | SpectralPlan


class Kind(Protocol):
    """What a module that plans for one kind of layer must offer."""

    def candidates(self, request: Request) -> Sequence[Any]:
        """List the plans that take one route in both directions."""

    def simplest(self, request: Request) -> Any:
        """Return a plan that is right for any sizes, for when they are not known."""

    def choose(self, request: Request) -> Any:
        """Return the cheapest plan for the request as it is."""

    def steps(self, request: Request, plan: Any) -> tuple[list[Step], list[Step]]:
        """List the steps of a plan, forward and backward."""

    def kept_elements(self, request: Request, plan: Any) -> int:
        """Count the elements that a plan keeps for the backward."""

    def dense_steps(self, request: Request) -> tuple[list[Step], list[Step]]:
        """List the steps of the dense layer, forward and backward."""

    def dense_kept(self, request: Request) -> int:
        """Count the elements that the dense layer keeps for the backward."""

    def describe(self, request: Request) -> str:
        """Say format and batch in words."""


KINDS: dict[type, Kind] = {
    LinearFormat: cast(Kind, linear),
    EmbeddingFormat: cast(Kind, embedding),
    ConvFormat: cast(Kind, conv),
    SpectralFormat: cast(Kind, spectral),
}
# Functions that are called when choices are forgotten, because other modules remember what they
# made of a plan.
_on_forget: list[Callable[[], None]] = []
# Functions that are called with each request that is chosen for and was not remembered.
_on_request: list[Callable[[Request], None]] = []


def kind_of(request: Request) -> Kind:
    """Return the module that plans for the request's kind of layer."""
    return KINDS[type(request.format)]


def choose(request: Request) -> Any:
    """Return the cheapest plan for the batch rounded up to a power of two; it is remembered."""
    plan = _chosen(request.bucketed())
    # Choices are shared between batches of similar size. Which in factors of an embedding are
    # joined is quick to work out, and is decided for the exact number of indices.
    is_embedding = isinstance(request.format, EmbeddingFormat)
    return embedding.rejoined(request, plan) if is_embedding else plan


@functools.lru_cache(maxsize=4096)
def _chosen(request: Request) -> Any:
    for call in _on_request:
        call(request)
    measured = tuned.plan_for(request)
    return kind_of(request).choose(request) if measured is None else measured


@not_traced
def choose_for_constants(constants: tuple[Any, ...]) -> Any:
    """Do what ``choose`` does while a compiler traces; it keeps the plan as a constant."""
    return choose(Request.of_constants(constants))


@contextlib.contextmanager
def requests_asked() -> Iterator[list[Request]]:
    """Collect the requests that are chosen for within, their batches rounded to powers of two."""
    found: list[Request] = []
    note = found.append
    forget()
    _on_request.append(note)
    try:
        yield found
    finally:
        _on_request.remove(note)


def when_forgotten(call: Callable[[], None]) -> None:
    """Register a function that is called whenever choices are forgotten."""
    _on_forget.append(call)


def forget() -> None:
    """Forget all choices, because a machine description has changed."""
    _chosen.cache_clear()
    for call in _on_forget:
        call()


def steps(request: Request, plan: Plan) -> tuple[list[Step], list[Step]]:
    """List the steps of a plan, forward and backward."""
    return kind_of(request).steps(request, plan)


def predict(request: Request, plan: Plan | None, *, training: bool = True) -> float:
    """Predict the seconds of a plan (None: of the dense layer), without the cost of the call."""
    kind = kind_of(request)
    forward, backward = kind.dense_steps(request) if plan is None else kind.steps(request, plan)
    return machine_for(request).total([*forward, *backward] if training else forward)


def predict_inference(request: Request, plan: Plan | None) -> float:
    """Predict the seconds of a forward pass without gradients, with the cost of the call."""
    machine, kind = machine_for(request), kind_of(request)
    if plan is None:
        return machine.total(kind.dense_steps(request)[0], machine.dense_call)
    return machine.total(kind.steps(request, plan)[0], machine.call)
