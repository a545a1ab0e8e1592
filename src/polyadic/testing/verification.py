"""Check the factorized layers against dense PyTorch in float64: what ``polyadic verify`` runs.

    problem = linear_problem(256, 128, rank=100)    a CP tensor, an input, a gradient: from a seed
    result = verify(problem)                        each quantity, implementation by implementation

The yardstick is the dense weight, applied by PyTorch and differentiated by autograd, in float64 on
exactly the numbers the implementations get; of complex ones in complex128. There an error may be
1e-10. In a lower precision
it may be twice the error of that same dense computation carried out in the lower precision, plus a
rounding for each factor: where few numbers are summed, or they cancel, PyTorch may be exact by
chance. A quantity is a sum of products, and independent roundings of its terms t add up to about
eps sqrt(sum t^2), which is what the dense computation gives on the squares of all numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyadic import reference
from polyadic.checks import a_seed, an_int, check_flag
from polyadic.formats import ConvFormat, LinearFormat, positive_int, tensorize
from polyadic.functional import (
    cp_conv,
    cp_conv_backward,
    cp_conv_forward,
    cp_linear,
    cp_linear_backward,
    cp_linear_forward,
)
from polyadic.planner.choice import choose
from polyadic.planner.explanation import requested
from polyadic.plans import ConvPlan, ConvRoute, LinearPlan, LinearRoute
from polyadic.tensor import CPTensor, check_fits_memory

__all__ = ["Check", "Problem", "Result", "conv_problem", "linear_problem", "verify"]

GROUPS = {2: ("in", "out"), 3: ("out", "in", "kernel")}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.complex128, torch.complex64)
EXACT_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Problem:
    """A CP tensor, an input for its layer and a gradient of the output, all of one dtype.

    Attributes:
        tensor: groups (in, out) for a linear layer, (out, in, kernel) for a convolution.
        x: ``(B, M)`` or ``(B, Cin, H, W)``.
        dy: ``(B, N)`` or ``(B, Cout, H, W)``.
        seed: the seed from which all numbers were drawn.
    """

    tensor: CPTensor
    x: Tensor
    dy: Tensor
    seed: int

    @property
    def layer(self) -> str:
        """``"linear"`` or ``"conv"``."""
        return "conv" if len(self.tensor.tensorized_shape) == 3 else "linear"

    @property
    def groups(self) -> list[list[Tensor]]:
        """The factors, group by group."""
        factors = iter(self.tensor.factors)
        return [[next(factors) for _ in group] for group in self.tensor.tensorized_shape]

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """Apply a function to every tensor."""
        weights = self.tensor.weights
        tensor = CPTensor.from_factors(
            self.tensor.tensorized_shape,
            [function(factor.detach()) for factor in self.tensor.factors],
            None if weights is None else function(weights.detach()),
        )
        return Problem(tensor, function(self.x), function(self.dy), self.seed)


@dataclass(frozen=True)
class Check:
    """One quantity as one implementation computes it, compared.

    Attributes:
        implementation: a key of ``IMPLEMENTATIONS``.
        quantity: ``"y"``, ``"dx"``, ``"d in_factors[0]"``, ...
        error: the largest absolute difference over the largest absolute value.
        tolerance: the largest error allowed.
        torch_error: error of dense PyTorch in this dtype; None in float64, which is the yardstick.
    """

    implementation: str
    quantity: str
    error: float
    tolerance: float
    torch_error: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; never so for NaN."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Result:
    """What ``verify`` found for one problem."""

    layer: str
    tensorized_shape: tuple[tuple[int, ...], ...]
    rank: int
    weights: bool
    input_shape: tuple[int, ...]
    dtype: str
    seed: int
    parameters: int
    dense_parameters: int
    checks: tuple[Check, ...]
    plan: str = ""

    @property
    def ok(self) -> bool:
        """Whether every check is within its tolerance."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; an error that is no finite number becomes None."""
        values = {**self.__dict__, "ok": self.ok}
        values["checks"] = [
            {
                **check.__dict__,
                "error": check.error if math.isfinite(check.error) else None,
                "ok": check.ok,
            }
            for check in self.checks
        ]
        return values


def linear_problem(
    in_features: int = 256,
    out_features: int = 128,
    *,
    rank: int = 100,
    order: int = 3,
    batch: int = 32,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    weights: bool = False,
) -> Problem:
    """Draw the check of a linear layer; the defaults are the linear notebook's.

    Args:
        in_features: M.
        out_features: N.
        rank: R.
        order: modes in each group.
        batch: rows of x; may be 0.
        dtype: float64, float32, bfloat16, complex128 or complex64.
        seed: seed of the random numbers.
        weights: whether the components get weights of their own.

    Raises:
        ValueError: a size is out of range, or the dtype is none of these.
    """
    shape = tensorize(in_features, out_features, order)
    return _draw(shape, rank, (batch, in_features), (batch, out_features), dtype, seed, weights)


