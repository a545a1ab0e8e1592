"""Options of the command line: their values, and which of them would be ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import torch


def two_sizes(option: str, text: str) -> tuple[int, int]:
    """Read height and width, as in 3x3."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{option} must be height x width, as in 3x3, got {text!r}")
    return int(parts[0]), int(parts[1])


def dtype_named(name: str) -> torch.dtype | str:
    """Find torch's dtype; where it has none the name itself is returned, to be refused."""
    import torch

    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else name


def refuse_given(context: typer.Context, options: Sequence[str], why: str) -> None:
    """Refuse options that would be ignored, where they stand on the command line."""
    for name in options:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name} {why}")
