"""Tables of layers whose arguments lie in memory in every way that torch allows.

A view reads other memory than a contiguous tensor of its shape, and what lies between its entries
is NaN here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from data import draw
from pretend import fused_kernels
from torch import Tensor

from polyadic.functional import cp_conv, cp_linear
from polyadic.kernels.fused import MOST_DECODED_ROWS
from polyadic.plans import ConvPlan, ConvRoute, LinearPlan, LinearRoute

# Sums in float32, in the order of another product.
TOLERANCE = 1e-5


def _apart(tensor: Tensor) -> Tensor:
    """The entries of the last dimension with gaps between them."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]


def _turned(tensor: Tensor) -> Tensor:
    """The first dimension innermost."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def _shifted(tensor: Tensor) -> Tensor:
    """One element behind a multiple of 16 bytes."""
    return torch.cat([tensor.new_full((1,), float("nan")), tensor.flatten()])[1:].view(tensor.shape)


def _expanded(tensor: Tensor) -> Tensor:
    """All entries in one place."""
    return tensor.flatten()[:1].expand(tensor.shape)


WAYS = {"apart": _apart, "turned": _turned, "shifted": _shifted, "expanded": _expanded}
Call = Callable[..., Tensor]


def _linears() -> Iterator[tuple[str, Call, dict[str, Tensor]]]:
    route = LinearRoute((2,), (2,), by="triton")
    dense = LinearRoute((2,), (2,), "dense", "triton")
    shapes = {"in 1": (4, 8), "in 2": (6, 8), "out 1": (3, 8), "out 2": (5, 8), "bias": (15,)}
    few, many = 3, MOST_DECODED_ROWS + 1
    for rows, way in ((few, route), (many, route), (many, dense)):
        plan = LinearPlan(way, way, "x")
        given = {"x": draw((rows, 24), torch.float32, False)}
        given |= {name: draw(shape, torch.float32, False) for name, shape in shapes.items()}

        def call(x: Tensor, *rest: Tensor, plan: LinearPlan = plan) -> Tensor:
            return cp_linear(x, rest[:2], rest[2:4], rest[4], plan=plan)

        yield f"linear {rows} rows, {plan}", call, given


def _convs() -> Iterator[tuple[str, Call, dict[str, Tensor]]]:
    route = ConvRoute(by="triton")
    for outs, groups, kernel in ((4, 1, 3), (4, 2, 3), (4, 2, 1)):
        shapes = {"out": (outs, 8), "in": (6 // groups, 8), "k 1": (kernel, 8), "k 2": (kernel, 8)}
        given = {"x": draw((2, 6, 4, 5), torch.float32, False)}
        given |= {name: draw(shape, torch.float32, False) for name, shape in shapes.items()}
        given["bias"] = draw((outs,), torch.float32, False)
        plan = ConvPlan(route, route, 0)
        options = {"padding": kernel // 2, "groups": groups, "plan": plan}

        def call(x: Tensor, *rest: Tensor, options: dict[str, Any] = options) -> Tensor:
            out, own, *kernels, bias = rest
            return cp_conv(x, [out], [own], kernels, bias, **options)

        yield f"conv {groups=} {kernel=}", call, given


def _results(call: Call, given: Sequence[Tensor], d_y: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of all arguments."""
    leaves = [t.detach().requires_grad_() for t in given]
    with torch.enable_grad(), fused_kernels():
        y = call(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, y.detach() if d_y is None else d_y)]


def check() -> Iterator[str]:
    """Each row of the table that holds."""
    for name, call, given in (*_linears(), *_convs()):
        d_y = _results(call, [*given.values()], None)[0]
        for way, lay in WAYS.items():
            laid, own = [lay(t) for t in given.values()], lay(d_y)
            found = _results(call, laid, own)
            plain = [t.clone(memory_format=torch.contiguous_format) for t in (*laid, own)]
            for got, want in zip(found, _results(call, plain[:-1], plain[-1]), strict=True):
                assert not got.isnan().any(), f"{name}, {way}: a NaN was read"
                error, scale = (got - want).abs().max(), want.abs().max()
                assert error <= TOLERANCE * scale, f"{name}, {way}: off by {error:.1e}"
        yield name
