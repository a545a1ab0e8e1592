"""Comparisons of tensors that tests share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

TOLERANCE = 1e-10


def assert_close(got: Tensor, want: Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    """Largest deviation at most ``tolerance`` times the largest expected entry; NaN fails."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: {got.dtype}, not {want.dtype}"
    if want.numel() == 0:
        return
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= tolerance * scale, f"{name}: off by {error:.2e} where entries reach {scale:.2e}"


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], f"gradient of {name}")


def assert_trees_close(got: Any, want: Any, name: str = "entry") -> None:
    """Tensors, or sequences of what this compares."""
    if isinstance(want, Tensor):
        return assert_close(got, want, name)
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_trees_close(g, w, f"{name} {i}")
    return None
