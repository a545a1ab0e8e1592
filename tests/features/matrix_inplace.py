"""The features of the matrix that change a layer's output in place, as torch's own layers allow."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from matrix_features import (
    _double_backward,
    _grad,
    _jacobians,
    _jvp,
    _vmap,
    of_functions,
)
from matrix_layers import Layer, assert_near, assert_same, results
from torch import Tensor

from cases.changes import CHANGES, zeroed
from compare import assert_close


def eager(layer: Layer) -> None:
    """Training and evaluation, with gradients and without."""
    for name, change in CHANGES.items():
        for training in (True, False):
            module, x = layer.make().train(training), layer.input()
            want = results(module, lambda x, m=module, c=change: c(layer.dense(m, x)), x)
            assert_same(results(module, lambda x, m=module, c=change: c(m(x)), x), want)
            for off in (torch.no_grad, torch.inference_mode):
                with off():
                    assert_close(change(module(x)), want["y"], "y without gradients")
        # Convolutions in single precision run in another memory format than in double.
        dtype = torch.complex64 if layer.exact.is_complex else torch.float32
        y = change(copy.deepcopy(module).to(dtype)(x.to(dtype) if x.dtype == layer.exact else x))
        y.abs().sum().backward()
        # Which entries are dropped depends on their order in memory.
        if name != "dropout":
            assert_near({"y": y.detach()}, {"y": want["y"]}, 1e-5)


def compiled(layer: Layer) -> None:
    """In the layer's own graph; ``matrix_features.compiled`` changes it behind the graph."""
    torch.compiler.reset()
    module, x = layer.make(), layer.input()

    def both(x: Tensor) -> Tensor:
        return F.relu(zeroed(module(x)), inplace=True)

    want = results(module, lambda x: F.relu(zeroed(layer.dense(module, x))), x)
    assert_same(results(module, torch.compile(both, fullgraph=True, backend="aot_eager"), x), want)


def transformed(layer: Layer) -> None:
    """Inside torch.func's transforms, in forward mode, and before a second backward."""
    for change in (CHANGES["hardswish"], CHANGES["y[...] = 0"], CHANGES["*="]):

        def changed(transform: Any, c: Any = change) -> Any:
            return lambda f, tensors: transform(lambda *t: c(f(*t)), tensors)

        for transform in (_grad, _vmap, _jvp, _jacobians, _double_backward):
            of_functions(changed(transform))(layer)
