"""The report of ``compress``: what it did or would do, layer by layer and in sum, and why."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polyadic.compression.layer_report import LayerReport, layer_from, modes_text
from polyadic.compression.page import html
from polyadic.durable.files import write_text

FORMAT_VERSION = 1
# Relative changes of the outputs beyond which a model is worse for most uses, and beyond which
# it cannot be used as it is.
MUCH, TOO_MUCH = 0.1, 0.5


@dataclass(frozen=True)
class Report:
    """What ``polyadic.compress`` found; ``str()`` of it is a table.

    Attributes:
        budget: the budget in words.
        layers: converted, kept and skipped layers, in the model's order.
        dry_run: whether the model was left as it was.
        calibrated: whether errors are weighed by calibration batches.
        seed: seed of the fits.
        model_parameters: number of parameters of the whole model before.
        predicted_error: √Σ importance · error², with the errors that the curves predict.
        error: √Σ importance · error², with the errors of the fits; None in a dry run.
        output_error: relative change of the model's outputs on the calibration batches, measured;
            None without calibration and in a dry run.
        machine: where the rates behind predicted times come from.
        notes: reasons not to trust these numbers.
        recovered_error: ``output_error``, measured once more after the model was recovered; None
            where it was not.
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
    notes: tuple[str, ...] = ()
    recovered_error: float | None = None

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
        """Parameters of the layers weighed, before."""
        return sum(layer.dense_parameters for layer in self.weighed)

    @property
    def parameters(self) -> int:
        """Parameters of the layers weighed, after the conversion."""
        return sum(layer.parameters for layer in self.weighed)

    @property
    def model_parameters_after(self) -> int:
        """Parameters of the whole model, after the conversion."""
        return self.model_parameters - self.dense_parameters + self.parameters

    @property
    def model_ratio(self) -> float:
        """How many times fewer parameters the whole model has."""
        return self.model_parameters / max(1, self.model_parameters_after)

    @property
    def ratio(self) -> float:
        """How many times fewer parameters the layers weighed have."""
        return self.dense_parameters / self.parameters

    @property
    def flops_ratio(self) -> float | None:
        """How many times fewer FLOPs these layers have; None if one's are not known."""
        return _ratio([(layer.dense_flops, layer.flops) for layer in self.weighed])

    @property
    def speed_ratio(self) -> float | None:
        """How many times as fast these layers are predicted to be; None if one's is not known."""
        return _ratio([(layer.dense_seconds, layer.seconds) for layer in self.weighed])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, from which ``from_dict`` makes the report again."""
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
        """Make the report again from what ``to_dict`` returned, or from JSON of it.

        Raises:
            ValueError: ``data`` is not that of a report, or is of a newer version.
        """
        version = data.get("format_version") if isinstance(data, Mapping) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"expected a report of polyadic.compress of format_version {FORMAT_VERSION}, got "
                f"{version!r}"
            )
        try:
            fields = {field.name: data[field.name] for field in dataclasses.fields(cls)[:-1]}
            fields["recovered_error"] = data.get("recovered_error")  # older reports have none
            layers = tuple(layer_from(layer) for layer in data["layers"])
            return cls(**{**fields, "layers": layers, "notes": tuple(data["notes"])})
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"the data is not that of a report: {error!r}") from error

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_dict`` as JSON."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    def to_html(self, path: str | os.PathLike[str], model: str = "a model") -> None:
        """Write a page with tables and plots that refers to nothing outside itself.

        Args:
            path: the file.
            model: what the model is called in the title.

        Raises:
            ImportError: matplotlib is not installed.
        """
        how = "weighed by calibration batches" if self.calibrated else "of the weights alone"
        state = "plan of a dry run" if self.dry_run else "done"
        made = f"polyadic {version('polyadic')}, {date.today().isoformat()}"
        lead = f"Budget: {self.budget} ({state}); errors {how}; seed {self.seed}. {made}."
        title = f"Compression of {model}"
        page = html(title, self.verdict, lead, self.summary(), self.layers)
        write_text(Path(path), page)

    @property
    def verdict(self) -> str:
        """What came of it, and what to do about it, in plain words."""
        would = "would become" if self.dry_run else "is"
        said = f"the model {would} {self.model_ratio:.2f} times smaller"
        advice: list[str] = []
        if self.speed_ratio is not None:
            faster = f"{self.speed_ratio:.2f} times as fast"
            said += f", its layers are predicted {faster}"
            if self.speed_ratio < 1:
                advice.append(
                    "the option speed='never-slower' leaves those dense that would be slower"
                )
        changed, about_it = self._on_outputs()
        return (
            ". ".join(text[0].upper() + text[1:] for text in [said + changed, *about_it, *advice])
            + "."
        )

    def _on_outputs(self) -> tuple[str, list[str]]:
        """How much the outputs change, as the end of a sentence, and what to do about it."""
        change, after = self.output_error, self.recovered_error
        if change is None and self.calibrated:
            change = self.predicted_error
        if change is None:
            return "; how much its outputs change is not known without calibration batches", []
        last, how = change, "recover it by polyadic.finetune.distill, --recover on the command line"
        too_much = "the model is not usable without recovery"
        word = "are predicted to change" if self.output_error is None else "change"
        said = f", and its outputs {word} by {100 * change:.2g} %"
        if self.dry_run:
            too_much = "the model would not be usable without recovery"
        if after is not None:
            last, how, too_much = after, "recover it in more steps", "the model is not usable yet"
            said = f", and after its recovery its outputs change by {100 * after:.2g} %"
            said += f" ({100 * change:.2g} % before it)"
        if last <= MUCH:
            return said, []
        judged = too_much if last > TOO_MUCH else "that is too much for most uses"
        return said, [f"{judged}: {how}, or choose a smaller budget"]

    def summary(self) -> list[str]:
        """Return the sums over all layers, one sentence each."""
        lines = [
            f"{self.parameters:,} parameters of {self.dense_parameters:,} in the layers weighed: "
            f"{self.ratio:.2f} times fewer ({len(self.converted)} of {len(self.weighed)} converted)"
        ]
        lines.append(
            f"{self.model_parameters_after:,} of {self.model_parameters:,} in the whole model: "
            f"{self.model_ratio:.2f} times fewer"
        )
        if self.flops_ratio == 0:
            lines.append("these layers compute now, where lookups had no FLOPs")
        elif self.flops_ratio is not None:
            less = self.flops_ratio >= 1
            times = self.flops_ratio if less else 1 / self.flops_ratio
            lines.append(f"{times:.2f} times {'fewer' if less else 'more'} FLOPs in these layers")
        if self.speed_ratio is not None:
            lines.append(
                f"these layers are predicted to be {self.speed_ratio:.2f} times as fast "
                f"({self.machine} machine numbers)"
            )
        what = "of the outputs" if self.calibrated else "of all weights taken together"
        lines.append(
            f"relative error {what}, predicted from single layers: {self.predicted_error:.3g}"
        )
        if self.error is not None:
            lines.append(f"the relative error with the errors of the fits: {self.error:.3g}")
        if self.output_error is not None:
            lines.append(
                f"relative change of the model's outputs on the calibration batches, measured: "
                f"{self.output_error:.3g}"
            )
        if self.recovered_error is not None:
            lines.append(f"the same change after the recovery: {self.recovered_error:.3g}")
        return [*lines, *(f"note: {note}" for note in self.notes)]

    def __str__(self) -> str:
        done = "plan" if self.dry_run else "done"
        rows: list[tuple[str, ...]] = [
            ("layer", "weight", "format", "rank", "parameters", "times", "error", "")
        ]
        rows += [_row(layer) for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        lines = [self.verdict, "", f"budget: {self.budget} ({done})", ""]
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
    return (
        name,
        shape,
        modes_text(layer.modes),
        str(layer.rank),
        f"{layer.parameters:,}",
        times,
        f"{error:.3g}",
        layer.reason,
    )


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    befores = [before for before, _ in pairs if before is not None]
    afters = [after for _, after in pairs if after is not None]
    if not len(befores) == len(afters) == len(pairs):
        return None
    total = math.fsum(afters)
    return math.fsum(befores) / total if total > 0 else None
