"""Jobs are killed at random moments, and at each of their calls to the file system."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.reliability.jobs import JOBS, Told
from polyadic.durable.files import write_text

Job = Callable[[Path, Told], str]


def child(work: Callable[[], object]) -> int:
    """Fork a process that does a piece of work, with one thread; 0 where it ends well."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        work()
        status = 0
    finally:
        # Nothing of the parent's is closed or printed twice.
        os._exit(status)


def ended(process: int) -> int:
    """Wait for a child; its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def expected(job: Job, folder: Path) -> tuple[str, float]:
    """The digest of a run without kills, and its seconds."""
    fresh(folder)
    began = time.perf_counter()
    found = job(folder, lambda: None)
    return found, time.perf_counter() - began


def fresh(folder: Path) -> None:
    """Empty a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def at_random_moments(name: str, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill a job again and again, let it go on, and compare each end with that of a run in peace.

    Returns:
        A record: ``kills``, ``ends`` (runs that came to their end between them), ``equal`` (of
        these, bit for bit as expected).
    """
    job, draw = JOBS[name], random.Random(seed)
    expected(job, folder / "peace")
    wanted, seconds = expected(job, folder / "peace")  # the first run of a process takes longer
    state = folder / "state"
    fresh(state)
    done = ends = equal = 0
    while done < kills:
        process = child(lambda: job(state, lambda: None))
        time.sleep(draw.uniform(0, 1.1 * seconds))
        os.kill(process, signal.SIGKILL)
        was_killed = ended(process) == -signal.SIGKILL
        done += was_killed
        # Now and then one is let go to its end, and one that came to it begins anew.
        if not was_killed or draw.random() < 0.2 or done == kills:
            ends += 1
            equal += job(state, lambda: None) == wanted
            fresh(state)
    return {"kind": "kills", "job": name, "kills": done, "ends": ends, "equal": equal}


def at_file_operations(name: str, folder: Path, most: int | None = None) -> dict[str, Any]:
    """Kill a job at its first call to the file system, at its second, and so on to its last.

    Args:
        name: of the job.
        folder: where its state is kept.
        most: so many calls, spread over all; None for each of them.
    """
    job = JOBS[name]
    wanted, _ = expected(job, folder / "peace")
    state = folder / "state"
    fresh(state)
    counted = state / "calls"
    process = child(lambda: write_text(counted, str(_operations(job, state, None))))
    ended(process)
    calls = int(counted.read_text())
    step = 1 if most is None else max(1, calls // most)
    done = equal = 0
    for number in range(1, calls + 1, step):
        fresh(state)
        process = child(partial(_operations, job, state, number))
        done += ended(process) == -signal.SIGKILL
        equal += job(state, lambda: None) == wanted
    return {"kind": "kills at calls", "job": name, "kills": done, "ends": done, "equal": equal}


def _operations(job: Job, folder: Path, kill_at: int | None) -> int:
    """Run a job and count its calls that change files; the process is killed before one of them."""
    calls = 0
    changing = {"mkdir", "open", "link", "replace", "rename", "unlink", "rmdir", "fsync", "write"}

    def look(frame: Any, event: str, called: Any) -> None:
        nonlocal calls
        if event == "c_call" and called.__name__ in (*changing, "serialize_file"):
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(look)
    try:
        job(folder, lambda: None)
    finally:
        sys.setprofile(None)
    return calls
