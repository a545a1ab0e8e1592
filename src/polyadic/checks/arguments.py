"""Numbers, modules, devices, dtypes, plans: what any function may be given."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from polyadic.formats import is_int
from polyadic.kernels.backend import is_computed, why_not
from polyadic.plans import MEMORY, ConvPlan, LinearPlan, Memory, SpectralPlan

Plan = TypeVar("Plan", LinearPlan, ConvPlan, SpectralPlan)
Word = TypeVar("Word", bound=str)


def an_int(value: Any, name: str, least: int | None = None) -> int:
    """Return ``value`` as a plain int.

    Raises:
        TypeError: ``value`` is not an integer (bool and float are refused).
        ValueError: it is below ``least``.
    """
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def a_seed(value: Any) -> int:
    """Return a seed as a plain int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is none that torch's generators take.
    """
    seed = an_int(value, "seed")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be from -2**63 up to 2**64 - 1, got {seed}")
    return seed


def a_number(
    value: Any, name: str, *, least: float | None = None, above: float | None = None
) -> float:
    """Return a finite number as a float.

    Raises:
        TypeError: ``value`` is not an int or a float (bool is refused).
        ValueError: it is not finite, below ``least`` or not above ``above``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    too_small = (least is not None and value < least) or (above is not None and value <= above)
    if too_small or not math.isfinite(value):
        bound = "" if least is None else f" and at least {least:g}"
        bound += "" if above is None else f" and above {above:g}"
        raise ValueError(f"{name} must be finite{bound}, got {value}")
    return float(value)


def check_module(model: object, argument: str = "model") -> None:
    """Raise a TypeError for anything but a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument} must be a torch.nn.Module, got {type(model).__name__}")


def check_tensor(value: object, name: str) -> None:
    """Raise a TypeError for anything but a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_function(value: object, name: str) -> None:
    """Raise a TypeError for what is neither None nor can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {value!r:.80}")


def check_flag(value: Any, name: str) -> bool:
    """Return an option that is on or off as a bool; None is off, and 0 and 1 are accepted too.

    Raises:
        TypeError: the option is anything else.
    """
    if value is None or isinstance(value, bool) or type(value).__name__ == "bool_":
        return bool(value)
    if is_int(value) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r:.80}")


def check_word(value: Any, name: str, known: tuple[Word, ...]) -> Word:
    """Return an option that must be one of the known words.

    Raises:
        ValueError: it is another word or no text at all. Only text is compared, because comparing a
            tensor or an array does not give a single bool.
    """
    for word in known if isinstance(value, str) else ():
        if value == word:
            return word
    raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_memory(value: Any) -> Memory:
    """Return ``memory=`` if it is a known level."""
    return check_word(value, "memory", MEMORY)


def check_plan(plan: Any, kind: type[Plan]) -> Plan:
    """Return a given plan if it is of the kind that the layer follows."""
    if not isinstance(plan, kind):
        raise TypeError(f"plan must be a polyadic.{kind.__name__}, got {type(plan).__name__}")
    return plan


def check_backend(plan: LinearPlan | ConvPlan, kind: str, x: Tensor) -> None:
    """Check that the kernels a given plan asks for can run where x is.

    Raises:
        ValueError: a route is by "triton" and they cannot.
    """
    if plan.forward.by == plan.backward.by == "torch":
        return
    reason = why_not(kind, x.device.type, x.dtype)
    if reason is not None:
        raise ValueError(f"the plan asks for by='triton', but {reason}; use by='torch'")


def check_device(device: Any) -> str:
    """Return the type of a device, such as ``"cpu"``.

    Raises:
        TypeError: ``device`` is neither a device nor text nor the number of an accelerator.
        ValueError: it names no device.
    """
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"device must be text such as 'cpu', got {device!r}")
    try:
        return torch.device(device).type
    except (RuntimeError, OverflowError):
        raise ValueError(f"device must be one torch knows, such as 'cpu', got {device!r}") from None


def check_dtype(dtype: Any) -> torch.dtype:
    """Return a dtype if layers compute in it.

    Raises:
        TypeError: it is neither floating point of two bytes or more, nor complex64 or complex128.
    """
    if isinstance(dtype, torch.dtype) and is_computed(dtype):
        return dtype
    raise TypeError(
        f"dtype must be floating point of two bytes or more, complex64 or complex128, got {dtype!r}"
    )
