"""What the records say about each goal on a GPU: how many cells meet it, and which do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.gpu.records import Run
from benchmarks.records import Record

OURS, ATEN, DENSE = "polyadic", "polyadic, no kernels", "dense"
# Times closer than this are no disagreement between prediction and measurement.
CLOSE = 1.2

# What limits a goal that the stored runs missed, and the phases to run first. All of these speak of
# changes that no run has timed in a layer yet, though each kernel was timed alone; whoever stores a
# run writes them anew.
BYTES_FIRST = (
    "The products take most of it, at the bandwidths in the table of thin products. Since then one "
    "kernel makes the gradients of both matrices for up to 64 columns: alone it took 36 µs for "
    "8192 rows of 4096 features, where two products take 45; and the kernel of the factors' "
    "gradients took half its time, at R = 256 a third. First: `--phases ceilings,layers-4096,"
    "layers-8192`. At R = 256 the FLOPs of the products alone take 1.4 times the byte floor."
)
EAGER_FIRST = (
    "A step waits for the processor, which spends less than half of its time on starting kernels: "
    "the phase `overhead` takes it apart. The way of a step was rebuilt since then. Eight starts, "
    "and what autograd takes for a function that does nothing, are more than this goal leaves "
    "where an operation takes so long; a graph is what helps. First: `--phases ceilings,overhead,"
    "layers-4096`."
)
DECODE_FIRST = (
    "Layers did not take the kernel for few rows, because their plans keep Z; without gradients "
    "nothing is kept since then. Alone that kernel took 2.6 to 6.6 µs for these cells. First: "
    "`--phases decode`."
)
EMBEDDING_FIRST = (
    "Each tile of indices made its part of KC again; since then a program makes it once for "
    "several tiles. Alone that took 8.8 µs for 8192 indices and 47 for 65,536, where dense took "
    "8.9 and 51. First: `--phases embedding`."
)
CONV_FIRST = (
    "At 128 channels the two GEMMs take as long as cuDNN's whole convolution, because there are "
    "more maps than channels at this rank. If fewer maps are no way out, let one kernel make the "
    "in-projection of a strip and the stage on it, which finds the strip in the cache."
)


@dataclass(frozen=True)
class Goal:
    """A demand and how the records meet it.

    Args:
        text: the demand.
        met: cells that meet it.
        of: cells it was judged on; 0 where the records have none.
        worst: the figure of the cell that is furthest from it, and the cell.
        misses: each cell that does not meet it, with its figure.
        first: where it was missed, what limits it, and what the next run on a GPU is to begin with.
    """

    text: str
    met: int
    of: int
    worst: str
    misses: tuple[str, ...]
    first: str = ""

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"`` or ``"not measured"``."""
        return "not measured" if not self.of else "met" if self.met == self.of else "missed"


def goals(run: Run) -> list[Goal]:
    """Judge every goal."""
    judge = _Judge(run)
    found = [
        judge.at_most(
            "training step in a graph ≤ 1.6 × the byte floor, d ≥ 4096, T = 8192",
            1.6,
            judge.cells("linear", T=8192, least=4096),
            lambda c: judge.over_bytes(c, "training"),
            first=BYTES_FIRST,
        ),
        judge.at_least(
            "training step in a graph ≥ 4 × as fast as dense, 4096², T ≥ 2048, R ≤ 64",
            4,
            judge.cells("linear", square=4096, rows=2048, most_rank=64),
            lambda c: judge.gain(c, "training", "graph"),
        ),
        judge.at_least(
            "training step in a graph ≥ 8 × as fast as dense, 8192², T ≥ 2048, R ≤ 64",
            8,
            judge.cells("linear", square=8192, rows=2048, most_rank=64),
            lambda c: judge.gain(c, "training", "graph"),
        ),
        judge.at_least(
            "eager training step ≥ 2.5 × as fast as dense, 4096², T = 2048, R ≤ 64",
            2.5,
            judge.cells("linear", square=4096, T=2048, most_rank=64),
            lambda c: judge.gain(c, "training", "eager"),
            first=EAGER_FIRST,
        ),
        judge.at_most(
            "one token in a graph ≤ 7 µs, R ≤ 64",
            7.0,
            judge.cells(group="decode", T=1, most_rank=64),
            lambda c: judge.microseconds(c, "forward"),
            "{:.1f} µs",
            first=DECODE_FIRST,
        ),
    ]
    for mode in ("forward", "training"):
        found += _beside_torch(judge, mode)
    return [
        *found,
        judge.explained(),
        judge.checks("gradients are the same bits in 20 runs", "repeats"),
        judge.checks("the replay of a graph gives the bits of the eager step", "graph"),
        judge.checks("the host waits for the GPU nowhere in a step", "no waiting"),
        judge.checks("errors ≤ twice plain torch's, nothing left unwritten", "values"),
        judge.checks("exact on small integers", "exact"),
        judge.checks("kernels by their own table", "kernel"),
    ]


