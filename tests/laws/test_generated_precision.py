"""Random layers in every dtype, in poisoned memory, against torch's own in float64.

A layer's output and gradients are sums of products, so that each entry may be off by its rounding:
a few units of the dtype times the same sum of the products' moduli, which the reference makes of
the moduli of all operands. That holds for any size, order of summation and processor, and what is
read from memory that nobody wrote, or lost, is far outside.

``make test`` draws 120 layers in each dtype; ``pytest -m long`` 4000 others at each run, of a seed
that it prints. On an AMD EPYC with AVX-512 (torch 2.13), 4000 in each of the four dtypes found
nothing wrong in November 2026; before that some hundred in bfloat16 had found weight gradients that
oneDNN leaves unwritten.
"""

from __future__ import annotations

import copy
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases.weights import (
    dense_conv,
    dense_conv_transpose,
    dense_embedding,
    dense_linear,
    dense_tied,
)
from poisoning import poisoned
from polyadic import nn as pnn

MEMORY = ("fast", "balanced", "least")
SUITE, LONG = 120, 4000
# Units of rounding by which sums may be off: as many as intermediates are rounded one after the
# other, and in the wider dtypes the sums' own, which are of at most a few hundred terms.
UNITS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 6, torch.float16: 6}


@dataclass(frozen=True)
class Drawn:
    """A layer in float64, its input and what torch computes with its parameters."""

    layer: Any
    x: Tensor
    dense: Callable[[Any, Tensor], Tensor]


def _lead(number: random.Random) -> list[int]:
    return [number.randint(1, 4) for _ in range(number.randint(0, 2))] + [number.randint(0, 7)]


def _linear(number: random.Random, **own: Any) -> Drawn:
    sizes = number.randint(1, 40), number.randint(1, 40)
    own |= {"bias": number.random() < 0.5}
    joint = number.random() < 0.3
    layer = pnn.CPLinear.joint(3, *sizes, **own)[1] if joint else pnn.CPLinear(*sizes, **own)
    return Drawn(layer, torch.randn(*_lead(number), sizes[0]), dense_linear)


def _lookup(number: random.Random, **own: Any) -> Drawn:
    size, width = number.randint(1, 60), number.randint(1, 30)
    layer = pnn.CPEmbedding(size, width, number.choice([None, size - 1]), **own)
    lead = [700] if number.random() < 0.2 else _lead(number)
    if number.random() < 0.3:
        head = layer.as_linear(number.random() < 0.5)
        layer.padding_idx = None
        return Drawn(head, torch.randn(*_lead(number), width), dense_tied)
    return Drawn(layer, torch.randint(size, lead), dense_embedding)


def _convolution(number: random.Random, **own: Any) -> Drawn:
    """Kernels beyond the input, padding that no tap looks out of, one channel, rank 1."""
    dims, transposed = number.randint(1, 3), number.random() < 0.35

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(number.randint(low, high) for _ in range(dims))

    groups = number.choice((1, 1, 1, 2, 3))
    channels = [groups * number.choice((1, 1, 2, 3, 5, 8)) for _ in range(2)]
    own |= {"bias": number.random() < 0.5, "groups": groups}
    own |= {"stride": each(1, 3), "padding": each(0, 3), "dilation": each(1, 2)}
    name = f"CPConv{'Transpose' if transposed else ''}{dims}d"
    if transposed:
        pairs = zip(own["stride"], own["dilation"], strict=True)
        own["output_padding"] = tuple(number.randrange(max(pair)) for pair in pairs)
    else:
        modes = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
        own["padding_mode"] = number.choice(modes)
        if number.random() < 0.15 and own["padding_mode"] == "zeros":
            own |= {"padding": "same", "stride": 1}
    layer = getattr(pnn, name)(*channels, each(1, 4), **own)
    x = torch.randn(number.choice((1, 1, 2, 3)), channels[0], *each(1, 7))
    if number.random() < 0.5:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return Drawn(layer, x, dense_conv_transpose if transposed else dense_conv)


def draw(number: random.Random) -> Drawn:
    """A layer that torch's own has a counterpart of, for its input."""
    kind = number.choice((_linear, _lookup, _convolution, _convolution, _convolution))
    while True:
        own: dict[str, Any] = {
            "rank": number.choice((1, 1, 2, 3, 8)),
            "order": number.randint(1, 3),
            "memory": number.choice(MEMORY),
            "dtype": torch.float64,
        }
        found = kind(number, **own)
        owner = getattr(found.layer.cp, "joint", found.layer.cp)
        if number.random() < 0.3:
            owner.weights = nn.Parameter(torch.empty(owner.rank, dtype=torch.float64))
        with torch.no_grad():
            for parameter in found.layer.parameters():
                parameter.copy_(
                    torch.randn_like(parameter).sign() * (0.5 + torch.rand_like(parameter))
                )
        x = found.x.double() if found.x.is_floating_point() else found.x
        try:
            with torch.no_grad():
                fits = 0 not in found.dense(found.layer, x).shape[1:]
        except RuntimeError:
            continue
        if fits:
            return found


