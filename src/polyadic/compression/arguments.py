"""Validation of the arguments of ``compress``, except for the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

from polyadic import checks
from polyadic.batches import require_batches
from polyadic.fitting import decompose
from polyadic.formats import Shape, mode_sizes, positive_int

# Told after each piece of work: the stage, the pieces done, their number, and the layer's name.
Callback = Callable[[str, int, int, str], object]

# Options of ``decompose`` that ``compress`` sets itself.
_NOT_OPTIONS = ("metric", "metric_groups", "callback", "seed")


def batches_of(calibration: Any, forward: Any, weights: Any) -> list[Any] | None:
    """Return the batches as a list, since they are run several times; None if none are given.

    Raises:
        TypeError: ``calibration`` is no iterable of batches, or a function is none.
        ValueError: there is no batch, or a function is given without batches.
    """
    for name, value in (("forward", forward), ("weights", weights)):
        if value is not None and calibration is None:
            raise ValueError(f"{name} says how to run calibration batches; give calibration= too")
        checks.check_function(value, name)
    if calibration is None:
        return None
    require_batches(calibration, "calibration", once=True)
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration must have at least one batch, got none")
    return batches


def check_options(orders: Any, seed: Any, callback: Any, fit: Mapping[str, Any]) -> None:
    """Check the options, among them those for ``polyadic.decompose``.

    Raises:
        TypeError: a value is of the wrong type, or ``decompose`` has no such option.
        ValueError: an order is below 1.
    """
    if orders is not None:
        if isinstance(orders, (str, bytes)) or not isinstance(orders, Sequence) or not orders:
            raise TypeError(f"orders must be a sequence of ints such as (1, 2), got {orders!r}")
        for order in orders:
            positive_int(order, "each of orders")
    checks.a_seed(seed)
    checks.check_function(callback, "callback")
    wrong = [name for name in fit if name in _NOT_OPTIONS or name not in _options()]
    if wrong:
        raise TypeError(
            f"compress has no option {wrong[0]!r}; those of polyadic.decompose that may be given "
            f"are {', '.join(sorted(_options() - set(_NOT_OPTIONS)))}"
        )


def _options() -> set[str]:
    parameters = signature(decompose).parameters
    return {n for n, p in parameters.items() if p.kind is Parameter.KEYWORD_ONLY}


def pairs_of(value: Any) -> list[tuple[Shape, Shape]]:
    """Return pairs (in modes, out modes) from one pair or a list of several.

    Raises:
        TypeError: the value is neither.
        ValueError: a mode is below 1.
    """
    pairs = list(value) if isinstance(value, list) else [value]
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"shapes must be (in modes, out modes) such as ((8, 8), (4, 16)), or a list of "
                f"such pairs, got {value!r}"
            )
    return [(mode_sizes(i, "in modes"), mode_sizes(o, "out modes")) for i, o in pairs]
