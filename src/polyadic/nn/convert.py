"""Conversion of a torch layer into a CP layer and back, which the methods of all layers share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from polyadic._torch import whole
from polyadic.fitting import Decomposition, decompose
from polyadic.fitting.arguments import SweepOptions
from polyadic.fitting.search import Callback
from polyadic.formats import Rank, Shape
from polyadic.nn.layer import CPLayer
from polyadic.nn.peak import peak_bytes
from polyadic.nn.source import weight_of
from polyadic.plans import Memory
from polyadic.tensor import CPTensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

Layer = TypeVar("Layer", bound=CPLayer)
Fitted = CPTensor | Decomposition


class FitOptions(SweepOptions, total=False):
    """What the conversions hand to ``polyadic.decompose``, which says what each option does."""

    metric: Tensor | None
    seed: int
    callback: Callback | None


class JointOptions(FitOptions, total=False):
    """What ``joint_from`` takes besides: arguments of a layer, and options of the fit."""

    order: int
    in_shape: Sequence[int] | None
    out_shape: Sequence[int] | None
    memory: Memory


class Exchangeable(CPLayer):
    """A CP layer that can take the place of a torch layer, and the other way round."""

    def peak_bytes(self, x: Tensor, training: bool = True) -> tuple[int, int]:
        """Return the most bytes of a call that are alive at once, here and in the dense layer.

        Parameters are left out; the input, gradients and all that is made on the way count.

        Args:
            x: an input, whose values do not matter.
            training: count forward and backward, or the forward pass alone.
        """
        arguments = _arguments(type(self), self)
        dtype = self.cp.factors[0].dtype
        dense = self._torch_class(**arguments, device="meta", dtype=dtype)
        return peak_bytes(self, x, training), peak_bytes(dense, x, training)

    @classmethod
    def joint_from(
        cls: type[Layer],
        layers: Sequence[nn.Module],
        *,
        rank: Rank | None = None,
        cp: Fitted | None = None,
        **options: Unpack[JointOptions],
    ) -> nn.ModuleList:
        """Make layers that share one CP tensor, see ``joint``, in the place of torch layers.

        Args:
            layers: torch layers whose weights have one shape, dtype, device and ``requires_grad``;
                what else they have may differ and is kept.
            rank: as in ``joint``; None where ``cp`` is given.
            cp: a fitted weight with a layer mode, which is copied; nothing is fitted then.
            options: those of the conversion of one layer: order, shapes, memory, and options of
                ``polyadic.decompose``.

        Returns:
            A list of CP layers; ``layer.cp.joint`` of each is the tensor they share.

        Raises:
            TypeError: a layer is not the torch layer this class stands in for, or its weight is not
                plain.
            ValueError: weights differ in kind, a weight is computed or has no values, something
                attached to a layer would be lost, or an argument does not fit.
        """
        if not isinstance(layers, (Sequence, nn.ModuleList)) or len(layers) == 0:
            raise TypeError(f"joint_from expects a sequence of layers, got {layers!r}")
        weights = [weight_of(layer, cls._torch_class, "joint_from") for layer in layers]
        flags = [bool(layer.weight.requires_grad) for layer in layers]
        kinds = [(tuple(w.shape), w.dtype, w.device) for w in weights]
        for i, kind in enumerate(zip(kinds, flags, strict=True)):
            if kind != (kinds[0], flags[0]):
                raise ValueError(
                    f"weights that share a CP tensor must have one shape, dtype, device and "
                    f"requires_grad, got {(kinds[0], flags[0])} in layer 0 and {kind} in layer {i}"
                )
        own, fit = _split(options)
        given = _given(cp, rank, fit, 1)
        made = _empty(cls, list(layers), rank, given, own)
        groups = made[0].cp.tensorized_shape
        if given is None:
            stacked = torch.stack([made[0]._fit_target(weight) for weight in weights])
            given = _fit(made[0], stacked, ((len(made),), *groups), fit)
        joint = _copy(given, (len(made), *groups), weights[0])
        for i, (layer, source) in enumerate(zip(made, layers, strict=True)):
            _take(layer, source, joint.layer(i))
        return nn.ModuleList(made)


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the options of the layer from those of the fit."""
    own = {name: value for name, value in options.items() if name in _OWN}
    return own, {name: value for name, value in options.items() if name not in _OWN}


