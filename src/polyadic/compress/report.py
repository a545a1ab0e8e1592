"""What ``compress`` did or would do: layer by layer, in sum, and why."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Points:
    """The error curve of one format of a layer, as far as it was looked at.

    Attributes:
        order: modes per side.
        modes: the tensorized shape.
        ranks: ascending.
        parameters: at these ranks.
        errors: relative, in the metric of the fit; exact for plain low rank, of short fits
            otherwise.
        exact: whether they are.
        given_up: why it was not followed further, or empty.
    """

    order: int
    modes: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    parameters: tuple[int, ...]
    errors: tuple[float, ...]
    exact: bool
    given_up: str


@dataclass(frozen=True)
class LayerReport:
    """One layer, or layers tied by one weight.

    Attributes:
        names: in the model; more than one where they are tied.
        kind: classes of the layers before.
        weight_shape: of the dense weight.
        decision: ``"converted"``, ``"dense"`` (weighed and kept) or ``"skipped"`` (cannot be
            exchanged).
        reason: for the decision, in words.
        order: modes per side, 0 if not converted.
        modes: the tensorized shape, empty if not converted.
        rank: 0 if not converted.
        dense_parameters: entries of the weight.
        parameters: entries of the factors, or of the weight that stays.
        dense_flops: of a pass over a batch, forward; None if not known.
        flops: the same afterwards.
        dense_seconds: predicted time of the pass, None if not known.
        seconds: the same afterwards.
        predicted_error: relative error in the metric of the fit, as its curve promised.
        weight_error: ‖W − Ŵ‖ / ‖W‖ as fitted; None in a dry run.
        output_error: √(E‖(W − Ŵ)x‖² / E‖Wx‖²) over the calibration inputs, bias left out; None
            without calibration and in a dry run.
        importance: what a relative error of 1 would add to the squared error of the whole, taken
            from a smaller one.
        curves: error curves of the formats weighed.
    """

    names: tuple[str, ...]
    kind: str
    weight_shape: tuple[int, ...]
    decision: str
    reason: str
    dense_parameters: int
    parameters: int
    order: int = 0
    modes: tuple[tuple[int, ...], ...] = ()
    rank: int = 0
    dense_flops: int | None = None
    flops: int | None = None
    dense_seconds: float | None = None
    seconds: float | None = None
    predicted_error: float | None = None
    weight_error: float | None = None
    output_error: float | None = None
    importance: float | None = None
    curves: tuple[Points, ...] = ()

    @property
    def name(self) -> str:
        """Of the first layer."""
        return self.names[0]


@dataclass(frozen=True)
class Report:
    """What ``polyadic.compress`` found; ``str()`` of it is a table.

    Attributes:
        budget: in words.
        layers: converted, kept and skipped ones, in the model's order.
        dry_run: whether the model was left as it was.
        calibrated: whether errors are weighed by calibration batches.
        seed: of the fits.
        model_parameters: of the whole model before.
        predicted_error: √Σ importance · error², the relative error of the whole by the curves.
        error: the same with the errors as fitted; None in a dry run.
        output_error: relative change of the model's outputs on the calibration batches, measured;
            None without calibration and in a dry run.
        machine: where the rates behind predicted times come from.
    """

    budget: str
    layers: tuple[LayerReport, ...]
    dry_run: bool
    calibrated: bool
    seed: int
    model_parameters: int
    predicted_error: float
    error: float | None
    output_error: float | None
    machine: str

    @property
    def weighed(self) -> tuple[LayerReport, ...]:
        """Layers that could be exchanged: what ratios are counted over."""
        return tuple(layer for layer in self.layers if layer.decision != "skipped")

    @property
    def converted(self) -> tuple[LayerReport, ...]:
        """Layers that are in CP format."""
        return tuple(layer for layer in self.layers if layer.decision == "converted")

    @property
    def dense_parameters(self) -> int:
        """Entries of the weights of the layers weighed."""
        return sum(layer.dense_parameters for layer in self.weighed)

    @property
    def parameters(self) -> int:
        """The same afterwards."""
        return sum(layer.parameters for layer in self.weighed)

    @property
    def ratio(self) -> float:
        """How many times fewer parameters the layers weighed have."""
        return self.dense_parameters / self.parameters

    @property
    def flops_ratio(self) -> float | None:
        """How many times fewer FLOPs; None where they are not known."""
        return _ratio([(layer.dense_flops, layer.flops) for layer in self.weighed])

    @property
    def speed_ratio(self) -> float | None:
        """How many times as fast by prediction; None where a layer has none."""
        return _ratio([(layer.dense_seconds, layer.seconds) for layer in self.weighed])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(self),
            "totals": {
                "dense_parameters": self.dense_parameters,
                "parameters": self.parameters,
                "ratio": self.ratio,
                "flops_ratio": self.flops_ratio,
                "speed_ratio": self.speed_ratio,
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Make the report again from ``to_dict``, or from JSON of it.

        Raises:
            ValueError: ``data`` is not of a report, or of a newer version.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"expected a report of polyadic.compress of format_version {FORMAT_VERSION}, got "
                f"{version!r}"
            )
        fields = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**fields, "layers": tuple(_layer(layer) for layer in data["layers"])})

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_dict`` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page with tables and plots that refers to nothing outside itself.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from polyadic.compress.page import html

        Path(path).write_text(html(self), encoding="utf-8")

    def summary(self) -> list[str]:
        """The sums, a sentence each."""
        lines = [
            f"{self.parameters:,} parameters of {self.dense_parameters:,} in the layers weighed: "
            f"{self.ratio:.2f} times fewer ({len(self.converted)} of {len(self.weighed)} converted)"
        ]
        after = self.model_parameters - self.dense_parameters + self.parameters
        lines.append(
            f"{after:,} of {self.model_parameters:,} in the whole model: "
            f"{self.model_parameters / max(1, after):.2f} times fewer"
        )
        if self.flops_ratio is not None:
            lines.append(f"{self.flops_ratio:.2f} times fewer FLOPs in these layers")
        if self.speed_ratio is not None:
            lines.append(
                f"these layers are predicted to be {self.speed_ratio:.2f} times as fast "
                f"({self.machine} machine numbers)"
            )
        what = "of the outputs" if self.calibrated else "of all weights taken together"
        lines.append(f"relative error {what}, predicted from single layers: "
                     f"{self.predicted_error:.3g}")  # fmt: skip
        if self.error is not None:
            lines.append(f"the same with the errors as fitted: {self.error:.3g}")
        if self.output_error is not None:
            lines.append(
                f"relative change of the model's outputs on the calibration batches, measured: "
                f"{self.output_error:.3g}"
            )
        return lines

    def __str__(self) -> str:
        done = "plan" if self.dry_run else "done"
        rows: list[tuple[str, ...]] = [
            ("layer", "weight", "format", "rank", "parameters", "times", "error", "")
        ]
        rows += [_row(layer) for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        lines = [f"budget: {self.budget} ({done})", ""]
        for row in rows:
            cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].ljust(widths[2])]
            cells += [row[i].rjust(widths[i]) for i in range(3, 7)]
            lines.append("  ".join([*cells, row[7]]).rstrip())
        return "\n".join([*lines, "", *self.summary()])


def _row(layer: LayerReport) -> tuple[str, ...]:
    name = " = ".join(layer.names)
    shape = "x".join(map(str, layer.weight_shape))
    if layer.decision != "converted":
        return (name, shape, layer.decision, "", f"{layer.parameters:,}", "", "", layer.reason)
    errors = (layer.output_error, layer.weight_error, layer.predicted_error)
    error = next(error for error in errors if error is not None)
    times = f"{layer.dense_parameters / layer.parameters:.2f}"
    return (name, shape, modes_text(layer.modes), str(layer.rank), f"{layer.parameters:,}", times,
            f"{error:.3g}", layer.reason)  # fmt: skip


def modes_text(modes: Sequence[Sequence[int]]) -> str:
    """A tensorized shape in short."""
    return " ".join("x".join(map(str, group)) for group in modes)


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    if any(before is None or after is None for before, after in pairs):
        return None
    total = [math.fsum(p[i] for p in pairs if p[i] is not None) for i in (0, 1)]  # type: ignore[misc]
    return total[0] / total[1] if total[1] > 0 else None


def _layer(data: Mapping[str, Any]) -> LayerReport:
    curves = tuple(
        Points(**{**curve, **{k: tuple(curve[k]) for k in ("ranks", "parameters", "errors")},
                  "modes": _modes(curve["modes"])})
        for curve in data["curves"]
    )  # fmt: skip
    return LayerReport(**{
        **data, "names": tuple(data["names"]), "weight_shape": tuple(data["weight_shape"]),
        "modes": _modes(data["modes"]), "curves": curves,
    })  # fmt: skip


def _modes(groups: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in groups)
