"""Makes the method known to PEFT, whose tables are dicts by the name of a method."""

from __future__ import annotations

import enum
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING


class PolyadicType(str, enum.Enum):
    """The method's name, as PEFT and transformers ask for it.

    PEFT's own enumeration of methods is closed, and its tables compare strings. A plain string
    would do for PEFT; transformers asks a type for its ``value``.
    """

    POLYADIC = "POLYADIC"


def register(config: type, tuner: Any) -> None:
    """Enter the method into PEFT's tables.

    Adapters of several methods in one model (``PeftMixedModel``) are left out: its list of methods
    stands in its code.

    Raises:
        KeyError: another package has a method of this name there.
    """
    entries: list[tuple[Any, Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    ]
    name = PolyadicType.POLYADIC
    for table, value in entries:
        if table.setdefault(name, value) != value:
            raise KeyError(f"PEFT has another method called {name.value}, {table[name]}")
    if name in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
        raise KeyError(f"PEFT has another method called {name.value} for mixed models")
