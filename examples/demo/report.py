"""What was found: tables for the terminal, and a report that is one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import sqrt
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

from examples.demo.language import STEPS, Trained, verdict
from examples.demo.models import NARROW_LIKE_RANK
from examples.demo.training import Result, Settings
from polyadic.compression.html import document, svg

COLUMNS = ("parameters", "in con-\nverted", "ratio", "accuracy\n(%)", "step\n(ms)", "kept\n(KiB)")
STYLE = ".wide > svg { min-width: 56rem; }"
EXPLANATION = """<p>A linear layer multiplies by a matrix <i>W</i> of M × N weights. A CP layer
(CP: canonical polyadic decomposition) reads M and N as products of small <b>modes</b> and <i>W</i>
as a sum of R outer products of one vector per mode: W = (A₁ ⊙ A₂) (C₁ ⊙ C₂)ᵀ. R is the <b>rank</b>;
the vectors of a mode, side by side, are a <b>factor</b>, and these numbers alone are stored. ⊙ is
the <b>Khatri-Rao product</b>, the Kronecker product column by column. Forward and backward multiply
by the two thin matrices; <i>W</i> is not formed where that costs more.</p>"""
CAPTIONS = {
    "language": "Loss on held-out text after the last step, against the parameters of the blocks "
    "and against the processor time of a training step. Lower and further left is better.",
    "accuracy": "Test accuracy after the last epoch against the parameters of the whole model: "
    "mean over the seeds, and range.",
    "curves": "Mean training loss of each epoch, and test accuracy after it: mean over the seeds, "
    "and range.",
    "costs": "Processor time of a training step (forward, backward and Adam), and bytes kept for "
    "backward by one training batch.",
    "factorization": "The first hidden layer of the MLP of CP rank 16, trained. Its in-modes are "
    "the rows and columns of the image: A₁ weighs rows, A₂ columns. Each matrix has its own "
    "colours, white at zero. Below, the same layer as a sum of parts of rank one, of which the "
    "three of largest norm are shown, with their norms relative to that of W; and the relative "
    "error of W (Frobenius norm) when only the first parts are added.",
}
LANGUAGE_COLUMNS = ("model", "parameters\nof blocks", "held-out loss\n(nats a byte)", "step\n(ms)")


def language_rows(trained: Sequence[Trained]) -> list[list[str]]:
    """The rows of the language models' table."""
    return [
        [one.contestant.label, f"{one.parameters:,}", f"{one.loss:.3f}", f"{1e3 * one.seconds:.1f}"]
        for one in trained
    ]


def language_table(trained: Sequence[Trained]) -> Table:
    """The table of the language models for a terminal."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(LANGUAGE_COLUMNS):
        made.add_column(name, justify="right" if i else "left", no_wrap=True, vertical="bottom")
    for row in language_rows(trained):
        made.add_row(*row)
    return made


def cells(result: Result) -> list[str]:
    """A row of the table."""
    label, accuracy = result.contestant.label, fmean(result.accuracies)
    ms = 1e3 * result.step[1]
    cost = f"{ms:.2f}" if ms < 100 else f"{ms:,.0f}", f"{result.kept / 1024:,.0f}"
    sizes = f"{result.parameters:,}", f"{result.converted:,}", f"{result.ratio:.1f}"
    return [label, *sizes, f"{accuracy:.1f}", *cost]


def table(grouped: Mapping[str, Sequence[Result]]) -> Table:
    """The table for a terminal of 80 columns."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("model", no_wrap=True, vertical="bottom")
    for name in COLUMNS:
        made.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for family, members in grouped.items():
        made.add_row(family, style="bold")
        for label, *numbers in map(cells, members):
            made.add_row(f"  {label}", *numbers)
        made.add_section()
    return made


def against(result: Result, other: Result, images: int) -> str:
    """Accuracy in percent, and whether so many test images tell it apart from another model's."""
    one, two = fmean(result.accuracies), fmean(other.accuracies)
    half = 1.96 * sqrt((one * (100 - one) + two * (100 - two)) / images)
    verdict = "not told apart" if abs(one - two) <= half else "better" if one > two else "worse"
    points = f"{one - two:+.1f}".replace("-", "−")
    return f"{one:.1f} % ({points} ± {half:.1f} points: {verdict})"


def findings(members: Sequence[Result], images: int) -> list[str]:
    """What the numbers of a family say, above all where dense is the better choice."""
    dense, narrow, *cps = members
    partner = next(r for r in cps if r.contestant.rank == NARROW_LIKE_RANK)
    found = [
        f"{dense.contestant.label}: {fmean(dense.accuracies):.1f} %, {1e3 * dense.step[1]:.2f} ms "
        f"a step, {dense.kept / 1024:,.0f} KiB kept for backward. ± is the 95 % interval that "
        f"{images} test images leave."
    ]
    for cp in cps:
        ratio = cp.step[1] / dense.step[1]
        verdict = "dense" if ratio > 1.05 else "CP" if ratio < 0.95 else "neither"
        found.append(
            f"{cp.contestant.label}: {cp.ratio:.1f} times fewer parameters in converted layers, "
            f"{dense.parameters / cp.parameters:.1f} times fewer in the whole model; accuracy "
            f"{against(cp, dense, images)}; a step takes {ratio:.2f} × dense ({verdict} is "
            f"faster), and keeps {cp.kept / dense.kept:.2f} × dense."
        )
    ratio, kept = narrow.step[1] / partner.step[1], narrow.kept / partner.kept
    return [
        *found,
        f"The plain alternative, {narrow.contestant.label}, with {narrow.parameters:,} parameters "
        f"against {partner.parameters:,} of {partner.contestant.label}: accuracy "
        f"{against(narrow, partner, images)}, time {ratio:.2f} × CP's, kept {kept:.2f} × CP's.",
    ]


