"""Tensorized shapes, rank resolution and parameter counts."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CASES, over
from cases.protocol import Case
from polyadic import CPTensor, tensorize
from polyadic.formats import ConvFormat, LinearFormat, resolve_rank
from polyadic.nn import CPConv2d, CPLinear

SIZES = [*range(1, 65), 96, 97, 100, 128, 243, 256, 384, 500, 512, 768, 1000, 1024, 3072, 4096]


@pytest.mark.parametrize(
    ("sizes", "order", "expected"),
    [
        ((256, 128), 3, ((4, 4, 16), (4, 4, 8))),
        ((32, 16), 2, ((4, 8), (4, 4))),
        ((7, 12), 3, ((1, 1, 7), (2, 2, 3))),
        ((1, 1), 1, ((1,), (1,))),
        ((1, 1), 4, ((1, 1, 1, 1), (1, 1, 1, 1))),
        ((97, 101), 2, ((1, 97), (1, 101))),
        ((30, 30), 3, ((2, 3, 5), (2, 3, 5))),
        ((768, 768), 1, ((768,), (768,))),
    ],
)
def test_tensorize_by_example(
    sizes: tuple[int, int], order: int, expected: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    assert tensorize(*sizes, order=order) == expected


def test_order_3_is_the_default() -> None:
    assert tensorize(256, 128) == tensorize(256, 128, order=3)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_tensorize_is_that_of_tltorch(order: int) -> None:
    """Wherever tltorch finds ``order`` integers for both sides."""
    utils = pytest.importorskip("tltorch").utils
    compared = 0
    for pair in itertools.product(SIZES, SIZES):
        theirs = utils.get_tensorized_shape(*pair, order=order, verbose=False)
        if all(isinstance(g, tuple) and len(g) == order for g in theirs):
            assert tensorize(*pair, order=order) == theirs, pair
            compared += 1
    assert compared > len(SIZES)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 6))
def test_tensorize_laws(in_features: int, out_features: int, order: int) -> None:
    shapes = tensorize(in_features, out_features, order)
    for shape, features in zip(shapes, (in_features, out_features), strict=True):
        assert math.prod(shape) == features
        assert len(shape) == order
        assert all(type(mode) is int and mode >= 1 for mode in shape)
        assert list(shape) == sorted(shape)


NOTEBOOK_LINEAR = LinearFormat((4, 4, 16), (4, 4, 8), 100)
NOTEBOOK_CONV = ConvFormat((4, 8), (4, 4), (3, 3), 100)


def test_parameter_counts_of_the_notebooks() -> None:
    assert (NOTEBOOK_LINEAR.parameters, NOTEBOOK_LINEAR.dense_parameters) == (4000, 32768)
    assert (NOTEBOOK_CONV.parameters, NOTEBOOK_CONV.dense_parameters) == (2600, 4608)


@over(
    lambda case: len(case.leaves().factors) == len(case.modes) and case.kind.from_dense is not None
)
def test_parameter_counts(case: Case) -> None:
    """The format's count is what the tensor owns, and the dense one what its matrix has."""
    unit = case.build().format
    factors = CPTensor(case.tensorized_shape, case.rank).factors
    assert unit.parameters == sum(factor.numel() for factor in factors)
    assert unit.dense_parameters == case.weight(case.leaves()).numel()


FORMATS = [
    LinearFormat((4, 4, 16), (4, 4, 8), 1),
    LinearFormat((7,), (5,), 1),
    LinearFormat((1,), (1,), 1),
    LinearFormat((64, 64), (64, 64), 1),
    ConvFormat((4, 8), (4, 4), (3, 3), 1),
    ConvFormat((3,), (2,), (1, 1), 1),
    ConvFormat((8, 8), (8, 8), (5,), 1),
    ConvFormat((8,), (8,), (3, 3, 3), 1),
]


@pytest.mark.parametrize("unit", FORMATS, ids=str)
def test_integer_ranks_are_taken_as_they_are(unit: LinearFormat | ConvFormat) -> None:
    for rank in (1, 2, 17, 4096):
        assert resolve_rank(rank, unit) == rank


@pytest.mark.parametrize("unit", FORMATS, ids=str)
@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.1, 0.25, 1 / 3, 0.5, 0.999, 1.0])
def test_a_fraction_is_of_dense_parameters(
    unit: LinearFormat | ConvFormat, fraction: float
) -> None:
    """The largest rank with at most this fraction of them, at least 1."""
    rank = resolve_rank(fraction, unit)
    assert type(rank) is int
    assert rank == 1 or rank * unit.parameters <= fraction * unit.dense_parameters
    assert (rank + 1) * unit.parameters > fraction * unit.dense_parameters


@pytest.mark.parametrize("unit", [f for f in FORMATS if isinstance(f, LinearFormat)], ids=str)
def test_break_even_of_linear(unit: LinearFormat) -> None:
    """The largest R with R·(M+N) ≤ M·N, at least 1."""
    m, n, rank = unit.in_features, unit.out_features, unit.break_even_rank
    assert rank == 1 or rank * (m + n) <= m * n
    assert (rank + 1) * (m + n) > m * n


@pytest.mark.parametrize(
    ("unit", "taps"),
    [
        # 3×3 in two stages is 3 + 3 multiply-adds, 5 in one dimension 5, 1×1 none at all.
        (FORMATS[4], 6),
        (FORMATS[5], 0),
        (FORMATS[6], 5),
        (FORMATS[7], 9),
        (ConvFormat((2,), (2,), (2, 2), 1), 4),
        (ConvFormat((2,), (2,), (1, 3), 1), 3),
    ],
    ids=str,
)
def test_break_even_of_conv(unit: ConvFormat, taps: int) -> None:
    """The largest R with R·(Cin + taps + Cout) ≤ Cin·Cout·Πk, at least 1."""
    dense, rank = unit.dense_parameters, unit.break_even_rank
    per_rank = unit.in_channels + taps + unit.out_channels
    assert rank == 1 or rank * per_rank <= dense
    assert (rank + 1) * per_rank > dense


def test_layers_resolve_their_rank() -> None:
    linear = CPLinear(256, 128, rank="break-even")
    assert linear.rank == 256 * 128 // (256 + 128) == 85
    assert CPLinear(256, 128, rank=4000 / 32768).rank == 100
    assert CPLinear(256, 128, rank=1000, order=1).rank == 1000
    assert CPConv2d(16, 32, 3, rank=2600 / 4608).rank == 100


def test_shapes_given_by_hand_are_kept() -> None:
    layer = CPLinear(12, 30, rank=2, in_shape=[3, 4], out_shape=(5, 6, 1))
    assert (layer.in_shape, layer.out_shape) == ((3, 4), (5, 6, 1))
    assert [tuple(f.shape) for f in layer.cp.factors] == [(3, 2), (4, 2), (5, 2), (6, 2), (1, 2)]
    assert layer.cp.tensorized_shape == ((3, 4), (5, 6, 1))
    conv = CPConv2d(6, 8, (3, 1), rank=2, out_shape=(2, 2, 2))
    assert conv.cp.tensorized_shape == ((2, 2, 2), (2, 3), (3, 1))


def test_formats_are_keys() -> None:
    assert len({LinearFormat((2,), (3,), 4), LinearFormat((2,), (3,), 4)}) == 1
    assert len({c.tensorized_shape for c in CASES}) > 40
