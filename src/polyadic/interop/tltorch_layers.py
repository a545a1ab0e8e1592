"""Which layers and calls of tltorch can be taken, and how they run here.

The shapes and rules are those of tltorch 0.5: linear weights come as (out, in) groups of modes,
embeddings as (in, out), convolutions as one factor each for out, in and every kernel dimension; a
weight shared by several layers has their modes in front.
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
from polyadic.plans import Memory

# Of convolutions and embeddings less is kept even at this level than by tltorch; where that keeps
# little beside x (a checkpointed linear layer, a rebuilt convolution kernel) "least" is asked for.
MEMORY: Memory = "fast"


@dataclass(frozen=True)
class Taker:
    """How the layers of one class are judged and run.

    Args:
        cp: tltorch's class of a weight that can be taken.
        dropout: tltorch's class of tensor dropout.
    """

    cp: type[Any]
    dropout: type[Any]

    def unfit(self, layer: Any) -> str | None:
        """Why a layer cannot be taken whatever the call, or None."""
        weight: Any = layer.weight
        if type(weight) is not self.cp:
            return f"its weight is a {type(weight).__name__}, not a {self.cp.__name__}"
        if weight.weights is None or not weight.weights.is_floating_point():
            return "its weight has no real λ"
        if weight._forward_hooks or weight._forward_pre_hooks:
            return self._hooked(weight)
        return self._odd(layer)

    def _hooked(self, weight: Any) -> str | None:
        """Name the first hook on a weight that is more than tensor dropout at rest."""
        for hook in (*weight._forward_pre_hooks.values(), *weight._forward_hooks.values()):
            at_rest = isinstance(hook, self.dropout) and (
                not hook.proba or not (weight.training or hook.drop_test)
            )
            if not at_rest:
                return f"its weight has the hook {type(hook).__name__}"
        return None

    def _odd(self, layer: Any) -> str | None:
        """What else about this class of layers is unknown to us."""
        raise NotImplementedError

    def run(self, layer: Any, *args: Any, **kwargs: Any) -> Tensor | str:
        """Run a call, named as tltorch's, or return the reason to leave it to tltorch."""
        raise NotImplementedError


def _chosen(layer: Any, indices: Any) -> tuple[int, ...] | None:
    """Indices of a call into the modes of a joint weight; () of a single one, None if unfit."""
    n_layers = layer.n_layers
    if isinstance(n_layers, int) and n_layers == 1:
        return () if isinstance(indices, int) and indices == 0 else None
    if isinstance(n_layers, int):
        n_layers, indices = (n_layers,), (indices,)
    if not isinstance(indices, (tuple, list)) or len(indices) != len(n_layers):
        return None
    within = [isinstance(i, int) and -n <= i < n for i, n in zip(indices, n_layers, strict=True)]
    return tuple(indices) if all(within) else None


