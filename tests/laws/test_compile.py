"""torch.compile, torch.export and autocast in what the matrix does not show; names in files."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from cases import BY_ID, FEW, few_cases, params
from cases.protocol import Case, truth
from compare import assert_close
from polyadic import CPTensor, functional
from polyadic.nn import CPConv2d
from polyadic.plans import ConvPlan, ConvRoute

REPRESENTATIVE = [
    *FEW,
    *(
        BY_ID[name]
        for name in (
            "linear-order2-transposed",
            "conv-1x1-stride",
            "conv-4x2-same-mixed",
            "linear-complex-lambda",
            "conv-complex-all-options",
            "embedding-complex-lambda",
        )
    ),
]
INDUCTOR = [
    BY_ID[name]
    for name in (
        "linear-order3-primes-lambda",
        "conv-3x3-stride-tuple",
        "conv-groups2",
        "conv-transpose-groups",
        "embedding-order3",
        "head-order3-lambda",
    )
]
# Those whose leading size is the batch's; Inductor is asked of one size alone for the others.
BATCHED = [case for case in FEW if case.lead]
each = pytest.mark.parametrize("case", params(REPRESENTATIVE))
batched = pytest.mark.parametrize("case", params(BATCHED))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(layer: nn.Module, call: Any, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """Output and gradients of input and parameters, by name."""
    layer.zero_grad()
    dynamic = getattr(x, "_dynamo_dynamic_indices", None)
    x = x.detach().clone()
    if x.is_floating_point() or x.is_complex():
        x.requires_grad_()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    y = call(x)
    y.backward(grad_y)
    grads = {name: p.grad for name, p in layer.named_parameters()}
    if x.grad is not None:
        grads["x"] = x.grad
    return {"y": y.detach(), **grads}


def batch(case: Case, size: int) -> tuple[Tensor, Tensor]:
    """Input and output gradient with another leading size."""
    other = case.resized(size)
    return other.leaves().x, other.grad_y()


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], name)


class Tripled(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return 3 * y


@each
def test_trained_in_one_graph(case: Case) -> None:
    """In a model with another module, compiled once for all steps of an optimizer."""
    x, grad_y, expected = case.leaves().x, case.grad_y(), 3 * truth(case)[0]
    model, counter = nn.Sequential(case.make(), Tripled()), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(3):
        got = results(model, compiled, x, grad_y)
        assert_same(got, results(model, model, x, grad_y))
        is_first = torch.allclose(got["y"], expected, rtol=1e-6, atol=0)
        assert is_first == (step == 0), "a step leaves the output as it was"
        if is_first:
            assert_close(got["y"], expected, "y")
        optimizer.step()
    assert counter.frame_count == 1


@batched
def test_any_sizes_compile_once(case: Case) -> None:
    """Sizes of maps too; ``mark_dynamic`` refuses to be specialised where a plan pins the batch."""
    layer, counter = case.make(), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for size in (23, 17, 29):
        x, _ = batch(case, size)
        torch._dynamo.mark_dynamic(x, 0)
        assert_close(compiled(x), layer(x), "y")
    assert counter.frame_count == 1


def test_recompiles_are_counted() -> None:
    """The counter counts: with a static batch each size is compiled again."""
    case, counter = FEW[0], CompileCounter()
    layer = case.make()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=counter)
    for size in (5, 7, 12):
        compiled(batch(case, size)[0])
    assert counter.frame_count == 3


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic-batch"])
@pytest.mark.parametrize("case", params(INDUCTOR))
def test_inductor(case: Case, dynamic: bool) -> None:
    """A dynamic batch only: Inductor itself fails to sort strides of dynamic spatial sizes."""
    layer = case.make()
    compiled = torch.compile(layer, fullgraph=True)
    for size in (23, 17) if dynamic else (6,):
        x, grad_y = batch(case, size)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        assert_same(results(layer, compiled, x, grad_y), results(layer, layer, x, grad_y))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("given", ["contiguous", "channels_last"])
def test_compiled_convolutions_keep_channels_innermost(stride: int, given: str) -> None:
    """No map is copied to another layout, neither by the graph nor by the compiler.

    Inductor takes layouts from the convolutions of a graph, of which a backward is none.
    """
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    layer = CPConv2d(24, 32, 3, stride=stride, padding=1, rank=16)
    channels_last = ConvRoute("channels_last")
    plan = ConvPlan(channels_last, channels_last)
    x = torch.randn(2, 24, 33, 31, requires_grad=True)
    if given == "channels_last":
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def call(x: Tensor) -> Tensor:
        return functional.cp_conv(
            x,
            layer.out_factors,
            layer.in_factors,
            layer.kernel_factors,
            layer.bias,
            stride=stride,
            padding=1,
            plan=plan,
        )

    compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    y, expected = compiled(x), call(x)
    assert y.stride() == expected.stride()
    assert y.stride(1) == 1
    grad = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    wanted = [x, *layer.parameters()]
    pairs = zip(
        torch.autograd.grad(y, wanted, grad),
        torch.autograd.grad(expected, wanted, grad),
        strict=True,
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
    _, backward = graphs
    calls = [node for node in backward.graph.nodes if node.op == "call_function"]
    copied = [
        node
        for node in calls
        if node.target == torch.ops.aten.clone.default
        and node.meta["val"].dim() == 4
        and node.meta["val"].numel() > 24 * 32 * 9
    ]
    assert not copied
    # args[6]: transposed.
    convolutions = [node for node in calls if node.target == torch.ops.aten.convolution.default]
    assert True in [node.args[6] for node in convolutions]
    for node in calls:
        if node.target == torch.ops.aten.convolution_backward.default:
            maps = node.args[:2]
            assert all(arg.meta["val"].stride(1) == 1 for arg in maps)


@few_cases
def test_exported_program_survives_a_file(case: Case) -> None:
    layer, x = case.make().eval(), case.leaves().x
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), buffer)
    buffer.seek(0)
    assert_close(torch.export.load(buffer).module()(x), truth(case)[0], "y")


@few_cases
def test_compiled_autocast(case: Case) -> None:
    layer = case.make(torch.float32)
    check_autocast(case, layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))


def check_autocast(case: Case, layer: nn.Module, call: Any) -> None:
    x = case.leaves(torch.float32).x
    if case.differentiable:
        x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(x)
    # Autocast leaves a lookup alone, torch's own too.
    assert y.dtype == (torch.bfloat16 if case.differentiable else torch.float32)
    y.backward(case.grad_y(y.dtype))
    got = {name: parameter.grad for name, parameter in case.parameters(layer).items()}
    want, want_grads = truth(case)
    assert (y.double() - want).norm() <= 0.02 * want.norm()
    if case.differentiable:
        got["x"] = x.grad
    for name, grad in got.items():
        assert grad.dtype == torch.float32
        assert (grad.double() - want_grads[name]).norm() <= 0.03 * want_grads[name].norm(), name


@pytest.mark.parametrize("case", params([case for case in FEW if case.differentiable]))
def test_autocast_takes_half_precision_input(case: Case) -> None:
    """As torch's layers do: under autocast the input may already be cast."""
    layer = case.make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(case.leaves(torch.bfloat16).x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(case.leaves(torch.float32).x).dtype == torch.float32


@few_cases
def test_autocast_leaves_float64_alone(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(case.make()(case.leaves().x), truth(case)[0], "y")


@each
def test_state_dict_names_and_tensors(case: Case) -> None:
    """Flat, stable names; contiguous tensors of one dimension at least, as FSDP2 wants them."""
    layer = case.make()
    state = layer.state_dict()
    owner = "cp.joint" if hasattr(layer.cp, "joint") else "cp"
    names = {f"{owner}.factors.{i}" for i in range(len(case.leaves().factors))}
    names |= {"bias"} if case.bias else set()
    names |= {f"{owner}.weights"} if case.weights else set()
    assert set(state) == names
    assert all(t.is_contiguous() and t.dim() >= 1 for t in state.values())


def test_state_dict_of_another_shape_is_refused() -> None:
    state = BY_ID["linear-order3"].make().state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for cp\.factors"):
        BY_ID["linear-order3-primes-lambda"].make().load_state_dict(state, strict=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@few_cases
def test_to_dtype(case: Case, dtype: torch.dtype) -> None:
    layer = case.make().to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(case.leaves(dtype).x).dtype == dtype


def test_tensor_round_trips() -> None:
    cp = CPTensor(((2, 3), (4,)), 5, weights=True)
    for other in (copy.deepcopy(cp), pickle.loads(pickle.dumps(cp))):
        assert torch.equal(other.to_matrix(), cp.to_matrix())
        assert other.tensorized_shape == cp.tensorized_shape
