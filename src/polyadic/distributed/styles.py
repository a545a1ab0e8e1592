"""Styles for ``torch.distributed.tensor.parallel.parallelize_module``: how a CP layer is spread.

A style places the parameters of a layer as DTensors and turns its input and output from tensors to
DTensors and back. What each process then computes, and what is summed, is the business of the
functions that the layer calls (``polyadic.functional``), which find it in the placements.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn.utils import parametrize

from polyadic._torch import check_before_sharding, check_before_style
from polyadic.checks import check_flag, check_module, check_word
from polyadic.functional.sums import sums_taken
from polyadic.nn import CPSharedInput
from polyadic.nn.kinds import is_cp, is_of_family
from polyadic.tensor import CPTensor


class _Spread(ParallelStyle):
    """What both styles do: place parameters, and give input and output their layouts."""

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("input_layouts", input_layouts), ("output_layouts", output_layouts)):
            if value is not None and not isinstance(value, Placement):
                raise TypeError(
                    f"{name} must be a placement of torch.distributed.tensor or None, got {value!r}"
                )
        self.input_layouts = Replicate() if input_layouts is None else input_layouts
        self.output_layouts = Replicate() if output_layouts is None else output_layouts
        if self.output_layouts.is_partial():
            raise ValueError(
                "output_layouts must be Replicate() or Shard(dim), got a Partial(), of which torch "
                "makes none of what is summed already"
            )
        self.use_local_output = check_flag(use_local_output, "use_local_output")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_module(module, "module")
        layers = list(_outermost(module))
        if not layers:
            raise ValueError(
                f"{type(self).__name__} expects a CP layer or a module that holds some, got a "
                f"{type(module).__name__}, which has none; torch's ColwiseParallel and "
                f"RowwiseParallel are for dense layers"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{type(self).__name__} expects a mesh of one dimension, got {device_mesh.ndim}; "
                f'give one dimension of it, such as mesh["rank"]'
            )
        for layer in layers:
            self._check(layer, device_mesh)
        for layer in layers:
            distribute_module(layer, device_mesh, self._place)
            self._hook(layer, device_mesh)
        return module

    def _check(self, layer: nn.Module, mesh: DeviceMesh) -> None:
        """Refuse a layer that cannot be spread so, before anything has changed."""
        for part in layer.modules():
            if getattr(part, "frozen", None) is not None:
                raise ValueError(
                    f"{type(self).__name__} expects layers that follow their plans, but the "
                    f"{type(part).__name__} is frozen; call polyadic.unfreeze first"
                )
            if parametrize.is_parametrized(part):
                raise ValueError(
                    f"{type(self).__name__} expects factors that are parameters, but those of a "
                    f"{type(part).__name__} are parametrized; bake that in: "
                    f"torch.nn.utils.parametrize.remove_parametrizations(module, name)"
                )
            for name, parameter in part._parameters.items():
                if isinstance(parameter, DTensor) and parameter.device_mesh != mesh:
                    raise ValueError(
                        f"{type(self).__name__} expects whole parameters, but {name} of a "
                        f"{type(part).__name__} is a DTensor on {parameter.device_mesh}; apply "
                        f"the style before fully_shard or another style"
                    )

    def _place(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        """Place the parameters of a module of a layer; what several layers share is placed once."""
        if is_cp(module):
            self._place_cp(module, mesh)

    def _place_cp(self, layer: Any, mesh: DeviceMesh) -> None:
        raise NotImplementedError

    def _put(self, holder: nn.Module, name: str, mesh: DeviceMesh, wanted: Placement) -> None:
        """Put a DTensor in the place of a parameter, or leave the one that is there."""
        parameter = holder._parameters.get(name)
        if parameter is None:
            return
        if isinstance(parameter, DTensor):
            if parameter.placements != (wanted,):
                raise ValueError(
                    f"layers that share factors must have one style, but {name} of a "
                    f"{type(holder).__name__} is {parameter.placements[0]} already and "
                    f"{type(self).__name__} would make it {wanted}"
                )
            return
        spread = distribute_tensor(
            parameter.detach(), mesh, [wanted], src_data_rank=self.src_data_rank
        )
        made = nn.Parameter(spread, requires_grad=parameter.requires_grad)
        holder.register_parameter(name, made)

    def _hook(self, layer: nn.Module, mesh: DeviceMesh) -> None:
        """Have the input of a layer made a DTensor, and its output what the style hands out."""

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._spread_input(args[0], mesh), *args[1:]), kwargs
            name, x = next(iter(kwargs.items()))
            return args, {**kwargs, name: self._spread_input(x, mesh)}

        def give(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return tuple(map(self._give_output, output))
            return self._give_output(output)

        layer.register_forward_pre_hook(take, with_kwargs=True)
        layer.register_forward_hook(give)

    def _spread_input(self, x: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, DTensor):
            return x
        if x.is_nested:
            raise TypeError(
                f"{type(self).__name__} expects a dense input, got a nested tensor, which cannot "
                f"be a DTensor; give the layer x.values() and nest the result again"
            )
        layout: Any = self.input_layouts
        if layout.is_shard() and not -x.dim() <= layout.dim < x.dim():
            raise ValueError(
                f"input_layouts={layout} needs an input with that dimension, got shape "
                f"{tuple(x.shape)}"
            )
        return DTensor.from_local(x, mesh, [layout], run_check=False)

    def _give_output(self, y: Any) -> Any:
        if not isinstance(y, DTensor):
            return y
        if self.output_layouts.is_replicate():
            y = sums_taken(y)
        y = y.redistribute(placements=[self.output_layouts])
        if not self.use_local_output:
            return y
        return _Own.apply(y.to_local())


class _Own(Function):
    """The tensor of this process as one that is no view, so that it can be changed in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The CP layers in a module, and what calls several of them together in their place."""
    if is_cp(module) or isinstance(module, CPSharedInput):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _owner(layer: Any) -> CPTensor:
    """The CP tensor that owns a layer's factors: its own, or the one it is a slice of."""
    cp: CPTensor = layer.cp
    return getattr(cp, "joint", cp)


