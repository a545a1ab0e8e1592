"""What was found: the table for the terminal, and a report that is one self-contained HTML page."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from math import sqrt
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from examples.digits.models import NARROW_LIKE_RANK
from examples.digits.training import Result, Settings

COLUMNS = ("parameters", "in con-\nverted", "ratio", "accuracy\n(%)", "step\n(ms)", "kept\n(KiB)")
CSS = """body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 16px/1.5 sans-serif; }
table { border-collapse: collapse; } th, td { padding: .3rem .7rem; text-align: right; }
td { border-bottom: 1px solid #ddd; } td:first-child, th:first-child { text-align: left; }
figure { margin: 1rem 0; } img { width: 100%; } figcaption { color: #555; }"""
EXPLANATION = """<p>A linear layer multiplies by a matrix <i>W</i> of M × N weights. A CP layer
(CP: canonical polyadic decomposition) reads M and N as products of small <b>modes</b> and <i>W</i>
as a sum of R outer products of one vector per mode: W = (A₁ ⊙ A₂) (C₁ ⊙ C₂)ᵀ. R is the <b>rank</b>;
the vectors of a mode, side by side, are a <b>factor</b>, and these numbers alone are stored. ⊙ is
the <b>Khatri-Rao product</b>, the Kronecker product column by column. Forward and backward multiply
by the two thin matrices; <i>W</i> is not formed where that costs more.</p>"""
CAPTIONS = {
    "accuracy-parameters": "Test accuracy after the last epoch against the parameters of the whole "
    "model: mean over the seeds, and range.",
    "curves": "Mean training loss of each epoch, and test accuracy after it: mean over the seeds, "
    "and range.",
    "costs": "Time of a training step (forward, backward and Adam), and bytes kept for backward by "
    "one training batch.",
    "factorization": "The first hidden layer of the MLP of CP rank 16, trained. Its in-modes are "
    "the rows and columns of the image: A₁ weighs rows, A₂ columns. Each matrix has its own "
    "colours, white at zero. Below, the same layer as a sum of parts of rank one, of which the "
    "three of largest norm are shown, with their norms relative to that of W; and the relative "
    "error of W (Frobenius norm) when only the first parts are added.",
}


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


def html(
    grouped: Mapping[str, Sequence[Result]],
    settings: Settings,
    images: Sequence[int],
    where: Mapping[str, Any],
    plots: Mapping[str, bytes],
) -> str:
    """The report; it refers to nothing outside itself."""
    rows, said, figure = "", "", {}
    for family, members in grouped.items():
        rows += f"<tr><th>{family}</th></tr>"
        rows += "".join(f"<tr><td>{'</td><td>'.join(cells(r))}</td></tr>" for r in members)
        points = "".join(f"<li>{escape(f)}</li>" for f in findings(members, images[1]))
        said += f"<h3>{family}</h3><ul>{points}</ul>"
    for name, png in plots.items():
        source = f"data:image/png;base64,{b64encode(png).decode()}"
        image = f'<img alt="{name}" src="{source}">'
        figure[name] = f"<figure>{image}<figcaption>{CAPTIONS[name]}</figcaption></figure>"
    heads = "".join(f"<th>{name}</th>" for name in ("model", *COLUMNS)).replace("-\n", "")
    place = "".join(f"<tr><td>{k}</td><td>{escape(str(v))}</td></tr>" for k, v in where.items())
    quick = settings == Settings.quick(settings.seed)
    warning = "<b>This was a quick run</b>: its numbers do not mean much." if quick else ""
    return f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<title>polyadic: CP and dense layers on digits</title><style>{CSS}</style></head><body>
<h1>CP and dense layers on handwritten digits</h1>
<p>A small MLP and a small CNN, trained dense and with CP layers on scikit-learn's digits:
{images[0]:,} training and {images[1]:,} test images of 8 × 8 pixels. Trainings per model:
{settings.runs}, with seeds from {settings.seed} on. {warning}</p>
<h2>What this says</h2>{said}
<h2>Results</h2><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>
<p>Converted are both hidden layers of the MLP, and the second and third convolution of the CNN,
biases included; the ratio is dense parameters over this model's in these layers. Calling such small
layers costs as much as their arithmetic; <code>python -m benchmarks.bench</code> times others.</p>
<h2>Accuracy and cost</h2>{figure["accuracy-parameters"]}{figure["curves"]}{figure["costs"]}
<h2>The factorization</h2>{EXPLANATION}{figure["factorization"]}
<h2>How it was measured</h2><p>Adam with learning rate {settings.learning_rate:g} falling linearly
to zero, batches of {settings.batch}, {settings.mlp_epochs} epochs for MLPs and
{settings.cnn_epochs} for CNNs, the last of which counts; the same batches for every model, of which
none was tuned. The same seed gives the same losses with the same threads, versions and kind of CPU.
Time is the median of {settings.rounds} steps on one batch; the models of a family take turns. Kept
for backward are all tensors that autograd saves from images to loss, without parameters, images and
labels.</p>
<table><tbody>{place}</tbody></table></body></html>
"""
