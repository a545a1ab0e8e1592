"""What the records say about each criterion: how many cases meet it, and which do not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.bench.cases import MODES, all_cases
from benchmarks.bench.stored import Key, Run, fastest, geometric_mean
from benchmarks.records import Record

SMALLEST, SMALL = "linear_4x4_2x5_R2_B4", "linear_4x4x16_4x4x8_R16_B32"
LEAST, FROZEN = "polyadic, least memory", "polyadic, frozen"


@dataclass(frozen=True)
class Miss:
    """A cell that does not meet a criterion.

    Args:
        where: title of the cell, and the mode where both are judged.
        value: the figure.
        note: what else there is to say.
    """

    where: str
    value: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.value}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True)
class Criterion:
    """A demand and how the records meet it.

    Args:
        text: the demand.
        met: cases that meet it.
        of: cases it was judged on; 0 where the records have none.
        value: the figure over all cases, where there is one.
        misses: the cases that do not meet it.
    """

    text: str
    met: int
    of: int
    value: str = ""
    misses: tuple[Miss, ...] = ()

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"`` or ``"not measured"``."""
        return "not measured" if not self.of else "met" if self.met == self.of else "missed"


def criteria(run: Run, threads: int = 1) -> list[Criterion]:
    """Judge every criterion by the records of one thread count."""
    judge = _Judge(run, threads)
    return [
        judge.choice(),
        judge.dense_by_nature(),
        judge.mean("linear", "tltorch factorized", 3.0),
        judge.mean("linear", "reference", 15.0),
        judge.mean("conv", "tltorch factorized", 2.0),
        judge.floor(),
        judge.kept(),
        judge.least(),
        judge.peak(),
        judge.ranks(),
        *judge.exponents(),
        judge.frozen(),
        judge.small(SMALLEST, "forward", "polyadic", 2.0),
        judge.small(SMALL, "training", "polyadic", 1.5),
        judge.small(SMALL, "training", "polyadic, compiled", 1.0),
        judge.small(SMALL, "training", "polyadic, compiled", 1.0, "dense, compiled"),
    ]


