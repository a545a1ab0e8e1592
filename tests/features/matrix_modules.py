"""Features of the matrix: what torch, and tools beside it, do to a module and its weight."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from matrix_layers import Layer, assert_same, results
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import polyadic
from cases.functions import power
from compare import assert_close

REFUSED = "computed from its CP factors"


def torch_std(module: Any) -> float:
    """The standard deviation torch, or neuraloperator, draws this layer's weight with."""
    if isinstance(module, (polyadic.nn.CPEmbedding, polyadic.nn.CPTiedLinear)):
        return 1.0
    if isinstance(module.cp.factors[0], Tensor) and module.cp.factors[0].is_complex():
        return math.sqrt(2 / (module.in_channels + module.out_channels))
    return 1 / math.sqrt(3 * math.prod(module.weight.shape[1:]))


def orders(modules: list[nn.Module]) -> Iterable[list[nn.Module]]:
    """From the outside in, from the inside out, and each module last once."""
    yield modules
    yield modules[::-1]
    for i in range(len(modules)):
        yield [*modules[:i], *modules[i + 1 :], modules[i]]


def reset_by_module(layer: Layer) -> None:
    """After to_empty, reset_parameters of every module in any order ends in the layer's law.

    Both contracts: all modules that have the method (torch's), and each module that owns
    parameters, which must have it and alone be enough (FSDP, Lightning).
    """
    count = len(list(orders(list(layer.build(device="meta").modules()))))
    for i, owners in itertools.product(range(count), (False, True)):
        module = layer.build(device="meta", dtype=torch.float64)
        if not owners:
            module.to_empty(device="cpu")
            for parameter in module.parameters():
                nn.init.constant_(parameter, float("nan"))
        for part in list(orders(list(module.modules())))[i]:
            if not owners and hasattr(part, "reset_parameters"):
                part.reset_parameters()
            elif owners and next(part.parameters(recurse=False), None) is not None:
                part.to_empty(device="cpu", recurse=False)
                part.reset_parameters()
        bias = getattr(module, "bias", None)
        assert bias is None or bias.isfinite().all()
        owner = getattr(module.cp, "joint", module.cp)
        # E[W²] = R · Π_k E[A_k²], and each factor's mean square is the same for every draw.
        squares = [float(factor.detach().abs().square().mean()) for factor in owner.factors]
        std = math.sqrt(owner.rank * math.prod(squares))
        assert std == pytest.approx(torch_std(module), rel=1e-6)


