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

# In the order in which they tell most. Of about 14,000 parameters in two layers of the encoder are
# LoRA r=1, CP R=11, CP R=35 shared and LoKr; of about 110,000 LoRA r=8, CP R=88 and LoHa; VeRA has
# those of CP R=8, which has LoRA's rank of 8.
FINE_TUNED = (
    Contestant(
        "head", "the classifier alone",
        lambda **more: LoraConfig(**{**more, "target_modules": DUMMY_TARGET_MODULES}), (1e-3,),
    ),
    Contestant("lora-1", "LoRA r=1", _lora(1), tuple(2 * rate for rate in LOW)),
    Contestant("cp-11", "CP R=11, order 2", _cp(11, 2), HIGH),
    Contestant("lora-8", "LoRA r=8", _lora(8), LOW),
    Contestant("cp-88", "CP R=88, order 2", _cp(88, 2), HIGH),
    Contestant("vera-256", "VeRA r=256", lambda **more: VeraConfig(r=256, **more), HIGH),
    Contestant(
        "lokr-16", "LoKr r=16", lambda **more: LoKrConfig(r=16, alpha=32, **more),
        tuple(rate / 2 for rate in HIGH),
    ),
    Contestant("cp-8", "CP R=8, order 2", _cp(8, 2), HIGH),
    Contestant("cp-shared-35", "CP R=35, order 2, shared", _cp(35, 2, "layers"), HIGH),
    Contestant("loha-4", "LoHa r=4", lambda **more: LoHaConfig(r=4, alpha=8, **more), LOW),
)  # fmt: skip

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
