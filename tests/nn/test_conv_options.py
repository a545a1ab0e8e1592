"""Every option of convolutions and transposed convolutions against torch's own, in float64."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vmap

import polyadic
from cases import by_einsum, cp_by_einsum
from compare import assert_close
from polyadic import ConvPlan, ConvRoute, CPTensor
from polyadic import functional as PF
from polyadic import nn as pnn
from polyadic.kernels.projections import MANY

Shape = tuple[int, ...]
ROUTES = [
    *(ConvRoute(layout, form) for layout, form in itertools.product(
        ("channels_last", "channels_first"), ("merged", "separable"))),
    ConvRoute("channels_last", kind="dense"),
    ConvRoute("channels_first", kind="dense"),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A convolution (transposed or not) with its options, and an input.

    ``out_shape`` and ``in_shape`` are those of the kernel: the side that groups share counts the
    channels of one group.
    """

    out_shape: Shape
    in_shape: Shape
    kernel: Shape
    size: Shape
    lead: Shape = (2,)
    rank: int = 3
    transposed: bool = False
    bias: bool = True
    weights: bool = False
    channels_last: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def groups(self) -> int:
        return self.options.get("groups", 1)

    @property
    def in_channels(self) -> int:
        return math.prod(self.in_shape) * (1 if self.transposed else self.groups)

    @property
    def out_channels(self) -> int:
        return math.prod(self.out_shape) * (self.groups if self.transposed else 1)

    def names(self) -> tuple[str, str]:
        kind = "ConvTranspose" if self.transposed else "Conv"
        return f"CP{kind}{len(self.kernel)}d", f"{kind}{len(self.kernel)}d"

    def make(self, **kwargs: Any) -> Any:
        """The layer, with factors of order 1."""
        layer = getattr(pnn, self.names()[0])(
            self.in_channels, self.out_channels, self.kernel, bias=self.bias, rank=self.rank,
            in_shape=self.in_shape, out_shape=self.out_shape, dtype=torch.float64,
            **self.options, **kwargs,
        )  # fmt: skip
        scale = 1 + 0.5 * torch.randn(self.rank, dtype=torch.float64) if self.weights else None
        factors = [torch.randn_like(f) for f in layer.cp.factors]
        layer.cp = CPTensor.from_factors(layer.cp.tensorized_shape, factors, scale)
        return layer

    def dense(self) -> Any:
        """torch's own layer."""
        return getattr(nn, self.names()[1])(
            self.in_channels, self.out_channels, self.kernel, bias=self.bias,
            dtype=torch.float64, **self.options,
        )  # fmt: skip

    def input(self) -> Tensor:
        x = torch.randn(*self.lead, self.in_channels, *self.size, dtype=torch.float64)
        if self.channels_last and self.lead:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        return x.requires_grad_()


def kernel(layer: Any) -> Tensor:
    """The kernel in torch's layout by one einsum; differentiable."""
    full = cp_by_einsum(layer.cp)
    groups = layer.cp.tensorized_shape
    return full.reshape(math.prod(groups[0]), math.prod(groups[1]), *groups[2])


def expected(case: Case, layer: Any, x: Tensor) -> Tensor:
    """What torch's layer computes with the same kernel and bias."""
    values = {"weight": kernel(layer), **({"bias": layer.bias} if case.bias else {})}
    return functional_call(case.dense(), values, (x,))


def with_plan(case: Case, layer: Any, x: Tensor, plan: ConvPlan) -> Tensor:
    function = PF.cp_conv_transpose if case.transposed else PF.cp_conv
    return function(
        x, *layer.cp.factor_groups(), layer.bias, weights=layer.cp.weights, plan=plan,
        **case.options,
    )  # fmt: skip


