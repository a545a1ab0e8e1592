"""The specification of a CP layer: every contraction written out, one factor at a time.

Read this file first. It says what a CP layer computes and what its gradients are, in the order
that is easiest to follow and not the one that is fastest: it keeps the result of every step.
The fast code is tested against it and never imports it.

A CP tensor is a sum of R outer products of factor columns, with an optional weight for each:

    T[i, j, ..., z] = sum_r  lambda[r] F1[i, r] F2[j, r] ... FK[z, r]          Fd: (mode_d, R)

Its modes come in groups. Joining the modes of each group gives back the dense object:

    linear   groups (in, out)            W (M, N)             y = x @ W
    conv     groups (out, in, kernel)    W (Cout, Cin, h, w)  y = conv2d(x, W, padding="same")

T never has to be built. A layer contracts x with the in-factors (down to one number for each
component r), convolves with the kernel factors, and spreads the result with the out-factors.

Axes of the einsums
    b  batch        r  component, 1..R        a  the mode of the factor at hand        k  tap
    ...  modes waiting for their factor (in) or already produced (out)        h w  height, width

Gradients. Each einsum step y = (X,F->Y) multiplies entries of x by entries of f and adds up. It is
linear in either one, so with g = dL/dy the chain rule is the same sum with two names exchanged:

    y_Y = sum x_X f_F    =>    dL/dx = einsum("Y,F->X", g, f)      dL/df = einsum("Y,X->F", g, x)

(right whenever each index of one operand stands in the other or in the output, as it does here).
Of complex numbers torch's gradient is that of the real and of the imaginary part, dL/dx = dL/da +
i dL/db; in each of the two sums that makes the other operand its conjugate.
A backward pass is therefore the forward pass read from the end, and ``saved_tensors[s]``, the input
of step s, is all it needs besides the factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cp_conv_bwd", "cp_conv_fwd", "cp_times_matrix_bwd", "cp_times_matrix_fwd", "dense"]


class CPLike(Protocol):
    """What is read of a CP tensor, be it ``polyadic.CPTensor`` or tltorch's ``CPTensorized``."""

    @property
    def tensorized_shape(self) -> Any:
        """The modes of each group, as in ``((4, 4, 16), (4, 4, 8))``."""

    @property
    def factors(self) -> Any:
        """One ``(mode, R)`` matrix for each mode, in the order of ``tensorized_shape``."""


def dense(tensor: CPLike) -> Tensor:
    """Build the dense object that a CP tensor stands for, differentiably.

    Args:
        tensor: a CP tensor with at least two groups of modes.

    Returns:
        ``(M, N)`` for the groups (in, out); ``(Cout, Cin, *kernel)`` for (out, in, kernel).

    Raises:
        TypeError: ``tensor`` has no ``tensorized_shape`` or no ``factors``.
        ValueError: it has fewer than two groups, or a factor does not fit its mode.
    """
    groups, factors = _read(tensor)
    if len(groups) < 2:
        raise ValueError(
            f"dense needs the groups (in, out) or (out, in, kernel), got {groups}; "
            "give each group as a tuple of modes"
        )
    first = len(groups[0])
    left = _scaled(_khatri_rao(factors[:first]), tensor)
    right = _khatri_rao(factors[first:])
    shape = [math.prod(groups[0]), math.prod(groups[1])]
    shape += [mode for group in groups[2:] for mode in group]
    return (left @ right.T).reshape(shape)


