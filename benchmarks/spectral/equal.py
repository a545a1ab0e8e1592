"""The rank at which a format has as many parameters as another one."""

from __future__ import annotations

from collections.abc import Callable


def nearest_share(count: Callable[[float], int], parameters: int) -> float:
    """Find the share of the dense weight's parameters at which their number is nearest to one.

    Args:
        count: the number of parameters at a share in (0, 1], which grows with it in steps.
        parameters: the number to come near.
    """
    low, high = 1e-4, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    return min((low, high), key=lambda share: abs(count(share) - parameters))
