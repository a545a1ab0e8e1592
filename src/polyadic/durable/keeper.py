"""The file in which a job keeps its state, and whether the job may go on from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from polyadic._torch import run_of_group
from polyadic.checks import check_flag
from polyadic.durable import checkpoint


def path_of(value: Any, resume: bool, what: str = "file") -> Path | None:
    """Return the path of a checkpoint as the user gave it, or None.

    Args:
        value: a path or None.
        resume: whether the job is to go on from it.
        what: ``"file"``, whose folder has to be there, or ``"folder"``, which a job makes.

    Raises:
        TypeError: it is no path, or ``resume`` is no bool.
        ValueError: the folder of the file does not exist, or there is nothing to go on from.
    """
    check_flag(resume, "resume")
    if value is None:
        if resume:
            raise ValueError(f"resume=True needs checkpoint=, the {what} to continue from")
        return None
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be a path, got {type(value).__name__}")
    path = Path(value)
    if what == "file" and not path.parent.is_dir():
        raise ValueError(f"the folder of checkpoint {path} does not exist; make it first")
    return path


class Keeper(Protocol):
    """Where the state of a job is kept."""

    def load(self) -> dict[str, Any] | None:
        """Return the state to go on from; None to begin."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state in the place of the last one."""


@dataclass
class FileKeeper:
    """A checkpoint file, which a job may only go on from if that is asked for.

    Processes of one group may begin a job with one file: each of them does all of it, and what
    another of them wrote meanwhile is no checkpoint of another job. Where they must take the same
    steps (``together``), because a model is sharded, none writes before all have read.
    """

    path: Path
    resume: bool
    kind: str
    together: bool = False
    _run: str | None = field(default=None, init=False)

    def load(self) -> dict[str, Any] | None:
        """Return the state in the file; None where there is none.

        Raises:
            ValueError: there is a file and ``resume`` is false, or it is no checkpoint.
        """
        self._run = run_of_group(str(self.path.absolute()))
        state = checkpoint.load(self.path, self.kind) if checkpoint.exists(self.path) else None
        if state is not None and not self.resume:
            checkpoint.check_continued(self.path.name, state.get("run"), self._run)
            state = None
        if self.together:
            torch.distributed.barrier()
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the file; a crash leaves the old one or the new one, no half."""
        checkpoint.save(self.path, self.kind, {**state, "run": self._run})
