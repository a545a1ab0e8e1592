"""Count what a computation keeps, holds, multiplies and dispatches. Nothing here is timed.

    kept_bytes(lambda: layer(x), leave_out=[*layer.parameters(), x])    bytes saved for the backward
    with LiveBytes([x, *layer.parameters()]) as live: step()            live.peak
    flops(step), launches(step), allocations(step)                      of everything that step runs
    with Flops() as counter: y = layer(x)                               counter.total

All counts are taken where torch dispatches its operators, so that they are exact and the same on
every machine: what an operator needs inside itself (packed operands of a matrix product, an
unfolded image) is not seen, nor is what an allocator rounds up. Memory is counted by storages: a
storage counts once and with its full size, however many tensors view it. Meta tensors have storages
with sizes as well, so that the memory of a step can be asked without carrying it out.

Code compiled by ``torch.compile`` does not pass through the dispatcher as it runs; count the same
function before it is compiled.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from polyadic._torch import TorchDispatchMode, tree_leaves


class _Storages:
    """Bytes of the storages that were shown and still live."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.total = 0
        self._sizes: dict[int, tuple[int, weakref.ref[Any]]] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        for part in _dense_parts(tensor):
            storage, key = part.untyped_storage(), _identity(part)
            if key not in self._sizes:
                # The identity may be given out anew once the storage is freed, so it is forgotten.
                freed = weakref.ref(storage, partial(self._forget, key))
                self._sizes[key] = storage.nbytes(), freed
                self.total += storage.nbytes()

    def _forget(self, key: int, _: Any) -> None:
        self.total -= self._sizes.pop(key)[0]


def _identity(tensor: Tensor) -> int:
    # The address of the data would not do: storages of meta tensors all have the address 0.
    return int(tensor.untyped_storage()._cdata)


def _dense_parts(tensor: Tensor) -> Iterator[Tensor]:
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


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class KeptBytes:
    """Counts, within a ``with`` block, the bytes that autograd saves for backward passes.

    Every tensor that is handed to autograd's ``save_for_backward`` counts with its whole storage,
    each storage once. It is counted as long as it lives, so read ``total`` while the outputs of the
    forward pass, which hold its graph, are alive.

    Args:
        leave_out: tensors that exist anyway, usually parameters, buffers and the batch. Their
            storages do not count; copies of them do.
    """

    def __init__(self, leave_out: Iterable[Tensor] = ()) -> None:
        self._left_out = [part for tensor in leave_out for part in _dense_parts(tensor)]
        ignored = {_identity(part) for part in self._left_out}
        self._kept = _Storages()

        def pack(tensor: Tensor) -> Tensor:
            for part in _dense_parts(tensor):
                if _identity(part) not in ignored:
                    self._kept.add(part)
            # If the tensor itself were held, an output that its graph holds would never be freed.
            return tensor.detach()

        self._hooks = saved_tensors_hooks(pack, _unchanged)

    def __enter__(self) -> KeptBytes:
        """Begin to count."""
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Count no more; what is freed after this is still taken off ``total``."""
        self._hooks.__exit__(*raised)

    @property
    def total(self) -> int:
        """Bytes saved so far and not freed."""
        return self._kept.total


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def kept_bytes(forward: Callable[[], Any], leave_out: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps between a forward pass and its backward pass.

    Args:
        forward: runs the forward pass, with gradients enabled, and returns its outputs.
        leave_out: tensors that exist anyway, usually parameters, buffers and the batch. Their
            storages do not count; copies of them do.

    Returns:
        Bytes of all storages saved, each once and whole; exact, not an estimate. 0 if no output
        requires a gradient.
    """
    with KeptBytes(leave_out) as kept, torch.enable_grad():
        # The outputs hold the graph, and with it all that is to be counted.
        outputs = forward()
        total = kept.total
    del outputs
    return total


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, within a ``with`` block, the bytes of tensors that are alive at the same time.

    A storage is counted from the moment an operator returns it until it is freed.

    Args:
        held: tensors that are there already, such as parameters and the batch.

    Attributes:
        peak: the largest ``current`` there has been, in bytes.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = _Storages(held)
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
        for tensor in _tensors(result):
            self._live.add(tensor)
            self.peak = max(self.peak, self._live.total)
        return result