def results(
    layer: Any, call: Callable[[Any, Tensor], Tensor], x: Tensor, grad_y: Tensor | None
) -> dict[str, Tensor]:
    leaves = dict(layer.named_parameters())
    if x.is_floating_point():
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        leaves = {"x": x, **leaves}
    y = call(layer, x)
    grad_y = torch.ones_like(y) if grad_y is None else grad_y.to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def moduli(layer: Any) -> Any:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()
    return layer


def check(drawn: Drawn, dtype: torch.dtype, autocast: bool) -> None:
    own = torch.float32 if autocast else dtype
    layer = drawn.layer.to(own)
    x = drawn.x.to(own) if drawn.x.is_floating_point() else drawn.x
    exact, exact_x = copy.deepcopy(layer).double(), x
    if x.is_floating_point():
        exact_x = x.double().contiguous()
    with torch.no_grad():
        grad_y = torch.randn(drawn.dense(exact, exact_x).shape).to(dtype)
    want = results(exact, drawn.dense, exact_x, grad_y)
    size_x = exact_x.abs() if x.is_floating_point() else x
    sizes = results(moduli(exact), drawn.dense, size_x, grad_y.double().abs())
    with poisoned(), torch.autocast("cpu", dtype, enabled=autocast):
        got = results(layer, lambda layer, x: layer(x), x, grad_y)
    for name, tensor in got.items():
        # Autocast rounds each operand once more.
        unit = torch.finfo(dtype).eps * UNITS[dtype] * (2 if autocast else 1)
        tiny = torch.finfo(dtype).tiny * 64
        wrong = ~((tensor.double() - want[name]).abs() <= unit * sizes[name] + tiny)
        said = f"{layer} of {tuple(x.shape)}, {x.stride()}, {name}"
        assert not wrong.any(), f"{said}: {int(wrong.sum())} of {wrong.numel()} entries are wrong"


def run(dtype: torch.dtype, count: int, seed: str) -> None:
    """Check so many layers, each of a seed of its own that a failure names."""
    for i in range(count):
        number = random.Random(f"{seed} {dtype} {i}")
        torch.manual_seed(number.randrange(2**31))
        drawn = draw(number)
        halves = dtype in (torch.bfloat16, torch.float16)
        try:
            check(drawn, dtype, halves and number.random() < 0.3)
        except Exception as error:
            raise AssertionError(f"layer {i} of seed {seed!r} in {dtype}: {error}") from error


@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_random_layers(dtype: torch.dtype) -> None:
    run(dtype, SUITE, "suite")


FOUND = [
    pytest.param(
        lambda: pnn.CPConv3d(10, 2, (3, 4, 4), (2, 1, 2), (2, 2, 1), rank=1, memory="least"),
        (1, 10, 1, 5, 3), torch.float32, id="one-channel-3d",
    ),
    pytest.param(
        lambda: pnn.CPConv3d(8, 8, 3, padding=1, rank=16), (2, 8, 2, 7, 7), torch.bfloat16,
        id="depthwise-3d",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "shape", "dtype"), FOUND)
def test_layers_that_were_wrong(
    make: Callable[[], Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for autocast in (False, dtype == torch.bfloat16):
        torch.manual_seed(0)
        check(Drawn(make().double(), torch.randn(shape).double(), dense_conv), dtype, autocast)


@pytest.mark.long
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_thousands_of_random_layers(dtype: torch.dtype) -> None:
    run(dtype, LONG, secrets.token_hex(4))


@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_memory_that_nobody_wrote_is_found(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a gradient of the bias that leaves one entry as it was in memory, one of few is found."""
    from polyadic.kernels.linear import LinearMap

    def careless(grad_y: Tensor) -> Tensor:
        total = grad_y.sum(0)
        return torch.empty_like(total).index_copy_(0, torch.arange(len(total) - 1), total[:-1])

    monkeypatch.setattr(LinearMap, "bias_gradient", staticmethod(careless))
    with pytest.raises(AssertionError, match="entries are wrong"):
        run(dtype, SUITE, "suite")
