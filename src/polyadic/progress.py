"""Long work says how far it is: by a bar on a terminal, by a line now and then anywhere else.

On a terminal the bar is rich's, where rich is installed. Lines go to the logger ``polyadic`` at the
level INFO, which Python shows to no one who has not asked for it; a program that runs unwatched can
have them printed instead. Work that is done within two seconds says nothing.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

LOGGER = logging.getLogger("polyadic")
# Seconds after which work counts as long, between two moves of a bar, and between two lines.
LONG, MOVE, LINE = 2.0, 0.1, 10.0


class Meter:
    """Tells of one piece of long work; to be used as a context.

    Args:
        what: what is done, in a word or two.
        line: called with a line of text now and then where there is no terminal.
    """

    def __init__(self, what: str, line: Callable[[str], object] = LOGGER.info) -> None:
        self._what, self._line = what, line
        self._bar: Any = None
        self._stages: dict[str, tuple[float, int]] = {}
        self._tasks: dict[str, Any] = {}
        self._moved = self._said = self._began = time.monotonic()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Say that so much of a stage is done, if it is time to say something.

        Args:
            stage: a part of the work that is counted by itself; empty if there are no parts.
            done: pieces of this stage that are done.
            total: pieces of this stage in all.
            note: what the last piece was, or what it gave.
        """
        now = time.monotonic()
        began, before = self._stages.setdefault(stage, (now, done))
        if now - self._began < LONG or (now - self._moved < MOVE and done < total):
            return
        self._moved = now
        if sys.stderr.isatty() and self._show(stage, done, total, note):
            return
        if now - self._said >= LINE:
            self._said = now
            words = [self._what, *([stage] if stage else []), f"{done} of {total}"]
            words += [note] if note else []
            words.append(f"{_clock(now - self._began)} so far")
            if done > before:
                words.append(
                    f"about {_clock((now - began) * (total - done) / (done - before))} left"
                )
            self._line(", ".join(words))

    def _show(self, stage: str, done: int, total: int, note: str) -> bool:
        """Move the bar, and return whether there is one."""
        if self._bar is None:
            try:
                from rich.console import Console
                from rich.progress import Progress
            except ImportError:
                return False
            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage or self._what, total=total)
        words = " ".join(filter(None, (stage or self._what, note)))
        self._bar.update(self._tasks[stage], completed=done, total=total, description=words)
        return True


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
