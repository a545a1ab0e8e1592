"""Which layers and calls of tltorch run here, and how: one rule for each class of layer.

Shapes follow tltorch 0.5: the weight of a linear layer has (out, in) groups of modes, that of an
embedding (in, out), that of a convolution one factor each for out, in and every kernel dimension.
A weight that several layers share has modes in front that tell the layers apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyadic.functional import cp_conv, cp_embedding, cp_linear
from polyadic.functional.boundary import autocast_dtype
from polyadic.kernels.backend import is_computed
from polyadic.plans import Memory

# Even at this level our convolutions and embeddings keep less than tltorch's. Where tltorch keeps
# little beside x (a checkpointed linear layer, a rebuilt convolution kernel), "least" is asked for.
MEMORY: Memory = "fast"


@dataclass(frozen=True)
class LayerRule:
    """Whether the layers of one class of tltorch run here, and how.

    Args:
        cp: tltorch's classes of weights that run here.
        dropout: tltorch's class of tensor dropout.
    """

    cp: tuple[type[Any], ...]
    dropout: type[Any]

    def why_not(self, layer: Any) -> str | None:
        """Why a layer stays with tltorch whatever it is called with, or None."""
        weight: Any = layer.weight
        if type(weight) not in self.cp:
            return f"its weight is a {type(weight).__name__}, not a {self.cp[0].__name__}"
        if weight.weights is None or not is_computed(weight.weights.dtype):
            return "its weight has no λ"
        for hook in (*weight._forward_pre_hooks.values(), *weight._forward_hooks.values()):
            inactive_dropout = isinstance(hook, self.dropout) and (
                not hook.proba or not (weight.training or hook.drop_test)
            )
            if not inactive_dropout:
                return f"its weight has the hook {type(hook).__name__}"
        return self._why_not_this_kind(layer)

    def _why_not_this_kind(self, layer: Any) -> str | None:
        """What else about this class of layers is unknown to us, or None."""
        raise NotImplementedError

    def run(self, layer: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        """Run a call, whose arguments have tltorch's names; None leaves the call to tltorch."""
        raise NotImplementedError


def _rows_of(layer: Any, indices: Any) -> tuple[int, ...] | None:
    """The row in each layer mode of a joint weight; () for a single weight, None if unsuitable."""
    n_layers = layer.n_layers
    if isinstance(n_layers, int) and n_layers == 1:
        return () if isinstance(indices, int) and indices == 0 else None
    if isinstance(n_layers, int):
        n_layers, indices = (n_layers,), (indices,)
    if not isinstance(indices, (tuple, list)) or len(indices) != len(n_layers):
        return None
    inside = [isinstance(i, int) and -n <= i < n for i, n in zip(indices, n_layers, strict=True)]
    return tuple(indices) if all(inside) else None


