"""One cell's numbers, and what a contestant makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench.cases import Case, ConvCase, LinearCase
from polyadic import reference
from polyadic.tensor import CPTensor

Form = Literal["factors", "out_in", "flat", "weight"]
Layout = Literal["given", "channels_last"]
Family = Literal["ours", "plan", "dense", "tltorch", "accelerated", "einsum", "reference"]


@dataclass(frozen=True)
class Problem:
    """The numbers of one cell, the same for all contestants.

    Args:
        case: the cell.
        x: input.
        grad: gradient of the output.
        cp: the CP tensor.
    """

    case: Case
    x: Tensor
    grad: Tensor
    cp: CPTensor

    @classmethod
    def draw(cls, case: Case, dtype: torch.dtype, device: torch.device | str) -> Problem:
        """Reproducible numbers, those of the CPU's generator on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            cp = CPTensor(case.tensorized_shape, case.rank)
            x, grad = torch.randn(case.x_shape), torch.randn(case.y_shape)
        return cls(case, x.to(device, dtype), grad.to(device, dtype), cp.to(device, dtype))

    def on_meta(self) -> Problem:
        """Strip the numbers, to ask what a contestant would need."""
        cp = CPTensor(self.case.tensorized_shape, self.case.rank, device="meta", dtype=self.x.dtype)
        return Problem(self.case, self.x.to("meta"), self.grad.to("meta"), cp)

    def factors(self) -> list[Tensor]:
        """Fresh leaves with the factors' values."""
        return [leaf(factor) for factor in self.cp.factors]

    def groups(self) -> list[list[Tensor]]:
        """Detached factors, by group of the tensorized shape."""
        return [[f.detach() for f in group] for group in self.cp.factor_groups()]


@dataclass(frozen=True)
class Built:
    """A contestant ready to run.

    Args:
        forward: x → y.
        x: the input in the layout the contestant is given, requiring its gradient.
        parameters: what gets gradients beside x.
        form: format of the parameters.
        plan: the plan it follows, where it follows one.
    """

    forward: Callable[[Tensor], Tensor]
    x: Tensor
    parameters: tuple[Tensor, ...]
    form: Form
    plan: Any = None

    def infer(self) -> Tensor:
        """One forward pass without autograd."""
        with torch.no_grad():
            return self.forward(self.x)

    def train(self, grad: Tensor) -> tuple[Tensor, ...]:
        """One forward and backward pass: gradients of x and of every parameter."""
        return torch.autograd.grad(self.forward(self.x), (self.x, *self.parameters), grad)


@dataclass(frozen=True)
class Contestant:
    """A name and how to build it.

    Args:
        name: unique within a cell.
        family: who it belongs to.
        build: makes it from a problem; may raise NotApplicableError or ModuleNotFoundError.
        layout: ``"given"`` for the contiguous x that every contestant gets; ``"channels_last"``
            for those whose x lies in that layout beforehand, which are compared among themselves.
        plan: the plan it is forced to follow.
        memory: bytes one training step may need, asked on meta tensors first; None: no question.
        compiled: under torch.compile.
        inference: runs forward alone, its parameters are given no gradients.
    """

    name: str
    family: Family
    build: Callable[[Problem], Built]
    layout: Layout = "given"
    plan: Any = None
    memory: int | None = None
    compiled: bool = False
    inference: bool = False


class NotApplicableError(Exception):
    """A contestant cannot do this cell; the message says why."""


def dense_weight(case: Case, form: Form, parameters: Sequence[Tensor]) -> Tensor:
    """Torch's weight, (N, M) or (Cout, Cin, k, k), that parameters of some form stand for."""
    if form == "weight":
        return parameters[0]
    groups: Sequence[Sequence[int]] = case.tensorized_shape
    if form == "out_in":
        groups = groups[::-1]
    elif form == "flat":
        assert isinstance(case, ConvCase)
        channels = case.format
        groups = ((channels.out_channels,), (channels.in_channels,), groups[2])
    weight = reference.dense(SimpleNamespace(tensorized_shape=groups, factors=parameters))
    return weight.t() if isinstance(case, LinearCase) and form == "factors" else weight


def apply_dense(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    """Apply the layer with a dense weight."""
    if isinstance(case, LinearCase):
        return F.linear(x, weight)
    return F.conv2d(x, weight, stride=case.stride, padding=case.padding)


def leaf(tensor: Tensor) -> Tensor:
    """Copy a tensor as one that asks for its gradient."""
    return tensor.detach().clone().requires_grad_()


def in_channels_last(tensor: Tensor) -> Tensor:
    """Copy a (b, c, h, w) tensor into channels_last as one that asks for its gradient."""
    return tensor.detach().contiguous(memory_format=torch.channels_last).requires_grad_()


def plan_record(plan: Any) -> dict[str, Any] | None:
    """Return a plan as a record."""
    return None if plan is None else asdict(plan)
