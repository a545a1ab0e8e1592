"""When a layer's matrices are made by kernels, in how many launches, and what a compiler sees."""

from __future__ import annotations

import ast
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import polyadic
from polyadic import functional
from polyadic.kernels import backend, linear, pairs
from polyadic.kernels.linear import LinearMap
from polyadic.kernels.multilinear import khatri_rao, khatri_rao_backward
from polyadic.plans import ConvPlan, ConvRoute, LinearPlan, LinearRoute, Memory
from polyadic.testing import Flops, Operations

KHATRI_RAO, MTTKRP = "polyadic.khatri_rao.default", "polyadic.mttkrp.default"
# Operations that launch nothing.
VIEWS = ("t", "view", "unsqueeze", "expand", "detach", "alias", "slice", "device")


def launches(call: Callable[[], Any]) -> Counter[str]:
    """How often each operator runs that launches something."""
    with Operations() as seen:
        call()
    return Counter(name for name in seen.names if name.split(".")[1] not in VIEWS)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU whose tensors have no numbers, which our kernels serve."""
    monkeypatch.setattr(backend, "_why_not", lambda index: None)
    backend._serves.cache_clear()
    with FakeTensorMode():
        yield
    backend._serves.cache_clear()


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def linear_step(dtype: torch.dtype, rank: int, keep: int, *, scale: bool) -> tuple[Any, Any]:
    """Forward and backward of a layer of 16³ by 16³."""
    ins = [on_gpu(m, rank, dtype=dtype) for m in ([1] if scale else []) + [16] * 3]
    factors = [*ins, *[on_gpu(16, rank, dtype=dtype) for _ in range(3)]]
    route = LinearRoute((len(ins),), (3,), by="triton")
    layer_map = LinearMap(LinearPlan(route, route, keep), len(ins))
    x, grad_y = on_gpu(128, 4096, dtype=dtype), on_gpu(128, 4096, dtype=dtype)
    bias = on_gpu(4096, dtype=dtype)
    kept: list[tuple[Tensor, ...]] = []

    def forward() -> None:
        kept.append(layer_map.forward(x, bias, factors)[1])

    def backward() -> None:
        needs = (True,) * (1 + len(factors))
        d_x, gradients = layer_map.backward(grad_y, x, kept[0], factors, needs)
        assert d_x is not None
        assert d_x.shape == x.shape
        for gradient, factor in zip(gradients, factors, strict=True):
            assert gradient is not None
            assert (gradient.shape, gradient.dtype) == (factor.shape, factor.dtype)

    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [64, 89])
@pytest.mark.parametrize("scale", [False, True])
@torch.no_grad()
def test_a_linear_step_takes_nine_launches(
    gpu: None, dtype: torch.dtype, rank: int, scale: bool
) -> None:
    """KA and KC, Z, Y with its bias; KA and KC, G, dX, dKA, dKC, all factors' gradients."""
    forward, backward = linear_step(dtype, rank, 1, scale=scale)
    product = "aten.mm.default" if dtype == torch.float32 else "aten.mm.dtype"
    first = launches(forward)
    assert first == {KHATRI_RAO: 1, "aten.mm.default": 1, "aten.addmm.default": 1}
    second = launches(backward)
    expected = Counter({KHATRI_RAO: 1, "aten.mm.default": 2, MTTKRP: 1})
    expected[product] += 2
    assert second == expected
    assert first.total() + second.total() == 9


@torch.no_grad()
def test_recomputing_z_takes_one_launch_more(gpu: None) -> None:
    forward, backward = linear_step(torch.bfloat16, 64, 0, scale=False)
    launches(forward)
    assert launches(backward).total() == 7


@torch.no_grad()
def test_large_gradients_of_matrices_are_made_whole_on_a_gpu(gpu: None) -> None:
    """On a CPU this takes pieces; on a GPU each piece would be launches."""
    factors = [on_gpu(64, 256) for _ in range(4)]
    route = LinearRoute((1, 1), (1, 1))
    layer_map = LinearMap(LinearPlan(route, route, "x and z"), 2)
    x, grad_y = on_gpu(16, 4096), on_gpu(16, 4096)
    kept = layer_map.forward(x, None, factors)[1]
    split = launches(lambda: layer_map.backward(grad_y, x, kept, factors, (True,) * 5))
    assert split["aten.mm.dtype"] == 2


