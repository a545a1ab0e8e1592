"""Every kind of layer traced by torch's compiler for a GPU that the kernels serve, on a CPU.

The compiler is told that tensors are on a GPU, and the planner too, so that what is traced is what
a GPU would run. The operators of the kernels have an implementation for CPUs, so that the compiled
layer has numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.variables import ConstantVariable
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.tensor import TensorVariable

from cases import BY_ID, FEW, params
from cases.protocol import Case
from polyadic import functional
from polyadic import nn as pnn
from polyadic._torch import not_traced
from polyadic.checks import arguments
from polyadic.kernels import backend
from polyadic.planner import choice
from polyadic.planner.request import Request
from polyadic.plans import LinearPlan, LinearRoute

KINDS = ("factorized", "dense")
# Sums in float32, in the order of another way.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that is as strict as that of torch 2.11, and takes each tensor for a GPU's."""
    item, of_constants = BaseListVariable.getitem_const, Request.of_constants

    def checked_item(self: Any, tx: Any, arg: Any) -> Any:
        assert not (arg.is_python_constant() and type(arg.as_python_constant()) is bool), (
            "the compiler of torch 2.11 takes no bool for an index"
        )
        return item(self, tx, arg)

    def on_gpu(constants: tuple[Any, ...]) -> Request:
        return of_constants(constants).at("cuda", constants[3])

    monkeypatch.setattr(BaseListVariable, "getitem_const", checked_item)
    monkeypatch.setattr(
        TensorVariable, "method_attr_is_cuda", lambda self, tx: ConstantVariable.create(True)
    )
    monkeypatch.setattr(Request, "of_constants", staticmethod(on_gpu))
    monkeypatch.setattr(backend, "_why_not", lambda index: None)
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget() -> None:
    """Forget what was compiled, planned or found out."""
    torch._dynamo.reset()
    choice.forget()
    backend._serves.cache_clear()


def gradients(call: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output, and its gradients by those leaves that have one."""
    y = call()
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator, dtype=y.real.dtype).to(y.dtype)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad_y)]


# Whether x and whether the parameters need a gradient.
NEEDS = ((True, True), (False, True), (True, False))


def check(
    call: Callable[..., Tensor],
    x: Tensor,
    parameters: list[Tensor],
    needs: Sequence[tuple[bool, bool]] = NEEDS[:1],
) -> list[str]:
    """Compare a call with itself compiled, for several choices of what needs a gradient.

    Returns:
        The code of all graphs.
    """
    code: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        code.append(graph.code)
        return make_boxed_func(graph.forward)

    differentiable = x.is_floating_point() or x.is_complex()
    for of_x, of_rest in needs:
        for leaf in parameters:
            leaf.requires_grad_(of_rest)
        given = x.detach().clone().requires_grad_(of_x and differentiable)
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        found, expected = (
            gradients(lambda c=c, given=given: c(given), [given, *parameters])
            for c in (compiled, call)
        )
        for got, want in zip(found, expected, strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            error, scale = (got - want).abs().max(), want.abs().max()
            assert error <= TOLERANCE * scale, f"off by {error:.1e} where entries reach {scale:.1e}"
    return code


@pytest.mark.parametrize("case", params(FEW))
def test_a_layer(case: Case) -> None:
    layer: nn.Module = case.make(torch.float32)
    check(layer, case.leaves(torch.float32).x, list(layer.parameters()))


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("linear-wide-lambda", "fast"),
        ("linear-wide-lambda", "least"),
        ("joint-large", "balanced"),
        ("head-large", "balanced"),
    ],
)
def test_a_layer_of_large_matrices(name: str, memory: str) -> None:
    """A GPU contracts with whole Khatri-Rao matrices here."""
    case = BY_ID[name]
    layer: nn.Module = case.make(torch.float32, memory=memory)
    x, parameters = case.leaves(torch.float32).x, list(layer.parameters())
    code = "".join(check(layer, x, parameters, NEEDS))
    assert "polyadic.khatri_rao" in code
    assert "polyadic.mttkrp" in code


@pytest.mark.parametrize("separable", [False, True])
def test_a_spectral_convolution(separable: bool) -> None:
    layer = pnn.CPSpectralConv2d(4, 4, (3, 4), rank=4, separable=separable)
    check(layer, torch.randn(2, 4, 5, 6), list(layer.parameters()))


@pytest.mark.parametrize("joint", [False, True])
def test_layers_that_share_an_input(joint: bool) -> None:
    sizes: dict[str, Any] = {"rank": 8, "in_shape": (4, 6), "out_shape": (4, 5)}
    if joint:
        layers = pnn.CPLinear.joint(3, 24, 20, **sizes)
    else:
        layers = [pnn.CPLinear(24, 20, **sizes) for _ in range(3)]
    shared = pnn.CPSharedInput(layers)
    parameters = list(shared.parameters())
    code = check(lambda x: torch.cat(shared(x)), torch.randn(7, 24), parameters)
    assert "polyadic.mttkrp" in "".join(code)


def linear_plans() -> Iterator[LinearPlan]:
    """All that the kernels serve, in either direction."""
    routes = [LinearRoute((2,), (2,), kind, by) for kind in KINDS for by in ("torch", "triton")]
    for forward, backward in itertools.product(routes, routes):
        if "triton" in (forward.by, backward.by):
            yield LinearPlan(forward, backward, "x and z")


@pytest.mark.parametrize("plan", list(linear_plans()), ids=str)
def test_each_plan_of_a_linear_map(plan: LinearPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "why_not", not_traced(lambda *place: None))
    leaves = [torch.randn(m, 5) for m in (4, 6, 3, 5)]
    bias = torch.randn(15)

    def call(x: Tensor) -> Tensor:
        return functional.cp_linear(x, leaves[:2], leaves[2:], bias, plan=plan)

    check(call, torch.randn(7, 24), [*leaves, bias])