def _in_place(write: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda module: write(module.weight)


def _set(name: str) -> Callable[[Any], None]:
    def write(module: Any) -> None:
        setattr(module.weight, name, torch.zeros_like(module.weight))

    return write


def _operator(module: Any) -> None:
    weight = module.weight
    weight += 1


def _item(module: Any) -> None:
    module.weight[0] = 0


def _assigned(value: Callable[[Any], Any]) -> Callable[[Any], None]:
    def write(module: Any) -> None:
        module.weight = value(module)

    return write


WRITES: dict[str, Callable[[Any], Any]] = {
    "init.normal_": _in_place(nn.init.normal_),
    "init.kaiming_uniform_": _in_place(nn.init.kaiming_uniform_),
    "init.orthogonal_": _in_place(nn.init.orthogonal_),
    "data.clamp_": _in_place(lambda w: w.data.clamp_(0, 1)),
    "data": _set("data"),
    "grad": _set("grad"),
    "copy_": _in_place(lambda w: w.copy_(torch.zeros_like(w))),
    "fill_": _in_place(lambda w: w.fill_(0)),
    "+=": _operator,
    "[0] =": _item,
    "a view": _in_place(lambda w: w[0].zero_()),
    "a view of a view": _in_place(lambda w: w.transpose(0, 1)[0].zero_()),
    "a flat view": _in_place(lambda w: w.view(-1).zero_()),
    "rows": _in_place(lambda w: [row.zero_() for row in w]),
    "chunks": _in_place(lambda w: w.chunk(2)[0].zero_()),
    "detach": _in_place(lambda w: w.detach().zero_()),
    "out=": _in_place(lambda w: torch.add(w.detach(), 1, out=w.detach())),
    "inplace=True": _in_place(lambda w: F.relu(w, inplace=True)),
    "foreach": _in_place(lambda w: torch._foreach_add_([w], 1)),
    "max_norm": _in_place(
        lambda w: F.embedding(torch.tensor([0]), w.detach().flatten(1), max_norm=1e-6)
    ),
    "requires_grad_": _in_place(lambda w: w.requires_grad_(False)),
    "Parameter of it": _in_place(nn.Parameter),
    "vector_to_parameters": _in_place(
        lambda w: nn.utils.vector_to_parameters(torch.zeros(w.numel()), [w])
    ),
}
# What torch does to real tensors alone ends in errors of its own for complex ones.
OF_REAL_TENSORS = ("init.orthogonal_", "inplace=True", "max_norm")


def writes_to(weight: Any) -> dict[str, Callable[[Any], Any]]:
    """The ways to write to a weight of these numbers."""
    without = OF_REAL_TENSORS if weight.is_complex() else ()
    return {name: write for name, write in WRITES.items() if name not in without}


ASSIGNED: dict[str, Callable[[Any], Any]] = {
    "a parameter": _assigned(lambda m: nn.Parameter(torch.zeros(m.weight.shape))),
    "a tensor": _assigned(lambda m: torch.zeros(m.weight.shape)),
    "None": _assigned(lambda m: None),
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm, hooks": nn.utils.weight_norm,
    "spectral_norm, hooks": nn.utils.spectral_norm,
    "custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.ones(m.weight.shape)),
    "global_unstructured": lambda m: prune.global_unstructured(
        [(m, "weight")], prune.L1Unstructured, amount=0.5
    ),
    "functional_call": lambda m: torch.func.functional_call(
        m, {"weight": torch.zeros(m.weight.shape)}, (torch.zeros(1),)
    ),
    "swap_tensors": lambda m: torch.utils.swap_tensors(m.weight, torch.zeros(m.weight.shape)),
    "an optimizer": lambda m: torch.optim.SGD([m.weight], 0.1),
    "a hook": lambda m: m.weight.register_hook(print),
    "memory": lambda m: m.weight.data_ptr(),
    "dlpack": lambda m: torch.from_dlpack(m.weight.detach()).zero_(),
    "numpy": lambda m: m.weight.detach().numpy().fill(0),
}


@contextlib.contextmanager
def refused(name: str, *kinds: type[Exception], match: str) -> Iterator[None]:
    """An error has to come, of a kind and with a text."""
    try:
        yield
    except kinds as error:
        if not re.search(match, str(error)):
            raise
    else:
        pytest.fail(f"{name} is lost")


def writes(layer: Layer) -> None:
    """Every way to write to ``weight`` is refused, in each mode of autograd, and does nothing."""
    module, x = layer.make(), layer.input()
    before = results(module, module, x)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for name, write in writes_to(module.weight).items():
            with mode(), refused(name, RuntimeError, match=REFUSED):
                write(module)
    for name, write in ASSIGNED.items():
        with refused(
            name, TypeError, ValueError, RuntimeError, match="weight|leaf|read-only|slots"
        ):
            write(module)
    assert_same(results(module, module, x), before)
    assert type(module.weight.clone()) is Tensor


class _Largest(TorchDispatchMode):
    """The number of entries of the largest tensor an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.total = self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, Tensor):
                self.most = max(self.most, made.numel())
                self.total += made.numel()
        return result


def metadata(layer: Layer) -> None:
    """What is known without the entries is that of the dense weight, and costs no operation."""
    module = layer.make()
    dense = module.weight.clone()
    with _Largest() as seen:
        weight = module.weight
        assert (weight.shape, weight.dtype, weight.device) == (
            dense.shape,
            dense.dtype,
            dense.device,
        )
        assert (weight.ndim, weight.dim(), weight.numel()) == (dense.ndim,) * 2 + (dense.numel(),)
        assert (weight.size(0), weight.stride(), len(weight)) == (
            dense.size(0),
            dense.stride(),
            len(dense),
        )
        assert weight.is_contiguous()
        assert weight.requires_grad
        assert not weight.is_leaf
        assert weight.is_floating_point() == dense.is_floating_point()
        assert (weight.layout, weight.is_cuda, weight.is_meta) == (torch.strided, False, False)
        assert isinstance(weight, Tensor)
    assert seen.most == 0
    module.requires_grad_(False)
    assert not module.weight.requires_grad


class _Square(torch.autograd.Function):
    """A function that torch's own dispatch of subclasses does not see into."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return power(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return 2 * weight * grad


def read(layer: Layer) -> None:
    """Differentiable by operations, by a view, by a Function; and it follows the factors."""
    module = layer.make()
    parameters = list(module.cp.parameters())
    want = torch.autograd.grad(power(module.weight.clone()), parameters)
    for loss in (
        power(module.weight),
        _Square.apply(module.weight),
        _Square.apply(module.weight.flatten(1)[1:]) + power(module.weight[:1]),
    ):
        got = torch.autograd.grad(loss, parameters)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_close(g, w, f"gradient {i}")
    dense = nn.Parameter(module.weight.clone())
    for other in (dense, dense.detach(), module.weight):
        torch.testing.assert_close(module.weight, other)
        torch.testing.assert_close(other, module.weight)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(module.weight, nn.Parameter(dense + 1))
    assert not isinstance(module.weight, nn.Parameter)
    held = module.weight
    with torch.no_grad():
        parameters[-1].mul_(2)
    assert torch.equal(held, module.weight.clone())
    with torch.autocast("cpu", torch.bfloat16):
        assert module.float().weight.clone().dtype.to_real() == torch.float32


def fused(layer: Layer) -> None:
    """Fusing a batch norm would overwrite the kernel: refused by name."""
    module = layer.make().eval()
    transposed = hasattr(module, "output_padding")
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[layer.dims - 1]
    batch_norm = norm(module.out_channels).double().eval()
    with pytest.raises(TypeError, match="weight of a CPConv"):
        nn.utils.fuse_conv_bn_eval(module, batch_norm, transpose=transposed)


def merged(layer: Layer) -> None:
    """PEFT's merge into a CP base layer is refused by name; its adapter runs and unloads."""
    peft = pytest.importorskip("peft")
    from peft.tuners import lora

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("base", layer.make(torch.float32))
    x = layer.input(dtype=torch.float32)
    before = model(x).detach()
    config = peft.LoraConfig(target_modules=["base"], r=2, init_lora_weights=False)
    config._register_custom_module({type(model.base): lora.Linear})
    adapted = peft.get_peft_model(model, config)
    assert not torch.allclose(adapted(x), before)
    for safe in (False, True):
        with pytest.raises(RuntimeError, match=REFUSED):
            adapted.merge_adapter(safe_merge=safe)
        adapted.base_model.model.base.merged_adapters.clear()
    again = adapted.unload()
    assert torch.equal(again(x), before)


def offloaded(layer: Layer, how: str) -> None:
    """accelerate's hooks bring the factors for the call, and take them away after it."""
    accelerate = pytest.importorskip("accelerate")
    module, x = layer.make(torch.float32), layer.input(dtype=torch.float32)
    names = list(module.state_dict())
    model = nn.Sequential()
    model.add_module("layer", module)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        want = module(x)
        weight = module.weight.clone()
        if how == "cpu":
            accelerate.cpu_offload(model, "cpu")
        elif how == "disk":
            accelerate.disk_offload(model, folder, "cpu")
        else:
            accelerate.dispatch_model(
                model, {"layer": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True
            )
        assert all(parameter.is_meta for parameter in module.parameters())
        for _ in range(2):
            assert_close(model(x), want, "y", 1e-6)
        assert torch.equal(module.weight.clone(), weight)
        assert all(parameter.is_meta for parameter in module.parameters())
    assert list(module.state_dict()) == names


def constructed(layer: Layer) -> None:
    """A layer large on one side is made with a few times the entries of its factors."""
    made = layer.build(device="meta")
    arguments: dict[str, Any] = {"rank": 8, "order": 1}
    if isinstance(made, polyadic.nn.CPTiedLinear):

        def build() -> nn.Module:
            return polyadic.nn.CPEmbedding(8192, 12, **arguments).as_linear(True)
    elif isinstance(made, polyadic.nn.CPEmbedding):

        def build() -> nn.Module:
            return polyadic.nn.CPEmbedding(8192, 12, **arguments)
    elif isinstance(made, polyadic.nn.CPLinear):

        def build() -> nn.Module:
            return polyadic.nn.CPLinear(12, 8192, **arguments)
    else:

        def build() -> nn.Module:
            return type(made)(2, 8192, 3, **arguments)

    with _Largest() as seen:
        count = sum(parameter.numel() for parameter in build().parameters())
    assert seen.total <= 25 * count
    assert seen.most <= 2 * count


def default_device(layer: Layer) -> None:
    """Made under a default device as torch's layers are, and run under another one."""
    module, x = layer.make(), layer.input()
    with torch.no_grad():
        want = module(x)
        with torch.device("meta"):
            assert all(parameter.is_meta for parameter in layer.build().parameters())
            assert_close(module(x), want, "y")
            assert_close(module.weight.clone(), module._built_weight(), "weight")


def fake(layer: Layer) -> None:
    """Made and run under FakeTensorMode, which has shapes and no values."""
    from torch._subclasses import FakeTensorMode

    x = layer.input(dtype=torch.float32)
    want = layer.build(device="meta")(x.to("meta")).shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer.build()(x.clone()).shape == want


def traced(layer: Layer) -> None:
    """torch.fx takes the layer for a leaf, and so do prepare_fx and extractors of features."""
    module, x = layer.make(), layer.input()
    model = nn.Sequential(module, nn.Identity()).eval()
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes if node.target == "0"] == ["call_module"]
    assert_same(results(model, graph, x), results(model, model, x))
    prepared = prepare_fx(copy.deepcopy(model), QConfigMapping(), (x,))
    assert torch.equal(prepared(x), model(x))
    with pytest.raises(TypeError, match="is a leaf of a graph"):
        torch.fx.symbolic_trace(module)


def scripted(layer: Layer) -> None:
    """torch.jit.script is refused by name, of the layer and of a model that holds it."""
    for model in (layer.make(), nn.Sequential(layer.make())):
        with pytest.raises(RuntimeError, match=r"CP\w+ does not support torch.jit.script"):
            torch.jit.script(model)


def jagged(layer: Layer) -> None:
    """Of a jagged nested tensor a jagged one, with the gradients of its rows."""
    module = layer.make()
    rows = [layer.input(batch, seed=batch) for batch in (2, 5, 1)]
    if layer.indices:
        rows = [row.flatten() for row in rows]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    y = module(x)
    assert y.shape[:2] == x.shape[:2]
    assert_same(
        results(module, lambda values: module(_like(x, values)).values(), x.values()),
        results(module, lambda values: layer.dense(module, values), x.values()),
    )
    with pytest.raises(TypeError, match=r"layout torch\.jagged"):
        module(torch.nested.nested_tensor(rows))


def _like(x: Tensor, values: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, x.offsets())


def frozen_and_exported(layer: Layer) -> None:
    """An export that is not strict, and one to ONNX, leave a frozen layer usable; a change not."""
    module, x = layer.make(torch.float32).eval(), layer.input(dtype=torch.float32)
    want = module(x).detach()
    polyadic.freeze(module, batch=64, size=3)
    assert module.frozen is not None
    program = torch.export.export(module, (x,), strict=False)
    for call in (module, program.module(), copy.deepcopy(module)):
        assert_close(call(x), want, "y", 1e-5)
    owner = getattr(module.cp, "joint", module.cp)
    owner.factors = polyadic.init.Factors(copy.deepcopy(list(owner.factors)))
    assert_close(module(x), want, "y by equal factors", 1e-5)
    twice = [nn.Parameter(factor * 2, requires_grad=False) for factor in owner.factors]
    owner.factors = polyadic.init.Factors(twice)
    with pytest.raises(RuntimeError, match="factors of a frozen layer were changed"):
        module(x)


def frozen_to_onnx(layer: Layer) -> None:
    """The exported graph computes what the layer does, which is usable after it."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    module, x = layer.make(torch.float32).eval(), layer.input(dtype=torch.float32)
    want = module(x).detach()
    polyadic.freeze(module, batch=64, size=3)
    assert module.frozen is not None
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/frozen.onnx"
        torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)
        session = runtime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), want, "y by onnxruntime", 1e-5)
    assert_close(module(x), want, "y", 1e-5)


def frozen_and_offloaded(layer: Layer) -> None:
    """Hooks that take the factors away do not change what was contracted; bringing others does."""
    accelerate = pytest.importorskip("accelerate")
    for how in (accelerate.cpu_offload, accelerate.disk_offload):
        model, x = nn.Sequential(layer.make(torch.float32)), layer.input(dtype=torch.float32)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            want = model(x)
            polyadic.freeze(model, batch=64, size=3)
            assert model[0].frozen is not None
            how(
                model, *([folder] if how is accelerate.disk_offload else []), execution_device="cpu"
            )
            for _ in range(2):
                assert_close(model(x), want, "y", 1e-5)
            accelerate.hooks.remove_hook_from_module(model, recurse=True)
            assert_close(model(x), want, "y without hooks", 1e-5)
            next(model[0].cp.parameters()).mul_(2)
            with pytest.raises(RuntimeError, match="factors of a frozen layer were changed"):
                model(x)
