"""What only convolutions have: adjoints, output sizes, groups in ranks and variances, mistakes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import polyadic
from cases import BY_ID
from cases.conv import conv
from cases.protocol import truth
from compare import assert_close
from polyadic import ConvPlan, ConvRoute
from polyadic import functional as PF
from polyadic import nn as pnn
from polyadic.kernels.projections import PRODUCT_PER_IMAGE_FROM_POSITIONS

Shape = tuple[int, ...]


@pytest.mark.parametrize(
    "name", ["conv-groups-circular", "conv-transpose-2d", "conv-transpose-groups"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_halves(name: str, dtype: torch.dtype) -> None:
    case = BY_ID[name]
    layer, x = case.make(torch.float32), case.leaves(torch.float32).x
    with torch.autocast("cpu", dtype):
        assert layer(x).dtype == dtype
    low = copy.deepcopy(layer).to(dtype)
    y, want = low(x.to(dtype)), layer(x)
    assert y.dtype == dtype
    assert (y.float() - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize(
    "name", ["conv-groups2", "conv-circular-same-even", "conv-groups-circular"]
)
def test_frozen(name: str) -> None:
    """Frozen layers keep groups and padding mode, whichever form is chosen."""
    case = BY_ID[name]
    layer, x = case.make(), case.leaves().x
    want = layer(x).detach()
    frozen = polyadic.freeze(nn.Sequential(layer), size=case.size)
    assert_close(frozen(x), want, "y")


@pytest.mark.slow
def test_two_layers_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    case = conv("pair", (2, 2), (2, 2), (3, 3), 3, (2,), (5, 4), groups=2, padding=1)
    up = pnn.CPConvTranspose2d(4, 3, 3, 2, rank=4, dtype=torch.float64)
    model, x = nn.Sequential(case.make(), up), case.leaves().x
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), model(x), "y")


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

    @pytest.mark.parametrize(
        ("size", "said"),
        [
            ((9, 13), r"between \(10, 13\) and \(12, 15\)"),
            ((13, 13), r"between \(10, 13\) and \(12, 15\)"),
            ((10,), "must be 2 ints, or 4 as the whole shape"),
        ],
    )
    def test_out_of_reach(self, size: Shape, said: str) -> None:
        layer = pnn.CPConvTranspose2d(3, 4, 3, 3, 1, rank=2)
        with pytest.raises(ValueError, match=said):
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
    [
        ("stride", 1.0),
        ("stride", True),
        ("stride", (1, 1.0)),
        ("padding", 0.0),
        ("groups", 1.0),
        ("dilation", (True, 1)),
    ],
)
def test_what_equals_a_call_seen_before_is_checked_all_the_same(option: str, wrong: Any) -> None:
    x, kernels = torch.randn(1, 4, 5, 5), [torch.randn(3, 2), torch.randn(3, 2)]
    outs, ins = [torch.randn(4, 2)], [torch.randn(4, 2)]
    right: Any = 0 if option == "padding" else 1
    right = (right, right) if isinstance(wrong, tuple) else right
    assert right == wrong
    for _ in range(2):
        PF.cp_conv(x, outs, ins, kernels, **{option: right})
    with pytest.raises(TypeError, match=option):
        PF.cp_conv(x, outs, ins, kernels, **{option: wrong})


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
        x,
        layer.out_factors,
        layer.in_factors,
        layer.kernel_factors,
        layer.bias,
        padding=1,
        plan=ConvPlan(route, route, 1),
    )
    y.square().sum().backward()
    assert x.grad is not None
    assert_close(x.grad, exact, "grad x")
    many = math.prod(size) >= PRODUCT_PER_IMAGE_FROM_POSITIONS
    assert as_given == [layout == torch.channels_last or many]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_padding_modes_under_autocast(mode: str, dims: int, dtype: torch.dtype) -> None:
    """The output in autocast's dtype, gradients in the parameters' own, as without padding."""
    case = conv(
        "padded", (4,), (3,), (3,) * dims, 3, (2,), (5,) * dims, padding=1, padding_mode=mode
    )
    layer, grad_y = case.make(torch.float32), case.grad_y()
    want, grads = truth(case)
    x = case.leaves(torch.float32).x.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x)
        unbatched = layer(x[0])
    assert y.dtype == unbatched.dtype == dtype
    assert (unbatched - y[0]).abs().max() <= 0.05 * y.abs().max()
    named = {"x": x, **case.parameters(layer)}
    got = torch.autograd.grad(y, list(named.values()), grad_y.to(dtype))
    for g, w in zip([y, *got], [want, *(grads[name] for name in named)], strict=True):
        assert (g.double() - w).norm() <= 8 * torch.finfo(dtype).eps * w.norm()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_output_size_is_what_torch_takes_for_one(dims: int) -> None:
    name, size = f"ConvTranspose{dims}d", (12,) * dims
    layer = getattr(pnn, f"CP{name}")(3, 4, 3, stride=2, rank=2)
    dense = getattr(nn, name)(3, 4, 3, stride=2)
    for lead in ((2,), ()):
        x = torch.randn(*lead, 3, *[5] * dims)
        for right in (size, list(size), torch.Size(size), (*lead, 4, *size)):
            assert layer(x, right).shape == dense(x, right).shape
        wrong = [12, "12" * dims, size[1:], (12.0,) * dims, (*size, 12, 12, 12), 12.0, object()]
        for given in [*wrong, *([(4, *size)] if lead else [])]:
            with pytest.raises((TypeError, ValueError), match="output_size must be"):
                layer(x, given)
        with pytest.raises(ValueError, match="output_size must lie between"):
            layer(x, (13,) * dims)
    for no_map in (3, None, torch.tensor(1.0), torch.ones(3)):
        with pytest.raises((TypeError, ValueError), match="x must"):
            layer(no_map, size)
