"""The thin products of a factorized layer as a fraction of what a copy moves.

Z = X KA reads X (T, d), Y = Z KCᵀ writes Y (T, d), dK = Xᵀ G reads X once more: each moves its long
operand once, so that copy bandwidth bounds it. Whether a library's product comes near decides
whether products of our own could pay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench

RANKS = (64, 16, 96, 256, 89)
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(bench: Bench) -> None:
    """Every product at every size; another order of operands and other routes beside them."""
    sizes = [(R, d, T) for R in RANKS for d in (4096, 8192) for T in (2048, 8192)]
    for R, d, T in [(8, 48, 32)] if bench.dry else sizes:
        if bench.left() < 1:
            raise TimeoutError(f"stopped before R={R}, d={d}, T={T}")
        with bench.guarded(f"R={R} d={d} T={T}"):
            _size(bench, R, d, T)


def products(bench: Bench, R: int, T: int) -> dict[str, Product]:
    """Products of x (T, d), k (d, R) and z (T, R) by name."""
    pieces = 8 if T % 8 == 0 else 1

    def split(x: Tensor, k: Tensor, z: Tensor) -> Tensor:
        xs, zs = x.view(pieces, -1, x.shape[1]), z.view(pieces, -1, R)
        return torch.bmm(xs.transpose(1, 2), zs).sum(0)

    found: dict[str, Product] = {
        "X KA": lambda x, k, z: x @ k,
        "Z KCᵀ": lambda x, k, z: z @ k.t(),
        "Xᵀ G": lambda x, k, z: x.t() @ z,
        "X KA, as (KAᵀ Xᵀ)ᵀ": lambda x, k, z: (k.t() @ x.t()).t(),
        "Xᵀ G, as (Gᵀ X)ᵀ": lambda x, k, z: (z.t() @ x).t(),
        "Xᵀ G, in 8 pieces of T": split,
    }
    if bench.device.type == "cuda" and bench.dtype != torch.float32:
        found["Xᵀ G, float32 result"] = _mm_in_float32
    return found


def _mm_in_float32(x: Tensor, k: Tensor, z: Tensor) -> Tensor:
    return torch.mm(x.t(), z, out_dtype=torch.float32)


def _size(bench: Bench, R: int, d: int, T: int) -> None:
    nbytes = bench.size * (T * d + d * R + T * R)
    sets = [
        (bench.randn(T, d), bench.randn(d, R), bench.randn(T, R))
        for _ in range(bench.rotations(bench.size * T * d, 16))
    ]
    pieces = {}
    for name, product in products(bench, R, T).items():
        with bench.guarded(f"{name} R={R} d={d} T={T}"):
            pieces[name] = bench.timer.capture([partial(product, *one) for one in sets])
    for name, timing in bench.timer.graphs(pieces).items():
        rate = nbytes / timing.median
        bench.writer.write(
            "product",
            product=name,
            R=R,
            d=d,
            T=T,
            seconds=timing.median,
            bytes=nbytes,
            bytes_per_second=rate,
            of_copy=rate / bench.rates.copy,
            dtype=bench.dtype_name(),
        )
    pieces.clear()
    del sets
    bench.clean()
