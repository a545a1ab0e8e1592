"""Sums over the processes of a mesh, with the gradients that they have in each process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Once(Function):
    """A bias if ``here``, else zeros; and the gradient of the bias if ``back``, else zeros.

    One process adds the bias and the others add zeros, but every process gets the whole gradient of
    the bias. When that gradient is differentiated again, the processes' shares are added up, so
    that only one process may contribute.
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, here: bool, back: bool) -> Tensor:
        ctx.where = here, back
        return bias.view_as(bias) if here else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        here, back = ctx.where
        return _Once.apply(grad, back, here), None, None


def once(bias: Tensor, here: bool) -> Tensor:
    """Return a bias where it is to be added, and zeros elsewhere, with its gradient everywhere."""
    mine: Tensor = _Once.apply(bias, here, True)
    return mine


class _Summed(Function):
    """Tensors, summed over a dimension of a mesh if ``here``; their gradients, summed if ``back``.

    If each process goes on with the sums in its own way, their gradients are the sums of the
    processes' gradients. If all processes go on alike, each has the whole gradient already.
    """

    @staticmethod
    def forward(
        ctx: Any, mesh: Any, dim: int, here: bool, back: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.where = mesh, dim, here, back
        if not here:
            return tuple([tensor.view_as(tensor) for tensor in tensors])
        return all_reduced(mesh, dim, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mesh, dim, here, back = ctx.where
        return None, None, None, None, *_Summed.apply(mesh, dim, back, here, *grads)


def summed(mesh: Any, dim: int, here: bool, back: bool, *tensors: Any) -> tuple[Tensor, ...]:
    """Sum tensors over a dimension of a mesh if ``here``, and their gradients if ``back``."""
    found: tuple[Tensor, ...] = _Summed.apply(mesh, dim, here, back, *tensors)
    return found


def all_reduced(mesh: Any, dim: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Sums of tensors over a dimension of a mesh, by one all_reduce."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    flat = tensors[0] if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])
    whole = [Replicate()] * mesh.ndim
    parts = [Partial() if i == dim else Replicate() for i in range(mesh.ndim)]
    flat = DTensor.from_local(flat.contiguous(), mesh, parts, run_check=False)
    flat = flat.redistribute(placements=whole).to_local()
    if len(tensors) == 1:
        return (flat,)
    pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
    return tuple([p.view(t.shape).to(t.dtype) for p, t in zip(pieces, tensors, strict=True)])


def sums_taken(y: Any) -> Any:
    """Take the sums that a DTensor stands for; second derivatives of torch's own way are wrong."""
    from torch.distributed.tensor import DTensor, Replicate

    partial = [dim for dim, placement in enumerate(y.placements) if placement.is_partial()]
    if not partial:
        return y
    local, placements = y.to_local(), list(y.placements)
    for dim in partial:
        (local,) = summed(y.device_mesh, dim, True, False, local)
        placements[dim] = Replicate()
    return DTensor.from_local(
        local, y.device_mesh, placements, run_check=False, shape=y.shape, stride=y.stride()
    )
