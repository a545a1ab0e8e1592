"""Ways to put a trained linear layer into factors, all with the same number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyadic.compression import compress
from polyadic.formats import tensorize
from polyadic.nn import CPConv2d, CPLinear
from polyadic.tensor import CPTensor

# Modes per side: a linear layer's features are split in two, a kernel keeps its own modes.
LINEAR_ORDER, CONV_ORDER = 2, 1

Layer = nn.Linear | nn.Conv2d
Fit = Callable[[Any, float, Tensor, int], nn.Module]


@dataclass(frozen=True)
class Task:
    """What is to be converted, and what is known of it; the same for all methods.

    Attributes:
        layers: Linear layers and convolutions by name.
        ratio: Their weights over numbers stored instead.
        moments: Second moment (M, M) of every layer's input, float64. M counts the features of a
            linear layer, the entries Cin·kh·kw of a patch of a convolution.
        sweeps: Of iterative fits, at most.
        batches: Calibration batches without labels, for methods that look at the whole model.
        forward: (model, batch) → the outputs that count.
        weights: Of positions of a batch, None where all count.
    """

    layers: Mapping[str, Any]
    ratio: float
    moments: Mapping[str, Tensor]
    sweeps: int
    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Tensor]
    weights: Callable[[Any], Tensor] | None = None


Convert = Callable[[nn.Module, Task], dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One way to convert a model.

    Attributes:
        key: Name in records.
        label: Name in tables.
        convert: From a model and the task to the layers in factors by name. Weights of the layers
            over stored numbers is the task's ratio, or a little more.
    """

    key: str
    label: str
    convert: Convert


def layerwise(fit: Fit) -> Convert:
    """Convert every layer by itself at the same ratio."""

    def convert(model: nn.Module, task: Task) -> dict[str, Any]:
        return {
            name: fit(layer, task.ratio, task.moments[name], task.sweeps)
            for name, layer in task.layers.items()
        }

    return convert