@torch.no_grad()
def test_a_step_that_rebuilds_w_takes_ten_launches(gpu: None) -> None:
    """KA and KC, W, Y; KA and KC, W, dX, dW, dKA, dKC, all factors' gradients."""
    factors = [on_gpu(16, 64) for _ in range(4)]
    route = LinearRoute((2,), (2,), "dense", "triton")
    layer_map = LinearMap(LinearPlan(route, route, "x"), 2)
    x, grad_y, bias = on_gpu(512, 256), on_gpu(512, 256), on_gpu(256)
    assert launches(lambda: layer_map.forward(x, bias, factors)).total() == 3
    assert launches(lambda: layer_map.backward(grad_y, x, (), factors, (True,) * 5)).total() == 7


@torch.no_grad()
@pytest.mark.parametrize("rank", [8, 5])
def test_every_plan_runs_on_a_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """No plan calls what only a CPU has, and padded intermediates pass from route to route."""
    # Without a GPU torch refuses to index such tensors, but not the operation that indexing calls.
    columns, copy = torch.ops.aten.slice.Tensor, torch.ops.aten.clone.default
    monkeypatch.setattr(linear, "unpadded", lambda z, rank: columns(z, 1, 0, rank))
    monkeypatch.setattr(
        pairs,
        "unpadded",
        lambda d, rank: copy(columns(d, 1, 0, rank), memory_format=torch.contiguous_format),
    )
    factors = [on_gpu(m, rank) for m in (4, 6, 3, 5)]
    x, grad_y, bias = on_gpu(7, 24), on_gpu(7, 15), on_gpu(15)
    routes = [LinearRoute(i, o) for i in ((2,), (1, 1)) for o in ((2,), (1, 1))]
    routes.append(LinearRoute((2,), (2,), "dense"))
    routes += [LinearRoute((2,), (2,), kind, "triton") for kind in ("factorized", "dense")]
    for forward in routes:
        for backward in routes:
            layer_map = LinearMap(LinearPlan(forward, backward), 2)
            y, kept = layer_map.forward(x, bias, factors)
            d_x, gradients = layer_map.backward(grad_y, x, kept, factors, (True,) * 5)
            assert (y.shape, d_x.shape) == (grad_y.shape, x.shape)
            assert [g.shape for g in gradients] == [f.shape for f in factors]


@torch.no_grad()
def test_padding_starts_rows_at_multiples_of_16_bytes(gpu: None) -> None:
    ka, kc = pairs.khatri_rao_pair(
        ([on_gpu(4, 13), on_gpu(3, 13)], [on_gpu(5, 13)]), torch.bfloat16
    )
    assert (ka.shape, kc.shape) == ((12, 16), (5, 16))
    assert ka.stride() == (16, 1)


def test_torchs_operations_serve_whatever_wants_more_than_numbers(gpu: None) -> None:
    groups = [[on_gpu(4, 16), on_gpu(3, 16)], [on_gpu(5, 16)]]

    def call() -> None:
        matrices = pairs.khatri_rao_pair(groups, groups[0][0].dtype)
        pairs.mttkrp_pair(matrices, groups)

    with torch.no_grad():
        assert launches(call)[KHATRI_RAO] == 1
        with torch.autograd.forward_ad.dual_level():
            assert launches(call)[KHATRI_RAO] == 0
        groups = [[factor.double() for factor in group] for group in groups]
        assert launches(call)[KHATRI_RAO] == 0
    groups = [[factor.float() for factor in group] for group in groups]
    assert launches(call)[KHATRI_RAO] == 0


