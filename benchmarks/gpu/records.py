"""Records as JSON lines: every line is written and flushed as soon as it is known.

The kinds ``environment``, ``machine``, ``cell`` and ``measurement`` have the fields that the
records of the benchmark on a CPU have; a measurement has ``launch`` besides (``"graph"``,
``"eager"`` or ``"compiled"``). Kinds of this benchmark alone are ``phase``, ``rate``, ``product``,
``check`` and ``note``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import Record, append, read


class Writer:
    """Appends records to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, **fields: Any) -> Record:
        """Append one record and return it."""
        record = {"kind": kind, **fields}
        append(self.path, record)
        return record


class Run:
    """The records of one run, ready to be asked.

    Attributes:
        records: all of them, in the order they were written.
        environment: of the newest worker.
        sources: where runs were joined, the environment that each phase was made in.
        cells: the record of each cell by name.
    """

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.environment: Record = next(self._backwards("environment"), {})
        self.sources: dict[str, Record] = {}
        self.cells: dict[str, Record] = {r["cell"]: r for r in self.of("cell")}
        self._timed: dict[tuple[str, str, str], dict[str, Record]] = {}
        for record in self.of("measurement"):
            if record["status"] == "timed":
                place = (record["cell"], record["mode"], record["launch"])
                self._timed.setdefault(place, {})[record["contestant"]] = record

    @classmethod
    def joined(cls, runs: Sequence[Run]) -> Run:
        """Of runs on one GPU, the oldest first, each phase as the newest that made it has it.

        The environment is that of the newest run; ``sources`` says where each phase comes from.
        """
        newest: dict[str, list[Record]] = {}
        sources: dict[str, Record] = {}
        for run in runs:
            last = run.phases()
            for phase, records in run.by_phase().items():
                if phase not in last or last[phase]["status"] in ("done", "out of time"):
                    newest.pop(phase, None)
                    newest[phase], sources[phase] = records, run.environment
        joined = cls([record for records in newest.values() for record in records])
        joined.sources = sources
        return joined

    def by_phase(self) -> dict[str, list[Record]]:
        """The records of each phase, and under "" what was written before the first."""
        found: dict[str, list[Record]] = {}
        phase = ""
        for record in self.records:
            if record["kind"] == "phase":
                phase = record["phase"]
            found.setdefault(phase, []).append(record)
        return found

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a file of JSON lines, which may still be growing or not be there yet."""
        return cls(read(path, growing=True) if path.exists() else [])

    def _backwards(self, kind: str) -> Iterator[Record]:
        return (r for r in reversed(self.records) if r["kind"] == kind)

    def of(self, kind: str, **fields: Any) -> list[Record]:
        """The records of a kind that have these values."""
        return [
            r
            for r in self.records
            if r["kind"] == kind and all(r.get(name) == value for name, value in fields.items())
        ]

    def rate(self, name: str) -> float | None:
        """A measured rate or cost, None where it is missing."""
        found = self.of("rate", name=name)
        return found[-1]["value"] if found else None

    def timed(self, cell: str, mode: str, launch: str) -> dict[str, Record]:
        """The measurements of a cell by contestant."""
        return self._timed.get((cell, mode, launch), {})

    def seconds(self, cell: str, mode: str, launch: str, contestant: str) -> float | None:
        """The median of one contestant, None where it was not timed."""
        record = self.timed(cell, mode, launch).get(contestant)
        return None if record is None else float(record["median"])

    def floor(self, cell: str, mode: str, route: str = "factorized") -> Record:
        """FLOPs, least bytes and seconds of a route of a cell."""
        for floor in self.cells[cell]["floors"]:
            if (floor["mode"], floor["route"]) == (mode, route):
                return dict(floor)
        raise ValueError(f"the cell {cell} has no floor of {route!r} in {mode}")

    def phases(self) -> dict[str, Record]:
        """The last word on every phase."""
        return {r["phase"]: r for r in self.of("phase")}