_OWN = ("order", "in_shape", "out_shape", "memory")


def convert(
    cls: type[Layer],
    module: Any,
    method: str,
    rank: Rank | None,
    cp: Fitted | None,
    **options: Any,
) -> Layer:
    """Make a CP layer in the place of a torch layer.

    Args:
        cls: class of the new layer.
        module: the torch layer.
        method: the name of the public method, for messages.
        rank: None where ``cp`` is given.
        cp: a fitted weight, copied, in place of a fit.
        options: of the constructor (order, shapes, memory) and of ``polyadic.decompose``.
    """
    weight = weight_of(module, cls._torch_class, method)
    own, fit = _split(options)
    given = _given(cp, rank, fit, 0)
    (layer,) = _empty(cls, [module], rank, given, own)
    if given is None:
        given = _fit(layer, layer._fit_target(weight), layer.cp.tensorized_shape, fit)
    _take(layer, module, _copy(given, given.tensorized_shape, weight))
    return layer


def shaped(cls: type[Layer], module: nn.Module, rank: Rank = 1, **options: Any) -> Layer:
    """Make the CP layer, without values, that could take the place of a torch layer.

    Args:
        cls: class of the new layer.
        module: the torch layer.
        rank: as the constructor takes it.
        options: order or shapes, as the constructor takes them.

    Raises:
        ValueError: an option of the torch layer is not supported, or a shape does not fit.
    """
    return _empty(cls, [module], rank, None, options)[0]


def _fit(
    layer: CPLayer, target: Tensor, groups: Sequence[Shape], fit: Mapping[str, Any]
) -> CPTensor:
    """Fit a CP tensor, in the metric of the layer's input where there is one."""
    metric = layer._fit_metric(fit.get("metric"))
    if metric is not None:
        shift = len(groups) - len(layer.cp.tensorized_shape)
        inside = tuple([group + shift for group in layer._metric_groups])
        fit = {"metric_groups": inside, **fit, "metric": metric}
    return decompose(target, groups, layer.rank, **fit).cp


def _given(cp: Any, rank: Any, fit: Mapping[str, Any], layer_modes: int) -> CPTensor | None:
    """Return the tensor given as ``cp=``, checked; None if the weight must be fitted."""
    if cp is None:
        if rank is None:
            raise TypeError("give rank=, or the fitted weight as cp=")
        return None
    tensor = cp.cp if isinstance(cp, Decomposition) else cp
    if not isinstance(tensor, CPTensor):
        raise TypeError(
            f"cp must be a polyadic.CPTensor or a polyadic.Decomposition, got {type(cp).__name__}"
        )
    ruled_out = ["rank"] * (rank is not None) + list(fit)
    if ruled_out:
        raise ValueError(
            f"with cp= nothing is fitted, so that {', '.join(ruled_out)} cannot be given with it"
        )
    if tensor.layer_modes != layer_modes:
        raise ValueError(
            f"cp must have {layer_modes} layer modes here, got {tensor.layer_modes}: {tensor}"
        )
    return tensor