@dataclass(frozen=True)
class Allocation:
    """A new storage that an operator returned.

    Attributes:
        operation: name of the operator, such as ``"aten.mm.default"``.
        nbytes: size of the storage.
        elements: how many elements of the tensor's dtype fit into it.
    """

    operation: str
    nbytes: int
    elements: int


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, within a ``with`` block, the operators that reach torch's dispatcher below autograd.

    Attributes:
        names: their names in order, such as ``"aten.mm.default"``. Views such as
            ``"aten.t.default"`` are among them, although they start no kernel.
        allocations: the storages that they returned and were not given, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.allocations: list[Allocation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        self.names.append(name)
        seen = {_identity(p) for t in _tensors((args, kwargs)) for p in _dense_parts(t)}
        for part in (p for t in _tensors(result) for p in _dense_parts(t)):
            if _identity(part) not in seen:
                seen.add(_identity(part))
                nbytes = part.untyped_storage().nbytes()
                self.allocations.append(Allocation(name, nbytes, nbytes // part.element_size()))
        return result


def launches(run: Callable[[], Any]) -> int:
    """Count the operators that reach torch's dispatcher below autograd.

    Args:
        run: what is to be counted; called once.

    Returns:
        How many names ``Operations`` notes.
    """
    seen = Operations()
    with seen:
        run()
    return len(seen.names)


def allocations(run: Callable[[], Any]) -> list[Allocation]:
    """List the storages that operators make; views of their inputs and outputs are left out.

    Args:
        run: what is to be counted; called once.

    Returns:
        The storages in the order in which they were made, whether or not they were freed meanwhile.
    """
    seen = Operations()
    with seen:
        run()
    return seen.allocations


class Flops(FlopCounterMode):
    """Counts, within a ``with`` block, the floating-point operations of products and convolutions.

    A multiplication and an addition count as two. What is no product, such as a sum or an
    activation, is not counted, as in ``torch.utils.flop_counter``. The gradients of convolutions
    are counted by a formula of our own: torch's leaves groups out of account, and counts the weight
    gradient of a depthwise convolution as often as there are channels. A product of complex
    numbers counts as the four of real ones that it takes, where torch counts one.
    """

    def __init__(self) -> None:
        formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
        super().__init__(display=False, custom_mapping=formulas)
        self.flop_registry = {op: _of_reals(own) for op, own in self.flop_registry.items()}

    @property
    def total(self) -> int:
        """FLOPs counted so far."""
        counted: Any = self.get_total_flops()
        return int(counted)


def flops(run: Callable[[], Any]) -> int:
    """Count the floating-point operations of products and convolutions.

    Args:
        run: what is to be counted; called once. ``loss.backward`` is one for a backward pass.

    Returns:
        FLOPs, as ``Flops`` counts them.
    """
    counter = Flops()
    with counter:
        run()
    return counter.total


def _of_reals(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula that counts operations of real numbers where the operands are complex."""

    def counted(*args: Any, **kwargs: Any) -> int:
        is_complex = any(isinstance(a, Tensor) and a.is_complex() for a in args)
        return formula(*args, **kwargs) * (4 if is_complex else 1)

    return counted


def _convolution_backward_flops(
    grad_shape: list[int], x_shape: list[int], weight_shape: list[int], *args: Any, **kwargs: Any
) -> int:
    """Two FLOPs per position, channel and tap, for each of the two gradients that is asked for.

    The positions are those of the output; of a transposed convolution, those of the input. Each
    meets every tap of the weight, whose second dimension is already one group's share of channels.
    """
    transposed, asked = args[4], args[7]
    positions = x_shape if transposed else grad_shape
    gradients = int(asked[0]) + int(asked[1])
    return 2 * math.prod(positions) * math.prod(weight_shape[1:]) * gradients
