"""The warning about a rank with which a layer computes more than the dense layer."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from polyadic.planner.request import Request
from polyadic.planner.search import break_even, saves_flops

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# Class of the layer, and file and line of the caller, of the warnings that were given.
_warned: set[tuple[type, str, int]] = set()


def warn_above_break_even(kind: type, asked: Request) -> None:
    """Warn once for each class of layers and place in the caller's code.

    Args:
        kind: the class of the layer.
        asked: the request that it makes of the planner for a usual batch, at its rank.
    """
    rank = asked.format.rank
    # At half of this bound, which counts fewer FLOPs than a plan has, no plan has to be looked at.
    if 2 * rank <= asked.format.break_even_rank or saves_flops(asked):
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    place = (kind, frame.f_code.co_filename, frame.f_lineno)
    if place in _warned:
        return
    _warned.add(place)
    warnings.warn(
        f"this {kind.__name__} has rank {rank}, above its break-even rank {break_even(asked)}: it "
        f"computes more than the dense layer and is likely slower. rank='faster' or "
        f"polyadic.rank_for choose a rank by speed, polyadic.explain shows what one costs",
        UserWarning,
        stacklevel=level,
    )