def _empty(
    cls: type[Layer],
    modules: Sequence[nn.Module],
    rank: Rank | None,
    given: CPTensor | None,
    options: Mapping[str, Any],
) -> list[Layer]:
    """Make CP layers without values, each with the arguments of its torch layer."""
    shapes: dict[str, Any] = {}
    if given is not None:
        rank = given.rank
        single = given.tensorized_shape[given.layer_modes :]
        sides = {"in_shape": cls._in_group, "out_shape": cls._out_group}
        if len(single) > max(sides.values()):
            shapes = {side: single[group] for side, group in sides.items()}
    for side, modes in shapes.items():
        if options.get(side) is not None and tuple(options[side]) != modes:
            raise ValueError(f"{side} is {options[side]}, but cp has the modes {modes} there")
    arguments = {**options, **shapes, "device": "meta", "dtype": modules[0].weight.dtype}
    if given is None and len(modules) > 1:
        probe = cls(**_arguments(cls, modules[0]), **arguments, rank=1)
        rank = probe._resolved(cast(Rank, rank), "meta", arguments["dtype"], modules)
    layers = [cls(**_arguments(cls, module), **arguments, rank=rank) for module in modules]
    needed = layers[0].cp.tensorized_shape
    if given is not None:
        joint = (len(modules),) * given.layer_modes
        if given.tensorized_shape != (*((size,) for size in joint), *needed):
            raise ValueError(
                f"cp must have the tensorized shape {(*joint, *needed)} here, got {given}"
            )
    return layers


def _arguments(cls: type[CPLayer], of: nn.Module) -> dict[str, Any]:
    """Return the constructor's arguments, which torch's layers and ours keep under equal names."""
    values = {name: getattr(of, name) for name in cls._shared_arguments if hasattr(of, name)}
    if "bias" in values:
        values["bias"] = values["bias"] is not None
    return values


def _copy(cp: CPTensor, tensorized_shape: Sequence[int | Sequence[int]], like: Tensor) -> CPTensor:
    """Make a CPTensor with copies of the factors, in the dtype and on the device of ``like``.

    Raises:
        TypeError: the factors are complex and the weight is real.
    """
    if cp.factors[0].is_complex() and not like.is_complex():
        raise TypeError(
            f"cp must be real for a layer of {like.dtype}, got {cp.factors[0].dtype}, whose "
            f"imaginary part would be lost; make the layer complex first"
        )
    factors = [factor.detach().to(like) for factor in cp.factors]
    weights = None if cp.weights is None else cp.weights.detach().to(like)
    return CPTensor.from_factors(tensorized_shape, factors, weights)


def _take(layer: CPLayer, module: nn.Module, cp: CPTensor) -> None:
    """Give a layer without values a CP weight, and the bias and flags of a torch layer."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    layer.cp = cp
    for parameter in cp.parameters():
        parameter.requires_grad_(weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    layer.train(module.training)


def revert(layer: CPLayer) -> nn.Module:
    """Make the torch layer that a CP layer stands in for, with the dense weight."""
    own = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    if layer.frozen is not None:
        own |= layer.frozen.trainable
    trained = any(flag for name, flag in own.items() if name != "bias")
    made = dense(layer._torch_class, _arguments(type(layer), layer), layer, trained, layer.bias)
    for name, parameter in made.named_parameters():
        if name == "bias":
            parameter.requires_grad_(own["bias"])
    return made


@torch.no_grad()
def dense(
    cls: type[nn.Module],
    arguments: Mapping[str, Any],
    layer: Any,
    trained: bool,
    bias: nn.Parameter | None,
) -> nn.Module:
    """Make a torch layer with copies of a layer's dense weight and bias, and its training flag."""
    dtype = layer.cp.factors[0].dtype
    # Products of half-precision factors would be rounded at each step; this way it happens once.
    wide = copy.deepcopy(layer).float() if dtype.itemsize < 4 else layer
    weight = wide._built_weight().to(dtype, copy=True, memory_format=torch.contiguous_format)
    made = cls(**arguments, device="meta", dtype=dtype)
    made.weight = nn.Parameter(weight, requires_grad=trained)
    if bias is not None:
        made.bias = nn.Parameter(whole(bias).clone(), requires_grad=bias.requires_grad)
    return made.train(layer.training)
