"""``polyadic.accelerate_tltorch``: tltorch's own layers, with it and without."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyadic
from cases.tltorch import LEFT, TAKEN, conv, embedding, linear, tltorch
from polyadic import functional
from polyadic.interop import tltorch_layers
from polyadic.testing import kept_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning"),
]

CLASSES = (tltorch.FactorizedLinear, tltorch.FactorizedConv, tltorch.FactorizedEmbedding)
FORWARDS = tuple(cls.__dict__["forward"] for cls in CLASSES)


@pytest.fixture(autouse=True)
def _theirs_before_and_after() -> Iterator[None]:
    """Each test finds and leaves tltorch's own methods."""
    assert tuple(cls.__dict__["forward"] for cls in CLASSES) == FORWARDS
    yield
    assert tuple(cls.__dict__["forward"] for cls in CLASSES) == FORWARDS


def results(layer: nn.Module, x: Tensor, index: Any) -> dict[str, Tensor]:
    """The output and all gradients of one call."""
    layer.zero_grad()
    if x.is_floating_point() or x.is_complex():
        x = x.detach().clone().requires_grad_()
    y = layer(x, index)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    y.backward(grad_y)
    found = {"y": y.detach()} | ({} if x.grad is None else {"x": x.grad})
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return found | grads


class Calls:
    """How often tltorch's layers have reached our functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("cp_linear", "cp_conv", "cp_embedding"):
            monkeypatch.setattr(tltorch_layers, name, self.counting(getattr(functional, name)))

    def counting(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            y = function(*args, **kwargs)
            self.count += 1
            return y

        return counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def both(layer: nn.Module, x: Tensor, index: Any) -> tuple[Any, Any]:
    theirs = results(layer, x, index)
    with polyadic.accelerate_tltorch():
        ours = results(layer, x, index)
    return theirs, ours


def reason(layer: nn.Module) -> str | None:
    """Why a layer is left to tltorch."""
    with polyadic.accelerate_tltorch() as acceleration:
        return acceleration.reasons(layer)[""]


@pytest.mark.parametrize("name", TAKEN)
def test_same_values_and_gradients(name: str, calls: Calls) -> None:
    layer, x, index = TAKEN[name]()
    theirs, ours = both(layer, x, index)
    assert calls.count == 1
    assert reason(layer) is None
    assert ours.keys() == theirs.keys()
    if "transducted" not in name:
        assert "weight.weights" in ours
    for key, expected in theirs.items():
        assert ours[key].dtype == expected.dtype
        assert ours[key].shape == expected.shape
        error = (ours[key] - expected).norm() / expected.norm()
        assert error < 1e-12, f"{key}: {error}"
    assert ours["y"].is_contiguous()


@pytest.mark.parametrize("name", LEFT)
def test_left_to_tltorch_bit_for_bit(name: str, calls: Calls) -> None:
    layer, x, index = LEFT[name]()
    theirs, ours = both(layer, x, index)
    assert calls.count == 0
    assert type(layer.weight).__name__ in str(reason(layer))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv3d mobilenet", "embedding"])
def test_half_and_single_precision(name: str, calls: Calls) -> None:
    layer, x, index = TAKEN[name]()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        low = copy.deepcopy(layer).to(dtype)
        given = x.to(dtype) if x.is_floating_point() else x
        before = calls.count
        theirs, ours = both(low, given, index)
        assert calls.count == before + 1
        for key, expected in theirs.items():
            assert ours[key].dtype == expected.dtype
            error = (ours[key] - expected).double().norm() / expected.double().norm()
            assert error < tolerance, f"{dtype} {key}: {error}"


AUTOCAST = {
    "linear": lambda: linear((3, 4), (2, 5), dtype=torch.float32),
    "linear no bias": lambda: linear((3, 4), (2, 5), bias=False, dtype=torch.float32),
    "linear rebuilt": lambda: linear(
        (3, 4), (2, 5), implementation="reconstructed", dtype=torch.float32
    ),
    "conv": lambda: conv((4, 6), (3, 3), (8, 7), bias=True, dtype=torch.float32),
    "embedding": lambda: embedding(60, 16, dtype=torch.float32),
    "linear in float64": lambda: linear((3, 4), (2, 5)),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_gives_their_dtype(name: str, calls: Calls) -> None:
    layer, x, index = AUTOCAST[name]()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = layer(x, index)
        with polyadic.accelerate_tltorch():
            ours = layer(x, index)
    assert calls.count == 1
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).double().norm() < 3e-2 * theirs.double().norm()


@pytest.mark.parametrize("implementation", ["factorized", "reconstructed", "mobilenet"])
def test_a_convolution_answers_in_their_layout(implementation: str) -> None:
    layer, x, _ = conv((16, 32), (3, 3), (16, 16), rank=16, implementation=implementation)
    layer, x = layer.float(), x.float()
    for given in (x, x.to(memory_format=torch.channels_last)):
        theirs = layer(given)
        with polyadic.accelerate_tltorch():
            ours = layer(given)
        if theirs.is_contiguous():
            assert ours.is_contiguous()
        else:
            assert ours.is_contiguous(memory_format=torch.channels_last)


def outcome(layer: nn.Module, *args: Any) -> Any:
    """The output, or the error as its type and text."""
    try:
        return layer(*args)
    except Exception as error:
        return type(error), str(error)


IMAGE = torch.ones(2, 4, 8, 7).double()
REFUSED = {
    "linear wrong size": (lambda: linear((3, 4), (2, 5)), torch.randn(2, 11).double()),
    "linear other dtype": (lambda: linear((3, 4), (2, 5)), torch.randn(2, 12)),
    "linear unknown layer": (lambda: linear((3, 4), (2, 5), index=1), torch.randn(2, 12).double()),
    "linear joint by tuple": (
        lambda: linear((3, 4), (2, 5), n_layers=2, index=(0,)), torch.randn(2, 12).double(),
    ),
    "linear joint beyond": (
        lambda: linear((3, 4), (2, 5), n_layers=2, index=2), torch.randn(2, 12).double(),
    ),
    "conv joint beyond": (
        lambda: conv((4, 6), (3, 3), (8, 7), n_layers=(2, 3), index=(0, 3)), IMAGE,
    ),
    "conv joint by int": (
        lambda: conv((4, 6), (3, 3), (8, 7), n_layers=(2, 3), index=0), IMAGE,
    ),
    "conv wrong channels": (
        lambda: conv((4, 6), (3, 3), (8, 7)), torch.randn(2, 5, 8, 7).double(),
    ),
    "conv too small": (lambda: conv((4, 6), (3, 3), (8, 7)), torch.randn(2, 4, 2, 7).double()),
    "conv unbatched": (lambda: conv((4, 6), (3, 3), (8, 7)), torch.randn(4, 8, 7).double()),
    "conv unbatched rebuilt": (
        lambda: conv((4, 6), (3, 3), (8, 7), implementation="reconstructed"),
        torch.randn(4, 8, 7).double(),
    ),
    "embedding beyond": (lambda: embedding(60, 16), torch.tensor([3, 60])),
    "embedding negative": (lambda: embedding(60, 16), torch.tensor([-1, 3])),
    "embedding of bytes": (lambda: embedding(60, 16), torch.tensor([1, 3], dtype=torch.uint8)),
    "embedding of floats": (lambda: embedding(60, 16), torch.tensor([1.0, 3.0])),
    "not a tensor": (lambda: linear((3, 4), (2, 5)), "a string"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_polyadic_refuses_is_answered_by_tltorch(name: str, calls: Calls) -> None:
    make, x = REFUSED[name]
    layer, _, index = make()
    theirs = outcome(layer, x, index)
    with polyadic.accelerate_tltorch():
        ours = outcome(layer, x, index)
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs
    assert calls.count == 0


def kept(layer: nn.Module, x: Tensor, index: Any) -> int:
    """Bytes of all storages a call saves for its backward."""
    return kept_bytes(lambda: layer(x, index))


KEPT = {
    "linear": lambda: linear((4, 8, 8), (4, 8, 8), (32,), rank=32),
    "linear rebuilt": lambda: linear((4, 8, 8), (4, 8, 8), (32,), implementation="reconstructed"),
    "conv": lambda: conv((16, 16), (3, 3), (12, 12), rank=16),
    "conv mobilenet": lambda: conv((16, 16), (3, 3), (12, 12), implementation="mobilenet"),
    "conv rebuilt": lambda: conv((16, 16), (3, 3), (12, 12), implementation="reconstructed"),
    "embedding": lambda: embedding(1000, 64, (300,), rank=32),
}


@pytest.mark.parametrize("name", KEPT)
def test_less_is_kept_for_the_backward(name: str) -> None:
    layer, x, index = KEPT[name]()
    theirs = kept(layer, x.requires_grad_(x.is_floating_point()), index)
    with polyadic.accelerate_tltorch():
        assert kept(layer, x, index) < theirs


def test_tensor_dropout_is_left_while_it_acts(calls: Calls) -> None:
    layer, x, _ = conv((4, 6), (3, 3), (8, 7), rank=12)
    tltorch.tensor_dropout(layer.weight, p=0.5)
    torch.manual_seed(3)
    theirs = layer(x)
    resting = layer.eval()(x)
    layer.train()
    with polyadic.accelerate_tltorch():
        torch.manual_seed(3)
        assert torch.equal(layer(x), theirs)
        assert calls.count == 0
        assert reason(layer) == "its weight has the hook CPDropout"
        torch.testing.assert_close(layer.eval()(x), resting)
        assert calls.count == 1
    assert reason(layer) is None


def test_other_hooks_on_a_weight_run(calls: Calls) -> None:
    layer, x, _ = TAKEN["linear"]()
    ran: list[str] = []
    hook = layer.weight.register_forward_hook(lambda *_: ran.append("after"))
    before = layer.weight.register_forward_pre_hook(lambda *_: ran.append("before"))
    with polyadic.accelerate_tltorch():
        layer(x)
        assert ran == ["before", "after"]
        assert calls.count == 0
        hook.remove()
        before.remove()
        layer(x)
    assert calls.count == 1


def test_layers_of_a_joint_weight(calls: Calls) -> None:
    layer, x, _ = TAKEN["linear joint 0"]()
    second = layer[1]
    theirs = second(x)
    with polyadic.accelerate_tltorch():
        torch.testing.assert_close(second(x), theirs, rtol=1e-12, atol=1e-12)
    assert calls.count == 1


def test_a_replaced_function_of_a_convolution_is_respected() -> None:
    layer, x, _ = TAKEN["conv2d"]()

    def zeros(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())

    layer.forward_fun = zeros
    with polyadic.accelerate_tltorch():
        assert layer(x).dim() == 0
    assert "zeros" in str(reason(layer))


def test_undo_restores_the_very_same_functions() -> None:
    handle = polyadic.accelerate_tltorch()
    assert all(cls.__dict__["forward"] not in FORWARDS for cls in CLASSES)
    assert handle.active
    handle.undo()
    assert tuple(cls.__dict__["forward"] for cls in CLASSES) == FORWARDS
    handle.undo()
    assert not handle.active
    with pytest.raises(RuntimeError, match="undone"), handle:
        pass


def test_nested_in_any_order(calls: Calls) -> None:
    layer, x, _ = TAKEN["linear"]()
    outer = polyadic.accelerate_tltorch()
    ours = tltorch.FactorizedLinear.forward
    with polyadic.accelerate_tltorch() as inner:
        assert tltorch.FactorizedLinear.forward is ours
        layer(x)
        outer.undo()
        outer.undo()
        assert inner.active
        layer(x)
    assert calls.count == 2
    layer(x)
    assert calls.count == 2


def test_an_error_inside_the_context_undoes_it() -> None:
    with pytest.raises(KeyError), polyadic.accelerate_tltorch():
        raise KeyError
    assert tltorch.FactorizedLinear.forward is FORWARDS[0]


def test_a_wrapper_put_on_top_survives_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, _ = TAKEN["linear"]()
    expected = layer(x)
    handle = polyadic.accelerate_tltorch()
    below = tltorch.FactorizedLinear.forward

    def theirs(self: Any, *args: Any) -> Tensor:
        return 2 * below(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tltorch.FactorizedLinear, "forward", theirs)
        handle.undo()
        assert tltorch.FactorizedLinear.forward is theirs
        assert torch.equal(layer(x), 2 * expected)
    tltorch.FactorizedLinear.forward = FORWARDS[0]


def test_other_threads_run_on_it_too(calls: Calls) -> None:
    layer, x, _ = TAKEN["linear"]()
    with polyadic.accelerate_tltorch():
        thread = threading.Thread(target=lambda: layer(x))
        thread.start()
        thread.join()
    assert calls.count == 1


class Model(nn.Module):
    """A layer of each kind, and one in a format that is not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.words = embedding(60, 12)[0]
        self.inner = nn.ModuleList(
            [linear((3, 4), (2, 5))[0], linear((2, 5), (2, 3), cp="blocktt")[0]]
        )
        self.image = conv((1, 2), (3,), (6,))[0]

    def forward(self, indices: Tensor) -> Tensor:
        x = self.inner[1](self.inner[0](self.words(indices)))
        return self.image(x.unsqueeze(1))


