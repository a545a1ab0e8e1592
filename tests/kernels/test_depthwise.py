"""Depthwise convolutions that torch computes by other calls: the numbers stay what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from compare import assert_close
from polyadic.functional import cp_conv, cp_conv_transpose
from polyadic.kernels import cpu
from polyadic.kernels.depthwise import Stage
from polyadic.nn import CPConv1d
from polyadic.plans import ConvPlan, ConvRoute

Pair = tuple[int, int]


@st.composite
def wide_stages(draw: st.DrawFn) -> tuple[Stage, Pair, int, int, bool]:
    """A stage of 4 to 8 columns, a size of x, its channels and images, and whether channels last.

    Some are so small that a whole block of columns sees padding alone.
    """

    def pair(low: int, high: int) -> Pair:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    transposed = draw(st.booleans())
    stride, dilation = pair(1, 3), pair(1, 3)
    extra: Any = ()
    if transposed:
        extra = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    excess = (0, 0) if transposed else pair(0, 1)
    stage = Stage(
        (draw(st.integers(1, 5)), draw(st.integers(4, 8))),
        stride,
        pair(0, 4),
        excess,
        dilation,
        (),
        transposed,
        extra,
    )
    size = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    assume(min(stage.output_size(size)) >= 1)
    return (
        stage,
        size,
        draw(st.sampled_from([1, 3, 8])),
        draw(st.integers(0, 2)),
        draw(st.booleans()),
    )


def tensors(stage: Stage, size: Pair, rank: int, batch: int, last: bool) -> list[Tensor]:
    """Whole numbers, which every order of summation adds exactly: x, taps, gradient of y."""
    x = torch.randint(-4, 5, (batch, rank, *size)).double()
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    taps = torch.randint(-4, 5, (rank, 1, *stage.kernel_size)).double()
    return [x, taps, torch.randint(-4, 5, stage.forward(x, taps, None, rank).shape).double()]


@given(wide_stages())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_gradients_of_wide_stages_are_torchs(drawn: Any) -> None:
    torch.manual_seed(0)
    stage, rank = drawn[0], drawn[2]
    x, taps, grad = tensors(*drawn)
    x.requires_grad_()
    taps.requires_grad_()
    expected = torch.autograd.grad(stage.forward(x, taps, None, rank), [x, taps], grad)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cpu, "WIDE_FROM_ENTRIES", 0)
        got = stage.backward(grad, x, taps, rank, (True, True))
        alone = stage.backward(grad, x, taps, rank, (False, True))
    for mine, right in zip(got, expected, strict=True):
        assert mine is not None
        assert torch.equal(mine, right), stage
    assert alone[0] is None
    assert torch.equal(alone[1], expected[1])


@given(wide_stages())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_complex_stages_by_parts_are_those_by_matrices(drawn: Any) -> None:
    torch.manual_seed(0)
    stage, rank = drawn[0], drawn[2]
    pairs = zip(tensors(*drawn), tensors(*drawn), strict=True)
    x, taps, grad = (torch.complex(re, im) for re, im in pairs)
    bias = torch.complex(torch.arange(rank).double(), torch.ones(rank).double())

    def results() -> list[Any]:
        y = stage.forward(x, taps, bias, rank)
        wanted = (True, True), (True, False), (False, True)
        return [y, *[d for wrt in wanted for d in stage.backward(grad, x, taps, rank, wrt)]]

    expected = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "has_fast_parts", lambda kernel_size, entries: True)
        got = results()
    for mine, right in zip(got, expected, strict=True):
        assert mine is right is None or torch.equal(mine, right), stage


@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives_of_complex_stages_by_parts(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "has_fast_parts", lambda kernel_size, entries: True)
    plan = ConvPlan(ConvRoute(), ConvRoute())

    def call(x: Tensor, *factors: Tensor) -> Tensor:
        a, c, *taps = factors
        if transposed:
            return cp_conv_transpose(x, [a], [c], taps, stride=2, padding=1, plan=plan)
        return cp_conv(x, [c], [a], taps, stride=2, padding=1, plan=plan)

    inputs = [torch.randn(n, 2, dtype=torch.complex128, requires_grad=True) for n in (2, 3, 3, 2)]
    x = torch.randn(2, 2, 4, 3, dtype=torch.complex128, requires_grad=True)
    inputs.insert(0, x)
    with Groups() as groups:
        want = call(*inputs)
    assert groups.seen == [4, 4]
    gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    gradgradcheck(call, inputs, fast_mode=True)
    each = torch.func.vmap(lambda one: call(one.unsqueeze(0), *inputs[1:]).squeeze(0))
    assert_close(each(x), want, "vmap")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    assert_close(compiled, want, "compiled")
    right = torch.autograd.grad(want, inputs, want.detach())
    for mine, d in zip(torch.autograd.grad(compiled, inputs, want.detach()), right, strict=True):
        assert_close(mine, d, "compiled gradient")


@pytest.mark.parametrize("complex_taps", [9, 8])
def test_a_complex_stage_of_many_taps_is_two_real_ones(complex_taps: int) -> None:
    stage = Stage((1, complex_taps), (1, 1), (0, 0), (0, 0), (1, 1))
    re, im = tensors(stage, (16, 16), 32, 2, last=True)[:2]
    x, taps = torch.complex(re, re), torch.complex(im, im)
    with Groups() as groups:
        stage.forward(x, taps, None, 32)
    assert groups.seen == ([64, 64] if complex_taps == 9 else [32])


class Groups(TorchDispatchMode):
    """The groups of every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.seen.append(args[8])
        return func(*args, **(kwargs or {}))


class Widths(TorchDispatchMode):
    """The columns of every weight whose gradient torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[10][1]:
            self.seen.append(args[2].shape[3])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kernel", "seen"), [((5, 5), [3, 2]), ((1, 7), [1]), ((4, 7), [3, 3, 1]), ((7, 3), [3])]
)
def test_torch_is_asked_for_no_more_columns_than_it_is_fast_at(
    kernel: Pair, seen: list[int]
) -> None:
    stage = Stage(kernel, (1, 1), (0, 0), (0, 0), (1, 1))
    x, taps, grad = tensors(stage, (16, 16), 32, 2, last=True)
    with Widths() as widths:
        stage.backward(grad, x, taps, 32, (True, True))
    assert widths.seen == seen


def test_taps_that_see_nothing_but_the_padding_in_front() -> None:
    """A stride and a padding that are wider than the input, of which no output reads an entry."""
    layer = CPConv1d(4, 4, 1, rank=2, stride=20, padding=7, dtype=torch.float64)
    dense = layer.to_conv()
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), dense(x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), [x, layer.bias])
    wanted = torch.autograd.grad(expected.square().sum(), [x, dense.bias])
    torch.testing.assert_close(found, wanted)
