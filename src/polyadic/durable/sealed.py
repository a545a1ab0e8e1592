"""safetensors files with a checksum of all their bytes.

The checksum is the entry ``crc32`` of the file's own metadata: the CRC-32 of the file in which the
eight digits of that entry are zeros. Files without the entry, which others write, are read too.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from polyadic.durable.files import check_regular

_BLANK = "00000000"
_ENTRY = f'"crc32":"{_BLANK}"'.encode()
_CHUNK = 2**22
_LARGEST_HEADER = 100_000_000
# Names of tensors that the format keeps for itself.
RESERVED = "__metadata__"
_TRIES = 100


def check_name(path: Path) -> None:
    """Refuse a path that safetensors cannot open.

    Raises:
        ValueError: the path is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} is not UTF-8; give a path that is") from None


def write(draft: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata with a checksum, to a draft.

    Raises:
        ValueError: a tensor has a name that the format keeps for itself, or the path is not UTF-8.
        OSError, SafetensorError: the file cannot be written.
    """
    check_name(draft)
    if RESERVED in tensors:
        raise ValueError(f"no tensor can be saved as {RESERVED!r}, a name of the file's own")
    save_file(dict(tensors), draft, metadata={**metadata, "crc32": _BLANK})
    _seal(draft)


def add(file: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata and a checksum to a file that another library wrote and nobody reads yet."""
    copy = file.with_name(f"{file.name}.part")
    with open(file, "rb") as source, open(copy, "wb") as target:
        content = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        content[RESERVED] = {**content.get(RESERVED, {}), **metadata, "crc32": _BLANK}
        header = json.dumps(content, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        target.write(len(header).to_bytes(8, "little") + header)
        while chunk := source.read(_CHUNK):
            target.write(chunk)
    _seal(copy)
    os.replace(copy, file)


def _seal(file: Path) -> None:
    with open(file, "rb+") as opened:
        head = opened.read(8 + int.from_bytes(opened.read(8), "little"))
        at = 8 + head.index(_ENTRY) + len(_ENTRY) - len(_BLANK) - 1
        opened.seek(0)
        digits = f"{_checksum(opened):08x}".encode()
        opened.seek(at)
        opened.write(digits)
        opened.flush()
        os.fsync(opened.fileno())


def _checksum(opened: Any) -> int:
    value = 0
    while chunk := opened.read(_CHUNK):
        value = zlib.crc32(chunk, value)
    return value


def check(file: Path) -> bool:
    """Check a file against its checksum.

    Returns:
        Whether the file has a checksum.

    Raises:
        ValueError: the file is damaged.
    """
    with open(file, "rb") as opened:
        first = opened.read(8)
        length = int.from_bytes(first, "little")
        if length > min(_LARGEST_HEADER, os.fstat(opened.fileno()).st_size):
            raise ValueError(f"{file} cannot be read: it is damaged or no safetensors file")
        header = opened.read(length)
        at = header.find(_ENTRY[: -len(_BLANK) - 1])
        if at < 0:
            return False
        at += len(_ENTRY) - len(_BLANK) - 1
        digits = header[at : at + len(_BLANK)]
        blank = header[:at] + _BLANK.encode() + header[at + len(_BLANK) :]
        value = zlib.crc32(blank, zlib.crc32(first))
        while chunk := opened.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    if f"{value:08x}".encode() != digits:
        raise ValueError(
            f"{file} cannot be read: it is damaged, its checksum is not that of its bytes"
        )
    return True


def opened(file: Path, required: bool = False) -> Any:
    """Open a file and check its checksum; what is read later is from the file that was checked.

    Args:
        file: the file.
        required: whether a file without a checksum is refused.

    Returns:
        What ``safetensors.safe_open`` returns, for a ``with``.

    Raises:
        ValueError: the file is missing, damaged, not a regular file or not a safetensors file.
    """
    try:
        check_name(file)
        for _ in range(_TRIES):
            check_regular(file)
            before = os.stat(file)
            has = check(file)
            if required and not has:
                raise ValueError(f"{file} cannot be read: it has no checksum")
            failed, handle = None, None
            try:
                handle = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError, RuntimeError) as error:
                failed = error
            after = os.stat(file)
            # Another process may have put a new file in its place since it was checked, or while
            # safetensors opened it, which it does twice.
            if (before.st_ino, before.st_dev) == (after.st_ino, after.st_dev):
                if failed is not None:
                    raise failed
                return handle
        raise ValueError(f"{file} cannot be read: it is replaced all the time")
    except (SafetensorError, OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
