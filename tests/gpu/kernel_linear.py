"""Tables of a whole linear layer that stands on the kernels: its values and all its gradients.

Without a GPU the layer is made to believe that its tensors are on one; the kernels are interpreted
and the products are those of the CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from data import device, draw, draw_groups, dtypes_of, error_of, repeats, short
from torch import Tensor

from polyadic.kernels import fused, fused_linear, linear, multilinear, pairs
from polyadic.kernels.linear import LinearMap
from polyadic.plans import LinearPlan, LinearRoute

# In modes (a first of 1 is a scale), out modes, rank, rows.
SHAPES = (
    ((4, 6), (3, 5), 8, 7),
    ((1, 3, 4, 5), (2, 3, 4), 11, 5),
    ((12,), (9,), 5, 1),
    # One kernel makes dKA and dKC, in two pieces.
    ((4, 4), (2, 8), 10, 520),
)


def _unrounded(x: Tensor, z: Tensor) -> Tensor:
    """Sum in float32 as a GPU does."""
    return x.t().float() @ z.float()


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """Take a GPU's way, on a GPU or not."""
    with contextlib.ExitStack() as stack:
        if device() == "cpu":
            stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
            for module in (pairs, fused):
                stack.enter_context(mock.patch.object(module, "triton_serves", return_value=True))
            for module in (linear, multilinear):
                stack.enter_context(mock.patch.object(module, "matmul_tn_unrounded", _unrounded))
            stack.enter_context(mock.patch.object(fused_linear, "matmul_tn_in_float32", _unrounded))
            there = mock.patch.object(fused_linear, "has_warpgroups", return_value=True)
            stack.enter_context(there)
        yield


def step(
    layer_map: LinearMap, x: Tensor, bias: Tensor, factors: list[Tensor], grad_y: Tensor
) -> dict[str, Tensor]:
    """Output and gradients by name."""
    y, kept = layer_map.forward(x, bias, factors)
    needs = (True,) * (1 + len(factors))
    d_x, others = layer_map.backward(grad_y, x, kept, factors, needs, wrt_bias=True)
    named: dict[str, Any] = {"y": y, "d_x": d_x}
    named |= {f"d_factor {d}": gradient for d, gradient in enumerate(others[:-1])}
    named["d_bias"] = others[-1]
    return named


def _plans(n_in: int, n_out: int, mixed: bool) -> Iterator[LinearPlan]:
    """Z kept and not; other routes before and after the one that has kernels."""
    whole = LinearRoute((n_in,), (n_out,), by="triton")
    split = LinearRoute((1,) * n_in, (1,) * n_out)
    dense = LinearRoute((n_in,), (n_out,), "dense", "triton")
    yield LinearPlan(whole, whole)
    yield LinearPlan(whole, whole, "x")
    if mixed:
        yield LinearPlan(whole, split)
        yield LinearPlan(split, whole)
        yield LinearPlan(dense, dense, "x")


def check() -> Iterator[str]:
    """Each row of the table that holds."""
    for number, (in_modes, out_modes, rank, rows) in enumerate(SHAPES):
        for dtype in dtypes_of(number):
            # Routes of two kinds meet in a rank that is padded.
            mixed = rank == 11
            for plan in _plans(len(in_modes), len(out_modes), mixed):
                name = f"{short(dtype)} {in_modes} to {out_modes} rank {rank}, {plan}"
                ins, outs = draw_groups((in_modes, out_modes), rank, dtype, False)
                layer_map = LinearMap(plan, len(ins))
                n_in = torch.Size(in_modes).numel()
                n_out = torch.Size(out_modes).numel()
                x, grad_y = (draw((rows, n), dtype, False) for n in (n_in, n_out))
                bias = draw((n_out,), dtype, False)
                given = (x, bias, [*ins, *outs], grad_y)
                with on_gpu():
                    found = step(layer_map, *given)
                    again = step(layer_map, *given) if repeats(dtype) else found
                    if dtype == torch.float32:
                        _check_parts(layer_map, found, given)
                there = (x.cpu(), bias.cpu(), [f.cpu() for f in given[2]], grad_y.cpu())
                torchs = step(layer_map, *there)
                wide = (
                    t.double() if isinstance(t, Tensor) else [f.double() for f in t] for t in there
                )
                exact = step(layer_map, *wide)
                for key, numbers in found.items():
                    assert numbers.dtype == dtype, f"{name}: {key} has another dtype"
                    assert torch.equal(numbers, again[key]), f"{name}: {key} differs again"
                # Of all together: the smallest gradients have too few numbers to compare errors by.
                error, allowed = _pooled(found, exact), 2 * _pooled(torchs, exact) + 5e-7
                assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"
                yield name


def _pooled(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Root mean square of the tensors' relative errors."""
    squares = [error_of(numbers, exact[key]) ** 2 for key, numbers in found.items()]
    return math.sqrt(sum(squares) / len(squares))


def _check_parts(layer_map: LinearMap, whole: dict[str, Tensor], given: Any) -> None:
    """Gradients asked for apart have the same bits.

    That of the bias is summed in another order where no other gradient is a sum of that kind.
    """
    x, bias, factors, grad_y = given
    n_in, n = layer_map.n_in, len(factors)
    for d_x, d_in, d_out in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)):
        needs = [bool(d_x), *[bool(d_in)] * n_in, *[bool(d_out)] * (n - n_in)]
        _, kept = layer_map.forward(x, bias, factors)
        grad_x, gradients = layer_map.backward(grad_y, x, kept, factors, needs, wrt_bias=True)
        needs.append(True)
        for key, number, wanted in zip(list(whole)[1:], [grad_x, *gradients], needs, strict=True):
            assert number is not None or not wanted, f"{key} with {needs}"
            if key == "d_bias":
                torch.testing.assert_close(number, whole[key])
            else:
                assert number is None or torch.equal(number, whole[key]), f"{key} with {needs}"
