"""Making layers on a CPU believe that their tensors are on a GPU that the kernels serve."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from data import device, error_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from polyadic.checks import arguments
from polyadic.kernels import embedding, fused, fused_conv, fused_linear, linear, pairs, products
from polyadic.kernels.triton.launch import Form

# Where products Xᵀ Z are made that a GPU does not round.
PRODUCTS = (
    (embedding, "matmul_tn_unrounded"),
    (linear, "matmul_tn_unrounded"),
    (fused_linear, "matmul_tn_in_float32"),
    (fused_conv, "matmul_tn_in_float32"),
)


def _unrounded(x: Tensor, z: Tensor) -> Tensor:
    """Sum in float32 as a GPU does."""
    return x.t().float() @ z.float()


@contextlib.contextmanager
def fused_kernels() -> Iterator[None]:
    """Take the way of the fused kernels, on a GPU or, interpreted, without one."""
    with contextlib.ExitStack() as stack:
        if device() == "cpu":
            stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
            stack.enter_context(mock.patch.object(arguments, "why_not", return_value=None))
            for module in (pairs, fused):
                stack.enter_context(mock.patch.object(module, "triton_serves", return_value=True))
            for module, name in PRODUCTS:
                stack.enter_context(mock.patch.object(module, name, _unrounded))
        yield


def _is_pointer(argument: Any) -> bool:
    nested = isinstance(argument, tuple) and len(argument) > 0
    return _is_pointer(argument[0]) if nested else isinstance(argument, Tensor)


@contextlib.contextmanager
def forms_are_told_apart() -> Iterator[None]:
    """Fail where a form is started with other dtypes or constants than before.

    Without a GPU each start is interpreted by itself; on one, the code of the first would run.
    """
    call, seen = Form.__call__, {}

    def started(form: Form, grid: Any, tensors: Any, numbers: Any, arguments: Any) -> None:
        given = arguments()
        pointers = sum(map(_is_pointer, given))
        own = [t.dtype for t in tensors], given[pointers + len(numbers) :]
        first = seen.setdefault(form, own)
        assert first == own, f"{form.kernel.fn.__name__}: one form for {first} and {own}"
        call(form, grid, tensors, numbers, arguments)

    with mock.patch.object(Form, "__call__", started):
        yield


@contextlib.contextmanager
def assertions() -> Iterator[None]:
    """Have Triton's interpreter hold what kernels assert, which it passes over otherwise."""
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    with mock.patch.object(interpreter.interpreter_builder, "options", options):
        yield


def judge_together(
    name: str,
    found: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    torchs: Sequence[Tensor | None],
) -> None:
    """Raise AssertionError unless the errors of all tensors together are at most twice torch's.

    The gradients of a small factor have too few numbers to compare their errors one by one.
    """
    ours, theirs = 0.0, 0.0
    for numbers, wanted, low in zip(found, exact, torchs, strict=True):
        assert numbers is not None
        assert wanted is not None
        assert low is not None
        assert numbers.dtype == low.dtype, f"{name}: another dtype"
        assert not numbers.isnan().any(), f"{name}: a NaN was read, or an element not written"
        ours += error_of(numbers, wanted) ** 2
        theirs += error_of(low, wanted) ** 2
    ours, allowed = math.sqrt(ours / len(found)), 2 * math.sqrt(theirs / len(found)) + 5e-7
    assert ours <= allowed, f"{name}: error {ours:.1e}, allowed {allowed:.1e}"


# What torch calls views, and memory without contents: nothing is launched for them.
NO_LAUNCH = re.compile(
    "_?(unsafe_)?view|t|transpose|permute|(un)?squeeze|expand|slice|select|split(_with_sizes)?|as_strided|alias"
    "|detach|_?reshape(_alias)?|movedim|(new_)?empty(_strided|_like)?"
)


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: torch's operations, and our kernels.

    Attributes:
        names: of everything launched, in its order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not NO_LAUNCH.fullmatch(name):
            # This copies a whole tensor, and then a part of it once more.
            self.names += [name] * (2 if name == "slice_scatter" else 1)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(*, computing: bool = True) -> Iterator[Launches]:
    """Count launches on the way of the fused kernels, which does not see that it is watched.

    Without ``computing`` the kernels are counted and not started, so that no number is right.
    """
    start = Form.__call__

    def started(form: Form, *args: Any) -> None:
        launches.names.append(form.kernel.fn.__name__)
        # What an interpreter does is nobody's launch.
        if computing:
            with _disable_current_modes():
                start(form, *args)

    with contextlib.ExitStack() as stack:
        stack.enter_context(fused_kernels())
        # A bias is added by a pass of its own on a CPU alone, and sums are one product on a GPU.
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cpu", False))
        for module, name in PRODUCTS:
            stack.enter_context(mock.patch.object(module, name, products.matmul_tn))
        stack.enter_context(mock.patch.object(fused, "count_dispatch_modes", int))
        stack.enter_context(mock.patch.object(Form, "__call__", started))
        launches = stack.enter_context(Launches())
        yield launches