def _component(weight: Any, rows: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """λ (R,) and factors of one layer of a joint weight: the row of a layer mode scales λ."""
    scale, factors = weight.weights, list(weight.factors)
    for row in rows:
        scale = scale * factors.pop(0)[row]
    return scale, factors


def _mixed(tensors: Sequence[Tensor | None], like: Tensor) -> str | None:
    """Why parameters do not belong together."""
    for tensor in tensors:
        if tensor is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
            return "its parameters are of several dtypes or devices"
    return None


def _foreign(x: Any, like: Tensor) -> str | None:
    """Why an input does not belong to parameters such as ``like``."""
    if not isinstance(x, Tensor):
        return f"the input is a {type(x).__name__}"
    if x.device != like.device:
        return f"the input is on {x.device}, the factors on {like.device}"
    if x.dtype != like.dtype:
        both = (x.dtype, like.dtype)
        wide = torch.float64 in both or not x.is_floating_point()
        if wide or autocast_dtype(x) is None:
            return f"the input is {x.dtype}, the factors are {like.dtype}"
    return None


_INDICES = "the indices do not choose one of its layers"


class Linears(Taker):
    """Factorized linear layers, joint ones among them."""

    def _odd(self, layer: Any) -> str | None:
        if layer.implementation not in ("factorized", "reconstructed"):
            return f"its implementation is {layer.implementation!r}"
        return _ungrouped(layer)

    def run(self, layer: Any, x: Any, indices: Any = 0) -> Tensor | str:
        """The layer's output by our functions, or the reason why it is left to tltorch."""
        reason, rows = self.unfit(layer), _chosen(layer, indices)
        if reason is not None or rows is None:
            return reason or _INDICES
        weight: Any = layer.weight
        bias: Tensor | None = layer.bias
        scale, factors = _component(weight, rows)
        if rows and bias is not None:
            bias = bias[rows[0]]
        reason = _mixed([*factors, bias], scale) or _foreign(x, scale)
        if reason is not None:
            return reason
        n_out = len(weight.tensorized_shape[-2])
        outs, ins = factors[:n_out], factors[n_out:]
        if x.dim() == 0 or x.shape[-1] != math.prod([f.shape[0] for f in ins]):
            return f"the input has shape {tuple(x.shape)}"
        memory: Memory = "least" if layer.checkpointing else "balanced"
        # tltorch adds this bias outside of autocast: the sum is of the bias's dtype.
        apart = layer.implementation == "factorized" and autocast_dtype(x) is not None
        within = None if apart else bias
        y = cp_linear(x, ins, outs, within, weights=scale, memory=memory).contiguous()
        return y + bias if apart and bias is not None else y


@dataclass(frozen=True)
class Convolutions(Taker):
    """Convolutions; ``functions`` are tltorch's for CP weights, the first rebuilds the kernel."""

    functions: tuple[Any, ...]

    def _odd(self, layer: Any) -> str | None:
        if layer.forward_fun not in self.functions:
            return f"its forward_fun is {layer.forward_fun}"
        dims = len(layer.weight.factors) - len(layer.layers_shape) - 2
        sizes = {array.shape[-1] for array in (layer.stride, layer.padding, layer.dilation)}
        return None if 1 <= dims <= 3 and sizes == {dims} else f"it has {dims} spatial dimensions"

    def run(self, layer: Any, x: Any, indices: Any = 0) -> Tensor | str:
        """The layer's output by our functions, or the reason why it is left to tltorch."""
        reason, rows = self.unfit(layer), _chosen(layer, indices)
        if reason is not None or rows is None:
            return reason or _INDICES
        scale, (out, in_, *kernel) = _component(layer.weight, rows)
        bias = layer.bias
        if rows:
            bias = bias[rows] if layer.has_bias[rows] and bias is not None else None
        reason = _mixed([out, in_, *kernel, bias], scale) or _foreign(x, scale)
        if reason is not None:
            return reason
        stride, padding, dilation = (
            array[rows].tolist() for array in (layer.stride, layer.padding, layer.dilation)
        )
        if not _fits(x.shape, in_.shape[0], [f.shape[0] for f in kernel], padding, dilation):
            return f"the input has shape {tuple(x.shape)}"
        rebuilt = layer.forward_fun is self.functions[0]
        y: Tensor = cp_conv(
            x, [out], [in_], kernel, bias, weights=scale, stride=stride, padding=padding,
            dilation=dilation, memory="least" if rebuilt else MEMORY,
        )  # fmt: skip
        # Only torch's own convolution answers in the layout of x; code after may rely on .view.
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


class Embeddings(Taker):
    """Factorized embeddings."""

    def _odd(self, layer: Any) -> str | None:
        return _ungrouped(layer)

    def run(self, layer: Any, input: Any, indices: Any = 0) -> Tensor | str:
        """The layer's output by our functions, or the reason why it is left to tltorch."""
        reason, rows = self.unfit(layer), _chosen(layer, indices)
        if reason is not None or rows is None:
            return reason or _INDICES
        weight = layer.weight
        scale, factors = _component(weight, rows)
        reason = _mixed(factors, scale)
        if reason is not None:
            return reason
        if not isinstance(input, Tensor) or input.dtype not in (torch.int64, torch.int32):
            return "the indices are not an int64 or int32 tensor"
        if input.device != scale.device:
            return f"the indices are on {input.device}, the factors on {scale.device}"
        n_in = len(weight.tensorized_shape[-2])
        try:
            y = cp_embedding(input, factors[:n_in], factors[n_in:], weights=scale, memory=MEMORY)
        except IndexError:
            return "an index lies outside the table"
        # tltorch's lookup ends in a matrix product, which autocast casts.
        return y.to(autocast_dtype(scale) or y.dtype).contiguous()


def _ungrouped(layer: Any) -> str | None:
    """Whether a weight is not a mode per shared layer followed by two groups of modes."""
    groups, joint = layer.weight.tensorized_shape, layer.n_layers != 1
    sizes = [not isinstance(group, int) for group in groups]
    if sizes == [False] * joint + [True, True]:
        return None
    return f"its weight has the tensorized shape {tuple(groups)}"
