"""Starting a kernel through its compiled form.

Triton finds out at each start which compiled form serves, by looking at each argument. That takes
33 µs of CPU time for 25 arguments, thirty times as long as an operation of torch. Our kernels know
their form beforehand. It depends on sizes and dtypes, which make the key, and on whether all
pointers are multiples of 16 bytes, which the launcher checks. (Measured with Triton 3.9 on one core
of a Xeon, with a driver that launches nothing.) The driver itself starts the form that was found,
see ``driver``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyadic._torch import current_cuda_device
from polyadic.kernels.triton.driver import Code, code_of
from polyadic.kernels.triton.numerics import INTERPRETED

ALIGNMENT_BYTES = 16

_address = Tensor.data_ptr


class Form:
    """One form of a kernel: its code for certain sizes and dtypes, on each device that it runs on.

    Args:
        kernel: what ``triton.jit`` made.
        options: what Triton is to be told when it compiles it.
    """

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options
        # Triton's compiled kernel by device, and how the driver starts it, if it can.
        self.loaded: dict[int, tuple[Any, Code | None]] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor],
        numbers: tuple[int, ...],
        arguments: Callable[[], tuple[Any, ...]],
    ) -> None:
        """Start the kernel on the device and the current stream of the tensors.

        A tensor that does not begin at a multiple of 16 bytes, such as a view into a flat
        parameter, takes Triton's own way, which compiles for it apart.

        Args:
            grid: number of programs along three axes.
            tensors: every tensor among the arguments, in their order, none empty, all on one
                device.
            numbers: 32-bit integers among the arguments that the kernel does not specialize on;
                they stand behind the tensors, and the constants behind them.
            arguments: makes all arguments of the kernel, in its order, for Triton's own way;
                pointers may come in nested tuples.

        Raises:
            RuntimeError: a CUDA graph is being captured and this form has never run, as no code
                may be loaded then.
        """
        # Negative on a CPU, where kernels are interpreted.
        index = tensors[0].get_device()
        if index >= 0 and index != current_cuda_device():
            # Triton starts kernels on the current device, wherever the tensors are.
            with torch.cuda.device(index):
                self(grid, tensors, numbers, arguments)
            return
        addresses = [*map(_address, tensors)]
        aligned = functools.reduce(operator.or_, addresses) % ALIGNMENT_BYTES == 0
        if aligned and index in self.loaded:
            kernel, code = self.loaded[index]
            if code is None or not code.start(grid, addresses, numbers):
                kernel[grid](*arguments())
            return
        if aligned and index >= 0 and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a kernel of this layer has not run before, and its code cannot be loaded while a "
                "CUDA graph is captured; run the layer (forward and backward) once with inputs of "
                "the same shapes before the capture"
            )
        kernel = self.kernel[grid](*arguments(), **self.options)
        # The interpreter compiles nothing.
        if aligned and kernel is not None and not INTERPRETED.value:
            self.loaded[index] = kernel, code_of(kernel, len(tensors), len(numbers), index)


class Launcher:
    """One Triton kernel and its forms.

    Forms are never dropped, as a CUDA graph may hold their code.

    Args:
        kernel: what ``triton.jit`` made.
        asserts: whether the kernel asserts something, which is compiled into it then.
    """

    def __init__(self, kernel: Any, asserts: bool = False) -> None:
        self.kernel = kernel
        # What Triton calls debugging is its assertions alone, without those of integer overflow.
        self.assertions = {"debug": True, "sanitize_overflow": False} if asserts else {}
        self.forms: dict[Hashable, Form] = {}

    def form(self, key: Hashable, *, warps: int = 4, stages: int = 1) -> Form:
        """Return the form for a key.

        Args:
            key: all that decides the code, except the device: sizes, dtypes and ``warps``.
            warps: warps of a program.
            stages: depth of the pipelines of loops.
        """
        found = self.forms.get(key)
        if found is None:
            options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
            found = self.forms[key] = Form(self.kernel, {**options, **self.assertions})
        return found

    def __call__(
        self,
        key: Hashable,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor],
        numbers: tuple[int, ...],
        arguments: Callable[[], tuple[Any, ...]],
        *,
        warps: int = 4,
        stages: int = 1,
    ) -> None:
        """Start a form; ``form`` and ``Form.__call__`` say what is what."""
        self.form(key, warps=warps, stages=stages)(grid, tensors, numbers, arguments)
