"""``polyadic.calibrate``: measure this machine's rates in a few seconds, for the planner."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from polyadic import _planner, _planner_conv
from polyadic._cost import MAPPED, Machine, built_in
from polyadic._format import LinearFormat
from polyadic._machines import store, threads_of
from polyadic._steps import SUMMED, plan_steps
from polyadic.kernels.products import linear, times
from polyadic.nn import CPLinear


def calibrate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure the rates the cost model rests on, and store them for later sessions.

    Takes a few seconds. The numbers hold for this device type, dtype and thread count
    (``torch.get_num_threads()``) and are kept in the user's cache folder; plans made from now on
    rest on them.

    Args:
        device: device type, such as ``"cpu"`` or ``"cuda"``.
        dtype: floating-point dtype to measure with.

    Returns:
        The machine description.

    Raises:
        TypeError: ``dtype`` is not floating point.
        RuntimeError: the device is not there.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    kind = torch.device(device).type
    threads = threads_of(kind)
    base = built_in(kind, dtype, threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.no_grad():
            rates = _Rates(kind, dtype)
            machine = dataclasses.replace(
                base, **rates.gemm(), **rates.stream(), source="calibrated"
            )
            machine = dataclasses.replace(machine, **rates.convolutions(machine))
        machine = dataclasses.replace(machine, **_calls(kind, dtype, machine))
    store(machine, kind, dtype, threads)
    _planner.forget()
    _planner_conv.forget()
    return machine


def _seconds(run: Callable[[], object], kind: str, budget: float = 0.12) -> float:
    """Median time of one call, after a warm-up; at least five calls."""
    run()
    run()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget and len(times) < 400):
        if kind == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


class _Rates:
    """The measurements; each method gives some fields of a ``Machine``."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype
        one = self._random(4)
        self.launch = _seconds(lambda: one * one, kind, 0.02)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.kind).to(self.dtype)

    def _net(self, run: Callable[[], object], launches: int) -> float:
        """Time without launches, at least a tenth of the whole."""
        whole = _seconds(run, self.kind)
        return max(whole - launches * self.launch, whole / 10)

    def gemm(self) -> dict[str, Any]:
        """A large product, and thin ones that are bound by reading their right operand."""
        n = 1024
        a, b = self._random(n, n), self._random(n, n)
        thin = self._random(4, n)
        wide, tall = self._random(n, 4 * n), self._random(4 * n, n)
        item = self.dtype.itemsize
        moved = item * (4 * n + 4 * n * n + 16 * n)
        return {
            "gemm": 2 * n**3 / self._net(lambda: times(a, b), 1),
            "gemm_bandwidth": moved / self._net(lambda: times(thin, wide), 1),
            "gemm_bandwidth_transposed": moved / self._net(lambda: linear(thin, tall), 1),
        }

    def stream(self) -> dict[str, Any]:
        """Weighted sums, as MTTKRPs are made of, in and out of cache and over short rows.

        Also a product of a tensor that gets new memory each time, and into memory that is there.
        """
        large, small = self._random(1024, 16, 256), self._random(64, 16, 64)
        short = self._random(2048, 4, 16)
        weights, narrow, thin = (self._random(16, n) for n in (256, 64, 16))
        item = self.dtype.itemsize
        huge = self._random(MAPPED // item)
        out = torch.empty_like(huge)
        renewed = self._net(lambda: huge * huge, 1)
        renewed -= self._net(lambda: torch.mul(huge, huge, out=out), 1)
        in_cache = self._net(lambda: (small * narrow).sum(1), SUMMED)
        cache_bandwidth = 4 * item * small.numel() / in_cache
        rows = self._net(lambda: (short * thin[:4]).sum(1), SUMMED)
        return {
            "launch": self.launch,
            "memory_bandwidth": 4
            * item
            * large.numel()
            / self._net(lambda: (large * weights).sum(1), SUMMED),
            "new_bandwidth": MAPPED / max(renewed, 1e-6),
            "cache_bandwidth": cache_bandwidth,
            "row": max(rows - 4 * item * short.numel() / cache_bandwidth, 0.1e-9) / 2048,
        }

    def convolutions(self, machine: Machine) -> dict[str, Any]:
        """Depthwise 5×5 and dense 3×3 convolutions in both layouts, and one of next to no work."""
        channels, batch, side = 64, 4, 28
        first = self._random(batch, channels, side, side)
        last = first.contiguous(memory_format=torch.channels_last)
        taps, kernel = self._random(channels, 1, 5, 5), self._random(channels, channels, 3, 3)
        depthwise, dense = 2 * 25 * first.numel(), 2 * 9 * channels * first.numel()

        def seconds(x: Tensor, weight: Tensor, groups: int) -> float:
            pad = weight.shape[2] // 2
            return _seconds(lambda: torch.conv2d(x, weight, None, 1, pad, 1, groups), self.kind)

        call = seconds(first[:1, :, :1, :1].contiguous(), taps, channels)

        def rate(x: Tensor, weight: Tensor, flops: int, passes: int) -> float:
            whole = seconds(x, weight, channels // weight.shape[1])
            beside = call + machine.streamed(passes * 2 * x.nbytes)
            return flops / max(whole - beside, whole / 10)

        return {
            "conv_call": call,
            "depthwise": rate(last, taps, depthwise, 1),
            "depthwise_first": rate(first, taps, depthwise, 3),
            "conv": rate(last, kernel, dense, 0),
            "conv_first": rate(first, kernel, dense, 0),
        }


def _calls(kind: str, dtype: torch.dtype, machine: Machine) -> dict[str, Any]:
    """What a layer's call costs per pass beside its operations, from a layer of next to no work."""
    fmt = LinearFormat((2, 2), (2, 2), 2)
    cp = CPLinear(4, 4, rank=2, order=2, device=kind, dtype=dtype)
    dense = nn.Linear(4, 4, device=kind, dtype=dtype)
    x = torch.zeros(1, 4, device=kind, dtype=dtype, requires_grad=True)
    plan = _planner.choose_linear(fmt, 1, dtype, kind, "balanced")
    forward, backward = plan_steps(fmt, 1, plan, dtype.itemsize, training=True)

    def step(layer: nn.Module) -> Callable[[], object]:
        wanted = [x, *layer.parameters()]
        grad = torch.ones(1, 4, device=kind, dtype=dtype)
        return lambda: torch.autograd.grad(layer(x), wanted, grad)

    work = machine.total([*forward, *backward])
    ours, theirs = _seconds(step(cp), kind), _seconds(step(dense), kind)
    return {
        "call": max((ours - work) / 2, ours / 10),
        "dense_call": max((theirs - 3 * machine.launch) / 2, theirs / 10),
    }
