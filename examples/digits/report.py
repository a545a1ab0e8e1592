"""The report as one self-contained HTML file, and the table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from examples.digits.findings import families, findings
from examples.digits.training import ModelResult, Settings
from polyadic.compression.html import document, figure

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = """
<thead>
<tr><th></th><th colspan="3" class="group">parameters</th><th class="group">test accuracy</th>
<th colspan="2" class="group">training step</th><th colspan="2" class="group">kept for backward</th>
</tr>
<tr><th>model</th><th>whole model</th><th>converted layers</th><th>ratio</th>
<th>% (range)</th><th>ms</th><th>× dense</th><th>KiB</th><th>× dense</th></tr>
</thead>
"""

_EXPLANATION = """
<p>A linear layer multiplies by a matrix <i>W</i> of <i>M</i> × <i>N</i> weights. A CP layer
(CP: canonical polyadic decomposition) reads <i>M</i> and <i>N</i> as products of small
<b>modes</b>, <i>M</i> = m<sub>1</sub>⋯m<sub>D</sub> and
<i>N</i> = n<sub>1</sub>⋯n<sub>D</sub>, so that <i>W</i> is a tensor of 2<i>D</i> modes, and writes
this tensor as a sum of <i>R</i> outer products. <i>R</i> is the <b>rank</b>. The vectors of one
mode, side by side, are a <b>factor</b>: A<sub>d</sub> of m<sub>d</sub> × <i>R</i> for the in-modes,
C<sub>d</sub> of n<sub>d</sub> × <i>R</i> for the out-modes. Only the factors are stored and
trained: <i>R</i>(Σm<sub>d</sub> + Σn<sub>d</sub>) numbers in place of <i>MN</i>.</p>
<p class="formula">W =
(A<sub>1</sub> ⊙ ⋯ ⊙ A<sub>D</sub>) (C<sub>1</sub> ⊙ ⋯ ⊙ C<sub>D</sub>)<sup>T</sup>
= Σ<sub>r</sub> (A<sub>1</sub>[:,r] ⊗ ⋯ ⊗ A<sub>D</sub>[:,r])
(C<sub>1</sub>[:,r] ⊗ ⋯ ⊗ C<sub>D</sub>[:,r])<sup>T</sup></p>
<p>⊗ is the Kronecker product, ⊙ the <b>Khatri-Rao product</b>, which is ⊗ column by column. So
<i>W</i> has matrix rank at most <i>R</i>, and forward and backward need products with the two thin
Khatri-Rao matrices alone; <i>W</i> is not formed where that costs more. A convolution is treated
alike, with out-modes, in-modes and the two modes of the kernel.</p>
"""

CAPTIONS = {
    "curves": (
        "Mean training loss of each epoch, and test accuracy after it. Lines are means over the "
        "seeds, bands the range from the lowest to the highest."
    ),
    "accuracy-parameters": (
        "Test accuracy after the last epoch against the parameters of the whole model. Points are "
        "means over the seeds, bars the range from the lowest to the highest."
    ),
    "costs": (
        "Time of one training step (forward, backward and Adam), and bytes kept for backward by "
        "one training batch. The two families have scales of their own."
    ),
    "factors": (
        "First hidden layer of the MLP with CP layers of rank {rank}, trained. Its in-modes are "
        "the rows and columns of the image, so A₁ and A₂ are weights of rows and of columns. Each "
        "factor and product is drawn in colours from minus to plus its own largest magnitude, "
        "white at zero, W to the 99.5th percentile of magnitudes; components are in order of "
        "falling norm. The dense matrix at the right is the product of the third column's two "
        "matrices: {dense:,} weights that {stored:,} stored numbers stand for. The break-even "
        "rank of this layer, above which products with the factors take more multiplications "
        "than with the dense matrix, is {break_even}."
    ),
    "rank-one-sum": (
        "The same layer as a sum of {rank} parts of rank one, of which the three of largest norm "
        "are shown, with one colour scale throughout; norms are relative to that of W. Below: each "
        "component's in-side as an image, itself of rank one, and the relative error of W "
        "(Frobenius norm) when only the first parts are added."
    ),
}

_ALT = {
    "curves": "Curves of training loss and test accuracy",
    "accuracy-parameters": "Test accuracy against number of parameters",
    "costs": "Bars of time per training step and of bytes kept for backward",
    "factors": "Heat maps of the factors, their Khatri-Rao products and the dense matrix",
    "rank-one-sum": "Heat maps of the dense matrix as a sum of rank-one parts",
}


def html(
    results: Sequence[ModelResult],
    settings: Settings,
    images: tuple[int, int],
    environment: Mapping[str, str],
    plots: Mapping[str, bytes],
    captions: Mapping[str, str],
    quick: bool,
) -> str:
    """Write the report; it refers to nothing outside itself.

    Args:
        results: Models of all families, the dense one first in each.
        settings: Schedule they were trained with.
        images: Numbers of training and of test images.
        environment: Names and values that describe machine and versions.
        plots: PNGs by name; the names of ``CAPTIONS``.
        captions: Captions by the same names.
        quick: Whether the run was shortened, which the report then says.

    Returns:
        An HTML document.
    """
    seeds = [curve.seed for curve in results[0].curves]
    trainings = (
        f"{len(seeds)} trainings each, with seeds {seeds[0]} to {seeds[-1]}"
        if len(seeds) > 1
        else f"one training each, with seed {seeds[0]}"
    )
    warning = (
        "<p><b>This was a quick run:</b> too few epochs for the accuracies to mean much, "
        "and too few rounds for exact times.</p>"
        if quick
        else ""
    )
    figures = {name: figure(_ALT[name], png, captions[name]) for name, png in plots.items()}
    found = "".join(
        f"<h3>{escape(family)}</h3><ul>{_items(sentences)}</ul>"
        for family, sentences in findings(results, images[1]).items()
    )
    where = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
        for name, value in environment.items()
    )
    body = f"""<h1>CP and dense layers on handwritten digits</h1>