def test_reasons_are_given_by_name(calls: Calls) -> None:
    model, indices = Model(), torch.randint(60, (7,))
    expected = model(indices)
    with polyadic.accelerate_tltorch() as acceleration:
        torch.testing.assert_close(model(indices), expected, rtol=1e-10, atol=1e-10)
        assert acceleration.reasons(model) == {
            "words": None,
            "inner.0": None,
            "inner.1": "its weight is a BlockTT, not a CPTensorized",
            "image": None,
        }
        with pytest.raises(TypeError, match=re.escape("torch.nn.Module, got list")):
            acceleration.reasons([model])
    assert calls.count == 3


def test_second_derivatives() -> None:
    layer, x, _ = TAKEN["linear"]()
    x.requires_grad_()
    with polyadic.accelerate_tltorch():
        assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding"])
def test_compiles(name: str) -> None:
    layer, x, index = TAKEN[name]()
    expected = layer(x)
    torch.compiler.reset()
    with polyadic.accelerate_tltorch():
        compiled = torch.compile(layer, fullgraph=name != "conv2d", backend="aot_eager")
        torch.testing.assert_close(compiled(x, index), expected, rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.slow
def test_importing_polyadic_does_not_import_tltorch() -> None:
    code = "import sys, polyadic; print('tltorch' in sys.modules, 'tensorly' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_a_missing_tltorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tltorch", None)
    with pytest.raises(ImportError, match=re.escape('pip install "polyadic[interop]"')):
        polyadic.accelerate_tltorch()
