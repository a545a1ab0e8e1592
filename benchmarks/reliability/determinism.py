"""Equal inputs, equal bits: after other calls, in threads and processes, whatever ran before."""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polyadic
from benchmarks.reliability import hostile
from benchmarks.reliability.jobs import digest
from benchmarks.reliability.kills import child, ended
from polyadic import nn as cp
from polyadic.durable.files import write_text

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
WIDE = DTYPES[:2]


@dataclass(frozen=True)
class Case:
    """A layer, and what it is called with.

    Attributes:
        name: for the record.
        make: the layer in a dtype.
        shape: of its input.
        rows: of the table for indices; 0 where the input is of numbers.
        dtypes: in which it computes.
    """

    name: str
    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    rows: int = 0
    dtypes: tuple[torch.dtype, ...] = DTYPES


def adapted(dtype: torch.dtype) -> nn.Module:
    """A linear layer with a CP adapter of PEFT."""
    from peft import get_peft_model

    from polyadic.adapters import CPConfig

    base = nn.Sequential(nn.Linear(96, 80, dtype=dtype))
    config = CPConfig(r=8, target_modules=["0"], init_weights=False)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


CASES = [
    Case("linear 1", lambda **k: cp.CPLinear(96, 80, rank=24, order=1, **k), (33, 96)),
    Case("linear 2", lambda **k: cp.CPLinear(96, 80, rank=24, order=2, **k), (33, 96)),
    Case("linear 3", lambda **k: cp.CPLinear(512, 384, rank=32, **k), (64, 512)),
    Case("linear primes", lambda **k: cp.CPLinear(97, 53, rank=7, **k), (5, 3, 97)),
    Case("linear one row", lambda **k: cp.CPLinear(256, 256, rank=16, **k), (1, 256)),
    Case("linear least", lambda **k: cp.CPLinear(96, 80, rank=9, memory="least", **k), (33, 96)),
    Case("conv 1d", lambda **k: cp.CPConv1d(12, 10, 5, rank=6, padding=2, **k), (3, 12, 31)),
    Case("conv 2d", lambda **k: cp.CPConv2d(24, 32, 3, rank=12, padding=1, **k), (4, 24, 14, 14)),
    Case("conv groups", lambda **k: cp.CPConv2d(8, 8, 3, rank=4, groups=2, **k), (2, 8, 9, 9)),
    Case("conv strided", lambda **k: cp.CPConv2d(8, 6, 5, rank=4, stride=2, **k), (2, 8, 17, 17)),
    Case("conv 3d", lambda **k: cp.CPConv3d(6, 4, 3, rank=3, padding=1, **k), (2, 6, 5, 6, 7)),
    Case(
        "transposed", lambda **k: cp.CPConvTranspose2d(8, 6, 3, rank=4, stride=2, **k), (2, 8, 7, 7)
    ),
    Case("embedding", lambda **k: cp.CPEmbedding(500, 64, rank=16, **k), (7, 40), 500),
    Case("head", lambda **k: cp.CPEmbedding(500, 64, rank=16, **k).as_linear(True), (9, 64)),
    Case(
        "shared", lambda **k: cp.CPSharedInput(cp.CPLinear.joint(3, 64, 48, rank=9, **k)), (9, 64)
    ),
    Case("spectral 1d", lambda **k: cp.CPSpectralConv1d(6, 8, 5, rank=4, **k), (3, 6, 31), 0, WIDE),
    Case(
        "spectral 2d",
        lambda **k: cp.CPSpectralConv2d(6, 8, (6, 5), rank=4, **k),
        (3, 6, 16, 17),
        0,
        WIDE,
    ),
    Case("adapter", adapted, (33, 96)),
]


