"""Arguments that nobody should pass: each ends in a TypeError or ValueError of ours, at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import polyadic
from cases import every_case
from cases.protocol import Case
from polyadic import finetune, functional, pretrained, testing, training
from polyadic import nn as pnn

HOSTILE: dict[str, Callable[[], Any]] = {
    "str": lambda: "x", "None": lambda: None, "object": object, "numpy": lambda: np.int64(4),
    "lists": lambda: [[1], [1]], "dict": dict, "dtype": lambda: torch.float8_e4m3fn,
    "sparse": lambda: torch.ones(2, 3).to_sparse(), "csr": lambda: torch.eye(2).to_sparse_csr(),
    "huge": lambda: 2**70, "nan": lambda: float("nan"), "bytes": lambda: b"x",
    "iterator": lambda: iter(()), "function": lambda: lambda *args: None,
}  # fmt: skip
# It measures the machine whatever it is asked, and this one registers where transformers is.
WITHOUT_ARGUMENTS = ("calibrate", "register_transformers")
REFUSED = (TypeError, ValueError, FileNotFoundError, NotADirectoryError)
LAYERS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "CPLinear": (lambda **own: pnn.CPLinear(4, 6, rank=2, **own), torch.ones(3, 4)),
    "CPConv2d": (lambda **own: pnn.CPConv2d(4, 6, 3, rank=2, **own), torch.ones(1, 4, 5, 5)),
    "CPConvTranspose2d": (
        lambda **own: pnn.CPConvTranspose2d(4, 6, 3, rank=2, **own), torch.ones(1, 4, 5, 5),
    ),
    "CPEmbedding": (lambda **own: pnn.CPEmbedding(4, 6, rank=2, **own), torch.ones(2, 3).long()),
    "CPTiedLinear": (
        lambda **own: pnn.CPEmbedding(6, 4, rank=2, **own).as_linear(), torch.ones(3, 4)
    ),
}  # fmt: skip


def functions() -> Iterator[Any]:
    """Every public function that has to be given something."""
    for module in (polyadic, functional, finetune, pretrained, testing, training):
        for name in module.__all__:
            made = getattr(module, name)
            if not inspect.isfunction(made) or name in WITHOUT_ARGUMENTS:
                continue
            if any(p.default is p.empty for p in inspect.signature(made).parameters.values()):
                yield pytest.param(made, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("function", list(functions()))
def test_what_is_no_argument_is_refused(function: Callable[..., Any]) -> None:
    for name, make in HOSTILE.items():
        given = {
            p.name: make()
            for p in inspect.signature(function).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        try:
            function(**given)
        except REFUSED:
            pass
        except Exception as error:
            pytest.fail(f"{name} ends in a raw {type(error).__name__}: {error}")


@pytest.mark.parametrize("layer", LAYERS)
def test_layouts_and_dtypes_that_no_layer_computes_in(layer: str) -> None:
    make, x = LAYERS[layer]
    flat = x.flatten(1).float()
    layouts = [x.to_sparse(), flat.to_sparse_csr(), torch.nested.nested_tensor([x[0], x[0]])]
    if layer != "CPEmbedding":
        layouts += [x.to_mkldnn(), x.to(torch.float8_e5m2)]
    for wrong in layouts:
        with pytest.raises(
            TypeError, match=r"must be a dense|must be floating|is torch\.float8|got torch"
        ):
            make()(wrong)
    with pytest.raises(TypeError, match="must be floating point"):
        make().to(torch.float8_e4m3fn)(x)
    for dtype in (torch.float8_e4m3fn, torch.complex32, torch.int32):
        with pytest.raises(TypeError, match="dtype must be"):
            make(dtype=dtype)
    with pytest.raises(ValueError, match="order must be a positive int of at most 64"):
        make(order=2**31)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
@pytest.mark.parametrize("layer", ["CPConv2d", "CPConvTranspose2d"])
def test_what_is_no_size_of_a_convolution(layer: str, name: str) -> None:
    for wrong in (
        [[1], [1]],
        {1: 1},
        np.array([1, 1]),
        torch.tensor([1, 1]),
        torch.tensor(1.5),
        None,
        1.5,
        -1,
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            LAYERS[layer][0](**{name: wrong})
    assert LAYERS[layer][0](**{name: np.int64(1)})(LAYERS[layer][1]) is not None


def test_sparse_factors_are_refused() -> None:
    dense, wrong = torch.ones(4, 2), torch.ones(4, 2).to_sparse()
    for call in (
        lambda: functional.cp_linear(torch.ones(1, 4), [wrong], [dense]),
        lambda: functional.cp_linear(torch.ones(1, 4), [dense], [wrong]),
        lambda: functional.cp_embedding(torch.zeros(1).long(), [wrong], [dense]),
        lambda: functional.cp_conv(torch.ones(1, 4, 5), [dense], [dense], [wrong]),
    ):
        with pytest.raises(TypeError, match=r"factors\[0\] must be a dense tensor"):
            call()


@every_case
def test_a_remembered_call_takes_no_sparse_tensor(case: Case) -> None:
    leaves = case.leaves()
    case.cp(leaves)
    # The bias of a head is added outside the function.
    of_the_call = leaves.named().keys() - ({"bias"} if case.cls is pnn.CPTiedLinear else set())
    for sparse in of_the_call:
        wrong = leaves.of(
            {name: t.to_sparse() if name == sparse else t for name, t in leaves.named().items()}
        )
        with pytest.raises(TypeError, match="must be a dense tensor"):
            case.cp(wrong)


FLAGS: dict[str, Callable[[Any], object]] = {
    "weights": lambda on: polyadic.CPTensor(((4,), (4,)), 2, weights=on),
    "scale_grad_by_freq": lambda on: pnn.CPEmbedding(4, 4, rank=2, scale_grad_by_freq=on),
    "sparse": lambda on: pnn.CPEmbedding(4, 4, rank=2, sparse=on),
    "unique": lambda on: functional.cp_embedding(
        torch.zeros(1).long(), [torch.ones(4, 2)], [torch.ones(4, 2)], unique=on
    ),
    "train_mode": lambda on: finetune.distill(
        pnn.CPLinear(4, 4, rank=1), nn.Linear(4, 4), [torch.ones(1, 4)], steps=1, train_mode=on
    ),
    "resume": lambda on: finetune.distill(
        pnn.CPLinear(4, 4, rank=1), nn.Linear(4, 4), [torch.ones(1, 4)], steps=1, resume=on
    ),
    "dry_run": lambda on: polyadic.compress(nn.Sequential(nn.Linear(8, 8)), ratio=2.0, dry_run=on),
    "inplace": lambda on: polyadic.compress(nn.Sequential(nn.Linear(8, 8)), ratio=2.0, inplace=on),
}


@pytest.mark.parametrize("name", FLAGS)
def test_what_is_neither_on_nor_off(name: str) -> None:
    for wrong in ("no", 2.5, torch.ones(2, 2), torch.zeros(0)):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            FLAGS[name](wrong)


def test_sizes_that_are_numpy_integers() -> None:
    model = nn.Sequential(pnn.CPConv2d(4, 6, 3, rank=2), nn.Flatten(), pnn.CPLinear(54, 8, rank=2))
    polyadic.freeze(model, batch=np.int64(4), size=np.int64(5))
    assert model(torch.ones(4, 4, 5, 5)).shape == (4, 8)
