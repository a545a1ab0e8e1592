"""``decompose``: exact where the rank suffices, recovers what was planted, stays bounded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cases.weights import by_einsum
from polyadic import CPTensor, DecomposeInterrupted, Decomposition, decompose
from polyadic.fitting import search
from polyadic.fitting.problem import wide
from polyadic.nn import CPEmbedding

SHAPES = [
    ((4, 5), (3, 6)),
    ((2, 3, 4), (5, 2)),
    ((7,), (2, 3), (3, 3)),
    ((1, 6), (5, 1), (2,)),
    ((3, 1, 4), (2, 1)),
    ((1, 1), (1,)),
    ((5,),),
]


numbers = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.complex128], ids=["real", "complex"]
)


def dense(cp: CPTensor) -> Tensor:
    """The weight by one einsum in float64, not by the library's own products."""
    return by_einsum([wide(f.detach()) for f in cp.factors]).reshape(cp.shape)


def relative(found: Decomposition, weight: Tensor) -> float:
    """Frobenius error by the dense tensor."""
    reference = wide(weight).reshape(found.cp.shape)
    return float((dense(found.cp) - reference).norm() / reference.norm())


def planted(shape: Any, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A weight with a CP of Gaussian factors."""
    draw = torch.Generator().manual_seed(seed)
    modes = [mode for group in shape for mode in group]
    factors = [torch.randn(m, rank, generator=draw, dtype=dtype) for m in modes]
    return dense(CPTensor.from_factors(shape, factors))


def border() -> Tensor:
    """a⊗a⊗b + a⊗b⊗a + b⊗a⊗a: of rank 3, but approached by rank 2 without end."""
    a, b = torch.eye(2, dtype=torch.float64)
    return sum(torch.einsum("i,j,k->ijk", *v) for v in ((a, a, b), (a, b, a), (b, a, a)))


@numbers
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_where_the_rank_suffices(shape: Any, dtype: torch.dtype) -> None:
    """Any tensor has an exact CP with the product of all modes but the largest components."""
    modes = [mode for group in shape for mode in group]
    weight = torch.randn(modes, dtype=dtype)
    for more in (0, 1, 4):
        found = decompose(weight, shape, math.prod(modes) // max(modes) + more)
        assert relative(found, weight) < 1e-10
        assert found.converged
        assert found.error < 1e-10


@numbers
@pytest.mark.parametrize(("m", "n"), [(9, 14), (14, 9), (8, 8)])
def test_two_modes_give_the_truncated_svd(m: int, n: int, dtype: torch.dtype) -> None:
    weight = torch.randn(m, n, dtype=dtype)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, min(m, n) + 3):
        found = decompose(weight, ((m,), (n,)), rank)
        expected = float(values[rank:].norm() / values.norm())
        assert relative(found, weight) == pytest.approx(expected, abs=1e-10)
        norms = torch.stack([f.detach().norm(dim=0) for f in found.cp.factors])[:, : min(m, n)]
        torch.testing.assert_close(norms[0][:rank], norms[1][:rank])


def test_exact_by_rank_deficiency() -> None:
    """Fewer components than the bound, where the weight needs fewer."""
    weight = torch.kron(torch.randn(4, 3).double(), torch.randn(5, 2).double())
    by_pairs = weight.view(4, 5, 3, 2).permute(0, 2, 1, 3)
    found = decompose(by_pairs.reshape(12, 10), ((4, 3), (5, 2)), 6)
    assert relative(found, by_pairs) < 1e-10
    assert found.iterations == 0


@pytest.mark.parametrize("shape", [((6, 7), (5, 8)), ((4, 3), (5,), (3, 2))], ids=str)
@pytest.mark.parametrize("start", ["auto", "random"])
@numbers
def test_a_planted_tensor_is_recovered(shape: Any, start: str, dtype: torch.dtype) -> None:
    weight = planted(shape, 5, dtype=dtype)
    found = decompose(weight, shape, 5, start=start, iterations=400, tolerance=1e-6)
    assert relative(found, weight) < 1e-6
    assert found.error == pytest.approx(relative(found, weight), rel=1e-3)


@numbers
def test_the_error_falls_and_is_the_true_one(dtype: torch.dtype) -> None:
    single = torch.complex64 if dtype.is_complex else torch.float32
    for seed, start in ((0, "orthogonal"), (1, "random")):
        draw = torch.Generator().manual_seed(seed)
        weight = torch.randn(12, 20, generator=draw, dtype=single).to(dtype)
        found = decompose(weight, ((3, 4), (4, 5)), 9, start=start, tolerance=0, iterations=60)
        steps = torch.tensor(found.history).diff()
        # The objective falls; the error itself may give way to smaller components a little.
        assert float(steps.max()) < 1e-4
        assert found.history[-1] == pytest.approx(relative(found, weight), rel=1e-9)
        assert len(found.history) == found.iterations == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [4, 8])
def test_the_error_is_that_of_the_tensor_returned(rank: int, dtype: torch.dtype) -> None:
    """Not of a residual rounded to the fit's dtype, nor of factors before they were rounded.

    A planted tensor is found to the last digits, so that the error is made of roundings alone.
    """
    for seed in range(2):
        weight = planted(((6, 7), (5, 8)), 4, seed).to(dtype)
        found = decompose(weight, ((6, 7), (5, 8)), rank, start="orthogonal", iterations=60)
        assert found.error == pytest.approx(relative(found, weight), rel=1e-6)
        assert found.frobenius_error == pytest.approx(found.error, rel=1e-12)


def test_border_rank_stays_bounded() -> None:
    """Two components cannot reach the infimum; without bounds they would grow for ever."""
    modes = ((2,), (2,), (2,))
    found = decompose(border(), modes, 2, iterations=500, tolerance=0)
    assert found.growth < 30
    held = decompose(border(), modes, 2, iterations=500, tolerance=0, max_growth=2.5)
    assert held.growth <= 2.5
    assert held.error > found.error
    assert held.regularization > found.regularization
    squares = torch.stack([f.detach().square().sum(0) for f in held.cp.factors]).prod(0).sum()
    assert held.growth == pytest.approx(math.sqrt(float(squares)) / float(border().norm()))


@numbers
def test_fragility_is_that_of_the_dense_components(dtype: torch.dtype) -> None:
    shape, rank = ((3, 4), (5, 2)), 6
    weight = torch.randn(12, 10, dtype=dtype)
    found = decompose(weight, shape, rank, iterations=5)
    factors = [f.detach() for f in found.cp.factors]
    components = torch.einsum("ar,br,cr,dr->rabcd", *factors).reshape(rank, -1)
    norms = components.norm(dim=1)
    cosines = (components @ components.mH / norms.outer(norms)).abs().fill_diagonal_(0)
    assert found.congruence == pytest.approx(float(cosines.max()))
    mean = math.sqrt(float(cosines.square().sum()) / (rank * (rank - 1)))
    assert found.mean_congruence == pytest.approx(mean)
    assert found.growth == pytest.approx(float(norms.norm() / weight.norm()))
    jacobian = torch.autograd.functional.jacobian(
        lambda *f: torch.einsum("ar,br,cr,dr->abcd", *f).real, tuple(factors)
    )
    total = sum(float(part.abs().square().sum()) for part in jacobian)
    assert found.sensitivity == pytest.approx(total / float(weight.abs().square().sum()))


def test_a_fit_goes_on_from_another() -> None:
    weight = torch.randn(24, 30)
    shape = ((4, 6), (5, 6))
    first = decompose(weight, shape, 8, iterations=10, tolerance=0)
    again = decompose(weight, shape, 8, start=first, iterations=30, tolerance=0)
    assert again.history[0] <= first.error + 1e-4
    assert again.error < first.error
    scaled = CPTensor.from_factors(shape, list(first.cp.factors), torch.full((8,), 2.0))
    doubled = decompose(2 * weight, shape, 8, start=scaled, iterations=1)
    assert doubled.history[0] == pytest.approx(again.history[0], rel=1e-4)


def test_a_start_of_another_rank() -> None:
    """Filled up from the residual, or cut to the largest components."""
    weight = torch.randn(24, 30, dtype=torch.float64)
    shape = ((4, 6), (5, 6))
    small = decompose(weight, shape, 8)
    larger = decompose(weight, shape, 12, start=small, iterations=1)
    assert larger.error < small.error
    smaller = decompose(weight, shape, 5, start=small, iterations=60)
    assert smaller.cp.rank == 5
    assert smaller.error > small.error


@pytest.mark.parametrize("start", ["auto", "random", ("random", "random", "orthogonal")])
def test_the_same_seed_gives_the_same_bits(start: Any) -> None:
    weight, shape = torch.randn(24, 30), ((4, 6), (5, 6))
    state = torch.get_rng_state()
    a, b = (decompose(weight, shape, 9, start=start, seed=3, iterations=20) for _ in range(2))
    for x, y in zip(a.cp.factors, b.cp.factors, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(state, torch.get_rng_state())
    other = decompose(weight, shape, 9, start="random", seed=4, iterations=20)
    assert not torch.equal(a.cp.factors[0], other.cp.factors[0])
    assert len(a.raced) == {"auto": 2, "random": 0}.get(str(start), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_weights_dtype_and_layout(dtype: torch.dtype) -> None:
    """Half precisions are fitted in float32; transposed and gradient-carrying weights are taken."""
    weight = torch.nn.Parameter(torch.randn(30, 24).to(dtype))
    # Not a race, whose winner rounding may decide.
    found = decompose(weight.t(), ((4, 6), (5, 6)), 12, start="orthogonal", iterations=50)
    assert all(f.dtype == dtype for f in found.cp.factors)
    exact = weight.detach().double().t()
    wide = decompose(exact, ((4, 6), (5, 6)), 12, start="orthogonal", iterations=50)
    assert found.error == pytest.approx(wide.error, rel=0.02)
    norms = torch.stack([f.detach().double().norm(dim=0) for f in found.cp.factors])
    assert float((norms / norms[0] - 1).abs().max()) < 0.02


def test_autocast_does_not_round_the_fit() -> None:
    weight, shape = torch.randn(24, 30), ((4, 6), (5, 6))
    plain = decompose(weight, shape, 9, iterations=10)
    with torch.autocast("cpu", torch.bfloat16):
        cast = decompose(weight, shape, 9, iterations=10)
    for x, y in zip(plain.cp.factors, cast.cp.factors, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("power", [66, -66, 120, -120])
@pytest.mark.parametrize("start", ["auto", "random"])
def test_the_scale_of_the_weight_changes_nothing(power: int, start: Any) -> None:
    """A weight near 1e20 has squares that overflow in float32; one near 1e-36 has none left."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator)
    want = decompose(weight, ((3, 4), (4, 5)), 6, start=start)
    scaled = weight * 2.0 ** (power // 2) * 2.0 ** (power // 2)
    got = decompose(scaled, ((3, 4), (4, 5)), 6, start=start)
    assert got.error == pytest.approx(want.error, rel=1e-4)
    further = decompose(weight, ((3, 4), (4, 5)), 6, start=want, iterations=3).history
    again = decompose(scaled, ((3, 4), (4, 5)), 6, start=got, iterations=3).history
    assert again == pytest.approx(further, rel=1e-4)
    back = got.cp.double().to_matrix().detach() * 2.0**-power
    found = float((back - weight).norm() / weight.norm())
    assert found == pytest.approx(want.error, rel=1e-4)


def test_a_default_device_does_not_matter() -> None:
    """Draws and their generators stay on the CPU, the fit where the weight is."""
    weight = torch.randn(64, 72, generator=torch.Generator().manual_seed(0))
    want = decompose(weight, ((8, 8), (8, 9)), 4)
    with torch.device("meta"):
        got = decompose(weight, ((8, 8), (8, 9)), 4)
        table = CPEmbedding.from_embedding(torch.nn.Embedding(23, 6, device="cpu"), rank=3)
    assert got.error == want.error
    assert all(factor.device.type == "cpu" for factor in (*got.cp.factors, *table.cp.factors))


def test_zero_weight() -> None:
    found = decompose(torch.zeros(6, 4), ((2, 3), (2, 2)), 3)
    assert found.error == 0
    assert float(found.cp.to_matrix().detach().abs().max()) == 0
    assert found.reason == "the weight is zero"


def test_callback_sees_every_sweep_and_can_stop() -> None:
    seen: list[tuple[int, float]] = []

    def stop(iteration: int, error: float) -> bool:
        seen.append((iteration, error))
        return len(seen) == 4

    weight = torch.randn(24, 30)
    found = decompose(weight, ((4, 6), (5, 6)), 9, start="random", callback=stop)
    assert [i for i, _ in seen] == [1, 2, 3, 4]
    assert [e for _, e in seen] == list(found.history)
    assert (found.converged, found.reason) == (False, "stopped by the callback")


def test_callback_in_a_race() -> None:
    """The first start's sweeps, the winner's, and further fits'; a limit holds for the race too."""
    seen: list[int] = []
    weight, shape = torch.randn(24, 30), ((4, 6), (5, 6))
    found = decompose(
        weight, shape, 9, iterations=8, tolerance=0, callback=lambda i, e: seen.append(i)
    )
    assert seen == list(range(1, 8 * search.MOST_FITS + 1))
    assert found.iterations == 8
    found = decompose(weight, shape, 9, callback=lambda i, e: i == 2)
    assert (found.iterations, found.start) == (2, "orthogonal")
    assert found.reason == "stopped by the callback"
    assert decompose(weight, shape, 9, iterations=3).iterations == 3


def test_where_fits_are_cheap_more_of_them_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """From random starts, to their end; the best is returned, and the callback follows it."""
    torch.manual_seed(0)
    weight, shape = torch.randn(24, 30), ((4, 6), (5, 6))
    seen: list[tuple[int, float]] = []
    found = decompose(weight, shape, 9, iterations=30, callback=lambda i, e: seen.append((i, e)))
    assert len(found.further) == search.MOST_FITS - 1
    ends = [found.error, *found.further]
    assert min(ends) == pytest.approx(found.error)
    assert [i for i, _ in seen] == list(range(1, len(seen) + 1))
    assert len(seen) > 3 * found.iterations
    late = [e for _, e in seen[60:]]
    assert late == sorted(late, reverse=True)
    assert seen[-1][1] == pytest.approx(found.error)
    assert "further fits from random starts" in str(found)

    stopped = decompose(weight, shape, 9, iterations=30, callback=lambda i, e: i == 100)
    assert stopped.reason == "stopped by the callback"
    assert stopped.error <= found.history[-1] * 1.1
    assert len(stopped.further) < len(found.further)

    monkeypatch.setattr(search, "CHEAP", 0)
    single = decompose(weight, shape, 9, iterations=30)
    assert single.further == ()
    assert found.error <= single.error
    for start in ("random", ("random", "orthogonal")):
        assert decompose(weight, shape, 9, start=start, iterations=30).further == ()


@pytest.mark.parametrize("start", ["random", "auto"])
def test_an_interrupt_carries_the_result(start: str) -> None:
    def interrupt(iteration: int, error: float) -> None:
        if iteration == 3:
            raise KeyboardInterrupt

    weight = torch.randn(24, 30)
    with pytest.raises(DecomposeInterrupted) as caught:
        decompose(weight, ((4, 6), (5, 6)), 9, start=start, callback=interrupt)
    reached = caught.value.decomposition
    assert isinstance(caught.value, KeyboardInterrupt)
    assert reached.iterations == 3
    assert reached.error == pytest.approx(relative(reached, weight), rel=1e-3)


def test_it_prints_its_reasons() -> None:
    text = str(decompose(torch.randn(24, 30), ((4, 6), (5, 6)), 9, iterations=7, tolerance=0))
    for part in ("rank 9", "relative error", "growth", "race: orthogonal", "limit of 7 sweeps"):
        assert part in text


@pytest.mark.slow
def test_twenty_seeds_none_diverging() -> None:
    """Random starts on a weight full of noise: bounded, and of nearly one quality."""
    weight, shape = torch.randn(48, 48), ((4, 3, 4), (4, 3, 4))
    fits = [decompose(weight, shape, 40, start="random", seed=s, iterations=40) for s in range(20)]
    errors = torch.tensor([fit.error for fit in fits])
    assert bool(errors.isfinite().all())
    assert float(errors.max() / errors.min()) < 1.05
    assert max(fit.growth for fit in fits) < 3


NOT_FINITE = CPTensor.from_factors(
    ((2, 3), (2, 2)), [torch.full((size, 2), math.nan) for size in (2, 3, 2, 2)]
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": "w"}, TypeError, "weight must be a tensor, got str"),
        ({"weight": torch.ones(6, 4, dtype=torch.int64)}, TypeError, "floating point or complex"),
        ({"weight": torch.ones(4, 6)}, ValueError, r"\(6, 4\), as its dimensions, got \(4, 6\)"),
        ({"weight": torch.ones(6, 4, device="meta")}, ValueError, "meta"),
        ({"weight": torch.full((6, 4), math.nan)}, ValueError, "finite"),
        ({"weight": torch.full((6, 4), math.inf)}, ValueError, "finite"),
        ({"tensorized_shape": "22"}, TypeError, "groups of mode sizes"),
        ({"tensorized_shape": ()}, ValueError, "at least one group"),
        ({"tensorized_shape": ((2, 0), (2, 2))}, ValueError, "positive int"),
        ({"rank": 0}, ValueError, "rank must be a positive int"),
        ({"rank": 2.0}, TypeError, "rank must be a positive int"),
        ({"iterations": 0}, ValueError, "iterations"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be finite and at least 0"),
        ({"damping": 0.0}, ValueError, "damping must be finite and above 0"),
        ({"regularization": math.nan}, ValueError, "regularization"),
        ({"max_growth": 0.5}, ValueError, "max_growth must be finite and at least 1"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"callback": 3}, TypeError, "callback must be a function or None"),
        ({"start": "best"}, ValueError, "one of .*orthogonal.*got 'best'"),
        ({"start": ()}, ValueError, "at least one start"),
        ({"start": 3}, TypeError, "a name, factors or a sequence"),
        ({"start": [3]}, TypeError, "a name or factors, got int"),
        ({"start": CPTensor(((3, 2), (2, 2)), 2)}, ValueError, "tensorized shape"),
        ({"start": NOT_FINITE}, ValueError, "finite factors"),
        ({"metric": "x"}, TypeError, "metric must be a floating-point tensor"),
        ({"metric": torch.eye(6) + 0j}, TypeError, "complex64 for that of a real weight"),
        ({"weight": torch.ones(6, 4) + 0j, "metric": torch.ones(6) + 0j}, TypeError, "a diagonal"),
        ({"weight": torch.ones(6, 4) + 0j, "metric": torch.eye(6) + 1j}, ValueError, "Hermitian"),
        ({"start": CPTensor(((2, 3), (2, 2)), 2, dtype=torch.complex64)}, TypeError, "be real"),
        ({"metric": torch.ones(4, 4)}, ValueError, r"shape \(6, 6\) or \(6,\)"),
        ({"metric": torch.full((6,), math.nan)}, ValueError, "finite"),
        ({"metric": -torch.eye(6)}, ValueError, "positive semidefinite and not zero"),
        ({"metric": torch.zeros(6)}, ValueError, "not zero"),
        ({"metric": torch.eye(6).index_fill_(1, torch.tensor(2), 0.5)}, ValueError, "symmetric"),
        ({"metric": torch.ones(6, 6) - 0.5 * torch.eye(6)}, ValueError, "negative|semidefinite"),
        ({"metric_groups": (2,)}, ValueError, "metric_groups must name"),
        ({"metric_groups": ()}, ValueError, "metric_groups must name"),
        ({"metric_groups": 0}, TypeError, "sequence of ints"),
        ({"metric_groups": (0.7,)}, TypeError, "sequence of ints, got 0.7 in it"),
        ({"metric_groups": (False,)}, TypeError, "sequence of ints, got False in it"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "weight": torch.randn(6, 4),
        "tensorized_shape": ((2, 3), (2, 2)),
        "rank": 2,
        **change,
    }
    with pytest.raises(error, match=message):
        decompose(**given)
