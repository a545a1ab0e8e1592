"""The reference against dense PyTorch and autograd: values and every gradient, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import polyadic
from polyadic import reference

TOLERANCE = 1e-10

# (in modes, out modes), rank, batch
LINEAR = [
    (((7,), (5,)), 1, 1),
    (((7,), (5,)), 11, 3),
    (((1,), (1,)), 1, 2),
    (((2, 3), (5, 1)), 3, 0),
    (((2, 3), (5, 1)), 3, 1),
    (((1, 1), (3, 2)), 2, 4),
    (((4, 4, 16), (4, 4, 8)), 100, 3),
    (((3, 1, 5), (1, 2, 7)), 4, 13),
    (((2, 2, 2), (2, 2, 2)), 17, 5),
    (((2, 3, 1, 5), (3, 1, 2, 2)), 6, 2),
    (((1, 1, 1, 1), (1, 1, 1, 1)), 2, 1),
    (((13, 11), (7,)), 5, 2),
    (((6,), (2, 1, 3)), 4, 2),
]

# (out modes, in modes, kernel), rank, batch, image
CONV = [
    (((3,), (2,), (1, 1)), 1, 1, (5, 4)),
    (((3,), (2,), (3, 3)), 7, 2, (1, 1)),
    (((1,), (1,), (3, 3)), 2, 2, (4, 7)),
    (((2, 3), (5, 1), (1, 3)), 3, 2, (3, 5)),
    (((4, 8), (4, 4), (3, 3)), 100, 1, (8, 8)),
    (((2, 1), (1, 2), (5, 3)), 4, 0, (6, 5)),
    (((2, 1), (1, 2), (5, 3)), 4, 1, (6, 5)),
    (((2, 2), (3, 1), (4, 4)), 5, 2, (6, 7)),
    (((2, 2), (3, 1), (2, 3)), 5, 3, (2, 2)),
    (((1, 2, 3), (2, 1, 2), (3, 2)), 4, 2, (5, 3)),
    (((1, 2, 1, 2), (2, 1, 2, 1), (3, 1)), 3, 1, (4, 3)),
    (((7,), (11,), (2, 2)), 3, 2, (3, 4)),
]


def tltorch_tensor(shape: Any, factors: Sequence[Tensor], weights: Tensor | None) -> Any:
    tltorch = pytest.importorskip("tltorch")
    tensor = tltorch.TensorizedTensor.new(
        shape, factors[0].shape[1], factorization="CP", dtype=factors[0].dtype
    )
    with torch.no_grad():
        for parameter, factor in zip(tensor.factors, factors, strict=True):
            parameter.copy_(factor)
        tensor.weights.copy_(torch.ones_like(tensor.weights) if weights is None else weights)
    return tensor


def our_tensor(shape: Any, factors: Sequence[Tensor], weights: Tensor | None) -> Any:
    return polyadic.CPTensor.from_factors(shape, factors, weights)


def plain_tensor(shape: Any, factors: Sequence[Tensor], weights: Tensor | None) -> Any:
    """Nothing but the attributes the reference says it reads; the factors not even contiguous."""
    leaves = [f.clone().T.contiguous().T.requires_grad_() for f in factors]
    return SimpleNamespace(tensorized_shape=shape, factors=leaves, weights=weights)


MAKERS = [tltorch_tensor, our_tensor, plain_tensor]
Maker = Callable[[Any, Sequence[Tensor], Tensor | None], Any]


def random_factors(shape: Any, rank: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    modes = [mode for group in shape for mode in group]
    return [torch.randn(m, rank, generator=generator, dtype=torch.float64) for m in modes]


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    if want.numel() == 0:
        return
    scale = want.abs().max().clamp_min(torch.finfo(want.dtype).tiny)
    error = ((got - want).abs().max() / scale).item()
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def outer_product(tensor: Any) -> Tensor:
    """The definition, entry by entry: the sum of weighted outer products."""
    factors = [f.detach() for f in tensor.factors]
    weights = getattr(tensor, "weights", None)
    total = torch.zeros([f.shape[0] for f in factors], dtype=factors[0].dtype)
    for r in range(factors[0].shape[1]):
        term = torch.ones((), dtype=total.dtype) if weights is None else weights[r].detach()
        for factor in factors:
            term = term[..., None] * factor[:, r]
        total += term
    return total


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("shape", "rank", "batch"), LINEAR, ids=str)
def test_linear_agrees_with_dense_autograd(
    shape: Any, rank: int, batch: int, make: Maker, weighted: bool
) -> None:
    weights = torch.linspace(-1.5, 2, rank, dtype=torch.float64) if weighted else None
    tensor = make(shape, random_factors(shape, rank), weights)
    factors = list(tensor.factors)
    m, n = (math.prod(group) for group in shape)
    x = torch.randn(m, batch, dtype=torch.float64).T.requires_grad_()
    dy = torch.randn(n, batch, dtype=torch.float64).T

    y = F.linear(x, reference.dense(tensor).T)
    dx, *factor_grads = torch.autograd.grad(y, [x, *factors], dy)

    with torch.no_grad():
        output, saved = reference.cp_times_matrix_fwd(tensor, x)
        got_grads, got_dx = reference.cp_times_matrix_bwd(tensor, dy, saved)
    assert_same(output, y, "y")
    assert_same(got_dx, dx, "dx")
    assert len(got_grads) == len(factors)
    for i, (got, want) in enumerate(zip(got_grads, factor_grads, strict=True)):
        assert_same(got, want, f"factor {i}")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("shape", "rank", "batch", "image"), CONV, ids=str)
def test_conv_agrees_with_dense_autograd(
    shape: Any, rank: int, batch: int, image: tuple[int, int], make: Maker, weighted: bool
) -> None:
    weights = torch.linspace(-1.5, 2, rank, dtype=torch.float64) if weighted else None
    tensor = make(shape, random_factors(shape, rank), weights)
    factors = list(tensor.factors)
    c_out, c_in = math.prod(shape[0]), math.prod(shape[1])
    x = torch.randn(batch, *image, c_in, dtype=torch.float64).movedim(-1, 1).requires_grad_()
    dy = torch.randn(batch, *image, c_out, dtype=torch.float64).movedim(-1, 1)

    y = F.conv2d(x, reference.dense(tensor), padding="same")
    dx, *factor_grads = torch.autograd.grad(y, [x, *factors], dy)

    with torch.no_grad():
        output, saved = reference.cp_conv_fwd(tensor, x, len(shape[0]))
        got_grads, got_dx = reference.cp_conv_bwd(tensor, dy, saved)
    assert_same(output, y, "y")
    assert_same(got_dx, dx, "dx")
    assert len(got_grads) == len(factors)
    for i, (got, want) in enumerate(zip(got_grads, factor_grads, strict=True)):
        assert_same(got, want, f"factor {i}")


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("shape", [case[0] for case in LINEAR + CONV if case[1] <= 17], ids=str)
def test_dense_is_the_sum_of_outer_products(shape: Any, make: Maker) -> None:
    tensor = make(shape, random_factors(shape, 3), torch.tensor([2.0, -1.0, 0.5]).double())
    kernel = shape[2] if len(shape) == 3 else ()
    want = outer_product(tensor).reshape(math.prod(shape[0]), math.prod(shape[1]), *kernel)
    assert_same(reference.dense(tensor), want, "dense")


def test_dense_agrees_with_tltorch() -> None:
    shape = ((4, 8), (4, 4), (3, 2))
    tensor = tltorch_tensor(shape, random_factors(shape, 5), torch.rand(5))
    want = tensor.to_matrix().reshape(32, 16, 3, 2)
    assert_same(reference.dense(tensor), want, "dense")


def test_saved_tensors_are_the_inputs_of_the_steps() -> None:
    linear = plain_tensor(((2, 3), (5, 7)), random_factors(((2, 3), (5, 7)), 4), None)
    _, saved = reference.cp_times_matrix_fwd(linear, torch.randn(1, 6, dtype=torch.float64))
    assert [tuple(s.shape) for s in saved] == [(1, 2, 3), (1, 3, 4), (1, 4), (1, 5, 4)]

    shape = ((2, 3), (5, 7), (3, 3))
    conv = plain_tensor(shape, random_factors(shape, 4), None)
    _, saved = reference.cp_conv_fwd(conv, torch.randn(1, 35, 8, 9, dtype=torch.float64), 2)
    assert [tuple(s.shape) for s in saved] == [
        (1, 5, 7, 8, 9),
        (1, 4, 7, 8, 9),
        (1, 4, 8, 9),
        (1, 4, 8, 9),
        (1, 4, 8, 9),
        (1, 4, 2, 8, 9),
    ]


def test_weights_scale_the_saved_in_projection() -> None:
    shape = ((2, 3), (5, 7))
    factors, weights = random_factors(shape, 4), torch.tensor([1.0, 2.0, 0.0, -3.0]).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    _, plain = reference.cp_times_matrix_fwd(plain_tensor(shape, factors, None), x)
    _, scaled = reference.cp_times_matrix_fwd(plain_tensor(shape, factors, weights), x)
    assert torch.equal(scaled[2], plain[2] * weights)


LINEAR_SHAPE = ((2, 3), (5, 1))
CONV_SHAPE = ((2, 3), (5, 1), (3, 3))


def a_tensor(shape: Any = LINEAR_SHAPE) -> Any:
    return plain_tensor(shape, random_factors(shape, 2), None)


def linear(shape: Any, *size: int, dtype: torch.dtype = torch.float64) -> Any:
    return reference.cp_times_matrix_fwd(a_tensor(shape), torch.ones(size, dtype=dtype))


def conv(shape: Any, *size: int, order: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    return reference.cp_conv_fwd(a_tensor(shape), torch.ones(size, dtype=dtype), order)


def backward_with(saved: int, *size: int) -> Any:
    _, tensors = linear(LINEAR_SHAPE, 4, 6)
    return reference.cp_times_matrix_bwd(a_tensor(), torch.ones(size).double(), tensors[:saved])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear(LINEAR_SHAPE, 4, 7), ValueError, r"matrix .* \(any, 6\), got \(4, 7\)"),
        (lambda: linear(LINEAR_SHAPE, 6), ValueError, r"got \(6,\)"),
        (lambda: linear(LINEAR_SHAPE, 2, 2, 6), ValueError, r"got \(2, 2, 6\)"),
        (lambda: linear(CONV_SHAPE, 4, 6), ValueError, r"groups \(in, out\)"),
        (lambda: linear(LINEAR_SHAPE, 4, 6, dtype=torch.float32), TypeError, "float64, got"),
        (lambda: linear(((), (2,)), 4, 1), ValueError, "at least one mode"),
        (lambda: conv(CONV_SHAPE, 1, 6, 4, 4), ValueError, r"\(any, 5, any, any\)"),
        (lambda: conv(CONV_SHAPE, 5, 4, 4), ValueError, r"got \(5, 4, 4\)"),
        (lambda: conv(CONV_SHAPE, 1, 5, 4, 4, order=3), ValueError, "order must be .* 2 .* got 3"),
        (lambda: conv(LINEAR_SHAPE, 1, 5, 4, 4), ValueError, r"groups \(out, in, kernel\)"),
        (lambda: conv(((2, 3), (5,), (3, 3)), 1, 5, 4, 4), ValueError, "as many in modes as out"),
        (lambda: conv(((2,), (5,), (3,)), 1, 5, 4, 4, order=1), ValueError, "two kernel modes"),
        (lambda: conv(CONV_SHAPE, 1, 5, 4, 4, dtype=torch.int64), TypeError, "got torch.int64"),
        (lambda: backward_with(4, 4, 6), ValueError, r"grad .* \(4, 5\), got \(4, 6\)"),
        (lambda: backward_with(4, 3, 5), ValueError, r"grad .* \(4, 5\), got \(3, 5\)"),
        (lambda: backward_with(3, 4, 5), ValueError, "4 tensors, the first"),
        (lambda: reference.dense(torch.ones(2, 3)), TypeError, "expected a CP tensor .* Tensor"),
        (lambda: reference.dense(a_tensor(((2, 3),))), ValueError, r"\(in, out\) or"),
        (
            lambda: reference.dense(plain_tensor(((2,), (3,)), [torch.ones(2, 2)], None)),
            ValueError,
            r"modes \[2, 3\], got factors of shape \[\(2, 2\)\]",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
