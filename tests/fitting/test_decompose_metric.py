"""Fits in the metric of the inputs, against brute force on dense matrices."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from cases.weights import by_einsum
from polyadic import CPTensor, Decomposition, decompose
from polyadic.fitting.problem import make_problem
from polyadic.fitting.starts import random_factors
from polyadic.fitting.sweep import Sweeper

METRIC = sys.modules["polyadic.fitting.metric"]


def moment(size: int, rows: int = 50, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=draw, dtype=dtype)
    x = torch.randn(rows, size, generator=draw, dtype=dtype) @ mix
    return x.mH @ x / rows


def dense(cp: CPTensor) -> Tensor:
    return by_einsum([f.detach().double() for f in cp.factors])


def output_error(found: Decomposition, weight: Tensor, sigma: Tensor) -> float:
    """Of a linear layer, without the damping."""
    difference = weight.double() - dense(found.cp).reshape(weight.shape)
    squared = torch.trace(difference.t() @ sigma @ difference)
    return math.sqrt(float(squared / torch.trace(weight.double().t() @ sigma @ weight.double())))


# Inner sizes of the left and the right side, and how many unknowns are solved for directly.
CASES = [
    pytest.param(((3, 4), (2, 5)), 3, 10**6, id="direct"),
    pytest.param(((2, 3, 2), (5,)), 4, 10**6, id="three-modes"),
    pytest.param(((7,), (3, 2)), 4, 10**6, id="one-mode"),
    pytest.param(((3, 4), (2, 5)), 3, 0, id="iterated"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("kind", ["frobenius", "dense", "diagonal"])
@pytest.mark.parametrize(("shape", "rank", "direct"), CASES)
def test_an_update_is_the_dense_least_squares_solution(
    shape: Any,
    rank: int,
    direct: int,
    kind: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every factor in turn, against lstsq on the whole design matrix with the penalty's rows."""
    monkeypatch.setattr(METRIC, "DIRECT_UNKNOWNS", direct)
    monkeypatch.setattr(METRIC, "CG_STEPS", 200)
    size, tau = math.prod(shape[0]), 0.05
    full = moment(size, dtype=dtype)
    sigma = {"frobenius": None, "dense": full, "diagonal": full.diagonal().real}[kind]
    weight = torch.randn(size, math.prod(shape[1]), dtype=dtype)
    problem = make_problem(weight, shape, sigma, (0,), 1e-3)
    draw = torch.Generator().manual_seed(1)
    sweeper = Sweeper(problem, random_factors(problem, rank, draw))
    used = torch.eye(len(problem.matrix), dtype=dtype)
    if sigma is not None:
        full = torch.diag(sigma) if kind == "diagonal" else sigma
        used = full / full.diagonal().mean() + 1e-3 * used
    lower = torch.linalg.cholesky(used)
    factors = [f.clone() for f in sweeper.factors]
    for d in range(len(factors)):
        factors[d] = solved(factors, d, lower, problem.matrix, tau)
    sweeper.sweep(tau)
    mine = torch.einsum(*einsum_arguments(sweeper.factors))
    torch.testing.assert_close(mine, torch.einsum(*einsum_arguments(factors)), rtol=0, atol=1e-7)


def einsum_arguments(factors: list[Tensor]) -> list[Any]:
    letters = "abcdefgh"[: len(factors)]
    return [",".join(f"{x}r" for x in letters) + f"->{letters}", *factors]


def solved(factors: list[Tensor], d: int, lower: Tensor, matrix: Tensor, tau: float) -> Tensor:
    """One factor by ``lstsq``: a column of the design matrix for each of its entries."""
    columns, penalties = [], []
    for entry in range(factors[d].numel()):
        unit = torch.zeros_like(factors[d]).flatten()
        unit[entry] = 1
        own = [*factors[:d], unit.view_as(factors[d]), *factors[d + 1 :]]
        column = torch.einsum(*einsum_arguments(own)).reshape(matrix.shape)
        columns.append((lower.mH @ column).flatten())
        penalties.append((math.sqrt(tau) * column.norm()).to(matrix.dtype))
    design = torch.cat([torch.stack(columns, 1), torch.diag(torch.stack(penalties))])
    target = torch.cat([(lower.mH @ matrix).flatten(), matrix.new_zeros(len(penalties))])
    return torch.linalg.lstsq(design, target.unsqueeze(1)).solution.view_as(factors[d])