def cp_times_matrix_fwd(tensor: CPLike, matrix: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Multiply a matrix by a CP tensorized matrix, ``matrix @ W``, one factor at a time.

        z[b, r]          =  lambda[r]  sum_{a1..aD}  x[b, a1..aD] A1[a1, r] ... AD[aD, r]
        y[b, c1..cE]     =  sum_r      z[b, r] C1[c1, r] ... CE[cE, r]

    Args:
        tensor: groups (in, out), so ``tensorized_shape = ((m1..mD), (n1..nE))``.
        matrix: ``(B, M)`` with ``M = m1...mD``; B may be 0.

    Returns:
        ``(output, saved_tensors)``: the output ``(B, N)``, and a list with the input of every
        factor's step, ``saved_tensors[s]`` for ``factors[s]``. With weights, the one at place D
        is already multiplied by them.

    Raises:
        TypeError: ``tensor`` is no CP tensor, or ``matrix`` has another dtype than its factors.
        ValueError: ``tensor`` has not two groups, or ``matrix`` is not ``(B, M)``.
    """
    (in_shape, out_shape), factors = _read(tensor, groups="(in, out)")
    _check("matrix", matrix, (None, math.prod(in_shape)), factors)
    batch, order = matrix.shape[0], len(in_shape)
    steps = _linear_steps(order, len(out_shape))

    saved_tensors = []
    current = matrix.reshape(batch, *in_shape)
    for step in range(len(factors)):
        saved_tensors.append(current)
        current = torch.einsum(steps[step], current, factors[step])
        if step == order - 1:
            current = _scaled(current, tensor)
    return current.reshape(batch, math.prod(out_shape)), saved_tensors


def cp_times_matrix_bwd(
    tensor: CPLike, grad: Tensor, saved_tensors: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Backward of ``cp_times_matrix_fwd``.

    The steps are undone from the last to the first; ``grad`` is always the gradient of the output
    of the step at hand. Weights, if any, are honoured, but their own gradient is not part of the
    result: ``polyadic.functional.cp_linear_backward`` gives it.

    Args:
        tensor: the CP tensor given to the forward.
        grad: ``(B, N)``, the gradient of its output.
        saved_tensors: what the forward saved.

    Returns:
        ``(factor_grads, grad)``: one gradient for each factor in their order, and that of
        ``matrix``, ``(B, M)``.

    Raises:
        TypeError: ``tensor`` is no CP tensor, or ``grad`` has another dtype than its factors.
        ValueError: ``grad`` is not ``(B, N)``, or ``saved_tensors`` is not this tensor's.
    """
    (in_shape, out_shape), factors = _read(tensor, groups="(in, out)")
    batch, order = _saved_batch(saved_tensors, len(factors), in_shape), len(in_shape)
    _check("grad", grad, (batch, math.prod(out_shape)), factors)
    steps = _linear_steps(order, len(out_shape))

    factor_grads = [torch.empty(0)] * len(factors)
    grad = grad.reshape(batch, *out_shape)
    for step in reversed(range(len(factors))):
        if step == order - 1:
            grad = _scaled_bwd(grad, tensor)
        grad, factor_grads[step] = _einsum_bwd(
            steps[step], grad, saved_tensors[step], factors[step]
        )
    return factor_grads, grad.reshape(batch, math.prod(in_shape))


def _linear_steps(in_modes: int, out_modes: int) -> list[str]:
    """One einsum for each factor, in the order of the factors."""
    return [
        "ba...,ar->b...r",  # the first mode is summed, once for each component
        *["ba...r,ar->b...r"] * (in_modes - 1),  # the next modes, within their component
        *["b...r,ar->b...ar"] * (out_modes - 1),  # an out-mode is spread over
        "b...r,ar->b...a",  # the last one too, and the components are summed
    ]


def cp_conv_fwd(tensor: CPLike, input_tensor: Tensor, order: int) -> tuple[Tensor, list[Tensor]]:
    """Convolve an image with a CP tensorized kernel, stride 1 and padding "same".

        z[b, r, h, w]       =  lambda[r]  sum_{a1..aD} x[b, a1..aD, h, w] A1[a1, r] ... AD[aD, r]
        v[b, r, h, w]       =  sum_{k, l}  z[b, r, h + k - p, w + l - q] K1[k, r] K2[l, r]
        y[b, c1..cD, h, w]  =  sum_r       v[b, r, h, w] C1[c1, r] ... CD[cD, r]

    where z is zero outside the image and (p, q) = ((kh - 1) // 2, (kw - 1) // 2): of an even
    kernel's uneven padding the extra zero stands at the end, as in torch.

    Args:
        tensor: groups (out, in, kernel), so
            ``tensorized_shape = ((c1..cD), (a1..aD), (kh, kw))``.
        input_tensor: ``(B, Cin, H, W)``; B may be 0.
        order: D, the number of modes of the out group, and of the in group.

    Returns:
        ``(output, saved_tensors)``: the output ``(B, Cout, H, W)``, and a list with the input of
        every step: the D in-factors, the kernel's height, its width, the D out-factors. With
        weights, the one at place D is already multiplied by them.

    Raises:
        TypeError: ``tensor`` is no CP tensor, or the input has another dtype than its factors.
        ValueError: the groups, ``order`` or the input's shape do not fit.
    """
    (out_shape, in_shape, _), factors = _read(tensor, groups="(out, in, kernel)")
    if order != len(out_shape):
        raise ValueError(
            f"order must be the number of out modes, {len(out_shape)} in {out_shape}, got {order}"
        )
    _check("input_tensor", input_tensor, (None, math.prod(in_shape), None, None), factors)
    batch, _, height, width = input_tensor.shape
    in_steps, out_steps = _conv_steps(order)
    out_factors, in_factors, (k1, k2) = _split(factors, order)

    saved_tensors = []
    current = input_tensor.reshape(batch, *in_shape, height, width)
    for equation, factor in zip(in_steps, in_factors, strict=True):
        saved_tensors.append(current)
        current = torch.einsum(equation, current, factor)
    current = _scaled(current, tensor)

    saved_tensors.append(current)
    current = _depthwise(current, k1, axis=-2)
    saved_tensors.append(current)
    current = _depthwise(current, k2, axis=-1)

    for equation, factor in zip(out_steps, out_factors, strict=True):
        saved_tensors.append(current)
        current = torch.einsum(equation, current, factor)
    return current.reshape(batch, math.prod(out_shape), height, width), saved_tensors


def cp_conv_bwd(
    tensor: CPLike, dy: Tensor, saved_tensors: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Backward of ``cp_conv_fwd``.

    As in ``cp_times_matrix_bwd``, the steps are undone from the last to the first. Weights, if any,
    are honoured, but their own gradient is not part of the result:
    ``polyadic.functional.cp_conv_backward`` gives it.

    Args:
        tensor: the CP tensor given to the forward.
        dy: ``(B, Cout, H, W)``, the gradient of its output.
        saved_tensors: what the forward saved.

    Returns:
        ``(factor_grads, dx)``: one gradient for each factor in their order (out, in, kernel), and
        that of the input, ``(B, Cin, H, W)``.

    Raises:
        TypeError: ``tensor`` is no CP tensor, or ``dy`` has another dtype than its factors.
        ValueError: ``dy`` is not ``(B, Cout, H, W)``, or ``saved_tensors`` is not this tensor's.
    """
    (out_shape, in_shape, _), factors = _read(tensor, groups="(out, in, kernel)")
    order = len(out_shape)
    batch = _saved_batch(saved_tensors, len(factors), in_shape)
    height, width = saved_tensors[0].shape[-2:]
    _check("dy", dy, (batch, math.prod(out_shape), height, width), factors)
    in_steps, out_steps = _conv_steps(order)
    out_factors, in_factors, (k1, k2) = _split(factors, order)
    saved_in, saved_out = saved_tensors[:order], saved_tensors[order + 2 :]

    out_grads, in_grads = [torch.empty(0)] * order, [torch.empty(0)] * order
    grad = dy.reshape(batch, *out_shape, height, width)
    for d in reversed(range(order)):
        grad, out_grads[d] = _einsum_bwd(out_steps[d], grad, saved_out[d], out_factors[d])

    grad, k2_grad = _depthwise_bwd(grad, saved_tensors[order + 1], k2, axis=-1)
    grad, k1_grad = _depthwise_bwd(grad, saved_tensors[order], k1, axis=-2)

    grad = _scaled_bwd(grad, tensor)
    for d in reversed(range(order)):
        grad, in_grads[d] = _einsum_bwd(in_steps[d], grad, saved_in[d], in_factors[d])
    dx = grad.reshape(batch, math.prod(in_shape), height, width)
    return [*out_grads, *in_grads, k1_grad, k2_grad], dx


def _conv_steps(order: int) -> tuple[list[str], list[str]]:
    """One einsum for each in-factor and one for each out-factor."""
    in_steps = ["ba...hw,ar->br...hw", *["bra...hw,ar->br...hw"] * (order - 1)]
    out_steps = [*["br...hw,ar->br...ahw"] * (order - 1), "br...hw,ar->b...ahw"]
    return in_steps, out_steps


def _einsum_bwd(equation: str, grad: Tensor, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``einsum(equation, x, factor)``: exchange output and operand."""
    operands, y = equation.split("->")
    x_axes, f_axes = operands.split(",")
    return (
        torch.einsum(f"{y},{f_axes}->{x_axes}", grad, factor.conj()),
        torch.einsum(f"{y},{x_axes}->{f_axes}", grad, x.conj()),
    )


def _depthwise(z: Tensor, factor: Tensor, axis: int) -> Tensor:
    """``v[i, r] = sum_k z[i + k - p, r] factor[k, r]`` along one axis of z ``(B, R, H, W)``."""
    taps = factor.shape[0]
    return torch.einsum("brhwk,kr->brhw", _windows(z, taps, (taps - 1) // 2, axis), factor)


def _depthwise_bwd(grad: Tensor, z: Tensor, factor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``_depthwise``.

    The factor's follows the einsum rule on the windows. For z's, ask which outputs read z[j]:
    those with i + k - p = j, so ``dz[j] = sum_k g[j - k + p] factor[k]``. Counting the taps from
    the other end, k = K - 1 - k', it is ``sum_k' g[j + k' - (K - 1 - p)] factor[K - 1 - k']``: the
    same step with the factor turned around and the padding on the other side.
    """
    taps = factor.shape[0]
    before = (taps - 1) // 2
    factor_grad = torch.einsum("brhw,brhwk->kr", grad, _windows(z, taps, before, axis).conj())
    windows = _windows(grad, taps, taps - 1 - before, axis)
    return torch.einsum("brhwk,kr->brhw", windows, factor.flip(0).conj()), factor_grad


def _windows(z: Tensor, taps: int, before: int, axis: int) -> Tensor:
    """View zero-padded z as ``(B, R, H, W, taps)``: tap k at place i is ``z[i + k - before]``."""
    padding = (before, taps - 1 - before)
    return F.pad(z, padding if axis == -1 else (0, 0, *padding)).unfold(axis, taps, 1)


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Form the column-wise Kronecker product, ``(all modes, R)``; the last mode runs fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = torch.einsum("ir,ar->iar", product, factor).flatten(0, 1)
    return product


def _scaled(z: Tensor, tensor: CPLike) -> Tensor:
    """Multiply component r, the second axis of z, by its weight, if any."""
    weights = getattr(tensor, "weights", None)
    return z if weights is None else torch.einsum("br...,r->br...", z, weights)


def _scaled_bwd(grad: Tensor, tensor: CPLike) -> Tensor:
    """Gradient of z in ``_scaled``."""
    weights = getattr(tensor, "weights", None)
    return grad if weights is None else torch.einsum("br...,r->br...", grad, weights.conj())


def _read(
    tensor: CPLike, groups: str | None = None
) -> tuple[tuple[tuple[int, ...], ...], list[Tensor]]:
    """Check a CP tensor, of the named groups if any, and return its groups and factors."""
    if not hasattr(tensor, "tensorized_shape") or not hasattr(tensor, "factors"):
        raise TypeError(
            "expected a CP tensor with ``tensorized_shape`` and ``factors`` (polyadic.CPTensor, or "
            f"tltorch's CPTensorized), got {type(tensor).__name__}"
        )
    shape = tuple((g,) if isinstance(g, int) else tuple(g) for g in tensor.tensorized_shape)
    factors = list(tensor.factors)
    if groups is not None and len(shape) != groups.count(",") + 1:
        raise ValueError(f"expected the groups {groups} of modes, got {len(shape)}: {shape}")
    if not all(shape):
        raise ValueError(f"each group needs at least one mode, got {shape}; use a mode of size 1")
    if len(shape) == 3 and groups and (len(shape[0]) != len(shape[1]) or len(shape[2]) != 2):
        raise ValueError(
            "expected as many in modes as out modes and two kernel modes, got "
            f"{shape}; fill the shorter group with modes of size 1"
        )
    modes = [mode for group in shape for mode in group]
    rank = factors[0].shape[-1] if factors else 0
    if [tuple(f.shape) for f in factors] != [(mode, rank) for mode in modes]:
        raise ValueError(
            f"expected one (mode, R) factor for each of the modes {modes}, got factors of shape "
            f"{[tuple(f.shape) for f in factors]}"
        )
    return shape, factors


def _split(factors: list[Tensor], order: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Separate the out, in and kernel factors of a conv."""
    return factors[:order], factors[order : 2 * order], factors[2 * order :]


def _check(
    name: str, value: Tensor, shape: tuple[int | None, ...], factors: Sequence[Tensor]
) -> None:
    """Refuse an input whose shape or dtype the factors cannot take; None stands for any size."""
    fits = value.ndim == len(shape) and all(
        want is None or got == want for got, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have the shape ({wanted}), got {tuple(value.shape)}")
    if value.dtype != factors[0].dtype:
        raise TypeError(
            f"{name} must have the dtype of the factors, {factors[0].dtype}, got {value.dtype}; "
            "convert one of them"
        )


def _saved_batch(saved_tensors: Sequence[Tensor], steps: int, in_shape: tuple[int, ...]) -> int:
    """Check that the saved tensors are this tensor's and return their batch size."""
    order = len(in_shape)
    if len(saved_tensors) != steps or saved_tensors[0].shape[1 : 1 + order] != in_shape:
        got = [tuple(s.shape) for s in saved_tensors]
        raise ValueError(
            f"saved_tensors must be what the forward of this tensor returned: {steps} tensors, the "
            f"first (B, {', '.join(map(str, in_shape))}, ...), got shapes {got}"
        )
    return saved_tensors[0].shape[0]
