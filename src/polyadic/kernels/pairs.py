"""The Khatri-Rao matrices of a whole layer, and the gradients of all their factors.

A layer needs one matrix for each side, a convolution one more for its taps. On a GPU each operation
of torch costs microseconds, however little it does, and a matrix takes several; so a layer asks for
all at once, and one Triton kernel makes them. Elsewhere, and wherever something more than numbers
is asked for (derivatives, transforms, a graph to be exported), they are made one by one with
torch's operations. Both ways multiply in float32 and round once.

On a GPU matrices have their columns padded with zeros to a multiple of 8, 16 bytes of a half
precision: matrix products of rows that start elsewhere are several times slower there. What is
multiplied with them is padded with them, and zeros add nothing to any sum.

The kernels are operations of torch too, ``polyadic::khatri_rao`` and ``polyadic::mttkrp``, for
compilers and modes to see. Torch's counter finds no FLOPs in them, nor in the elementwise
operations that they stand for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic._torch import exporting, is_plain, transformed
from polyadic.kernels.backend import DTYPES, triton_serves
from polyadic.kernels.fused import contiguous, may_fuse
from polyadic.kernels.multilinear import khatri_rao, khatri_rao_backward
from polyadic.plans import Backend

Group = Sequence[Tensor]

PADDED_TO = 8


def padded_rank(rank: int) -> int:
    """Return the number of columns that a Khatri-Rao matrix of this rank has on a GPU."""
    return -(-rank // PADDED_TO) * PADDED_TO


def unpadded(matrix: Tensor, rank: int) -> Tensor:
    """Return a matrix without the columns of zeros that a GPU has added to it, if it has."""
    return matrix if matrix.shape[1] == rank else matrix[:, :rank]


def khatri_rao_pair(
    groups: Sequence[Group], dtype: torch.dtype, by: Backend = "triton"
) -> list[Tensor]:
    """Make the Khatri-Rao matrix of each group of factors.

    Args:
        groups: factors (m_d, R) of each matrix, all of one rank, dtype and device; the last mode of
            a group varies fastest.
        dtype: dtype of the matrices.
        by: ``"torch"`` keeps to torch's operations; with ``"triton"`` the kernel makes them where
            nothing but numbers is wanted.

    Returns:
        (Π m_d, R) for each group; on a GPU (Π m_d, R rounded up to a multiple of 8) with zeros in
        the columns added.
    """
    factors = [factor for group in groups for factor in group]
    if by == "triton" and dtype in DTYPES and may_fuse(factors[0], factors):
        return launch_khatri_raos(groups, dtype)
    if not (factors[0].is_cuda and all(map(is_plain, factors))):
        return [khatri_rao(group, dtype) for group in groups]
    padded = padded_rank(factors[0].shape[1])
    if by != "triton" or not _may_launch(factors, dtype):
        return _khatri_raos(groups, dtype, padded)
    # A direct call takes a tenth of the time, but neither a compiler nor a mode would see it.
    lengths = [len(group) for group in groups]
    matrices: list[Tensor] = torch.ops.polyadic.khatri_rao(factors, lengths, dtype, padded)
    return matrices


def mttkrp_pair(
    d_matrices: Sequence[Tensor], groups: Sequence[Group], by: Backend = "triton"
) -> list[list[Tensor]]:
    """Make the gradient of every factor of every group from those of the Khatri-Rao matrices.

    Args:
        d_matrices: for each group dK (Π m_d, R or more columns, which are not read), or pieces
            (p, Π m_d, R or more) that add up to it; in the factors' dtype or float32.
        groups: factors (m_d, R) of each matrix.
        by: as in ``khatri_rao_pair``.

    Returns:
        For each group the gradients (m_d, R) of its factors, in their dtype.
    """
    factors = [factor for group in groups for factor in group]
    tensors = [*d_matrices, *factors]
    if (
        by == "triton"
        and may_fuse(factors[0], tensors)
        and all(tensor.dtype in DTYPES for tensor in tensors)
    ):
        return launch_mttkrps(d_matrices, groups)
    if not (
        by == "triton"
        and factors[0].is_cuda
        and all(map(is_plain, tensors))
        and _may_launch(factors, *[d_matrix.dtype for d_matrix in d_matrices])
    ):
        return _mttkrps(d_matrices, groups)
    lengths = [len(group) for group in groups]
    flat: list[Tensor] = torch.ops.polyadic.mttkrp(list(d_matrices), factors, lengths)
    return _regrouped(flat, lengths)


def _may_launch(factors: Sequence[Tensor], *dtypes: torch.dtype) -> bool:
    """Whether a Triton kernel may do what is asked, with nothing but numbers wanted."""
    leader = factors[0]
    if leader.dtype not in DTYPES or any(dtype not in DTYPES for dtype in dtypes):
        return False
    return not transformed() and not exporting() and triton_serves(leader.device.index)


def _regrouped(flat: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    groups, start = [], 0
    for length in lengths:
        groups.append(list(flat[start : start + length]))
        start += length
    return groups


def _khatri_raos(groups: Sequence[Group], dtype: torch.dtype, padded: int) -> list[Tensor]:
    """Make the matrices one by one with torch's operations."""
    matrices = [khatri_rao(group, dtype) for group in groups]
    extra = padded - matrices[0].shape[1]
    return [F.pad(matrix, (0, extra)) for matrix in matrices] if extra else matrices