def _slice(weight: Any, rows: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """λ (R,) and factors of one layer of a joint weight: the row of a layer mode scales λ."""
    scale, factors = weight.weights, list(weight.factors)
    for row in rows:
        scale = scale * factors.pop(0)[row]
    return scale, factors


def _are_alike(tensors: Sequence[Tensor | None], like: Tensor) -> bool:
    """Whether parameters have one dtype and device."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.dtype == like.dtype and tensor.device == like.device for tensor in given)


def _suits(x: Any, like: Tensor) -> bool:
    """Whether an input can be multiplied with parameters such as ``like``, by autocast too."""
    if not isinstance(x, Tensor) or x.device != like.device:
        return False
    if x.dtype == like.dtype:
        return True
    # Autocast casts floating tensors, except those of float64.
    floating = x.is_floating_point() and like.is_floating_point()
    castable = floating and torch.float64 not in (x.dtype, like.dtype)
    return castable and autocast_dtype(x) is not None


class LinearRule(LayerRule):
    """Factorized linear layers, those of a joint weight included."""

    def _why_not_this_kind(self, layer: Any) -> str | None:
        if layer.implementation not in ("factorized", "reconstructed"):
            return f"its implementation is {layer.implementation!r}"
        return _why_not_grouped(layer)

    def run(self, layer: Any, x: Any, indices: Any = 0) -> Tensor | None:
        """The layer's output by our functions, or None to leave the call to tltorch."""
        rows = _rows_of(layer, indices)
        if rows is None or self.why_not(layer) is not None:
            return None
        bias: Tensor | None = layer.bias
        scale, factors = _slice(layer.weight, rows)
        if rows and bias is not None:
            bias = bias[rows[0]]
        if not _are_alike([*factors, bias], scale) or not _suits(x, scale):
            return None
        n_out = len(layer.weight.tensorized_shape[-2])
        outs, ins = factors[:n_out], factors[n_out:]
        if x.dim() == 0 or x.shape[-1] != math.prod([f.shape[0] for f in ins]):
            return None
        memory: Memory = "least" if layer.checkpointing else "balanced"
        # tltorch adds this bias outside of autocast, so that the sum has the dtype of the bias.
        apart = layer.implementation == "factorized" and autocast_dtype(x) is not None
        inside = None if apart else bias
        y = cp_linear(x, ins, outs, inside, weights=scale, memory=memory).contiguous()
        return y + bias if apart and bias is not None else y


@dataclass(frozen=True)
class ConvRule(LayerRule):
    """Convolutions; ``functions`` are tltorch's for CP weights, the first rebuilds the kernel."""

    functions: tuple[Any, ...]

    def _why_not_this_kind(self, layer: Any) -> str | None:
        if layer.forward_fun not in self.functions:
            return f"its forward_fun is {layer.forward_fun}"
        dims = len(layer.weight.factors) - len(layer.layers_shape) - 2
        sizes = {array.shape[-1] for array in (layer.stride, layer.padding, layer.dilation)}
        return None if 1 <= dims <= 3 and sizes == {dims} else f"it has {dims} spatial dimensions"

    def run(self, layer: Any, x: Any, indices: Any = 0) -> Tensor | None:
        """The layer's output by our functions, or None to leave the call to tltorch."""
        rows = _rows_of(layer, indices)
        if rows is None or self.why_not(layer) is not None:
            return None
        scale, (out, in_, *kernel) = _slice(layer.weight, rows)
        bias = layer.bias
        if rows:
            bias = bias[rows] if layer.has_bias[rows] and bias is not None else None
        if not _are_alike([out, in_, *kernel, bias], scale) or not _suits(x, scale):
            return None
        stride, padding, dilation = (
            array[rows].tolist() for array in (layer.stride, layer.padding, layer.dilation)
        )
        if not _fits(x.shape, in_.shape[0], [f.shape[0] for f in kernel], padding, dilation):
            return None
        rebuilt = layer.forward_fun is self.functions[0]
        y: Tensor = cp_conv(
            x,
            [out],
            [in_],
            kernel,
            bias,
            weights=scale,
            stride=stride,
            padding=padding,
            dilation=dilation,
            memory="least" if rebuilt else MEMORY,
        )
        # tltorch's factorized functions return contiguous outputs, and code after them may rely on
        # .view; where it rebuilds the kernel, torch's convolution keeps the layout of x.
        return y if rebuilt and not x.is_contiguous() else y.contiguous()


def _fits(
    size: Sequence[int],
    channels: int,
    kernel: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether x is a batch (B, Cin, *S) and the dilated kernel lies within the padded *S."""
    if len(size) != len(kernel) + 2 or size[1] != channels:
        return False
    each = zip(size[2:], kernel, padding, dilation, strict=True)
    return all(p >= 0 and s + 2 * p > d * (k - 1) for s, k, p, d in each)


class EmbeddingRule(LayerRule):
    """Factorized embeddings, those of a joint weight included."""

    def _why_not_this_kind(self, layer: Any) -> str | None:
        return _why_not_grouped(layer)

    def run(self, layer: Any, input: Any, indices: Any = 0) -> Tensor | None:
        """The layer's output by our functions, or None to leave the call to tltorch."""
        rows = _rows_of(layer, indices)
        if rows is None or self.why_not(layer) is not None:
            return None
        scale, factors = _slice(layer.weight, rows)
        is_index = isinstance(input, Tensor) and input.dtype in (torch.int64, torch.int32)
        if not is_index or input.device != scale.device or not _are_alike(factors, scale):
            return None
        n_in = len(layer.weight.tensorized_shape[-2])
        try:
            y = cp_embedding(input, factors[:n_in], factors[n_in:], weights=scale, memory=MEMORY)
        except IndexError:
            return None
        # tltorch's lookup ends in a matrix product, which autocast casts.
        return y.to(autocast_dtype(scale) or y.dtype).contiguous()


def _why_not_grouped(layer: Any) -> str | None:
    """Why a weight is not one layer mode, if it is shared, followed by two groups of modes."""
    groups, joint = layer.weight.tensorized_shape, layer.n_layers != 1
    is_group = [not isinstance(group, int) for group in groups]
    if is_group == [False] * joint + [True, True]:
        return None
    return f"its weight has the tensorized shape {tuple(groups)}"
