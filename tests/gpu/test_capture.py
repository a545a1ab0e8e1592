"""A training step in a CUDA graph: what it must not do, and that it is right if there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pretend import fused_kernels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from polyadic.kernels import backend
from polyadic.kernels.linear import LinearMap
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear
from polyadic.plans import LinearPlan, LinearRoute

LAYERS: dict[str, tuple[Callable[..., nn.Module], Callable[[], Tensor]]] = {
    "linear": (partial(CPLinear, 96, 60, rank=13), lambda: torch.randn(33, 96)),
    "conv": (partial(CPConv2d, 8, 12, 3, padding=1, rank=5), lambda: torch.randn(2, 8, 9, 9)),
    # So many that repeats would be counted on a CPU, which asks how many there are.
    "embedding": (partial(CPEmbedding, 30, 16, rank=8), lambda: torch.randint(30, (2, 300))),
}
each = pytest.mark.parametrize("kind", LAYERS)


@each
@torch.no_grad()
def test_a_layer_reads_no_numbers_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without numbers refuse to be read, as a capture does."""
    if kind == "conv" and not torch.backends.cuda.is_built():
        pytest.skip("a torch built for CPUs alone copies no tensors that pretend to be on a GPU")
    monkeypatch.setattr(backend, "_why_not", lambda index: None)
    backend._serves.cache_clear()
    make, sample = LAYERS[kind]
    layer, x = make(), sample()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    made = torch.empty(parameter.shape, device="cuda", dtype=torch.bfloat16)
                    module._parameters[name] = nn.Parameter(made)
        dtype = torch.bfloat16 if x.is_floating_point() else x.dtype
        y = layer(torch.empty(x.shape, device="cuda", dtype=dtype))
    backend._serves.cache_clear()
    assert y.device.type == "cuda"


@torch.no_grad()
def test_a_second_step_starts_no_kernel_that_the_first_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that one step before the capture is enough: none is compiled or loaded within it."""
    launch = pytest.importorskip("polyadic.kernels.triton.launch")
    started: list[Any] = []

    def record(form: Any, *args: Any) -> None:
        started.append(form)

    monkeypatch.setattr(launch.Form, "__call__", record)
    route = LinearRoute((3,), (3,), by="triton")
    layer_map = LinearMap(LinearPlan(route, route), 3)
    factors = [torch.randn(4, 8) for _ in range(6)]
    x, grad_y = torch.randn(32, 64), torch.randn(32, 64)
    with fused_kernels():
        for _ in range(2):
            y, kept = layer_map.forward(x, None, factors)
            layer_map.backward(grad_y, x, kept, factors, (True,) * 7)
            assert y.shape == grad_y.shape
    first, second = started[: len(started) // 2], started[len(started) // 2 :]
    assert first == second
    assert len(first) == 3


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Step:
    """A training step with tensors that stay where they are."""

    def __init__(self, kind: str) -> None:
        make, sample = LAYERS[kind]
        torch.manual_seed(0)
        self.layer = make(device="cuda")
        self.x = sample().cuda()
        if self.x.is_floating_point():
            self.x.requires_grad_()
        self.optimizer = torch.optim.SGD(self.layer.parameters(), 1e-2)

    def __call__(self, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = (call or self.layer)(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.layer.parameters()]


def expected(kind: str, steps: int) -> list[Tensor]:
    step = Step(kind)
    for _ in range(steps):
        step()
    return step.parameters()


@on_a_gpu
@each
def test_a_whole_step_in_a_graph(kind: str) -> None:
    """Three steps of warming up and five replays are eight eager steps, to the bit."""
    step = Step(kind)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    step.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        graph.replay()
    for got, want in zip(step.parameters(), expected(kind, 8), strict=True):
        assert torch.equal(got, want)


@on_a_gpu
@each
def test_graphed_callables(kind: str) -> None:
    step = Step(kind)
    sample = step.x.detach().clone().requires_grad_(step.x.requires_grad)
    graphed = torch.cuda.make_graphed_callables(step.layer, (sample,))
    for _ in range(4):
        step(graphed)
    for got, want in zip(step.parameters(), expected(kind, 4), strict=True):
        torch.testing.assert_close(got, want)


@on_a_gpu
@each
def test_reduced_overhead(kind: str) -> None:
    step = Step(kind)
    torch._dynamo.reset()
    compiled = torch.compile(step.layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        step(compiled)
    for got, want in zip(step.parameters(), expected(kind, 4), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
