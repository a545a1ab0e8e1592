"""``polyadic.freeze``: contract factors once for inference; ``polyadic.unfreeze``: go back."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from polyadic import checks
from polyadic.formats import ConvFormat, LinearFormat, Shape, mode_sizes, positive_int
from polyadic.kernels.multilinear import khatri_rao
from polyadic.nn import CPConv1d, CPConv2d, CPConv3d, CPLinear
from polyadic.nn.frozen import Frozen, FrozenKernel, FrozenPair, FrozenWeight
from polyadic.planner import conv as conv_planner
from polyadic.planner import linear as linear_planner
from polyadic.planner.calibrated import machine_for
from polyadic.planner.steps import forward_steps, gemm
from polyadic.planner.steps_conv import conv_forward_steps, dense_conv_steps

Model = TypeVar("Model", bound=nn.Module)
_CONVOLUTIONS = (CPConv1d, CPConv2d, CPConv3d)


def freeze(model: Model, *, batch: int = 1, size: int | tuple[int, ...] = 32) -> Model:
    """Contract the factors of every CPLinear and CPConvNd of a model for inference, in place.

    A linear layer takes the cheaper of the Khatri-Rao pair (two GEMMs) and the dense weight (one),
    a convolution the dense kernel; where its plan is predicted to be cheaper still (a wide layer at
    batch 1, a low rank) it stays as it is, and so do embeddings and transposed convolutions. The
    parameters of frozen layers no longer require gradients until ``unfreeze``; gradients still pass
    through to the input. State dicts are as before.

    A frozen layer whose factors change in place, or are replaced by others, refuses to run. A
    change behind autograd's back (``parameter.data``) cannot be noticed, and a compiled or exported
    graph notices none. The bias is no part of what is contracted and may change.

    Args:
        model: a module that holds CP layers, or is one.
        batch: rows of linear layers, images of convolutions, that the choice is made for.
        size: spatial size of convolutions' inputs that the choice is made for.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module, or an argument is not an integer.
        ValueError: the model has no CPLinear or CPConvNd, is wrapped (DistributedDataParallel,
            DataParallel, FSDP) or sharded, or a size is below 1.
    """
    _module(model)
    checks.check_unwrapped(model, "freeze")
    positive_int(batch, "batch")
    sizes = mode_sizes(size if isinstance(size, tuple) else (size,), "size")
    layers = [layer for layer in model.modules() if isinstance(layer, (CPLinear, *_CONVOLUTIONS))]
    formed = [(layer, _form(layer, batch, sizes)) for layer in layers if layer.frozen is None]
    # Only now, since layers may share parameters, whose flags each of them remembers.
    for layer, frozen in formed:
        if frozen is not None:
            for parameter in layer.parameters():
                parameter.requires_grad_(False)
            layer.frozen = frozen
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no CPLinear or CPConvNd to freeze")
    return model


def unfreeze(model: Model) -> Model:
    """Give every frozen CP layer its factorized forward and its gradients back, in place.

    Args:
        model: a module given to ``freeze`` before; layers that are not frozen are left alone.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _module(model)
    for layer in model.modules():
        if isinstance(layer, (CPLinear, *_CONVOLUTIONS)) and layer.frozen is not None:
            for name, parameter in layer.named_parameters():
                # None is switched off: of shared ones the layer frozen first alone knows the flag.
                if layer.frozen.trainable.get(name, False):
                    parameter.requires_grad_(True)
            layer.frozen = None
    return model


def _module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


@torch.inference_mode(False)
@torch.no_grad()
def _form(
    layer: CPLinear | CPConv1d | CPConv2d | CPConv3d, batch: int, size: Shape
) -> Frozen | None:
    """The contracted form of a layer, or None where its plan is predicted to be faster."""
    if isinstance(layer, CPLinear):
        return _frozen_linear(layer, batch)
    if _kernel_is_cheaper(layer, batch, size):
        return FrozenKernel([layer._built_weight().contiguous()], layer)
    return None


def _frozen_linear(layer: CPLinear, rows: int) -> Frozen | None:
    """The Khatri-Rao pair or W, or None where the plan is predicted to be faster than both."""
    m, n, r = layer.in_features, layer.out_features, layer.rank
    first = layer.cp.factors[0]
    kind, dtype, item = first.device.type, first.dtype, first.element_size()
    machine = machine_for(kind, dtype)
    fmt = LinearFormat(layer.in_shape, layer.out_shape, r)
    plan = linear_planner.choose_linear(fmt, linear_planner.bucket(rows), dtype, kind, "balanced")
    pair = machine.total([gemm("X KA", rows, m, r, item), gemm("Z KC^T", rows, r, n, item)])
    dense = machine.total([gemm("X W", rows, m, n, item)])
    ours = machine.total(forward_steps(fmt, rows, plan.forward, item)) + machine.call
    if ours < min(pair, dense) + machine.dense_call:
        return None
    if dense <= pair:
        return FrozenWeight([layer._built_weight().contiguous()], layer)
    in_factors, out_factors = layer.cp.factor_groups()
    ka = khatri_rao(in_factors)
    if layer.cp.weights is not None:
        ka = ka * layer.cp.weights
    return FrozenPair([ka.contiguous(), khatri_rao(out_factors)], layer)


def _kernel_is_cheaper(layer: CPConv1d | CPConv2d | CPConv3d, batch: int, size: Shape) -> bool:
    fmt, where = layer.format, layer.geometry
    assert isinstance(fmt, ConvFormat)
    dims = len(layer.kernel_size)
    sizes = size * dims if len(size) == 1 else size
    if len(sizes) != dims:
        raise ValueError(f"size must be an int or {dims} ints for {layer}, got {size}")
    first = layer.cp.factors[0]
    kind, dtype = first.device.type, first.dtype
    machine = machine_for(kind, dtype)
    plan = conv_planner.choose_conv(fmt, where, batch, sizes, False, dtype, kind, "balanced")
    steps = conv_forward_steps(fmt, where, batch, sizes, False, plan.forward, dtype.itemsize)
    dense = dense_conv_steps(fmt, where, batch, sizes, dtype.itemsize, training=False)
    ours = machine.total(steps) + machine.call
    return machine.total(dense) + machine.dense_call <= ours
