"""The boundary that every public function crosses: check, settle and run.

A function hands its arguments to ``call`` together with a function that settles such calls: it
checks the arguments, has a plan chosen, and returns a ``Call``, which is the map to run and how
arguments are laid out for it. What has been settled is remembered by the signature of the
arguments: all that checks and planner look at, and nothing computed from the values of tensors.

A map (``LinearMap``, ``ConvMap``, …) is frozen and hashable and has ``forward`` and ``backward``.
Its output is linear in x, in the bias and in each factor by itself; or x are
indices, which have no gradient. It runs

- by its own operations alone, if no gradient is asked for, in a level of forward mode, if the
  graph is to be exported, or if the plan leaves the backward to torch's autograd;
- in ``_Compiled`` while a compiler traces;
- in ``_ClosedForm`` in a transform of torch.func;
- in ``_Eager`` otherwise, which no transform can enter, and whose call costs a fifth of that.

No Function has a ``jvp``. torch takes the tangents that one makes for constants, so that forward
mode over forward mode (``jacfwd(jacfwd(f))``) would be zero. And where vmap meets a Function that
saves tensors for its ``jvp`` too, torch takes their batch dimensions for those of what is saved for
the backward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, profiler

from polyadic._torch import (
    OWN_CLASSES,
    Memo,
    any_autocast,
    autocasts,
    direct_apply,
    exporting,
    forward_mode_level,
    is_profiled,
    is_spread,
    no_autocast,
    transforms_active,
    unwrap_if_dead,
)
from polyadic.formats import Shape
from polyadic.functional.spread import SpreadCall
from polyadic.planner import choice

Groups = tuple[Sequence[Tensor], ...]


class MultilinearMap(Protocol):
    """What the boundary needs of a map."""

    @property
    def plan(self) -> object:
        """The plan that the map obeys; a profiler's label names it."""

    @property
    def output_channels_last(self) -> bool:
        """Whether the output's channels are innermost in memory."""

    @property
    def autograd_backward(self) -> bool:
        """Whether torch's autograd differentiates the forward, in place of ``backward``."""

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output, and the intermediates kept for the backward."""

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
        wrt_bias: bool = False,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of x and of each factor, and behind them that of the bias if asked.

        ``needs`` says whether x and each factor needs its gradient.
        """


def joined(groups: Groups, weights: Tensor | None, weights_at: int) -> tuple[Tensor, ...]:
    """Return the factors of all groups in a row, with λ among them as one more factor (1, R).

    Args:
        groups: sequences of factors.
        weights: λ (R,) or None.
        weights_at: how many factors stand in front of λ.
    """
    factors = tuple(itertools.chain.from_iterable(groups))
    if weights is None:
        return factors
    return (*factors[:weights_at], weights.unsqueeze(0), *factors[weights_at:])


@dataclass(frozen=True)
class Call:
    """A call that has been checked: the map to run, and how arguments are laid out for it.

    Args:
        map: the map, which takes x with one batch dimension.
        weights_at: how many factors stand in front of λ.
        batch: x's leading dimensions, and its shape with one batch dimension in their place; None
            if x has one batch dimension already.
        prepare: what is done to a batch before the map sees it, or None.
    """

    map: MultilinearMap
    weights_at: int
    batch: tuple[Shape, Shape] | None = None
    prepare: Callable[[Tensor], Tensor] | None = None

    def run(self, x: Tensor, groups: Groups, bias: Tensor | None, weights: Tensor | None) -> Tensor:
        """Apply the map to such arguments, differentiably; a profiler sees the map and its plan."""
        if self.batch is not None:
            x = x.reshape(self.batch[1])
        if self.prepare is not None:
            x = self.prepare(x)
        factors = joined(groups, weights, self.weights_at)
        # Compiled code asks for no profiler: what it reads is guarded, and starting one would
        # compile it again.
        if torch.compiler.is_compiling():
            y = _traced(self.map, x, bias, factors)
        elif is_profiled():
            # Entering a label costs more than a small layer's product.
            with profiler.record_function(f"polyadic.{type(self.map).__name__}({self.map.plan})"):
                y = _eager(self.map, x, bias, factors)
        else:
            y = _eager(self.map, x, bias, factors)
        return y if self.batch is None else self.unbatched(y)

    def batched(self, x: Tensor) -> Tensor:
        """Reshape x to one batch dimension."""
        return x if self.batch is None else x.reshape(self.batch[1])

    def unbatched(self, y: Tensor) -> Tensor:
        """Give outputs, or gradients of x, the leading dimensions that x has."""
        return y if self.batch is None else y.view(*self.batch[0], *y.shape[1:])


Settled = TypeVar("Settled", bound=Call)


class Asked(NamedTuple):
    """What a public function was asked for, before any check.

    Attributes:
        x: the input, as autocast casts it.
        groups: sequences of factors.
        bias: the bias or None.
        weights: λ or None.
        options: all further arguments, in the order that the function chose.
        cast: whether autocast has cast x and the bias.
    """

    x: Any
    groups: tuple[Any, ...]
    bias: Any
    weights: Any
    options: tuple[Any, ...]
    cast: bool = False


