"""The rates of a machine, and how they turn the steps of a plan into predicted seconds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from polyadic.kernels.cpu import in_onednn
from polyadic.planner.steps import Step


@dataclass(frozen=True)
class Machine:
    """The rates of one device with one dtype and one number of threads.

    A processor does one step after the other. A GPU works through a queue while the processor
    still fills it, so that a plan takes the longer of the two times. A CUDA graph is launched as a
    whole: in it only the GPU's own time is left.

    Args:
        gemm: FLOP/s of a large matrix product.
        gemm_bandwidth: bytes/s at which a product reads its operands and writes its result.
        memory_bandwidth: bytes/s of elementwise steps on tensors larger than the cache.
        cache_bandwidth: bytes/s of elementwise steps on tensors that fit into the cache.
        cache: size of the cache in bytes.
        launch: seconds that the processor needs to launch an operation.
        view: seconds that the processor needs for an operation that only makes a view.
        fused_launch: seconds that the processor needs to launch one of our own kernels.
        kernel: seconds that a GPU needs for a kernel besides its work.
        row: seconds per outer iteration of an elementwise step.
        depthwise: FLOP/s of a depthwise convolution in channels_last; the time to read and write
            its maps is added.
        depthwise_first: FLOP/s of a depthwise convolution in channels_first.
        conv: FLOP/s of a dense convolution in channels_last.
        conv_first: FLOP/s of a dense convolution in channels_first.
        conv_call: seconds that the processor needs to launch a convolution.
        call: seconds that the processor needs for a pass through a CP layer, besides operations.
        dense_call: seconds that the processor needs for a pass through a torch layer.
        backward_call: seconds of the processor by which a backward of a CP layer exceeds ``call``.
        dense_backward_call: seconds of the processor by which a backward of a torch layer exceeds
            ``dense_call``.
        queued: whether the device works while the processor launches.
        source: ``"built-in"`` or ``"calibrated"``.

    Raises:
        TypeError: a field is of another type.
        ValueError: a rate is not above 0, a time is below 0, or one of them is not finite.
    """

    gemm: float = 150e9
    gemm_bandwidth: float = 18e9
    memory_bandwidth: float = 50e9
    cache_bandwidth: float = 50e9
    cache: float = 1.5e6
    launch: float = 2.6e-6
    view: float = 2.6e-6
    fused_launch: float = 2.6e-6
    kernel: float = 0.0
    row: float = 60e-9
    depthwise: float = 120e9
    depthwise_first: float = 120e9
    conv: float = 150e9
    conv_first: float = 150e9
    conv_call: float = 30e-6
    call: float = 40e-6
    dense_call: float = 15e-6
    backward_call: float = 0.0
    dense_backward_call: float = 0.0
    queued: bool = False
    source: str = "built-in"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wanted: Any = {"float": (int, float), "bool": bool, "str": str}[str(field.type)]
            if not isinstance(value, wanted) or (type(value) is bool) != (wanted is bool):
                raise TypeError(f"{field.name} must be a {field.type}, got {value!r}")
            if field.type == "float" and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} must be a number of at least 0, got {value!r}")
            if field.name in RATES and value == 0:
                raise ValueError(f"{field.name} must be above 0, got {value!r}")

    def host(self, step: Step) -> float:
        """Predict the seconds that the processor needs to launch a step."""
        each = self.fused_launch if step.kind == "fused" else self.launch
        if step.kind in ("conv", "depthwise"):
            each = self.conv_call
        calls = step.launches if self.queued else step.launches + step.sums
        return calls * each + step.views * self.view

    def work(self, step: Step) -> float:
        """Predict the seconds that the device needs for a step once it is launched."""
        flops = step.padded_flops or step.flops
        streamed, fixed = self.streamed(step.nbytes), step.launches * self.kernel
        if step.kind == "depthwise":
            rate = self.depthwise if step.channels_last else self.depthwise_first
            return fixed + flops / rate + streamed
        if step.kind == "conv":
            rate = self.conv if step.channels_last else self.conv_first
            return fixed + max(flops / rate, streamed)
        if step.kind == "gemm":
            made, read = flops / self.gemm, step.nbytes / self.gemm_bandwidth
            # A CPU packs the operands before it multiplies; a GPU reads while it multiplies.
            return fixed + (max(made, read) * step.slowed if self.queued else made + read)
        if step.kind == "fused":
            return fixed + max(flops / self.gemm, streamed)
        if step.kind == "fft":
            return fixed + flops / (FFT_SHARE_OF_GEMM * self.gemm) + streamed
        return fixed + step.rows * self.row + streamed

    def seconds(self, step: Step) -> float:
        """Predict the seconds that one step takes by itself."""
        return self.total([step])

    def streamed(self, nbytes: float) -> float:
        """Predict the seconds to read and write so many bytes."""
        return nbytes / (self.cache_bandwidth if nbytes <= self.cache else self.memory_bandwidth)

    def spent(self, steps: Iterable[Step]) -> tuple[float, float]:
        """Predict the seconds of the processor, and those of the device, for steps in a row."""
        listed = list(steps)
        return sum(map(self.host, listed)), sum(map(self.work, listed))

    def time(self, host: float, work: float) -> float:
        """Predict the seconds that pass in all from those of the processor and of the device."""
        return max(host, work) if self.queued else host + work

    def total(self, steps: Iterable[Step], calls: float = 0.0) -> float:
        """Predict the seconds of steps; ``calls`` is what calls of layers add on the processor."""
        host, work = self.spent(steps)
        return self.time(host + calls, work)

    def in_graph(self) -> Machine:
        """Return the machine as a CUDA graph sees it: launches and calls cost nothing."""
        nothing: dict[str, Any] = dict.fromkeys(OF_THE_PROCESSOR, 0.0)
        return dataclasses.replace(self, **nothing)


RATES = (
    "gemm", "gemm_bandwidth", "memory_bandwidth", "cache_bandwidth", "cache", "depthwise",
    "depthwise_first", "conv", "conv_first",
)  # fmt: skip

# What a processor spends to keep a GPU busy.
OF_THE_PROCESSOR = (
    "launch", "view", "fused_launch", "conv_call", "call", "dense_call", "backward_call",
    "dense_backward_call",
)  # fmt: skip

# FLOP/s of a fast transform, in parts of those of a large matrix product: 18 to 24 GFLOP/s for
# lengths of 32 to 128 in float32 on an AMD EPYC with AVX-512, one thread, November 2026.
FFT_SHARE_OF_GEMM = 0.14
CPU_THREAD = Machine()
# Rates of an NVIDIA H200 in bfloat16 with torch 2.11 and CUDA 13.0, measured on 2026-11-26 by
# benchmarks/gpu: large product 0.78 PFLOP/s, copy 4.27 TB/s, copy within the 60 MB of L2 4.9 TB/s,
# thin products up to 3.2 TB/s, a kernel in a graph 1.1 µs (elementwise) to 2.3 µs (product). The
# processor's share is that of a virtual machine's core: 6 to 13 µs an operation, 2 µs a view, a
# kernel of ours with its outputs 25 µs; on autograd's own thread operations take two to three times
# as long, so that the backward of a dense layer takes 0.12 ms beside its operations and that of a
# CP layer 0.87 ms. Depthwise and dense convolutions are estimates.
# ``polyadic.calibrate(device="cuda")`` measures the machine at hand.
GPU = Machine(
    gemm=780e12,
    gemm_bandwidth=3.0e12,
    memory_bandwidth=4.2e12,
    cache_bandwidth=4.9e12,
    cache=45e6,
    launch=10e-6,
    view=2e-6,
    fused_launch=25e-6,
    kernel=1.7e-6,
    row=0.0,
    depthwise=5e12,
    depthwise_first=5e12,
    conv=500e12,
    conv_first=350e12,
    conv_call=15e-6,
    call=70e-6,
    dense_call=12e-6,
    backward_call=800e-6,
    dense_backward_call=110e-6,
    queued=True,
)
# FLOP/s of that GPU for products and dense convolutions in other dtypes, by whether TF32 is on.
GPU_RATES: dict[tuple[torch.dtype, bool], dict[str, Any]] = {
    (torch.float32, False): {"gemm": 51e12, "conv": 40e12, "conv_first": 40e12},
    (torch.float32, True): {"gemm": 350e12, "conv": 250e12, "conv_first": 175e12},
    (torch.float64, False): {"gemm": 61e12, "conv": 25e12, "conv_first": 25e12},
}
# Rates that grow with the number of threads. Bandwidths do not: cores read what others wrote.
_COMPUTE = ("gemm", "depthwise", "depthwise_first", "conv", "conv_first")


@functools.lru_cache(maxsize=64)
def built_in(device_type: str, dtype: torch.dtype, threads: int, tf32: bool = False) -> Machine:
    """Return the built-in rates; those of a CPU are one thread's, times the number of threads."""
    if device_type != "cpu":
        return dataclasses.replace(GPU, **GPU_RATES.get((dtype, tf32), {}))
    width = {torch.float64: 0.5, torch.bfloat16: 2.0, torch.float16: 2.0}.get(dtype, 1.0)
    fields: dict[str, Any] = {
        name: getattr(CPU_THREAD, name) * threads * width for name in _COMPUTE
    }
    # A half-precision depthwise stage that oneDNN cannot do is computed in float32.
    staged = torch.float32 if dtype.itemsize == 2 else dtype
    if not in_onednn(staged):
        fields["depthwise"], fields["depthwise_first"] = 0.4e9 * threads, 2e9 * threads
    return dataclasses.replace(CPU_THREAD, **fields)
