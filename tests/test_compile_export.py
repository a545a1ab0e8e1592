"""torch.compile, torch.export, autocast, checkpointing, meta device, copies and files."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from cases import BY_ID, Case, params, truth
from polyadic import CPTensor
from test_values import assert_close

REPRESENTATIVE = [
    BY_ID[name]
    for name in (
        "linear-order2-transposed",
        "linear-order3-primes-lambda",
        "linear-unequal-4-2",
        "conv-1d-k4-same",
        "conv-1x1-stride",
        "conv-3x3-all-options",
        "conv-4x2-same-mixed",
        "conv-3d-2x3x2-same",
    )
]
FEW = [BY_ID["linear-order3-primes-lambda"], BY_ID["conv-3x3-all-options"]]
INDUCTOR = [BY_ID["linear-order3-primes-lambda"], BY_ID["conv-3x3-stride-tuple"]]
each = pytest.mark.parametrize("case", params(REPRESENTATIVE))
few = pytest.mark.parametrize("case", params(FEW))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(layer: nn.Module, call: Any, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """Output and gradients of input and parameters, by name."""
    layer.zero_grad()
    dynamic = getattr(x, "_dynamo_dynamic_indices", None)
    x = x.detach().clone().requires_grad_()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    y = call(x)
    y.backward(grad_y)
    assert x.grad is not None
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


def batch(case: Case, size: int) -> tuple[Tensor, Tensor]:
    """Input and output gradient with another leading size."""
    other = Case(**{**vars(case), "lead": (size, *case.lead[1:]), "strides": "contiguous"})
    return other.leaves().x, other.grad_y()


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], name)


@each
def test_compiled_in_one_graph(case: Case) -> None:
    layer, x, grad_y = case.make(), case.leaves().x, case.grad_y()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(results(layer, compiled, x, grad_y), results(layer, layer, x, grad_y))
    assert_close(compiled(x), truth(case)[0], "y")


@each
def test_dynamic_batch_compiles_once(case: Case) -> None:
    layer = case.make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for size in (23, 17, 29):
        x, grad_y = batch(case, size)
        assert_same(results(layer, compiled, x, grad_y), results(layer, layer, x, grad_y))
    assert counter.frame_count == 1


@few
def test_marked_dynamic_batch_compiles_once(case: Case) -> None:
    """``mark_dynamic`` refuses to be specialised: this fails where a plan pins the batch."""
    layer, counter = case.make(), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
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


@few
def test_second_call_does_not_recompile(case: Case) -> None:
    layer, counter = case.make(), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(3):
        compiled(case.leaves().x)
        layer.zero_grad()
    with torch.no_grad():
        layer.cp.factors[0].mul_(2)
    assert_close(compiled(case.leaves().x), layer(case.leaves().x), "y after an update")
    assert counter.frame_count == 1


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


@few
def test_compiled_without_gradients(case: Case) -> None:
    compiled = torch.compile(case.make(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(case.leaves().x), truth(case)[0], "y")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@each
def test_export(case: Case, strict: bool) -> None:
    layer, x = case.make().eval(), case.leaves().x.contiguous()
    program = torch.export.export(layer, (x,), strict=strict)
    assert_close(program.module()(x), truth(case)[0], "y")
    assert {name for name, _ in layer.named_parameters()} == set(program.graph_signature.parameters)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert all("aten" in name or "getitem" in name for name in called), called


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@few
def test_export_with_a_dynamic_batch(case: Case, strict: bool) -> None:
    layer, (x, _) = case.make().eval(), batch(case, 4)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=512)},)
    program = torch.export.export(layer, (x,), dynamic_shapes=dynamic, strict=strict)
    for size in (2, 9, 33):
        x, _ = batch(case, size)
        assert_close(program.module()(x), layer(x), f"y of batch {size}")


@few
def test_exported_program_survives_a_file(case: Case) -> None:
    layer, x = case.make().eval(), case.leaves().x
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), buffer)
    buffer.seek(0)
    assert_close(torch.export.load(buffer).module()(x), truth(case)[0], "y")


@each
def test_autocast(case: Case) -> None:
    """Output in bf16, gradients in the dtype of what they are gradients of."""
    layer = case.make(torch.float32)
    check_autocast(case, layer, layer)


@few
def test_compiled_autocast(case: Case) -> None:
    layer = case.make(torch.float32)
    check_autocast(case, layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))


def check_autocast(case: Case, layer: nn.Module, call: Any) -> None:
    x = case.leaves(torch.float32).x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(x)
    assert y.dtype == torch.bfloat16
    y.backward(case.grad_y(torch.bfloat16))
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    want, want_grads = truth(case)
    assert (y.double() - want).norm() <= 0.02 * want.norm()
    assert (x.grad.double() - want_grads["x"]).norm() <= 0.02 * want_grads["x"].norm()


@few
def test_autocast_takes_half_precision_input(case: Case) -> None:
    """As torch's layers do: under autocast the input may already be cast."""
    layer = case.make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(case.leaves(torch.bfloat16).x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(case.leaves(torch.float32).x).dtype == torch.float32


@few
def test_autocast_leaves_float64_alone(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(case.make()(case.leaves().x), truth(case)[0], "y")


@pytest.mark.parametrize("reentrant", [False, True])
@each
def test_activation_checkpoint(case: Case, reentrant: bool) -> None:
    layer, x, grad_y = case.make(), case.leaves().x, case.grad_y()
    got = results(layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant), x, grad_y)
    assert_same(got, results(layer, layer, x, grad_y))


@each
def test_meta_device(case: Case) -> None:
    layer = case.make()
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    layer = layer.to("meta")
    assert all(p.is_meta for p in layer.parameters())
    x = case.leaves().x.to("meta")
    y = layer(x)
    assert y.is_meta
    assert y.shape == truth(case)[0].shape
    y.sum().backward()
    assert {name: tuple(p.grad.shape) for name, p in layer.named_parameters()} == shapes


@few
def test_to_empty_and_reset(case: Case) -> None:
    """Made on meta, moved, reset: the same numbers as made in place from the same seed."""
    if case.linear:
        make = _linear
    else:
        make = _conv
    torch.manual_seed(5)
    want = make("cpu")
    meta = make("meta")
    assert all(p.is_meta for p in meta.parameters())
    moved = meta.to_empty(device="cpu")
    for parameter in moved.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(5)
    moved.reset_parameters()
    for a, b in zip(moved.parameters(), want.parameters(), strict=True):
        assert torch.equal(a, b)


def _linear(device: str) -> nn.Module:
    from polyadic.nn import CPLinear

    return CPLinear(24, 18, rank=7, device=device)


def _conv(device: str) -> nn.Module:
    from polyadic.nn import CPConv2d

    return CPConv2d(8, 12, 3, rank=5, device=device)


def assert_equal_layers(a: nn.Module, b: nn.Module, case: Case) -> None:
    """Equal to the last bit, in parameters and output, and of no shared storage."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
        assert ours[name].data_ptr() != theirs[name].data_ptr()
    x = case.leaves().x
    assert torch.equal(a(x), b(x))


@each
def test_deepcopy(case: Case) -> None:
    layer = case.make()
    assert_equal_layers(layer, copy.deepcopy(layer), case)


@each
def test_pickle(case: Case) -> None:
    layer = case.make()
    assert_equal_layers(layer, pickle.loads(pickle.dumps(layer)), case)


@few
def test_torch_save_of_a_layer(case: Case) -> None:
    layer, buffer = case.make(), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert_equal_layers(layer, torch.load(buffer, weights_only=False), case)


@each
def test_state_dict_round_trip(case: Case) -> None:
    layer, other, buffer = case.make(), case.make(seed=7), io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert other.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys == []
    assert_equal_layers(layer, other, case)


@each
def test_state_dict_names_and_tensors(case: Case) -> None:
    """Flat, stable names; contiguous tensors of one dimension at least, as FSDP2 wants them."""
    state = case.make().state_dict()
    names = {f"cp.factors.{i}" for i in range(len(case.modes))}
    names |= {"bias"} if case.bias else set()
    names |= {"cp.weights"} if case.weights else set()
    assert set(state) == names
    assert all(t.is_contiguous() and t.dim() >= 1 for t in state.values())


@each
def test_safetensors_round_trip(case: Case, tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    layer, other, path = case.make(), case.make(seed=7), tmp_path / "layer.safetensors"
    save_model(layer, str(path))
    assert load_model(other, str(path)) == (set(), [])
    assert_equal_layers(layer, other, case)


def test_state_dict_of_another_shape_is_refused() -> None:
    state = BY_ID["linear-order3"].make().state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for cp\.factors"):
        BY_ID["linear-order3-primes-lambda"].make().load_state_dict(state, strict=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@few
def test_to_dtype(case: Case, dtype: torch.dtype) -> None:
    layer = case.make().to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(case.leaves(dtype).x).dtype == dtype


def test_tensor_round_trips() -> None:
    cp = CPTensor(((2, 3), (4,)), 5, weights=True)
    for other in (copy.deepcopy(cp), pickle.loads(pickle.dumps(cp))):
        assert torch.equal(other.to_matrix(), cp.to_matrix())
        assert other.tensorized_shape == cp.tensorized_shape


@few
def test_training_step_with_compiled_layer_in_a_model(case: Case) -> None:
    """The layer inside a compiled model with other modules, one graph, and an optimizer step."""
    layer = case.make()
    model = nn.Sequential(layer, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = compiled(case.leaves().x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
