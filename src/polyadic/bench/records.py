"""Read stored records back and ask them questions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# What every record of a kind must have; a timed measurement has the fields of both lists.
FIELDS = {
    "environment": ("date", "torch", "cpu", "device", "dtype", "commit", "versions", "tolerance"),
    "machine": ("threads", "flops", "bandwidth", "cost_model"),
    "cell": ("cell", "title", "layer", "group", "x_shape", "y_shape", "r_elements", "floors"),
    "measurement": ("cell", "contestant", "family", "layout", "compiled", "threads", "status"),
}
TIMED_FIELDS = (
    "mode", "median", "min", "q1", "q3", "repeats", "calls_per_repeat", "stopped_early", "error",
    "predicted", "plan", "parameter_bytes",
)  # fmt: skip
STATUSES = ("timed", "skipped", "refused", "failed")


def check(record: Record) -> None:
    """Refuse a record that is not as ``run`` writes it.

    Raises:
        ValueError: it is no record, the kind or status is unknown, or a field is missing.
    """
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in FIELDS:
        raise ValueError(f"kind must be one of {', '.join(FIELDS)}, got {kind!r}")
    wanted = FIELDS[kind]
    if kind == "measurement":
        if record.get("status") not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {record.get('status')!r}")
        wanted += TIMED_FIELDS if record["status"] == "timed" else ("reason",)
    missing = [name for name in wanted if name not in record]
    if missing:
        raise ValueError(f"a record of kind {kind!r} needs {', '.join(missing)}, got {record}")


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
        lines = path.read_bytes().splitlines()
        records = [
            _parsed(line, f"line {number} of {len(lines)} of {path.name}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
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


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}); run the benchmark again") from error


def fastest(records: Sequence[Record]) -> Record | None:
    """The record with the least median."""
    return min(records, key=lambda r: float(r["median"]), default=None)


def geometric_mean(values: Sequence[float]) -> float:
    """Exponential of the mean logarithm, NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def rounded(value: Any) -> Any:
    """The same plain data with five digits of every float: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
