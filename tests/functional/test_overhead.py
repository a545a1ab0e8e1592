"""Counted, not timed: what a call of a small linear layer costs beside its arithmetic."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compare import assert_close
from counted_calls import own_calls, python_calls
from polyadic import LinearPlan, LinearRoute
from polyadic import functional as PF
from polyadic.functional import linear as linear_module
from polyadic.functional.boundary import known_calls
from polyadic.kernels import cpu
from polyadic.nn import CPConv2d, CPConvTranspose2d, CPEmbedding, CPLinear
from polyadic.planner import choice
from polyadic.testing import LiveBytes, launches


def test_a_garbage_collection_is_not_counted() -> None:
    """It comes when it likes, and tells whoever wants to know."""

    def told(phase: str, info: dict[str, int]) -> None:
        pass

    gc.callbacks.append(told)
    try:
        assert python_calls(lambda: [[] for _ in range(5000)]) <= 2
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(told)


SMALL = [
    # In and out features, rank, order, rows; operations and Python calls forward, backward.
    pytest.param(16, 10, 2, 2, 4, (9, 55), (23, 70), id="16-10"),
    pytest.param(256, 128, 16, 3, 32, (13, 55), (35, 70), id="256-128"),
]


@pytest.mark.parametrize(("m", "n", "rank", "order", "rows", "forward", "backward"), SMALL)
def test_a_small_layer_makes_few_calls(
    m: int,
    n: int,
    rank: int,
    order: int,
    rows: int,
    forward: tuple[int, int],
    backward: tuple[int, int],
) -> None:
    """Two products and a transposed view; per mode beyond the first a view and a multiplication."""
    layer = CPLinear(m, n, bias=False, rank=rank, order=order)
    route = LinearRoute((order,), (order,))
    plan = LinearPlan(route, route)
    x, grad_y = torch.randn(rows, m, requires_grad=True), torch.randn(rows, n)
    wanted = [x, *layer.parameters()]

    def call() -> Tensor:
        return PF.cp_linear(x, layer.in_factors, layer.out_factors, plan=plan)

    def back(y: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(y, wanted, grad_y)

    # A call settled by an equal plan of another test compares the two, each time.
    known_calls.clear()
    back(call())()
    assert launches(call) <= forward[0]
    assert python_calls(call) <= forward[1]
    assert launches(back(call())) <= backward[0]
    # On AMD's processors each product asks whether oneDNN should make it, which takes two calls.
    asked = 2 * cpu.ONEDNN_IS_FASTER
    assert python_calls(back(call())) <= backward[1] + 2 * asked
    with torch.no_grad():
        layer(x)
        assert python_calls(lambda: layer(x)) <= 35 + 2 * asked


WARM = {
    # Calls and files of a second forward; a Python before 3.12 counts comprehensions too.
    "linear": (lambda: (CPLinear(1024, 1024, rank=64), torch.randn(256, 1024)), (23, 7)),
    "conv": (
        lambda: (CPConv2d(16, 16, 3, padding=1, rank=8), torch.randn(2, 16, 8, 8)),
        (44, 11),
    ),
    "conv, padded by entries": (
        lambda: (
            CPConv2d(16, 16, 3, padding=1, rank=8, padding_mode="circular"),
            torch.randn(2, 16, 8, 8),
        ),
        (47, 11),
    ),
    "conv_transpose": (
        lambda: (CPConvTranspose2d(16, 16, 3, padding=1, rank=8), torch.randn(2, 16, 8, 8)),
        (44, 11),
    ),
    "embedding": (lambda: (CPEmbedding(1000, 64, rank=8), torch.randint(1000, (2, 7))), (31, 9)),
}


@pytest.mark.parametrize("name", WARM)
@pytest.mark.parametrize("onednn", [False, True])
def test_a_second_call_takes_the_short_way(
    name: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On AMD's processors each large product asks one question more, in one file more."""
    monkeypatch.setattr(cpu, "ONEDNN_IS_FASTER", onednn)
    made, (calls, files) = WARM[name]
    calls, files = calls + 2 * onednn, files + onednn
    choice.forget()
    layer, x = made()
    assert own_calls(lambda: layer(x))[0] > 3 * calls
    layer(x)
    found = own_calls(lambda: layer(x))
    assert found[0] <= calls
    assert found[1] <= files


