"""Errors in fp32, bf16 and fp16: at most twice those of dense torch in the same dtype.

Both are measured against float64 on the same (already rounded) inputs, as relative L2 over several
draws. Dense torch gets its weight W from the factors in fp32 (one einsum), rounded once to
the dtype; then everything is ``F.linear`` or ``F.conv*d`` in that dtype. Its factor gradients come
from its dW, in the dtype, by autograd through that einsum in fp32.

Where the bound comes from: in half precision the error is a count of roundings. Dense rounds
twice on the way to any result (W and y, or dW and the result). An explicit Khatri-Rao layer rounds
four times, so √2 times the error; a convolution with one depthwise stage six times, √3.

In fp32 operands are exact and what is counted are the roundings within sums, and there twice
dense's error is no measure: one library adds a long sum in a single chain and another, or the same
library for another processor or product, in many short ones. So in fp32 there is a second
yardstick: the same sums by torch's own operations in other orders (factor after factor, a side's
factors at once, another layout of memory), on the same processor. An error may be twice theirs, as
long as it is no larger than that of a single chain. The partial sum of k terms of random sign is √k
of a term and rounded by up to u = 2⁻²⁴ of itself, up or down; over K terms that is at most
u √(1 + 2 + … + K) of a term, u √(K/2) of the sum. Seen: 1.36 u √(K/6) = 0.79 u √(K/2), of a split
plan by MKL's oldest code.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from cases import BY_ID, CASES, FEW, every_case, params
from cases.protocol import HALVES, Case, Forced, Leaves, gradients
from compare import assert_close
from polyadic.kernels import multilinear
from polyadic.kernels.products import matmul_tn

FACTOR = 2.0
DRAWS = 8
LARGE = [case for case in CASES if case.dtypes]
Results = dict[str, Tensor]


def dense_results(case: Case, dtype: torch.dtype, seed: int) -> Results:
    """Output and gradients of dense torch in ``dtype``."""
    given = case.leaves(dtype, seed).map(Tensor.requires_grad_)
    wide = given.to(torch.float32).map(Tensor.requires_grad_)
    y = case.apply(given.x, case.weight(wide).to(dtype), given.bias)
    # x and the bias are torch's own in the dtype; the factors' gradients come from its dW.
    own = given.named()
    leaves = {name: own[name] if name in ("x", "bias") else t for name, t in wide.named().items()}
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad_y(dtype, seed + 1))
    return {"y": y.detach()} | {
        name: grad.to(dtype) for name, grad in zip(leaves, grads, strict=True)
    }


def cp_results(case: Case, dtype: torch.dtype, seed: int, forced: Forced) -> Results:
    leaves = case.leaves(dtype, seed).map(Tensor.requires_grad_)
    y = case.cp(leaves, **forced)
    return {"y": y.detach(), **gradients(y, leaves, case.grad_y(dtype, seed + 1))}


@functools.cache
def exact_results(case: Case, dtype: torch.dtype, seed: int) -> Results:
    leaves = case.leaves(dtype, seed).to(torch.float64).map(Tensor.requires_grad_)
    y = case.dense(leaves)
    grad_y = case.grad_y(dtype, seed + 1).double()
    return {"y": y.detach(), **gradients(y, leaves, grad_y)}


def errors(case: Case, dtype: torch.dtype, results: list[Results]) -> dict[str, float]:
    """Relative L2 error of every result, over all draws together."""
    wrong: dict[str, float] = defaultdict(float)
    right: dict[str, float] = defaultdict(float)
    for seed, result in enumerate(results):
        exact = exact_results(case, dtype, seed)
        assert result.keys() == exact.keys()
        for name, value in result.items():
            assert value.dtype == dtype, f"{name} is {value.dtype}"
            wrong[name] += (value.double() - exact[name]).square().sum().item()
            right[name] += exact[name].square().sum().item()
    return {name: (wrong[name] / right[name]) ** 0.5 for name in wrong}


@functools.cache
def dense_errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    try:
        results = [dense_results(case, dtype, seed) for seed in range(DRAWS)]
    except RuntimeError as error:
        if "not implemented for" in str(error):
            pytest.skip(f"torch has no dense {dtype} here: {error}")
        raise
    return errors(case, dtype, results)


@functools.cache
def errors_in_other_orders(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of each result among the orders in which torch's operations add up."""
    drawn: list[list[Results]] = []
    for seed in range(DRAWS):
        leaves = case.leaves(dtype, seed).map(Tensor.requires_grad_)
        grad_y = case.grad_y(dtype, seed + 1)
        drawn.append(
            [
                {"y": y.detach(), **gradients(y, leaves, grad_y)}
                for y in case.in_other_orders(leaves)
            ]
        )
    found = [errors(case, dtype, list(results)) for results in zip(*drawn, strict=True)]
    return {name: max(error[name] for error in found) for name in found[0]}


def of_a_chain(case: Case) -> float:
    """Relative error in fp32 of sums that are added term by term, see above."""
    # On the way to any gradient there are sums over either side, the components and the positions.
    out, into, *taps = case.weight(case.leaves()).shape
    positions = math.prod(case.lead) * math.prod(case.size)
    terms = math.prod(taps) * (out + into) + case.rank + positions
    return float(2**-24 * math.sqrt(terms / 2))


def assert_within_twice(case: Case, dtype: torch.dtype, forced: Forced) -> None:
    ours = errors(case, dtype, [cp_results(case, dtype, seed, forced) for seed in range(DRAWS)])
    assert_errors_within_twice(case, dtype, ours, forced)


