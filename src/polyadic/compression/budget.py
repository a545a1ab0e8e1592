"""The budget of a compression: which one, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from polyadic import checks

NEVER_SLOWER = "never-slower"


Kind = Literal["ratio", "flops_ratio", "max_error", "speed"]


@dataclass(frozen=True)
class Budget:
    """The quantity that is bounded, and its bound.

    Attributes:
        kind: ``"ratio"`` of parameters, ``"flops_ratio"``, ``"max_error"``, or ``"speed"`` where
            that is the only demand.
        value: the bound; it has no meaning for ``"speed"``.
        never_slower: whether no layer may be predicted to be slower than it was.
    """

    kind: Kind
    value: float
    never_slower: bool

    @property
    def fraction(self) -> float | None:
        """Fraction of the dense parameters that layers are expected to keep; None if unknown."""
        return 1 / self.value if self.kind == "ratio" else None

    def __str__(self) -> str:
        if self.kind == "speed":
            return "no layer slower than dense"
        text = {
            "ratio": f"{self.value:g} times fewer parameters",
            "flops_ratio": f"{self.value:g} times fewer FLOPs",
            "max_error": f"relative error of at most {self.value:g}",
        }[self.kind]
        return text + (", no layer slower than dense" if self.never_slower else "")


def budget(ratio: Any, flops_ratio: Any, max_error: Any, speed: Any) -> Budget:
    """Return the one budget that is given among the arguments.

    Raises:
        TypeError: a value is not a number.
        ValueError: none or several are given, or a value is out of range.
    """
    given: dict[Kind, Any] = {"ratio": ratio, "flops_ratio": flops_ratio, "max_error": max_error}
    given = {name: value for name, value in given.items() if value is not None}
    if speed is not None and speed != NEVER_SLOWER:
        raise ValueError(f"speed must be {NEVER_SLOWER!r} or None, got {speed!r}")
    if len(given) > 1:
        raise ValueError(
            f"one budget can be met at a time, got {' and '.join(given)}; speed={NEVER_SLOWER!r} "
            f"may be added to either"
        )
    if not given:
        if speed is None:
            raise ValueError(
                f"give a budget: ratio= or flops_ratio= (times fewer), max_error=, or "
                f"speed={NEVER_SLOWER!r}"
            )
        return Budget("speed", 0.0, True)
    ((name, value),) = given.items()
    if name == "max_error":
        value = checks.a_number(value, name)
        if not 0 < value < 1:
            raise ValueError(f"max_error is relative and must lie in (0, 1), got {value}")
    else:
        value = checks.a_number(value, f"{name} (how many times fewer)", above=1)
    return Budget(name, value, speed is not None)
