"""Layers: what they print, the dense weight they stand for, and how they begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import few_cases
from cases.protocol import Case
from compare import assert_close
from polyadic.init import cp_orthonormal_, mup_std, torch_std
from polyadic.nn import CPConv1d, CPConv2d, CPConv3d, CPLinear

SEEDS = 100
# How far the mean over SEEDS may lie from torch's, and the largest standard error that allows it.
TOLERANCE, STANDARD_ERROR = 0.03, 0.01

Make = Callable[[], nn.Module]
VARIANCES: list[Any] = [
    pytest.param(
        partial(CPLinear, 192, 96, **kwargs), partial(nn.Linear, 192, 96), (384, 192), id=name
    )
    for name, kwargs in {
        "linear-order1-rank1": {"rank": 1, "order": 1},
        "linear-order2-rank7": {"rank": 7, "order": 2},
        "linear-order3-rank40": {"rank": 40},
        "linear-order4-rank200": {"rank": 200, "order": 4},
        "linear-break-even": {"rank": "break-even"},
        "linear-size1": {"rank": 13, "in_shape": (1, 192, 1), "out_shape": (8, 12)},
    }.items()
] + [
    pytest.param(
        lambda: CPLinear(192, 96, rank=40, dtype=torch.complex64),
        lambda: nn.Linear(192, 96, dtype=torch.complex64),
        (384, 192),
        id="linear-complex",
    ),
    pytest.param(
        lambda: CPConv1d(12, 20, 5, rank=9),
        lambda: nn.Conv1d(12, 20, 5),
        (24, 12, 60),
        id="conv1d",
    ),
    pytest.param(
        lambda: CPConv2d(16, 24, 3, rank=20),
        lambda: nn.Conv2d(16, 24, 3),
        (8, 16, 14, 14),
        id="conv2d",
    ),
    pytest.param(
        lambda: CPConv2d(16, 24, (5, 3), rank=3, order=3),
        lambda: nn.Conv2d(16, 24, (5, 3)),
        (16, 16, 14, 14),
        id="conv2d-order3-rank3",
    ),
    pytest.param(
        lambda: CPConv2d(16, 24, 1, rank=200),
        lambda: nn.Conv2d(16, 24, 1),
        (16, 16, 10, 10),
        id="conv2d-1x1-rank200",
    ),
    pytest.param(
        lambda: CPConv3d(8, 12, (2, 3, 2), rank=11),
        lambda: nn.Conv3d(8, 12, (2, 3, 2)),
        (6, 8, 7, 7, 7),
        id="conv3d",
    ),
]


def output_variances(make: Make, shape: tuple[int, ...]) -> Tensor:
    """Mean square of the output for standard normal inputs, one number for each seed."""
    values = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        layer = make()
        x = torch.randn(shape, dtype=next(layer.parameters()).dtype)
        with torch.no_grad():
            values.append(layer(x).abs().square().mean())
    return torch.stack(values)


@pytest.mark.parametrize(("make", "torch_make", "shape"), VARIANCES)
def test_output_variance_is_that_of_torch(
    make: Make, torch_make: Make, shape: tuple[int, ...]
) -> None:
    ours, theirs = output_variances(make, shape), output_variances(torch_make, shape)
    error = (ours.std() / ours.mean()).hypot(theirs.std() / theirs.mean()) / math.sqrt(SEEDS)
    assert error <= STANDARD_ERROR, f"the test is too coarse: standard error {error:.4f}"
    ratio = ours.mean() / theirs.mean()
    assert abs(ratio - 1) <= TOLERANCE, f"{ratio:.4f} ± {error:.4f} of torch's variance"


def test_the_variance_test_can_fail() -> None:
    """A layer drawn 3% too wide (6% in variance) is noticed."""

    def wide() -> nn.Module:
        layer = CPLinear(192, 96, rank=40)
        layer.cp.reset_parameters(1.03 * torch_std(192))
        return layer

    with pytest.raises(AssertionError, match="of torch's variance"):
        test_output_variance_is_that_of_torch(wide, lambda: nn.Linear(192, 96), (256, 192))


@pytest.mark.parametrize(
    ("std", "dtype"), [(1.0, torch.float64), (0.02, torch.float64), (0.3, torch.complex128)]
)
@pytest.mark.parametrize("sizes", [(6,), (4, 5), (1, 7, 3), (2, 3, 2, 5)])
def test_orthonormal_columns(sizes: tuple[int, ...], std: float, dtype: torch.dtype) -> None:
    """Blocks of m orthogonal columns, and factors of one scale; the tensor has the wanted std."""
    rank = 11
    scale = (std / math.sqrt(rank)) ** (1 / len(sizes))
    squares = []
    for _ in range(300):
        factors = [torch.empty(m, rank, dtype=dtype) for m in sizes]
        cp_orthonormal_(factors, std)
        for m, factor in zip(sizes, factors, strict=True):
            for start in range(0, rank, m):
                block = factor[:, start : start + m]
                gram = scale**2 * m * torch.eye(block.shape[1], dtype=dtype)
                assert_close(block.mH @ block, gram, "Gram matrix of a block", 1e-12)
        weight = factors[0]
        for factor in factors[1:]:
            weight = torch.einsum("ir,ar->iar", weight, factor).flatten(0, 1)
        squares.append(weight.sum(1).abs().square().mean())
    values = torch.stack(squares)
    error = values.std() / math.sqrt(len(squares))
    assert abs(values.mean() - std**2) <= 4 * error + 1e-12


@pytest.mark.parametrize(
    ("size", "rank", "width"),
    [(300, 11, 11), (256, 256, 256), (300, 600, 64), (257, 257, 64), (100, 700, 64), (7, 12000, 7)],
)
def test_blocks_of_large_factors(size: int, rank: int, width: int) -> None:
    """Orthonormal within blocks of the width that is told; every column of norm √m; mean 0."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        factor = torch.empty(size, rank, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            cp_orthonormal_([factor], math.sqrt(rank))
        columns = factor.double()
        for block in columns.split(width, 1):
            gram = size * torch.eye(block.shape[1], dtype=torch.float64)
            assert_close(block.t() @ block, gram, "Gram matrix of a block", tolerance)
        # Of independent columns the mean entry has the standard deviation 1/√(m R) at most.
        assert abs(columns.mean()) <= 5 / math.sqrt(size * rank)
        assert abs((columns**3).mean()) <= 5 * math.sqrt(15 / (size * rank))


