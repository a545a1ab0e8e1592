"""Write what the stored records of the study say: ``training.md`` and the README's first figure.

Nothing is measured here; the same records give the same text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import between, markdown_rows
from benchmarks.training.layers import parsed
from benchmarks.training.plots import save_figures
from benchmarks.training.results import LEAST_RATES, Contestant, Score
from benchmarks.training.tasks import COSTS, TASKS, Task, equals, front, load, load_all
from polyadic.durable.files import write_text

MARK = "training"
# What counts as the same loss, in nats.
WITHIN = 0.02
README_LAYER = "cp:o3:r64"
# What CP is compared with in the README, by kind: models of plain layers.
PLAIN_WORDS = {"dense": "a narrower dense model", "lowrank": "low rank"}


def write_report(results: Path, docs: Path, readme: Path | None = None) -> list[Path]:
    """Bring ``docs/training.md`` between its markers, and its figures, up to date.

    Args:
        results: folder of the records.
        docs: folder of the page and of ``figures``.
        readme: a page that gets the summary between such markers.

    Returns:
        The files written.

    Raises:
        ValueError: records are not stored, or a page lacks its markers.
        FileNotFoundError: there is no page.
    """
    tasks = load_all(results)
    figures = save_figures(tasks, docs / "figures")
    page = docs / "training.md"
    text = between(
        page.read_text(encoding="utf-8"), MARK, section(tasks, load(results, "language", "cuda"))
    )
    write_text(page, text)
    if readme is None:
        return [*figures, page]
    text = between(readme.read_text(encoding="utf-8"), MARK, summary(tasks[0]))
    write_text(readme, text)
    return [*figures, page, readme]


def section(tasks: Sequence[Task], larger: Task) -> str:
    """All that stands between the page's markers."""
    parts = []
    for task in tasks:
        parts += [f"## {TASKS[task.name]}", where(task), table(task)]
        parts.append(
            f"![Held-out loss over what a contestant costs](figures/training-{task.name}.svg)"
        )
        parts += ["### Does the dense recipe hold?", recipe_table(task), recipe_finding(task)]
        parts += ["### At equal cost", equal_table(task)]
        parts.append("\n".join(f"- {line}" for line in findings(task)))
    parts += ["## Larger, on a GPU", where(larger), larger_table(larger)]
    parts += [
        "With `polyadic.param_groups`, in rates of today: these runs were made when its rates were "
        "divided by √K.",
        larger_recipe_table(larger),
    ]
    return "\n\n".join(parts)


def where(task: Task) -> str:
    """Machine, versions, sizes and commits."""
    env, settings = task.environment, task.environment["settings"]
    machine = settings["gpu"] or f"{' and '.join(task.processors)}, one thread"
    sizes = f"{settings['steps']} steps"
    if task.name == "language":
        sizes += (
            f" of {settings['sequences']}×{settings['length']} bytes, "
            f"{task.dense.blocks} blocks of width {task.dense.width}"
        )
    commits = ", ".join(sorted({str(record["commit"]) for record in task.records}))
    rates = ""
    if "rest" in task.records[0]:
        rest = task.records[0]["rest"]
        rates = (
            " The dense model gains by no higher rate for what no contestant makes, so that each "
            "has one rate for all."
            if rest is None
            else f" What no contestant makes learns at {rest:g} in all of them."
        )
    return (
        f"{sizes}. {machine}, torch {env['torch']}, Python {env['python']}, "
        f"{env['date'][:10]}, commit {commits}.{rates}"
    )


def table(task: Task) -> str:
    """A row per contestant, what a step costs beside its loss."""
    head = [
        "contestant",
        "block parameters",
        "step, ms",
        "MFLOP a step",
        "state, MB",
        "best rate",
        "held-out loss, nats",
        "behind dense",
    ]
    rows = [head]
    for found in task.contestants:
        best, step = found.best, found.step
        rows.append(
            [
                task.named(found),
                f"{found.block_parameters:,}",
                "-" if step is None else f"{step['seconds'] * 1e3:.1f}",
                "-" if step is None else f"{step['flops'] / 1e6:,.0f}",
                "-" if step is None else f"{step['state_bytes'] / 1e6:.2f}",
                rate(best),
                losses(best),
                "-" if found is task.dense else f"{best.mean - task.dense.best.mean:+.3f}",
            ]
        )
    return markdown_rows(rows, "l" + "r" * (len(head) - 1))


