"""Counts what processes say to each other: collectives, and the bytes of the whole tensor in each.

The bytes of a collective are those of the tensor that it is about: of an all_reduce the tensor
that is summed, of an all_gather what every process then has, of a reduce_scatter what every process
gives. A ring moves (P − 1)/P of that out of each process, and twice as much for an all_reduce.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# By the name of the operator: the collective, and whether its result is the whole tensor or, where
# it is not, its argument. Operators of c10d are called by DistributedDataParallel and fully_shard.
COLLECTIVES = {
    "c10d_functional::all_reduce": ("all_reduce", False),
    "c10d_functional::all_gather_into_tensor": ("all_gather", True),
    "c10d_functional::reduce_scatter_tensor": ("reduce_scatter", False),
    "_c10d_functional::all_reduce": ("all_reduce", False),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", True),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", False),
    "c10d::allreduce_": ("all_reduce", False),
    "c10d::_allgather_base_": ("all_gather", False),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", False),
    "c10d::broadcast_": ("broadcast", False),
}


class Said(NamedTuple):
    """One collective: its name, how many processes take part, and the bytes of the whole tensor."""

    collective: str
    processes: int
    nbytes: int


class Count(TorchDispatchMode):
    """A context in which every collective is noted.

    Attributes:
        said: the collectives in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Said] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # A DTensor's operation is seen again as operations on what this process holds.
        if any(hasattr(leaf, "placements") for leaf in tree_leaves((args, kwargs))):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in COLLECTIVES:
            collective, of_result = COLLECTIVES[name]
            tensors = [t for t in tree_leaves(result if of_result else args) if _is_tensor(t)]
            if name.endswith("_base_"):
                # Output and input, of which the larger is the whole.
                tensors = [max(tensors, key=lambda t: t.numel())]
            nbytes = sum(t.numel() * t.element_size() for t in tensors)
            self.said.append(Said(collective, _size(args), nbytes))
        return result

    def of_buckets(self, model: nn.parallel.DistributedDataParallel) -> None:
        """Note the buckets of gradients that a wrapper sums, out of Python's sight."""

        # torch compares annotations, which are strings in this file.
        def note(state, bucket):  # type: ignore[no-untyped-def]
            buffer = bucket.buffer()
            size = dist.get_world_size(model.process_group)
            self.said.append(Said("all_reduce", size, buffer.numel() * buffer.element_size()))
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(buffer)
            return done

        model.register_comm_hook(None, note)

    def total(self) -> dict[str, list[int]]:
        """By collective and processes how many there were, and the bytes of all."""
        found: dict[str, list[int]] = {}
        for said in self.said:
            entry = found.setdefault(f"{said.collective} of {said.processes}", [0, 0])
            entry[0] += 1
            entry[1] += said.nbytes
        return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _size(args: Any) -> int:
    """The number of processes of a collective, from its group among the arguments."""
    undeclared: Any = dist.distributed_c10d
    resolve = undeclared._resolve_process_group
    for value in tree_leaves(args):
        if isinstance(value, str) and value not in ("sum", "avg"):
            return resolve(value).size()
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).size()
    raise ValueError(f"a collective without a group, got {args}")


@contextlib.contextmanager
def pretended(processes: int, rank: int = 0) -> Iterator[None]:
    """Be one of some processes that are not there: collectives do nothing and can be counted."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()