def test_complex_entries_are_centred_and_circular() -> None:
    """E[W] = E[W²] = 0 and E|W|² = 2 / (3 fan_in), each part drawn as a real weight is."""
    make = partial(CPLinear, 24, 30, rank=8, dtype=torch.complex128)
    weights = torch.stack([make().weight.detach() for _ in range(200)])
    assert abs(weights.abs().square().mean() * 1.5 * 24 - 1) <= 0.02
    size = weights.numel()
    assert abs(weights.mean()) <= 4 * weights.abs().std() / math.sqrt(size)
    assert abs(weights.square().mean()) <= 5 * weights.abs().square().mean() / math.sqrt(size / 100)
    assert weights.real.std().item() == pytest.approx(weights.imag.std().item(), rel=0.02)


def test_a_layer_made_complex_is_drawn_as_a_complex_one() -> None:
    """Whoever resets it, the layer itself or each of its parts."""
    layer = CPLinear(24, 30, rank=8).to(torch.complex64)
    assert layer.cp.std == pytest.approx(math.sqrt(2) * torch_std(24))
    for reset in (layer.reset_parameters, layer.cp.factors.reset_parameters):
        reset()
        norms = [float(f.detach().abs().square().mean()) for f in layer.cp.factors]
        assert math.prod(norms) * 8 == pytest.approx(2 / (3 * 24), rel=1e-4)


def test_entries_are_centred() -> None:
    """Mean 0, of factors and of the weight they stand for, within four standard errors."""
    weights = torch.stack([CPLinear(24, 30, rank=8).weight.detach() for _ in range(200)])
    error = weights.std() / math.sqrt(weights.numel())
    assert abs(weights.mean()) <= 4 * error
    assert abs(weights.std() * math.sqrt(3 * 24) - 1) <= 0.02