def rate(score: Score) -> str:
    """A learning rate, and whether it is that of ``param_groups``."""
    return f"{score.lr:g}{', groups' if score.grouped else ''}"


def losses(score: Score) -> str:
    """Mean over the seeds and its spread, or the loss of the only one."""
    if len(score.losses) == 1:
        return f"{score.mean:.3f} (one seed)"
    return f"{score.mean:.3f} ± {score.spread:.3f}"


def recipe_rows(task: Task) -> list[tuple[Contestant, Score]]:
    """The contestants run with param_groups at the dense model's best rate."""
    lr = task.dense.best.lr
    return [(c, score) for c in task.contestants if (score := c.recipe(lr)) is not None]


def recipe_table(task: Task) -> str:
    """With param_groups at the dense model's best rate, beside the contestant's own best."""
    rows = [
        [
            "contestant",
            "with param_groups at dense's rate",
            "its own best",
            "at rate",
            "behind its best",
        ]
    ]
    for found, score in recipe_rows(task):
        best = found.best
        rows.append(
            [
                task.named(found),
                losses(score),
                losses(best),
                rate(best),
                f"{score.mean - best.mean:.3f}",
            ]
        )
    return markdown_rows(rows, "lrrrr")


def recipe_finding(task: Task) -> str:
    """Whether the dense recipe holds, against the best with groups and with one rate for all."""
    near: list[str] = []
    far: list[str] = []
    open_: list[str] = []
    for found, score in recipe_rows(task):
        behind = score.mean - found.best.mean
        name = f"{task.named(found)} ({behind:.3f})"
        if behind > WITHIN:
            far.append(name)
        elif len(found.runs) < LEAST_RATES:
            open_.append(name)
        else:
            near.append(name)
    dense = task.dense.best
    unsure = (
        f" The dense model's own losses spread by {dense.spread:.3f} nats over its seeds at that "
        "rate, which is more than that bound: so few steps tell little about a recipe."
        if dense.spread > WITHIN
        else ""
    )
    return (
        f"At {dense.lr:g}, the dense model's best rate, with `polyadic.param_groups`. "
        f"Within {WITHIN:g} nats of their own best: {'; '.join(near) or 'none'}. "
        f"Not: {'; '.join(far) or 'none'}. "
        f"Within it, but swept with groups alone: {'; '.join(open_) or 'none'}.{unsure}"
    )


def equal_table(task: Task) -> str:
    """Who costs what the CP contestants cost, and by how much its loss differs."""
    rows = [["of", "equal in", "beside it, and the difference of its loss in nats"]]
    for one in task.contestants:
        if one.kind != "cp":
            continue
        for cost in COSTS:
            others = [c for c in equals(task, one, cost) if c.kind != "cp"]
            if others:
                listed = "; ".join(
                    f"{task.named(c)} {c.best.mean - one.best.mean:+.3f}" for c in others
                )
                rows.append([f"{task.named(one)} ({one.best.mean:.3f})", cost, listed])
    return markdown_rows(rows, "lll") if len(rows) > 1 else "No other layer costs as much as CP."


def findings(task: Task) -> list[str]:
    """What the numbers support, whichever way they fall."""
    dense = task.dense
    found = []
    for cost in COSTS:
        won: list[float] = []
        lost: list[float] = []
        for one in task.contestants:
            if one.kind != "cp":
                continue
            for other in equals(task, one, cost):
                if other.kind != "cp":
                    behind = other.best.mean - one.best.mean
                    (won if behind > 0 else lost).append(behind)
        if won or lost:
            found.append(
                f"Of equal {cost} CP is better in {len(won)} of {len(won) + len(lost)} comparisons "
                f"with other layers (differences of {min(won + lost):+.3f} to "
                f"{max(won + lost):+.3f} nats)."
            )
    found += [
        f"By {cost}, nothing cheaper has a smaller loss than: {'; '.join(names)}."
        for cost in COSTS
        if (names := [task.named(c) for c in front(task, cost)])
    ]
    if (best := task.best_cp) is not None:
        found.append(
            f"The best CP contestant of all, {task.named(best)}, is "
            f"{apart(best.best.mean, dense.best.mean)} the dense model, with "
            f"{times(dense.block_parameters, best.block_parameters)} fewer block parameters"
            f"{timed(best, dense)}."
        )
    return found


