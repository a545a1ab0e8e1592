"""The checkpoint of a fit: what it is of, when it is written, and Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyadic.durable import checkpoint
from polyadic.durable.interrupts import Pending, deferred
from polyadic.durable.keeper import FileKeeper

State = Callable[[], Mapping[str, Any]]


class Kept:
    """A fit's state in a file, written after every so many sweeps, at its end and at Ctrl-C.

    Args:
        path: the file.
        resume: whether to go on from it.
        identity: what must be equal for the file to be used, by name; plain values.
        every: sweeps between two writes.

    Attributes:
        state: the state to go on from, or None.

    Raises:
        ValueError: there is a file and ``resume`` is false, or it is damaged or of another fit.
    """

    def __init__(self, path: Path, resume: bool, identity: Mapping[str, Any], every: int) -> None:
        self._keeper = FileKeeper(path, resume, "polyadic.decompose")
        self._identity, self._every, self._sweeps = identity, every, 0
        self._pending = Pending(None)
        saved = self._keeper.load()
        self.state: Any = None
        if saved is not None:
            checkpoint.same("the checkpoint", saved.get("identity", {}), identity)
            self.state = saved.get("fit")

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Put off the first Ctrl-C to the end of its sweep while the block runs."""
        with deferred(most=1) as self._pending:
            yield

    def swept(self, state: State) -> None:
        """Note a sweep, after which the state may have to be written."""
        self._sweeps += 1
        if self._sweeps % self._every == 0:
            self.save(state)

    def check(self, state: State, ends: bool) -> None:
        """Write the state where the callback or Ctrl-C ends the fit; raise a KeyboardInterrupt."""
        if ends or self._pending.count:
            self.save(state)
        self._pending.check()

    def save(self, state: State) -> None:
        """Write the state; a kill leaves the file that was there, or the new one.

        Raises:
            OSError: the file cannot be written; the one that was there is unchanged.
        """
        self._keeper.save({"identity": self._identity, "fit": state()})