def assert_errors_within_twice(
    case: Case, dtype: torch.dtype, ours: dict[str, float], forced: Forced
) -> None:
    dense = dense_errors(case, dtype)
    for name, error in ours.items():
        limit = FACTOR * dense[name]
        if dtype == torch.float32 and error > limit:
            other = FACTOR * errors_in_other_orders(case, dtype)[name]
            limit = max(limit, min(other, of_a_chain(case)))
        assert error <= limit, f"{name}: {error:.2e}, dense torch {dense[name]:.2e}, by {forced}"


def counted(forced: Forced, dtype: torch.dtype) -> bool:
    """Whether the count of roundings above is a plan's.

    A stage for each dimension of the kernel rounds once more than one, in half precision alone;
    factors on the two sides joined unlike one another too.
    """
    plan = forced.get("plan")
    if plan is None:
        return True
    if plan.forward != plan.backward or plan.keep not in (1, "x and z"):
        return False
    route = plan.forward
    if hasattr(route, "in_groups"):
        return route.in_groups == route.out_groups
    return route.kind == "dense" or route.depthwise == "merged" or dtype.itemsize > 2


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", params(LARGE))
def test_error_at_most_twice_that_of_dense_torch(case: Case, dtype: torch.dtype) -> None:
    assert_within_twice(case, dtype, {})


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", params(LARGE))
def test_plans_stay_within_twice(case: Case, dtype: torch.dtype) -> None:
    """However many groups of factors there are, products between them are rounded once."""
    for forced in case.plans():
        if counted(forced, dtype):
            assert_within_twice(case, dtype, forced)


@pytest.mark.parametrize("case", params(LARGE))
def test_the_other_orders_are_of_the_same_sums(case: Case) -> None:
    leaves = case.leaves()
    for y in case.in_other_orders(leaves):
        assert_close(y, case.dense(leaves), "y")


def bits_that_show(case: Case) -> int:
    """Bits of a partial sum of which a loss of the others is noticed on every processor.

    A number cut to b bits loses a uniform part of up to 2¹⁻ᵇ of a power of two below it, 0.4 · 2¹⁻ᵇ
    of itself in the mean square, and half the terms 0.28 · 2¹⁻ᵇ of their sum. The limit of
    any processor's errors is twice that of a chain; the loss is to be twice that again.
    """
    return 1 - math.ceil(math.log2(4 * of_a_chain(case) / 0.28))


@pytest.mark.parametrize(
    "name", ["linear-notebook", "head-large", "joint-large", "linear-wide-lambda"]
)
def test_a_sum_that_loses_its_last_bits_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over the first half of the rows keeps some of its 24 bits."""
    case = BY_ID[name]
    lost = 24 - bits_that_show(case)
    assert 0 < lost < 12

    def broken(x: Tensor, z: Tensor) -> Tensor:
        half = len(x) // 2
        partial = matmul_tn(x[:half], z[:half])
        kept = (partial.view(torch.int32) & -(2**lost)).view(torch.float32)
        return kept + matmul_tn(x[half:], z[half:])

    monkeypatch.setattr(multilinear, "matmul_tn_unrounded", broken)
    with pytest.raises(AssertionError, match="dense torch"):
        assert_within_twice(case, torch.float32, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rule_can_fail(dtype: torch.dtype) -> None:
    """Noise of one unit in the last place of bf16 is noticed, and in fp32 of twice the limit."""
    case = BY_ID["linear-notebook"]
    bits = 8.0 if dtype == torch.bfloat16 else -math.log2(4 * of_a_chain(case))
    results = [cp_results(case, dtype, seed, {}) for seed in range(DRAWS)]
    noisy = [
        {
            name: (v.double() * (1 + 2.0**-bits * torch.randn_like(v.double()))).to(v.dtype)
            for name, v in result.items()
        }
        for result in results
    ]
    ours = errors(case, dtype, noisy)
    with pytest.raises(AssertionError, match="dense torch"):
        assert_errors_within_twice(case, dtype, ours, {})


@every_case
def test_small_integers_are_exact(case: Case) -> None:
    """Equal to the last bit: a fault of indexing cannot hide below a tolerance."""
    check_integers(case, {})


@pytest.mark.parametrize("case", params(FEW))
def test_small_integers_are_exact_by_every_plan(case: Case) -> None:
    for forced in case.plans():
        check_integers(case, forced)


@functools.cache
def integer_problem(case: Case) -> tuple[Leaves, Tensor, Results]:
    """Leaves and gradient in {-1, 0, 1} and the exact results; all sums far below 2²⁴."""
    generator = torch.Generator().manual_seed(3)

    def integers(like: Tensor) -> Tensor:
        return torch.randint(-1, 2, like.shape, generator=generator).to(like)

    leaves = case.leaves(torch.float32).map(integers)
    grad_y = integers(case.grad_y(torch.float32))
    exact = leaves.to(torch.float64).map(Tensor.requires_grad_)
    y = case.dense(exact)
    want = {"y": y.detach(), **gradients(y, exact, grad_y.double())}
    assert all(v.numel() == 0 or v.abs().max() < 2**20 for v in want.values())
    return leaves, grad_y, want


def check_integers(case: Case, forced: Forced) -> None:
    leaves, grad_y, want = integer_problem(case)
    leaves = leaves.map(lambda t: t.detach().clone().requires_grad_())
    y = case.cp(leaves, **forced)
    got = {"y": y, **gradients(y, leaves, grad_y)}
    for name in want:
        assert torch.equal(got[name].double(), want[name]), f"{name} by {forced}"
