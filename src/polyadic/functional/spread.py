"""Calls on DTensors: what each process computes with its shards, and what the processes sum.

Along each dimension of a mesh, P processes share a call in one of four ways, which the placements
of the factors tell, and where those are whole that of x:

    components   every factor is Shard(1) and λ Shard(0), the bias is whole. A process holds some of
                 the R components of

                     y = Σ_r λ_r (x · KA[:, r]) KC[:, r]ᵀ + b,

                 so that y is the sum of what the processes compute, and dx is one too. x is whole.
                 The number of components may differ; a process may have none.
    features     the first in factor, the first out factor and the bias, or all of them are
                 Shard(0), in shards of one size. The first mode is the most significant digit of
                 a feature, so that a process has consecutive features of x, of y, or of both:

                     Z = Σ_p X_p KA_p,   Y_p = Z KC_pᵀ + b_p,   G = Σ_p dY_p KC_p,   dX_p = G KA_pᵀ.

                 What is summed has R columns. A factor that is whole sees some of the features, so
                 that its gradients are summed as well.
    batch        factors are whole and x is Shard(b) in a dimension b of the batch; so is y, and the
                 gradients of factors and bias are sums.
    nothing      factors and x are whole; each process computes everything.

A parameter that is whole gets a whole gradient: the sums of all whole parameters of a call are
taken together, in one all_reduce.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic._torch import is_spread
from polyadic.functional.sums import once, summed

# Factors by group.
Groups = tuple[tuple[Any, ...], ...]
STYLES = (
    "parallelize the layer by polyadic.distributed.RankParallel or FeatureParallel, which place "
    "factors and input"
)


@dataclass(frozen=True)
class Layout:
    """How one call is shared by the processes of a mesh.

    Args:
        mesh: of all DTensors of the call.
        x: the placements that x needs, one for each dimension of the mesh.
        components: dimensions of the mesh whose processes hold components.
        ins: those whose processes hold in features.
        outs: those whose processes hold out features.
        batch: those whose processes hold parts of the batch, each with the dimension of x.
    """

    mesh: Any
    x: tuple[Any, ...]
    components: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    batch: tuple[tuple[int, int], ...]

    def local(
        self, x: Any, groups: Groups, biases: Sequence[Any], weights: Sequence[Any]
    ) -> tuple[Tensor, Groups, list[Tensor | None], list[Tensor | None]]:
        """What this process computes with, differentiably.

        Args:
            x: a DTensor.
            groups: of factors; of linear maps in factors first and then out factors.
            biases: DTensors or None.
            weights: λ for each in group, or None.
        """
        from torch.distributed.tensor import Partial

        # Where x was whole, its gradient is summed here, as torch does not differentiate the sum
        # that from_local would take; where it was sharded, by the backward of its gathering.
        mine = [dim for dim in self.components if x.placements[dim].is_replicate()]
        if x.placements != self.x:
            x = x.redistribute(placements=self.x)
        gathered = set(self.components).difference(mine)
        grad = [Partial() if dim in gathered else p for dim, p in enumerate(self.x)]
        x = x.to_local(grad_placements=grad)
        if x.requires_grad and torch.is_grad_enabled():
            for dim in mine:
                (x,) = self.summed(dim, False, True, x)
        half = len(groups) // 2
        # By the side that a parameter is of, along which dimensions its gradient is a sum: what is
        # whole on the in side sees the in features, and where no all_reduce makes G whole (a
        # lookup has none) what the out features leave of it.
        batch = tuple(dim for dim, _ in self.batch)
        of_ins = (*batch, *(self.outs if _are_indices(x) else self.ins))
        of_outs, of_bias = (*batch, *self.outs), batch
        given = [
            *((f, of_ins if i < half else of_outs) for i, g in enumerate(groups) for f in g),
            *((b, of_bias) for b in biases),
            *((w, of_ins) for w in weights),
        ]
        flat = iter(self._summed_gradients(given))
        local = tuple([tuple(itertools.islice(flat, len(group))) for group in groups])
        own = list(itertools.islice(flat, len(biases)))
        scale = list(flat)
        if self.components:
            own = [None if b is None else self._once(b) for b in own]
            if not local[0][0].shape[1]:
                # Zeros are a component, and their gradient is cut off again.
                local = tuple([tuple([F.pad(f, (0, 1)) for f in group]) for group in local])
                scale = [None if w is None else F.pad(w, (0, 1)) for w in scale]
        return x, local, own, scale

    def _summed_gradients(self, given: Sequence[tuple[Any, tuple[int, ...]]]) -> Iterator[Any]:
        """The local tensors, those that are whole along such dimensions with summed gradients.

        What layers share is one tensor here too, so that what they compute with it is shared.
        """
        once = {id(tensor): (tensor, dims) for tensor, dims in given if tensor is not None}
        local = {key: t.to_local(grad_placements=t.placements) for key, (t, _) in once.items()}
        for dim in range(self.mesh.ndim):
            keys = [
                key
                for key, (tensor, dims) in once.items()
                if dim in dims and tensor.placements[dim].is_replicate() and tensor.requires_grad
            ]
            if keys and torch.is_grad_enabled():
                summed = self.summed(dim, False, True, *map(local.__getitem__, keys))
                local.update(zip(keys, summed, strict=True))
        return iter([None if tensor is None else local[id(tensor)] for tensor, _ in given])

    def summed(self, dim: int, here: bool, back: bool, *tensors: Any) -> tuple[Tensor, ...]:
        """Tensors summed over a dimension of the mesh, and their gradients too, as is asked."""
        return summed(self.mesh, dim, here, back, *tensors)

    def between(self, z: Tensor) -> Tensor:
        """Z summed where processes hold in features, G where they hold out features."""
        for dim in sorted({*self.ins, *self.outs}):
            (z,) = self.summed(dim, dim in self.ins, dim in self.outs, z)
        return z

    def _once(self, bias: Tensor) -> Tensor:
        """The bias where a sum over the components is to contain it, and zeros elsewhere."""
        first = all(self.mesh.get_local_rank(dim) == 0 for dim in self.components)
        return once(bias, first)

    def whole(self, y: Tensor, x: Any) -> Any:
        """The DTensor of an output, of which this process has computed a part."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        placements: list[Any] = [Replicate()] * self.mesh.ndim
        for dim in self.components:
            placements[dim] = Partial()
        for dim in self.outs:
            placements[dim] = Shard(y.dim() - 1)
        shape = list(y.shape)
        for dim, at in self.batch:
            placements[dim] = Shard(at)
            shape[at] = x.shape[at]
        shape[-1] *= math.prod([self.mesh.size(dim) for dim in self.outs])
        return DTensor.from_local(
            y,
            self.mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=_strides_like(y, shape),
        )


