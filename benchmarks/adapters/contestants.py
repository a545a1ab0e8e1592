"""The adapters that are compared, by name, as configurations of PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, VeraConfig

from polyadic.adapters import CPConfig

Make = Callable[..., Any]


@dataclass(frozen=True)
class Contestant:
    """An adapter with its settings.

    Attributes:
        key: its name in records and commands.
        label: its name on the page.
        make: of a configuration, given ``target_modules`` and the like.
        rates: learning rates it is tried with.
    """

    key: str
    label: str
    make: Make
    rates: tuple[float, ...]


def _lora(r: int) -> Make:
    # α/r = 2, as is usual.
    return lambda **more: LoraConfig(r=r, lora_alpha=2 * r, **more)


def _cp(r: int, order: int, share: Any = "none") -> Make:
    return lambda **more: CPConfig(r=r, alpha=8, order=order, share=share, **more)


LOW = (1e-3, 2e-3, 4e-3, 8e-3)
HIGH = (2.5e-3, 5e-3, 1e-2, 2e-2)

FINE_TUNED = (
    Contestant("lora-1", "LoRA r=1", _lora(1), LOW),
    Contestant("cp-8", "CP R=8, order 2", _cp(8, 2), HIGH),
    Contestant("cp-shared-32", "CP R=32, order 2, shared", _cp(32, 2, "layers"), HIGH),
    Contestant(
        "lokr-4",
        "LoKr r=4, both factored",
        lambda **more: LoKrConfig(r=4, alpha=8, decompose_both=True, **more),
        HIGH,
    ),
    Contestant("lora-8", "LoRA r=8", _lora(8), LOW),
    Contestant(
        "vera-64", "VeRA r=64", lambda **more: VeraConfig(r=64, **more), tuple(2 * r for r in HIGH)
    ),
    Contestant("loha-1", "LoHa r=1", lambda **more: LoHaConfig(r=1, alpha=2, **more), LOW),
    Contestant("cp-64", "CP R=64, order 2", _cp(64, 2), HIGH),
)

LAYERS = (
    Contestant("lora-8", "LoRA r=8", _lora(8), ()),
    Contestant("lora-64", "LoRA r=64", _lora(64), ()),
    Contestant("loha-8", "LoHa r=8", lambda **more: LoHaConfig(r=8, alpha=16, **more), ()),
    Contestant("lokr-8", "LoKr r=8", lambda **more: LoKrConfig(r=8, alpha=16, **more), ()),
    Contestant("cp-8", "CP R=8, order 2", _cp(8, 2), ()),
    Contestant("cp-64", "CP R=64, order 2", _cp(64, 2), ()),
    Contestant("cp-64-3", "CP R=64, order 3", _cp(64, 3), ()),
)


def chosen(every: Sequence[Contestant], only: Sequence[str] | None) -> list[Contestant]:
    """Those of these keys, all by default.

    Raises:
        ValueError: a key is unknown.
    """
    known = [contestant.key for contestant in every]
    for key in only or ():
        if key not in known:
            raise ValueError(f"contestants are {', '.join(known)}, got {key!r}")
    return [contestant for contestant in every if only is None or contestant.key in only]
