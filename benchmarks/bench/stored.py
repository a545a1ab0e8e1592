"""Stored records of one run, and the questions they answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import Record, check, read


@dataclass(frozen=True)
class Key:
    """A cell timed in one mode with one thread count."""

    cell: str
    mode: str
    threads: int


class Run:
    """The records of one file.

    Attributes:
        environment: the environment record.
        machines: the machine record of each thread count.
        cells: the record of each cell by name, in the order they ran.
        timed: the measurements that were timed, by key and contestant.
        untimed: those that were not, with their reasons.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        """Sort records.

        Raises:
            ValueError: a record is malformed, there is no environment, or a measurement is of a
                cell or a thread count that has no record.
        """
        self.environment: Record = {}
        self.machines: dict[int, Record] = {}
        self.cells: dict[str, Record] = {}
        self.timed: dict[Key, dict[str, Record]] = {}
        self.untimed: list[Record] = []
        for record in records:
            check(record)
            if record["kind"] == "environment":
                self.environment = record
            elif record["kind"] == "machine":
                self.machines[record["threads"]] = record
            elif record["kind"] == "cell":
                self.cells[record["cell"]] = record
            elif record["status"] == "timed":
                key = Key(record["cell"], record["mode"], record["threads"])
                self.timed.setdefault(key, {})[record["contestant"]] = record
            else:
                self.untimed.append(record)
        if not self.environment:
            raise ValueError("the records have no environment line; run the benchmark again")
        cells = {r["cell"] for r in self.untimed} | {key.cell for key in self.timed}
        self._all_there("cell", cells - self.cells.keys())
        threads = {r["threads"] for r in self.untimed} | {key.threads for key in self.timed}
        self._all_there("machine", threads - self.machines.keys())

    @staticmethod
    def _all_there(kind: str, missing: set[Any]) -> None:
        if missing:
            raise ValueError(
                f"measurements are of {', '.join(sorted(map(str, missing)))}, of which there is no "
                f"{kind} line; run the benchmark again"
            )

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a file of JSON lines.

        Raises:
            ValueError: a line is no JSON, or the records are not a run's.
        """
        records = read(path)
        try:
            return cls(records)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return {"float64": 8, "float32": 4}.get(self.environment["dtype"], 2)

    def keys(self, mode: str, threads: int, group: str = "grid", layer: str = "") -> list[Key]:
        """The timed cells of a group, and of a kind of layer where one is named."""
        return [
            key
            for key in self.timed
            if (key.mode, key.threads) == (mode, threads)
            and self.cells[key.cell]["group"] == group
            and layer in ("", self.cells[key.cell]["layer"])
        ]

    def seconds(self, key: Key, contestant: str) -> float | None:
        """Median time of one contestant, None where it was not timed."""
        record = self.timed[key].get(contestant)
        return None if record is None else float(record["median"])

    def floor(self, key: Key, route: str) -> Record:
        """FLOPs, least bytes and floor in seconds of a cell by one route."""
        for floor in self.cells[key.cell]["floors"]:
            if (floor["mode"], floor["threads"], floor["route"]) == (key.mode, key.threads, route):
                found: Record = floor
                return found
        raise ValueError(f"no floor of {key} by the route {route!r} is recorded")

    def plans(self, key: Key) -> list[Record]:
        """The forced plans."""
        return [r for r in self.timed[key].values() if r["family"] == "plan"]

    def rivals(self, key: Key) -> list[Record]:
        """Whoever our choice is compared with: eager, the same x, ours by forced plan included."""
        return [
            r
            for r in self.timed[key].values()
            if r["layout"] == "given"
            and not r["compiled"]
            and r["family"] not in ("ours", "accelerated")
        ]


def fastest(records: Sequence[Record]) -> Record | None:
    """The record with the least median."""
    return min(records, key=lambda r: float(r["median"]), default=None)


def geometric_mean(values: Sequence[float]) -> float:
    """Exponential of the mean logarithm, NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
