"""``polyadic.accelerate_neuralop``: what it takes, that results stay, and that it can be undone."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyadic
from compare import assert_close
from polyadic.interop import neuralop as ours
from polyadic.testing import KeptBytes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("neuralop") is None,
    reason="needs neuraloperator: pip install 'polyadic[neuralop]'",
)
TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def neuralop() -> Iterator[Any]:
    """Their classes; importing them changes tensorly's backend for the whole process."""
    import tensorly

    # The first import of tltorch has tensorly compute by torch, as its layers need from then on.
    importlib.import_module("tltorch")
    backend = tensorly.get_backend()
    layers = importlib.import_module("neuralop.layers.spectral_convolution")
    legacy = importlib.import_module("neuralop.layers.legacy_spectral_convolution")
    models = importlib.import_module("neuralop.models")
    yield SimpleNamespace(
        SpectralConv=layers.SpectralConv,
        LegacyConv=legacy.SpectralConv,
        TFNO=models.TFNO,
        contract_dense=layers._contract_dense,
    )
    tensorly.set_backend(backend)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Our functions in the order in which accelerated layers call them, and their transforms."""
    called: list[str] = []
    for name in ("cp_spectral_product", "cp_spectral_conv"):

        def counted(*args: Any, _name: str = name, **kwargs: Any) -> Tensor:
            called.append(" ".join([_name, *filter(None, [kwargs.get("transforms")])]))
            y: Tensor = getattr(polyadic.functional, _name)(*args, **kwargs)
            return y

        monkeypatch.setattr(ours, name, counted)
    return called


def outcome(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient."""
    x = x.clone().requires_grad_()
    y = layer(x)
    named = {"x": x, **dict(layer.named_parameters())}
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y.dtype)
    found = torch.autograd.grad(y, list(named.values()), grad, allow_unused=True)
    gradients = {n: g for n, g in zip(named, found, strict=True) if g is not None}
    return {"y": y.detach(), **gradients}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_close(got[name], tensor, name, TOLERANCE)


MAIN = [
    ((8,), (12,)),
    ((5,), (13,)),
    ((8, 6), (12, 13)),
    ((5, 7), (12, 11)),
    ((20, 20), (12, 12)),
    ((8, 6), (11, 9)),
    ((4, 6, 6), (8, 10, 9)),
    ((2, 2, 2, 3), (4, 2, 4, 5)),
]


