"""Features of the matrix: the weight where a compiler, an exporter or a transform looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from matrix_layers import Layer, assert_same, results
from matrix_modules import REFUSED, WRITES, refused, writes_to
from torch import Tensor, nn

from cases.functions import power
from compare import assert_close, assert_trees_close

# Compiling takes time, so that one write stands for each way to torch.
TRACED_WRITES = ("[0] =", "a view of a view", "foreach")


class _Reader(nn.Module):
    """Does something with the weight of a layer."""

    def __init__(self, module: nn.Module, use: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module, self.use = module, use

    def forward(self) -> Any:
        return self.use(self.module)


def _tries(module: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Writes inside what traces a graph, with a name."""
    for name in TRACED_WRITES:
        write = _Reader(module, WRITES[name])
        yield f"{name}, compiled", torch.compile(write, backend="aot_eager", fullgraph=True)
    exported = _Reader(module, WRITES["a view"])
    yield "a view, exported", lambda: torch.export.export(exported, (), strict=False)


def traced_writes(layer: Layer) -> None:
    """Inside a graph a write to the weight is refused; reading it is right and differentiable."""
    module, x = layer.make(), layer.input()
    before = results(module, module, x)
    for name, write in _tries(module):
        torch.compiler.reset()
        with torch.no_grad(), refused(name, Exception, match=REFUSED):
            write()
    assert_same(results(module, module, x), before)

    def use(module: Any) -> tuple[Tensor, Tensor]:
        weight = module.weight
        return weight, power(weight.transpose(0, 1).flatten()[: weight.shape[0]])

    torch.compiler.reset()
    parameters = list(module.cp.parameters())
    want, got = use(module), torch.compile(use, backend="aot_eager", fullgraph=True)(module)
    for w, g in zip(want, got, strict=True):
        assert_close(g.detach().clone(), w.detach().clone(), "read")
        grads = [
            torch.autograd.grad(power(t.clone()), parameters, retain_graph=True) for t in (g, w)
        ]
        assert_trees_close(*grads, "gradient")
    for strict in (True, False):
        program = torch.export.export(_Reader(module, lambda m: use(m)[1]), (), strict=strict)
        assert_close(program.module()(), want[1], "exported")


def transformed_writes(layer: Layer) -> None:
    """Inside a transform of torch.func every write is refused, in each mode of autograd."""
    module = layer.make()
    values = {f"module.{name}": value for name, value in module.named_parameters()}

    def apply(values: dict[str, Tensor], use: Callable[[Any], Any]) -> Tensor:
        reader = _Reader(module, use)
        return torch.func.functional_call(reader, {**values}, ())

    def read(module: Any) -> Tensor:
        return power(module.weight.transpose(0, 1)[0])

    every = writes_to(module.weight)
    for name, write in every.items():
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), refused(name, RuntimeError, match=REFUSED):
                torch.func.grad(apply)(values, write)
    stacked = {name: torch.stack([value, 2 * value]) for name, value in values.items()}
    for name in every.keys() & {"foreach", "a view of a view", "inplace=True", "[0] ="}:
        with refused(name, RuntimeError, match=REFUSED):
            torch.func.vmap(lambda values, name=name: apply(values, WRITES[name]))(stacked)
    got = torch.func.grad(lambda values: apply(values, read))(values)
    want = torch.autograd.grad(read(module), list(module.cp.parameters()))
    names = [f"module.{name}" for name, p in module.named_parameters() if "cp" in name]
    assert_trees_close([got[name] for name in names], want, "gradient")
