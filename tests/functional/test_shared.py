"""Layers that share an input: the values, derivatives and costs of separate layers, x once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

import polyadic
from cases.weights import by_einsum
from compare import assert_close
from counted_calls import own_calls
from polyadic.functional import cp_linear, cp_linear_shared
from polyadic.functional.boundary import known_calls
from polyadic.kernels import cpu, pairs
from polyadic.nn import CPLinear, CPSharedInput
from polyadic.planner import choice
from polyadic.plans import LinearPlan, LinearRoute
from polyadic.testing import Flops, Operations, kept_bytes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shared:
    """Layers of one input.

    Args:
        id: name of the row.
        layers: in modes, out modes and rank of each.
        lead: leading dimensions of x.
        scaled: which have a λ.
        biased: which have a bias.
        same: layers that have the in factors of the first.
    """

    id: str
    layers: tuple[tuple[Shape, Shape, int], ...]
    lead: Shape = (3,)
    scaled: tuple[int, ...] = ()
    biased: tuple[int, ...] = ()
    same: tuple[int, ...] = ()

    def leaves(self, dtype: torch.dtype = torch.float64) -> list[Any]:
        """x, then in factors, out factors, biases and λ of each layer."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            exact = torch.promote_types(dtype, torch.float64)
            drawn = torch.randn(*shape, generator=generator, dtype=exact)
            return drawn.to(dtype).requires_grad_()

        features = 1
        for mode in self.layers[0][0]:
            features *= mode
        x = normal(*self.lead, features)
        ins = [[normal(m, rank) for m in modes] for modes, _, rank in self.layers]
        for i in self.same:
            ins[i] = ins[0]
        outs = [[normal(n, rank) for n in modes] for _, modes, rank in self.layers]
        sizes = [torch.Size(modes).numel() for _, modes, _ in self.layers]
        biases = [normal(n) if i in self.biased else None for i, n in enumerate(sizes)]
        scales = [
            normal(rank) if i in self.scaled else None for i, (_, _, rank) in enumerate(self.layers)
        ]
        return [x, ins, outs, biases, scales]