def digits_verdict(grouped: Mapping[str, Sequence[Result]]) -> str:
    """Say in a sentence which is faster on the small layers of the digits."""
    pairs = [(cp, m[0]) for m in grouped.values() for cp in m if cp.contestant.rank is not None]
    slower = sum(cp.step[1] > 1.05 * dense.step[1] for cp, dense in pairs)
    least = min(dense.parameters / cp.parameters for cp, dense in pairs)
    if not slower:
        return (
            "On digits, whose layers are small, no CP model takes longer a step than the dense one."
        )
    return (
        f"On digits, whose layers are small, {slower} of {len(pairs)} CP models take longer a step "
        f"than the dense one, though they have at least {least:.0f} times fewer parameters: keep "
        f"small layers dense where time is what counts."
    )


def figures(
    trained: Sequence[Trained], grouped: Mapping[str, Sequence[Result]], layer: nn.Module
) -> dict[str, list[str]]:
    """All panels of the page, by the caption they stand over."""
    from examples.demo import plots

    small = (4.6, 3.4)
    made = {
        "language": [
            svg(f"language-{cost}", *small, plots.losses, (trained, cost))
            for cost in ("parameters", "time")
        ],
        "factorization": [svg("factorization", 9.6, 6.2, plots.factorization, layer)],
    }
    for family, members in grouped.items():
        accuracy = svg(f"{family}-accuracy", *small, plots.accuracy, members)
        made[f"{family}-accuracy"] = [accuracy]
        for caption, draw, kinds in (
            ("curves", plots.curves, ("loss", "accuracy")),
            ("costs", plots.costs, ("time", "kept")),
        ):
            made[f"{family}-{caption}"] = [
                svg(f"{family}-{caption}-{kind}", *small, draw, (members, kind)) for kind in kinds
            ]
    return made


def _figure(panels: Sequence[str], caption: str, layout: str = "panels") -> str:
    return (
        f'<figure><div class="{layout}">{"".join(panels)}</div>'
        f"<figcaption>{CAPTIONS[caption]}</figcaption></figure>"
    )


def _table(heads: Sequence[str], rows: str) -> str:
    names = "".join(f"<th>{name}</th>" for name in heads).replace("-\n", "")
    head = f"<thead><tr>{names}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{rows}</tbody></table></div>'


def _row(values: Sequence[str]) -> str:
    return f"<tr><td>{'</td><td>'.join(values)}</td></tr>"


def html(
    trained: Sequence[Trained],
    grouped: Mapping[str, Sequence[Result]],
    settings: Settings,
    images: Sequence[int],
    where: Mapping[str, Any],
    drawn: Mapping[str, Sequence[str]],
) -> str:
    """The report; it refers to nothing outside itself."""
    rows, said = "", ""
    for family, members in grouped.items():
        rows += f"<tr><th>{family}</th></tr>" + "".join(_row(cells(r)) for r in members)
        points = "".join(f"<li>{escape(f)}</li>" for f in findings(members, images[1]))
        said += f"<h3>{family}</h3><ul>{points}</ul>"
        said += _figure([*drawn[f"{family}-accuracy"], *drawn[f"{family}-curves"]], "curves")
        said += _figure(drawn[f"{family}-costs"], "costs")
    place = "".join(
        f'<tr><td>{k}</td><td class="text">{escape(str(v))}</td></tr>' for k, v in where.items()
    )
    quick = settings == Settings.quick(settings.seed)
    warning = "<b>This was a quick run</b>: its numbers do not mean much." if quick else ""
    language_rows_ = "".join(map(_row, language_rows(trained)))
    body = f"""<h1>CP and dense networks, trained from scratch</h1>
<p class="verdict">{escape(verdict(trained))} {escape(digits_verdict(grouped))} {warning}</p>
<h2>A language model</h2>
<p>A small transformer learns to predict the bytes of Python's standard library; its linear layers
are dense, CP or low rank. One seed, {STEPS} steps unless this was a quick run, each contestant
with the best of four learning rates or more; the study in <code>docs/training.md</code> is larger,
with three seeds and more contestants.</p>
{_table(LANGUAGE_COLUMNS, language_rows_)}
{_figure(drawn["language"], "language")}
<h2>Handwritten digits</h2>
<p>A small MLP and a small CNN, trained dense and with CP layers on scikit-learn's digits:
{images[0]:,} training and {images[1]:,} test images of 8 × 8 pixels. Trainings per model:
{settings.runs}, with seeds from {settings.seed} on.</p>
{_table(("model", *COLUMNS), rows)}
<p>Converted are both hidden layers of the MLP, and the second and third convolution of the CNN,
biases included; the ratio is dense parameters over this model's in these layers. Calling such small
layers costs as much as their arithmetic; <code>python -m benchmarks.bench</code> times others.</p>
{said}
<h2>The factorization</h2>{EXPLANATION}{_figure(drawn["factorization"], "factorization", "wide")}
<h2>How it was measured</h2><p>The language model: AdamW, the step's processor time of one thread,
contestants in turns. Digits: Adam with learning rate {settings.learning_rate:g} falling linearly
to zero, batches of {settings.batch}, {settings.mlp_epochs} epochs for MLPs and
{settings.cnn_epochs} for CNNs, the last of which counts; the same batches for every model, of which
none was tuned. The same seed gives the same losses with the same threads, versions and kind of CPU.
Time is the median processor time of {settings.rounds} steps on one batch; the models of a family
take turns. Kept for backward are all tensors that autograd saves from images to loss, without
parameters, images and labels.</p>
<div class="wide"><table><tbody>{place}</tbody></table></div>"""
    return document("polyadic: CP and dense networks, trained from scratch", body, STYLE)
