"""Memory counted by storages: how many bytes of tensors are alive at the same time.

A storage counts once and with its full size, however many tensors view it. It is counted from the
moment an operator returns it until it is freed. Meta tensors have storages with sizes as well, so
that the memory of a step can be asked without carrying it out.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polyadic._torch import TorchDispatchMode, tree_leaves


class Storages:
    """Bytes of the storages that were shown and still live.

    Attributes:
        total: the bytes.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.total = 0
        self._sizes: dict[int, tuple[int, weakref.ref[Any]]] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count the storages of a tensor, unless they are counted already, until they are freed."""
        for part in dense_parts(tensor):
            storage, key = part.untyped_storage(), identity_of(part)
            if key not in self._sizes:
                # The identity may be given out anew once the storage is freed, so it is forgotten.
                freed = weakref.ref(storage, partial(self._forget, key))
                self._sizes[key] = storage.nbytes(), freed
                self.total += storage.nbytes()

    def _forget(self, key: int, _: Any) -> None:
        self.total -= self._sizes.pop(key)[0]


def identity_of(tensor: Tensor) -> int:
    """What no other storage has as long as this tensor's is alive."""
    # The address of the data would not do: storages of meta tensors all have the address 0.
    return int(tensor.untyped_storage()._cdata)


def dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The strided tensors that a tensor is made of: itself, or indices and values if sparse."""
    if tensor.layout == torch.strided:
        yield tensor
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    else:
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        yield from (
            (tensor.crow_indices(), tensor.col_indices())
            if rows
            else (tensor.ccol_indices(), tensor.row_indices())
        )
        yield tensor.values()


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class LiveBytes(TorchDispatchMode):
    """Counts, within a ``with`` block, the bytes of tensors that are alive at the same time.

    Args:
        held: tensors that are there already, such as parameters and the batch.

    Attributes:
        peak: the largest ``current`` there has been, in bytes.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._live = Storages(held)
        self.peak = self._live.total

    @property
    def current(self) -> int:
        """Bytes seen and not freed."""
        return self._live.total

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            self._live.add(tensor)
            self.peak = max(self.peak, self._live.total)
        return result
