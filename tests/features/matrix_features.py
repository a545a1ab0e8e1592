"""The features of the matrix: for each a check that a layer passes or fails."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix_layers import (
    Layer,
    assert_near,
    assert_same,
    dense_linear,
    results,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import polyadic
from cases.changes import CHANGES
from cases.functions import power
from cases.weights import weight
from compare import assert_close
from polyadic.testing import Flops

Check = Callable[[Layer], None]


def both(layer: Layer, **kwargs: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A module, an input and the results by torch."""
    module, x = layer.make(**kwargs), layer.input()
    return module, x, results(module, lambda x: layer.dense(module, x), x)


def eager(layer: Layer) -> None:
    for batch in (3, 1, 0):
        module, x = layer.make(), layer.input(batch)
        want = results(module, lambda x, m=module: layer.dense(m, x), x)
        assert_same(results(module, module, x), want)


def of_complex(check: Check) -> Check:
    """The check, of the layer of complex numbers."""
    return lambda layer: check(layer.in_complex())


def mixed(layer: Layer) -> None:
    """Neither takes the numbers of the other, and autocast leaves complex ones alone."""
    real, other = layer, layer.in_complex()
    for ours, theirs, low in ((real, other, torch.complex64), (other, real, torch.float32)):
        module = ours.make()
        with pytest.raises(TypeError, match="real and complex numbers do not mix"):
            module(theirs.input())
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(TypeError, match="real and complex numbers do not mix"),
        ):
            module(theirs.input(dtype=low))
    module, x = other.make(torch.complex64), other.input(dtype=torch.complex64)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert torch.equal(y, module(x))


def compiled(layer: Layer) -> None:
    """Left as it is, and changed in place by eager code behind it."""
    torch.compiler.reset()
    module, x, want = both(layer)
    call = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(results(module, call, x), want)
    for name in ("relu", "y[...] = 0"):
        change = CHANGES[name]
        changed = results(module, lambda x, c=change: c(layer.dense(module, x)), x)
        assert_same(results(module, lambda x, c=change: c(call(x)), x), changed)
    with torch.no_grad():
        assert_close(call(x), want["y"], "y without gradients")


def compiled_dynamic(layer: Layer) -> None:
    """The batch is marked, which refuses to be specialised, and may be any further size.

    A compiler takes several seconds for a convolution with sizes of maps that may be any:
    ``tests/laws/test_compile.py`` traces those.
    """
    torch.compiler.reset()
    module, counter = layer.make(), CompileCounterWithBackend("aot_eager")
    maps = layer.dims > 0 and not layer.spectral
    call = torch.compile(module, fullgraph=True, dynamic=None if maps else True, backend=counter)

    def marked(x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 0)
        y: Tensor = call(x)
        return y

    for batch in (23, 17, 29):
        x = layer.input(batch)
        assert_same(results(module, marked, x), results(module, module, x))
    assert counter.frame_count == 1


def export(layer: Layer, strict: bool) -> None:
    module, dim = layer.make().eval(), torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(
        module, (layer.input(4),), dynamic_shapes=({0: dim},), strict=strict
    )
    for batch in (2, 9, 33):
        x = layer.input(batch)
        assert_close(program.module()(x), layer.dense(module, x).detach(), f"y of batch {batch}")
    names = {name for name, _ in module.named_parameters()}
    assert names == set(program.graph_signature.parameters)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    ours = [name for name in called if "polyadic" in name]
    assert called
    assert not ours


