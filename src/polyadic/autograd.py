"""The one switch between plain aten and the autograd Function, for every layer.

A map (``LinearMap``, ``ConvMap``, …) is frozen and hashable and has ``forward``, ``backward`` and
``bias_gradient``. Its output is linear in x, in the bias and in each factor by itself, which is
all that forward mode needs; or x are indices, which have neither gradient nor tangent.

- no gradient asked for, exporting, or a plan that says so: the map's own aten operations;
- compiling: the Function without ``jvp``, which Dynamo can trace;
- eager, in a transform of torch.func or in forward mode: the Function with ``jvp``;
- eager: a Function of the same backward that knows neither, as a call of it costs a fifth.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad, profiler

from polyadic._torch import exporting


class MultilinearMap(Protocol):
    """What the boundary needs of a map."""

    @property
    def plan(self) -> object:
        """What it obeys; printed in a profiler's label."""

    @property
    def output_channels_last(self) -> bool:
        """Whether the output's channels are innermost in memory."""

    @property
    def autograd_backward(self) -> bool:
        """Whether torch's autograd differentiates the forward, in place of ``backward``."""

    def forward(
        self, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output, and the intermediates kept for the backward."""

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        factors: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x and of each factor."""

    def bias_gradient(self, grad_y: Tensor) -> Tensor:
        """Gradient of the bias."""


def run(
    layer_map: MultilinearMap, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
) -> Tensor:
    """Apply a map, differentiably; under a profiler with a label that names map and plan."""
    # Compiled code asks for no profiler: what it reads is guarded, and starting one would compile
    # it again.
    if torch.compiler.is_compiling():
        return _traced(layer_map, x, bias, factors)
    # Entering a label costs more than a small layer's product.
    if profiler._is_profiler_enabled:
        with profiler.record_function(f"polyadic.{type(layer_map).__name__}({layer_map.plan})"):
            return _eager(layer_map, x, bias, factors)
    return _eager(layer_map, x, bias, factors)


def _traced(
    layer_map: MultilinearMap, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
) -> Tensor:
    if layer_map.autograd_backward or not torch.is_grad_enabled() or exporting():
        return layer_map.forward(x, bias, factors)[0]
    y: Tensor = _Compiled.apply(layer_map, x, bias, *factors)[0]  # type: ignore[no-untyped-call]
    return y.movedim(-1, 1) if layer_map.output_channels_last else y


def _eager(
    layer_map: MultilinearMap, x: Tensor, bias: Tensor | None, factors: Sequence[Tensor]
) -> Tensor:
    if layer_map.autograd_backward or not torch.is_grad_enabled():
        return layer_map.forward(x, bias, factors)[0]
    y: Tensor
    # In a transform of torch.func, or a level of forward mode.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        y = _BoundaryWithJvp.apply(layer_map, x, bias, *factors)[0]  # type: ignore[no-untyped-call]
    else:
        y = _Plain.apply(layer_map, x, bias, *factors)  # type: ignore[no-untyped-call]
    return y


class _Boundary(Function):
    """Closed-form backward around a map's forward; reverse mode and vmap, for those below."""

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
    """The output as a tensor that is no view, so that it can be changed in place.

    A map turns its result to the layout it promises, and torch refuses to change in place a view
    that was made inside a Function: how to differentiate the base it does not know. The map holds
    no other reference to that base, so the result may as well be a tensor of its own. They share
    the counter of changes, by which autograd still finds out what was changed after it was saved.
    """
    return y.detach() if y._is_view() else y


def _gradients(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the map's arguments, for that of its output."""
    n_factors: int = ctx.n_factors
    if grad_y is None:
        return (None,) * (3 + n_factors)
    layer_map: MultilinearMap = ctx.layer_map
    x, *rest = ctx.saved_tensors
    factors, kept = rest[:n_factors], rest[n_factors:]
    if _differentiated((x, *factors)):
        # Kept intermediates are constants to autograd: second derivatives need them recomputed.
        kept = []
    needs_x, needs_bias, *needs_factors = ctx.needs_input_grad[1:]
    d_x, d_factors = layer_map.backward(grad_y, x, kept, factors, (needs_x, *needs_factors))
    d_bias = layer_map.bias_gradient(grad_y) if needs_bias else None
    return (None, d_x, d_bias, *d_factors)


def _differentiated(inputs: Sequence[Tensor]) -> bool:
    """Whether a backward is itself differentiated, in reverse or (eager only) in forward mode."""
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in inputs)  # type: ignore[no-untyped-call]


# Function.apply binds its arguments to forward's signature at each call; found once, it costs half.
_Boundary.forward.__signature__ = inspect.signature(_Boundary.forward)  # type: ignore[attr-defined]


class _Compiled(_Boundary):
    """The same with the output's channels last where they are innermost in memory.

    Dynamo makes gradients contiguous, which is then no pass over them.
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


class _Plain(Function):
    """The same for eager code outside transforms."""

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

    backward = _Boundary.backward


class _BoundaryWithJvp(_Boundary):
    """The same with forward mode, which torch.compile refuses to trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _Boundary.setup_context(ctx, inputs, output)
        _, x, bias, *factors = inputs
        ctx.n_kept = len(output) - 1
        ctx.save_for_forward(x, bias, *factors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        """Σ over the arguments of the map with that one argument replaced by its tangent."""
        _, t_x, t_bias, *t_factors = tangents
        x, _, *factors = ctx.saved_tensors
        terms: list[Tensor] = []
        if t_x is not None:
            terms.append(ctx.layer_map.forward(t_x, None, factors)[0])
        for position, tangent in enumerate(t_factors):
            if tangent is not None:
                moved = [*factors[:position], tangent, *factors[position + 1 :]]
                terms.append(ctx.layer_map.forward(x, None, moved)[0])
        if t_bias is not None:
            zeros = torch.zeros_like(x)
            terms.append(ctx.layer_map.forward(zeros, t_bias, factors)[0])
        return (sum(terms[1:], terms[0]) if terms else None, *[None] * ctx.n_kept)
