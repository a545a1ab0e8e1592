"""What a step of a plan costs: FLOPs, bytes, launches, and the seconds a machine needs for them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from polyadic.kernels.onednn import in_onednn

StepKind = Literal["gemm", "stream", "depthwise", "conv", "layout"]


# Bytes from which glibc's allocator never keeps memory that was freed (DEFAULT_MMAP_THRESHOLD_MAX).
MAPPED = 2**25


@dataclass(frozen=True)
class Step:
    """One operation (or a few that belong together) of a plan.

    Args:
        name: what it computes, in the axes of the kernels.
        kind: which rate of the machine it runs at.
        flops: multiply-adds counted twice; only of GEMMs and convolutions, as torch counts them.
        nbytes: least bytes read and written.
        launches: torch operations dispatched that touch memory or make a view; of a convolution,
            calls of torch's.
        rows: outer iterations of an elementwise step whose inner loop is short.
        elements: elements of the largest tensor written.
        padded_flops: FLOPs at the width the vector units work in, or of a convolution those that
            take as long at the forward's rate; ``flops`` by default.
        channels_last: of a convolution, the layout.
        pieces: in how many pieces it is done, one after the other.
        new: bytes of the largest tensor it makes, of all pieces.
    """

    name: str
    kind: StepKind
    flops: int = 0
    nbytes: int = 0
    launches: int = 1
    rows: int = 0
    elements: int = 0
    padded_flops: int = 0
    channels_last: bool = True
    pieces: int = 1
    new: int = 0


@dataclass(frozen=True)
class Machine:
    """Rates of one device with one dtype and thread count; seconds, bytes and FLOPs.

    Args:
        gemm: FLOP/s of a large matrix product.
        gemm_bandwidth: bytes/s at which a product reads and packs its operands beforehand.
        memory_bandwidth: bytes/s of elementwise steps on tensors larger than the cache.
        cache_bandwidth: the same where they fit.
        cache: bytes of the cache meant.
        new_bandwidth: bytes/s at which a tensor larger than ``MAPPED`` gets its memory, which the
            system hands out anew each time, page by page.
        launch: seconds per operation.
        row: seconds per outer iteration of an elementwise step.
        depthwise: FLOP/s of a depthwise convolution in channels_last, beside the time to read and
            write its maps.
        depthwise_first: the same in channels_first.
        conv: FLOP/s of a dense convolution in channels_last.
        conv_first: the same in channels_first.
        conv_call: seconds a convolution takes beside its work.
        call: seconds a CP layer's call costs beside its operations, per pass.
        dense_call: the same of a torch layer.
        source: ``"built-in"`` or ``"calibrated"``.
    """

    gemm: float = 150e9
    gemm_bandwidth: float = 18e9
    memory_bandwidth: float = 50e9
    cache_bandwidth: float = 50e9
    cache: float = 1.5e6
    new_bandwidth: float = 2.5e9
    launch: float = 2.6e-6
    row: float = 60e-9
    depthwise: float = 120e9
    depthwise_first: float = 120e9
    conv: float = 150e9
    conv_first: float = 150e9
    conv_call: float = 30e-6
    call: float = 40e-6
    dense_call: float = 15e-6
    source: str = "built-in"

    def seconds(self, step: Step) -> float:
        """Predicted time of one step."""
        flops = step.padded_flops or step.flops
        streamed = step.pieces * self.streamed(step.nbytes / step.pieces)
        if step.kind == "depthwise":
            rate = self.depthwise if step.channels_last else self.depthwise_first
            return step.launches * self.conv_call + flops / rate + streamed
        if step.kind == "conv":
            rate = self.conv if step.channels_last else self.conv_first
            return step.launches * self.conv_call + max(flops / rate, streamed)
        time = step.launches * self.launch + step.rows * self.row
        if step.new >= MAPPED * step.pieces:
            time += step.new / self.new_bandwidth
        if step.kind == "gemm":
            return time + flops / self.gemm + step.nbytes / self.gemm_bandwidth
        return time + streamed

    def streamed(self, nbytes: float) -> float:
        """Seconds to read and write so many bytes in passing."""
        return nbytes / (self.cache_bandwidth if nbytes <= self.cache else self.memory_bandwidth)

    def total(self, steps: Iterable[Step]) -> float:
        """Predicted time of steps one after the other."""
        return sum(map(self.seconds, steps))


CPU_THREAD = Machine()
# An accelerator's rates are orders of magnitude, enough to weigh launches against work; measured
# ones come from ``polyadic.calibrate(device="cuda")``.
ACCELERATOR = Machine(
    new_bandwidth=1e15,
    gemm=40e12,
    gemm_bandwidth=1.5e12,
    memory_bandwidth=1.5e12,
    cache_bandwidth=3e12,
    cache=40e6,
    launch=6e-6,
    row=0.0,
    depthwise=2e12,
    depthwise_first=2e12,
    conv=30e12,
    conv_first=30e12,
    conv_call=12e-6,
)
# Rates that grow with threads. Bandwidths do not: what one core made the others read from it.
_COMPUTE = ("gemm", "depthwise", "depthwise_first", "conv", "conv_first")


@functools.lru_cache(maxsize=64)
def built_in(device_type: str, dtype: torch.dtype, threads: int) -> Machine:
    """Built-in numbers for a device type and dtype: one thread's, scaled where it is a CPU."""
    base = CPU_THREAD if device_type == "cpu" else ACCELERATOR
    width = {torch.float64: 0.5, torch.bfloat16: 2.0, torch.float16: 2.0}.get(dtype, 1.0)
    cores = threads if device_type == "cpu" else 1
    scaled = {name: getattr(base, name) * cores * width for name in _COMPUTE}
    # A half-precision depthwise stage that oneDNN cannot do is computed in float32.
    staged = torch.float32 if dtype.itemsize == 2 else dtype
    if device_type == "cpu" and not in_onednn(staged):
        scaled["depthwise"], scaled["depthwise_first"] = 0.4e9 * threads, 2e9 * threads
    fields = {**base.__dict__, **scaled}
    return Machine(**fields)
