"""What every phase is given: the device, the timer, the writer, and how much time is left."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.floors import Rates
from benchmarks.gpu.records import Run, Writer
from benchmarks.gpu.timer import Patience, Timer

# Seconds a cell may take at the most; no cell is begun with less left.
LEAST_FOR_CELL = 2.0


class LostDeviceError(RuntimeError):
    """The GPU answers nothing any more in this process; only a new one can go on."""


class Bench:
    """One worker's means.

    Attributes:
        device: that is measured.
        dtype: of all layers, where a phase says nothing else.
        dry: whether all sizes are tiny and only the code is tried.
        writer: of the records.
        timer: of calls.
        rates: ceilings measured so far.
        l2: bytes of the L2 cache.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, writer: Writer, dry: bool) -> None:
        self.device, self.dtype, self.writer, self.dry = device, dtype, writer, dry
        self.timer = Timer(device, Patience(0.0, 2, 0.0) if dry else Patience())
        self.deadline = float("inf")
        self.phase = ""
        self.l2 = 50_000_000
        if device.type == "cuda":
            self.l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.rates = Rates()
        self.load_rates()

    @property
    def compiler(self) -> str:
        """The backend of ``torch.compile``: a quick one where only the code is tried."""
        return "aot_eager" if self.dry else "inductor"

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    def load_rates(self) -> None:
        """Take the ceilings from what has been recorded."""
        run = Run.load(self.writer.path)
        copy, gemm = run.rate("copy"), run.rate(f"gemm {self.dtype_name()}")
        if copy and gemm:
            self.rates = Rates(copy, gemm, True)

    def dtype_name(self, dtype: torch.dtype | None = None) -> str:
        """``"bfloat16"``."""
        return str(dtype or self.dtype).removeprefix("torch.")

    def left(self) -> float:
        """Seconds until this phase must end."""
        return self.deadline - time.monotonic()

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers on the device."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def rotations(self, nbytes: int, most: int = 64) -> int:
        """How many sets of so many bytes are three times the L2 cache; two at least."""
        if self.dry:
            return 2
        return max(2, min(most, -(-3 * self.l2 // max(nbytes, 1))))

    def fresh(self, cells: Iterable[str]) -> Iterator[str]:
        """Those cells that no earlier worker has begun, as long as time is left."""
        begun = {r["cell"] for r in Run.load(self.writer.path).of("cell")}
        for cell in cells:
            if cell in begun:
                continue
            if self.left() < LEAST_FOR_CELL:
                raise TimeoutError(f"stopped before {cell}")
            yield cell

    @contextmanager
    def guarded(self, what: str, **fields: Any) -> Iterator[None]:
        """Record what goes wrong inside and go on, unless the GPU is lost.

        Raises:
            LostDeviceError: the GPU answers no more.
        """
        try:
            yield
        except (TimeoutError, LostDeviceError, KeyboardInterrupt):
            raise
        except Exception as error:
            self.writer.write("note", phase=self.phase, of=what, text=said(error), **fields)
            del error
            self.recover()

    def recover(self) -> None:
        """See that the GPU still answers after a failure, and give its memory back.

        Raises:
            LostDeviceError: it does not.
        """
        try:
            self.timer.synchronize()
            self.clean()
        except Exception as error:
            raise LostDeviceError(said(error)) from error

    def clean(self) -> None:
        """Free what the last cell held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# Letters that a record keeps of an exception's message, at its beginning and at its end.
HEAD_LETTERS, TAIL_LETTERS = 400, 500
# How torch's compiler begins those lines of its messages that are advice.
ADVICE = ("Hint:", "For more details", "Set TORCHDYNAMO_VERBOSE")


def said(error: BaseException) -> str:
    """An exception in one line, with the place it comes from.

    Of a long message the middle is left out: a compiler says first what it could not do, and last
    in which line of the code that it was given.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(" ".join(line for line in lines if not line.startswith(ADVICE)).split())
    if len(text) > HEAD_LETTERS + TAIL_LETTERS:
        text = f"{text[:HEAD_LETTERS]} … {text[-TAIL_LETTERS:]}"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"
