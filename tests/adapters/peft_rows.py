"""LoRA's rows in the tables of PEFT's own tests, as rows of CP adapters that do the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peft import LoraConfig

from polyadic.adapters import CPConfig

# Options of a LoRA that a CP adapter has too, by its name for them; None where it needs none.
OPTIONS = {
    "target_modules": "target_modules", "exclude_modules": "exclude_modules",
    "modules_to_save": "modules_to_save", "task_type": "task_type", "bias": "bias", "r": "r",
    "rank_pattern": "rank_pattern", "lora_alpha": "alpha", "alpha_pattern": "alpha_pattern",
    "lora_dropout": "dropout", "init_lora_weights": "init_weights", "fan_in_fan_out": None,
}  # fmt: skip
SHARES = ("none", "layers")


def options(given: dict[str, Any], share: str) -> dict[str, Any] | None:
    """Options of a CP adapter for those of a LoRA; None where it has no such adapter."""
    targets = given.get("target_modules")
    if not set(given) <= set(OPTIONS) or "mha" in (targets or ()) or targets == "mha":
        return None
    if not isinstance(given.get("init_lora_weights", True), bool):
        return None
    renamed = {OPTIONS[key]: value for key, value in given.items() if OPTIONS[key]}
    renamed["bias"] = str(renamed.get("bias", "none")).replace("lora", "polyadic")
    return {"r": 8, "alpha": 8, "share": share, **renamed}


def rows(table: Iterable[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """The table with CP adapters in place of LoRA, and without all other methods.

    Args:
        table: rows in which a class of a configuration stands before dicts of its options.
    """
    found = []
    for share in SHARES:
        for row in table:
            values = getattr(row, "values", row)
            if LoraConfig not in values or any("MHA" in str(value) for value in values[:2]):
                continue
            at = values.index(LoraConfig)
            made = [options(given, share) for given in values[at + 1 :]]
            if None not in made:
                # The name of the case, that of its method, and what else stands in front.
                front = ["polyadic" if value == "lora" else value for value in values[:at]]
                front[:1] = [f"{value} {share}" for value in front[:1]]
                found.append((*front, CPConfig, *made))
    return found