@pytest.mark.parametrize(("modes", "size"), MAIN, ids=str)
@pytest.mark.parametrize("separable", [False, True])
def test_results_stay(
    neuralop: Any, calls: list[str], modes: tuple[int, ...], size: tuple[int, ...], separable: bool
) -> None:
    for implementation in ("factorized", "reconstructed"):
        layer = neuralop.SpectralConv(
            4,
            4,
            modes,
            rank=0.4,
            factorization="CP",
            implementation=implementation,
            separable=separable,
        )
        x = torch.randn(2, 4, *size)
        # As in training, where the number of modes grows.
        for narrowed in (modes, tuple(max(2, m - 1) for m in modes), tuple(m // 2 for m in modes)):
            layer.n_modes = narrowed
            want = outcome(layer, x)
            for transforms in (False, True):
                calls.clear()
                with polyadic.accelerate_neuralop(transforms=transforms) as acceleration:
                    assert acceleration.reasons(layer) == {"": None}
                    assert_same(outcome(layer, x), want)
                whole = len(modes) < 4 and not any(n % 2 for n in size[:-1])
                by = "any" if transforms else "close"
                assert calls == [f"cp_spectral_conv {by}" if whole else "cp_spectral_product"]
            assert_same(outcome(layer, x), want)


@pytest.mark.parametrize("norm", ["forward", "backward", "ortho"])
def test_every_norm(neuralop: Any, calls: list[str], norm: str) -> None:
    layer = neuralop.SpectralConv(
        3, 5, (6, 5, 4), factorization="CP", implementation="factorized", fft_norm=norm
    )
    x = torch.randn(2, 3, 10, 6, 9)
    want = outcome(layer, x)
    for transforms in (False, True):
        with polyadic.accelerate_neuralop(transforms=transforms):
            assert_same(outcome(layer, x), want)
    assert calls == ["cp_spectral_conv close", "cp_spectral_conv any"]


@pytest.mark.parametrize(
    "options",
    [
        {"complex_data": True},
        {"resolution_scaling_factor": 2.0},
        {"output_shape": (6, 12)},
        {"fft_norm": None},
        {"bias": (5, 1, 8)},
    ],
    ids=str,
)
@pytest.mark.parametrize("transforms", [False, True])
def test_of_what_the_whole_layer_cannot_do_the_product_is_ours(
    neuralop: Any, calls: list[str], options: dict[str, Any], transforms: bool
) -> None:
    made = {"factorization": "CP", "implementation": "factorized", **options}
    bias, shape = made.pop("bias", None), made.pop("output_shape", None)
    layer = neuralop.SpectralConv(3, 5, (6, 4), **made)
    if bias is not None:
        layer.bias = nn.Parameter(torch.randn(bias))
    if shape is not None:
        layer.forward = functools.partial(type(layer).forward, layer, output_shape=shape)
    dtype = torch.complex64 if "complex_data" in options else torch.float32
    x = torch.randn(2, 3, 10, 8, dtype=dtype)
    want = outcome(layer, x)
    with polyadic.accelerate_neuralop(transforms=transforms):
        if shape is not None:
            layer.forward = functools.partial(type(layer).forward, layer, output_shape=shape)
        assert_same(outcome(layer, x), want)
    assert calls == ["cp_spectral_product"]


@pytest.mark.parametrize(
    ("modes", "size"), [((8,), (33,)), ((6, 4), (16, 21)), ((4, 3, 6), (8, 6, 9))], ids=str
)
@pytest.mark.parametrize("separable", [False, True])
def test_the_kept_modes_alone_are_kept(
    neuralop: Any, modes: tuple[int, ...], size: tuple[int, ...], separable: bool
) -> None:
    layer = neuralop.SpectralConv(
        4, 4, modes, rank=0.4, factorization="CP", implementation="factorized", separable=separable
    )
    x = torch.randn(3, 4, *size, requires_grad=True)
    for transforms in (False, True):
        with (
            polyadic.accelerate_neuralop(transforms=transforms),
            KeptBytes(leave_out=list(layer.parameters())) as kept,
        ):
            y = layer(x)
        assert y.requires_grad
        assert kept.total == 8 * 3 * 4 * math.prod(layer.n_modes)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("joint", [False, True])
def test_legacy_layers(neuralop: Any, calls: list[str], order: int, joint: bool) -> None:
    layer = neuralop.LegacyConv(
        3,
        4,
        (6, 4, 4)[:order],
        n_layers=2,
        factorization="CP",
        rank=0.5,
        implementation="factorized",
        joint_factorization=joint,
    )
    x = torch.randn(2, 3, 8, 9, 8)[(..., *[0] * (3 - order))]
    for index in (0, 1):
        want = layer(x, index)
        with polyadic.accelerate_neuralop() as acceleration:
            assert acceleration.reasons(layer) == {"": None}
            calls.clear()
            assert_close(layer(x, index), want, "y", TOLERANCE)
        assert calls == ["cp_spectral_product"] * 2 ** (order - 1)


def test_a_model_made_before_and_one_made_after(neuralop: Any, calls: list[str]) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = neuralop.TFNO(
            (6, 6), 1, 1, 8, n_layers=2, factorization="cp", rank=0.3, positional_embedding=None
        )
        return model

    before, x = make(), torch.randn(2, 1, 12, 12)
    want = outcome(before, x)
    with polyadic.accelerate_neuralop() as acceleration:
        assert set(acceleration.reasons(before).values()) == {None}
        for model in (before, make(), copy.deepcopy(before), pickle.loads(pickle.dumps(before))):
            calls.clear()
            assert_same(outcome(model, x), want)
            assert len(calls) == 2
        pickled = pickle.dumps(before)
    calls.clear()
    after = outcome(pickle.loads(pickled), x)
    assert not calls
    assert all(torch.equal(after[name], want[name]) for name in want)


@pytest.mark.parametrize("transforms", [False, True])
def test_compiles_to_one_graph(neuralop: Any, transforms: bool) -> None:
    layer = neuralop.SpectralConv(4, 4, (6, 6), factorization="CP", implementation="factorized")
    x = torch.randn(2, 4, 12, 12)
    want = outcome(layer, x)
    with polyadic.accelerate_neuralop(transforms=transforms):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for name, got in outcome(compiled, x).items():
            assert_close(got, want[name.removeprefix("_orig_mod.")], name, TOLERANCE)


def other(make: Callable[[Any], nn.Module], reason: str) -> Any:
    return pytest.param(make, reason, id=reason)


def hooked(neuralop: Any) -> nn.Module:
    layer = neuralop.SpectralConv(3, 3, (4, 4), factorization="CP", implementation="factorized")
    layer.weight.register_forward_hook(lambda *_: None)
    return layer


def of_someone(neuralop: Any) -> nn.Module:
    layer = neuralop.SpectralConv(3, 3, (4, 4), factorization="CP", implementation="factorized")

    def mine(x: Tensor, weight: Any, separable: bool = False) -> Tensor:
        y: Tensor = 2 * neuralop.contract_dense(x, weight, separable)
        return y

    layer._contract = mine
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        other(lambda n: n.SpectralConv(3, 3, (4, 4), factorization="Tucker"), "TuckerTensor"),
        other(lambda n: n.SpectralConv(3, 3, (4, 4), factorization="TT"), "TTTensor"),
        other(lambda n: n.SpectralConv(3, 3, (4, 4)), "DenseTensor"),
        other(hooked, "hook"),
        other(of_someone, "_contract is mine"),
    ],
)
def test_what_is_left(
    neuralop: Any, calls: list[str], make: Callable[[Any], nn.Module], reason: str
) -> None:
    layer, x = make(neuralop), torch.randn(2, 3, 8, 8)
    want = outcome(layer, x)
    with polyadic.accelerate_neuralop(transforms=True) as acceleration:
        (found,) = acceleration.reasons(layer).values()
        assert found is not None
        assert reason in found
        got = outcome(layer, x)
    assert not calls
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_an_error_is_theirs(neuralop: Any) -> None:
    layer = neuralop.SpectralConv(3, 3, (4, 4), factorization="CP", implementation="factorized")
    x = torch.randn(2, 5, 8, 8)

    def message() -> str:
        with pytest.raises(Exception) as error:  # noqa: PT011 - whatever theirs is
            layer(x)
        return f"{type(error.value)} {error.value}"

    want = message()
    for transforms in (False, True):
        with polyadic.accelerate_neuralop(transforms=transforms):
            assert message() == want