@pytest.mark.parametrize("rank", [8, 5])
def test_a_compiler_sees_operations(gpu: None, rank: int) -> None:
    """Forward and backward as the autograd boundary calls them."""
    graphs: list[str] = []

    def keep_code(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.code)
        return module

    route = LinearRoute((2,), (2,), by="triton")
    layer_map = LinearMap(LinearPlan(route, route), 2)

    def call(x: Tensor, grad_y: Tensor, *factors: Tensor) -> list[Tensor | None]:
        with torch.no_grad():
            y, kept = layer_map.forward(x, None, factors)
            d_x, gradients = layer_map.backward(grad_y, x, kept, factors, (True,) * 5)
        return [y, d_x, *gradients]

    factors = [on_gpu(m, rank) for m in (4, 6, 3, 5)]
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=keep_code, fullgraph=True)
    y, d_x, *gradients = compiled(on_gpu(7, 24), on_gpu(7, 15), *factors)
    assert (y.shape, d_x.shape) == ((7, 15), (7, 24))
    assert [g.shape for g in gradients] == [f.shape for f in factors]
    assert graphs[0].count("polyadic.khatri_rao") == 2
    assert graphs[0].count("polyadic.mttkrp") == 1


NEEDS_CUDA = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="autograd needs a torch that knows CUDA"
)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=NEEDS_CUDA)])
@pytest.mark.parametrize("memory", ["balanced", "least"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_layer_compiles(gpu: None, memory: Memory, scaled: bool, training: bool) -> None:
    """By the plan that the planner gives, which a compiler keeps as a constant."""
    graphs: list[torch.fx.GraphModule] = []

    def keep_code(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module

    def call(x: Tensor, bias: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        return functional.cp_linear(
            x, factors[:2], factors[2:], bias, weights=weights if scaled else None, memory=memory
        )

    x, bias, weights, *factors = (
        on_gpu(*shape).requires_grad_(training)
        for shape in ((7, 24), (15,), (5,), (4, 5), (6, 5), (3, 5), (5, 5))
    )
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        y = torch.compile(call, backend=keep_code, fullgraph=True)(x, bias, weights, *factors)
    assert y.shape == (7, 15)
    assert y.requires_grad == training
    # Forward and backward of the autograd Function are graphs within the graph.
    code = "".join(part.code for part in graphs[0].modules() if hasattr(part, "code"))
    assert code.count("polyadic.khatri_rao") == 1 + training
    assert code.count("polyadic.mttkrp") == training


PLANS = (LinearRoute, LinearPlan, ConvRoute, ConvPlan)
PROPERTIES = {
    name for kind in PLANS for name, value in vars(kind).items() if isinstance(value, property)
}
TRACED = ("kernels", "functional")


def properties_read(source: str) -> list[str]:
    """Attributes read in a source that bear the name of a property of a plan."""
    nodes = ast.walk(ast.parse(source))
    return [n.attr for n in nodes if isinstance(n, ast.Attribute) and n.attr in PROPERTIES]


def test_no_traced_code_reads_a_property_of_a_plan() -> None:
    """The compiler of torch 2.11 cannot, where a plan is a constant: every compiled layer fails."""
    assert properties_read("route.is_khatri_rao") == ["is_khatri_rao"]
    package = Path(polyadic.__file__).parent
    sources = [file for name in TRACED for file in (package / name).rglob("*.py")]
    assert len(sources) > 20
    for file in sources:
        assert not properties_read(file.read_text(encoding="utf-8")), file.name


def called_dataclasses(source: str) -> list[str]:
    """Dataclasses of a source whose instances can be called."""
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return [
        node.name
        for node in classes
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
        and any(isinstance(n, ast.FunctionDef) and n.name == "__call__" for n in node.body)
    ]


def test_no_traced_code_calls_a_dataclass() -> None:
    """The compiler of torch 2.11 asks for the hash of one that it has not filled yet."""
    assert called_dataclasses("@dataclass\nclass A:\n    def __call__(self): pass") == ["A"]
    package = Path(polyadic.__file__).parent
    for file in (file for name in TRACED for file in (package / name).rglob("*.py")):
        assert not called_dataclasses(file.read_text(encoding="utf-8")), file.name


@torch.no_grad()
def test_the_cpu_sees_no_difference() -> None:
    """There matrices have no padding and the bits that they always had."""
    groups = [[torch.randn(4, 5), torch.randn(3, 5)], [torch.randn(6, 5)]]
    for matrix, group in zip(pairs.khatri_rao_pair(groups, torch.float32), groups, strict=True):
        assert torch.equal(matrix, khatri_rao(group))
    matrices = [torch.randn(12, 5), torch.randn(6, 5)]
    found = pairs.mttkrp_pair(matrices, groups)
    for matrix, group, gradients in zip(matrices, groups, found, strict=True):
        assert all(map(torch.equal, gradients, khatri_rao_backward(matrix, group)))


def test_padding_has_derivatives() -> None:
    """The way of torch's operations on a GPU, as second derivatives take it."""
    factors = [torch.randn(m, 3, dtype=torch.float64, requires_grad=True) for m in (2, 3, 4)]

    def padded(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return tuple(pairs._khatri_raos([[a, b], [c]], torch.float64, 8))

    assert torch.autograd.gradcheck(padded, factors)
    matrices = [torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (6, 4)]

    def gradients(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return tuple(g for group in pairs._mttkrps([x, y], [[a, b], [c]]) for g in group)

    assert torch.autograd.gradcheck(gradients, [*matrices, *factors])


ARGUMENTS = {
    "khatri_rao": lambda factors: (factors, [2, 1], torch.float32, 8),
    "mttkrp": lambda factors: ([torch.randn(12, 8), torch.randn(2, 5, 8)], factors, [2, 1]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_torchs_rules(name: str, dtype: torch.dtype) -> None:
    """Schema, shapes of fake tensors, tracing; one factor alone, whose product it is itself."""
    operator = getattr(torch.ops.polyadic, name).default
    factors = [torch.randn(m, 8).to(dtype) for m in (4, 3, 5)]
    opcheck(operator, ARGUMENTS[name](factors))


@torch.no_grad()
def test_operators_count_no_flops() -> None:
    factors = [torch.randn(m, 8) for m in (4, 3, 5)]
    with Flops() as counter:
        for name, arguments in ARGUMENTS.items():
            getattr(torch.ops.polyadic, name)(*arguments(factors))
    assert counter.total == 0


@pytest.mark.parametrize("rank", [8, 5])
def test_operators_compile_and_export(rank: int) -> None:
    class Module(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> list[Tensor]:
            matrices = torch.ops.polyadic.khatri_rao([a, b], [2], torch.float32, 8)
            return torch.ops.polyadic.mttkrp(matrices, [a, b], [2])

    a, b = torch.randn(3, rank), torch.randn(4, rank)
    expected = khatri_rao_backward(khatri_rao([a, b]), [a, b])
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)
    exported = torch.export.export(Module(), (a, b)).module()
    for module in (compiled, exported):
        torch.testing.assert_close(list(module(a, b)), expected)


def test_why_kernels_do_not_serve_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(backend.SWITCH, "0")
    backend._serves.cache_clear()
    with caplog.at_level(logging.INFO, "polyadic"):
        assert not backend.triton_serves(0)
        assert not backend.triton_serves(0)
    assert len(caplog.records) == 1
    assert backend.SWITCH in caplog.text
    backend._serves.cache_clear()


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        ({"torch.cuda.is_available": lambda: False}, "no CUDA device"),
        ({"torch.cuda.get_device_capability": lambda index: (7, 5)}, "capability"),
        ({"importlib.util.find_spec": lambda name: None}, "not installed"),
        ({"torch.version.hip": "6.0"}, "NVIDIA"),
    ],
)
def test_reasons_why_kernels_do_not_serve(
    monkeypatch: pytest.MonkeyPatch, patches: dict[str, Any], reason: str
) -> None:
    monkeypatch.delenv(backend.SWITCH, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    for name, value in patches.items():
        monkeypatch.setattr(name, value)
    assert reason in str(backend._why_not(0))
