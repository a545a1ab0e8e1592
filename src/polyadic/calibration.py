"""``polyadic.calibrate``: measure this machine's rates in a few seconds, for the planner."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from polyadic.formats import LinearFormat
from polyadic.functional import cp_linear
from polyadic.kernels.products import linear, times
from polyadic.nn import CPLinear
from polyadic.planner import conv as conv_planner
from polyadic.planner import linear as linear_planner
from polyadic.planner.calibrated import computed_dtype, device_type, settle, store, threads_of
from polyadic.planner.machine import MAPPED, Machine, built_in
from polyadic.planner.steps import SUMMED, plan_steps
from polyadic.plans import Groups, LinearPlan, LinearRoute


def calibrate(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure the rates the cost model rests on, and store them for later sessions.

    Takes a few seconds. The numbers hold for this device type, dtype and thread count
    (``torch.get_num_threads()``) and are kept in the user's cache folder; plans made from now on
    rest on them. Where the folder cannot be written to, a warning says so and they hold for this
    process alone.

    Args:
        device: device type, such as ``"cpu"`` or ``"cuda"``.
        dtype: floating-point dtype to measure with.

    Returns:
        The machine description.

    Raises:
        TypeError: ``dtype`` is not floating point, or ``device`` is no device.
        ValueError: the device is not there, or computes nothing.
    """
    computed_dtype(dtype)
    kind = device_type(device)
    try:
        torch.empty(0, device=kind)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"device {kind!r} is not there: {error}") from error
    if kind == "meta":
        raise ValueError("device 'meta' computes nothing that could be measured; use 'cpu'")
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
    linear_planner.forget()
    conv_planner.forget()
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
        settle()
        one = self._random(4)
        # In a loop of nothing else, as the others are measured: less than in a layer.
        self.launch = _seconds(lambda: one * one, kind, 0.02)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.kind).to(self.dtype)

    def _net(self, run: Callable[[], object], launches: int) -> float:
        """Time without launches, at least a tenth of the whole."""
        whole = _seconds(run, self.kind)
        return max(whole - launches * self.launch, whole / 10)

    def gemm(self) -> dict[str, Any]:
        """A large product, and a thin one that mostly reads its right operand."""
        n = 1024
        a, b = self._random(n, n), self._random(n, n)
        thin, wide = self._random(4, n), self._random(4 * n, n)
        rate = 2 * n**3 / self._net(lambda: times(a, b), 1)
        moved = self.dtype.itemsize * (4 * n + 4 * n * n + 16 * n)
        whole = self._net(lambda: linear(thin, wide), 1)
        return {
            "gemm": rate,
            "gemm_bandwidth": moved / max(whole - 2 * 16 * n * n / rate, whole / 10),
        }

    def stream(self) -> dict[str, Any]:
        """Weighted sums, as MTTKRPs are made of, in and out of cache and over short rows.

        Also a product of a tensor that gets new memory each time, and into memory that is there.
        """
        large = self._random(256, 16, 256)
        # In turns, as a layer's operands are not in the nearest cache when their time comes.
        several = [self._random(64, 16, 64) for _ in range(16)]
        turns = itertools.cycle(several)
        short = self._random(2048, 4, 16)
        weights, narrow, thin = (self._random(16, n) for n in (256, 64, 16))
        item = self.dtype.itemsize
        huge = self._random(MAPPED // item)
        out = torch.empty_like(huge)
        renewed = self._net(lambda: huge * huge, 1)
        renewed -= self._net(lambda: torch.mul(huge, huge, out=out), 1)
        in_cache = self._net(lambda: (next(turns) * narrow).sum(1), SUMMED)
        cache_bandwidth = 4 * item * several[0].numel() / in_cache
        rows = self._net(lambda: (short * thin[:4]).sum(1), SUMMED)
        return {
            "memory_bandwidth": 4
            * item
            * large.numel()
            / self._net(lambda: (large * weights).sum(1), SUMMED),
            "new_bandwidth": MAPPED / max(renewed, 1e-6),
            "cache_bandwidth": cache_bandwidth,
            "row": max(rows - 4 * item * short.numel() / cache_bandwidth, 0.1e-9) / 2048,
        }

    def convolutions(self, machine: Machine) -> dict[str, Any]:
        """Depthwise 5×5 and dense 3×3 convolutions in both layouts, of few and of many images."""
        channels, side, few, many = 64, 28, 4, 16
        taps, kernel = self._random(channels, 1, 5, 5), self._random(channels, channels, 3, 3)
        images = self._random(many, channels, side, side)
        depthwise, dense = (2 * t * images[0].numel() for t in (25, 9 * channels))

        def seconds(number: int, weight: Tensor, layout: torch.memory_format) -> float:
            x = images[:number].contiguous(memory_format=layout)
            pad, groups = weight.shape[2] // 2, channels // weight.shape[1]
            return _seconds(lambda: torch.conv2d(x, weight, None, 1, pad, 1, groups), self.kind)

        def rate(
            weight: Tensor, layout: torch.memory_format, flops: int, passes: int
        ) -> tuple[float, float]:
            """FLOP/s beside so many passes over the maps, and seconds of a call."""
            short, long = (seconds(number, weight, layout) for number in (few, many))
            image = max((long - short) / (many - few), long / many / 2)
            beside = machine.streamed(passes * images.nbytes) / many
            return flops / max(image - beside, image / 10), max(short - few * image, short / 10)

        last, first = torch.channels_last, torch.contiguous_format
        # As many passes as ``_steps_conv`` counts bytes of: one read, a write that counts thrice.
        fast, call = rate(taps, last, depthwise, 4)
        return {
            "conv_call": call,
            "depthwise": fast,
            "depthwise_first": rate(taps, first, depthwise, 8)[0],
            "conv": rate(kernel, last, dense, 0)[0],
            "conv_first": rate(kernel, first, dense, 0)[0],
        }


def _calls(kind: str, dtype: torch.dtype, machine: Machine) -> dict[str, Any]:
    """What an operation costs within a layer, and a layer's call beside them, per pass.

    From a layer of next to no work, by plans of few and of many operations.
    """
    fmt, rows = LinearFormat((2, 2, 2), (2, 2, 2), 2), 2
    cp = CPLinear(8, 8, bias=False, rank=2, order=3, device=kind, dtype=dtype)
    dense = nn.Linear(8, 8, bias=False, device=kind, dtype=dtype)
    x = torch.zeros(rows, 8, device=kind, dtype=dtype, requires_grad=True)
    grad = torch.ones(rows, 8, device=kind, dtype=dtype)

    def seconds(layer: nn.Module, call: Callable[[], Tensor]) -> float:
        wanted = [x, *layer.parameters()]
        return _seconds(lambda: torch.autograd.grad(call(), wanted, grad), kind)

    def by_plan(groups: Groups) -> tuple[float, int]:
        route = LinearRoute(groups, groups)
        plan = LinearPlan(route, route)
        steps = itertools.chain(*plan_steps(fmt, rows, plan, dtype.itemsize, training=True))
        time = seconds(cp, lambda: cp_linear(x, cp.in_factors, cp.out_factors, plan=plan))
        return time, sum(step.launches for step in steps)

    (few, n_few), (many, n_many) = by_plan((3,)), by_plan((1, 1, 1))
    launch = max((many - few) / (n_many - n_few), machine.launch / 10)
    theirs = seconds(dense, lambda: dense(x))
    return {
        "launch": launch,
        "call": max((few - n_few * launch) / 2, few / 10),
        "dense_call": max((theirs - 3 * launch) / 2, theirs / 10),
    }
