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
from typing import Any, NamedTuple

from triton import knobs

from polyadic._torch import current_raw_stream

WARP_THREADS, POINTER_BYTES, NUMBER_BYTES = 32, 8, 4
# Two pointers that Triton puts behind the arguments of each kernel, for memory that ours never ask
# for; they are null.
MORE_POINTERS = 2
RUNTIME = knobs.runtime
# The fields of a ``CUlaunchConfig`` for ``struct``: programs and threads along three axes, bytes of
# shared memory, the stream, and where attributes are and how many.
CONFIG = "=7I4xQQI4x"
# Above this, Triton asks the driver for another division of the memory on a chip.
MOST_SHARED_BYTES = 228 * 1024


@functools.cache
def launch_function() -> Callable[..., int] | None:
    """Return ``cuLaunchKernelEx``, None where there is no driver that has it."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p] * 4
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


class _Memory(NamedTuple):
    """What the driver reads at one start: where it is to start the code, and the parameters.

    Attributes:
        written: both, one behind the other.
        config: the address of the first, which is a ``CUlaunchConfig``.
        parameters: the address of a list of the addresses of all parameters.
        listed: that list.
    """

    written: ctypes.Array[ctypes.c_char]
    config: int
    parameters: int
    listed: ctypes.Array[ctypes.c_void_p]


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
        self.program = threads, 1, 1, shared
        self.sizes = pointers, numbers
        self.write = struct.Struct(f"{CONFIG}{pointers}Q{numbers}i").pack_into
        # A start takes what is free, so that two threads never write into the same memory. The
        # driver copies everything before it returns.
        self.free: list[_Memory] = []

    def start(
        self, grid: tuple[int, int, int], addresses: Sequence[int], numbers: Sequence[int]
    ) -> bool:
        """Start the code on the current stream, and return whether the driver took it.

        Args:
            grid: number of programs along three axes.
            addresses: the kernel's pointers.
            numbers: its numbers, which stand behind them.
        """
        # A profiler of Triton's wants to see each start.
        hook = RUNTIME.launch_enter_hook
        if getattr(hook, "calls", hook):
            return False
        try:
            # Another thread may have taken the last one.
            memory = self.free.pop()
        except IndexError:
            memory = self._memory()
        stream = current_raw_stream(self.index)
        self.write(memory[0], 0, *grid, *self.program, stream, 0, 0, *addresses, *numbers)
        status = self.launch(memory[1], self.function, memory[2], None)
        self.free.append(memory)
        return status == 0

    def _memory(self) -> _Memory:
        """Return memory for one more start."""
        pointers, numbers = self.sizes
        start = struct.calcsize(CONFIG)
        behind = start + pointers * POINTER_BYTES
        at = [*range(start, behind, POINTER_BYTES)]
        at += [behind + n * NUMBER_BYTES for n in range(numbers)]
        behind += numbers * NUMBER_BYTES
        behind += -behind % POINTER_BYTES
        at += [behind + n * POINTER_BYTES for n in range(MORE_POINTERS)]
        written = ctypes.create_string_buffer(behind + MORE_POINTERS * POINTER_BYTES)
        first = ctypes.addressof(written)
        listed = (ctypes.c_void_p * len(at))(*[first + offset for offset in at])
        return _Memory(written, first, ctypes.addressof(listed), listed)


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