def _mttkrps(d_matrices: Sequence[Tensor], groups: Sequence[Group]) -> list[list[Tensor]]:
    """Make the gradients one by one with torch's operations."""
    gradients = []
    for d_matrix, group in zip(d_matrices, groups, strict=True):
        total = d_matrix.sum(0) if d_matrix.dim() == 3 else d_matrix
        if total.shape[1] > group[0].shape[1]:
            total = unpadded(total, group[0].shape[1]).contiguous()
        gradients.append(khatri_rao_backward(total, group))
    return gradients


@functools.cache
def _by_triton() -> tuple[Callable[..., Any], Callable[..., list[list[Tensor]]]]:
    """Import the kernels' functions; an import at each call would cost as much as a launch."""
    from polyadic.kernels.triton.khatri_rao import khatri_raos
    from polyadic.kernels.triton.mttkrp import mttkrps

    return khatri_raos, mttkrps


def _contiguous(groups: Sequence[Group]) -> Sequence[Group]:
    if all(map(Tensor.is_contiguous, itertools.chain.from_iterable(groups))):
        return groups
    return list(map(contiguous, groups))


def launch_khatri_raos(groups: Sequence[Group], dtype: torch.dtype) -> list[Tensor]:
    """Do what ``khatri_rao_pair`` does by the kernel, for a caller that has asked ``may_fuse``."""
    padded = padded_rank(groups[0][0].shape[1])
    matrices: list[Tensor] = _by_triton()[0](_contiguous(groups), dtype, padded)[0]
    return matrices


def launch_khatri_raos_and_sums(
    groups: Sequence[Group], dtype: torch.dtype, d_y: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Do what ``launch_khatri_raos`` does, and begin the gradient of a bias in the same launch.

    Args:
        groups: as there.
        dtype: as there.
        d_y: (B, N), contiguous.

    Returns:
        What ``launch_khatri_raos`` does; and partial sums of d_y over its rows, which
        ``launch_mttkrps`` adds up.
    """
    made: tuple[list[Tensor], Tensor]
    made = _by_triton()[0](_contiguous(groups), dtype, padded_rank(groups[0][0].shape[1]), d_y)
    return made


def launch_mttkrps(
    d_matrices: Sequence[Tensor], groups: Sequence[Group], sums: Tensor | None = None
) -> list[list[Tensor]]:
    """Do what ``mttkrp_pair`` does by the kernel, for a caller that has asked ``may_fuse``.

    With ``sums``, which ``launch_khatri_raos_and_sums`` has made, the gradient (N,) of the bias
    follows in a list of its own.
    """
    d_matrices = [d if d.stride(-1) == 1 else d.contiguous() for d in d_matrices]
    return _by_triton()[1](d_matrices, _contiguous(groups), sums)


def _khatri_rao_on_cuda(
    factors: list[Tensor], lengths: list[int], dtype: torch.dtype, padded: int
) -> list[Tensor]:
    return launch_khatri_raos(_regrouped(factors, lengths), dtype)


def _khatri_rao_on_cpu(
    factors: list[Tensor], lengths: list[int], dtype: torch.dtype, padded: int
) -> list[Tensor]:
    matrices = _khatri_raos(_regrouped(factors, lengths), dtype, padded)
    # An operator must not return its arguments, as the product of one factor would.
    return [m.clone() if any(m is f for f in factors) else m for m in matrices]


def _khatri_rao_shapes(
    factors: list[Tensor], lengths: list[int], dtype: torch.dtype, padded: int
) -> list[Tensor]:
    matrices = []
    for group in _regrouped(factors, lengths):
        rows = 1
        for factor in group:
            rows *= factor.shape[0]
        matrices.append(factors[0].new_empty((rows, padded), dtype=dtype))
    return matrices


def _mttkrp_on_cuda(
    d_matrices: list[Tensor], factors: list[Tensor], lengths: list[int]
) -> list[Tensor]:
    groups = launch_mttkrps(d_matrices, _regrouped(factors, lengths))
    return [gradient for group in groups for gradient in group]


def _mttkrp_on_cpu(
    d_matrices: list[Tensor], factors: list[Tensor], lengths: list[int]
) -> list[Tensor]:
    groups = _mttkrps(d_matrices, _regrouped(factors, lengths))
    gradients = [gradient for group in groups for gradient in group]
    return [g.clone() if any(g is d for d in d_matrices) else g for g in gradients]


def _mttkrp_shapes(
    d_matrices: list[Tensor], factors: list[Tensor], lengths: list[int]
) -> list[Tensor]:
    return [factor.new_empty(factor.shape) for factor in factors]


_LIBRARY = torch.library.Library("polyadic", "FRAGMENT")
_LIBRARY.define(
    "khatri_rao(Tensor[] factors, int[] lengths, ScalarType dtype, int padded) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "mttkrp(Tensor[] d_matrices, Tensor[] factors, int[] lengths) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("khatri_rao", _khatri_rao_on_cuda, "CUDA")
_LIBRARY.impl("khatri_rao", _khatri_rao_on_cpu, "CPU")
_LIBRARY.impl("mttkrp", _mttkrp_on_cuda, "CUDA")
_LIBRARY.impl("mttkrp", _mttkrp_on_cpu, "CPU")
torch.library.register_fake("polyadic::khatri_rao", _khatri_rao_shapes, lib=_LIBRARY)
torch.library.register_fake("polyadic::mttkrp", _mttkrp_shapes, lib=_LIBRARY)
