"""The records of an experiment, to which a run adds, so that it can be stopped and continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.records import Record, append, rounded


class Store:
    """A file of records: one of the environment, then one for each finished piece of work.

    Where a study is continued on another processor or with other versions, a further record of the
    environment stands before the records made there.

    Args:
        path: the file; made where it is missing.
        settings: of the study; those in the file must be the same.

    Attributes:
        records: those in the file, without the first one of the environment.

    Raises:
        ValueError: the file is of other settings, or no such file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        own = records.environment(torch.device("cpu"), torch.float32)
        self._commit = own["commit"]
        self.records: list[Record] = []
        if path.exists() and records.read(path, growing=True):
            environment, self.records = read(path, growing=True)
            if environment.get("settings") != rounded(settings):
                raise ValueError(
                    f"{path.name} holds records of other settings, {environment.get('settings')}; "
                    f"remove it, or write to another folder"
                )
            latest = environments(environment, self.records)[-1]
            if any(latest[name] != own[name] for name in ("cpu", "torch", "python")):
                self.add({**own, "settings": settings})
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, {**own, "settings": settings})

    def has(self, **fields: Any) -> bool:
        """Whether a record with these fields is there."""
        return any(
            all(record.get(name) == value for name, value in fields.items())
            for record in self.records
        )

    def add(self, record: Record) -> None:
        """Append a record, with the commit it was made by; it is on the disk when this returns."""
        record = {**record, "commit": self._commit}
        self.records.append(rounded(record))
        append(self._path, record)


def environments(first: Record, records: Sequence[Record]) -> list[Record]:
    """The records of the machines that a study was made on, the first one's first."""
    return [first, *(record for record in records if record["kind"] == "environment")]


def read(path: Path, *, growing: bool = False) -> tuple[Record, list[Record]]:
    """The environment and the records of a file; one that grows may end in half a line.

    Raises:
        ValueError: its first line is not an environment, or a line is no JSON.
    """
    environment, *found = records.read(path, growing=growing) or [{}]
    if environment.get("kind") != "environment":
        raise ValueError(f"{path.name} does not begin with an environment record; run it anew")
    return environment, found
