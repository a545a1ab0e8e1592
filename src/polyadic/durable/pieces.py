"""The finished pieces of a long job, each a checkpoint of its own in one folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyadic.durable import checkpoint
from polyadic.durable.files import is_draft

_JOB = "job.checkpoint"


class Pieces:
    """Pieces of work whose results are kept, so that a job that was stopped makes only the rest.

    Args:
        folder: where they are kept, made if it is missing; None keeps nothing.
        kind: the kind of job, such as ``"polyadic.compress"``.
        identity: what the results depend on, by name; plain values.
        resume: whether pieces that are there may be used.
        run: name of the run in which several processes use one folder together. A job that another
            of them has begun is not refused, and the pieces that it has finished are used.

    Attributes:
        folder: where they are kept, or None; what a piece under way keeps may stand there too.

    Raises:
        ValueError: there are pieces and ``resume`` is false, or they are of another job.
        OSError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path | None,
        kind: str,
        identity: Mapping[str, Any],
        resume: bool,
        run: str | None = None,
    ) -> None:
        self.folder, self._kind = folder, kind
        if folder is None:
            return
        job = folder / _JOB
        if checkpoint.exists(job):
            saved = checkpoint.load(job, kind)
            of = saved.pop("run", None)
            if not resume:
                checkpoint.check_continued(folder.name, of, run)
            checkpoint.same(folder.name, saved, identity)
            return
        # A process that was killed may have left drafts, and another may begin in this moment.
        there = os.listdir(folder) if folder.is_dir() else []
        if folder.exists() and not (folder.is_dir() and all(_own(name) for name in there)):
            raise ValueError(f"{folder} is no folder of a checkpoint, and not empty; name another")
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save(job, kind, {**identity, "run": run}, generations=1)

    def __contains__(self, name: str) -> bool:
        """Whether a piece is kept already, which may still turn out to be damaged."""
        return self.folder is not None and (self.folder / name).exists()

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a piece, from its file or made now; a damaged one is made again, with a warning.

        Args:
            name: name of the piece and of its file.
            make: makes the piece, of tensors and plain values as a checkpoint holds them.
        """
        if self.folder is None:
            return make()
        path = self.folder / name
        if path.exists():
            try:
                return checkpoint.load(path, self._kind)
            except ValueError as error:
                warnings.warn(f"{error}; making it again", RuntimeWarning, stacklevel=2)
        made = make()
        checkpoint.save(path, self._kind, made, generations=1)
        return made


def _own(name: str) -> bool:
    return name == _JOB or is_draft(name)
