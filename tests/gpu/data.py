"""Inputs and judgements of the tables: guards of NaN, poisoned outputs, bounds of rounding.

A stray read meets a NaN, an element that is not written stays one. Small integers must come out
exactly, which finds faults of indexing. Other numbers keep to twice the error that torch makes with
the same steps at the same precision, both against float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Elements between which integers are exact.
EXACT_UP_TO = {torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}
GUARD = 256


def device() -> str:
    """``"cuda"`` where there is one; else ``"cpu"``, for Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtypes_of(number: int) -> tuple[torch.dtype, ...]:
    """The dtypes in which a table checks the shape of this number: all of them on a GPU.

    The interpreter, which is slow, takes single precision and one of 16 bits, each in its turn.
    """
    return DTYPES if device() == "cuda" else (torch.float32, DTYPES[1 + number % 2])


def repeats(dtype: torch.dtype) -> bool:
    """Whether a second run is worth its time in a dtype.

    The interpreter runs the programs of a kernel one after the other. Only what the first run left
    behind can change its second result, whatever the dtype.
    """
    return device() == "cuda" or dtype == torch.float32


def guarded(tensor: Tensor, shift: int = 0) -> Tensor:
    """The numbers of a tensor on the device, between NaNs; ``shift`` elements off an alignment."""
    flat = torch.full(
        (tensor.numel() + 2 * GUARD + shift,), float("nan"), dtype=tensor.dtype, device=device()
    )
    inner = flat[GUARD + shift : GUARD + shift + tensor.numel()]
    inner.copy_(tensor.reshape(-1))
    return inner.view(tensor.shape)


def draw(shape: Sequence[int], dtype: torch.dtype, integers: bool, shift: int = 0) -> Tensor:
    """Random numbers between guards: normal ones, or -1, 0 and 1."""
    numbers = torch.randint(-1, 2, tuple(shape)) if integers else torch.randn(tuple(shape))
    return guarded(numbers.to(dtype), shift)


def draw_groups(
    modes: Sequence[Sequence[int]], rank: int, dtype: torch.dtype, integers: bool, shift: int = 0
) -> list[list[Tensor]]:
    """Factors (m_d, R) of each group."""
    return [[draw((mode, rank), dtype, integers, shift) for mode in group] for group in modes]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Have torch fill new memory with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def error_of(numbers: Tensor, reference: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    scale = reference.norm().clamp_min(1e-30)
    return ((numbers.double().cpu() - reference).norm() / scale).item()


def judge(name: str, numbers: Tensor, reference: Tensor, way_of_torch: Tensor, exact: bool) -> None:
    """Raise AssertionError unless numbers are what they must be.

    Args:
        name: what is judged.
        numbers: what the kernel gave.
        reference: the same in float64, on the CPU.
        way_of_torch: the same by torch at the kernel's precision, on the CPU.
        exact: whether the inputs were integers.
    """
    assert not numbers.isnan().any(), f"{name}: a NaN was read, or an element not written"
    if exact and reference.abs().max() <= EXACT_UP_TO[numbers.dtype]:
        assert torch.equal(numbers.double().cpu(), reference), f"{name}: integers are not exact"
        return
    error, allowed = error_of(numbers, reference), 2 * error_of(way_of_torch, reference) + 5e-7
    assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