@pytest.mark.parametrize(("m", "n"), [(9, 14), (14, 9)])
@pytest.mark.parametrize("rows", [50, 5])
def test_two_modes_give_the_weighted_svd(m: int, n: int, rows: int) -> None:
    """The optimum, singular moments too: the smallest error that any rank has."""
    weight, sigma = torch.randn(m, n, dtype=torch.float64), moment(m, rows)
    damped = sigma / sigma.diagonal().mean() + 1e-3 * torch.eye(m, dtype=torch.float64)
    values = torch.linalg.svdvals(torch.linalg.cholesky(damped).t() @ weight)
    for rank in (1, 4, min(m, n)):
        found = decompose(weight, ((m,), (n,)), rank, metric=sigma)
        expected = float(values[rank:].norm() / values.norm())
        assert found.error == pytest.approx(expected, abs=1e-9)


def test_diagonal_is_the_diagonal_matrix() -> None:
    weight, frequencies = torch.randn(12, 10, dtype=torch.float64), torch.rand(12).double()
    for shape in (((12,), (10,)), ((3, 4), (2, 5))):
        a, b = (
            # One start: which of several wins a race may be a matter of the last bit.
            decompose(weight, shape, 4, metric=m, start="random", iterations=10, tolerance=0)
            for m in (frequencies, torch.diag(frequencies))
        )
        assert a.error == pytest.approx(b.error, rel=1e-6)
        torch.testing.assert_close(dense(a.cp), dense(b.cp), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direct", [10**6, 0], ids=["direct", "iterated"])
def test_the_metric_lowers_the_error_of_the_outputs(
    direct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METRIC, "DIRECT_UNKNOWNS", direct)
    weight, sigma, shape = torch.randn(24, 20), moment(24), ((4, 6), (4, 5))
    plain = decompose(weight, shape, 10)
    aware = decompose(weight, shape, 10, metric=sigma)
    assert output_error(aware, weight, sigma) < 0.8 * output_error(plain, weight, sigma)
    assert aware.error == pytest.approx(output_error(aware, weight, sigma), rel=0.01)
    assert aware.frobenius_error > plain.frobenius_error
    steps = torch.tensor(aware.history).diff()
    assert float(steps.max()) < 1e-3


def test_identity_is_the_frobenius_norm() -> None:
    weight, shape = torch.randn(24, 20, dtype=torch.float64), ((4, 6), (4, 5))
    plain = decompose(weight, shape, 6, start="orthogonal", iterations=40, tolerance=0)
    aware = decompose(
        weight, shape, 6, metric=3 * torch.eye(24), start="orthogonal", iterations=40, tolerance=0
    )
    assert aware.error == pytest.approx(plain.error, rel=1e-3)
    assert aware.error == pytest.approx(aware.frobenius_error, rel=1e-6)


def test_convolution_groups_and_order_of_the_metric() -> None:
    """(out, in, kernel) with the metric over in x kernel, as weight.flatten(1) has them."""
    weight, sigma = torch.randn(10, 6, 3, 2, dtype=torch.float64), moment(36)
    shape = ((2, 5), (2, 3), (3, 2))
    how: dict[str, Any] = {"metric": sigma, "start": "random", "iterations": 20}
    found = decompose(weight, shape, 9, metric_groups=(1, 2), **how)
    as_linear = decompose(weight.flatten(1).t(), ((2, 3, 3, 2), (2, 5)), 9, **how)
    assert found.error == pytest.approx(as_linear.error, rel=1e-6)
    difference = (weight - dense(found.cp).reshape(weight.shape)).flatten(1).t()
    damped = sigma / sigma.diagonal().mean() + 1e-3 * torch.eye(36, dtype=torch.float64)
    matrix = weight.flatten(1).t()
    squared = torch.trace(difference.t() @ damped @ difference)
    squared = squared / torch.trace(matrix.t() @ damped @ matrix)
    assert found.error == pytest.approx(math.sqrt(float(squared)), rel=1e-9)


def test_rows_of_weight_zero_are_free() -> None:
    """A vocabulary padded with rows that never occur: the others are fitted as if alone."""
    table = torch.randn(12, 10)
    padded = torch.cat([table, 100 * torch.randn(4, 10)])
    seen = torch.cat([torch.ones(12), torch.zeros(4)])
    found = decompose(padded, ((4, 4), (2, 5)), 8, metric=seen, damping=1e-9)
    rows = dense(found.cp).reshape(16, 10)[:12]
    blind = decompose(padded, ((4, 4), (2, 5)), 8)
    blind_rows = dense(blind.cp).reshape(16, 10)[:12]
    assert float((rows - table).norm()) < 0.7 * float((blind_rows - table).norm())


def test_singular_moments_and_float32() -> None:
    weight, sigma = torch.randn(24, 20), moment(24, rows=7).float()
    found = decompose(weight, ((4, 6), (4, 5)), 20, metric=sigma, iterations=60)
    plain = decompose(weight, ((4, 6), (4, 5)), 20, iterations=60)
    wide = sigma.double()
    assert output_error(found, weight, wide) < 0.5 * output_error(plain, weight, wide)