def test_bias_is_drawn_as_torch_draws_it() -> None:
    for layer, fan_in in ((CPLinear(50, 4000, rank=3), 50), (CPConv2d(5, 4000, 3, rank=3), 45)):
        bound = 1 / math.sqrt(fan_in)
        assert layer.bias is not None
        assert layer.bias.abs().max() <= bound
        assert layer.bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_mup_std() -> None:
    assert mup_std(100, 400) == pytest.approx(0.1)
    assert mup_std(400, 100) == pytest.approx(0.025)


@few_cases
@pytest.mark.parametrize("value", [torch.zeros(2), nn.Parameter(torch.zeros(2)), None])
def test_weight_is_read_only(case: Case, value: Any) -> None:
    layer = case.make()
    before = layer.weight.clone()
    with pytest.raises(TypeError, match=r"weight of a CP\w+ cannot be set"):
        layer.weight = value
    assert torch.equal(layer.weight, before)
    assert "weight" not in layer.state_dict()


def test_rank_and_factors_are_read_only() -> None:
    layer = CPConv2d(8, 12, 3, rank=5)
    assert layer.rank == 5
    assert [tuple(f.shape) for f in layer.out_factors] == [(3, 5), (4, 5)]
    assert [tuple(f.shape) for f in layer.in_factors] == [(2, 5), (4, 5)]
    assert [tuple(f.shape) for f in layer.kernel_factors] == [(3, 5), (3, 5)]
    for name in ("rank", "in_factors", "out_factors", "kernel_factors"):
        with pytest.raises(AttributeError):
            setattr(layer, name, 3)


def test_extra_repr_of_linear() -> None:
    """The notebook's layer: 4000 parameters instead of 32768, 8.2 times fewer."""
    text = repr(CPLinear(256, 128, rank=100))
    assert text.startswith("CPLinear(")
    for fact in (
        "in_features=256",
        "out_features=128",
        "bias=True",
        "in_shape=(4, 4, 16)",
        "out_shape=(4, 4, 8)",
        "rank=100",
        "parameters=4000 of 32768 (8.2x fewer)",
    ):
        assert fact in text, text
    assert "bias=False" in repr(CPLinear(256, 128, bias=False, rank=100))


def test_extra_repr_of_conv() -> None:
    text = repr(CPConv2d(16, 32, 3, stride=2, padding="valid", dilation=(1, 2), rank=100))
    assert text.startswith("CPConv2d(")
    for fact in (
        "16, 32",
        "kernel_size=(3, 3)",
        "stride=(2, 2)",
        "padding='valid'",
        "dilation=(1, 2)",
        "bias=True",
        "out_shape=(4, 8)",
        "in_shape=(4, 4)",
        "rank=100",
        "parameters=2600 of 4608 (1.8x fewer)",
    ):
        assert fact in text, text


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (CPLinear(12, 20, rank=3), nn.Linear(12, 20), (5, 12)),
        (CPConv1d(4, 6, 3, 2, 1, rank=3), nn.Conv1d(4, 6, 3, 2, 1), (2, 4, 9)),
        (CPConv2d(4, 6, 3, 2, 1, 2, rank=3), nn.Conv2d(4, 6, 3, 2, 1, 2), (2, 4, 9, 8)),
        (CPConv3d(4, 6, (2, 3, 1), rank=3), nn.Conv3d(4, 6, (2, 3, 1)), (2, 4, 5, 6, 7)),
    ],
)
def test_positional_arguments_are_those_of_torch(
    ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...]
) -> None:
    """Same meaning in the same place, same shapes and attributes."""
    assert ours(torch.randn(shape)).shape == theirs(torch.randn(shape)).shape
    assert ours.weight.shape == theirs.weight.shape
    assert ours.bias.shape == theirs.bias.shape
    for name in (
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
    ):
        if hasattr(theirs, name):
            assert getattr(ours, name) == getattr(theirs, name), name
