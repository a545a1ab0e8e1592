"""The result of ``polyadic.explain``: plans with their costs, and the printed report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polyadic.planner.choice import Plan
from polyadic.planner.machine import Machine
from polyadic.planner.steps import Step
from polyadic.plans import LinearPlan


@dataclass(frozen=True)
class Costed:
    """A plan with what it costs.

    Attributes:
        plan: the plan; None for the dense layer.
        forward: steps of the forward pass.
        backward: steps of the backward pass; empty for inference.
        kept_bytes: bytes that stay for the backward besides parameters: input and intermediates.
        seconds: predicted time, including the cost of the call.
        graph_seconds: predicted time in a CUDA graph, where launches cost nothing; None on a CPU.
    """

    plan: Plan | None
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    kept_bytes: int
    seconds: float
    graph_seconds: float | None = None

    @property
    def flops(self) -> int:
        """FLOPs of GEMMs and convolutions, as ``polyadic.testing.Flops`` counts them."""
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
    """The result of ``explain``; ``str()`` of it is the report.

    Attributes:
        title: format and input in words.
        chosen: the plan that will run.
        dense: the dense layer, to compare with.
        rejected: the other plans, cheapest first, each with the reason.
        break_even_rank: largest rank up to which the plan chosen for this batch has no more FLOPs
            than the dense layer; at least 1.
        rank: the layer's rank.
        machine: the rates the predictions rest on.
        note: a sentence on what else could be chosen, or "".
    """

    title: str
    chosen: Costed
    dense: Costed
    rejected: tuple[tuple[Costed, str], ...]
    break_even_rank: int
    rank: int
    machine: Machine
    note: str = ""

    @property
    def dense_is_faster(self) -> bool:
        """Whether the dense layer is predicted to be faster than the chosen plan."""
        return self.dense.seconds < self.chosen.seconds

    @property
    def dense_is_faster_in_a_graph(self) -> bool:
        """Whether the dense layer is faster in a CUDA graph (on a CPU, without one)."""
        if self.dense.graph_seconds is None or self.chosen.graph_seconds is None:
            return self.dense_is_faster
        return self.dense.graph_seconds < self.chosen.graph_seconds

    def _time(self, step: Step) -> float:
        """Predict the seconds of a step; on a GPU without its launch, which overlaps with work."""
        return self.machine.work(step) if self.machine.queued else self.machine.seconds(step)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""

        def plain(c: Costed) -> dict[str, Any]:
            return {
                "plan": "dense layer" if c.plan is None else str(c.plan),
                "seconds": c.seconds,
                "graph_seconds": c.graph_seconds,
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
                        "seconds": self._time(step),
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
            "note": self.note,
            "chosen": plain(self.chosen),
            "dense": plain(self.dense),
            "rejected": [{**plain(c), "reason": reason} for c, reason in self.rejected],
        }

    def __str__(self) -> str:
        chosen, dense = self.chosen, self.dense
        lines = [_compared("here", chosen.seconds, dense.seconds)]
        if chosen.graph_seconds is not None and dense.graph_seconds is not None:
            lines.append(_compared("in a CUDA graph", chosen.graph_seconds, dense.graph_seconds))
        lines += ["", self.title, f"plan     {chosen.plan}", ""]
        column = "GPU time" if self.machine.queued else "time"
        lines.append(f"{'step':<44}{'FLOPs':>10}{'bytes':>10}{column:>10}")
        for name, steps in (("forward", chosen.forward), ("backward", chosen.backward)):
            if steps:
                lines.append(name)
            for step in steps:
                time = seconds_text(self._time(step))
                work = count_text(step.flops) if step.flops else "-"
                lines.append(f"  {step.name:<42}{work:>10}{count_text(step.nbytes):>10}{time:>10}")
        lines += ["", f"{'':<22}{'this plan':>12}{'dense layer':>14}"]
        rows = [
            ("FLOPs", count_text(chosen.flops), count_text(dense.flops)),
            ("bytes moved", count_text(chosen.nbytes), count_text(dense.nbytes)),
            ("kept for backward, B", count_text(chosen.kept_bytes), count_text(dense.kept_bytes)),
            ("largest tensor", count_text(chosen.largest), count_text(dense.largest)),
            ("predicted time", seconds_text(chosen.seconds), seconds_text(dense.seconds)),
        ]
        if chosen.graph_seconds is not None and dense.graph_seconds is not None:
            graphs = seconds_text(chosen.graph_seconds), seconds_text(dense.graph_seconds)
            rows.append(("in a CUDA graph", *graphs))
        for label, ours, theirs in rows:
            lines.append(f"{label:<22}{ours:>12}{theirs:>14}")
        head = "" if dense.flops else ", as an output head: a lookup has none"
        lines += ["", f"rank {self.rank}, break-even rank {self.break_even_rank} (in FLOPs{head})"]
        lines += ["", self.note] if self.note else []
        lines += ["", f"rejected, by predicted time ({self.machine.source} machine numbers)"]
        for other, reason in self.rejected:
            route = "" if other.plan is None else other.plan.forward
            lines.append(f"  {seconds_text(other.seconds):>9}  {route}: {reason}")
        return "\n".join(lines)


def _compared(where: str, ours: float, theirs: float) -> str:
    """Say whether the plan or the dense layer is faster, and by how much."""
    if theirs < ours:
        return f"dense is faster {where}: the plan takes {ours / theirs:.2f} times as long"
    there = "" if where == "here" else f"{where} "
    return f"{there}the plan is predicted {theirs / ours:.2f} times as fast as dense"


def count_text(value: float) -> str:
    """Write a number with a letter for its thousands."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{value:.4g} {unit}".rstrip()
        value /= 1000
    raise AssertionError


def seconds_text(value: float) -> str:
    """Write a time with its unit."""
    if value < 1e-3:
        return f"{value * 1e6:.3g} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def costed(
    plan: Plan | None, steps: tuple[Sequence[Step], Sequence[Step]], kept: int, machine: Machine
) -> Costed:
    """Price a plan (None: the dense layer) by its steps; ``kept`` is the bytes that it keeps."""
    forward, backward = steps
    call = machine.dense_call if plan is None else machine.call
    by_autograd = isinstance(plan, LinearPlan) and plan.keep == "autograd"
    calls = call
    if backward and (plan is None or by_autograd):
        calls += machine.dense_call + machine.dense_backward_call
    elif backward:
        calls += call + machine.backward_call
    every = [*forward, *backward]
    graph = machine.in_graph().total(every) if machine.queued else None
    return Costed(
        plan,
        tuple(forward),
        tuple(backward),
        kept if backward else 0,
        machine.total(every, calls),
        graph,
    )


def rejected(
    others: list[Costed], chosen: Costed, machine: Machine
) -> tuple[tuple[Costed, str], ...]:
    """Return the plans not chosen, cheapest first, each with the step that costs it most."""
    found = []
    for other in sorted(others, key=lambda c: c.seconds):
        if other.plan == chosen.plan:
            continue
        dearest = max((*other.forward, *other.backward), key=machine.seconds)
        reason = (
            f"{other.seconds / chosen.seconds:.2f} times the chosen plan's time, "
            f"{seconds_text(machine.seconds(dearest))} of it in '{dearest.name}'"
        )
        found.append((other, reason))
    return tuple(found)