def _strides_like(y: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a shape whose dimensions lie in memory in the order of those of y."""
    strides, step = [0] * y.dim(), 1
    for dim in sorted(range(y.dim()), key=lambda d: (y.stride(d), -d)):
        strides[dim], step = step, step * max(1, shape[dim])
    return tuple(strides)


def layout(x: Any, groups: Groups, biases: Sequence[Any], weights: Sequence[Any]) -> Layout:
    """Tell how a call on DTensors is shared, after checks that it can be.

    Args:
        x: the input.
        groups: of factors.
        biases: of the output.
        weights: λ for each in group.

    Raises:
        TypeError: some of the tensors are DTensors and others are not.
        ValueError: they are on several meshes, or placed in another way than those above.
    """
    factors = [factor for group in groups for factor in group]
    beside = [t for t in (*biases, *weights) if t is not None]
    if plain := [t for t in (x, *factors, *beside) if not is_spread(t)]:
        which = "x is plain" if plain[0] is x else "some of the others are plain"
        raise TypeError(
            f"a call on DTensors expects input, factors, bias and weights as such, but {which}; "
            f"{STYLES}, or make DTensors by torch.distributed.tensor.distribute_tensor"
        )
    mesh: Any = factors[0].device_mesh
    if any(t.device_mesh != mesh for t in (x, *factors, *beside)):
        raise ValueError(
            f"a call on DTensors expects all of them on one mesh, got {mesh} and others; {STYLES}"
        )
    return _Layouts(mesh, x, groups, biases, weights).found()


@dataclass(frozen=True)
class _Layouts:
    """The arguments of ``layout``."""

    mesh: Any
    x: Any
    groups: Groups
    biases: Sequence[Any]
    weights: Sequence[Any]

    @property
    def batch_dims(self) -> int:
        """How many dimensions of x, in front, are of the batch."""
        dims: int = self.x.dim()
        if _are_indices(self.x):
            return dims
        # A convolution has a third group of factors, one for each spatial dimension.
        return dims - 1 - (len(self.groups[2]) if len(self.groups) == 3 else 0)

    def found(self) -> Layout:
        from torch.distributed.tensor import Replicate

        placements: list[Any] = [Replicate()] * self.mesh.ndim
        components: list[int] = []
        ins: list[int] = []
        outs: list[int] = []
        batch: list[tuple[int, int]] = []
        half = len(self.groups) // 2
        for dim in range(self.mesh.ndim):
            split = {self._split(f, dim) for group in self.groups for f in group}
            if split == {1}:
                self._expect(dim, self.weights, 0)
                self._expect(dim, self.biases, None)
                components.append(dim)
                continue
            sides = self._feature_sides(dim)
            if sides is None:
                raise ValueError(
                    f"along dimension {dim} of {self.mesh}, either every factor is to be Shard(1), "
                    f"or Shard(0) the first of the in factors, of the out factors of a linear map "
                    f"or of an embedding, or of both, or none is to be sharded; got "
                    f"{[[f.placements[dim] for f in group] for group in self.groups]}; {STYLES}"
                )
            self._expect(dim, self.weights, None)
            self._expect(dim, self.biases, 0 if sides[1] else None)
            ins += [dim] * sides[0]
            outs += [dim] * sides[1]
            if sides[0]:
                placements[dim] = _shard(self.x.dim() - 1)
            elif not sides[1]:
                at = self._split(self.x, dim)
                if at is not None and 0 <= at < self.batch_dims:
                    placements[dim] = self.x.placements[dim]
                    batch.append((dim, at))
        self._check_even(0, ins)
        self._check_even(half, outs)
        return Layout(
            self.mesh, tuple(placements), tuple(components), tuple(ins), tuple(outs), tuple(batch)
        )

    @staticmethod
    def _split(tensor: Any, dim: int) -> int | None:
        """The dimension in which a tensor is sharded along one of the mesh, -1 for a sum."""
        placement: Any = tensor.placements[dim]
        if placement.is_shard():
            at: int = placement.dim % tensor.dim()
            return at
        return None if placement.is_replicate() else -1

    def _feature_sides(self, dim: int) -> tuple[bool, bool] | None:
        """Whether in features and out features are sharded; None for what is neither."""
        half = len(self.groups) // 2
        first = [self._split(group[0], dim) for group in self.groups]
        rest = [self._split(factor, dim) for group in self.groups for factor in group[1:]]
        ins, outs = set(first[:half]), set(first[half:])
        if any(at is not None for at in rest) or not all(s in ({None}, {0}) for s in (ins, outs)):
            return None
        lookup = _are_indices(self.x)
        # A convolution has three groups, and a lookup no features to share on its in side.
        if (0 in first and len(self.groups) % 2) or (ins == {0} and lookup):
            return None
        return ins == {0}, outs == {0}

    def _expect(self, dim: int, tensors: Sequence[Any], wanted: int | None) -> None:
        for tensor in tensors:
            if tensor is not None and self._split(tensor, dim) != wanted:
                what = "Replicate()" if wanted is None else f"Shard({wanted})"
                raise ValueError(
                    f"the bias or the weights are to be {what} along dimension {dim} of "
                    f"{self.mesh} with such factors, got {tensor.placements[dim]}; {STYLES}"
                )

    def _check_even(self, side: int, dims: Sequence[int]) -> None:
        """Refuse shards of features that differ in size: those of x and y would not fit them."""
        half = max(1, len(self.groups) // 2)
        parts = math.prod([self.mesh.size(dim) for dim in dims])
        for group in self.groups[side : side + half] if dims else ():
            if (mode := group[0].shape[0]) % parts:
                raise ValueError(
                    f"the first mode of sharded features must be a multiple of the number of "
                    f"processes, got the mode {mode} for {parts} of them; give modes that are "
                    f"(in_shape, out_shape), or use polyadic.distributed.RankParallel"
                )


def _are_indices(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _shard(dim: int) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(dim)


def spread_call(
    function: Callable[..., Sequence[Tensor]],
    x: Any,
    groups: Groups,
    biases: Sequence[Any],
    weights: Sequence[Any],
) -> tuple[Any, ...]:
    """The outputs of a call on DTensors, as DTensors.

    Args:
        function: computes them on this process's tensors: takes the layout, x, groups, biases and
            weights.
        x: the input.
        groups: of factors.
        biases: of the outputs.
        weights: λ for each in group.

    Raises:
        TypeError: see ``layout``.
        ValueError: see ``layout``.
    """
    found = layout(x, groups, biases, weights)
    return tuple(
        [found.whole(y, x) for y in function(found, *found.local(x, groups, biases, weights))]
    )


@dataclass(frozen=True)
class SpreadCall:
    """A call on DTensors, settled by each process for what it holds.

    Args:
        settled: what settles and remembers calls, of the boundary.
        settle: settles it on plain tensors.
        options: what decides beside the tensors.
        cast: whether autocast has cast x and the bias.
    """

    settled: Callable[..., tuple[Any, Any]]
    settle: Callable[..., tuple[Any, Any]]
    options: tuple[Any, ...]
    cast: bool

    def run(self, x: Any, groups: Groups, bias: Any, weights: Any) -> Any:
        """The output as a DTensor."""
        (y,) = spread_call(self._local, x, tuple(map(tuple, groups)), [bias], [weights])
        return y

    def _local(
        self, found: Layout, x: Tensor, groups: Any, biases: Any, weights: Any
    ) -> tuple[Tensor]:
        """What this process computes; with sharded features there is a sum in the middle."""
        (bias,), (scale,) = biases, weights
        here, _ = self.settled(self.settle, x, groups, bias, scale, self.options, self.cast)
        if found.ins or found.outs:
            return (here.run_in_halves(x, groups, bias, scale, found.between),)
        return (here.run(x, groups, bias, scale),)