def assert_agrees(case: Case, plan: ConvPlan | None = None, **kwargs: Any) -> None:
    """Output and all gradients, by the planner's plan or a given one."""
    layer, x = case.make(**kwargs), case.input()
    leaves = [x, *layer.parameters()]
    want = expected(case, layer, x)
    y = layer(x) if plan is None else with_plan(case, layer, x, plan)
    assert_close(y, want, "y")
    assert_close(layer.weight, kernel(layer), "weight")
    grad_y = torch.randn_like(want)
    got_grads = torch.autograd.grad(y, leaves, grad_y)
    want_grads = torch.autograd.grad(want, leaves, grad_y)
    for i, (g, w) in enumerate(zip(got_grads, want_grads, strict=True)):
        assert_close(g, w, f"gradient of leaf {i}")


def conv(name: str, *args: Any, **kwargs: Any) -> Any:
    own = {k: kwargs.pop(k) for k in list(kwargs) if k in Case.__dataclass_fields__}
    return pytest.param(Case(*args, **own, options=kwargs), id=name)


TABLE = [
    conv("reflect", (2, 2), (3,), (3, 3), (5, 4), padding=(2, 1), padding_mode="reflect"),
    conv("replicate-wide", (4,), (3,), (3, 3), (2, 3), padding=5, padding_mode="replicate"),
    conv("circular-once-round", (4,), (3,), (3, 2), (4, 3), padding=3, padding_mode="circular",
         channels_last=True),
    conv("circular-same-even", (4,), (1, 3), (4, 2), (6, 5), padding="same",
         padding_mode="circular"),
    conv("reflect-1d-stride", (2, 3), (2, 2), (5,), (9,), stride=2, padding=4, dilation=2,
         padding_mode="reflect", weights=True),
    conv("replicate-3d", (2,), (3,), (2, 3, 2), (3, 4, 3), padding=(1, 2, 0),
         padding_mode="replicate"),
    conv("circular-valid", (2,), (3,), (3, 3), (5, 5), padding="valid", padding_mode="circular"),
    conv("reflect-unbatched", (2,), (3,), (3, 3), (5, 4), lead=(), padding=1,
         padding_mode="reflect"),
    conv("replicate-1x1", (2, 2), (3,), (1, 1), (3, 4), padding=2, stride=2,
         padding_mode="replicate"),
    conv("reflect-batch0", (2,), (3,), (3, 3), (5, 4), lead=(0,), padding=1,
         padding_mode="replicate"),
    conv("groups2", (2, 3), (2, 2), (3, 3), (5, 4), groups=2, padding=1),
    conv("groups2-channels-last", (2, 3), (2, 2), (3, 3), (5, 4), groups=2, channels_last=True),
    conv("groups3-lambda", (3, 4), (2, 2), (3, 2), (5, 6), groups=3, stride=2, padding="valid",
         weights=True, bias=False),
    conv("depthwise", (2, 3), (1,), (3, 3), (5, 4), groups=6, padding="same"),
    conv("depthwise-multiplier", (2, 5), (1, 1), (5, 3), (7, 5), groups=5, padding=(2, 1)),
    conv("groups-1x1", (4, 3), (2, 2), (1, 1), (4, 5), groups=2, stride=(2, 1)),
    conv("groups-1x1-pad", (4,), (3,), (1, 1), (4, 5), groups=4, padding=1),
    conv("groups-1d", (2, 2), (3,), (4,), (9,), groups=2, padding="same", lead=(3,)),
    conv("groups-1d-unbatched", (2, 2), (3,), (3,), (9,), groups=2, lead=()),
    conv("groups-3d", (4,), (1, 2), (2, 3, 2), (3, 4, 3), groups=2, padding=1, weights=True),
    conv("groups-batch0", (4,), (2,), (3, 3), (5, 4), groups=2, lead=(0,)),
    conv("groups-circular", (2, 3), (2, 2), (3, 3), (5, 4), groups=3, padding=(2, 1),
         stride=(1, 2), dilation=(2, 1), padding_mode="circular", channels_last=True),
    conv("groups-odd-modes", (3, 2), (2,), (3, 3), (4, 4), groups=2, padding=1),
    conv("T-1d", (2, 2), (3,), (3,), (5,), transposed=True, stride=2, padding=1,
         output_padding=1),
    conv("T-1d-k1", (2, 2), (3,), (1,), (5,), transposed=True),
    conv("T-1d-k1-stride", (2, 2), (3,), (1,), (5,), transposed=True, stride=3),
    conv("T-1d-unbatched", (4,), (3,), (4,), (5,), transposed=True, stride=2, lead=()),
    conv("T-2d", (2, 3), (2, 2), (3, 3), (4, 5), transposed=True),
    conv("T-2d-rectangular", (5,), (3,), (4, 2), (4, 3), transposed=True, stride=(2, 3),
         padding=(1, 0), output_padding=(1, 2), weights=True),
    conv("T-2d-dilation", (4,), (3, 1), (3, 2), (4, 3), transposed=True, dilation=(2, 3),
         output_padding=(1, 2), bias=False),
    conv("T-2d-channels-last", (2, 2), (2, 3), (3, 3), (4, 3), transposed=True, stride=2,
         padding=1, channels_last=True),
    conv("T-2d-1x1", (2, 2), (3,), (1, 1), (4, 3), transposed=True, weights=True),
    conv("T-2d-1x1-crop", (2, 2), (3,), (1, 1), (4, 3), transposed=True, padding=1),
    conv("T-2d-1x1-stride-out", (2, 2), (3,), (1, 1), (4, 3), transposed=True, stride=(2, 3),
         output_padding=1),
    conv("T-2d-1x3-stride", (4,), (3,), (1, 3), (4, 3), transposed=True, stride=2,
         output_padding=(1, 0)),
    conv("T-2d-batch0", (4,), (3,), (3, 3), (4, 3), transposed=True, lead=(0,)),
    conv("T-3d", (2,), (3,), (2, 3, 2), (2, 3, 2), transposed=True, stride=(2, 1, 3),
         padding=(0, 1, 0), output_padding=(1, 0, 2)),
    conv("T-groups", (2, 2), (2, 3), (3, 3), (4, 3), transposed=True, groups=3, stride=2,
         output_padding=1),
    conv("T-groups-channels-last-lambda", (3,), (4,), (3, 2), (4, 3), transposed=True, groups=2,
         channels_last=True, weights=True),
    conv("T-depthwise", (1,), (6,), (3, 3), (4, 3), transposed=True, groups=6, stride=2),
    conv("T-groups-1x1", (3,), (2, 2), (1, 1), (4, 3), transposed=True, groups=2),
    conv("T-groups-1d", (2,), (2, 2), (3,), (4,), transposed=True, groups=4, lead=()),
]  # fmt: skip
CASES = {param.id: param.values[0] for param in TABLE}
every_case = pytest.mark.parametrize("case", TABLE)


