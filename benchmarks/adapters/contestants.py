"""The adapters that are compared, by name, as configurations of PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, VeraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from polyadic.adapters import CPConfig

Make = Callable[..., Any]


@dataclass(frozen=True)
class Contestant:
    """An adapter with its settings.

    Attributes:
        key: its name in records and commands.
        label: its name on the page.
        make: of a configuration, given ``target_modules`` and the like.
        rates: learning rates it is tried with, growing by the same factor.
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
HIGH = (5e-3, 1e-2, 2e-2, 4e-2)


@dataclass(frozen=True)
class Field:
    """Who is fine-tuned, and who is compared with whom.

    Attributes:
        contestants: in the order in which they tell most.
        pairs: in which respect two are equal, and the keys of both, a CP adapter's first.
    """

    contestants: tuple[Contestant, ...]
    pairs: tuple[tuple[str, str, str], ...]


def field(small: int, shared: int, large: int, vera: int, lokr: int, head: bool) -> Field:
    """The same kinds of adapters for every model, at ranks that make their parameters equal.

    Args:
        small: rank of the CP adapter with as many parameters as LoRA of rank 1.
        shared: rank of the one whose layers share factors, with as many.
        large: rank of the CP adapter with as many parameters as LoRA of rank 8 and LoHa of rank 4.
        vera: rank of VeRA with as many parameters as the CP adapter of rank 8.
        lokr: rank of LoKr with as many parameters as LoRA of rank 1.
        head: whether a classifier trains beside them, which is then a contestant alone.
    """
    alone = Contestant(
        "head",
        "the classifier alone",
        lambda **more: LoraConfig(**{**more, "target_modules": DUMMY_TARGET_MODULES}),
        (1e-3,),
    )
    small_cp, large_cp, shared_cp = f"cp-{small}", f"cp-{large}", f"cp-shared-{shared}"
    contestants = (
        *([alone] if head else []),
        Contestant("lora-1", "LoRA r=1", _lora(1), tuple(2 * rate for rate in LOW)),
        Contestant(small_cp, f"CP R={small}, order 2", _cp(small, 2), HIGH),
        Contestant("lora-8", "LoRA r=8", _lora(8), LOW),
        Contestant(large_cp, f"CP R={large}, order 2", _cp(large, 2), HIGH),
        Contestant(
            f"vera-{vera}", f"VeRA r={vera}", lambda **more: VeraConfig(r=vera, **more), HIGH
        ),
        Contestant(
            f"lokr-{lokr}",
            f"LoKr r={lokr}",
            lambda **more: LoKrConfig(r=lokr, alpha=2 * lokr, **more),
            tuple(rate / 2 for rate in HIGH),
        ),
        Contestant("cp-8", "CP R=8, order 2", _cp(8, 2), HIGH),
        Contestant(shared_cp, f"CP R={shared}, order 2, shared", _cp(shared, 2, "layers"), HIGH),
        Contestant("loha-4", "LoHa r=4", lambda **more: LoHaConfig(r=4, alpha=8, **more), LOW),
    )
    same = "parameters"
    return Field(
        contestants,
        (
            *([("trained or not", small_cp, "head")] if head else []),
            (same, small_cp, "lora-1"),
            (same, shared_cp, "lora-1"),
            (same, large_cp, "lora-8"),
            (same, small_cp, f"lokr-{lokr}"),
            (same, shared_cp, f"lokr-{lokr}"),
            (same, large_cp, "loha-4"),
            (same, "cp-8", f"vera-{vera}"),
            ("rank", "cp-8", "lora-8"),
        ),
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
