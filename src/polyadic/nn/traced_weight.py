"""The dense weight of a CP layer where torch.compile looks, which refuses to be written to.

A compiler has no use for a tensor without memory (``polyadic.nn.weight``): it wants to see how the
weight is built, and it leaves the Python code of some operations out. But it runs what it sees with
fake tensors first, and below autograd every operation has a schema that says which arguments are
written to and which results are views. So in that run the weight is a ``TracedWeight``: it refuses
what its schema calls a write, hands all else on to the dense tensor in it, and wraps views again.
In later runs of the same operations, and in the graph, there is the dense tensor alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from polyadic._torch import (
    in_function_mode,
    is_fake,
    keep_whole,
    no_torch_function,
    not_traced,
    tree_leaves,
    tree_map_only,
    without_memory,
)


def refuse_write(owner: str, what: str) -> NoReturn:
    """Raise the error of a write that would be lost.

    Args:
        owner: what the weight belongs to.
        what: how it was to be written to.

    Raises:
        RuntimeError: always. A TypeError of an operator such as += would send Python on to +, which
            loses the write.
    """
    raise RuntimeError(
        f"the weight of a {owner} is computed from its CP factors, so that {what} would be lost; "
        f"change the factors (layer.cp.factors), draw them anew (layer.reset_parameters()), or "
        f"convert to the torch layer and change that; layer.weight.clone() is a plain copy"
    )


class TracedWeight(Tensor):
    """A dense weight that no operation may write to."""

    dense: Tensor
    owner: str
    __torch_function__ = no_torch_function

    @staticmethod
    def of(dense: Tensor, owner: str) -> Tensor:
        """A weight that was built, guarded in the compiler's first run; differentiable."""
        _prepare()
        return _guarded(dense, owner)

    @staticmethod
    def _wrapping(dense: Tensor, owner: str) -> TracedWeight:
        made: TracedWeight = without_memory(TracedWeight, dense, dense.shape, dense.stride())
        made.dense, made.owner = dense, owner
        return made

    # mypy reads the signature of torch's method wrongly.
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name it without its entries, which it has none of."""
        return f"TracedWeight({tuple(self.shape)} of a {self.owner})"

    # Two names under which torch's compilers look for what is inside of a tensor.

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["dense"], self.owner

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], owner: str, size: Any, stride: Any
    ) -> TracedWeight:
        return TracedWeight._wrapping(inner["dense"], owner)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares no class method
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Refuse a write, and go on with the dense tensor in every other operation."""
        kwargs = kwargs or {}
        arguments, returned = func._schema.arguments, func._schema.returns
        # Arguments that are not given by position are given by name, or not at all.
        for argument, given in itertools.zip_longest(arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for weight in _weights_in(kwargs.get(argument.name, given)):
                    refuse_write(weight.owner, f"{func.overloadpacket.__name__}()")
        (weight, *_) = _weights_in([args, kwargs])
        plain_args, plain_kwargs = tree_map_only(
            TracedWeight, lambda held: held.dense, (tuple(args), kwargs)
        )
        result = func(*plain_args, **plain_kwargs)
        if all(one.alias_info is None for one in returned):
            return result
        return tree_map_only(Tensor, lambda view: cls._wrapping(view, weight.owner), result)


class _Guarded(torch.autograd.Function):
    """A dense tensor as a ``TracedWeight``; its gradient is that of the dense tensor."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, owner: str) -> TracedWeight:
        return TracedWeight._wrapping(dense, owner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _guarded(dense: Tensor, owner: str) -> Tensor:
    # Transforms of torch.func wrap fake tensors in tensors of their own; an export's second run has
    # fake tensors too, but goes by way of function modes.
    if not is_fake(dense) or in_function_mode():
        return dense
    made: Tensor = _Guarded.apply(dense, owner)
    return made


@not_traced
def _prepare() -> None:
    keep_whole(_guarded)


def _weights_in(tree: Any) -> list[TracedWeight]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, TracedWeight)]