def onnx(layer: Layer) -> None:
    import onnxruntime

    module = layer.make(torch.float32).eval()
    dim = torch.export.Dim("batch", min=1, max=512)
    exported = torch.onnx.export(
        module,
        (layer.input(4, torch.float32),),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: dim},),
    )
    assert exported is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        exported.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (name,) = [given.name for given in session.get_inputs()]
    for batch in (4, 1, 7):
        x = layer.input(batch, torch.float32)
        (y,) = session.run(None, {name: x.numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(y), module(x), f"y of batch {batch}", 1e-5)


def autocast(layer: Layer, dtype: torch.dtype) -> None:
    """Output in the dtype of torch's layer; gradients in that of what they are gradients of."""
    _, _, want = both(layer)
    module, x = layer.make(torch.float32), layer.input(dtype=torch.float32)

    def call(x: Tensor, f: Any = module) -> Tensor:
        with torch.autocast("cpu", dtype):
            y: Tensor = f(x)
        return y

    got = results(module, call, x)
    # torch's lookup and Fourier transforms are not among what autocast casts.
    stays = layer.indices or layer.spectral
    assert got["y"].dtype == (torch.float32 if stays else dtype)
    grads = [tensor for name, tensor in got.items() if name != "y"]
    assert {grad.dtype.to_real() for grad in grads} == {torch.float32}
    assert_near(got, want, 4 * torch.finfo(dtype).eps)

    def without(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y: Tensor = module(x)
        return y

    # A backward inside of autocast is that of the forward that it belongs to.
    with torch.autocast("cpu", dtype):
        inside = results(module, without, x)
    assert_same(inside, results(module, module, x), tolerance=1e-5)


def lower(layer: Layer, dtype: torch.dtype) -> None:
    _, _, want = both(layer)
    module, x = layer.make(dtype), layer.input(dtype=dtype)
    got = results(module, module, x)
    assert {tensor.dtype for tensor in got.values()} == {dtype}
    assert_near(got, want, 4 * torch.finfo(dtype).eps)


def channels_last(layer: Layer) -> None:
    """Right for an input in this layout, which is handed on in the dtypes that oneDNN has."""
    module, x, want = both(layer)
    last = torch.channels_last if layer.dims == 2 else torch.channels_last_3d
    x = x.contiguous(memory_format=last)
    assert not x.is_contiguous()
    assert_same(results(module, module, x), want)
    assert layer.make(torch.float32)(x.float()).is_contiguous(memory_format=last)


def functions(layer: Layer) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """The layer and its dense counterpart as functions of the same tensors."""
    module = layer.make()
    names = [name for name, _ in module.named_parameters()]
    values = tuple(p.detach() for p in module.parameters())
    x = layer.input()

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return layer.dense(self.module, x)

    def bind(called: nn.Module, prefix: str) -> Any:
        def function(*tensors: Tensor) -> Tensor:
            first, rest = (x, tensors) if layer.indices else (tensors[0], tensors[1:])
            given = {prefix + name: t for name, t in zip(names, rest, strict=True)}
            y: Tensor = functional_call(called, given, (first,))
            return y

        return function

    return bind(module, ""), bind(Dense(), "module."), values if layer.indices else (x, *values)


def _flat(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for part in tree for leaf in _flat(part)]


def of_functions(transform: Callable[[Any, tuple[Tensor, ...]], Any]) -> Check:
    """The check that a transform gives the same of the layer as of its dense counterpart."""

    def check(layer: Layer) -> None:
        cp, dense, tensors = functions(layer)
        torch.manual_seed(4)
        got = _flat(transform(cp, tensors))
        torch.manual_seed(4)
        want = _flat(transform(dense, tensors))
        assert len(got) == len(want) > 0
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_close(g, w, f"result {i}")

    return check


def _every(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def _grad(f: Any, tensors: tuple[Tensor, ...]) -> Any:
    """By itself, and of an ensemble whose members differ in one tensor."""
    found = [grad(lambda *t: f(*t).sin().sum(), _every(tensors))(*tensors)]
    for i in range(len(tensors)):
        dims = tuple(0 if j == i else None for j in range(len(tensors)))
        given = [torch.stack([t, 1 - t]) if j == i else t for j, t in enumerate(tensors)]
        found.append(grad(lambda *t, d=dims: vmap(f, d)(*t).sin().sum(), _every(tensors))(*given))
    return found


def _vmap(f: Any, tensors: tuple[Tensor, ...]) -> Any:
    found = [vmap(f)(*[torch.stack([t, 1 - t]) for t in tensors])]
    for i in range(len(tensors)):
        dims = tuple(0 if j == i else None for j in range(len(tensors)))
        given = [torch.stack([t, 1 - t]) if j == i else t for j, t in enumerate(tensors)]
        found.append(vmap(f, dims)(*given))
    return found


def _jvp(f: Any, tensors: tuple[Tensor, ...]) -> Any:
    """By itself, of a jvp, and of a vmap."""
    once, twice = (tuple(torch.randn_like(t) for t in tensors) for _ in range(2))
    stacked = tuple(torch.stack([t, 1 - t]) for t in tensors)
    return (
        jvp(f, tensors, once),
        jvp(lambda *t: jvp(f, t, once)[1], tensors, twice),
        jvp(vmap(f), stacked, tuple(torch.randn_like(t) for t in stacked)),
    )


def _of_real(f: Any, tensors: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    """The function of its real arguments alone, as torch takes no others for these."""
    real = [i for i, tensor in enumerate(tensors) if not tensor.is_complex()]

    def function(*given: Tensor) -> Tensor:
        every = {**dict(enumerate(tensors)), **dict(zip(real, given, strict=True))}
        y: Tensor = f(*every.values())
        return y

    return function, tuple(tensors[i] for i in real)


def _jacobians(f: Any, tensors: tuple[Tensor, ...]) -> Any:
    f, tensors = _of_real(f, tensors)
    ends = tuple({0, len(tensors) - 1})
    return jacrev(f, ends)(*tensors), jacfwd(f, ends)(*tensors)


def _hessian(f: Any, tensors: tuple[Tensor, ...]) -> Any:
    f, tensors = _of_real(f, tensors)
    first = tuple(range(min(2, len(tensors))))
    return hessian(lambda *t: f(*t).sin().sum(), first)(*tensors)


def _double_backward(f: Any, tensors: tuple[Tensor, ...]) -> Any:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    grad_y = torch.randn_like(y).requires_grad_()
    first = torch.autograd.grad(y, leaves, grad_y, create_graph=True)
    loss = sum(power(g) for g in first)
    second = torch.autograd.grad(loss, [*leaves, grad_y], materialize_grads=True)
    # Gradients of several outputs at once, which autograd batches.
    rows = torch.stack([torch.randn_like(y), torch.randn_like(y)])
    return second, torch.autograd.grad(f(*leaves), leaves, rows, is_grads_batched=True)


def per_sample(layer: Layer) -> None:
    module, x = layer.make(), layer.input()
    values = {name: p.detach() for name, p in module.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        total: Tensor = functional_call(module, values, (sample,)).square().sum()
        return total

    got = vmap(grad(loss), (None, 0))(values, x)
    for i, sample in enumerate(x):
        y = layer.dense(module, sample.unsqueeze(0))
        want = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        for name, w in zip(values, want, strict=True):
            assert_close(got[name][i], w, f"sample {i}, {name}")


def checkpointed(layer: Layer) -> None:
    module, x, want = both(layer)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    module.register_forward_pre_hook(count)
    got = results(module, lambda x: checkpoint(module, x, use_reentrant=False), x)
    assert runs == 2
    assert_same(got, want)


def checkpointed_reentrant(layer: Layer) -> None:
    """This kind gives gradients by ``backward`` alone, and wants an input that requires one."""
    module, x, want = both(layer)
    x = x.detach().requires_grad_(x.is_floating_point())
    y = checkpoint(module, x, use_reentrant=True)
    generator = torch.Generator().manual_seed(2)
    y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
    grads = {name: p.grad for name, p in module.named_parameters()}
    assert_same({"y": y.detach(), "x": x.grad, **grads}, want)


def meta(layer: Layer) -> None:
    """Made on meta, moved, reset: the numbers of a layer made in place, from the same seed."""
    module = layer.build(device="meta")
    assert all(p.is_meta for p in module.parameters())
    x = layer.input(dtype=torch.float32)
    here = layer.build()
    assert module(x.to("meta")).shape == here(x).shape
    moved = module.to_empty(device="cpu")
    for made in (moved, here):
        for parameter in made.parameters():
            nn.init.constant_(parameter, float("nan"))
        torch.manual_seed(5)
        made.reset_parameters()
        if isinstance(made, polyadic.nn.CPTiedLinear):
            made.cp.reset_parameters()
    assert moved(x).isfinite().all()
    for a, b in zip(moved.parameters(), here.parameters(), strict=True):
        assert torch.equal(a, b)


def same_layer(layer: Layer, a: Any, b: Any, dtype: torch.dtype | None = None) -> None:
    """Equal to the last bit, in parameters, output and options, and of no shared storage."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
        assert ours[name].data_ptr() != theirs[name].data_ptr()
    x = layer.input(dtype=dtype)
    assert torch.equal(a(x), b(x))
    assert repr(a) == repr(b)
    if dtype is None:
        assert_same(results(b, b, x), results(b, lambda x: layer.dense(b, x), x))


def deepcopied(layer: Layer) -> None:
    module = layer.make()
    same_layer(layer, module, copy.deepcopy(module))


def pickled(layer: Layer) -> None:
    module = layer.make()
    same_layer(layer, module, pickle.loads(pickle.dumps(module)))


def saved(layer: Layer) -> None:
    module, buffer = layer.make(), io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    same_layer(layer, module, torch.load(buffer, weights_only=False))


def state_dict(layer: Layer) -> None:
    """Through a file that holds tensors alone: flat names, contiguous, one dimension at least."""
    module, other, buffer = layer.make(), layer.make(seed=7), io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state.keys() == dict(module.named_parameters()).keys()
    assert all(t.is_contiguous() and t.dim() >= 1 for t in state.values())
    found = other.load_state_dict(state)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    same_layer(layer, module, other)


def versioned(layer: Layer) -> None:
    """A state dict of a later version is refused, and one of this version is not."""
    module = layer.make()
    state = module.state_dict()
    assert state._metadata["cp"]["version"] == 1
    module.load_state_dict(state)
    state._metadata["cp"]["version"] = 2
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="cp was saved in version 2"):
            module.load_state_dict(state, strict=strict)


def safetensors(layer: Layer) -> None:
    from safetensors.torch import load_model, save_model

    # These files have no complex128.
    dtype = torch.float32 if layer.spectral else None
    module, other = layer.make(dtype), layer.make(dtype, seed=7)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "layer.safetensors")
        save_model(module, path)
        assert load_model(other, path) == (set(), [])
    same_layer(layer, module, other, dtype)


class _Tripled(nn.Module):
    def forward(self, factor: Tensor) -> Tensor:
        return 3 * factor


def parametrized(layer: Layer, how: Callable[[nn.Module, str], Any]) -> None:
    """A factor is computed from other parameters; the layer follows, gradients go through."""
    module, x = layer.make(), layer.input()
    owner = getattr(module.cp, "joint", module.cp)
    before = module(x).detach()
    how(owner.factors, "1")
    with torch.no_grad():
        for parameter in owner.factors.parametrizations.parameters():
            parameter.mul_(1.5)
    want = results(module, lambda x: layer.dense(module, x), x)
    assert not torch.allclose(want["y"], before)
    assert any("parametrizations" in name for name in want)
    assert_same(results(module, module, x), want)


def tripled(factors: nn.Module, name: str) -> None:
    parametrize.register_parametrization(factors, name, _Tripled())


def flops(layer: Layer) -> None:
    """What torch counts, forward and backward, is what ``explain`` says."""
    module, x = layer.make(torch.float32), layer.input(dtype=torch.float32)
    size = {"size": x.shape[2:]} if layer.dims else {}
    rows = x.shape if layer.indices else x.shape[:-1]
    batch = len(x) if layer.dims else rows.numel()
    chosen = polyadic.explain(module, batch=batch, **size).chosen
    x.requires_grad_(x.is_floating_point())
    with Flops() as counter:
        module(x).sum().backward()
    assert counter.total == chosen.flops > 0


def profiled(layer: Layer) -> None:
    """A label with map and plan under a profiler; compiled code is not compiled again for it."""
    torch.compiler.reset()
    module, x = layer.make(), layer.input()
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(module, fullgraph=True, backend=counter)
    call(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)
        with torch.no_grad():
            module(x)
        call(x)
    labels = [event for event in profile.key_averages() if event.key.startswith("polyadic.")]
    # Without gradients a plan keeps nothing, which its label says too.
    assert sum(event.count for event in labels) == 2
    assert all("forward: " in event.key for event in labels)
    assert counter.frame_count == 1


def encoder(layer: Layer) -> None:
    """As linear1 and linear2: in training, and in eval, whose fast path passes ``forward`` by."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    make = type(layer.make())
    block.linear1 = make(6, 8, rank=3, dtype=torch.float64)
    block.linear2 = make(8, 6, rank=3, dtype=torch.float64)
    want = block.norm1(x + block.self_attn(x, x, x, need_weights=False)[0])
    fed = dense_linear(block.linear2, dense_linear(block.linear1, want).relu())
    want = block.norm2(want + fed).detach()
    assert_close(block.train()(x).detach(), want, "y in training")
    block.eval()
    with torch.no_grad():
        assert_close(block(x), want, "y in eval")


def attention(layer: Layer) -> None:
    """As out_proj of nn.MultiheadAttention, which reads weight and bias and never calls it."""
    torch.manual_seed(0)
    block = nn.MultiheadAttention(6, 2, batch_first=True).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    projection = type(layer.make())(6, 6, rank=3, dtype=torch.float64)
    dense = copy.deepcopy(block)
    with torch.no_grad():
        dense.out_proj.weight.copy_(weight(projection).t())
        dense.out_proj.bias.copy_(projection.bias)
    block.out_proj = projection
    y, want = block(x, x, x)[0], dense(x, x, x)[0]
    assert_close(y, want, "y")
    y.sum().backward()
    want.sum().backward()
    got = [factor.grad for factor in projection.cp.factors]
    wanted = torch.autograd.grad(
        weight(projection), list(projection.cp.factors), dense.out_proj.weight.grad.t()
    )
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert_close(g, w, f"gradient of factor {i}")
    with torch.no_grad():
        assert_close(block.eval()(x, x, x)[0], want.detach(), "y in eval")