def test_a_split_plan_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more product of factors on each side than with the whole Khatri-Rao matrices."""
    monkeypatch.setattr(cpu, "ONEDNN_IS_FASTER", False)
    layer, x = CPLinear(1024, 1024, rank=64), torch.randn(256, 1024)
    arguments = x, layer.in_factors, layer.out_factors, layer.bias
    route = LinearRoute((1, 2), (1, 2))
    plan = LinearPlan(route, route)
    known_calls.clear()
    assert own_calls(lambda: PF.cp_linear(*arguments, plan=plan))[0] > 50
    assert own_calls(lambda: PF.cp_linear(*arguments, plan=plan))[0] <= 33


def test_the_count_of_calls_can_fail() -> None:
    """The first call, which checks and plans, makes many more."""
    layer, x = CPLinear(24, 18, rank=3), torch.randn(5, 24)
    assert python_calls(lambda: layer(x)) > 100
    assert python_calls(lambda: layer(x)) < 60


def test_a_second_call_checks_and_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = CPLinear(24, 18, rank=3)
    x, longer = torch.randn(2, 5, 24), torch.randn(2, 6, 24)
    first = layer(x)

    def seen(*args: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(linear_module, "_checked", seen)
    assert torch.equal(layer(x), first)
    for other in (longer, x.double(), x.to("meta"), x[..., :12]):
        with pytest.raises(AssertionError):
            layer(other)
    choice.forget()
    with pytest.raises(AssertionError):
        layer(x)


def test_what_was_remembered_is_not_the_values() -> None:
    """Factors changed in any way count at the next call."""
    layer, x = (
        CPLinear(24, 18, rank=3, bias=False, dtype=torch.float64),
        torch.randn(5, 24).double(),
    )
    layer(x)
    for change in (
        lambda f: f.data.mul_(2),
        lambda f: setattr(f, "data", torch.randn_like(f)),
        lambda f: f.data.copy_(torch.randn_like(f)),
    ):
        for factor in layer.cp.factors:
            change(factor)
        assert_close(layer(x), x @ layer.weight.t(), "y")


def test_mistakes_are_named_after_a_right_call() -> None:
    """The remembered call of the same sizes does not let another dtype or rank through."""
    layer, x = CPLinear(24, 18, rank=3, bias=False), torch.randn(5, 24)
    ins, outs = layer.in_factors, layer.out_factors
    PF.cp_linear(x, ins, outs)
    with pytest.raises(TypeError, match="in_factors"):
        PF.cp_linear(x, (ins[0], ins[1].double(), ins[2]), outs)
    with pytest.raises(ValueError, match="same rank"):
        PF.cp_linear(x, (ins[0][:, :1], *ins[1:]), outs)
    with pytest.raises(TypeError, match="x is"):
        PF.cp_linear(x.double(), ins, outs)
    with pytest.raises(ValueError, match="memory"):
        PF.cp_linear(x, ins, outs, memory="most")
    with pytest.raises(ValueError, match="memory"):
        PF.cp_linear(x, ins, outs, memory=["fast"])
    with pytest.raises(TypeError, match="x must be a tensor"):
        PF.cp_linear(x.tolist(), ins, outs)


@pytest.mark.parametrize(
    ("shapes", "rank", "rows"),
    [
        (((4, 4, 16), (4, 4, 8)), 100, 32),
        (((4, 4), (2, 5)), 2, 4),
        (((8, 8, 16), (8, 8, 16)), 512, 256),
    ],
)
def test_a_training_step_needs_no_more_memory_than_dense(
    shapes: tuple[tuple[int, ...], ...], rank: int, rows: int
) -> None:
    """Parameters, input, gradients and all intermediates, at ranks up to beyond break-even."""
    m, n = map(math.prod, shapes)
    cp = CPLinear(m, n, bias=False, rank=rank, in_shape=shapes[0], out_shape=shapes[1])
    x, grad_y = torch.randn(rows, m, requires_grad=True), torch.randn(rows, n)
    peaks = []
    for layer in (cp, torch.nn.Linear(m, n, bias=False)):
        wanted = [x, *layer.parameters()]
        with LiveBytes([grad_y, *wanted]) as live:
            y = layer(x)
            grads = torch.autograd.grad(y, wanted, grad_y)
        assert live.current >= sum(grad.nbytes for grad in grads)
        peaks.append(live.peak)
        del y, grads
    assert peaks[0] <= peaks[1]


IMAGE, TAPS = torch.randn(2, 4, 5, 5), (torch.randn(3, 2), torch.randn(3, 2))
SIDES = (torch.randn(4, 2),), (torch.randn(4, 2),)
RIGHT = {"stride": (1, 1), "padding": 1, "dilation": (1, 1), "groups": 1}


@pytest.mark.parametrize("function", [PF.cp_conv, PF.cp_conv_transpose])
@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("stride", (1.0, 1)),
        ("stride", True),
        ("padding", 1.0),
        ("dilation", (True, 1)),
        ("groups", True),
    ],
)
def test_an_equal_option_of_another_type_is_another(
    function: Callable[..., Tensor], option: str, wrong: Any
) -> None:
    """1.0 and True are equal to 1 and hash alike, but are no strides."""
    function(IMAGE, *SIDES, TAPS, **RIGHT)
    with pytest.raises(TypeError, match=option):
        function(IMAGE, *SIDES, TAPS, **{**RIGHT, option: wrong})


@pytest.mark.parametrize(("option", "wrong"), [("padding_idx", True), ("num_embeddings", 4.0)])
def test_an_equal_option_of_a_lookup_is_another(option: str, wrong: Any) -> None:
    right = {"padding_idx": 1, "num_embeddings": 4}
    PF.cp_embedding(torch.arange(4), *SIDES, **right)
    with pytest.raises(TypeError, match=option):
        PF.cp_embedding(torch.arange(4), *SIDES, **{**right, option: wrong})


def test_a_stack_of_factors_is_no_group_after_a_right_call() -> None:
    x, factors = torch.randn(3, 16), torch.randn(2, 4, 2)
    PF.cp_linear(x, list(factors), list(factors))
    with pytest.raises(TypeError, match="in_factors"):
        PF.cp_linear(x, factors, list(factors))


def test_calls_under_autocast_are_remembered_apart() -> None:
    layer, x = CPLinear(24, 18, rank=3), torch.randn(5, 24)
    known_calls.clear()
    wide = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
        settled = len(known_calls)
        assert torch.equal(layer(x), half)
        assert len(known_calls) == settled == 2
    assert half.dtype == torch.bfloat16
    assert torch.equal(layer(x), wide)


def test_a_tensor_that_a_transform_left_behind() -> None:
    """It counts as the plain tensor in it, as for torch's own operations."""
    layer, left = CPLinear(24, 18, rank=3), []

    def leak(t: Tensor) -> Tensor:
        left.append(t * 2)
        return t.sum()

    x = torch.randn(5, 24)
    torch.func.grad(leak)(x)
    y = layer(left[0])
    assert_close(y, layer(2 * x), "y")
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
