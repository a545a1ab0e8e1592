"""Indices into a table of rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polyadic.checks.arguments import check_tensor
from polyadic.checks.factors import check_dense
from polyadic.formats import Shape, is_int, positive_int


def check_indices(value: Any, like: Tensor) -> None:
    """Check that ``value`` is a tensor of indices on the factors' device."""
    check_tensor(value, "indices")
    check_dense(value, "indices")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be int64 or int32, got {value.dtype}; cast them")
    if value.device != like.device:
        raise ValueError(
            f"indices are on {value.device}, the factors on {like.device}; move one of them"
        )


def check_table_rows(num_embeddings: Any, in_shape: Shape) -> int:
    """Return V, by default all Π m_d rows of the table, after a check that they are enough."""
    rows = math.prod(in_shape)
    if num_embeddings is None:
        return rows
    size = positive_int(num_embeddings, "num_embeddings")
    if size > rows:
        raise ValueError(
            f"the in modes {in_shape} make {rows} rows, fewer than num_embeddings={size}; give "
            f"modes whose product is at least {size}"
        )
    return size


def check_padding_index(value: Any, num_embeddings: int) -> int | None:
    """Return ``padding_idx`` counted from the front, or None.

    Raises:
        TypeError: not an int or None.
        ValueError: outside the table.
    """
    if value is None:
        return None
    if not is_int(value):
        raise TypeError(f"padding_idx must be an int or None, got {value!r}")
    index = int(value.__index__())
    if not -num_embeddings <= index < num_embeddings:
        raise ValueError(
            f"padding_idx must lie in [{-num_embeddings}, {num_embeddings}), got {index}"
        )
    return index % num_embeddings


def check_in_range(flat: Tensor, size: int) -> None:
    """Check indices (b,) against [0, size) without reading them: a lookup that does so itself.

    Raises:
        IndexError: one is outside (on a CPU; a CUDA device reports it asynchronously).
    """
    try:
        torch.zeros((), device=flat.device).expand(size).index_select(0, flat)
    except IndexError:
        raise IndexError(f"every index must lie in [0, {size}), one of them does not") from None