@every_case
@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
def test_layer(case: Case, memory: str) -> None:
    assert_agrees(case, memory=memory)


@every_case
def test_every_plan(case: Case) -> None:
    """All routes forward, each with another route backward, all that may be kept."""
    for i, route in enumerate(ROUTES):
        assert_agrees(case, ConvPlan(route, ROUTES[(i + 1) % len(ROUTES)], i % 3))
        assert_agrees(case, ConvPlan(route, route, 2))


@every_case
def test_one_gradient_at_a_time(case: Case) -> None:
    layer, x = case.make(), case.input()
    leaves = [x, *layer.parameters()]
    want = expected(case, layer, x)
    grad_y = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, leaves, grad_y)
    for i, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        for route in ROUTES:
            y = with_plan(case, layer, x, ConvPlan(route, route, 1))
            assert_close(torch.autograd.grad(y, [leaf], grad_y)[0], want_grads[i], f"leaf {i}")


PAIR = {
    name: case
    for name, case in CASES.items()
    if not case.transposed and case.options.get("padding_mode", "zeros") == "zeros"
}


@pytest.mark.parametrize("case", PAIR.values(), ids=PAIR)
@pytest.mark.parametrize("route", [None, *ROUTES], ids=str)
def test_the_explicit_pair(case: Case, route: ConvRoute | None) -> None:
    """The plain functions take groups too."""
    layer, x = case.make(), case.input()
    want = expected(case, layer, x)
    grad_y = torch.randn_like(want)
    weights = [] if layer.cp.weights is None else [layer.cp.weights]
    right = torch.autograd.grad(want, [x, *layer.cp.factors, *weights], grad_y)
    with torch.no_grad():
        outs, ins, kernels = layer.cp.factor_groups()
        y, saved = PF.cp_conv_forward(
            x, outs, ins, kernels, weights=layer.cp.weights,
            plan=None if route is None else ConvPlan(route, route), **case.options,
        )  # fmt: skip
        d_x, d_outs, d_ins, d_kernels, *d_weights = PF.cp_conv_backward(grad_y, saved)
    if case.bias:
        want = want - layer.bias.view(-1, *[1] * len(case.kernel))
    assert_close(y, want, "y")
    got = [d_x, *d_outs, *d_ins, *d_kernels, *d_weights]
    for i, (g, w) in enumerate(zip(got, right, strict=True)):
        assert_close(g, w, f"gradient {i}")


