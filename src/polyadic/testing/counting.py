"""Count what a computation keeps, allocates, multiplies and dispatches. Nothing here is timed.

    kept_bytes(lambda: layer(x), leave_out=[*layer.parameters(), x])    bytes saved for the backward
    flops(step), launches(step), allocations(step)                      of everything that step runs
    with Flops() as counter: y = layer(x)                               counter.total

The most bytes that are alive at a time are counted by ``polyadic.testing.LiveBytes``.

All counts are taken where torch dispatches its operators, so that they are exact and the same on
every machine: what an operator needs inside itself (packed operands of a matrix product, an
unfolded image) is not seen, nor is what an allocator rounds up. Memory is counted by storages (see
``polyadic.live_bytes``).

Code compiled by ``torch.compile`` does not pass through the dispatcher as it runs; count the same
function before it is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from polyadic._torch import TorchDispatchMode
from polyadic.live_bytes import Storages, dense_parts, identity_of, tensors_of


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
        self._left_out = [part for tensor in leave_out for part in dense_parts(tensor)]
        ignored = {identity_of(part) for part in self._left_out}
        self._kept = Storages()

        def pack(tensor: Tensor) -> Tensor:
            for part in dense_parts(tensor):
                if identity_of(part) not in ignored:
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


class Operations(TorchDispatchMode):
    """Notes, within a ``with`` block, the operators that reach torch's dispatcher below autograd.

    Attributes:
        names: their names in order, such as ``"aten.mm.default"``. Views such as
            ``"aten.t.default"`` are among them, although they start no kernel.
        allocations: the storages that they returned and were not given, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.allocations: list[Allocation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        self.names.append(name)
        seen = {identity_of(p) for t in tensors_of((args, kwargs)) for p in dense_parts(t)}
        for part in (p for t in tensors_of(result) for p in dense_parts(t)):
            if identity_of(part) not in seen:
                seen.add(identity_of(part))
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
