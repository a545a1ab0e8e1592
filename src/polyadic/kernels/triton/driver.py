"""Starting compiled code by the function of CUDA's driver, without Triton's launcher in between.

Triton's launcher takes three times as long as an operation of torch (17 to 24 µs where that takes
7.5 µs, NVIDIA H200, Triton 3.6): it looks at each argument, asks the driver about each pointer, and
calls twice what profilers might have hooked into it. The arguments of our kernels are known to be
pointers of tensors and then 32-bit integers, so that they can be written into memory as the driver
reads them.

Whether that is what a compiled kernel takes is read from its assembly. Where it is not, where
something is hooked into Triton's launcher, and where the driver refuses to start the code, Triton's
launcher does it, or says why it cannot be done.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

from triton import knobs

from polyadic._torch import current_raw_stream

WARP_THREADS, POINTER_BYTES, NUMBER_BYTES = 32, 8, 4
# Two pointers that Triton puts behind the arguments of each kernel, for memory that ours never ask
# for; they are null.
MORE_POINTERS = 2
# Above this, Triton asks the driver for another division of the memory on a chip.
MOST_SHARED_BYTES = 228 * 1024


@functools.cache
def launch_function() -> Callable[..., int] | None:
    """Return ``cuLaunchKernel``, None where there is no driver of that name."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    function.restype = ctypes.c_int
    launch: Callable[..., int] = function
    return launch


def parameter_bits(assembly: str) -> tuple[int, ...]:
    """Return the width of each parameter of the kernel in an assembly (PTX)."""
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", assembly)
    return tuple(map(int, re.findall(r"\.param\s+\.[usb](\d+)", entry[1]))) if entry else ()


def expected_bits(pointers: int, numbers: int) -> tuple[int, ...]:
    """Return the width of each parameter of a kernel of so many pointers and 32-bit integers."""
    return (*(64,) * pointers, *(32,) * numbers, *(64,) * MORE_POINTERS)


class _Parameters:
    """Memory for the parameters of one start, and where each of them stands."""

    def __init__(self, pointers: int, numbers: int) -> None:
        behind = pointers * POINTER_BYTES + numbers * NUMBER_BYTES
        behind += -behind % POINTER_BYTES
        at = [n * POINTER_BYTES for n in range(pointers)]
        at += [pointers * POINTER_BYTES + n * NUMBER_BYTES for n in range(numbers)]
        at += [behind + n * POINTER_BYTES for n in range(MORE_POINTERS)]
        self.memory = ctypes.create_string_buffer(behind + MORE_POINTERS * POINTER_BYTES)
        first = ctypes.addressof(self.memory)
        self.addresses = (ctypes.c_void_p * len(at))(*[first + offset for offset in at])


class Code:
    """Compiled code on one device, which the driver starts.

    Args:
        launch: the driver's function.
        function: the driver's handle of the code.
        threads: threads of a program.
        shared: bytes of shared memory of a program.
        pointers: how many pointers it takes.
        numbers: how many 32-bit integers it takes, behind them.
        index: number of the device.
    """

    def __init__(
        self,
        launch: Callable[..., int],
        function: int,
        threads: int,
        shared: int,
        pointers: int,
        numbers: int,
        index: int,
    ) -> None:
        self.launch, self.function, self.index = launch, function, index
        self.threads, self.shared = threads, shared
        self.sizes = pointers, numbers
        self.write = struct.Struct(f"={pointers}Q{numbers}i").pack_into
        # A start takes what is free, so that two threads never write into the same memory. The
        # driver copies the parameters before it returns.
        self.free: list[_Parameters] = []

    def start(self, grid: tuple[int, int, int], values: Sequence[int]) -> bool:
        """Start the code on the current stream, and return whether the driver took it.

        Args:
            grid: number of programs along three axes.
            values: addresses and numbers, in the order of the kernel's arguments.
        """
        # A profiler of Triton's wants to see each start.
        hook = knobs.runtime.launch_enter_hook
        if getattr(hook, "calls", hook):
            return False
        try:
            parameters = self.free.pop()
        except IndexError:
            parameters = _Parameters(*self.sizes)
        self.write(parameters.memory, 0, *values)
        status = self.launch(
            self.function,
            *grid,
            self.threads,
            1,
            1,
            self.shared,
            current_raw_stream(self.index),
            parameters.addresses,
            None,
        )
        self.free.append(parameters)
        return status == 0


def code_of(kernel: Any, pointers: int, numbers: int, index: int) -> Code | None:
    """Return a kernel that Triton has loaded as the driver starts it, None if it cannot.

    Args:
        kernel: Triton's ``CompiledKernel``.
        pointers: how many pointers it is to take, before all else.
        numbers: how many 32-bit integers it is to take, behind them.
        index: number of the device that it is loaded on.
    """
    launch = launch_function()
    if launch is None:
        return None
    metadata = kernel.metadata
    plain = (
        metadata.num_ctas == 1
        and not metadata.launch_cooperative_grid
        and not metadata.launch_pdl
        and metadata.global_scratch_size == metadata.profile_scratch_size == 0
        and metadata.shared <= MOST_SHARED_BYTES
        and parameter_bits(kernel.asm.get("ptx", "")) == expected_bits(pointers, numbers)
        and isinstance(kernel.function, int)
    )
    if not plain:
        return None
    threads = metadata.num_warps * WARP_THREADS
    return Code(launch, kernel.function, threads, metadata.shared, pointers, numbers, index)
