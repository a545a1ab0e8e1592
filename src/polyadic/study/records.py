"""Records of the study: JSON lines that a run adds to, so that it can be stopped and continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polyadic.bench import machine
from polyadic.bench.records import rounded

Record = dict[str, Any]


class Store:
    """A file of records: one of the environment, then one for each finished piece of work.

    Args:
        path: the file; made where it is missing.
        settings: of the study; those in the file must be the same.

    Attributes:
        records: those in the file, without the environment's.

    Raises:
        ValueError: the file is of other settings, or no such file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        own = machine.environment(torch.device("cpu"), torch.float32)
        self._commit = own["commit"]
        self.records: list[Record] = []
        if path.exists():
            environment, self.records = read(path)
            if environment.get("settings") != rounded(settings):
                raise ValueError(
                    f"{path.name} holds records of other settings, {environment.get('settings')}; "
                    f"remove it, or write to another folder"
                )
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write({**own, "threads": torch.get_num_threads(), "settings": settings})

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
        self._write(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded(record), ensure_ascii=False) + "\n")


def read(path: Path) -> tuple[Record, list[Record]]:
    """The environment and the records of a file.

    Raises:
        ValueError: its first line is not an environment.
    """
    with path.open(encoding="utf-8") as file:
        environment, *records = [json.loads(line) for line in file if line.strip()] or [{}]
    if environment.get("kind") != "environment":
        raise ValueError(f"{path.name} does not begin with an environment record; run it anew")
    return environment, records
