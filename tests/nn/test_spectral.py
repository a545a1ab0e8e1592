"""Spectral convolutions against torch's whole transforms and one einsum, in complex128."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import polyadic
from cases.spectral import Case, Shape, dense, groups_of, leaves, ours
from compare import assert_all_close, assert_close
from polyadic import SpectralPlan, SpectralRoute
from polyadic import functional as PF
from polyadic.kernels.dft import Analysis, Synthesis
from polyadic.nn import CPSpectralConv1d, CPSpectralConv2d, CPSpectralConv3d
from polyadic.planner import choice
from polyadic.planner import spectral as planner
from polyadic.planner.request import request
from polyadic.testing import Flops, KeptBytes

LAYERS = {1: CPSpectralConv1d, 2: CPSpectralConv2d, 3: CPSpectralConv3d}

GRIDS = [
    ((8,), (3,)), ((9,), (5,)), ((8,), (9,)), ((1,), (1,)), ((2,), (2,)), ((13,), (4,)),
    ((7, 6), (4, 3)), ((6, 8), (8, 5)), ((5, 5), (5, 3)), ((1, 7), (1, 2)), ((7, 1), (3, 1)),
    ((12, 11), (2, 2)), ((4, 5, 6), (3, 4, 3)), ((2, 3, 7), (2, 1, 4)), ((5, 4, 1), (3, 2, 1)),
    ((3, 3, 3), (3, 3, 2)),
]  # fmt: skip
CASES = [Case(size, modes) for size, modes in GRIDS]
CASES += [Case(size, modes, outs=()) for size, modes in GRIDS]
CASES += [
    Case(size, modes, ins, outs, rank)
    for size, modes in (((13,), (4,)), ((7, 6), (4, 3)), ((4, 5, 6), (3, 4, 3)))
    for ins, outs, rank in (
        ((2, 3), (5,), 1),
        ((1,), (1,), 1),
        ((7,), (2, 1, 2), 11),
        ((2, 2), (), 3),
    )
]
CASES += [
    Case(size, modes, norm=norm, out=out, weights=norm != "ortho", bias=norm != "backward")
    for (size, modes, out) in (
        ((9,), (5,), None),
        ((9,), (5,), (14,)),
        ((6, 8), (5, 4), None),
        ((6, 8), (5, 4), (9, 5)),
        ((6, 8), (6, 5), (4, 3)),
        ((4, 5, 6), (3, 4, 3), (7, 3, 5)),
    )
    for norm in ("forward", "backward", "ortho")
]
CASES += [
    Case((7, 6), (4, 3), batch=batch, outs=outs)
    for batch in (None, 0, 1, 17)
    for outs in ((4,), ())
]


def name(case: Case) -> str:
    parts = [case.size, case.modes, case.ins, case.outs, case.rank, case.batch, case.norm, case.out]
    return "-".join(str(part).replace(" ", "") for part in parts)


def gradients(y: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), grad), strict=True))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_values_and_gradients(case: Case, poison: None) -> None:
    named = leaves(case)
    want, got = dense(case, named), ours(case, named)
    assert_close(got, want, "y")
    assert_all_close(gradients(got, named), gradients(want, named))


def plans(case: Case, at_once: tuple[int | None, ...] = (None, 1, 3)) -> list[SpectralPlan]:
    """Every route beside another one, with every transform."""
    ways = list(itertools.product(planner.TRANSFORMS, repeat=case.dims))
    if not case.outs:
        routes = [SpectralRoute(None, "dense", way) for way in ways]
    else:
        routes = [
            SpectralRoute(n, "factorized", ways[i % len(ways)]) for i, n in enumerate(at_once)
        ]
        routes += [SpectralRoute(None, "dense", way) for way in ways]
        routes += [SpectralRoute(2, "factorized", way) for way in ways]
        routes += [SpectralRoute(5, "factorized", ways[0], components_at_once=n) for n in (2, 4)]
    pairs = [*zip(routes, routes, strict=True), *itertools.pairwise(routes)]
    return [SpectralPlan(there, back, keep) for there, back in pairs for keep in (0, 1)]


@pytest.mark.parametrize(
    "case",
    [
        Case((9,), (4,)),
        Case((7, 6), (4, 3), (2, 3)),
        Case((4, 5, 6), (3, 4, 3)),
        Case((7, 6), (4, 3), outs=()),
        Case((6, 8), (5, 4), batch=0),
    ],
    ids=name,
)
def test_every_plan_computes_the_same(case: Case, poison: None) -> None:
    named = leaves(case)
    want = dense(case, named)
    expected = gradients(want, named)
    for plan in plans(case):
        got = ours(case, named, plan=plan)
        assert_close(got, want, str(plan))
        assert_all_close(gradients(got, named), expected)


def test_derivatives_of_all_kinds() -> None:
    for case in (Case((3, 3), (2, 2), (2,), (2,), 2), Case((4,), (2,), (2,), (), 2)):
        named = leaves(case)

        def function(*tensors: Tensor, case: Case = case, keys: Any = tuple(named)) -> Tensor:
            return ours(case, dict(zip(keys, tensors, strict=True)))

        inputs = tuple(named.values())
        assert gradcheck(function, inputs, check_forward_ad=True)
        assert gradgradcheck(function, inputs)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_the_product_alone() -> None:
    case = Case((6, 8), (5, 4), (2, 3))
    named = leaves(case)
    x = torch.randn(3, 6, 5, 4, dtype=torch.complex128).transpose(2, 3).contiguous().mT
    x = x.requires_grad_()
    ins, outs, modes = groups_of(named)
    weight = torch.einsum("ar,br,or,ur,vr,r->abouv", *ins, *outs, *modes, named["weights"])
    want = torch.einsum("biuv,iouv->bouv", x, weight.reshape(6, 4, 5, 4))
    grad = torch.randn_like(want)
    wanted = [x, *ins, *outs, *modes, named["weights"]]
    for memory in ("fast", "balanced", "least"):
        got = PF.cp_spectral_product(x, ins, outs, modes, weights=named["weights"], memory=memory)
        assert_close(got, want, "product")
        pairs = zip(
            torch.autograd.grad(got, wanted, grad, retain_graph=True),
            torch.autograd.grad(want, wanted, grad, retain_graph=True),
            strict=True,
        )
        for i, (ours_, theirs) in enumerate(pairs):
            assert_close(ours_, theirs, f"gradient {i}")
    half = PF.cp_spectral_product(
        x.detach().to(torch.complex32),
        *[[f.to(torch.complex64) for f in g] for g in (ins, outs, modes)],
    )
    assert half.dtype == torch.complex32


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("precision", ["full", "mixed"])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_nothing_but_the_kept_modes_is_kept(dims: int, precision: Any) -> None:
    layer = LAYERS[dims](6, 5, 4, rank=9, precision=precision)
    x = torch.randn(3, 6, *[12] * dims).requires_grad_()
    spectrum = 3 * 6 * 4 ** (dims - 1) * 3 * (8 if precision == "full" else 4)
    with KeptBytes(leave_out=[*layer.parameters(), x]) as kept:
        y = layer(x)
    assert y.requires_grad
    assert kept.total == spectrum
    report = polyadic.explain(layer, batch=3, size=12)
    assert report.chosen.kept_bytes == 3 * 6 * 4 ** (dims - 1) * 3 * 8


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_mixed_precision_rounds_the_spectra() -> None:
    layer = CPSpectralConv2d(4, 4, 6, rank=3)
    x = torch.randn(2, 4, 16, 16)
    full = layer(x)
    layer.precision = "mixed"
    mixed = layer(x)
    assert mixed.dtype == torch.float32
    assert 1e-5 < (mixed - full).abs().max() / full.abs().max() < 4e-3


def test_transforms_of_many_positions_stay_close() -> None:
    """Few modes of many positions are cheapest by a product, which rounds more coarsely there."""
    fmt = polyadic.SpectralFormat((8,), (8,), (3, 2), 5)
    for size in ((32, 1024), (1024, 32), (33, 48), (32, 32)):
        asked = request(fmt, 8, torch.complex64, size=size)
        any_, close = (
            choice.choose(dataclasses.replace(asked, transforms=by)).forward.transforms
            for by in ("any", "close")
        )
        assert any_ == ("dft", "dft")
        assert close == tuple("fft-dft" if n > planner.CLOSE_COLUMNS else "dft" for n in size)
    many = polyadic.SpectralFormat((8,), (8,), (33,), 5)
    asked = request(many, 8, torch.complex64, size=(1024,))
    close = choice.choose(dataclasses.replace(asked, transforms="close")).forward.transforms
    assert close == ("fft",)
    case = Case((33, 48), (3, 2), (5,))
    named = leaves(case)
    spectrum = torch.randn(2, 5, 3, 2, dtype=torch.complex128, requires_grad=True)
    with Flops() as product:
        PF.cp_spectral_product(spectrum, *groups_of(named), weights=named["weights"])
    totals = []
    for by in ("close", "any"):
        with Flops() as counter:
            y = ours(case, named, transforms=by)
        assert_close(y, dense(case, named), by)
        totals.append(counter.total)
    # torch counts products, and no fast transforms: those into the spectrum are fast.
    out_of_it = 2 * 2 * 4 * (4 * 33 * 3 * 2 + 33 * 48 * 2 * 2)
    assert totals[0] == product.total + out_of_it < totals[1]


def test_products_with_few_columns_round_like_fast_transforms() -> None:
    """At the limits of positions and of modes, on a coarse grid and on a fine one."""
    torch.manual_seed(0)
    many = planner.CLOSE_COLUMNS
    for size, modes, ways in ((many, 17, "dft"), (1024, many, "fft-dft")):
        errors = []
        for way in (ways, "fft"):
            into, out = (
                kind((many, size), (many, modes), (way, way), (way, way), 1.0, doubled)
                for kind, doubled in ((Analysis, False), (Synthesis, True))
            )
            x, spectrum = torch.randn(4, 4, many, size), torch.randn(4, 4, many, modes) * (1 + 1j)
            pairs = (into, x, x.double()), (out, spectrum, spectrum.to(torch.complex128))
            for transform, given, wide in pairs:
                want = transform.apply(wide)
                errors.append(float((transform.apply(given) - want).norm() / want.norm()))
        by_product, by_fast = errors[:2], errors[2:]
        assert all(p < 2 * f for p, f in zip(by_product, by_fast, strict=True)), (errors, size)


def test_autocast_leaves_the_precision() -> None:
    layer = CPSpectralConv2d(4, 4, 6, rank=3)
    x = torch.randn(2, 4, 16, 16)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer(x), want, "autocast", 1e-6)
        assert layer(x.bfloat16()).dtype == torch.float32


def test_fewer_modes_are_those_at_the_middle() -> None:
    layer = CPSpectralConv2d(3, 3, (8, 8), rank=4, dtype=torch.float64)
    x = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    for few in (8, 5), (7, 8), (2, 2), (1, 1):
        layer.n_modes = few
        case = Case((9, 10), (8, 5), (3,), (3,), 4, weights=False)
        weight = dict(zip(["in 0", "out 0", "mode 0", "mode 1"], layer.cp.factors, strict=True))
        rows = torch.arange(-(few[0] // 2), few[0] - few[0] // 2) + 4
        weight["mode 0"] = weight["mode 0"][rows]
        weight["mode 1"] = weight["mode 1"][: few[1] // 2 + 1]
        case = Case((9, 10), (few[0], few[1] // 2 + 1), (3,), (3,), 4, weights=False)
        assert_close(layer(x), dense(case, {"x": x, **weight, "bias": layer.bias}), f"{few}")
    with pytest.raises(ValueError, match="at most"):
        layer.n_modes = (9, 8)


def test_the_weight_is_that_of_the_function() -> None:
    layer = CPSpectralConv2d(4, 6, (5, 4), rank=3, in_shape=(2, 2), out_shape=(3, 2))
    assert layer.weight.shape == (4, 6, 5, 3)
    assert layer.format.parameters == sum(f.numel() for f in layer.cp.factors)
    separable = CPSpectralConv2d(4, 4, (5, 4), rank=3, separable=True)
    assert separable.weight.shape == (4, 5, 3)


def test_initial_weights_have_neuraloperators_variance() -> None:
    for separable in (False, True):
        layer = CPSpectralConv2d(32, 32, (16, 16), rank=200, separable=separable)
        weight = layer.weight.clone()
        wanted = 2 / 64
        assert abs(weight.abs().square().mean().item() / wanted - 1) < 0.2
        assert abs(weight.real.square().mean().item() / (wanted / 2) - 1) < 0.25
        assert layer.cp.std == math.sqrt(wanted)


def test_dtypes_change_together() -> None:
    layer = CPSpectralConv2d(3, 4, 4, rank=2)
    x = torch.randn(2, 3, 8, 8)
    want = layer(x)
    layer.double()
    assert {f.dtype for f in layer.cp.factors} == {torch.complex128}
    assert layer.bias.dtype == torch.float64
    assert_close(layer(x.double()).float(), want, "double", 1e-5)
    layer.to(torch.float32)
    assert_close(layer(x), want, "and back", 1e-5)
    made = CPSpectralConv2d(3, 4, 4, rank=2, device="meta").to_empty(device="cpu")
    made.load_state_dict(layer.state_dict())
    assert torch.equal(made(x), layer(x))


def test_resolution() -> None:
    layer = CPSpectralConv2d(3, 4, 4, rank=2, resolution_scaling=2)
    x = torch.randn(2, 3, 8, 9)
    fine = layer(x)
    assert fine.shape == (2, 4, 16, 18)
    layer.resolution_scaling = None
    # The same band-limited function, of which the coarse grid has every other point.
    assert_close(layer(x), fine[..., ::2, ::2], "on the coarse grid", 1e-5)
    assert layer(x, output_size=(5, 7)).shape == (2, 4, 5, 7)
    layer.resolution_scaling = (2.0, 2.0)
    for no_map in (3, None, torch.tensor(1.0), torch.ones(3)):
        with pytest.raises((TypeError, ValueError), match="x must"):
            layer(no_map)


def test_separable_is_a_flag() -> None:
    for wrong in ("no", 2, [], 1.0):
        with pytest.raises(TypeError, match="separable must be True or False"):
            CPSpectralConv2d(4, 4, 4, rank=2, separable=wrong)
    assert CPSpectralConv2d(4, 4, 4, rank=2, separable=1).separable is True


@pytest.mark.parametrize("outs", [(4,), ()])
def test_the_planner_mirrors_the_kernels(outs: Shape) -> None:
    case = Case((9, 8), (5, 4), (3,), outs, 6, weights=False, bias=False)
    named = leaves(case)
    for plan in plans(case):
        asked = request(
            polyadic.SpectralFormat(case.ins, case.outs, case.modes, case.rank),
            2,
            torch.complex128,
            size=case.size,
        )
        forward, backward = planner.steps(asked, plan)
        listed = sum(step.flops for step in (*forward, *backward))
        with Flops() as counter:
            y = ours(case, named, plan=plan)
            torch.autograd.grad(y, list(named.values()), torch.ones_like(y))
        assert listed == counter.total, plan


def test_the_choice() -> None:
    """Large maps go in pieces, small ones at once; with TF32 no product makes a transform."""
    large = request(polyadic.SpectralFormat((64,), (64,), (32, 17), 629), 8, torch.complex64)
    assert choice.choose(large).forward.modes_at_once is not None
    assert (choice.choose(large).backward.components_at_once or 629) < 629
    # What is to be fast keeps the Z of all modes where it is small, and not 22 MB of it.
    middle = polyadic.SpectralFormat((64,), (64,), (16, 9), 77)
    assert choice.choose(request(middle, 8, torch.complex64, memory="fast")).keeps_z
    assert not choice.choose(dataclasses.replace(large, memory="fast")).keeps_z
    small = request(polyadic.SpectralFormat((8,), (8,), (4, 3), 5), 2, torch.complex64)
    assert choice.choose(small).forward.modes_at_once is None
    on_gpu = request(
        polyadic.SpectralFormat((64,), (64,), (16, 9), 64),
        8,
        torch.complex64,
        "cuda",
        size=(64, 64),
    )
    assert choice.choose(on_gpu).forward.modes_at_once is None


def test_explain_names_tucker() -> None:
    layer = CPSpectralConv2d(64, 64, 16, rank=77)
    text = str(polyadic.explain(layer, batch=8, size=64))
    assert "A Tucker weight of as many parameters" in text
    assert "16x9 modes of a grid 64x64" in text
    assert "break-even rank 27" in text


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2, separable=True), ValueError, "multiplies each"),
    (lambda: CPSpectralConv2d(3, 4, (4, 4, 4), rank=2), ValueError, "n_modes"),
    (lambda: CPSpectralConv2d(3, 4, 0, rank=2), ValueError, "n_modes"),
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2, fft_norm="none"), ValueError, "fft_norm"),
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2, precision="half"), ValueError, "precision"),
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2, dtype=torch.complex64), TypeError, "of the maps"),
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2, resolution_scaling=0), ValueError, "resolution"),
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2)(torch.randn(2, 4, 8, 8)), ValueError, "shape"),
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2)(torch.randn(3, 8)), ValueError, "spatial"),
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2)(torch.randn(2, 3, 0, 8)), ValueError, "size 0"),
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2)(torch.randn(2, 3, 8, 8).double()), TypeError, "x"),
    (
        lambda: CPSpectralConv2d(3, 4, 4, rank=2)(torch.randn(2, 3, 8, 8, dtype=torch.complex64)),
        TypeError,
        "x",
    ),
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2).request(2), ValueError, "spatial size"),
    (lambda: CPSpectralConv2d.from_spectral_conv(torch.nn.Linear(2, 2)), TypeError, "CP format"),
    (lambda: SpectralRoute(0), ValueError, "modes_at_once"),
    (lambda: SpectralRoute(transforms=("fast",)), ValueError, "transforms"),
    (lambda: SpectralRoute(components_at_once=3), ValueError, "for pieces of modes"),
    (lambda: CPSpectralConv2d(3, 4, 6, rank=2, max_n_modes=4), ValueError, "at most"),
    (lambda: CPSpectralConv2d(3, 4, 4, rank=2)(torch.randn(2, 3, 8, 8).half()), TypeError, "mixed"),
    (lambda: SpectralPlan(SpectralRoute(), 1), TypeError, "SpectralRoute"),
    (lambda: ours(Case((8,), (3,)), leaves(Case((8,), (3,))), transforms="fft"), ValueError,
     "transforms"),
    (lambda: ours(Case((8,), (3,)), leaves(Case((8,), (3,))), plan=plans(Case((7, 6), (4, 3)))[0]),
     ValueError, "dimensions"),
    (lambda: PF.cp_spectral_conv(torch.randn(1, 2, 4), *[[torch.randn(2, 3)]] * 3), TypeError,
     "complex64 or complex128"),
    (lambda: PF.cp_spectral_product(torch.randn(1, 2, 4, dtype=torch.complex64),
     *[[torch.randn(2, 3, dtype=torch.complex64)]] * 3), ValueError, "x must have shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_input(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("ways", list(itertools.product(planner.TRANSFORMS, repeat=2)))
def test_transforms_are_adjoint(ways: Any) -> None:
    for size, modes in ((6, 8), (4, 5)), ((5, 7), (5, 4)), ((1, 2), (1, 2)):
        for doubled in (False, True):
            into = Analysis(size, modes, ways, ways[::-1], 0.3, doubled)
            x = torch.randn(2, 3, *size, dtype=torch.float64)
            spectrum = torch.randn(2, 3, *modes, dtype=torch.complex128)
            back = into.adjoint()
            assert isinstance(back, Synthesis)
            left = torch.vdot(spectrum.flatten(), into.apply(x).flatten()).real
            assert_close((back.apply(spectrum) * x).sum(), left, "adjoint")
            assert back.adjoint() == into