class _Judge:
    def __init__(self, run: Run, threads: int) -> None:
        self.run, self.threads = run, threads

    def _keys(self, *modes: str, layer: str = "") -> list[Key]:
        keys = [k for mode in modes for k in self.run.keys(mode, self.threads, layer=layer)]
        return [key for key in keys if "polyadic" in self.run.timed[key]]

    def _ours(self, key: Key) -> Record:
        return self.run.timed[key]["polyadic"]

    def _where(self, key: Key, both: bool = True) -> str:
        title: str = self.run.cells[key.cell]["title"]
        return f"{title}, {key.mode}" if both else title

    def _dense_needs_less(self, key: Key) -> bool:
        dense, contract = (self.run.floor(key, route) for route in ("dense", "contract"))
        return bool(dense["flops"] < contract["flops"])

    def _count(
        self, text: str, keys: Sequence[Key], judge: Callable[[Key], Miss | None], value: str = ""
    ) -> Criterion:
        misses = [miss for miss in map(judge, keys) if miss is not None]
        return Criterion(text, len(keys) - len(misses), len(keys), value, tuple(misses))

    def choice(self) -> Criterion:
        """Our choice against the best of all."""

        def judge(key: Key) -> Miss | None:
            best = fastest(self.run.rivals(key))
            if best is None or self._ours(key)["median"] <= 1.05 * best["median"]:
                return None
            same = best["plan"] is not None and best["plan"] == self._ours(key)["plan"]
            ratio, least = (self._ours(key)[of] / best[of] for of in ("median", "min"))
            note = f"{'the plan we chose; ' if same else ''}{least:.2f}× by the least times"
            return Miss(self._where(key), f"{ratio:.2f}× {best['contestant']}", note)

        keys = [key for key in self._keys(*MODES) if not self._dense_needs_less(key)]
        return self._count(
            "our choice ≤ 1.05 × the best of all contestants and forced plans, each eager and "
            "given the same input",
            keys,
            judge,
        )

    def dense_by_nature(self) -> Criterion:
        """Where dense has fewer FLOPs, the better floor."""

        def judge(key: Key) -> Miss | None:
            floor = min(self.run.floor(key, r)["seconds"] for r in ("dense", "factorized"))
            ratio = self._ours(key)["median"] / floor
            return None if ratio <= 1.25 else Miss(self._where(key), f"{ratio:.2f}× the floor")

        keys = [key for key in self._keys(*MODES) if self._dense_needs_less(key)]
        return self._count(
            "where dense has fewer FLOPs by nature: ≤ 1.25 × the better floor", keys, judge
        )

    def mean(self, layer: str, rival: str, wanted: float) -> Criterion:
        """Geometric mean of a rival's time over ours, training."""
        ratios = [
            self.run.timed[key][rival]["median"] / self._ours(key)["median"]
            for key in self._keys("training", layer=layer)
            if rival in self.run.timed[key]
        ]
        mean = geometric_mean(ratios)
        value = f"{mean:.2f}× over {len(ratios)} cell(s)" if ratios else ""
        return Criterion(
            f"{layer}, training: ≥ {wanted:g}× faster than {rival} in the geometric mean",
            int(bool(ratios) and mean >= wanted),
            int(bool(ratios)),
            value,
        )

    def floor(self) -> Criterion:
        """The share of the floor reached where it is large enough."""

        def judge(key: Key) -> Miss | None:
            share = self.run.floor(key, "factorized")["seconds"] / self._ours(key)["median"]
            return None if share >= 0.8 else Miss(self._where(key), f"{100 * share:.0f} %")

        keys = [
            key
            for key in self._keys(*MODES)
            if self.run.floor(key, "factorized")["seconds"] >= 1e-3
        ]
        return self._count("≥ 80 % of the floor wherever it is ≥ 1 ms", keys, judge)

    def _elements(self, key: Key, name: str) -> int:
        return math.prod(self.run.cells[key.cell][name]) * self.run.item_size

    def kept(self) -> Criterion:
        """Bytes kept for the backward by default."""

        def judge(key: Key) -> Miss | None:
            allowed = self._elements(key, "x_shape")
            allowed += self.run.cells[key.cell]["r_elements"] * self.run.item_size
            kept = self._ours(key)["kept_bytes"]
            return (
                None if kept <= allowed else Miss(self._where(key, False), f"{kept / allowed:.2f}×")
            )

        return self._count(
            "kept for the backward ≤ input and one R-channel map", self._keys("training"), judge
        )

    def least(self) -> Criterion:
        """Bytes kept with memory="least"."""

        def judge(key: Key) -> Miss | None:
            kept, x = self.run.timed[key][LEAST]["kept_bytes"], self._elements(key, "x_shape")
            return None if kept <= x else Miss(self._where(key, False), f"{kept / x:.2f}×")

        keys = [key for key in self._keys("training") if LEAST in self.run.timed[key]]
        return self._count('memory="least" keeps the input alone', keys, judge)

    def peak(self) -> Criterion:
        """Peak memory of a training step against dense."""

        def judge(key: Key) -> Miss | None:
            ratio = self._ours(key)["peak_bytes"] / self.run.timed[key]["dense"]["peak_bytes"]
            return None if ratio <= 1 else Miss(self._where(key, False), f"{ratio:.2f}×")

        keys = [key for key in self._keys("training") if "dense" in self.run.timed[key]]
        return self._count("peak memory of a training step ≤ dense", keys, judge)

    def ranks(self) -> Criterion:
        """Rank correlation of predicted and measured time over forced plans."""
        found = {key: self._correlation(key) for key in self._keys(*MODES)}
        values = {key: value for key, value in found.items() if value is not None}

        def judge(key: Key) -> Miss | None:
            value = values[key]
            return None if value >= 0.9 else Miss(self._where(key), f"{value:.2f}")

        value = f"median {statistics.median(values.values()):.2f}" if values else ""
        return self._count(
            "predicted against measured time: rank correlation ≥ 0.9 over the forced plans",
            list(values),
            judge,
            value,
        )

    def _correlation(self, key: Key) -> float | None:
        plans = [r for r in self.run.plans(key) if r["predicted"] is not None]
        if len(plans) < 4:
            return None
        return spearman([r["predicted"] for r in plans], [r["median"] for r in plans])

    def exponents(self) -> list[Criterion]:
        """Growth of our training time with B, R and M + N over the scaling cells."""
        results = []
        for axis, points in scaling(self.run, "training", self.threads).items():
            text = f"training time grows with {axis} to the power 1.0 ± 0.15 where GEMM-bound"
            pairs = [(size, times["polyadic"]) for size, times in points if "polyadic" in times]
            if len(pairs) < 3:
                results.append(Criterion(text, 0, 0))
                continue
            power = exponent(pairs)
            results.append(
                Criterion(
                    text, int(abs(power - 1) <= 0.15), 1, f"{power:.2f} over {len(pairs)} cells"
                )
            )
        return results

    def frozen(self) -> Criterion:
        """A frozen layer against the better of what it replaces."""

        def judge(key: Key) -> Miss | None:
            best = min(self.run.timed[key][name]["median"] for name in ("polyadic", "dense"))
            ratio = self.run.timed[key][FROZEN]["median"] / best
            return None if ratio <= 1.05 else Miss(self._where(key, False), f"{ratio:.2f}×")

        text = "frozen, forward: ≤ 1.05 × the better of our choice and dense"
        wanted = {FROZEN, "dense"}
        keys = [key for key in self._keys("forward") if wanted <= self.run.timed[key].keys()]
        return self._count(text, keys, judge)

    def small(
        self, cell: str, mode: str, contestant: str, wanted: float, rival: str = "dense"
    ) -> Criterion:
        """A small layer against the dense one, eager where nothing else is said."""
        title = next(case.title for case in all_cases() if case.name == cell)
        named = "dense eager" if rival == "dense" else rival
        text = f"{title}, {mode}: {contestant} ≤ {wanted:g} × {named}"
        times = self.run.timed.get(Key(cell, mode, self.threads), {})
        if contestant not in times or rival not in times:
            return Criterion(text, 0, 0)
        ratio = times[contestant]["median"] / times[rival]["median"]
        return Criterion(text, int(ratio <= wanted), 1, f"{ratio:.2f}×")


