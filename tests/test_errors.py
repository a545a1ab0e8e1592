"""Each mistake of a user has its own sentence: what was expected, what came, how to mend it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polyadic import ConvPlan, ConvRoute, CPTensor, LinearPlan, LinearRoute, reference, tensorize
from polyadic import functional as PF
from polyadic.nn import CPConv1d, CPConv2d, CPConv3d, CPLinear

NAN = float("nan")
Call = Callable[[], Any]


def factors(*modes: int, rank: int = 3, **kwargs: Any) -> list[Tensor]:
    return [torch.ones(mode, rank, **kwargs) for mode in modes]


def linear(
    x: Any = None,
    ins: Any = None,
    outs: Any = None,
    bias: Any = None,
    *,
    function: Any = PF.cp_linear,
    **kwargs: Any,
) -> Any:
    """A linear map 6 → 10 on 4 rows, with one thing changed."""
    x = torch.ones(4, 6) if x is None else x
    ins = factors(2, 3) if ins is None else ins
    outs = factors(5, 2) if outs is None else outs
    return function(x, ins, outs, **({} if bias is None else {"bias": bias}), **kwargs)


def conv(
    x: Any = None,
    outs: Any = None,
    ins: Any = None,
    kernels: Any = None,
    bias: Any = None,
    *,
    function: Any = PF.cp_conv,
    **kwargs: Any,
) -> Any:
    """A 3×3 convolution 4 → 6 of a 7×7 image, with one thing changed."""
    x = torch.ones(2, 4, 7, 7) if x is None else x
    outs = factors(2, 3) if outs is None else outs
    ins = factors(2, 2) if ins is None else ins
    kernels = factors(3, 3) if kernels is None else kernels
    return function(x, outs, ins, kernels, **({} if bias is None else {"bias": bias}), **kwargs)


def linear_plan(ins: tuple[int, ...] = (2,), outs: tuple[int, ...] = (2,)) -> LinearPlan:
    return LinearPlan(LinearRoute(ins, outs), LinearRoute(ins, outs))


CONV_PLAN = ConvPlan(ConvRoute(), ConvRoute())
HALF = {"dtype": torch.float16}
COMPLEX = {"dtype": torch.complex64}
META = {"device": "meta"}


def autocast_of(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The output of a layer under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


# What stands behind both the differentiable function and the explicit forward.
LINEAR: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("x-short", {"x": torch.ones(4, 5)}, ValueError, "x must have shape (..., 6), got (4, 5)"),
    ("x-scalar", {"x": torch.tensor(1.0)}, ValueError, "x must have shape (..., 6), got ()"),
    ("x-list", {"x": [1.0] * 6}, TypeError, "x must be a tensor, got list"),
    ("x-int", {"x": torch.ones(4, 6).long()}, TypeError, "x must be floating point or complex"),
    ("x-bool", {"x": torch.ones(4, 6) > 0}, TypeError, "x must be floating point"),
    (
        "x-complex",
        {"x": torch.ones(4, 6) + 0j},
        TypeError,
        "not mix: make the factors complex by .to(torch.complex64)",
    ),
    (
        "x-real",
        {"x": torch.ones(4, 6), "ins": factors(2, 3, **COMPLEX), "outs": factors(5, 2, **COMPLEX)},
        TypeError,
        "not mix: make x complex by .to(torch.complex64)",
    ),
    (
        "x-complex32",
        {"x": torch.ones(4, 6).to(torch.complex32)},
        TypeError,
        "x must be floating point or complex, got torch.complex32",
    ),
    ("x-dtype", {"x": torch.ones(4, 6).double()}, TypeError, "x is torch.float64, the factors"),
    ("x-device", {"x": torch.ones(4, 6, **META)}, ValueError, "x is on meta, the factors on cpu"),
    ("ins-empty", {"ins": []}, ValueError, "in_factors must hold at least one factor"),
    ("outs-empty", {"outs": ()}, ValueError, "out_factors must hold at least one factor"),
    ("ins-tensor", {"ins": torch.ones(6, 3)}, TypeError, "in_factors must be a sequence"),
    ("outs-none", {"outs": 5}, TypeError, "out_factors must be a sequence"),
    ("ins-of-lists", {"ins": [[1.0], [1.0]]}, TypeError, "in_factors[0] must be a tensor"),
    ("factor-1d", {"ins": [torch.ones(6)]}, ValueError, "must have shape (mode, rank), got (6,)"),
    ("factor-3d", {"outs": [torch.ones(2, 5, 3)]}, ValueError, "must have shape (mode, rank)"),
    ("ranks", {"outs": factors(5, 2, rank=4)}, ValueError, "must have the same rank"),
    ("ranks-in-group", {"ins": [*factors(2), *factors(3, rank=2)]}, ValueError, "the same rank"),
    ("rank-0", {"ins": factors(2, 3, rank=0), "outs": factors(5, 2, rank=0)}, ValueError, "least"),
    ("mode-0", {"outs": factors(5, 0)}, ValueError, "at least"),
    ("factor-dtypes", {"outs": factors(5, 2, **HALF)}, TypeError, "must have one dtype"),
    ("factor-devices", {"outs": factors(5, 2, **META)}, ValueError, "must be on one device"),
    (
        "factors-int",
        {"ins": factors(2, 3, dtype=torch.int32), "outs": factors(5, 2, dtype=torch.int32)},
        TypeError,
        "factors must be floating point or complex, in_factors[0] is torch.int32",
    ),
    ("lambda-shape", {"weights": torch.ones(4)}, ValueError, "weights must have shape (3,)"),
    ("lambda-2d", {"weights": torch.ones(1, 3)}, ValueError, "weights must have shape (3,)"),
    ("lambda-list", {"weights": [1.0] * 3}, TypeError, "weights must be a tensor (R,), got list"),
    ("lambda-dtype", {"weights": torch.ones(3, **HALF)}, ValueError, "weights must be"),
    ("lambda-device", {"weights": torch.ones(3, **META)}, ValueError, "weights must be"),
    ("plan-type", {"plan": CONV_PLAN}, TypeError, "plan must be a polyadic.LinearPlan"),
    ("plan-string", {"plan": "dense"}, TypeError, "plan must be a polyadic.LinearPlan, got str"),
    ("plan-in", {"plan": linear_plan((3,))}, ValueError, "in_groups (3,) cover 3 modes"),
    ("plan-out", {"plan": linear_plan((2,), (1,))}, ValueError, "out_groups (1,) cover 1 modes"),
]
CONV: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("x-channels", {"x": torch.ones(2, 5, 7, 7)}, ValueError, "x must have shape (B, 4, S1, S2)"),
    ("x-dims", {"x": torch.ones(4, 7)}, ValueError, "or (4, S1, S2), got (4, 7)"),
    ("x-5d", {"x": torch.ones(1, 2, 4, 7, 7)}, ValueError, "x must have shape (B, 4, S1, S2)"),
    ("x-int", {"x": torch.ones(2, 4, 7, 7).long()}, TypeError, "x must be floating point"),
    ("x-dtype", {"x": torch.ones(2, 4, 7, 7, **HALF)}, TypeError, "x is torch.float16"),
    ("x-device", {"x": torch.ones(2, 4, 7, 7, **META)}, ValueError, "x is on meta"),
    ("x-none", {"x": "image"}, TypeError, "x must be a tensor, got str"),
    ("kernels-empty", {"kernels": []}, ValueError, "kernel_factors must hold at least one"),
    ("kernels-4", {"kernels": factors(3, 3, 3, 3)}, ValueError, "1 to 3 spatial modes, got 4"),
    ("kernel-ranks", {"kernels": factors(3, 3, rank=2)}, ValueError, "must have the same rank"),
    ("outs-empty", {"outs": []}, ValueError, "out_factors must hold at least one factor"),
    ("ins-empty", {"ins": []}, ValueError, "in_factors must hold at least one factor"),
    ("factor-dtypes", {"kernels": factors(3, 3, **HALF)}, TypeError, "must have one dtype"),
    ("factor-devices", {"ins": factors(2, 2, **META)}, ValueError, "must be on one device"),
    ("lambda-shape", {"weights": torch.ones(2)}, ValueError, "weights must have shape (3,)"),
    ("kernel-too-big", {"x": torch.ones(2, 4, 2, 7)}, ValueError, "does not fit into an input"),
    ("dilated-too-big", {"dilation": 4}, ValueError, "with dilation (4, 4) does not fit"),
    ("empty-image", {"x": torch.ones(2, 4, 0, 7)}, ValueError, "does not fit into an input"),
    ("stride-0", {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ("stride-negative", {"stride": (1, -1)}, ValueError, "stride must be at least 1"),
    ("stride-3", {"stride": (1, 1, 1)}, ValueError, "stride must be an int or a tuple of 2 ints"),
    ("stride-float", {"stride": 1.5}, TypeError, "stride must be an int or a tuple of 2 ints"),
    ("stride-bool", {"stride": True}, TypeError, "stride must be an int or a tuple of 2 ints"),
    ("dilation-0", {"dilation": (0, 1)}, ValueError, "dilation must be at least 1"),
    ("dilation-string", {"dilation": "2"}, TypeError, "dilation must be an int or a tuple"),
    ("padding-negative", {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    ("padding-word", {"padding": "full"}, ValueError, "'same' or 'valid', got 'full'"),
    ("padding-none", {"padding": None}, TypeError, "padding must be an int or a tuple of 2"),
    ("padding-1", {"padding": (1,)}, ValueError, "padding must be an int or a tuple of 2 ints"),
    ("same-stride", {"padding": "same", "stride": 2}, ValueError, "'same' needs stride 1, got"),
    ("plan-type", {"plan": linear_plan()}, TypeError, "plan must be a polyadic.ConvPlan"),
]


def both(
    name: str, call: Any, forward: Any, table: Sequence[tuple[str, dict[str, Any], Any, str]]
) -> list[Any]:
    """Each row for the differentiable function and for the explicit forward."""
    return [
        pytest.param(
            lambda kwargs=kwargs, f=f: call(function=f, **kwargs),
            error,
            text,
            id=f"{f.__name__}-{case}",
        )
        for case, kwargs, error, text in table
        for f in (getattr(PF, name), forward)
    ]


def row(name: str, call: Call, error: type[Exception], text: str) -> Any:
    return pytest.param(call, error, text, id=name)


def saved_linear() -> PF.LinearSaved:
    return linear(function=PF.cp_linear_forward)[1]


def saved_conv() -> PF.ConvSaved:
    return conv(function=PF.cp_conv_forward)[1]


def with_groups(groups: Any) -> CPTensor:
    return CPTensor.from_factors(groups, factors(2, 3))


RANKS: list[tuple[str, Any, type[Exception], str]] = [
    ("nan", NAN, ValueError, "must lie in (0, 1], got nan"),
    ("zero", 0, ValueError, "rank must be a positive int, got 0"),
    ("negative", -3, ValueError, "rank must be a positive int, got -3"),
    ("float-zero", 0.0, ValueError, "must lie in (0, 1], got 0.0"),
    ("float-above-1", 1.5, ValueError, "give an int for an absolute rank"),
    ("float-whole", 8.0, ValueError, "must lie in (0, 1], got 8.0"),
    ("inf", float("inf"), ValueError, "must lie in (0, 1], got inf"),
    (
        "bool",
        True,
        TypeError,
        "a float in (0, 1], 'break-even' or 'faster', got True",
    ),
    ("string", "full", ValueError, "'faster', got 'full'"),
    ("number-as-string", "8", ValueError, "'faster', got '8'"),
    ("none", None, TypeError, "got None (NoneType)"),
    ("tuple", (3, 4), TypeError, "got (3, 4) (tuple)"),
]
RANKED: dict[str, Callable[[Any], Any]] = {
    "linear": lambda rank: CPLinear(8, 6, rank=rank),
    "conv1d": lambda rank: CPConv1d(8, 6, 3, rank=rank),
    "conv2d": lambda rank: CPConv2d(8, 6, 3, rank=rank),
}
LAYERS: list[Any] = [
    row(f"{kind}-rank-{name}", lambda make=make, value=value: make(value), error, text)
    for name, value, error, text in RANKS
    for kind, make in RANKED.items()
] + [
    row("in-features-0", lambda: CPLinear(0, 6, rank=2), ValueError, "in_features must be a"),
    row("in-features-float", lambda: CPLinear(8.0, 6, rank=2), TypeError, "in_features must be a"),
    row("out-features", lambda: CPLinear(8, -6, rank=2), ValueError, "out_features must be a"),
    row("out-features-bool", lambda: CPLinear(8, True, rank=2), TypeError, "out_features must"),
    row("order-0", lambda: CPLinear(8, 6, rank=2, order=0), ValueError, "order must be a positive"),
    row("order-float", lambda: CPLinear(8, 6, rank=2, order=1.5), TypeError, "order must be a"),
    row("in-shape", lambda: CPLinear(8, 6, rank=2, in_shape=(3, 3)), ValueError,
        "in_shape must multiply to 8, got (3, 3) with product 9"),
    row("out-shape", lambda: CPLinear(8, 6, rank=2, out_shape=(6, 0)), ValueError,
        "each mode of out_shape must be a positive int, got 0"),
    row("in-shape-empty", lambda: CPLinear(8, 6, rank=2, in_shape=()), ValueError,
        "in_shape must have at least one mode"),
    row("in-shape-int", lambda: CPLinear(8, 6, rank=2, in_shape=8), TypeError,
        "in_shape must be a sequence of mode sizes"),
    row("in-shape-string", lambda: CPLinear(8, 6, rank=2, in_shape="24"), TypeError,
        "in_shape must be a sequence of mode sizes"),
    row("memory", lambda: CPLinear(8, 6, rank=2, memory="little"), ValueError,
        "memory must be one of 'fast', 'balanced', 'least', got 'little'"),
    row("dtype-int", lambda: CPLinear(8, 6, rank=2, dtype=torch.int64), TypeError,
        "dtype must be floating point of two bytes or more, complex64 or complex128"),
    row("dtype-complex32", lambda: CPLinear(8, 6, rank=2, dtype=torch.complex32), TypeError,
        "two bytes or more, complex64 or complex128, got torch.complex32"),
    row("rank-missing", lambda: CPLinear(8, 6), TypeError, "rank"),
    row("conv-in-channels", lambda: CPConv2d(0, 6, 3, rank=2), ValueError, "in_channels must be a"),
    row("conv-out-channels", lambda: CPConv2d(8, 6.5, 3, rank=2), TypeError, "out_channels must"),
    row("conv-groups", lambda: CPConv2d(8, 6, 3, groups=4, rank=2), ValueError,
        "out_channels must be divisible by groups=4, got 6"),
    row("conv-groups-0", lambda: CPConv2d(8, 6, 3, groups=0, rank=2), ValueError, "groups must be"),
    row("conv-padding-mode", lambda: CPConv2d(8, 6, 3, padding_mode="mirror", rank=2), ValueError,
        "padding_mode must be one of"),
    row("conv-kernel-3", lambda: CPConv2d(8, 6, (3, 3, 3), rank=2), ValueError,
        "kernel_size must be an int or 2 ints"),
    row("conv-kernel-1", lambda: CPConv3d(8, 6, (3,), rank=2), ValueError,
        "kernel_size must be an int or 3 ints"),
    row("conv-kernel-0", lambda: CPConv2d(8, 6, 0, rank=2), ValueError, "kernel_size must be"),
    row("conv-kernel-float", lambda: CPConv2d(8, 6, 3.0, rank=2), TypeError, "kernel_size must be"),
    row("conv-same-stride", lambda: CPConv2d(8, 6, 3, 2, "same", rank=2), ValueError,
        "padding='same' needs stride 1, got stride 2"),
    row("conv-padding", lambda: CPConv2d(8, 6, 3, padding="full", rank=2), ValueError,
        "'same' or 'valid', got 'full'"),
    row("conv-stride", lambda: CPConv1d(8, 6, 3, stride=(1, 1), rank=2), ValueError,
        "stride must be an int or a tuple of 1 ints"),
    row("conv-in-shape", lambda: CPConv2d(8, 6, 3, rank=2, in_shape=(3,)), ValueError,
        "in_shape must multiply to 8"),
    row("conv-memory", lambda: CPConv2d(8, 6, 3, rank=2, memory=None), ValueError,
        "memory must be one of"),
    row("layer-input", lambda: CPLinear(8, 6, rank=2)(torch.ones(3, 7)), ValueError,
        "x must have shape (..., 8), got (3, 7)"),
    row("layer-dtype", lambda: CPLinear(8, 6, rank=2)(torch.ones(3, 8).double()), TypeError,
        "cast one of them or use autocast"),
    row("layer-integers", lambda: CPLinear(8, 6, rank=2)(torch.ones(3, 8).long()), TypeError,
        "x must be floating point or complex, got torch.int64"),
    row("layer-device", lambda: CPLinear(8, 6, rank=2, device="meta")(torch.ones(3, 8)), ValueError,
        "x is on cpu, the factors on meta"),
    row("conv-input", lambda: CPConv2d(8, 6, 3, rank=2)(torch.ones(1, 7, 5, 5)), ValueError,
        "x must have shape (B, 8, S1, S2) or (8, S1, S2), got (1, 7, 5, 5)"),
    row("conv-small-input", lambda: CPConv2d(8, 6, 3, rank=2)(torch.ones(1, 8, 2, 5)), ValueError,
        "the kernel (3, 3) with dilation (1, 1) does not fit"),
]  # fmt: skip
TENSORS: list[Any] = [
    row("no-group", lambda: CPTensor((), 3), ValueError, "at least one group of modes"),
    row("empty-group", lambda: CPTensor(((2,), ()), 3), ValueError,
        "tensorized_shape[1] must have at least one mode"),
    row("flat-shape", lambda: CPTensor((2, 3), 3), ValueError,
        "must have at least one group of modes, got (2, 3)"),
    row("layer-mode-behind", lambda: CPTensor(((2, 3), 4), 3), ValueError,
        "stand in front of the groups, got ((2, 3), 4); write a group of one mode as (size,)"),
    row("mode-float", lambda: CPTensor((2.0, (3,)), 3), TypeError,
        "tensorized_shape[0] must be a sequence of mode sizes"),
    row("layer-of-single", lambda: CPTensor(((2, 3),), 3).layer(0), ValueError,
        "0 layer modes is chosen by as many ints, got (0,)"),
    row("layer-beyond", lambda: CPTensor((2, (3,)), 3).layer(2), IndexError,
        "must lie in [-2, 2), got 2"),
    row("layer-float", lambda: CPTensor((2, (3,)), 3).layer(1.0), TypeError,
        "the index of a layer must be an int, got 1.0"),
    row("joint-none", lambda: CPLinear.joint(0, 4, 6, rank=2), ValueError,
        "layers must be a positive int, got 0"),
    row("joint-empty", lambda: CPLinear.joint([], 4, 6, rank=2), ValueError,
        "layers must be at least one"),
    row("joint-not-a-mapping", lambda: CPLinear.joint([3], 4, 6, rank=2), TypeError,
        "layers[0] must be a mapping of arguments, got 3"),
    row("joint-rank", lambda: CPLinear.joint([{"rank": 3}], 4, 6, rank=2), ValueError,
        "layers[0] must not have a rank of its own"),
    row("joint-shapes", lambda: CPConv2d.joint(
        [{"kernel_size": 3}, {"kernel_size": 2}], 4, 6, rank=2), ValueError,
        "must have one tensorized shape, dtype and device"),
    row("string-shape", lambda: CPTensor("23", 3), TypeError, "tensorized_shape must be a"),
    row("mode-0", lambda: CPTensor(((2, 0),), 3), ValueError, "must be a positive int, got 0"),
    row("mode-float", lambda: CPTensor(((2, 3.0),), 3), TypeError, "must be a positive int"),
    row("rank-0", lambda: CPTensor(((2, 3),), 0), ValueError, "rank must be a positive int, got 0"),
    row("rank-float", lambda: CPTensor(((2, 3),), 0.5), TypeError, "rank must be a positive int"),
    row("rank-nan", lambda: CPTensor(((2, 3),), NAN), TypeError, "rank must be a positive int"),
    row("rank-bool", lambda: CPTensor(((2, 3),), True), TypeError, "rank must be a positive int"),
    row("dtype", lambda: CPTensor(((2, 3),), 3, dtype=torch.int32), TypeError,
        "dtype must be floating point"),
    row("modes", lambda: with_groups(((2, 2),)), ValueError,
        "factors must have the modes (2, 2) of the tensorized shape, got (2, 3)"),
    row("too-few", lambda: with_groups(((2, 3), (4,))), ValueError, "have the modes (2, 3, 4)"),
    row("no-factors", lambda: CPTensor.from_factors(((2,),), []), ValueError, "at least one"),
    row("a-tensor", lambda: CPTensor.from_factors(((2,),), torch.ones(2, 3)), TypeError,
        "factors must be a sequence of tensors"),
    row("ranks", lambda: CPTensor.from_factors(((2, 3),), [*factors(2), *factors(3, rank=4)]),
        ValueError, "must have the same rank"),
    row("lambda", lambda: CPTensor.from_factors(((2, 3),), factors(2, 3), torch.ones(2)),
        ValueError, "weights must have shape (3,), got (2,)"),
    row("from-tltorch", lambda: CPTensor.from_tltorch(torch.ones(3)), TypeError,
        "expected a tltorch CP tensor, got Tensor"),
    row("from-tensorly", lambda: CPTensor.from_tensorly((None, [[1.0]])), TypeError,
        "must be a tensor, got list"),
    row("tensorize-0", lambda: tensorize(0, 3), ValueError, "in_features must be a positive int"),
    row("tensorize-float", lambda: tensorize(4, 2.0), TypeError, "out_features must be a positive"),
    row("tensorize-order", lambda: tensorize(4, 2, 0), ValueError, "order must be a positive int"),
    row("dense", lambda: reference.dense(CPTensor(((2, 3),), 3)), ValueError, "dense needs the"),
    row("dense-type", lambda: reference.dense(torch.ones(3)), TypeError, "expected a CP tensor"),
]  # fmt: skip
OTHERS: list[Any] = [
    row("bias-shape", lambda: linear(bias=torch.ones(6)), ValueError, "bias must have shape (10,)"),
    row("bias-2d", lambda: linear(bias=torch.ones(1, 10)), ValueError, "must have shape (10,)"),
    row("bias-dtype", lambda: linear(bias=torch.ones(10, **HALF)), TypeError, "bias is"),
    row("bias-complex", lambda: linear(bias=torch.ones(10, **COMPLEX)), TypeError,
        "bias is torch.complex64, the factors torch.float32; real and complex numbers do not mix"),
    row("autocast-mixes", lambda: autocast_of(CPLinear(8, 6, rank=2, **COMPLEX), torch.ones(3, 8)),
        TypeError, "x is torch.bfloat16, the factors torch.complex64"),
    row("bias-device", lambda: linear(bias=torch.ones(10, **META)), ValueError, "bias is on meta"),
    row("bias-number", lambda: linear(bias=0.5), TypeError, "bias must be a tensor, got float"),
    row("bias-int", lambda: linear(bias=torch.ones(10).int()), TypeError, "bias must be floating"),
    row("conv-bias", lambda: conv(bias=torch.ones(4)), ValueError, "bias must have shape (6,)"),
    row("memory", lambda: linear(memory="all"), ValueError, "memory must be one of 'fast', "),
    row("memory-none", lambda: conv(memory=None), ValueError, "memory must be one of 'fast', "),
    row("grad-shape", lambda: PF.cp_linear_backward(torch.ones(4, 9), saved_linear()), ValueError,
        "grad_y must have the output's shape (4, 10), got (4, 9)"),
    row("grad-batch", lambda: PF.cp_linear_backward(torch.ones(3, 10), saved_linear()), ValueError,
        "grad_y must have the output's shape (4, 10)"),
    row("grad-dtype", lambda: PF.cp_linear_backward(torch.ones(4, 10).double(), saved_linear()),
        TypeError, "grad_y is torch.float64"),
    row("grad-device", lambda: PF.cp_linear_backward(torch.ones(4, 10, **META), saved_linear()),
        ValueError, "grad_y is on meta"),
    row("grad-none", lambda: PF.cp_linear_backward(None, saved_linear()), TypeError,
        "grad_y must be a tensor, got NoneType"),
    row("saved", lambda: PF.cp_linear_backward(torch.ones(4, 10), saved_conv()), TypeError,
        "saved must come from cp_linear_forward, got ConvSaved"),
    row("conv-saved", lambda: PF.cp_conv_backward(torch.ones(2, 6, 5, 5), saved_linear()),
        TypeError, "saved must come from cp_conv_forward, got LinearSaved"),
    row("conv-grad", lambda: PF.cp_conv_backward(torch.ones(2, 6, 7, 7), saved_conv()), ValueError,
        "grad_y must have the output's shape (2, 6, 5, 5), got (2, 6, 7, 7)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        *both("cp_linear", linear, PF.cp_linear_forward, LINEAR),
        *both("cp_conv", conv, PF.cp_conv_forward, CONV),
        *LAYERS,
        *TENSORS,
        *OTHERS,
    ],
)
def test_a_mistake_is_named(call: Call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)) as caught:
        call()
    assert type(caught.value) is error
    assert not isinstance(caught.value, RuntimeError)


def test_the_calls_are_right_but_for_the_one_mistake() -> None:
    """What the table changes is what is wrong: unchanged, every call works."""
    for function in (PF.cp_linear, PF.cp_linear_forward):
        linear(function=function)
    for function in (PF.cp_conv, PF.cp_conv_forward):
        conv(function=function)
    linear(bias=torch.ones(10), weights=torch.ones(3), plan=linear_plan())
    conv(bias=torch.ones(6), weights=torch.ones(3), plan=CONV_PLAN, padding="same")
    PF.cp_linear_backward(torch.ones(4, 10), saved_linear())
    PF.cp_conv_backward(torch.ones(2, 6, 5, 5), saved_conv())
    assert with_groups(((2, 3),)).rank == 3


def test_a_mistake_is_found_again() -> None:
    """Checks remembered by argument fail the second time too."""
    for _ in range(2):
        with pytest.raises(ValueError, match="must have the same rank"):
            linear(outs=factors(5, 2, rank=4))
        with pytest.raises(TypeError, match="stride must be an int"):
            conv(stride=True)
        conv(stride=1)


def test_mistakes_are_found_under_compile_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CPLinear(8, 6, rank=2), backend="eager")
    with pytest.raises((ValueError, RuntimeError), match=r"x must have shape \(\.\.\., 8\)"):
        compiled(torch.ones(3, 7))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("layer", [CPLinear(8, 6, rank=2), CPConv2d(8, 6, 3, rank=2)])
def test_the_deprecated_tracer_is_refused_by_name(layer: torch.nn.Module) -> None:
    x = torch.ones(3, 8) if isinstance(layer, CPLinear) else torch.ones(1, 8, 5, 5)
    for _ in range(2):
        layer(x)
        with pytest.raises(RuntimeError, match=r"do not support torch\.jit\.trace"):
            torch.jit.trace(layer, (x,), check_trace=False)


def test_a_float_equal_to_an_int_is_refused_though_the_int_was_taken_before() -> None:
    CPConv2d(8, 6, 3, stride=(1, 1), rank=2)
    with pytest.raises(TypeError, match=r"stride must be an int or a tuple of 2 ints"):
        CPConv2d(8, 6, 3, stride=(1.0, 1), rank=2)
