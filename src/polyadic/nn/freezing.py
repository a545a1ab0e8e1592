"""``polyadic.freeze``: contract factors once for inference; ``polyadic.unfreeze``: go back."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from polyadic.checks import check_module
from polyadic.formats import Shape, mode_sizes, positive_int
from polyadic.kernels.multilinear import khatri_rao
from polyadic.nn.frozen import Frozen, FrozenKernel, FrozenPair, FrozenWeight
from polyadic.nn.kinds import is_of_family
from polyadic.nn.layer import CPLayer
from polyadic.nn.wrapped import check_unwrapped
from polyadic.planner import choice
from polyadic.planner.calibrated import machine_for
from polyadic.planner.steps import gemm

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, *, batch: int = 1, size: int | tuple[int, ...] = 32) -> Model:
    """Contract the factors of every CPLinear and CPConvNd of a model for inference, in place.

    A linear layer takes the cheaper of the Khatri-Rao pair (two GEMMs) and the dense weight (one),
    a convolution the dense kernel; where its plan is predicted to be cheaper still (a wide layer at
    batch 1, a low rank) it stays as it is, and so do embeddings and transposed convolutions. The
    parameters of frozen layers no longer require gradients until ``unfreeze``; gradients still pass
    through to the input. State dicts are as before.

    A frozen layer whose factors change in place, or are replaced by others, refuses to run, and so
    does one by whose factors a derivative is asked for: they require gradients again, or a
    transform of torch.func or forward mode differentiates by them. A change behind autograd's back
    (``parameter.data``) cannot be noticed, and a compiled or exported graph notices none. The bias
    is no part of what is contracted and may change.

    Args:
        model: a module that holds CP layers, or is one.
        batch: rows of linear layers, images of convolutions, that the choice is made for.
        size: spatial size of convolutions' inputs that the choice is made for. A convolution whose
            kernel does not fit into it is judged at the smallest size that it takes.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module, or an argument is not an integer.
        ValueError: the model has no CPLinear or CPConvNd, is wrapped (DistributedDataParallel,
            DataParallel, FSDP) or sharded, or a size is below 1.
    """
    check_unwrapped(model, "freeze")
    batch = positive_int(batch, "batch")
    sizes = mode_sizes(size if isinstance(size, tuple) else (size,), "size")
    layers = _freezable(model)
    formed = [(layer, _form(layer, batch, sizes)) for layer in layers if layer.frozen is None]
    # Flags are switched off only after every layer has remembered its own, because layers may share
    # parameters.
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
    check_module(model)
    for layer in _freezable(model):
        if layer.frozen is not None:
            for name, parameter in layer.named_parameters():
                # Flags are only switched on: for a shared parameter, only the layer frozen first
                # remembers the flag.
                if layer.frozen.trainable.get(name, False):
                    parameter.requires_grad_(True)
            layer.frozen = None
    return model


def _freezable(model: nn.Module) -> list[CPLayer]:
    layers = [layer for layer in model.modules() if isinstance(layer, CPLayer)]
    return [layer for layer in layers if is_of_family(layer, "linear", "conv")]


@torch.inference_mode(False)
@torch.no_grad()
def _form(layer: CPLayer, batch: int, size: Shape) -> Frozen | None:
    """Make the contracted form of a layer; None if its plan is predicted to be faster."""
    if is_of_family(layer, "linear"):
        return _frozen_linear(layer, batch)
    if _kernel_is_cheaper(layer, batch, size):
        return FrozenKernel(layer, kernel=layer._built_weight().contiguous())
    return None


def _frozen_linear(layer: CPLayer, rows: int) -> Frozen | None:
    """Make the Khatri-Rao pair or W; None if the plan is predicted to be faster than both."""
    (m, n), r = layer.cp.shape, layer.rank
    asked = layer.request(rows)
    machine = machine_for(asked)
    pair, dense = (
        machine.total(steps, machine.dense_call)
        for steps in (
            [gemm(asked, "X KA", rows, m, r), gemm(asked, "Z KC^T", rows, r, n)],
            [gemm(asked, "X W", rows, m, n)],
        )
    )
    if choice.predict_inference(asked, choice.choose(asked)) < min(pair, dense):
        return None
    if dense <= pair:
        return FrozenWeight(layer, weight=layer._built_weight().contiguous())
    in_factors, out_factors = layer.cp.factor_groups()
    ka = khatri_rao(in_factors)
    if layer.cp.weights is not None:
        ka = ka * layer.cp.weights
    return FrozenPair(layer, ka=ka.contiguous(), kc=khatri_rao(out_factors))


def _least_size(layer: Any) -> Shape:
    """Return the smallest spatial size that a convolution takes."""
    where = layer.geometry
    # A padding made of the input's own entries needs more entries than it adds.
    entries = 0 if layer.padding_mode == "zeros" else 1
    each = zip(where.kernel_size, where.dilation, where.padding, strict=True)
    return tuple([max(d * (k - 1) + 1 - sum(p), entries * (max(p) + 1), 1) for k, d, p in each])


def _kernel_is_cheaper(layer: CPLayer, batch: int, size: Shape) -> bool:
    """Whether a dense convolution is predicted to take no longer than the layer's plan."""
    least = _least_size(layer)
    if len(size) == 1:
        size = size * len(least)
    if len(size) == len(least):
        size = tuple(map(max, size, least))
    asked = layer.request(batch, size)
    plan = choice.choose(asked)
    return choice.predict_inference(asked, None) <= choice.predict_inference(asked, plan)
