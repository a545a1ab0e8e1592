"""The part of a report that is about one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CurvePoints:
    """The error curve of one format of a layer, as far as it was looked at.

    Attributes:
        order: modes per side.
        modes: the tensorized shape.
        ranks: the ranks looked at, ascending.
        parameters: number of parameters at these ranks.
        errors: relative errors at these ranks, in the metric of the fit.
        exact: whether the errors are exact, as for plain low rank; others are of short fits.
        given_up: why the curve was not followed further, or empty.
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
        names: names in the model; more than one where layers are tied.
        kind: classes of the layers before the conversion.
        weight_shape: shape of the dense weight.
        decision: ``"converted"``, ``"dense"`` (weighed and kept) or ``"skipped"`` (cannot be
            exchanged).
        reason: the reason for the decision, in words.
        order: modes per side, 0 if not converted.
        modes: the tensorized shape, empty if not converted.
        rank: 0 if not converted.
        dense_parameters: entries of the weight.
        parameters: entries of the factors, or of the weight that stays.
        dense_flops: FLOPs of a forward pass over one batch before; None if not known.
        flops: FLOPs of that pass after the conversion.
        dense_seconds: predicted time of that pass before; None if not known.
        seconds: predicted time of that pass after the conversion.
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
    curves: tuple[CurvePoints, ...] = ()

    @property
    def name(self) -> str:
        """Name of the first layer."""
        return self.names[0]


def modes_text(modes: Sequence[Sequence[int]]) -> str:
    """Write a tensorized shape as text, such as ``4x16 8x8``."""
    return " ".join("x".join(map(str, group)) for group in modes)


def layer_from(data: Mapping[str, Any]) -> LayerReport:
    """Make a ``LayerReport`` from the plain data of ``Report.to_dict``."""
    curves = tuple(
        CurvePoints(
            **{
                **curve,
                **{k: tuple(curve[k]) for k in ("ranks", "parameters", "errors")},
                "modes": _modes(curve["modes"]),
            }
        )
        for curve in data["curves"]
    )
    return LayerReport(
        **{
            **data,
            "names": tuple(data["names"]),
            "weight_shape": tuple(data["weight_shape"]),
            "modes": _modes(data["modes"]),
            "curves": curves,
        }
    )


def _modes(groups: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in groups)
