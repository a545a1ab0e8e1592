"""tltorch layers to accelerate: by name, a call that makes a layer, its input and its index."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

tltorch = pytest.importorskip("tltorch")


def drawn(layer: Any, std: float = 0.7) -> Any:
    """Fill parameters, λ included, with values of one size; tltorch leaves some uninitialised."""
    with torch.no_grad():
        for parameter in layer.parameters():
            real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
            real.normal_(0, std)
    return layer


def linear(
    ins: Any, outs: Any, shape: Any = (5,), cp: str = "cp", index: Any = 0, **kw: Any
) -> Any:
    layer = tltorch.FactorizedLinear(
        ins, outs, factorization=cp, **{"rank": 4, "dtype": torch.float64, **kw}
    )
    x = torch.randn(*shape, math.prod(ins), dtype=layer.weight.factors[0].dtype)
    return drawn(layer), x, index


def conv(sizes: Any, kernel: Any, size: Any, cp: str = "cp", index: Any = 0, **kw: Any) -> Any:
    layer = tltorch.FactorizedConv(
        *sizes, kernel, factorization=cp, **{"rank": 4, "dtype": torch.float64, **kw}
    )
    x = torch.randn(3, sizes[0], *size, dtype=layer.weight.factors[0].dtype)
    return drawn(layer), x, index


def embedding(
    rows: int, dim: int, shape: Any = (9,), cp: str = "cp", index: Any = 0, **kw: Any
) -> Any:
    layer = tltorch.FactorizedEmbedding(
        rows, dim, factorization=cp, **{"rank": 4, "dtype": torch.float64, **kw}
    )
    return drawn(layer), torch.randint(rows, shape), index


def joint_conv() -> Any:
    """Three convolutions of one weight, each with its own stride, padding and bias."""
    layer, x, _ = conv((4, 6), (3, 3), (8, 7), bias=True, n_layers=3)
    layer.set(1, stride=(2, 1), padding=(0, 2), dilation=1, bias=torch.randn(6, dtype=x.dtype))
    return layer, x, 1


def from_conv(**kw: Any) -> Any:
    torch_layer = nn.Conv2d(3, 5, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)).double()
    layer = tltorch.FactorizedConv.from_conv(
        torch_layer, rank=6, decompose_weights=False, dtype=torch.float64, **kw
    )
    return drawn(layer), torch.randn(2, 3, 9, 8, dtype=torch.float64), 0


def transducted() -> Any:
    """An image layer that tltorch turned into a video layer; its old parameters stay fixed."""
    layer, _, _ = conv((3, 5), (3, 3), (1, 1), bias=True, padding=1)
    layer.transduct(3, mode=0, padding=1)
    return layer.double(), torch.randn(2, 3, 4, 6, 5, dtype=torch.float64), 0


TAKEN = {
    "linear": lambda: linear((3, 4), (2, 5)),
    "linear 1x1 modes": lambda: linear((6,), (5,)),
    "linear uneven groups": lambda: linear((2, 3, 2), (7, 2)),
    "linear order 4": lambda: linear((2, 3, 2, 2), (2, 2, 3, 2), rank=7),
    "linear no bias": lambda: linear((3, 4), (2, 5), bias=False),
    "linear rank 1": lambda: linear((3, 4), (2, 5), rank=1),
    "linear high rank": lambda: linear((3, 4), (2, 5), rank=40),
    "linear rank by ratio": lambda: linear((4, 4), (4, 4), rank=0.5),
    "linear vector": lambda: linear((3, 4), (2, 5), ()),
    "linear batch of 1": lambda: linear((3, 4), (2, 5), (1,)),
    "linear sequence": lambda: linear((3, 4), (2, 5), (2, 3, 4)),
    "linear rebuilt": lambda: linear((3, 4), (2, 5), implementation="reconstructed"),
    "linear rebuilt vector": lambda: linear((3, 4), (2, 5), (), implementation="reconstructed"),
    "linear checkpointed": lambda: linear((3, 4), (2, 5), checkpointing=True),
    "linear joint 0": lambda: linear((3, 4), (2, 5), n_layers=3, index=0),
    "linear joint -1": lambda: linear((3, 4), (2, 5), n_layers=3, index=-1),
    "linear joint rebuilt": lambda: linear(
        (3, 4), (2, 5), n_layers=2, index=1, bias=False, implementation="reconstructed"
    ),
    "linear complex": lambda: linear((3, 4), (2, 5), dtype=torch.complex128),
    "linear complex by parts": lambda: linear(
        (3, 4), (2, 5), cp="complexcp", dtype=torch.complex128
    ),
    "linear complex joint": lambda: linear(
        (3, 4), (2, 5), cp="complexcp", dtype=torch.complex128, n_layers=3, index=1
    ),
    "conv1d": lambda: conv((4, 6), (3,), (11,), bias=True),
    "conv1d options": lambda: conv((4, 6), (5,), (20,), stride=3, padding=4, dilation=2),
    "conv1d mobilenet": lambda: conv((4, 6), (4,), (11,), implementation="mobilenet", padding=1),
    "conv2d": lambda: conv((4, 6), (3, 3), (8, 7), bias=True, padding=1),
    "conv2d no bias": lambda: conv((4, 6), 3, (8, 7), order=2),
    "conv2d uneven": lambda: conv(
        (5, 3), (4, 1), (9, 7), stride=(2, 1), padding=(0, 2), dilation=(1, 3)
    ),
    "conv2d 1x1": lambda: conv((4, 6), (1, 1), (5, 4), stride=2, bias=True),
    "conv2d high rank": lambda: conv((4, 6), (3, 3), (8, 7), rank=60, padding=1),
    "conv2d rebuilt": lambda: conv((4, 6), (3, 3), (8, 7), implementation="reconstructed"),
    "conv2d mobilenet": lambda: conv(
        (4, 6), (3, 2), (8, 7), implementation="mobilenet", stride=(1, 2), bias=True
    ),
    "conv2d joint": joint_conv,
    "conv2d joint without bias": lambda: conv((4, 6), (3, 3), (8, 7), n_layers=2, index=1),
    "conv2d joint twice": lambda: conv(
        (4, 6), (3, 3), (8, 7), n_layers=(2, 3), bias=True, index=(1, 2)
    ),
    "conv2d from_conv": from_conv,
    "conv2d from_conv factorized": lambda: from_conv(implementation="factorized"),
    "conv2d complex": lambda: conv(
        (4, 6), (3, 3), (8, 7), bias=True, dtype=torch.complex128, padding=1
    ),
    "conv2d complex by parts rebuilt": lambda: conv(
        (4, 6), (3, 2), (8, 7), cp="complexcp", dtype=torch.complex128,
        implementation="reconstructed",
    ),
    "conv3d": lambda: conv((2, 3), (3, 2, 3), (5, 4, 6), bias=True, padding=1),
    "conv3d options": lambda: conv(
        (2, 3), (3, 1, 2), (7, 4, 6), stride=(2, 1, 3), padding=(1, 0, 2), dilation=(2, 1, 1)
    ),
    "conv3d mobilenet": lambda: conv((2, 3), (2, 2, 2), (5, 4, 6), implementation="mobilenet"),
    "conv3d transducted": transducted,
    "embedding": lambda: embedding(60, 16),
    "embedding order 2": lambda: embedding(60, 12, n_tensorized_modes=2),
    "embedding given modes": lambda: embedding(
        30, 8, auto_tensorize=False, tensorized_num_embeddings=(5, 6), tensorized_embedding_dim=(8,)
    ),
    "embedding repeats": lambda: embedding(12, 8, (700,)),
    "embedding 2-D": lambda: embedding(60, 16, (4, 5)),
    "embedding one index": lambda: embedding(60, 16, ()),
    "embedding complex": lambda: embedding(60, 16, dtype=torch.complex128),
    "embedding joint": lambda: embedding(60, 16, (4, 5), n_layers=3, index=2),
}  # fmt: skip

LEFT = {
    "linear tucker": lambda: linear((3, 4), (2, 5), cp="tucker", rank=(2, 2, 2, 2)),
    "linear blocktt": lambda: linear((3, 4), (2, 5), cp="blocktt"),
    "linear blocktt joint": lambda: linear((3, 4), (2, 5), cp="blocktt", n_layers=2, index=1),
    "conv tucker": lambda: conv((4, 6), (3, 3), (8, 7), cp="tucker", rank=(2, 3, 2, 2)),
    "conv tt": lambda: conv((4, 6), (3, 3), (8, 7), cp="tt", rank=2, padding=1),
    "conv tucker rebuilt": lambda: conv(
        (4, 6), (3, 3), (8, 7), cp="tucker", rank=(2, 3, 2, 2), implementation="reconstructed"
    ),
    "embedding blocktt": lambda: embedding(60, 16, cp="blocktt"),
    "embedding tucker": lambda: embedding(60, 16, cp="tucker", rank=(2,) * 6),
}