SMALL = [
    Case((2,), (1,), (2, 2), (3, 3), (1,), 2, options={"groups": 2, "padding": 1}),
    Case((2,), (1,), (3,), (4,), (1,), 2, weights=True,
         options={"padding": 2, "padding_mode": "reflect"}),
    Case((2,), (1,), (2, 1), (2, 2), (1,), 2, options={"padding": 1, "padding_mode": "circular"}),
    Case((1,), (2,), (2, 2), (2, 2), (1,), 2, True, weights=True,
         options={"stride": 2, "output_padding": 1}),
    Case((1,), (2,), (3,), (3,), (2,), 2, True, options={"groups": 2, "padding": 1}),
]  # fmt: skip
FUNC = ["groups2", "groups-circular", "reflect", "T-2d-rectangular", "T-groups", "T-1d-k1-stride"]


def as_function(case: Case, plan: ConvPlan | None = None) -> tuple[Any, Any, list[Tensor]]:
    """The layer and torch's as functions of the same tensors."""
    layer, x = case.make(), case.input()
    names = [name for name, _ in layer.named_parameters()]

    def cp(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    def dense(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        first = [] if not case.weights else [given["cp.weights"]]
        factors = [given[f"cp.factors.{i}"] for i in range(layer.cp.order)]
        full = by_einsum(factors, *first)
        shape = layer.cp.tensorized_shape
        weight = full.reshape(math.prod(shape[0]), math.prod(shape[1]), *shape[2])
        values_ = {"weight": weight, **({"bias": given["bias"]} if case.bias else {})}
        return functional_call(torch_layer, values_, (x,))

    torch_layer = case.dense()
    return cp, dense, [x.detach(), *(p.detach() for p in layer.parameters())]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.names()[1])
def test_gradcheck(case: Case) -> None:
    cp, _, tensors = as_function(case)
    tensors = [t.requires_grad_() for t in tensors]
    assert gradcheck(cp, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(cp, tensors, check_fwd_over_rev=True)


@every_case
def test_double_backward(case: Case) -> None:
    results = []
    cp, dense, tensors = as_function(case)
    tensors = [t.requires_grad_() for t in tensors]
    grad_y = torch.randn_like(dense(*tensors)).requires_grad_()
    for function in (cp, dense):
        first = torch.autograd.grad(function(*tensors), tensors, grad_y, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(loss, [*tensors, grad_y], materialize_grads=True))
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(got, want, f"second derivative {i}")


@pytest.mark.parametrize("name", FUNC)
def test_func(name: str) -> None:
    cp, dense, tensors = as_function(CASES[name])
    tangents = tuple(map(torch.randn_like, tensors))
    every = tuple(range(len(tensors)))
    results = []
    for f in (cp, dense):
        loss = lambda *t, f=f: f(*t).sin().sum()  # noqa: E731
        stacked = [torch.stack([t, 1 - t]) for t in tensors]
        results.append([
            *grad(loss, every)(*tensors), *jvp(f, tuple(tensors), tangents), vmap(f)(*stacked),
            *vmap(grad(loss, every))(*stacked),
            *[h for row in hessian(loss, (1, 2))(*tensors) for h in row],
        ])  # fmt: skip
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(got, want, f"result {i}")


@pytest.mark.slow
def test_compile_by_inductor() -> None:
    torch._dynamo.reset()
    case = Case((2, 2), (2, 2), (3, 3), (5, 4), options={"groups": 2, "padding": 1})
    down, up = case.make(), pnn.CPConvTranspose2d(4, 3, 3, 2, rank=4, dtype=torch.float64)
    model, x = nn.Sequential(down, up), case.input()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), model(x), "y")