Settle = Callable[[Asked], tuple[Settled, Groups]]


def as_batch(x: Tensor, dims: int) -> tuple[Shape, Shape] | None:
    """Return ``Call.batch`` for x with ``dims`` dimensions for each element of a batch."""
    if x.dim() == dims + 1:
        return None
    lead, rest = x.shape[: x.dim() - dims], x.shape[x.dim() - dims :]
    return tuple(lead), (math.prod(lead), *rest)


# The calls that have been settled, by signature.
known_calls = Memo()
choice.when_forgotten(known_calls.clear)

_signature = attrgetter("shape", "dtype", "device", "layout")


def call(
    settle: Settle[Call],
    x: Any,
    groups: tuple[Any, ...],
    bias: Any,
    weights: Any,
    options: tuple[Any, ...],
) -> Tensor:
    """Check, settle and run a call whose x and bias autocast may cast.

    Args:
        settle: returns the call and the groups as tuples; raises where an argument does not fit.
        x: the input.
        groups: sequences of factors.
        bias: the bias or None.
        weights: λ or None.
        options: all further arguments of the function.
    """
    cast = False
    if torch.compiler.is_compiling() or any_autocast():
        x, bias, cast = autocast(x, bias)
    found, groups = settled(settle, x, groups, bias, weights, options, cast)
    return found.run(x, groups, bias, weights)


def settled(
    settle: Settle[Settled],
    x: Any,
    groups: tuple[Any, ...],
    bias: Any,
    weights: Any,
    options: tuple[Any, ...],
    cast: bool = False,
) -> tuple[Settled, Groups]:
    """Return what ``settle`` makes of a call, remembered; and the groups, as tuples the first time.

    A dict takes 1, 1.0 and True for one key, of which only the first is a stride; so the types of
    options, and of entries of tuples, belong to the key. Calls that have no signature are settled
    each time: those that a compiler traces, with symbolic sizes, with iterators, or with arguments
    that are not tensors.
    """
    if torch.compiler.is_compiling():
        if any(map(is_spread, (x, *groups[0]))):
            spread: Any = SpreadCall(settled, settle, options, cast)
            return spread, groups
        return settle(Asked(x, groups, bias, weights, options, cast))
    try:
        sizes = tuple(map(len, groups))
        tensors = (x, *itertools.chain.from_iterable(groups))
        classes = tuple(map(type, tensors))
        plain = OWN_CLASSES.issuperset(classes)
        if not plain and any(map(is_spread, tensors)):
            spread = SpreadCall(settled, settle, options, cast)
            return spread, groups
        key = (
            settle,
            sizes,
            tuple(map(type, groups)),
            tuple(map(_signature, tensors)),
            None if plain else classes,
            x.stride(),
            None if bias is None else _signature(bias),
            None if weights is None else _signature(weights),
            cast,
            options,
            tuple([tuple(map(type, o)) if type(o) is tuple else type(o) for o in options]),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
        )
        found: Settled | None = known_calls.get(key)
    except (AttributeError, TypeError, RuntimeError):
        # Sparse tensors have no strides, which is a RuntimeError.
        return settle(Asked(x, groups, bias, weights, options, cast))
    if found is None:
        found, groups = settle(Asked(x, groups, bias, weights, options, cast))
        layer_map: Any = found.map
        if not torch.is_grad_enabled() and getattr(layer_map.plan, "keep", False):
            # Nothing is kept for a backward, and a GPU computes few rows in one launch.
            found = replace(found, map=replace(layer_map, plan=replace(layer_map.plan, keep=0)))
        known_calls[key] = found
    return found, groups


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks for on x's device; None if it is off or x is float64."""
    kind = x.device.type
    if not autocasts(kind):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)


def autocast(x: Any, bias: Any) -> tuple[Any, Any, bool]:
    """Cast x and the bias as autocast asks, and return whether it does.

    A plan is chosen for the dtype of the computation, so this comes first. Anything that is not a
    floating-point tensor is returned as it is, and the checks refuse it by name.
    """
    dtype = autocast_dtype(x) if _is_floating(x) else None
    if dtype is None:
        return x, bias, False
    return x.to(dtype), bias.to(dtype) if _is_floating(bias) else bias, True


