"""How many kernels a training step launches, for every kind of layer and each size at a branch."""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from pretend import counted

from polyadic.functional import cp_conv, cp_linear
from polyadic.functional.boundary import Call
from polyadic.kernels import fused_linear
from polyadic.kernels.embedding import MOST_SCATTERED_ROWS, EmbeddingMap
from polyadic.kernels.fused import MOST_DECODED_ROWS
from polyadic.kernels.fused_conv import MOST_PROJECTED_CHANNELS
from polyadic.kernels.linear import LinearMap
from polyadic.kernels.projections import PRODUCT_PER_IMAGE_FROM_POSITIONS
from polyadic.plans import MOST_FUSED_TAPS, ConvPlan, ConvRoute, LinearPlan, LinearRoute

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANK = 8
# A step of a convolution, of a linear layer and of an embedding.
MOST_CONV, MOST_LINEAR, MOST_EMBEDDING = 12, 9, 9


def factors(*modes: int, rank: int = RANK, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.ones(mode, rank, dtype=dtype) for mode in modes]


def conv_launches(
    channels: int,
    *,
    biased: bool = True,
    keep: int = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    kernel: tuple[int, ...] = (3, 3),
    stride: int = 1,
    size: int = 9,
    rows: bool = True,
    scaled: bool = False,
    order: int = 2,
) -> list[str]:
    """Names of what a step launches, the gradient of the bias among them."""
    outs = factors(*(channels,) if order == 1 else (channels // 2, 2), dtype=dtype)
    ins = factors(*(6 // groups,) if order == 1 else (6 // groups, 1), dtype=dtype)
    sides = outs, ins, factors(*kernel, dtype=dtype)
    x = torch.ones(2, 6, *(size,) * len(kernel), dtype=dtype)
    if rows:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    bias = torch.ones(channels, dtype=dtype) if biased else None
    weights = torch.ones(RANK, dtype=dtype) if scaled else None
    wanted = [x, bias, weights, *itertools.chain.from_iterable(sides)]
    leaves = [t.requires_grad_() for t in wanted if t is not None]
    route = ConvRoute("channels_last", "merged", by="triton")
    with counted(computing=False) as launches:
        y = cp_conv(
            x,
            *sides,
            bias,
            weights=weights,
            stride=stride,
            padding=tuple([k // 2 for k in kernel]),
            groups=groups,
            plan=ConvPlan(route, route, keep),
        )
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    # The gradient of y is made here.
    return [name for name in launches.names if name != "ones_like"]


KERNELS = ((3,), (1, 3), (3, 3), (3, 3, 3), (1, 1), (1,))
# Below, at and above the channels up to which the projection is made in the stage's kernel.
CHANNELS = (8, MOST_PROJECTED_CHANNELS, MOST_PROJECTED_CHANNELS + 2, 200)


@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_convolutions_step(
    kernel: tuple[int, ...], channels: int, biased: bool, keep: int
) -> None:
    """Matrices, Z1, stage and Y; matrices, dZ2, stage, dKA, dKC, dX, all factors and the bias."""
    expected = 10
    staged = math.prod(kernel) > 1
    # The projection apart, and Z1 made again.
    expected += staged * (channels > MOST_PROJECTED_CHANNELS) + (keep == 0)
    # Without a stage there are two launches less, and a projection more.
    expected -= not staged
    for groups in (1, 2):
        given: dict[str, Any] = {"biased": biased, "keep": keep, "kernel": kernel}
        names = conv_launches(channels, groups=groups, **given)
        wanted = expected
        if groups > 1:
            # The stage's kernel always makes the projection; behind a 1x1 kernel nothing adds the
            # bias in passing.
            wanted -= staged * (channels > MOST_PROJECTED_CHANNELS)
            wanted += biased and not staged
        assert len(names) == wanted <= MOST_CONV, names


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("groups", [1, 2])
# With few positions to an image, x is turned into rows for a product, and with many it is not.
@pytest.mark.parametrize("size", [2, 3, PRODUCT_PER_IMAGE_FROM_POSITIONS // 4])
def test_a_convolutions_step_of_channels_first(
    size: int, groups: int, channels: int, biased: bool
) -> None:
    """With several groups x is converted in each pass, without in the backward at most."""
    for keep in (1, 2):
        names = conv_launches(
            channels, groups=groups, keep=keep, biased=biased, size=size, rows=False
        )
        assert len(names) <= MOST_CONV, names
    least = conv_launches(channels, groups=groups, keep=0, biased=biased, size=size, rows=False)
    assert len(least) <= MOST_CONV + (least.count("clone") > 0), least


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("scaled", [False, True])
def test_neither_dtype_nor_order_nor_scale_costs_a_launch(
    dtype: torch.dtype, channels: int, scaled: bool
) -> None:
    for order in (1, 2):
        names = conv_launches(channels, dtype=dtype, scaled=scaled, order=order)
        assert len(names) == 10 + (channels > MOST_PROJECTED_CHANNELS), names


def test_autocast_multiplies_matrices_of_the_inputs_dtype() -> None:
    """Factors stay in float32; the backward runs without autocast, and nothing casts there."""
    with torch.autocast("cpu", torch.bfloat16):
        names = conv_launches(96, dtype=torch.float32)
    assert "mttkrp_kernel" in names


@pytest.mark.parametrize("kernel", [(3, 9), (5, 5), (MOST_FUSED_TAPS,), (3, 3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_large_kernels_and_strides(kernel: tuple[int, ...], stride: int) -> None:
    for channels in CHANNELS:
        names = conv_launches(channels, kernel=kernel, stride=stride)
        assert len(names) == 10 + (channels > MOST_PROJECTED_CHANNELS), names


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_strides_of_a_kernel_of_one_tap(groups: int, biased: bool) -> None:
    """X is copied without what is skipped in each pass, and dX is filled with zeros around."""
    names = conv_launches(8, kernel=(1, 1), stride=2, groups=groups, biased=biased)
    again = names.count("clone"), names.count("zeros_like"), names.count("copy_")
    assert again == (2, 1, 1)
    assert len(names) == MOST_CONV + 1 + (biased and groups > 1), names


def linear_launches(
    rows: int,
    keep: str,
    *,
    biased: bool,
    dtype: torch.dtype = torch.bfloat16,
    kind: str = "factorized",
    order: int = 2,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> list[str]:
    """Names of what a linear step launches; ``needs`` are of x, the factors and the bias."""
    ins, outs = factors(*(4,) * order, dtype=dtype), factors(*(3,) * order, dtype=dtype)
    n, m = 3**order, 4**order
    wanted = [factor.requires_grad_(needs[1]) for factor in (*ins, *outs)]
    x = torch.ones(rows, m, dtype=dtype, requires_grad=needs[0])
    bias = torch.ones(n, dtype=dtype, requires_grad=needs[2]) if biased else None
    route: Any = LinearRoute((order,), (order,), kind, by="triton")  # type: ignore[arg-type]
    layer_map = LinearMap(LinearPlan(route, route, keep), order)  # type: ignore[arg-type]
    leaves = [t for t in (x, *wanted, bias) if t is not None and t.requires_grad]
    with counted(computing=False) as launches:
        y = Call(layer_map, 0).run(x, (wanted,), bias, None)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    return [name for name in launches.names if name != "ones_like"]


ROWS = (1, MOST_DECODED_ROWS, MOST_DECODED_ROWS + 1, 200)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_linear_step(order: int, dtype: torch.dtype, biased: bool) -> None:
    """KA and KC, Z, Y with its bias; KA and KC, G, dX, dKA, dKC, all gradients."""
    for rows in ROWS:
        names = linear_launches(rows, "x and z", biased=biased, dtype=dtype, order=order)
        assert len(names) == MOST_LINEAR, names
        # Z is made again, and few rows are computed in one launch where three were.
        least = linear_launches(rows, "x", biased=biased, dtype=dtype, order=order)
        decoded = rows <= MOST_DECODED_ROWS and order > 1
        assert len(least) <= MOST_LINEAR + (not decoded), least
        rebuilt = linear_launches(rows, "x", biased=biased, dtype=dtype, order=order, kind="dense")
        assert len(rebuilt) == MOST_LINEAR + 1, rebuilt


@pytest.mark.parametrize("rows", ROWS)
def test_without_gradients_nothing_is_kept(rows: int) -> None:
    """A layer that decodes makes no Z, though its plan keeps one for steps of training."""
    ins, outs = factors(4, 4, dtype=torch.bfloat16), factors(3, 3, dtype=torch.bfloat16)
    route = LinearRoute((2,), (2,), by="triton")
    plan = LinearPlan(route, route, "x and z")
    x = torch.ones(rows, 16, dtype=torch.bfloat16)
    with counted(computing=False) as launches, torch.no_grad():
        cp_linear(x, ins, outs, plan=plan)
    # Few rows are one launch; of others KA and KC, Z, and Y are one each.
    most = 1 if rows <= MOST_DECODED_ROWS else 3
    assert len(launches.names) == most, launches.names


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("keep", ["x", "x and z"])
def test_a_linear_step_of_few_columns_on_hopper(keep: Any, biased: bool) -> None:
    """One launch makes dKA, dKC and partial sums of the bias's gradient."""
    names = {}
    for warpgroups in (False, True):
        ins, outs = factors(4, 4), factors(2, 4)
        leaves = [factor.requires_grad_() for factor in (*ins, *outs)]
        leaves += [torch.ones(200, 16, dtype=torch.bfloat16, requires_grad=True)]
        bias = torch.ones(8, dtype=torch.bfloat16, requires_grad=True) if biased else None
        leaves += [] if bias is None else [bias]
        route = LinearRoute((2,), (2,), by="triton")
        layer_map = LinearMap(LinearPlan(route, route, keep), 2)
        with (
            counted(computing=False) as launches,
            mock.patch.object(fused_linear, "has_warpgroups", return_value=warpgroups),
        ):
            y = Call(layer_map, 0).run(leaves[4], (leaves[:4],), bias, None)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        names[warpgroups] = [name for name in launches.names if name != "ones_like"]
    assert len(names[True]) == len(names[False]) - 1 == MOST_LINEAR - 1 + (keep == "x"), names
    assert "outer_kernel" in names[True]
    assert "khatri_rao_and_sums_kernel" not in names[True]


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_a_linear_step_of_which_some_gradients_are_wanted(needs: tuple[bool, bool, bool]) -> None:
    for rows in ROWS:
        names = linear_launches(rows, "x and z", biased=True, needs=needs)
        assert len(names) <= MOST_LINEAR, names


def embedding_launches(modes: tuple[int, ...], keep: str, count: int) -> list[str]:
    ins, outs = factors(*modes), factors(3, 4)
    leaves = [factor.requires_grad_() for factor in (*ins, *outs)]
    route = LinearRoute((1,) * len(modes), (2,), by="triton")
    layer_map = EmbeddingMap(LinearPlan(route, route, keep), len(modes), 3)  # type: ignore[arg-type]
    indices = torch.zeros(count, dtype=torch.int64)
    with counted(computing=False) as launches:
        y = Call(layer_map, 0).run(indices, (leaves,), None, None)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    return [name for name in launches.names if name != "ones_like"]


@pytest.mark.parametrize("modes", [(5,), (5, 6), (1, 5, 6), (MOST_SCATTERED_ROWS, 2)])
@pytest.mark.parametrize("count", [1, 40, MOST_SCATTERED_ROWS + 1])
def test_an_embeddings_step(modes: tuple[int, ...], count: int) -> None:
    """Y; Z and KC, G, two for the in factors, dKC, the out factors."""
    for keep in ("x", "x and z"):
        names = embedding_launches(modes, keep, count)
        assert len(names) == 7 <= MOST_EMBEDDING, names