ROWS = [
    Shared("one", (((2, 3), (5,), 3),)),
    Shared("qkv", (((2, 3, 2), (2, 2), 4),) * 3, (2, 3), biased=(0, 1, 2)),
    Shared("mixed-ranks", (((2, 3), (5,), 3), ((2, 3), (2, 2), 7), ((2, 3), (3,), 1)), scaled=(1,)),
    Shared("mixed-modes", (((2, 3), (5,), 3), ((6,), (2, 2), 2), ((3, 2), (3,), 4)), biased=(2,)),
    Shared("same-in-factors", (((2, 3), (5,), 3), ((2, 3), (2, 2), 3), ((2, 3), (3,), 3)),
           scaled=(0, 2), same=(1, 2)),
    Shared("vector", (((2, 3), (4,), 3), ((2, 3), (2,), 2)), ()),
    Shared("no-rows", (((2, 3), (4,), 3), ((2, 3), (2,), 2)), (0,)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Layers are called together, however small x is."""
    known_calls.clear()
    monkeypatch.setattr(cpu, "better_apart", lambda elements: False)
    yield monkeypatch
    known_calls.clear()


each = pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
not_empty = pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id) for row in ROWS if row.lead != (0,)]
)


def dense(x: Tensor, ins: Any, outs: Any, biases: Any, scales: Any) -> tuple[Tensor, ...]:
    """By the dense weight of each layer."""
    found = []
    for i, (a, c) in enumerate(zip(ins, outs, strict=True)):
        weight = by_einsum([*a, *c], *([] if scales[i] is None else [scales[i]]))
        y = x @ weight.reshape(x.shape[-1], -1)
        found.append(y if biases[i] is None else y + biases[i])
    return tuple(found)


def shared(x: Tensor, ins: Any, outs: Any, biases: Any, scales: Any) -> tuple[Tensor, ...]:
    return cp_linear_shared(x, ins, outs, biases, weights=scales)


def flat(leaves: list[Any]) -> list[Tensor]:
    """Every tensor once."""
    x, ins, outs, biases, scales = leaves
    every = [x, *(f for group in (*ins, *outs) for f in group), *biases, *scales]
    return list({id(t): t for t in every if t is not None}.values())


def as_function(leaves: list[Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ``flat(leaves)``."""
    x, ins, outs, biases, scales = leaves
    places = {id(t): i for i, t in enumerate(flat(leaves))}

    def function(*tensors: Tensor) -> Any:
        def of(t: Tensor | None) -> Any:
            return None if t is None else tensors[places[id(t)]]

        made: dict[int, Any] = {}
        groups = [
            [made.setdefault(id(group), [of(f) for f in group]) for group in side]
            for side in (ins, outs)
        ]
        return call(of(x), *groups, [of(b) for b in biases], [of(s) for s in scales])

    return function


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_values_and_gradients(row: Shared, dtype: torch.dtype) -> None:
    leaves = row.leaves(dtype)
    got, want = shared(*leaves), dense(*leaves)
    grads = [torch.randn_like(y) for y in want]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_close(g, w, f"y {i}")
    tensors = flat(leaves)
    ours, theirs = (
        torch.autograd.grad(got, tensors, grads),
        torch.autograd.grad(want, tensors, grads),
    )
    for i, (g, w) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(g, w, f"gradient {i}")


def test_a_gpu_pads_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all layers together, and those of each: zeros must meet zeros."""
    row = ROWS[2]
    leaves = row.leaves(torch.float32)
    want = dense(*row.leaves())
    grads = [torch.randn_like(y) for y in want]
    exact = row.leaves()
    theirs = torch.autograd.grad(dense(*exact), flat(exact), grads)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(pairs, "triton_serves", lambda index: False)
    widths: list[int] = []
    made = pairs._khatri_raos

    def noted(*arguments: Any) -> list[Tensor]:
        widths.extend(matrix.shape[1] for matrix in made(*arguments))
        return made(*arguments)

    monkeypatch.setattr(pairs, "_khatri_raos", noted)
    got = shared(*leaves)
    ours = torch.autograd.grad(got, flat(leaves), [g.float() for g in grads])
    assert set(widths) == {8, 16}
    for g, w in zip((*got, *ours), (*want, *theirs), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


@not_empty
def test_gradcheck(row: Shared) -> None:
    leaves = row.leaves()
    function = as_function(leaves, shared)
    assert gradcheck(function, flat(leaves), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, flat(leaves), fast_mode=True, check_fwd_over_rev=True)


@not_empty
def test_transforms(row: Shared) -> None:
    leaves = row.leaves()
    tensors = [t.detach() for t in flat(leaves)]
    ours, theirs = as_function(leaves, shared), as_function(leaves, dense)

    def total(function: Any) -> Any:
        return lambda *ts: sum(y.square().sum() for y in function(*ts))

    everything = tuple(range(len(tensors)))
    for g, w in zip(
        grad(total(ours), everything)(*tensors),
        grad(total(theirs), everything)(*tensors),
        strict=True,
    ):
        assert_close(g, w, "torch.func.grad")
    tangents = tuple(torch.randn_like(t) for t in tensors)
    got, want = (jvp(f, tuple(tensors), tangents)[1] for f in (ours, theirs))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, "jvp")
    xs = torch.randn(4, *tensors[0].shape, dtype=torch.float64)
    dims = (0, *[None] * (len(tensors) - 1))
    got, want = (vmap(f, dims)(xs, *tensors[1:]) for f in (ours, theirs))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, "vmap")


@each
def test_one_layer_not_asked_for(row: Shared) -> None:
    """Outputs that nobody differentiates cost no gradient, and spoil none."""
    leaves = row.leaves()
    last = shared(*leaves)[-1]
    last.sum().backward()
    want = torch.autograd.grad(dense(*leaves)[-1].sum(), leaves[0])[0]
    assert_close(leaves[0].grad, want, "x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_separate_layers(dtype: torch.dtype) -> None:
    row = Shared("half", (((8, 8), (7, 9), 24), ((8, 8), (5, 5), 17)), (40,), biased=(0,))
    exact = dense(*row.leaves())
    low = row.leaves(dtype)
    x, ins, outs, biases, _ = low
    separate = [cp_linear(x, a, c, b) for a, c, b in zip(ins, outs, biases, strict=True)]
    for got, apart, want in zip(shared(*low), separate, exact, strict=True):
        assert got.dtype == dtype
        error, allowed = ((y.double() - want).norm() / want.norm() for y in (got, apart))
        assert error <= 2 * allowed


def module(joint: bool = False) -> CPSharedInput:
    torch.manual_seed(0)
    if joint:
        return CPSharedInput(CPLinear.joint(3, 24, 20, rank=5, dtype=torch.float64))
    kinds = [CPLinear(24, n, n != 9, rank=r, dtype=torch.float64) for n, r in ((20, 5), (9, 7))]
    return CPSharedInput(kinds)


@pytest.mark.parametrize("joint", [False, True])
def test_the_module_is_its_layers(joint: bool) -> None:
    shared_input = module(joint)
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    wanted = [x, *shared_input.parameters()]
    got, want = shared_input(x), tuple(layer(x) for layer in shared_input.layers)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, "y")
    ours, theirs = (
        torch.autograd.grad([y.square().sum() for y in ys], wanted) for ys in (got, want)
    )
    for g, w in zip(ours, theirs, strict=True):
        assert_close(g, w, "gradient")
    parameters: dict[str, Tensor] = dict(shared_input.named_parameters())
    assert functional_call(shared_input, parameters, (x,))[0].shape == (2, 3, 20)


@pytest.mark.parametrize("joint", [False, True])
def test_compiled_in_one_graph(joint: bool) -> None:
    shared_input = module(joint)
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(shared_input, fullgraph=True, backend="aot_eager")
    wanted = [x, *shared_input.parameters()]
    ours, theirs = (
        torch.autograd.grad([y.square().sum() for y in call(x)], wanted)
        for call in (compiled, shared_input)
    )
    for g, w in zip(ours, theirs, strict=True):
        assert_close(g, w, "gradient")
    exported = torch.export.export(shared_input, (x,)).module()
    assert_close(exported(x)[0], shared_input(x)[0], "exported")


def test_frozen_layers_are_called_by_themselves() -> None:
    shared_input = module().eval()
    x = torch.randn(7, 24, dtype=torch.float64)
    want = shared_input(x)
    polyadic.freeze(shared_input, batch=7)
    for g, w in zip(shared_input(x), want, strict=True):
        assert_close(g, w, "y")


def test_autocast() -> None:
    shared_input = module().float()
    x = torch.randn(7, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ys = shared_input(x)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    torch.autograd.backward([y.float().sum() for y in ys])
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in shared_input.parameters()
    )


def three(joint: bool, m: int, n: int, rank: int) -> Any:
    """Layers of a joint weight, or siblings."""
    if joint:
        return CPLinear.joint(3, m, n, rank=rank)
    return [CPLinear(m, n, rank=rank) for _ in range(3)]


@pytest.mark.parametrize("joint", [False, True])
def test_x_is_kept_once(joint: bool) -> None:
    layers = three(joint, 512, 384, 6)
    shared_input = CPSharedInput(layers)
    x = torch.randn(64, 512, requires_grad=True)
    factors = list(shared_input.parameters())
    kept = kept_bytes(lambda: shared_input(x), leave_out=factors)
    columns = 6 * (1 if joint else 3)
    # x, every Z, and the factors that were put side by side or scaled.
    side_by_side = columns * sum(layers[0].in_shape)
    scales = 3 * 6 * 4 if joint else 0
    assert kept <= 4 * (64 * 512 + 64 * columns + side_by_side + scales)


@pytest.mark.parametrize("joint", [False, True])
def test_flops_and_products_of_the_size_of_x(joint: bool) -> None:
    rank, rows, m, n = 8, 256, 512, 384
    shared_input = CPSharedInput(three(joint, m, n, rank))
    x = torch.randn(rows, m, requires_grad=True)
    with Flops() as counter, Operations() as seen:
        torch.autograd.backward([y.sum() for y in shared_input(x)])
    columns = rank if joint else 3 * rank
    assert counter.total == 3 * 2 * rows * (m * columns + n * 3 * rank)
    # Z, dX and dKA once, and three products of each layer's out half.
    names = [name for name in seen.names if name.split(".")[1] in ("mm", "addmm", "bmm")]
    assert len(names) == 3 + 3 * 3


def products(call: Callable[[], Any]) -> int:
    with Operations() as seen:
        call()
    return sum(name.split(".")[1] in ("mm", "addmm", "bmm") for name in seen.names)


@each
def test_layers_are_called_one_after_the_other_where_that_is_faster(
    row: Shared, together: pytest.MonkeyPatch
) -> None:
    leaves = row.leaves()
    once = products(lambda: shared(*leaves))
    want = shared(*leaves)
    together.undo()
    known_calls.clear()
    for found in (shared(*leaves), shared(*leaves)):
        for g, w in zip(found, want, strict=True):
            assert_close(g, w, "y")
    siblings = len(row.layers) > 1 and not row.same
    assert (products(lambda: shared(*leaves)) > once) == (siblings and row.id != "mixed-modes")
    if siblings:
        together.setattr(cpu, "TOGETHER_FROM_ELEMENTS", 0)
        known_calls.clear()
        assert products(lambda: shared(*leaves)) == once
        with torch.no_grad():
            shared(*leaves)
            assert products(lambda: shared(*leaves)) >= once


def test_a_second_call_takes_the_short_way() -> None:
    shared_input = module()
    x = torch.randn(7, 24, dtype=torch.float64)
    choice.forget()
    first = own_calls(lambda: shared_input(x))[0]
    assert 3 * own_calls(lambda: shared_input(x))[0] < first


def test_options_of_one_layer_are_refused_by_name() -> None:
    layer = CPLinear(24, 20, rank=5)
    x, groups = torch.randn(3, 24), ([layer.in_factors], [layer.out_factors])
    with pytest.raises(ValueError, match="plan= is not supported"):
        cp_linear_shared(
            x, *groups, plan=LinearPlan(LinearRoute((3,), (3,)), LinearRoute((3,), (3,)))
        )
    with pytest.raises(ValueError, match=r'memory="least" is not supported'):
        cp_linear_shared(x, *groups, memory="least")
    with pytest.raises(ValueError, match="memory"):
        cp_linear_shared(x, *groups, memory="most")
    assert_close(
        cp_linear_shared(x, *groups, memory="fast")[0],
        cp_linear_shared(x, *groups)[0],
        "y",
    )


def test_layers_that_keep_the_input_alone_still_do() -> None:
    layers = [CPLinear(512, 384, rank=6, memory="least") for _ in range(2)]
    shared_input = CPSharedInput(layers)
    x = torch.randn(64, 512, requires_grad=True)
    kept = kept_bytes(lambda: shared_input(x), leave_out=list(shared_input.parameters()))
    assert kept == 4 * 64 * 512


FACTOR = torch.randn(6, 3)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((FACTOR, [[FACTOR]]), TypeError, "in_factors must be a sequence"),
        (([], []), ValueError, "at least one layer"),
        (([[FACTOR]], [[FACTOR], [FACTOR]]), ValueError, "out_factors must hold one group"),
        (([[FACTOR]], [[FACTOR]], [None, None]), ValueError, "biases must have one entry"),
        (([[FACTOR]], [[FACTOR]], torch.zeros(6)), TypeError, "biases must be None or"),
        (([[FACTOR]], [[torch.randn(6, 4)]]), ValueError, "rank"),
        (([[torch.randn(5, 3)]], [[FACTOR]]), ValueError, "x"),
        (([[FACTOR]], [[FACTOR]], [torch.zeros(5)]), ValueError, "bias must have shape"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        cp_linear_shared(torch.randn(2, 6), *arguments)


def test_wrong_layers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"layers\[1\] must be a CPLinear"):
        CPSharedInput([CPLinear(6, 4, rank=2), nn.Linear(6, 4)])
    with pytest.raises(ValueError, match="same in_features"):
        CPSharedInput([CPLinear(6, 4, rank=2), CPLinear(8, 4, rank=2)])
    with pytest.raises(ValueError, match="at least one"):
        CPSharedInput([])
