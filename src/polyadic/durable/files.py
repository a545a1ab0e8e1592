"""Files that are written whole or not at all, and are on the disk when the write returns."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

# Windows locks no folders; drafts of killed processes stay there.
if sys.platform != "win32":
    import fcntl

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path) -> None:
    """Refuse anything but a regular file; opening a FIFO would wait for ever.

    Raises:
        ValueError: the path is something else.
        OSError: there is nothing, or it cannot be reached.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "no regular file")
        raise ValueError(f"{path} is {kind}; expected a file")


@contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a draft in the folder of a file; it takes the file's place when the block ends well.

    At every moment the file is the old one or the new one. Drafts of processes that were killed
    are removed by the next write.

    Args:
        path: the file; a symbolic link is followed.
        previous: a name beside it under which the file that is replaced stays.

    Raises:
        OSError: the draft cannot be written, for a full disk for instance; the message says so, and
            that the file is as it was.
        ValueError: what is there is no regular file.
    """
    path = Path(os.path.realpath(path))
    if path.exists():
        check_regular(path)
    try:
        with drafts(path) as folder:
            draft = folder / "draft"
            yield draft
            if previous is not None and path.exists():
                _keep(path, previous, draft)
            place(draft, path)
            sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _explained(error, path) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; a terminal or a pipe is written to as it is.

    Raises:
        OSError: the text cannot be written; the file is as it was.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def place(draft: Path, path: Path) -> None:
    """Put a draft of ``drafts`` in the place of a file, once all of it is on the disk."""
    # Some libraries make files for their owner alone; the lock has the usual mode.
    draft.chmod(stat.S_IMODE(draft.with_name("lock").stat().st_mode))
    with open(draft, "rb+") as opened:
        os.fsync(opened.fileno())
    os.replace(draft, path)


@contextmanager
def drafts(path: Path) -> Iterator[Path]:
    """Make a folder for drafts of a file, which no other process removes while this one lives.

    It is a folder because libraries that write a file may first write another one beside it.
    Folders of processes that were killed are removed.
    """
    mark = f".{zlib.crc32(os.fsencode(path.name)):08x}-"
    for old in path.parent.glob(f"{mark}*.part"):
        _remove_dead(old)
    folder, lock = _locked_folder(path, mark)
    try:
        yield folder
    finally:
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(path: Path, mark: str) -> tuple[Path, BinaryIO]:
    while True:
        folder = path.with_name(f"{mark}{secrets.token_hex(8)}.part")
        folder.mkdir()
        with suppress(FileNotFoundError):
            lock = open(folder / "lock", "xb")  # noqa: SIM115 - the caller closes it
            # Until it is locked, another process may take the folder for that of a dead one.
            if _locked(lock.fileno()) and (folder / "lock").exists():
                return folder, lock
            lock.close()


def is_draft(name: str) -> bool:
    """Whether a name in a folder is that of drafts."""
    return re.fullmatch(r"\.[0-9a-f]{8}-[0-9a-f]*\.part", name) is not None


def _remove_dead(folder: Path) -> None:
    """Remove the folder of a process that was killed; a living one holds its lock."""
    with suppress(OSError):
        # An empty folder is of a process that was killed before it made the lock.
        folder.rmdir()
    with suppress(OSError), open(folder / "lock", "rb+") as lock:
        if sys.platform != "win32" and _locked(lock.fileno()):
            shutil.rmtree(folder, ignore_errors=True)


def _locked(handle: int) -> bool:
    """Lock an open file until it is closed, unless another process holds it."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _keep(path: Path, previous: Path, draft: Path) -> None:
    second = draft.with_name("previous")
    try:
        os.link(path, second)
    except OSError:
        # A file system without hard links; until the draft is in place, only ``previous`` is there.
        os.replace(path, previous)
        return
    os.replace(second, previous)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _explained(error: Exception, path: Path) -> OSError:
    """Say what could not be written; safetensors names the system's error in its text alone."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
        reason = os.strerror(number)
    left = "the file that was there is unchanged" if path.exists() else "no file was left there"
    text = f"{reason or error}: {path} could not be written; {left}"
    return OSError(number, text) if number is not None else OSError(text)
