"""Long work says how far it is: by a bar on a terminal, by a line now and then anywhere else.

On a terminal the bar is rich's, where rich is installed. Lines go to the logger ``polyadic`` at the
level INFO, which Python shows to no one who has not asked for it; a program that runs unwatched can
have them printed instead. Work that is done within two seconds says nothing.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

LOGGER = logging.getLogger("polyadic")
# Seconds after which work counts as long, between two moves of a bar, and between two lines.
LONG, MOVE, LINE = 2.0, 0.1, 10.0
# A plan is trusted as if this share of it had been done at the pace that it expects, since small
# first pieces, which may take many times as long as was planned, say little of the others.
TRUST = 0.1


def now() -> float:
    """Return the seconds of a clock that only moves forward."""
    return time.monotonic()


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
        self._plans: dict[str, list[float]] = {}
        self._done: dict[str, int] = {}
        self._moved = self._said = self._began = now()

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
        at = now()
        self._stages.setdefault(stage, (at, done))
        self._done[stage] = done
        if at - self._began < LONG or (at - self._moved < MOVE and done < total):
            return
        self._moved = at
        if sys.stderr.isatty() and self._show(stage, done, total, note):
            return
        if at - self._said >= LINE:
            self._said = at
            words = [self._what, *([stage] if stage else []), f"{done} of {total}"]
            words += [note] if note else []
            words.append(f"{clock(at - self._began)} so far")
            left = self._left(stage, done, total, at) if done < total else None
            if left is not None:
                words.append(f"about {clock(left)} left" + (f" for {stage}" if stage else ""))
            self._line(", ".join(words))

    def plan(self, stage: str, seconds: Sequence[float]) -> None:
        """Say how long the pieces of a stage are expected to take, before or while it goes on.

        The time left of the stage is what is expected of its other pieces, corrected by how much
        longer or shorter than expected the finished pieces of all stages took.
        """
        self._plans[stage] = list(seconds)

    def announce(self, text: str) -> None:
        """Say something at once."""
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            self._line(f"{self._what}, {text}")

    def _left(self, stage: str, done: int, total: int, at: float) -> float | None:
        """Predict the seconds that are left of a stage; None as long as nothing is known.

        The pieces of a part of the work may differ much, so that without a plan their number tells
        nothing. Neither does a plan by which nothing is left to do.
        """
        began, before = self._stages[stage]
        if stage not in self._plans:
            known = done > before and not stage
            return (at - began) * (total - done) / (done - before) if known else None
        begun = {name: self._stages[name] for name in self._plans if name in self._stages}
        taken = at - min(when for when, _ in begun.values())
        planned = sum(
            sum(self._plans[name][first : self._done[name]]) for name, (_, first) in begun.items()
        )
        trusted = TRUST * sum(map(sum, self._plans.values()))
        pace = (taken + trusted) / (planned + trusted) if trusted > 0 else 1.0
        return sum(self._plans[stage][done:]) * pace or None

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


def clock(seconds: float) -> str:
    """Write seconds as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
