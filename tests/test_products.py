"""The dense products of the kernels: every way they are made gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from polyadic.kernels import onednn, products
from polyadic.nn import CPLinear
from polyadic.testing import Flops

POINTWISE = hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Calls:
    """Counts what is handed to oneDNN."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.count += 1
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """oneDNN taken for everything it may take, whatever the processor."""
    if not POINTWISE:
        pytest.skip("this torch has no oneDNN product")
    counted = Calls()
    monkeypatch.setattr(products, "faster_products", lambda: True)
    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(products, "_onednn", counted)
    return counted


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


SHAPES = [(1, 5, 3), (37, 130, 50), (300, 256, 17), (512, 365, 48), (256, 1024, 100)]
FORMS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("contiguous", lambda t: t.contiguous()),
    ("transposed", lambda t: t.t().contiguous().t()),
    ("columns of a wider one", lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]),
    ("every second row", lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2]),
]


@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
@pytest.mark.parametrize("left", [form for _, form in FORMS], ids=[name for name, _ in FORMS])
@pytest.mark.parametrize("right", [form for _, form in FORMS], ids=[name for name, _ in FORMS])
def test_products_in_any_layout(
    calls: Calls, n: int, k: int, m: int, left: Any, right: Any
) -> None:
    x, matrix, z = torch.randn(n, k), torch.randn(k, m), torch.randn(n, m)
    bias = torch.randn(m)
    with torch.no_grad():
        made = {
            "times": products.times(left(x), right(matrix)),
            "linear": products.linear(left(x), right(matrix.t()), bias),
            "tall": products.tall(left(x), right(z)),
        }
    exact = {
        "times": x.double() @ matrix.double(),
        "linear": x.double() @ matrix.double() + bias,
        "tall": x.double().t() @ z.double(),
    }
    for name, value in made.items():
        assert relative(value, exact[name]) < 1e-6, name
        assert value.is_contiguous(), name
    plain = left(x).is_contiguous()
    assert calls.count >= (2 if plain and right(matrix).is_contiguous() else 0)


def test_onednn_takes_no_layout_it_is_slow_with(calls: Calls) -> None:
    """A weight that is columns of a wider matrix sends it to a loop a thousand times slower."""
    x, wide = torch.randn(40, 30), torch.randn(30, 64)
    with torch.no_grad():
        products.times(x, wide[:, :32])
        products.linear(x, wide.t()[:, :30][::2])
        products.tall(torch.randn(512, 64)[:, :32], torch.randn(512, 17))
    assert calls.count == 0


def test_long_sums_stay_with_the_blas(calls: Calls) -> None:
    """oneDNN's rounding grows with their length."""
    with torch.no_grad():
        products.times(torch.randn(3, products.CHAIN + 1), torch.randn(products.CHAIN + 1, 2))
        assert calls.count == 0
        products.times(torch.randn(3, products.CHAIN), torch.randn(products.CHAIN, 2))
        assert calls.count == 1


def layer_and_input() -> tuple[CPLinear, Tensor]:
    torch.manual_seed(0)
    return CPLinear(48, 60, rank=20, order=2), torch.randn(300, 48)


def test_a_layer_uses_it_forward_and_backward(calls: Calls) -> None:
    layer, x = layer_and_input()
    y = layer(x.requires_grad_())
    forward = calls.count
    grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert forward == 2
    assert calls.count > forward
    double = CPLinear(48, 60, rank=20, order=2, dtype=torch.float64)
    double.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    wide = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(double(wide).square().sum(), [wide, *double.parameters()])
    for grad, reference in zip(grads, exact, strict=True):
        assert relative(grad, reference) < 1e-6


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_what_looks_on_sees_every_product(calls: Calls) -> None:
    """Graphs, transforms, modes and subclasses: oneDNN's operation has no rule for them."""
    layer, x = layer_and_input()
    parameters = dict(layer.named_parameters())

    def call(values: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, values, (x,))
        return out

    with torch.no_grad():
        expected = layer(x)
        taken = calls.count
        assert taken == 2
        torch.testing.assert_close(
            torch.func.vmap(layer)(x.view(3, 100, 48)).view(300, 60), expected
        )
        with Flops() as counter:
            layer(x)
        assert counter.total == 2 * 300 * 20 * (48 + 60)
        tangent = torch.func.jvp(lambda x: call(parameters, x), (x,), (x,))[1]
        torch.testing.assert_close(tangent, expected - layer.bias)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        torch.testing.assert_close(tangent, expected - layer.bias)
        before, matrix = calls.count, torch.randn(48, 8)
        traced = torch.jit.trace(lambda x: products.times(x, matrix), (x,), check_trace=False)
        assert calls.count == before
        torch.testing.assert_close(traced(x), x @ matrix)
    again = x.clone().requires_grad_()
    loss = layer(again).square().sum()
    before = calls.count
    (grad,) = torch.autograd.grad(loss, again, create_graph=True)
    assert calls.count == before
    (second,) = torch.autograd.grad(grad.sum(), again)
    assert float(second.norm()) > 0
    with torch.backends.mkldnn.flags(enabled=False):
        before = calls.count
        layer(x)
        assert calls.count == before


