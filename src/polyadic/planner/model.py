"""``polyadic.explain`` of a whole model: its CP layers as they are called on an input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polyadic.batches import evaluating
from polyadic.formats import ConvFormat, EmbeddingFormat
from polyadic.planner.report import Costed, Explanation, count_text, seconds_text


@dataclass(frozen=True)
class LayerExplanation:
    """A layer of a model, at one of its calls.

    Attributes:
        name: name of the module.
        kind: its class.
        found: what ``explain`` says of the layer for the batch of this call; None if the layer is
            frozen and follows no plan.
        parameters: entries of its factors and λ; 0 if an earlier row counts them.
        dense_parameters: entries of the dense weight; 0 if an earlier row counts them.
        peak_bytes: most bytes of this call that are alive at once, parameters left out: the input,
            gradients and all that is made on the way; None where ``found`` is, and of a layer that
            stands in for none of torch's.
        dense_peak_bytes: those of the dense layer.
    """

    name: str
    kind: str
    found: Explanation | None
    parameters: int
    dense_parameters: int
    peak_bytes: int | None = None
    dense_peak_bytes: int | None = None


@dataclass(frozen=True)
class ModelExplanation:
    """What ``explain`` says of a model; ``str()`` of it is a table, the verdict in front.

    Attributes:
        layers: a row for each call of a CP layer, in the order of the calls.
        training: whether times are of forward and backward, or of forward alone.
    """

    layers: tuple[LayerExplanation, ...]
    training: bool

    def _explained(self) -> list[Explanation]:
        return [layer.found for layer in self.layers if layer.found is not None]

    @property
    def seconds(self) -> float:
        """Predicted time of all CP layers."""
        return sum(found.chosen.seconds for found in self._explained())

    @property
    def dense_seconds(self) -> float:
        """Predicted time of the dense layers they stand for."""
        return sum(found.dense.seconds for found in self._explained())

    @property
    def peak_bytes(self) -> int:
        """Bytes that all CP layers keep, plus the most that a call of one needs on top."""
        return _peak_in_sum(
            [(row.found.chosen, row.peak_bytes) for row in self.layers if row.found is not None]
        )

    @property
    def dense_peak_bytes(self) -> int:
        """Bytes that the dense layers would keep, plus the most that one of them needs on top."""
        return _peak_in_sum(
            [
                (row.found.dense, row.dense_peak_bytes)
                for row in self.layers
                if row.found is not None
            ]
        )

    @property
    def slower(self) -> tuple[str, ...]:
        """Names of layers whose dense layer is predicted to be faster."""
        rows = [row for row in self.layers if row.found is not None and row.found.dense_is_faster]
        return tuple(dict.fromkeys(row.name for row in rows))

    @property
    def verdict(self) -> str:
        """One sentence on time and parameters."""
        passes = "forward and backward" if self.training else "forward"
        parameters = sum(row.parameters for row in self.layers)
        dense = sum(row.dense_parameters for row in self.layers)
        smaller = f"{dense / parameters:.3g} times fewer weights"
        if not self.seconds:
            return f"all CP layers are frozen and follow no plan; {smaller} than dense"
        ratio = self.dense_seconds / self.seconds
        times = f"{seconds_text(self.seconds)} against {seconds_text(self.dense_seconds)}"
        how = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"{1 / ratio:.2f} times as slow as"
        return f"the CP layers are predicted {how} dense ones, {passes} ({times}), with {smaller}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        return {
            "verdict": self.verdict,
            "training": self.training,
            "seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
            "peak_bytes": self.peak_bytes,
            "dense_peak_bytes": self.dense_peak_bytes,
            "slower": list(self.slower),
            "layers": [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "parameters": row.parameters,
                    "dense_parameters": row.dense_parameters,
                    "peak_bytes": row.peak_bytes,
                    "dense_peak_bytes": row.dense_peak_bytes,
                    "explanation": None if row.found is None else row.found.to_dict(),
                }
                for row in self.layers
            ],
        }

    def __str__(self) -> str:
        pairs = ("time", "FLOPs", "kept, B", "peak, B", "weights")
        head = ["layer", "rank", *(name for first in pairs for name in (first, "dense"))]
        rows = [head, *(_cells(row) for row in self.layers), self._sum()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [self.verdict, ""]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
            lines.append("  ".join(cells).rstrip())
        if self.slower:
            lines += [
                "",
                f"dense is faster for {', '.join(self.slower)}: keep them dense, or give "
                f"them a lower rank (polyadic.rank_for)",
            ]
        lines += [
            "",
            "Peak: the most that is alive at once in a call; in the sum, what all layers keep and "
            "the most that one needs on top.",
            "Layers other than CP layers are not counted.",
        ]
        return "\n".join(lines)

    def _sum(self) -> list[str]:
        found = self._explained()
        sides = [f.chosen for f in found], [f.dense for f in found]
        pairs = [
            tuple(sum(getattr(costs, name) for costs in side) for side in sides)
            for name in ("flops", "kept_bytes")
        ]
        pairs.append((self.peak_bytes, self.dense_peak_bytes))
        pairs.append(
            (sum(r.parameters for r in self.layers), sum(r.dense_parameters for r in self.layers))
        )
        counts = [count_text(value) for pair in pairs for value in pair]
        times = [seconds_text(self.seconds), seconds_text(self.dense_seconds)]
        return ["sum", "", *times, *counts]


def _peak_in_sum(calls: Sequence[tuple[Costed, int | None]]) -> int:
    """Bytes that all calls keep, plus the most that one call of a known peak needs on top."""
    on_top = [peak - cost.kept_bytes for cost, peak in calls if peak is not None]
    return sum(cost.kept_bytes for cost, _ in calls) + max(on_top, default=0)


def _cells(row: LayerExplanation) -> list[str]:
    weights = [count_text(n) if n else "shared" for n in (row.parameters, row.dense_parameters)]
    name = row.name or row.kind
    if row.found is None:
        return [name, "frozen", *("-",) * 8, *weights]
    ours, dense = row.found.chosen, row.found.dense
    times = [seconds_text(ours.seconds), seconds_text(dense.seconds)]
    counts = [ours.flops, dense.flops, ours.kept_bytes, dense.kept_bytes]
    peaks = [
        "-" if peak is None else count_text(peak) for peak in (row.peak_bytes, row.dense_peak_bytes)
    ]
    return [name, str(row.found.rank), *times, *map(count_text, counts), *peaks, *weights]


def explained_model(
    model: nn.Module, inputs: Sequence[Any], explain: Any, training: bool, as_it_is: bool
) -> ModelExplanation:
    """Run the model once, without gradients and in evaluation mode, and explain what was called.

    Args:
        model: any module.
        inputs: the positional arguments with which it is called.
        explain: explains a layer, called with ``batch``, ``size`` and ``training``.
        training: whether forward and backward are explained, or forward alone.
        as_it_is: whether layers are explained with their own options; the peak of memory is counted
            only then.

    Raises:
        ValueError: the model has no CP layer, or none is called.
    """
    layers = {n: m for n, m in model.named_modules() if callable(getattr(m, "request", None))}
    if not layers:
        raise ValueError(f"explain expects a model with CP layers, {type(model).__name__} has none")
    calls: list[tuple[str, int, tuple[int, ...] | None, Tensor]] = []

    def recorded(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            calls.append((name, *_call_of(layers[name], x), x.new_empty(()).expand(x.shape)))

        return hook

    handles = [
        layer.register_forward_pre_hook(recorded(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError("the model called none of its CP layers on these inputs")
    known: dict[Any, tuple[Explanation, tuple[int | None, int | None]]] = {}
    unknown: tuple[int | None, int | None] = (None, None)
    seen: set[int] = set()
    dense_seen: set[int] = set()
    rows = []
    for name, batch, size, x in calls:
        layer: Any = layers[name]
        found, peaks = None, unknown
        if getattr(layer, "frozen", None) is None:
            asked = layer.request(batch, size)
            key = asked, layer.bias is None
            if key not in known:
                found = explain(layer, batch=batch, size=size, training=training)
                counted = as_it_is and hasattr(layer, "peak_bytes")
                known[key] = found, layer.peak_bytes(x, training) if counted else unknown
            found, peaks = known[key]
        new = [p for p in layer.cp.parameters() if id(p) not in seen]
        seen.update(map(id, new))
        # A tied layer has the very tensor of another layer; a joint one has a slice of its own.
        dense = 0 if id(layer.cp) in dense_seen else _dense_parameters(layer)
        dense_seen.add(id(layer.cp))
        own = sum(p.numel() for p in new)
        rows.append(LayerExplanation(name, type(layer).__name__, found, own, dense, *peaks))
    return ModelExplanation(tuple(rows), training)


def _dense_parameters(layer: Any) -> int:
    """Count the entries of the dense weight; a head, which has no format, is a matrix."""
    if hasattr(layer, "format"):
        return int(layer.format.dense_parameters)
    return int(layer.in_features * layer.out_features)


def _call_of(layer: Any, x: Any) -> tuple[int, tuple[int, ...] | None]:
    """Return batch and spatial size of a call, as ``request`` takes them."""
    if not isinstance(x, Tensor):
        raise TypeError(f"a {type(layer).__name__} expects a tensor, got {type(x).__name__}")
    fmt = getattr(layer, "format", None)
    if isinstance(fmt, ConvFormat):
        dims = len(fmt.kernel_size)
        return (x.shape[0] if x.dim() == dims + 2 else 1), tuple(x.shape[-dims:])
    if isinstance(fmt, EmbeddingFormat) and not x.is_floating_point():
        return x.numel(), None
    return math.prod(x.shape[:-1]), None