class RankParallel(_Spread):
    """Each process holds a slice of the rank: some of the components of every factor.

    The processes compute Σ_r over components of their own, so that a layer needs one all_reduce of
    its output forward and one of its input's gradient backward. Every kind of CP layer and every
    rank can be spread so: the numbers of components differ by one where the rank is no multiple of
    the number of processes, and processes beyond the rank hold none. The bias is whole in each
    process and is added once. Gradients, and what an optimizer makes of them, are those of one
    process, and parameters, gradients and optimizer states take 1/P of the memory.

    Layers that share factors, by ``joint`` or as a tied head, are to be given the style together.
    Parameters become DTensors, so that optimizers are made afterwards; ``fully_shard`` may follow,
    on another dimension of the mesh.

    Args:
        input_layouts: how the input of the layer is spread where it is a plain tensor; whole
            (``Replicate()``) by default.
        output_layouts: how the output is to be spread; ``Replicate()`` by default. ``Shard(1)``
            gives each process a part of a sequence, by a reduce_scatter.
        use_local_output: hand out plain tensors, not DTensors.

    Raises:
        TypeError: a layout is no placement.
        ValueError: when it is applied: there is no CP layer, the mesh has several dimensions, or a
            layer is frozen, parametrized or spread otherwise.
    """

    def _place_cp(self, layer: Any, mesh: DeviceMesh) -> None:
        owner = _owner(layer)
        for name in owner.factors._parameters:
            self._put(owner.factors, name, mesh, Shard(1))
        self._put(owner, "weights", mesh, Shard(0))
        self._put(layer, "bias", mesh, Replicate())