def test_nesting_and_undoing_in_any_order(neuralop: Any, calls: list[str]) -> None:
    layer = neuralop.SpectralConv(3, 3, (4, 4), factorization="CP", implementation="factorized")
    forward, x = neuralop.SpectralConv.forward, torch.randn(2, 3, 8, 8)

    def called() -> list[str]:
        calls.clear()
        layer(x)
        return list(calls)

    first = polyadic.accelerate_neuralop()
    second = polyadic.accelerate_neuralop(transforms=True)
    third = polyadic.accelerate_neuralop()
    assert called() == ["cp_spectral_conv any"]
    first.undo()
    first.undo()
    assert called() == ["cp_spectral_conv any"]
    second.undo()
    assert called() == ["cp_spectral_conv close"]
    third.undo()
    assert called() == []
    assert neuralop.SpectralConv.forward is forward
    assert "_contract" not in vars(neuralop.SpectralConv)
    with pytest.raises(RuntimeError, match="accelerate_neuralop"), third:
        pass


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="transforms must be True or False"):
        polyadic.accelerate_neuralop(transforms="yes")
    with (
        polyadic.accelerate_neuralop() as acceleration,
        pytest.raises(TypeError, match=r"torch\.nn\.Module"),
    ):
        acceleration.reasons("model")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neuralop.layers.spectral_convolution", None)
    with pytest.raises(ImportError, match=r"polyadic\[neuralop\]"):
        polyadic.accelerate_neuralop()
