"""Memory that nobody has written holds NaN, so that whoever reads it is found out.

torch fills what ``torch.empty`` returns, when asked; what a library below it takes from the C
library (oneDNN its scratch and some of its results) the C library itself fills, where it is glibc.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

# mallopt's parameter that fills all memory handed out with the complement of a byte. The complement
# of the lowest byte of 256 is 0xFF, of which every floating-point format makes NaN.
_M_PERTURB, _NAN, _OFF = -6, 0x100, 0


def fills_c_memory() -> bool:
    """Whether the C library can be told to fill the memory that it hands out."""
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, torch's and the C library's."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    library = ctypes.CDLL(None) if fills_c_memory() else None
    if library is not None:
        library.mallopt(_M_PERTURB, _NAN)
    try:
        yield
    finally:
        if library is not None:
            library.mallopt(_M_PERTURB, _OFF)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
