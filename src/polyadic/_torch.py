"""What is asked of torch in its own words: compiling, exporting, autocast, and memos.

What code asks while a compiler traces it is put in words that every supported torch understands.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function, forward_ad

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")
MOST = 4096

# A symbolic batch under torch.compile gets one plan for all sizes: that of a large batch.
UNKNOWN_BATCH = 256


def not_traced(function: F) -> F:
    """Have a compiler call a function while it traces, and keep the result as a constant.

    What torch.compiler.assume_constant_result does, without its import of the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@not_traced
def exporting() -> bool:
    """Whether the graph being traced is to be exported."""
    # Traced, the compiler of torch 2.11 takes this for true in each graph.
    return torch.compiler.is_exporting()


def known(*sizes: int) -> bool:
    """Whether torch.compile, which is tracing, knows all sizes as constants."""
    # Imported while tracing, as it takes half a second.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    known = True
    for size in sizes:
        known = known and has_static_value(size)
    return known


# Whether a transform of torch.func is active.
transforms_active = torch._C._are_functorch_transforms_active


def in_transform() -> bool:
    """Whether a transform of torch.func is active, or a level of forward mode."""
    return transforms_active() or forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether derivatives, or a transform of torch.func, are asked for in what runs now."""
    return torch.is_grad_enabled() or in_transform()


def observed() -> bool:
    """Whether a mode or a tracer wants to see each operation that runs now."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


# A tensor that a transform of torch.func has left behind, as the plain one in it.
unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """A Function's ``apply`` for plain tensors outside transforms, without what torch asks there.

    ``Function.apply`` looks for transforms and unwraps arguments in Python, which takes as long as
    one product of a small layer.
    """
    apply: Callable[..., Any] = super(Function, function).apply  # type: ignore[misc]
    return apply


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch's own, no subclass that has other ideas of operations."""
    return type(tensor) in (Tensor, torch.nn.Parameter, FakeTensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and a device, but no numbers."""
    return type(tensor) is FakeTensor


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    return _exists(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast(like: Tensor) -> contextlib.AbstractContextManager[None]:
    """Autocast off for the device of a tensor, where it is on."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else contextlib.nullcontext()


@not_traced
def _exists(device_type: str) -> bool:
    # The compiler of torch 2.11 cannot look into this.
    return torch.amp.is_autocast_available(device_type)


class Memo(dict[Any, Any]):
    """A dict that starts anew when it has grown large."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(key, value)


def memoized(function: Callable[P, T]) -> Callable[P, T]:
    """Remember results by argument; under torch.compile, which cannot see a memo, just call."""
    remembered = functools.lru_cache(maxsize=MOST)(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return remembered(*args, **kwargs)  # type: ignore[arg-type]

    return call