def tensors(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, gradients and weights of three steps of SGD from a seed."""
    # A thread has no random state of its own; draws from generators are the same in each.
    source = torch.Generator().manual_seed(0)
    layer = case.make(dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) / 4)
    if case.rows:
        x = torch.randint(case.rows, case.shape, generator=source)
    else:
        x = torch.randn(case.shape, generator=source).to(dtype).requires_grad_()
    found: list[Tensor] = []
    for _ in range(3):
        y = layer(x)
        outputs = y if isinstance(y, tuple) else (y,)
        trained = [p for p in layer.parameters() if p.requires_grad]
        inputs = [*trained, *([x] if x.requires_grad else [])]
        loss = torch.stack([each.float().square().mean() for each in outputs]).sum()
        gradients = torch.autograd.grad(loss, inputs)
        found += [*(each.detach() for each in outputs), *gradients]
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=False):
                parameter.sub_(gradient, alpha=0.1)
    return [*found, *(p.detach() for p in layer.parameters())]


def everything() -> dict[str, str]:
    """The digest of every case in every dtype."""
    found = {}
    for case in CASES:
        for dtype in case.dtypes:
            found[f"{case.name} {dtype}"] = digest(nn.Module(), tensors(case, dtype))
    return found


def _after_other_calls() -> dict[str, str]:
    draw = random.Random(5)
    for _ in range(300):
        hostile.attempt(hostile.function(draw))
        hostile.attempt(hostile.forward(draw))
    return everything()


def _in_threads(count: int) -> dict[str, str]:
    found: list[dict[str, str]] = []
    threads = [threading.Thread(target=lambda: found.append(everything())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = found[0]
    agree = {n: all(one[n] == value for one in found) for n, value in first.items()}
    return {name: value if agree[name] else "differs" for name, value in first.items()}


def _write(path: str) -> None:
    torch.set_num_threads(1)
    lines = [f"{name}\t{value}" for name, value in everything().items()]
    write_text(Path(path), "\n".join(lines))


def _elsewhere(start: Callable[[str], object]) -> dict[str, str]:
    """What another process found."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found"
        start(str(path))
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(line.split("\t") for line in lines)


def _forked(path: str) -> None:
    ended(child(lambda: _write(path)))


def _spawned(path: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write, args=(path,))
    process.start()
    process.join()


def _with_deterministic_algorithms() -> dict[str, str]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return everything()
    finally:
        torch.use_deterministic_algorithms(before)


WAYS: dict[str, Callable[[], dict[str, str]]] = {
    "a second time": everything,
    "after 600 other calls": _after_other_calls,
    "in another thread": lambda: _in_threads(1),
    "in 8 threads at once": lambda: _in_threads(8),
    "in a forked process": lambda: _elsewhere(_forked),
    "in a new process": lambda: _elsewhere(_spawned),
    "under torch.use_deterministic_algorithms(True)": _with_deterministic_algorithms,
}


def compare(way: str, wanted: dict[str, str]) -> dict[str, Any]:
    """Compare all cases, run in some way, with what they gave at first, bit for bit."""
    found = WAYS[way]()
    equal = sum(found[name] == value for name, value in wanted.items())
    return {"kind": "determinism", "way": way, "compared": len(wanted), "equal": equal}


def _changed_by(
    way: str, change: Callable[[], object], undo: Callable[[], object]
) -> dict[str, Any]:
    """How many tensors of all cases in float32 a setting changes, and how far at most.

    Returns:
        A record: ``compared`` tensors, how many ``differ``, and ``most``, the largest
        ‖a − b‖ / ‖b‖.
    """
    before = [tensor for case in CASES for tensor in tensors(case, torch.float32)]
    try:
        change()
        after = [tensor for case in CASES for tensor in tensors(case, torch.float32)]
    finally:
        undo()
    pairs = [(a, b) for a, b in zip(after, before, strict=True) if not torch.equal(a, b)]
    most = max((float((a - b).double().norm() / b.double().norm()) for a, b in pairs), default=0.0)
    counts = {"compared": len(before), "differ": len(pairs), "most": most}
    return {"kind": "changes", "way": way, **counts}


def two_threads() -> dict[str, Any]:
    """What two threads change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return _changed_by(
        "2 threads in place of 1",
        lambda: torch.set_num_threads(2),
        lambda: torch.set_num_threads(threads),
    )


def calibrated() -> dict[str, Any]:
    """What a calibration changes; the user's own is left alone."""
    kept = os.environ.get("XDG_CACHE_HOME")

    def undo() -> None:
        os.environ.pop("XDG_CACHE_HOME")
        if kept is not None:
            os.environ["XDG_CACHE_HOME"] = kept

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        return _changed_by("polyadic.calibrate", polyadic.calibrate, undo)