def apart(loss: float, other: float, digits: int = 3) -> str:
    """``0.120 nats behind``, or ahead of."""
    return f"{abs(loss - other):.{digits}f} nats {'behind' if loss > other else 'ahead of'}"


def times(more: float, less: float) -> str:
    """A ratio to be read before "fewer"."""
    ratio = more / less
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def timed(one: Contestant, dense: Contestant) -> str:
    """What a step takes beside the dense model's, where both were timed."""
    if one.step is None or dense.step is None:
        return ""
    return f" at {one.step['seconds'] / dense.step['seconds']:.2f} of its step time"


def summary(task: Task) -> str:
    """The README's: what CP buys from scratch, and where it loses."""
    dense, one, best = task.dense, task.of(README_LAYER), task.best_cp
    if one is None or best is None:
        raise ValueError(f"the records lack {README_LAYER}; run on")
    loss = one.best.mean
    format_, _, inside = task.named(one).partition(", ")
    first = (
        f"Trained from scratch, a small byte-level language model with {format_} layers ({inside}) "
        f"has {times(dense.block_parameters, one.block_parameters)} fewer parameters in its blocks "
        f"than the dense one{timed(one, dense)}, and ends {apart(loss, dense.best.mean, 2)} it "
        f"({loss:.2f} against {dense.best.mean:.2f})."
    )
    rivals = [c for c in equals(task, one, "block parameters") if c.kind in PLAIN_WORDS]
    quick = [
        c
        for c in task.contestants
        if c.kind in PLAIN_WORDS
        and c is not dense
        and c.step
        and one.step
        and c.step["seconds"] <= one.step["seconds"]
    ]
    compared = []
    if rivals:
        beside = [f"{PLAIN_WORDS[c.kind]} is {apart(c.best.mean, loss, 2)} it" for c in rivals]
        compared.append(f"with as few parameters, {' and '.join(beside)}")
    if quick:
        other = min(quick, key=lambda c: c.best.mean)
        compared.append(
            f"of models whose steps take no longer, the best, {PLAIN_WORDS[other.kind]}, is "
            f"{apart(other.best.mean, loss, 2)} it"
        )
    second = "; ".join(compared)
    reached = best.best.mean <= dense.best.mean + WITHIN
    seeds = len(dense.best.losses)
    third = (
        ("A CP model reaches" if reached else "No CP model measured reaches")
        + f" the dense loss ({'one seed' if seeds == 1 else f'{seeds} seeds'}, each model at its "
        "own best learning rate: [docs/training.md](docs/training.md))."
    )
    lines = [first, *([f"{second[0].upper()}{second[1:]}."] if second else []), third]
    picture = "![Held-out loss over parameters and step time](docs/figures/training-readme.svg)"
    return " ".join(lines) + "\n\n" + picture


def larger_table(task: Task) -> str:
    """The sweeps without groups of a larger model."""
    rows = [["contestant", "block parameters", "best rate", "held-out loss, nats", "behind dense"]]
    plain = [
        (c, min(by_rate, key=lambda s: s.mean))
        for c in task.contestants
        if (by_rate := [s for s in c.scores if not s.grouped])
    ]
    for found, best in plain:
        rows.append(
            [
                task.named(found),
                f"{found.block_parameters:,}",
                rate(best),
                losses(best),
                "-" if found is task.dense else f"{best.mean - task.dense.best.mean:+.3f}",
            ]
        )
    return markdown_rows(rows, "lrrrr")


def larger_recipe_table(task: Task) -> str:
    """Runs with groups of the rule that divided by √K, by the rates that give the same today."""
    dense = task.dense.best
    rows = [
        [
            "contestant",
            "held-out loss at rate",
            "of these nearest to dense's best rate",
            "behind its own best",
        ]
    ]
    for found in task.contestants:
        if not any(score.grouped for score in found.scores):
            continue
        factors = 2 * parsed(found.layer)[1]["o"]
        today = {lr / math.sqrt(factors): by_seed[0] for lr, by_seed in found.grouped.items()}
        nearest = min(today, key=lambda lr: abs(math.log(lr / dense.lr)))
        rows.append(
            [
                task.named(found),
                "; ".join(f"{loss:.3f} at {lr:.2g}" for lr, loss in today.items()),
                f"{nearest:.2g}",
                f"{today[nearest] - found.best.mean:.3f}",
            ]
        )
    return markdown_rows(rows, "llrr")
