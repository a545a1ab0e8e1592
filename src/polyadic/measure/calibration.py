"""``polyadic.calibrate``: measure this machine's rates in a few seconds, for the planner."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from polyadic import checks
from polyadic.formats import LinearFormat
from polyadic.functional import cp_linear
from polyadic.kernels.products import matmul_nn, matmul_nt
from polyadic.nn import CPLinear
from polyadic.planner import choice
from polyadic.planner.calibrated import store
from polyadic.planner.clocks import Clock, clock_of
from polyadic.planner.machine import Machine, built_in
from polyadic.planner.request import Request, request
from polyadic.plans import Groups, LinearPlan, LinearRoute

# A layer with so little work that its time is the time of its calls.
TINY = LinearFormat((2, 2, 2), (2, 2, 2), 2)
ROWS = 2


def calibrate(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure the rates on which the cost model rests, and store them for later sessions.

    This takes a few seconds. The numbers hold for this device type, dtype and thread count
    (``torch.get_num_threads()``), on a GPU for float32 with or without TF32 as torch's switch says,
    and are kept in the user's cache folder; plans made from now on rest on them. Where the folder
    cannot be written to, a warning says so and they hold for this process alone.

    On a CUDA device the work of operations is timed by events in replayed graphs, which contain no
    launches and no synchronisation. What the processor spends on launches is timed separately.

    Args:
        device: device type, such as ``"cpu"`` or ``"cuda"``.
        dtype: floating-point dtype to measure with. Complex numbers are computed at the rates of
            their parts: what is measured in float32 holds for complex64.

    Returns:
        The machine description.

    Raises:
        TypeError: ``dtype`` is not floating point, or ``device`` is no device.
        ValueError: the device is not there, or computes nothing.
    """
    if checks.check_dtype(dtype).is_complex:
        raise TypeError(
            f"dtype must be floating point, got {dtype}, whose rates are those of its parts; "
            f"measure in {dtype.to_real()}"
        )
    kind = checks.check_device(device)
    try:
        torch.empty(0, device=kind)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"device {kind!r} is not there: {error}") from error
    if kind == "meta":
        raise ValueError("device 'meta' computes nothing that could be measured; use 'cpu'")
    asked = request(TINY, ROWS, dtype, kind)
    machine = measured(asked, kind, clock_of(kind))
    store(machine, asked.place)
    choice.forget()
    return machine