def gradients(call: Any, layer: CPLinear, x: Tensor) -> list[Tensor]:
    again = x.detach().requires_grad_()
    y = call(again)
    return [y, *torch.autograd.grad(y.square().sum(), [again, *layer.parameters()])]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic-batch"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_graphs_use_it_too(calls: Calls, backend: str, dynamic: bool) -> None:
    """Through an operator of ours, which sees how many rows there are."""
    torch._dynamo.reset()
    layer, x = layer_and_input()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    expected = gradients(layer, layer, x)
    for rows in (300, 280) if dynamic else (300,):
        want = expected if rows == 300 else gradients(layer, layer, x[:rows])
        before = calls.count
        got = gradients(compiled, layer, x[:rows])
        assert calls.count >= before + 4
        for a, b in zip(got, want, strict=True):
            assert relative(a, b.double()) < 1e-6
    with torch.no_grad():
        before = calls.count
        torch.testing.assert_close(compiled(x), expected[0])
        assert calls.count == before + 2


def test_a_graph_for_any_batch_asks_for_each_what_is_faster(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "LARGE", 256 * 48 * 20)
    torch._dynamo.reset()
    layer, x = layer_and_input()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for rows, large in ((300, 2), (200, 0), (256, 2), (31, 0)):
            before, some = calls.count, x[:rows].clone()
            torch.testing.assert_close(compiled(some), layer(some))
            # Compiled and eager, each.
            assert calls.count - before == 2 * large
    assert counter.frame_count == 1


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_transforms_inside_a_compiled_graph(calls: Calls, transform: str) -> None:
    """The operator has no rule for them; a tangent would be lost in silence."""
    torch._dynamo.reset()
    layer, x = layer_and_input()

    def call(x: Tensor) -> Tensor:
        if transform == "vmap":
            return torch.func.vmap(layer)(x.view(3, 100, 48))
        tangent: Tensor = torch.func.jvp(layer, (x,), (x,))[1]
        return tangent

    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), call(x))
        assert float(compiled(x).norm()) > 1
    assert calls.count == 0


@pytest.mark.parametrize("strict", [False, True])
def test_exported_graphs_hold_torch_s_operators_alone(calls: Calls, strict: bool) -> None:
    layer, x = layer_and_input()
    with torch.no_grad():
        exported = torch.export.export(layer.eval(), (x,), strict=strict)
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert names
    assert all(name.startswith("aten.") for name in names), names
    assert calls.count == 0


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_the_vendor_decides(monkeypatch: pytest.MonkeyPatch, vendor: str) -> None:
    """MKL is slower than oneDNN on AMD's processors."""
    monkeypatch.setattr(onednn, "_vendor", lambda: vendor)
    onednn._beside_mkl_on_amd.cache_clear()
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    try:
        assert onednn.faster_products() == (both and POINTWISE and vendor == "AuthenticAMD")
    finally:
        onednn._beside_mkl_on_amd.cache_clear()


@pytest.mark.parametrize("rank", [16, 17, 64, 100, 128])
@pytest.mark.parametrize("width", [64, 128, 1024])
@pytest.mark.parametrize("terms", [255, 256, 1024])
def test_tall_products_in_place_or_turned_are_the_same(
    monkeypatch: pytest.MonkeyPatch, terms: int, width: int, rank: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, z = torch.randn(terms, width), torch.randn(terms, rank)
    with Flops() as counter:
        made = products.tall(x, z)
    assert relative(made, x.double().t() @ z.double()) < 1e-6
    assert made.is_contiguous()
    assert counter.total == 2 * terms * width * rank


def test_what_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sums to few columns or to a number of them that fills no vectors, with one thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert products.better_flipped(1024, 1024, 32)
    assert products.better_flipped(1024, 1024, 365)
    assert not products.better_flipped(1024, 1024, 256)
    assert not products.better_flipped(32, 1024, 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not products.better_flipped(1024, 1024, 32)
