"""The bytes that the language model learns: the source of Python's standard library, by file."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Tests are much alike, and as long as all the rest.
LEFT_OUT = ("test", "tests", "idlelib", "site-packages", "__pycache__", "lib2to3")
# One file of so many, chosen by the hash of its name, is held out.
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Texts:
    """Bytes to train on and bytes held out.

    Attributes:
        train: (n,) uint8.
        held_out: (m,) uint8, of other files.
        digest: of both, the first 16 hexadecimal digits of SHA-256.
    """

    train: Tensor
    held_out: Tensor
    digest: str


def standard_library(root: Path | None = None) -> Texts:
    """Read the Python files of the standard library, split by file.

    Args:
        root: another folder of Python files, for tests.

    Raises:
        ValueError: there are too few files to split.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not set(path.relative_to(root).parts[:-1]) & set(LEFT_OUT)
    ]
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in files:
        name = path.relative_to(root).as_posix()
        number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        parts[number % HELD_OUT_ONE_IN == 0].append(path.read_bytes())
    held_out, train = b"".join(parts[True]), b"".join(parts[False])
    if not held_out or not train:
        raise ValueError(f"{root} must hold Python files for both parts, got {len(files)}")
    return Texts(
        _tensor(train), _tensor(held_out), hashlib.sha256(train + held_out).hexdigest()[:16]
    )


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
