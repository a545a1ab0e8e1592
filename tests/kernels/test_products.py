"""The products of layers' matrices: every way to make them gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from polyadic import _torch
from polyadic.kernels import cpu, products
from polyadic.nn import CPLinear


class Calls:
    """Counts what is handed to oneDNN."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.count += 1
        return _torch.onednn_product(x, weight, bias)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """oneDNN taken for everything it may take, whatever the processor."""
    if not _torch.has_onednn_product:
        pytest.skip("this torch has no product of oneDNN's")
    counted = Calls()
    monkeypatch.setattr(cpu, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(cpu, "ONEDNN_FROM_MULTIPLICATIONS", 0)
    monkeypatch.setattr(products, "onednn_product", counted)
    return counted


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "columns of a wider one": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "every second row": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
}
each_form = pytest.mark.parametrize("right", FORMS.values(), ids=FORMS.keys())


@pytest.mark.parametrize(("n", "k", "m"), [(1, 5, 3), (37, 130, 50), (256, 1024, 100)])
@pytest.mark.parametrize("left", FORMS.values(), ids=FORMS.keys())
@each_form
def test_products_in_any_layout(
    calls: Calls, n: int, k: int, m: int, left: Any, right: Any
) -> None:
    x, matrix, z, bias = torch.randn(n, k), torch.randn(k, m), torch.randn(n, m), torch.randn(m)
    product = x.double() @ matrix.double()
    with torch.no_grad():
        made = [
            (products.matmul_nn(left(x), right(matrix)), product),
            (products.matmul_nn(left(x), right(matrix), bias), product + bias),
            (products.matmul_nt(left(x), right(matrix.t())), product),
            (products.matmul_nt(left(x), right(matrix.t()), bias), product + bias),
            (products.matmul_tn(left(x), right(z)), x.double().t() @ z.double()),
        ]
    for value, exact in made:
        assert (value.double() - exact).norm() <= 1e-6 * exact.norm()
    # oneDNN takes a thousand times as long for operands whose rows are not dense.
    dense_rows = left(x).is_contiguous() and right is not FORMS["columns of a wider one"]
    if n > 1 and right is not FORMS["every second row"]:
        assert calls.count == (4 if dense_rows else 0)


def test_long_sums_stay_with_the_blas(calls: Calls) -> None:
    """OneDNN's rounding error grows with their length."""
    for terms in (cpu.ONEDNN_UP_TO_TERMS, cpu.ONEDNN_UP_TO_TERMS + 1):
        with torch.no_grad():
            products.matmul_nn(torch.randn(3, terms), torch.randn(terms, 2))
        assert calls.count == 1


def test_a_layer_uses_it_forward_and_backward(calls: Calls) -> None:
    layer, x = CPLinear(48, 60, rank=20, order=2), torch.randn(300, 48, requires_grad=True)
    y = layer(x)
    assert calls.count == 2
    grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert calls.count == 4
    double = CPLinear(48, 60, rank=20, order=2, dtype=torch.float64)
    double.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    wide = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(double(wide).square().sum(), [wide, *double.parameters()])
    for grad, reference in zip(grads, exact, strict=True):
        assert (grad.double() - reference).norm() <= 1e-6 * reference.norm()


def test_what_looks_on_sees_every_product(calls: Calls) -> None:
    """Graphs, transforms, modes, switches: oneDNN's operation has no rule for them."""
    layer, x = CPLinear(48, 60, rank=20, order=2), torch.randn(300, 48)
    values = dict(layer.named_parameters())

    def call(values: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, values, (x,))
        return out

    with torch.no_grad():
        expected = layer(x)
    assert calls.count == 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() >= 2 * 300 * 20 * (48 + 60)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(torch.vmap(call, (None, 0))(values, x[None])[0], expected)
    torch.func.jvp(lambda x: call(values, x), (x,), (x,))
    for strict in (False, True):
        with torch.no_grad():
            graph = torch.export.export(layer.eval(), (x,), strict=strict).graph
        names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert names
        assert all(name.startswith("aten.") for name in names), names
    assert calls.count == 2


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_the_vendor_decides(monkeypatch: pytest.MonkeyPatch, vendor: str) -> None:
    """MKL is slower than oneDNN on AMD's processors."""
    monkeypatch.setattr(cpu, "vendor", lambda: vendor)
    both = torch.backends.mkl.is_available() and _torch.has_onednn_product
    assert cpu.onednn_is_faster() == (both and vendor == "AuthenticAMD")