def scaling(run: Run, mode: str, threads: int) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """The sweeps: for B, R and M + N the (size, seconds by contestant) of its cells.

    A cell belongs to a sweep if it has the sweep's most common values on the other two axes.
    """
    axes = ("B", "R", "M + N")
    places: dict[Key, tuple[float, ...]] = {}
    for key in run.keys(mode, threads, "scaling"):
        cell = run.cells[key.cell]
        features = cell["x_shape"][1] + cell["y_shape"][1]
        places[key] = (cell["batch"], cell["rank"], features)
    sweeps: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for i, axis in enumerate(axes):
        others = [place[:i] + place[i + 1 :] for place in places.values()]
        if not others:
            sweeps[axis] = []
            continue
        common = statistics.mode(others)
        sweeps[axis] = sorted(
            (
                (place[i], {name: r["median"] for name, r in run.timed[key].items()})
                for key, place in places.items()
                if place[:i] + place[i + 1 :] == common
            ),
            key=lambda point: point[0],
        )
    return sweeps


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of log time over log size."""
    sizes, times = zip(*points, strict=True)
    line = statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, times)])
    return line.slope


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank. 0 where one side is constant."""
    ranked = _ranks(a), _ranks(b)
    if any(len(set(ranks)) == 1 for ranks in ranked):
        return 0.0
    return statistics.correlation(*ranked)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