def _beside_torch(judge: _Judge, mode: str) -> list[Goal]:
    """Embedding and convolution, in one pass."""

    def dense(cell: Record) -> float | None:
        return judge.gain(cell, mode, "graph")

    def aten(cell: Record) -> float | None:
        return judge.gain(cell, mode, "graph", ATEN)

    convs = judge.cells("conv")
    wide = [cell for cell in convs if cell["in"] >= 128]
    return [
        judge.at_least(
            f"embedding, {mode} in a graph no slower than nn.Embedding from 2048 tokens",
            1,
            judge.cells("embedding", rows=2048),
            dense,
            first=EMBEDDING_FIRST,
        ),
        judge.at_least(
            f"convolution, {mode} in a graph ≥ 2 × as fast as without our kernels",
            2,
            convs,
            aten,
            first=CONV_FIRST,
        ),
        judge.at_least(
            f"convolution, {mode} in a graph ≥ cuDNN's dense from 128 channels",
            1,
            wide,
            dense,
            first=CONV_FIRST,
        ),
    ]


class _Judge:
    def __init__(self, run: Run) -> None:
        self.run = run

    def cells(
        self,
        group: str,
        *,
        T: int | None = None,
        rows: int = 0,
        least: int = 0,
        square: int | None = None,
        most_rank: int | None = None,
    ) -> list[Record]:
        """Cells of a group with T rows (or at least so many), features and a rank."""
        return [
            cell
            for cell in self.run.cells.values()
            if cell["group"] == group
            and (T is None or cell["T"] == T)
            and (rows == 0 or cell["T"] >= rows)
            and (least == 0 or min(cell["in"], cell["out"]) >= least)
            and (square is None or cell["in"] == cell["out"] == square)
            and (most_rank is None or cell["rank"] <= most_rank)
        ]

    def microseconds(self, cell: Record, mode: str, launch: str = "graph") -> float | None:
        """Of our layer."""
        seconds = self.run.seconds(cell["cell"], mode, launch, OURS)
        return None if seconds is None else 1e6 * seconds

    def over_bytes(self, cell: Record, mode: str) -> float | None:
        """Our time in a graph over the byte floor."""
        seconds = self.run.seconds(cell["cell"], mode, "graph", OURS)
        if seconds is None:
            return None
        return seconds / float(self.run.floor(cell["cell"], mode)["byte_seconds"])

    def gain(self, cell: Record, mode: str, launch: str, over: str = DENSE) -> float | None:
        """Another's time over ours."""
        ours, theirs = (self.run.seconds(cell["cell"], mode, launch, who) for who in (OURS, over))
        return None if ours is None or theirs is None else theirs / ours

    def at_most(
        self,
        text: str,
        limit: float,
        cells: Iterable[Record],
        value: Callable[[Record], float | None],
        shown: str = "{:.2f}×",
        first: str = "",
    ) -> Goal:
        """Every cell's value is at most the limit."""
        return self._judged(text, cells, value, lambda v: v <= limit, max, shown, first)

    def at_least(
        self,
        text: str,
        limit: float,
        cells: Iterable[Record],
        value: Callable[[Record], float | None],
        shown: str = "{:.2f}×",
        first: str = "",
    ) -> Goal:
        """Every cell's value is at least the limit."""
        return self._judged(text, cells, value, lambda v: v >= limit, min, shown, first)

    @staticmethod
    def _judged(
        text: str,
        cells: Iterable[Record],
        value: Callable[[Record], float | None],
        good: Callable[[float], bool],
        worst: Callable[..., tuple[float, str]],
        shown: str,
        first: str,
    ) -> Goal:
        values = [(v, cell["title"]) for cell in cells if (v := value(cell)) is not None]
        misses = tuple(f"{title}: {shown.format(v)}" for v, title in values if not good(v))
        furthest = ""
        if values:
            v, title = worst(values)
            furthest = f"{shown.format(v)} ({title})"
        return Goal(text, len(values) - len(misses), len(values), furthest, misses, first)

    def explained(self) -> Goal:
        """Where one of dense and ours is clearly faster, the cost model says so."""
        misses, count = [], 0
        for cell in self.cells("linear"):
            timed = self.run.timed(cell["cell"], "training", "eager")
            if OURS not in timed or DENSE not in timed or timed[DENSE]["predicted"] is None:
                continue
            if timed[OURS]["predicted"] is None:
                continue
            measured = timed[DENSE]["median"] / timed[OURS]["median"]
            predicted = timed[DENSE]["predicted"] / timed[OURS]["predicted"]
            if 1 / CLOSE < measured < CLOSE:
                continue
            count += 1
            if (measured > 1) != (predicted > 1):
                misses.append(f"{cell['title']}: {measured:.2f}×, predicted {predicted:.2f}×")
        text = "explain says whether dense is faster, eager training step"
        return Goal(text, count - len(misses), count, "", tuple(misses))

    def checks(self, text: str, name: str) -> Goal:
        """Every check of a name passed."""
        found = self.run.of("check", check=name)
        misses = tuple(
            f"{r['subject']} {r['dtype']}: {r['reason']}" for r in found if r["status"] != "passed"
        )
        return Goal(text, len(found) - len(misses), len(found), "", misses)