def rank_for(ratio: float, modes: Sequence[int], entries: int) -> int:
    """The largest rank with ``ratio`` times fewer numbers than ``entries``; 1 at least."""
    return max(1, int(entries / ratio) // sum(modes))


def cp_layer(
    layer: Layer, outs: Sequence[Tensor], ins: Sequence[Tensor], kernel: Sequence[Tensor] = ()
) -> CPLinear | CPConv2d:
    """The CP layer of factors (n_d, R), (m_d, R) and (k_i, R), with the bias of ``layer``."""
    in_shape, out_shape = [len(f) for f in ins], [len(f) for f in outs]
    dtype = layer.weight.dtype
    if isinstance(layer, nn.Linear):
        factors = [factor.to(dtype) for factor in (*ins, *outs)]
        cp = CPTensor.from_factors((in_shape, out_shape), factors)
        return CPLinear.from_linear(layer, in_shape=in_shape, out_shape=out_shape, cp=cp)
    factors = [factor.to(dtype) for factor in (*outs, *ins, *kernel)]
    cp = CPTensor.from_factors((out_shape, in_shape, layer.kernel_size), factors)
    return CPConv2d.from_conv(layer, in_shape=in_shape, out_shape=out_shape, cp=cp)


def svd(layer: Layer, ratio: float, moment: Tensor, sweeps: int) -> nn.Module:
    """Truncated SVD: the best matrix of its rank in the Frobenius norm (Eckart & Young, 1936)."""
    return _low_rank(layer, ratio, None)


def weighted_svd(layer: Layer, ratio: float, moment: Tensor, sweeps: int) -> nn.Module:
    """The best matrix of its rank for the outputs: least E‖(W − Ŵ) x‖², as in DRONE (2021).

    With Σ = E[x xᵀ] = L Lᵀ, E‖Δ x‖² = ‖Δ L‖²_F, so the best Ŵ is the truncated SVD of W L, times
    L⁻¹. What was never seen in Σ gets 10⁻⁶ of the mean variance, so that L⁻¹ exists.
    """
    return _low_rank(layer, ratio, moment)


def _low_rank(layer: Layer, ratio: float, moment: Tensor | None) -> nn.Module:
    weight = layer.weight.detach().double().flatten(1)
    rank = rank_for(ratio, weight.shape, weight.numel())
    root = None
    if moment is not None:
        ridge = 1e-6 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
        root = torch.linalg.cholesky(moment + ridge)
        weight = weight @ root
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    scale = s[:rank].sqrt()
    outs, ins = u[:, :rank] * scale, vt[:rank] * scale.unsqueeze(1)
    if root is not None:
        ins = torch.linalg.solve_triangular(root, ins, upper=False, left=False)
    if isinstance(layer, nn.Linear):
        return cp_layer(layer, [outs], [ins.t()])
    pair = low_rank_conv(layer, rank)
    state = {"0.weight": ins, "1.weight": outs, "1.bias": layer.bias}
    given = pair.state_dict()
    pair.load_state_dict({name: state[name].view_as(own) for name, own in given.items()})
    return pair


def low_rank_conv(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    """A convolution to ``rank`` channels and a 1×1 one: a (Cout, Cin·kh·kw) matrix of that rank."""
    own: Any = layer
    where = own.kernel_size, own.stride, own.padding, own.dilation
    return nn.Sequential(
        nn.Conv2d(own.in_channels, rank, *where, bias=False),
        nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None),
    )


def tltorch_cp(layer: Layer, ratio: float, moment: Tensor, sweeps: int) -> nn.Module:
    """What tltorch's ``from_linear`` and ``from_conv`` make: tensorly's ``parafac`` of the weight.

    Its start is random: the SVD start that is tensorly's default is filled up with random columns
    as well where the rank exceeds a mode, which it does here.
    """
    import tensorly
    from tltorch import FactorizedConv, FactorizedLinear

    how = {"n_iter_max": sweeps, "init": "random", "random_state": 0}
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        if isinstance(layer, nn.Linear):
            ins, outs = tensorize(layer.in_features, layer.out_features, LINEAR_ORDER)
            made = FactorizedLinear.from_linear(
                layer,
                rank_for(ratio, (*ins, *outs), layer.weight.numel()),
                auto_tensorize=False,
                in_tensorized_features=ins,
                out_tensorized_features=outs,
                bias=layer.bias is not None,
                decomposition_kwargs=how,
            )
        else:
            ins, outs = (layer.in_channels,), (layer.out_channels,)
            rank = rank_for(ratio, layer.weight.shape, layer.weight.numel())
            made = FactorizedConv.from_conv(
                layer, rank, factorization="CP", decomposition_kwargs=how
            )
    factors = [factor.detach() for factor in made.weight.factors]
    factors[0] = factors[0] * made.weight.weights.detach()
    first, second = len(outs), len(outs) + len(ins)
    return cp_layer(layer, factors[:first], factors[first:second], factors[second:])


def own_cp(layer: Layer, ratio: float, moment: Tensor, sweeps: int) -> nn.Module:
    """``polyadic.decompose`` in the Frobenius norm."""
    return _decomposed(layer, ratio, None, sweeps)


def own_cp_in_metric(layer: Layer, ratio: float, moment: Tensor, sweeps: int) -> nn.Module:
    """``polyadic.decompose`` in the metric of the layer's inputs."""
    return _decomposed(layer, ratio, moment, sweeps)


def _decomposed(layer: Layer, ratio: float, moment: Tensor | None, sweeps: int) -> nn.Module:
    entries = layer.weight.numel()
    how: dict[str, Any] = {"metric": moment, "iterations": sweeps, "start": "orthogonal"}
    if isinstance(layer, nn.Linear):
        ins, outs = tensorize(layer.in_features, layer.out_features, LINEAR_ORDER)
        rank = rank_for(ratio, (*ins, *outs), entries)
        return CPLinear.from_linear(layer, rank=rank, order=LINEAR_ORDER, **how)
    outs, ins = tensorize(layer.out_channels, layer.in_channels, CONV_ORDER)
    rank = rank_for(ratio, (*outs, *ins, *layer.kernel_size), entries)
    return CPConv2d.from_conv(layer, rank=rank, order=CONV_ORDER, **how)


def whole_model(model: nn.Module, task: Task) -> dict[str, Any]:
    """``polyadic.compress``: ranks and formats over all layers within one budget."""
    made, report = compress(
        model,
        ratio=task.ratio,
        calibration=task.batches,
        forward=task.forward,
        weights=task.weights,
        target_modules=list(task.layers),
        iterations=task.sweeps,
    )
    return {layer.name: made.get_submodule(layer.name) for layer in report.converted}


@torch.no_grad()
def weight_error(layer: Any, linear: nn.Linear) -> float:
    """‖W − Ŵ‖ / ‖W‖ in the Frobenius norm."""
    weight = linear.weight.double()
    return float((layer.weight.double() - weight).norm() / weight.norm())


@torch.no_grad()
def output_error(layer: Any, linear: nn.Linear, moment: Tensor) -> float:
    """√(E‖(W − Ŵ) x‖² / E‖W x‖²) for inputs of the second moment (M, M)."""
    weight = linear.weight.double()
    missed = layer.weight.double() - weight
    lost, size = (float((m @ moment * m).sum()) for m in (missed, weight))
    return math.sqrt(max(lost, 0.0) / size)


METHODS = (
    Method("svd", "low rank, SVD", layerwise(svd)),
    Method("svd-data", "low rank, data-aware SVD", layerwise(weighted_svd)),
    Method("tltorch", "CP, tltorch", layerwise(tltorch_cp)),
    Method("cp", "CP, polyadic", layerwise(own_cp)),
    Method("cp-data", "CP, polyadic, data-aware", layerwise(own_cp_in_metric)),
    Method("compress", "compress", whole_model),
)