@pytest.mark.parametrize("name", ["groups-circular", "T-2d", "T-groups"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_halves(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    layer, x = case.make().float(), case.input().float()
    with torch.autocast("cpu", dtype):
        assert layer(x).dtype == dtype
    low = copy.deepcopy(layer).to(dtype)
    y, want = low(x.to(dtype)), layer(x)
    assert y.dtype == dtype
    assert (y.float() - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("name", ["groups2", "circular-same-even", "groups-circular"])
def test_frozen(name: str) -> None:
    """Frozen layers keep groups and padding mode, whichever form is chosen."""
    case = CASES[name]
    layer, x = case.make(), case.input().detach()
    want = layer(x).detach()
    frozen = polyadic.freeze(nn.Sequential(layer), size=case.size)
    assert_close(frozen(x), want, "y")


def test_adjoint() -> None:
    """⟨conv(x), y⟩ = ⟨x, conv_transpose(y)⟩ with the sides exchanged, for every option at once."""
    options: dict[str, Any] = {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)}
    outs, ins, taps = (
        [torch.randn(n, 5, dtype=torch.float64) for n in sizes]
        for sizes in ((2, 3), (4, 2), (3, 4))
    )
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    y = torch.randn_like(PF.cp_conv(x, outs, ins, taps, **options))
    back = PF.cp_conv_transpose(y, outs, ins, taps, output_padding=0, **options)
    rest = [have - got for have, got in zip(x.shape[2:], back.shape[2:], strict=True)]
    back = PF.cp_conv_transpose(y, outs, ins, taps, output_padding=rest, **options)
    left = (PF.cp_conv(x, outs, ins, taps, **options) * y).sum()
    assert_close((x * back).sum(), left, "inner product")


class TestOutputSize:
    def test_agrees_with_torch(self) -> None:
        layer = pnn.CPConvTranspose2d(3, 4, 3, 3, 1, rank=2, dtype=torch.float64)
        dense = nn.ConvTranspose2d(3, 4, 3, 3, 1, dtype=torch.float64)
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        for size in ((10, 13), (11, 14), (2, 4, 12, 15)):
            want = functional_call(
                dense, {"weight": layer.weight, "bias": layer.bias}, (x, list(size))
            )
            assert_close(layer(x, size), want, "y")

    @pytest.mark.parametrize("size", [(9, 13), (13, 13), (10,)])
    def test_out_of_reach(self, size: Shape) -> None:
        layer = pnn.CPConvTranspose2d(3, 4, 3, 3, 1, rank=2)
        with pytest.raises(ValueError, match=r"between \(10, 13\) and \(12, 15\)"):
            layer(torch.randn(2, 3, 4, 5), size)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_initial_variance_is_that_of_torch(transposed: bool, groups: int) -> None:
    kind = "ConvTranspose2d" if transposed else "Conv2d"
    layers = [
        getattr(pnn, f"CP{kind}")(16, 32, 3, groups=groups, rank=24, order=2) for _ in range(60)
    ]
    dense = getattr(nn, kind)(16, 32, 3, groups=groups)
    got = torch.stack([layer.weight for layer in layers]).square().mean()
    fan_in = nn.init._calculate_fan_in_and_fan_out(dense.weight)[0]
    assert abs(got.item() * 3 * fan_in - 1) < 0.1
    assert max(layer.bias.abs().max().item() for layer in layers) <= fan_in**-0.5


@pytest.mark.parametrize("transposed", [False, True])
def test_break_even_rank_with_groups(transposed: bool) -> None:
    """R·(own side + g·(taps + shared side)) multiply-adds per position, against the kernel's."""
    kind = pnn.CPConvTranspose2d if transposed else pnn.CPConv2d
    layer = kind(24, 48, 3, groups=4, rank=1)
    own, shared = (24, 12) if transposed else (48, 6)
    assert layer.format.break_even_rank == own * shared * 9 // (own + 4 * (6 + shared))


X = torch.ones(1, 4, 5, 5)
F4 = [torch.ones(4, 2)]
K3 = [torch.ones(3, 2), torch.ones(3, 2)]
ERRORS: list[tuple[str, Any, type[Exception], str]] = [
    ("groups-in", lambda: pnn.CPConv2d(5, 4, 3, groups=2, rank=2), ValueError,
     "in_channels must be divisible by groups=2, got 5"),
    ("groups-out", lambda: pnn.CPConv2d(4, 5, 3, groups=2, rank=2), ValueError,
     "out_channels must be divisible"),
    ("groups-0", lambda: pnn.CPConv2d(4, 4, 3, groups=0, rank=2), ValueError, "groups must be a"),
    ("groups-float", lambda: pnn.CPConv2d(4, 4, 3, groups=2.0, rank=2), TypeError, "groups"),
    ("groups-in-shape", lambda: pnn.CPConv2d(4, 4, 3, groups=2, in_shape=(2, 2), rank=2),
     ValueError, "in_shape must multiply to 2"),
    ("groups-function", lambda: PF.cp_conv(X, F4, F4, K3, groups=3), ValueError, "divisible"),
    ("groups-x", lambda: PF.cp_conv(X, F4, F4, K3, groups=2), ValueError, r"\(B, 8, S1, S2\)"),
    ("mode", lambda: pnn.CPConv2d(4, 4, 3, padding_mode="mirror", rank=2), ValueError,
     "padding_mode must be one of 'zeros', 'reflect', 'replicate', 'circular', got 'mirror'"),
    ("mode-function", lambda: PF.cp_conv(X, F4, F4, K3, padding_mode=1), ValueError,
     "padding_mode must be one of"),
    ("reflect-too-much", lambda: PF.cp_conv(X, F4, F4, K3, padding=5, padding_mode="reflect"),
     ValueError, "size 5 by at most 4"),
    ("circular-too-much", lambda: PF.cp_conv(X, F4, F4, K3, padding=6, padding_mode="circular"),
     ValueError, "size 5 by at most 5"),
    ("same-stride", lambda: pnn.CPConv2d(4, 4, 3, 2, "same", rank=2), ValueError, "needs stride 1"),
    ("T-mode", lambda: pnn.CPConvTranspose2d(4, 4, 3, padding_mode="circular", rank=2),
     ValueError, "padding_mode='zeros' only"),
    ("T-same", lambda: pnn.CPConvTranspose2d(4, 4, 3, padding="same", rank=2), TypeError,
     "padding must be an int or a tuple of 2 ints, got 'same'"),
    ("T-output-padding", lambda: pnn.CPConvTranspose2d(4, 4, 3, output_padding=1, rank=2),
     ValueError, "output_padding must be smaller"),
    ("T-output-padding-length",
     lambda: pnn.CPConvTranspose2d(4, 4, 3, 2, output_padding=(1,), rank=2), ValueError,
     "output_padding must be an int or a tuple of 2"),
    ("T-nothing-left", lambda: PF.cp_conv_transpose(X, F4, F4, K3, padding=4), ValueError,
     "does not fit"),
    ("T-x", lambda: PF.cp_conv_transpose(X[:, :3], F4, F4, K3), ValueError, r"\(B, 4, S1, S2\)"),
    ("T-bias", lambda: PF.cp_conv_transpose(X, F4, F4, K3, torch.ones(4), groups=2), ValueError,
     r"bias must have shape \(8,\)"),
    ("T-groups", lambda: pnn.CPConvTranspose2d(4, 6, 3, groups=4, rank=2), ValueError,
     "out_channels must be divisible by groups=4, got 6"),
    ("T-kernels", lambda: PF.cp_conv_transpose(X, F4, F4, [*K3, *K3]), ValueError, "1 to 3"),
    ("T-plan", lambda: PF.cp_conv_transpose(X, F4, F4, K3, plan="fast"), TypeError, "ConvPlan"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "match"), [pytest.param(*rest, id=name) for name, *rest in ERRORS]
)
def test_errors(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("option", "wrong"),
    [("stride", 1.0), ("stride", True), ("stride", (1, 1.0)), ("padding", 0.0), ("groups", 1.0),
     ("dilation", (True, 1))],
)  # fmt: skip
def test_what_equals_a_call_seen_before_is_checked_all_the_same(option: str, wrong: Any) -> None:
    x, outs, ins, kernels = (torch.randn(1, 4, 5, 5), [torch.randn(4, 2)], [torch.randn(4, 2)],
                             [torch.randn(3, 2), torch.randn(3, 2)])  # fmt: skip
    right: Any = 0 if option == "padding" else 1
    right = (right, right) if isinstance(wrong, tuple) else right
    assert right == wrong
    for _ in range(2):
        PF.cp_conv(x, outs, ins, kernels, **{option: right})
    with pytest.raises(TypeError, match=option):
        PF.cp_conv(x, outs, ins, kernels, **{option: wrong})


def test_a_call_seen_before_sees_new_values_layouts_and_gradients() -> None:
    case = CASES["groups2"]
    layer, x = case.make(), case.input()
    for _ in range(2):
        y = layer(x)
        with torch.no_grad():
            assert_close(layer(x), y, "y without gradients")
            assert_close(layer(x.contiguous(memory_format=torch.channels_last)), y, "y of rows")
            assert_close(y, expected(case, layer, x), "y")
            for parameter in layer.parameters():
                parameter.mul_(1.5)
        assert y.requires_grad


@pytest.mark.parametrize("size", [(5, 5), (9, 9)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_inputs_gradient_has_the_inputs_layout(layout: Any, size: tuple[int, int]) -> None:
    """Autograd would copy another one into a leaf; small ones are cheaper turned than made so."""
    route = ConvRoute("channels_last", "merged")
    layer = pnn.CPConv2d(8, 8, 3, padding=1, rank=5, dtype=torch.float64)
    x = torch.randn(2, 8, *size, dtype=torch.float64).contiguous(memory_format=layout)
    x.requires_grad_()
    dense = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    (exact,) = torch.autograd.grad(dense.square().sum(), x)
    as_given: list[bool] = []
    x.register_hook(lambda grad: as_given.append(grad.is_contiguous(memory_format=layout)))
    y = PF.cp_conv(
        x, layer.out_factors, layer.in_factors, layer.kernel_factors, layer.bias, padding=1,
        plan=ConvPlan(route, route, 1),
    )  # fmt: skip
    y.square().sum().backward()
    assert x.grad is not None
    assert_close(x.grad, exact, "grad x")
    assert as_given == [layout == torch.channels_last or math.prod(size) >= MANY]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_padding_modes_under_autocast(mode: str, dims: int, dtype: torch.dtype) -> None:
    """The output in autocast's dtype, gradients in the parameters' own, as without padding."""
    case = Case((4,), (3,), (3,) * dims, (5,) * dims, options={"padding": 1, "padding_mode": mode})
    layer, x = case.make(), case.input()
    want = expected(case, layer, x)
    leaves = [x, *layer.parameters()]
    grad_y = torch.randn_like(want)
    grads = torch.autograd.grad(want, leaves, grad_y)
    layer, x = layer.float(), x.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x)
        unbatched = layer(x[0])
    assert y.dtype == unbatched.dtype == dtype
    assert (unbatched - y[0]).abs().max() <= 0.05 * y.abs().max()
    got = torch.autograd.grad(y, [x, *layer.parameters()], grad_y.to(dtype))
    for g, w in zip([y, *got], [want, *grads], strict=True):
        assert (g.double() - w).norm() <= 8 * torch.finfo(dtype).eps * w.norm()