<p class="lead">A small MLP and a small CNN, trained dense and with CP-factorized layers on
scikit-learn's digits: {images[0]:,} training and {images[1]:,} test images of 8 × 8 pixels,
one fixed stratified split; {trainings}.</p>
{warning}
<h2>Results</h2>
<div class="scroll">
<table>{_HEADINGS}<tbody>{_rows(results)}</tbody></table>
</div>
<p>“Converted layers” are both hidden layers of the MLP, and the second and third convolution of
the CNN, biases included; “ratio” is dense parameters over this model's in those layers. All other
layers are dense everywhere.</p>
<h2>What this says</h2>
{found}
<p>These layers are small, so that the cost of each call counts beside the arithmetic that a
factorization saves. For times at other sizes, run <code>python -m benchmarks.bench</code>.</p>
<h2>Accuracy against parameters</h2>
{figures["accuracy-parameters"]}
<h2>Training</h2>
{figures["curves"]}
<h2>Cost of a training step</h2>
{figures["costs"]}
<h2>The factorization</h2>
{_EXPLANATION}
{figures["factors"]}
{figures["rank-one-sum"]}
<h2>How it was measured</h2>
{_method(settings)}
<h3>Environment</h3>
<table class="plain"><tbody>{where}</tbody></table>"""
    return document("polyadic demo: CP and dense layers on digits", body)


def _items(sentences: Mapping[str, str]) -> str:
    return "".join(
        f"<li><b>{escape(subject)}.</b> {escape(sentence)}</li>"
        for subject, sentence in sentences.items()
    )


def _method(settings: Settings) -> str:
    return f"""<ul>
<li><b>Training.</b> Adam with learning rate {settings.learning_rate:g} falling linearly to zero,
batches of {settings.batch}, {settings.mlp_epochs} epochs for the MLPs and
{settings.cnn_epochs} for the CNNs, cross-entropy; the same batches in the same order for every
model. Nothing was tuned for one model, and no epoch was chosen by its test accuracy: what counts
is the last.</li>
<li><b>Repeatable.</b> The same seed gives bitwise the same losses and accuracies with the same
number of threads, versions and kind of CPU. Times differ from run to run.</li>
<li><b>Time.</b> Median of {settings.rounds} training steps (zeroing gradients, forward, backward,
Adam) on one batch; the models of a family take turns within each round, so that a slow moment of
the machine falls on all. In the plot, quartiles.</li>
<li><b>Kept for backward.</b> Exact: all tensors that autograd saves from the images to the loss of
one batch, each storage counted once with its full size, without parameters, buffers, images and
labels. Memory in use only during a call is not in it.</li>
</ul>"""


def _rows(results: Sequence[ModelResult]) -> str:
    rows = []
    for family, members in families(results).items():
        dense = members[0]
        rows.append(f'<tr class="family"><td colspan="9">{escape(family)}</td></tr>')
        for result in members:
            cells = (
                escape(result.contestant.label),
                f"{result.parameters:,}",
                f"{result.converted_parameters:,}",
                f"{result.compression:.1f}",
                _accuracy_cell(result),
                f"{1e3 * result.time.median:.2f}",
                f"{result.time.median / dense.time.median:.2f}",
                f"{result.kept_bytes / 1024:,.1f}",
                f"{result.kept_bytes / dense.kept_bytes:.2f}",
            )
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


def _accuracy_cell(result: ModelResult) -> str:
    low, high = 100 * min(result.accuracies), 100 * max(result.accuracies)
    spread = f"<small>{low:.1f}–{high:.1f}</small>" if len(result.accuracies) > 1 else ""
    return f"{100 * result.accuracy:.1f}{spread}"


def table(results: Sequence[ModelResult]) -> Table:
    """Make the table for the terminal, 80 columns wide.

    Args:
        results: Models of all families, the dense one first in each.

    Returns:
        A rich table.
    """
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("\nmodel", no_wrap=True)
    for heading in (
        "\nparameters",
        "in con-\nverted",
        "\nratio",
        "accuracy\n(%)",
        "step\n(ms)",
        "kept\n(KiB)",
    ):
        made.add_column(heading, justify="right", no_wrap=True)
    for family, members in families(results).items():
        made.add_row(family, style="bold")
        for result in members:
            made.add_row(
                f"  {result.contestant.label}",
                f"{result.parameters:,}",
                f"{result.converted_parameters:,}",
                f"{result.compression:.1f}",
                f"{100 * result.accuracy:.1f}",
                f"{1e3 * result.time.median:.2f}",
                f"{result.kept_bytes / 1024:,.0f}",
            )
        made.add_section()
    return made