def conv_problem(
    in_channels: int = 16,
    out_channels: int = 32,
    kernel_size: tuple[int, int] = (3, 3),
    *,
    size: tuple[int, int] = (32, 32),
    rank: int = 100,
    order: int = 2,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    weights: bool = False,
) -> Problem:
    """Draw the check of a convolution (stride 1, padding "same"); the defaults are the notebook's.

    Args:
        in_channels: Cin.
        out_channels: Cout.
        kernel_size: height and width.
        size: height and width of the image.
        rank: R.
        order: modes in the out group, and in the in group.
        batch: images in x; may be 0.
        dtype: float64, float32, bfloat16, complex128 or complex64.
        seed: seed of the random numbers.
        weights: whether the components get weights of their own.

    Raises:
        ValueError: a size is out of range, or the dtype is none of these.
    """
    kernel_size, size = _two_ints(kernel_size, "kernel_size"), _two_ints(size, "size")
    shape = (*tensorize(out_channels, in_channels, order), kernel_size)
    x_shape, y_shape = (batch, in_channels, *size), (batch, out_channels, *size)
    return _draw(shape, rank, x_shape, y_shape, dtype, seed, weights)


def verify(problem: Problem) -> Result:
    """Compare every quantity of every implementation with dense autograd in float64.

    Raises:
        TypeError: ``problem`` is not a problem that ``problem`` of this package has made.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a Problem, got {type(problem).__name__}")
    dtype = problem.x.dtype
    exact = _run(_dense, problem.map(_wide))
    tolerance = dict.fromkeys(exact, EXACT_TOLERANCE)
    torch_error: dict[str, float] = {}
    if dtype not in (torch.float64, torch.complex128):
        own = _run(_dense, problem)
        torch_error = {name: relative_error(own[name], exact[name]) for name in exact}
        rounding = _rounding(problem, exact)
        tolerance = {name: 2 * torch_error[name] + rounding[name] for name in exact}
    checks = [
        Check(
            implementation,
            name,
            relative_error(value, exact[name]),
            tolerance[name],
            torch_error.get(name),
        )
        for implementation, function in IMPLEMENTATIONS.items()
        for name, value in _run(function, problem).items()
    ]
    tensor = problem.tensor
    return Result(
        layer=problem.layer,
        tensorized_shape=tensor.tensorized_shape,
        rank=tensor.rank,
        weights=tensor.weights is not None,
        input_shape=tuple(problem.x.shape),
        dtype=str(dtype).removeprefix("torch."),
        seed=problem.seed,
        parameters=sum(parameter.numel() for parameter in tensor.parameters()),
        dense_parameters=math.prod(tensor.shape),
        checks=tuple(checks),
        plan=chosen_plan(problem),
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    """``max |got - want| / max |want|`` in float64; infinite where the shapes differ.

    If ``want`` is zero everywhere, it is the largest absolute difference itself.
    """
    if got.shape != want.shape:
        return math.inf
    return _largest(_wide(got) - _wide(want)) / (_largest(want) or 1.0)


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, of complex numbers in complex128."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def _rounding(problem: Problem, exact: dict[str, Tensor]) -> dict[str, float]:
    """Give each quantity a rounding for each factor, relative to its largest value.

    A factor's step rounds its results to the dtype, and its sums, which are float32 at least, a
    few times more.
    """
    squares = _run(_dense, problem.map(lambda t: _wide(t).abs().square()))
    eps = torch.finfo(problem.x.dtype).eps + 4 * torch.finfo(torch.float32).eps
    rounding = problem.tensor.order * eps
    return {
        name: rounding * math.sqrt(_largest(squares[name])) / (_largest(want) or 1.0)
        for name, want in exact.items()
    }


def _largest(values: Tensor) -> float:
    return values.detach().abs().max().item() if values.numel() else 0.0


# What an implementation gives: y, the gradient of x, one for each factor in the tensor's order, and
# that of the weights, if the tensor has them and the implementation gives it.
Outcome = tuple[Tensor, Tensor, list[Tensor], Tensor | None]


def _run(implementation: Callable[[Problem], Outcome], problem: Problem) -> dict[str, Tensor]:
    """Run an implementation and name what it gives."""
    y, dx, factor_grads, weight_grad = implementation(problem)
    sizes = [len(group) for group in problem.groups]
    names = [
        f"d {group}_factors[{d}]"
        for group, size in zip(GROUPS[len(sizes)], sizes, strict=True)
        for d in range(size)
    ]
    quantities = {"y": y, "dx": dx, **dict(zip(names, factor_grads, strict=True))}
    return quantities if weight_grad is None else {**quantities, "d weights": weight_grad}


def _reference(problem: Problem) -> Outcome:
    tensor, order = problem.tensor, len(problem.tensor.tensorized_shape[0])
    with torch.no_grad():
        if problem.layer == "linear":
            y, saved = reference.cp_times_matrix_fwd(tensor, problem.x)
            factor_grads, dx = reference.cp_times_matrix_bwd(tensor, problem.dy, saved)
        else:
            y, saved = reference.cp_conv_fwd(tensor, problem.x, order)
            factor_grads, dx = reference.cp_conv_bwd(tensor, problem.dy, saved)
    return y, dx, factor_grads, None


def _explicit(problem: Problem) -> Outcome:
    weights = problem.tensor.weights
    with torch.no_grad():
        if problem.layer == "linear":
            y, saved = cp_linear_forward(problem.x, *problem.groups, weights=weights)
            dx, *grads = cp_linear_backward(problem.dy, saved)
        else:
            y, kept = cp_conv_forward(problem.x, *problem.groups, weights=weights, padding="same")
            dx, *grads = cp_conv_backward(problem.dy, kept)
    weight_grad = None if weights is None else grads.pop()
    return y, dx, [grad for group in grads for grad in group], weight_grad


def _autograd(problem: Problem, plan: Any = None) -> Outcome:
    def layer(x: Tensor) -> Tensor:
        options = {"weights": problem.tensor.weights, "plan": plan}
        if problem.layer == "linear":
            ins, outs = problem.groups
            return cp_linear(x, ins, outs, **options)
        outs, ins, kernel = problem.groups
        return cp_conv(x, outs, ins, kernel, padding="same", **options)

    return _differentiate(layer, problem)


def _factorized(problem: Problem) -> Outcome:
    """Use a plan that rebuilds no weight; the plan that is chosen may rebuild it."""
    if problem.layer == "linear":
        ins, outs = problem.groups
        route = LinearRoute((len(ins),), (len(outs),))
        return _autograd(problem, LinearPlan(route, route))
    return _autograd(problem, ConvPlan(ConvRoute(), ConvRoute()))


def chosen_plan(problem: Problem) -> str:
    """Say in words which plan the autograd functions follow."""
    first, second, *kernel = problem.tensor.tensorized_shape
    rank, x = problem.tensor.rank, problem.x
    options: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    fmt: LinearFormat | ConvFormat = LinearFormat(first, second, rank)
    rows = math.prod(x.shape[:-1])
    size: tuple[int, ...] | None = None
    if kernel:
        fmt, options["padding"] = ConvFormat(first, second, kernel[0], rank), "same"
        rows, size = x.shape[0], tuple(x.shape[2:])
    asked = requested(fmt, max(rows, 1), size, options, x.dtype, x.device)
    return str(choose(asked))


def _dense(problem: Problem) -> Outcome:
    def layer(x: Tensor) -> Tensor:
        weight = reference.dense(problem.tensor)
        if problem.layer == "linear":
            return x @ weight
        with warnings.catch_warnings():
            # torch warns that for an even kernel it makes a padded copy.
            warnings.simplefilter("ignore", UserWarning)
            return F.conv2d(x, weight, padding="same")

    return _differentiate(layer, problem)


def _differentiate(layer: Callable[[Tensor], Tensor], problem: Problem) -> Outcome:
    """Run a layer and let autograd differentiate it."""
    x = problem.x.detach().clone().requires_grad_()
    factors, weights = list(problem.tensor.factors), problem.tensor.weights
    y = layer(x)
    dx, *grads = torch.autograd.grad(
        y, [x, *factors, *([] if weights is None else [weights])], problem.dy
    )
    return y, dx, grads[: len(factors)], None if weights is None else grads[-1]


IMPLEMENTATIONS: dict[str, Callable[[Problem], Outcome]] = {
    "reference": _reference,
    "explicit": _explicit,
    "autograd": _autograd,
    "factorized": _factorized,
}


def _draw(
    shape: Iterable[tuple[int, ...]],
    rank: int,
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    weights: bool,
) -> Problem:
    """Draw everything from a standard normal; the weights too, so that some are negative."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    an_int(x_shape[0], "batch", least=0)
    rank, weights = positive_int(rank, "rank"), check_flag(weights, "weights")
    for sizes in (x_shape, y_shape):
        check_fits_memory(*sizes)
    generator = torch.Generator(device="cpu").manual_seed(a_seed(seed))

    def normal(*size: int) -> Tensor:
        exact = torch.promote_types(dtype, torch.float64)
        return torch.randn(size, generator=generator, dtype=exact, device="cpu").to(dtype)

    shape = tuple(shape)
    tensor = CPTensor.from_factors(
        shape,
        [normal(mode, rank) for group in shape for mode in group],
        normal(rank) if weights else None,
    )
    return Problem(tensor, normal(*x_shape), normal(*y_shape), seed)


def _two_ints(value: tuple[int, int], name: str) -> tuple[int, int]:
    height, width = value
    return positive_int(height, name), positive_int(width, name)
