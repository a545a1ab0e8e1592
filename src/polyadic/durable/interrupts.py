"""Ctrl-C is put off while something must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_active: list[Pending] = []


class Pending:
    """Ctrl-C that came and was put off."""

    def __init__(self, most: int | None) -> None:
        self._most, self.count = most, 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember an interrupt; raise it if as many as may be put off have come before."""
        self.count += 1
        if self._most is not None and self.count > self._most:
            self.check()

    def check(self) -> None:
        """Raise a KeyboardInterrupt if one was put off."""
        if self.count:
            self.count = 0
            raise KeyboardInterrupt


@contextmanager
def deferred(most: int | None = None) -> Iterator[Pending]:
    """Put off Ctrl-C until the block ends, or asks by ``Pending.check``.

    Python runs handlers of signals in the main thread alone, so that other threads have nothing to
    put off. A handler that the user set gets its call when the block ends.

    Args:
        most: how many are put off; the next one is raised at once. None for any number.
    """
    pending = Pending(most)
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield pending
        return
    signal.signal(signal.SIGINT, pending.note)
    _active.append(pending)
    try:
        yield pending
    finally:
        _active.remove(pending)
        signal.signal(signal.SIGINT, handler)
        if pending.count:
            handler(signal.SIGINT, None)


def check() -> None:
    """Raise the KeyboardInterrupt that an enclosing ``deferred`` has put off; work may end here."""
    if _active and threading.current_thread() is threading.main_thread():
        _active[-1].check()