def _is_floating(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype.is_floating_point


def _traced(
    layer_map: MultilinearMap, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
) -> Tensor:
    if layer_map.autograd_backward or not torch.is_grad_enabled() or exporting():
        return layer_map.forward(x, bias, factors)[0]
    y: Tensor = _Compiled.apply(layer_map, x, bias, *factors)[0]
    return y.movedim(-1, 1) if layer_map.output_channels_last else y


def _eager(
    layer_map: MultilinearMap, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
) -> Tensor:
    without_function = layer_map.autograd_backward or not torch.is_grad_enabled()
    if without_function or forward_mode_level() >= 0:
        return layer_map.forward(x, bias, factors)[0]
    if transforms_active():
        y: Tensor = _ClosedForm.apply(layer_map, x, bias, *factors)[0]
        return y
    bias = None if bias is None else unwrap_if_dead(bias)
    y = _apply_eager(layer_map, unwrap_if_dead(x), bias, *map(unwrap_if_dead, factors))
    return y


class _ClosedForm(Function):
    """A map's forward with its closed-form backward; it supports reverse mode and vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        layer_map: MultilinearMap, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        y, kept = layer_map.forward(x, bias, factors)
        return (_own(y), *kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        layer_map, x, _, *factors = inputs
        ctx.layer_map = layer_map
        ctx.n_factors = len(factors)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *factors, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grads[0])


def _own(y: Tensor) -> Tensor:
    """Return the output as a tensor that is not a view, so that it can be changed in place.

    A map may turn its result to the layout it promises, and the result is then a view. torch
    refuses to change a view in place that was made inside a Function, because it does not know how
    to differentiate the base. The map holds no other reference to the base, so the result may be a
    tensor of its own. Both share the counter of changes, by which autograd still notices what was
    changed after it was saved.
    """
    return y.detach() if y._is_view() else y


def gradients(
    layer_map: MultilinearMap,
    grad_y: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    factors: Sequence[Tensor],
    needs: Sequence[bool],
    wrt_bias: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """What the map's ``backward`` returns, of complex numbers as torch defines their gradients.

    Of a real loss L torch's gradient with respect to z = a + ib is ∂L/∂a + i ∂L/∂b. For a
    holomorphic y = f(z) the chain rule makes it that of y times the conjugate of f'(z). A map
    multiplies x with factors and adds up, without conjugates, so it is holomorphic in each of its
    arguments. A map's backward multiplies the gradient of y by the partial derivatives, which are
    products of the other arguments; so of these it is given the conjugates. The conjugate of x is
    a view that a matrix product reads as it is, and factors are small.
    """
    if grad_y.is_complex():
        x, kept = x.conj(), [z.conj() for z in kept]
        factors = [torch.conj_physical(factor) for factor in factors]
    if not torch.compiler.is_compiling() and any_autocast():
        # What autocast cast in the forward has its dtype already; nothing else is to be cast.
        with no_autocast(grad_y):
            return layer_map.backward(grad_y, x, kept, factors, needs, wrt_bias)
    return layer_map.backward(grad_y, x, kept, factors, needs, wrt_bias)


def _gradients(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the map's arguments, for that of its output."""
    n_factors: int = ctx.n_factors
    if grad_y is None:
        return (None,) * (3 + n_factors)
    layer_map: MultilinearMap = ctx.layer_map
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    x, factors, kept = saved[0], saved[1 : 1 + n_factors], saved[1 + n_factors :]
    if _is_differentiated():
        # To autograd, kept intermediates are constants; for second derivatives we recompute them.
        kept = ()
    needs: tuple[bool, ...] = ctx.needs_input_grad
    wrt = needs[1], *needs[3:]
    d_x, others = gradients(layer_map, grad_y, x, kept, factors, wrt, needs[2])
    d_bias = others.pop() if needs[2] else None
    return (None, d_x, d_bias, *others)


def _is_differentiated() -> bool:
    """Whether a backward is itself differentiated."""
    return torch.is_grad_enabled()


class _Compiled(_ClosedForm):
    """``_ClosedForm`` for compiled code, which hands out maps with channels as the last dimension.

    Dynamo makes the gradient of every output contiguous. A convolution in channels_last has its
    channels innermost in memory, so making the gradient of (b, n, *s) contiguous would copy it to
    channels_first, and the backward would copy it back. With (b, *s, n) as output the gradient is
    contiguous already. ``_traced`` moves the channels of the output back to their place.
    """

    @staticmethod
    def forward(
        layer_map: MultilinearMap, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        y, kept = layer_map.forward(x, bias, factors)
        # Dynamo cannot ask whether it is a view; detaching costs compiled code nothing.
        return ((y.movedim(1, -1) if layer_map.output_channels_last else y).detach(), *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y = grads[0]
        if grad_y is not None and ctx.layer_map.output_channels_last:
            grad_y = grad_y.movedim(-1, 1)
        return _gradients(ctx, grad_y)


class _Eager(Function):
    """What ``_ClosedForm`` does, for eager code outside transforms.

    torch asks a Function with ``setup_context`` for its signature at each call, which takes longer
    than a small layer; this one is called without it.
    """

    @staticmethod
    def forward(
        ctx: Any, layer_map: MultilinearMap, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:
        y, kept = layer_map.forward(x, bias, factors)
        ctx.layer_map = layer_map
        ctx.n_factors = len(factors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *factors, *kept)
        return _own(y)

    backward = _ClosedForm.backward


_apply_eager = direct_apply(_Eager)
