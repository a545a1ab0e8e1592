"""``polyadic.explain``: the plan of a layer step by step, its costs, and what was rejected."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyadic import _check, _planner, _planner_conv
from polyadic._cost import Machine, Step
from polyadic._format import ConvFormat, LinearFormat, Shape, mode_sizes, positive_int
from polyadic._machines import machine_for
from polyadic._plan import ConvPlan, LinearPlan, Memory
from polyadic._steps import dense_steps, plan_steps
from polyadic._steps_conv import conv_plan_steps, dense_conv_steps, kept_elements
from polyadic.kernels.stages import Geometry
from polyadic.nn import CPLinear
from polyadic.nn.conv import CPConvBase

Plan = LinearPlan | ConvPlan


@dataclass(frozen=True)
class Costed:
    """A plan with what it costs.

    Attributes:
        plan: the plan; None for the dense layer.
        forward: steps of the forward pass.
        backward: steps of the backward pass; empty for inference.
        kept_bytes: what stays for the backward beside parameters: the input and intermediates.
        seconds: predicted time, per-call overhead included.
    """

    plan: Plan | None
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    kept_bytes: int
    seconds: float

    @property
    def flops(self) -> int:
        """FLOPs of GEMMs and convolutions, as torch counts them."""
        return sum(step.flops for step in (*self.forward, *self.backward))

    @property
    def nbytes(self) -> int:
        """Least bytes read and written by the steps."""
        return sum(step.nbytes for step in (*self.forward, *self.backward))

    @property
    def largest(self) -> int:
        """Elements of the largest tensor a step writes."""
        return max(step.elements for step in (*self.forward, *self.backward))


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; ``str()`` of it is the report.

    Attributes:
        title: the format and the input in words.
        chosen: the plan that will run.
        dense: the dense layer beside it.
        rejected: other plans, cheapest first, each with the reason.
        break_even_rank: largest rank whose FLOPs do not exceed the dense layer's.
        rank: the layer's rank.
        machine: the rates the predictions rest on.
    """

    title: str
    chosen: Costed
    dense: Costed
    rejected: tuple[tuple[Costed, str], ...]
    break_even_rank: int
    rank: int
    machine: Machine

    @property
    def dense_is_faster(self) -> bool:
        """Whether the dense layer is predicted to be faster than the chosen plan."""
        return self.dense.seconds < self.chosen.seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""

        def costed(c: Costed) -> dict[str, Any]:
            return {
                "plan": "dense layer" if c.plan is None else str(c.plan),
                "seconds": c.seconds,
                "flops": c.flops,
                "bytes": c.nbytes,
                "kept_bytes": c.kept_bytes,
                "largest_elements": c.largest,
                "steps": [
                    {
                        "pass": name,
                        "step": step.name,
                        "flops": step.flops,
                        "bytes": step.nbytes,
                        "seconds": self.machine.seconds(step),
                    }
                    for name, steps in (("forward", c.forward), ("backward", c.backward))
                    for step in steps
                ],
            }

        return {
            "title": self.title,
            "rank": self.rank,
            "break_even_rank": self.break_even_rank,
            "dense_is_faster": self.dense_is_faster,
            "machine": self.machine.source,
            "chosen": costed(self.chosen),
            "dense": costed(self.dense),
            "rejected": [{**costed(c), "reason": reason} for c, reason in self.rejected],
        }

    def __str__(self) -> str:
        chosen, dense = self.chosen, self.dense
        lines = [self.title, f"plan     {chosen.plan}", ""]
        lines.append(f"{'step':<44}{'FLOPs':>10}{'bytes':>10}{'time':>10}")
        for name, steps in (("forward", chosen.forward), ("backward", chosen.backward)):
            if steps:
                lines.append(name)
            for step in steps:
                time = _seconds(self.machine.seconds(step))
                work = _count(step.flops) if step.flops else "-"
                lines.append(f"  {step.name:<42}{work:>10}{_count(step.nbytes):>10}{time:>10}")
        lines += ["", f"{'':<22}{'this plan':>12}{'dense layer':>14}"]
        for label, ours, theirs in (
            ("FLOPs", _count(chosen.flops), _count(dense.flops)),
            ("bytes moved", _count(chosen.nbytes), _count(dense.nbytes)),
            ("kept for backward, B", _count(chosen.kept_bytes), _count(dense.kept_bytes)),
            ("largest tensor", _count(chosen.largest), _count(dense.largest)),
            ("predicted time", _seconds(chosen.seconds), _seconds(dense.seconds)),
        ):
            lines.append(f"{label:<22}{ours:>12}{theirs:>14}")
        lines += ["", f"rank {self.rank}, break-even rank {self.break_even_rank} (in FLOPs)"]
        ratio = chosen.seconds / dense.seconds
        if self.dense_is_faster:
            lines.append(f"dense is faster here: the plan takes {ratio:.2f} times as long")
        else:
            lines.append(f"the plan is predicted {1 / ratio:.2f} times as fast as dense")
        lines += ["", f"rejected, by predicted time ({self.machine.source} machine numbers)"]
        for other, reason in self.rejected:
            lines.append(f"  {_seconds(other.seconds):>9}  {_route(other.plan)}: {reason}")
        return "\n".join(lines)