def measured(asked: Request, device: str, clock: Clock) -> Machine:
    """Measure the machine of a request with tensors on a device, by a clock."""
    base = built_in(*asked.place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.no_grad():
            rates = Rates(device, asked.dtype, clock, base.queued)
            machine = dataclasses.replace(
                base, **rates.calls(), **rates.gemm(), **rates.stream(), source="calibrated"
            )
            machine = dataclasses.replace(machine, **rates.convolutions(machine))
        return dataclasses.replace(machine, **calls_of_layers(asked, device, machine, clock))


class Rates:
    """The measurements; each method gives some fields of a ``Machine``."""

    def __init__(self, device: str, dtype: torch.dtype, clock: Clock, queued: bool) -> None:
        self.device, self.dtype, self.clock, self.queued = device, dtype, clock, queued
        # Tensors of a GPU are so large that it is busy for longer than a kernel takes to start.
        self.scale = 8 if queued else 1
        one = self._random(4)
        # It is measured in a loop of nothing else, as the others are. In a layer it takes longer.
        self.kernel = clock.work(lambda: one * one)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def _net(self, run: Callable[[], object], launches: int) -> float:
        """Time a call less the start of so many operations; it is at least a tenth of the whole."""
        whole = self.clock.work(run)
        return max(whole - launches * self.kernel, whole / 10)

    def calls(self) -> dict[str, Any]:
        """Measure what the processor and the device spend on an operation that does nothing."""
        if not self.queued:
            return {}
        one = self._random(4, 4)
        view = max(self.clock.host(lambda: one.t()), 1e-9)
        return {"launch": self.clock.host(lambda: one * one), "view": view, "kernel": self.kernel}

    def gemm(self) -> dict[str, Any]:
        """Measure a large product, and a thin one that mostly reads its operands."""
        n = 1024 * self.scale
        a, b = self._random(n, n), self._random(n, n)
        rate = 2 * n**3 / self._net(lambda: matmul_nn(a, b), 1)
        # Thin products of layers have few rows on a CPU and few columns on a GPU.
        m, k, r = (n, n // 2, 64) if self.queued else (4, n, 4 * n)
        thin, wide = self._random(m, k), self._random(r, k)
        moved = self.dtype.itemsize * (m * k + r * k + m * r)
        whole = self._net(lambda: matmul_nt(thin, wide), 1)
        made = 0.0 if self.queued else 2 * m * k * r / rate
        return {"gemm": rate, "gemm_bandwidth": moved / max(whole - made, whole / 10)}

    def stream(self) -> dict[str, Any]:
        """Measure the weighted sums of MTTKRPs, in and out of cache, and over short rows."""
        large = self._random(256 * self.scale, 16, 256)
        # Operands take turns, because those of a layer are not in the nearest cache when it is
        # called.
        several = [self._random(64, 16, 64) for _ in range(16)]
        turns = itertools.cycle(several)
        short = self._random(2048, 4, 16)
        weights, narrow, thin = (self._random(16, n) for n in (256, 64, 16))
        item, sums = self.dtype.itemsize, 2 if self.queued else 3
        in_cache = self._net(lambda: (next(turns) * narrow).sum(1), sums)
        cache_bandwidth = 4 * item * several[0].numel() / in_cache
        whole = self._net(lambda: (large * weights).sum(1), sums)
        found = {
            "memory_bandwidth": 4 * item * large.numel() / whole,
            "cache_bandwidth": cache_bandwidth,
        }
        if not self.queued:
            rows = self._net(lambda: (short * thin[:4]).sum(1), sums)
            beside = 4 * item * short.numel() / cache_bandwidth
            found["row"] = max(rows - beside, 0.1e-9) / 2048
        return found

    def convolutions(self, machine: Machine) -> dict[str, Any]:
        """Measure depthwise 5×5 and dense 3×3 convolutions, of few and many images, by layout."""
        channels, side, few, many = 64, 28, 4 * self.scale, 16 * self.scale
        taps, kernel = self._random(channels, 1, 5, 5), self._random(channels, channels, 3, 3)
        images = self._random(many, channels, side, side)
        depthwise, dense = (2 * t * images[0].numel() for t in (25, 9 * channels))

        def convolve(number: int, weight: Tensor, layout: torch.memory_format) -> Callable[[], Any]:
            x = images[:number].contiguous(memory_format=layout)
            pad, groups = weight.shape[2] // 2, channels // weight.shape[1]
            return lambda: torch.conv2d(x, weight, None, 1, pad, 1, groups)

        def rate(
            weight: Tensor, layout: torch.memory_format, flops: int, passes: int
        ) -> tuple[float, float]:
            """Return FLOP/s, less the time of passes over the maps, and the seconds of a call."""
            short, long = (self.clock.work(convolve(n, weight, layout)) for n in (few, many))
            image = max((long - short) / (many - few), long / many / 2)
            beside = machine.streamed(passes * images.nbytes) / many
            return flops / max(image - beside, image / 10), max(short - few * image, short / 10)

        last, first = torch.channels_last, torch.contiguous_format
        # The planner counts the bytes of as many passes; a write on a CPU counts three times.
        fast, call = rate(taps, last, depthwise, 2 if self.queued else 4)
        if self.queued:
            call = self.clock.host(convolve(few, taps, last))
        return {
            "conv_call": call,
            "depthwise": fast,
            "depthwise_first": rate(taps, first, depthwise, 2 if self.queued else 8)[0],
            "conv": rate(kernel, last, dense, 0)[0],
            "conv_first": rate(kernel, first, dense, 0)[0],
        }


def calls_of_layers(asked: Request, device: str, machine: Machine, clock: Clock) -> dict[str, Any]:
    """Measure what an operation costs within a layer, and what a pass costs besides operations.

    A layer of next to no work is timed by plans of few and of many operations. On a GPU only the
    processor is timed, and an operation costs what it costs by itself.
    """
    options: dict[str, Any] = {"device": device, "dtype": asked.dtype}
    cp = CPLinear(TINY.in_features, TINY.out_features, bias=False, rank=TINY.rank, **options)
    dense = nn.Linear(TINY.in_features, TINY.out_features, bias=False, **options)
    x = torch.zeros(ROWS, TINY.in_features, requires_grad=True, **options)
    grad = torch.ones(ROWS, TINY.out_features, **options)

    def seconds(layer: nn.Module, call: Callable[[], Tensor]) -> float:
        wanted = [x, *layer.parameters()]
        return clock.host(lambda: torch.autograd.grad(call(), wanted, grad))

    def by_plan(groups: Groups) -> tuple[float, list[Any]]:
        route = LinearRoute(groups, groups)
        plan = LinearPlan(route, route)
        time = seconds(cp, lambda: cp_linear(x, cp.in_factors, cp.out_factors, plan=plan))
        return time, list(itertools.chain(*choice.steps(asked, plan)))

    few, few_steps = by_plan((3,))
    found = {}
    if not machine.queued:
        many, many_steps = by_plan((1, 1, 1))
        n_few, n_many = (
            sum(s.launches + s.views + s.sums for s in steps) for steps in (few_steps, many_steps)
        )
        launch = max((many - few) / (n_many - n_few), machine.launch / 10)
        found = {"launch": launch, "view": launch, "fused_launch": launch}
        machine = dataclasses.replace(machine, **found)
    theirs = seconds(dense, lambda: dense(x))
    launched = sum(map(machine.host, few_steps))
    return {
        **found,
        "call": max((few - launched) / 2, few / 10),
        "dense_call": max((theirs - 3 * machine.launch) / 2, theirs / 10),
        # Both calls above are means of a forward and a backward.
        "backward_call": 0.0,
        "dense_backward_call": 0.0,
    }
