"""``python -m benchmarks.bench.tuned``: is a tuned layer as fast as the best plan it could follow.

In each cell of the grid a layer is tuned by ``polyadic.tune``, then every forced plan is timed, and
then four contestants more closely: the layer, the best forced plan, and twice the plan that the
layer follows now, which says how far two measurements of the same thing lie apart. One thread, in
seconds of that thread. Cells that the file has are left out, so that this can be stopped at any
time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import thread_time
from typing import Any

import torch

import polyadic
from benchmarks.bench.cases import MODES, Case, Mode, select
from benchmarks.bench.contestants import contestants
from benchmarks.bench.measure import Gate, Patience, time_interleaved
from benchmarks.bench.plans import plan_name, short_name
from benchmarks.bench.problem import Built, Contestant, Problem
from benchmarks.bench.run import QUICK, admit, step_of
from benchmarks.pages import between, markdown_rows
from benchmarks.records import TOLERANCE, Record, append, environment, read
from polyadic.durable.files import write_text

FILE, MARK = "tuned.jsonl", "tuned"
ALLOWED = 1.05
CLOSELY = Patience(seconds=0.6, repeats=25, limit=6.0, close=2.0)
LAYER, BEST, PLAN, AGAIN = "layer", "best", "plan", "again"


def compare(case: Case, mode: Mode) -> Record:
    """Tune the layer of a cell, and time it beside the best forced plan.

    Args:
        case: the cell.
        mode: ``"forward"`` or ``"training"``.

    Returns:
        A record of kind ``tuned``: names of plans and median seconds.
    """
    problem = Problem.draw(case, torch.float32, "cpu")
    gate, every = Gate(problem), contestants(case)
    polyadic.untune(stored=False)
    ours = _built(every[0], problem, gate)
    assert isinstance(ours.forward, torch.nn.Module)
    report = polyadic.tune(ours.forward, ours.x.detach(), training=mode == "training")
    (found,) = report.layers
    before: Any = found.before
    after: Any = found.after
    plans = {c.name: c for c in every if c.family == "plan"}
    forced = {name: _built(c, problem, gate) for name, c in plans.items()}
    searched = time_interleaved(
        {name: step_of(built, mode, problem) for name, built in forced.items()},
        QUICK,
        clock=thread_time,
    )
    medians = {name: statistics.median(timing.samples) for name, timing in searched.items()}
    best = min(medians, key=medians.__getitem__)
    # How a plan is forced on the layer is the same function for every plan.
    build: Any = next(iter(plans.values())).build
    own = partial(build.func, problem, plan=after)
    closely = {LAYER: ours, BEST: forced[best], PLAN: own(), AGAIN: own()}
    times = time_interleaved(
        {name: step_of(built, mode, problem) for name, built in closely.items()},
        CLOSELY,
        clock=thread_time,
    )
    seconds = {name: statistics.median(timing.samples) for name, timing in times.items()}
    polyadic.untune(stored=False)
    return {
        "kind": "tuned",
        "cell": case.name,
        "title": case.title,
        "mode": mode,
        "threads": 1,
        "before": plan_name(before),
        "after": plan_name(after),
        "best": short_name(best),
        "plans": len(forced),
        "seconds": seconds,
        "repeats": len(times[LAYER].samples),
    }


def _built(contestant: Contestant, problem: Problem, gate: Gate) -> Built:
    built, found = admit(contestant, problem, gate, torch.float32)
    if built is None:
        raise ValueError(f"{contestant.name} is not let in: {found['reason']}")
    return built


def ratio(record: Record) -> float:
    """The layer's time over the best forced plan's."""
    return float(record["seconds"][LAYER] / record["seconds"][BEST])


def noise(record: Record) -> float:
    """How far apart two measurements of one plan are, as a ratio of at least one."""
    a, b = record["seconds"][PLAN], record["seconds"][AGAIN]
    return float(max(a, b) / min(a, b))


def section(records: Sequence[Record]) -> str:
    """What a page says of the records."""
    # Of a cell that was measured again, the newest.
    every = [r for r in records if r["kind"] == "tuned"]
    found = [*{(r["cell"], r["mode"]): r for r in every}.values()]
    earlier = [r for r in every if not any(r is newest for newest in found)]
    where = next(r for r in records if r["kind"] == "environment")
    worst = sorted(found, key=ratio, reverse=True)
    held = sum(ratio(r) <= ALLOWED for r in found)
    floors = sorted(map(noise, found))
    changed = sum(r["before"] != r["after"] for r in found)
    text = (
        f"Tuned on one thread of the {where['cpu']}, in {len(found)} cells (layers forward, and "
        f"forward and backward): **at most {ALLOWED} × the best forced plan in {held} of "
        f"{len(found)}**; the worst is {worst[0]['title']}, {worst[0]['mode']}, with "
        f"{ratio(worst[0]):.3f}. One plan timed twice in the same way gives ratios of up to "
        f"{floors[-1]:.3f} (median {statistics.median(floors):.3f}). {changed} of {len(found)} "
        f"plans were changed by tuning."
    )
    if earlier:
        text += (
            f" {len(earlier)} of the cells were measured a second time, when tuning had been made "
            f"to last longer; the first time the worst of these "
            f"had {max(map(ratio, earlier)):.3f}."
        )
    text += " The cells with the largest ratios:"
    rows: list[Sequence[str]] = [
        ("cell", "tuned plan", "best forced plan", "over the best", "one plan over itself")
    ]
    for r in worst[:8]:
        cell = f"{r['title']}, {r['mode']}"
        rows.append((cell, r["after"], r["best"], f"{ratio(r):.3f}", f"{noise(r):.3f}"))
    return f"{text}\n\n{markdown_rows(rows, 'lllrr')}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.bench.tuned", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="cells by name, or by a part of it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--again", action="store_true", help="cells that are there, too")
    parser.add_argument("--report", action="store_true", help="write docs/benchmarks.md alone")
    options = parser.parse_args(arguments)
    path: Path = options.out / FILE
    if options.report:
        page = Path("docs/benchmarks.md")
        text = page.read_text(encoding="utf-8")
        write_text(page, between(text, MARK, section(read(path))))
        return
    torch.set_num_threads(1)
    # See ``benchmarks.bench.run``: an allocator as after a while.
    torch.ones(2**25 - 2**20, dtype=torch.uint8)
    known: list[Any] = read(path, growing=True) if path.exists() else []
    if not known or options.again:
        start = environment(torch.device("cpu"), torch.float32)
        append(path, {**start, "tolerance": TOLERANCE[torch.float32]})
    done = {(r["cell"], r["mode"]) for r in known if r["kind"] == "tuned"}
    for case in select(only=options.only):
        for mode in MODES:
            if case.group != "grid" or ((case.name, mode) in done and not options.again):
                continue
            record = compare(case, mode)
            append(path, record)
            print(
                f"{case.name} {mode}: {ratio(record):.3f} of the best, noise {noise(record):.3f}; "
                f"{record['after']} against {record['best']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
