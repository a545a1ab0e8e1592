"""Files with flipped bits, and a directory that is read while it is written."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.reliability.jobs import digest
from benchmarks.reliability.kills import child, ended, fresh
from polyadic.durable import checkpoint
from polyadic.nn import CPLinear
from polyadic.pretrained import from_pretrained, save_pretrained


def flips(content: bytes, step: int) -> Iterator[bytes]:
    """The content with one bit flipped, at every so many bits."""
    for bit in range(0, 8 * len(content), step):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def model(rank: int) -> nn.Sequential:
    """A network of one CP layer."""
    torch.manual_seed(rank)
    return nn.Sequential(CPLinear(6, 4, rank=rank, order=1))


def skeleton() -> nn.Sequential:
    """What it is loaded into."""
    return nn.Sequential(nn.Linear(6, 4))


def flipped_model(folder: Path, step: int) -> dict[str, Any]:
    """Load saved tensors with one bit flipped, for every so many bits."""
    save_pretrained(model(2), folder)
    file = folder / "model.safetensors"
    flipped = _flipped(file, step, lambda: from_pretrained(folder, skeleton()))
    return {"file": "a saved model", **flipped}


def flipped_checkpoint(file: Path, step: int) -> dict[str, Any]:
    """Load a checkpoint with one bit flipped, for every so many bits."""
    state = {"x": torch.arange(40.0), "n": [1, (2.5, None)], "text": "x"}
    checkpoint.save(file, "test", state, generations=1)
    return {"file": "a checkpoint", **_flipped(file, step, lambda: checkpoint.load(file, "test"))}


def _flipped(file: Path, step: int, load: Callable[[], object]) -> dict[str, Any]:
    noticed = tried = 0
    for changed in flips(file.read_bytes(), step):
        file.write_bytes(changed)
        tried += 1
        try:
            load()
        except ValueError:
            noticed += 1
    return {"kind": "flips", "tried": tried, "noticed": noticed}


def read_beside_a_writer(folder: Path, reads: int) -> dict[str, Any]:
    """Load a model whose files another process replaces by those of another, again and again."""
    versions = {rank: model(rank) for rank in (2, 3)}
    fresh(folder)
    save_pretrained(versions[2], folder)

    def write() -> None:
        while True:
            for rank in (3, 2):
                save_pretrained(versions[rank], folder)

    writer = child(write)
    seen = dict.fromkeys(versions, 0)
    whole = 0
    try:
        for _ in range(reads):
            loaded: Any = from_pretrained(folder, skeleton())
            rank = loaded[0].cp.rank
            seen[rank] += 1
            whole += digest(loaded) == digest(versions[rank])
    finally:
        os.kill(writer, signal.SIGKILL)
        ended(writer)
    return {"kind": "reads", "reads": reads, "versions": list(seen.values()), "whole": whole}