class FeatureParallel(_Spread):
    """Each process holds a slice of the features: of the input, of the output, or of both.

    Features are sharded by the first mode of a side, whose factor is sharded; the others, which
    are small, are whole. Between its two halves a linear layer sums Z (rows, R), and backward G of
    the same size: less than ``RankParallel`` sums wherever the rank is smaller than the number of
    features. That pays where inputs come and outputs go as shards of features
    (``input_layouts=Shard(-1)``, ``output_layouts=Shard(-1)``), as in a chain of layers with
    elementwise functions between them; whole outputs are gathered. Gradients of whole factors are
    summed, all of a layer in one all_reduce, so that gradients are those of one process.

    For linear layers, joint ones, embeddings (sharded in E, without any sum forward) and their
    tied heads (sharded in E, which they read). A convolution is refused: use ``RankParallel``.

    Args:
        features: which features of a linear layer are sharded, ``"in"``, ``"out"`` or ``"both"``.
            An embedding has out features to shard and a tied head in features, so that ``"both"``
            means those.
        input_layouts: how the input is spread where it is a plain tensor; ``Replicate()`` by
            default, ``Shard(-1)`` for shards of features.
        output_layouts: how the output is to be spread; ``Replicate()`` by default.
        use_local_output: hand out plain tensors, not DTensors.

    Raises:
        TypeError: a layout is no placement.
        ValueError: ``features`` is another word; when it is applied: see ``RankParallel``, and a
            first mode is no multiple of the number of processes, or the layer is a convolution.
    """

    def __init__(
        self,
        *,
        features: Literal["in", "out", "both"] = "both",
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(
            input_layouts=input_layouts,
            output_layouts=output_layouts,
            use_local_output=use_local_output,
        )
        self.features = check_word(features, "features", ("in", "out", "both"))

    def _sides(self, layer: Any) -> list[int]:
        """The groups of modes whose first one is sharded."""
        sides = {"in": [0], "out": [1], "both": [0, 1]}[self.features]
        if is_of_family(layer, "embedding", "head"):
            # Both share the columns of the table, which the one gives and the other reads.
            other = "in" if is_of_family(layer, "embedding") else "out"
            if self.features == other:
                raise ValueError(
                    f"a {type(layer).__name__} cannot shard its {other} features: they are the "
                    f"rows of a table, and every process looks up or scores all of them"
                )
            sides = [1]
        return sides

    def _check(self, layer: nn.Module, mesh: DeviceMesh) -> None:
        super()._check(layer, mesh)
        if isinstance(layer, CPSharedInput):
            raise ValueError(
                "FeatureParallel does not support a CPSharedInput; call its layers one by one, or "
                "use polyadic.distributed.RankParallel"
            )
        if not is_of_family(layer, "linear", "embedding", "head"):
            raise ValueError(
                f"FeatureParallel does not support a {type(layer).__name__}, whose sum would be of "
                f"images with R channels; use polyadic.distributed.RankParallel"
            )
        cp: Any = layer.cp
        shape = cp.tensorized_shape
        for side in self._sides(layer):
            if (mode := shape[side][0]) % mesh.size():
                raise ValueError(
                    f"FeatureParallel expects a first mode that is a multiple of the "
                    f"{mesh.size()} processes, got {shape[side]} for a {type(layer).__name__} with "
                    f"the first mode {mode}; give in_shape or out_shape, or use "
                    f"polyadic.distributed.RankParallel"
                )

    def _place_cp(self, layer: Any, mesh: DeviceMesh) -> None:
        owner, sides = _owner(layer), self._sides(layer)
        groups = owner.tensorized_shape
        ends = [0, *itertools.accumulate(map(len, groups))]
        firsts = {str(ends[owner.layer_modes + side]) for side in sides}
        for name in owner.factors._parameters:
            self._put(owner.factors, name, mesh, Shard(0) if name in firsts else Replicate())
        self._put(owner, "weights", mesh, Replicate())
        tied = is_of_family(layer, "head")
        self._put(layer, "bias", mesh, Shard(0) if 1 in sides and not tied else Replicate())


def _refuse(style: str, module: nn.Module) -> None:
    if is_cp(module) or isinstance(module, CPSharedInput):
        raise TypeError(
            f"{style} is for dense layers, and a {type(module).__name__} has factors in place of a "
            f"weight with columns and rows; use polyadic.distributed.RankParallel, or "
            f"FeatureParallel for shards of features"
        )


def _refuse_twice(parameter: object, mesh: DeviceMesh) -> None:
    if isinstance(parameter, DTensor) and parameter.device_mesh == mesh:
        raise ValueError(
            f"fully_shard meets a parameter of shape {tuple(parameter.shape)} that is sharded over "
            f"this mesh already; give modules that share parameters, as a tied head and its "
            f"embedding or layers of one joint weight do, to one call: fully_shard([one, other])"
        )


# Without this check torch's error names one of its internal invariants.
check_before_sharding(_refuse_twice)

# torch's own refusal says that nn.Linear is expected, and not what to do with a CP layer.
for _style in (ColwiseParallel, RowwiseParallel):
    check_before_style(_style, _refuse)