def _route(plan: Plan | None) -> str:
    return "" if plan is None else str(plan.forward)


def _count(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{value:.4g} {unit}".rstrip()
        value /= 1000
    raise AssertionError


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.3g} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def explain(
    layer: CPLinear | CPConvBase | LinearFormat | ConvFormat,
    *,
    batch: int,
    size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
    plan: Plan | None = None,
    memory: Memory | None = None,
    training: bool = True,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> Explanation:
    """Explain how a layer will be computed, what that costs, and what was weighed against it.

    Times are predictions of a cost model (FLOPs, bytes and launches over the machine's rates);
    ``polyadic.calibrate()`` measures the rates of the machine at hand.

    Args:
        layer: a CP layer, or a ``LinearFormat`` or ``ConvFormat``.
        batch: rows of a linear layer (all leading dimensions multiplied), images of a convolution.
        size: spatial size of a convolution's input, int or one per dimension.
        stride: of a ``ConvFormat``; a layer has its own.
        padding: of a ``ConvFormat``; a layer has its own.
        dilation: of a ``ConvFormat``; a layer has its own.
        output_padding: of a transposed ``ConvFormat``; a layer has its own.
        plan: a plan to explain in place of the planner's choice.
        memory: ``"fast"``, ``"balanced"`` or ``"least"``; the layer's own by default.
        training: forward and backward, or forward alone.
        dtype: the layer's by default, else float32.
        device: device type, the layer's by default, else ``"cpu"``.

    Raises:
        TypeError: ``layer`` or ``plan`` is of another type.
        ValueError: a size is missing or does not fit.
    """
    batch = positive_int(batch, "batch")
    where = None
    if isinstance(layer, (LinearFormat, ConvFormat)):
        fmt: LinearFormat | ConvFormat = layer
    elif isinstance(layer, (CPLinear, CPConvBase)):
        fmt = layer.format
        where = layer.geometry if isinstance(layer, CPConvBase) else None
    else:
        raise TypeError(
            f"explain expects a CPLinear, CPConvNd, CPConvTransposeNd, LinearFormat or "
            f"ConvFormat, got {type(layer).__name__}"
        )
    if isinstance(layer, torch.nn.Module):
        first = layer.cp.factors[0]
        memory, dtype = memory or layer.memory, dtype or first.dtype
        device = device or first.device.type
    memory = _check.memory(memory or "balanced")
    dtype, device = dtype or torch.float32, device or "cpu"
    machine = machine_for(device, dtype)
    if isinstance(fmt, LinearFormat):
        if size is not None:
            raise ValueError(
                f"size is of a convolution's input; a linear layer has none, got {size!r}"
            )
        return _explain_linear(fmt, batch, plan, memory, training, dtype, device, machine)
    if where is None and fmt.transposed:
        where = _check.transposed_geometry(
            fmt.kernel_size, stride, padding, output_padding, dilation
        )
    elif where is None:
        where = _check.geometry(fmt.kernel_size, stride, padding, dilation)
    if size is None:
        raise ValueError("give the spatial size of the convolution's input, such as size=(32, 32)")
    sizes = mode_sizes(
        size if isinstance(size, Sequence) else (size,) * len(fmt.kernel_size), "size"
    )
    if len(sizes) != len(fmt.kernel_size):
        raise ValueError(f"size must have {len(fmt.kernel_size)} entries, got {sizes}")
    return _explain_conv(fmt, where, batch, sizes, plan, memory, training, dtype, device, machine)


def _cost(
    plan: Plan | None,
    steps: tuple[Sequence[Step], Sequence[Step]],
    kept: int,
    machine: Machine,
) -> Costed:
    forward, backward = steps
    call = machine.dense_call if plan is None else machine.call
    back = machine.dense_call if plan is not None and plan.keep == 2 else call
    seconds = machine.total(forward) + machine.total(backward) + call + (back if backward else 0)
    return Costed(plan, tuple(forward), tuple(backward), kept if backward else 0, seconds)


def _rejected(
    costed: list[Costed], chosen: Costed, machine: Machine
) -> tuple[tuple[Costed, str], ...]:
    """The other plans, cheapest first, each with the step that makes it dearer."""
    found = []
    for other in sorted(costed, key=lambda c: c.seconds):
        if other.plan == chosen.plan:
            continue
        dearest = max((*other.forward, *other.backward), key=machine.seconds)
        reason = (
            f"{other.seconds / chosen.seconds:.2f} times the chosen plan's time, "
            f"{_seconds(machine.seconds(dearest))} of it in '{dearest.name}'"
        )
        found.append((other, reason))
    return tuple(found)


def _explain_linear(
    fmt: LinearFormat,
    rows: int,
    plan: Any,
    memory: Memory,
    training: bool,
    dtype: torch.dtype,
    device: str,
    machine: Machine,
) -> Explanation:
    item = dtype.itemsize

    def cost(p: LinearPlan) -> Costed:
        keeps = p.keep if p.forward.kind == "factorized" else 0
        kept = rows * (fmt.in_features + (fmt.rank if keeps else 0))
        if keeps == 2:
            kept += fmt.rank * (_products(fmt.in_shape) + _products(fmt.out_shape))
        return _cost(p, plan_steps(fmt, rows, p, item, training=training), item * kept, machine)

    if plan is None:
        plan = _planner.choose_linear(fmt, _planner.bucket(rows), dtype, device, memory)
    chosen = cost(_check.linear_plan(plan, fmt))
    every = dense_steps(fmt, rows, item, training=training)
    dense = _cost(None, (every[:1], every[1:]), item * rows * fmt.in_features, machine)
    others = [cost(p) for p in _planner.linear_plans(fmt, memory)]
    title = (
        f"linear {fmt.in_features} -> {fmt.out_features}, modes {fmt.in_shape} -> "
        f"{fmt.out_shape}, rank {fmt.rank}, {rows} rows of {dtype} on {device}, "
        f"{'forward and backward' if training else 'forward'}, memory={memory!r}"
    )
    rejected = _rejected(others, chosen, machine)
    return Explanation(title, chosen, dense, rejected, fmt.break_even_rank, fmt.rank, machine)


def _products(modes: Shape) -> int:
    """Rows of all partial Khatri-Rao products on the way to the whole one."""
    rows: int = sum(itertools.accumulate(modes, operator.mul))
    return rows - modes[0]


def _explain_conv(
    fmt: ConvFormat,
    geometry: Geometry,
    batch: int,
    size: Shape,
    plan: Any,
    memory: Memory,
    training: bool,
    dtype: torch.dtype,
    device: str,
    machine: Machine,
) -> Explanation:
    item, (c, n) = dtype.itemsize, fmt.channels
    inputs = batch * math.prod(size)
    if inputs and min(geometry.output_size(size)) < 1:
        raise ValueError(f"the kernel {fmt.kernel_size} does not fit into an input of size {size}")

    def cost(p: ConvPlan) -> Costed:
        steps = conv_plan_steps(fmt, geometry, batch, size, False, p, item, training=training)
        kept = kept_elements(fmt, geometry, batch, size, p)
        return _cost(p, steps, item * kept, machine)

    if plan is None:
        plan = _planner_conv.choose_conv(
            fmt, geometry, _planner.bucket(batch), size, False, dtype, device, memory
        )
    chosen = cost(_check.conv_plan(plan))
    every = dense_conv_steps(fmt, geometry, batch, size, item, training=training)
    dense = _cost(None, (every[:1], every[1:]), item * inputs * c, machine)
    spatial, kernel = "x".join(map(str, size)), "x".join(map(str, fmt.kernel_size))
    of_groups = f" in {fmt.groups} groups of channels" if fmt.groups > 1 else ""
    title = (
        f"{'transposed ' if fmt.transposed else ''}convolution {c} -> {n}{of_groups}, kernel "
        f"{kernel}, modes out {fmt.out_shape} in {fmt.in_shape}, rank {fmt.rank}, {batch} images "
        f"of {spatial}, {dtype} on {device}, {'forward and backward' if training else 'forward'}, "
        f"memory={memory!r}"
    )
    rejected = _rejected([cost(p) for p in _planner_conv.conv_plans(memory)], chosen, machine)
    return Explanation(title, chosen, dense, rejected, fmt.break_even_rank, fmt.rank, machine)
