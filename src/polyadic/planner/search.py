"""The largest rank that is cheap enough, and the words that layers take for a rank.

A rank is judged by the plan that would be chosen for it, with all of its steps. Its FLOPs and its
time grow with the rank, so the largest rank that is good enough is found by doubling and halving.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

from polyadic.planner import choice
from polyadic.planner.calibrated import machine_for
from polyadic.planner.report import Costed, costed
from polyadic.planner.request import Request

# Words for a rank are resolved for this many rows, or this many images of these sizes; "faster"
# asks for a layer that is this much faster than the dense one.
WORD_ROWS, WORD_IMAGES = 256, 8
WORD_SIZES = {1: 1024, 2: 32, 3: 16}
WORD_SPEEDUP = 1.25


class NoRankError(ValueError):
    """Not even rank 1 is cheap enough."""


def largest(
    asked: Request,
    *,
    flops: float | None = None,
    speedup: float | None = None,
    training: bool = True,
) -> int:
    """Return the largest rank up to which the chosen plan has so few FLOPs, or is so fast.

    Raises:
        NoRankError: not even rank 1 is.
    """
    dense = _cost(asked, None, training)

    def is_good(rank: int) -> bool:
        at = dataclasses.replace(asked, format=dataclasses.replace(asked.format, rank=rank))
        ours = _cost(at, choice.choose(at), training)
        if flops is not None:
            return ours.flops <= flops * dense.flops
        return ours.seconds * cast(float, speedup) <= dense.seconds

    if not is_good(1):
        what = f"at most {flops:g} of the" if flops is not None else f"{speedup:g} times as fast as"
        raise NoRankError(
            f"not even rank 1 is predicted {what} dense{' FLOPs' if flops is not None else ''} "
            f"(batch {asked.batch}, {asked.dtype}, {asked.device}); keep the dense layer, or give "
            f"the rank as an int"
        )
    return last(is_good, asked.format.largest_rank)


@functools.lru_cache(maxsize=1024)
def saves_flops(asked: Request) -> bool:
    """Whether the chosen plan has at most the FLOPs of the dense layer, forward and backward."""
    return _cost(asked, choice.choose(asked), True).flops <= _cost(asked, None, True).flops


choice.when_forgotten(saves_flops.cache_clear)


def last(is_good: Callable[[int], bool], most: int) -> int:
    """Return the last number from 1 to ``most`` that is good, where the good ones come first."""
    low, high = 1, 2
    while high <= most and is_good(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return low


def _cost(asked: Request, plan: Any, training: bool) -> Costed:
    kind = choice.kind_of(asked)
    forward, backward = kind.dense_steps(asked) if plan is None else kind.steps(asked, plan)
    return costed(plan, (forward, backward if training else []), 0, machine_for(asked))


def rank_of_word(word: str, asked: Request) -> int:
    """Return the rank that ``"break-even"`` or ``"faster"`` stands for.

    Raises:
        NoRankError: the word is ``"faster"``, and no rank is faster than the dense layer.
    """
    if word == "faster":
        return largest(asked, speedup=WORD_SPEEDUP)
    return break_even(asked)


def break_even(asked: Request, training: bool = True) -> int:
    """Return the largest rank up to which the plan has no more FLOPs than dense; at least 1."""
    try:
        return largest(asked, flops=1.0, training=training)
    except NoRankError:
        return 1


def word_size(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Return the image for which a word is resolved: the usual one, or as large as the kernel."""
    usual = WORD_SIZES[len(kernel_size)]
    pairs = zip(kernel_size, dilation, strict=True)
    return tuple(max(usual, step * (taps - 1) + 1) for taps, step in pairs)
