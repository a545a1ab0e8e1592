"""One adapted linear layer, forward and backward: FLOPs and kept bytes counted, times measured.

Times are of the thread that works, with one thread for torch; the contestants take turns, so that
what else the machine does meets all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.adapters.contestants import LAYERS, Contestant, chosen
from benchmarks.records import Record
from benchmarks.study.store import Store
from polyadic.testing.counting import Flops, kept_bytes

FILE = "adapters-layers.jsonl"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        sizes: in features, out features, tokens.
        rounds: turns of every contestant.
    """

    sizes: tuple[tuple[int, int, int], ...] = (
        (768, 768, 512), (2048, 2048, 512), (768, 3072, 1024), (2048, 2048, 16),
    )  # fmt: skip
    rounds: int = 15

    @classmethod
    def quick(cls) -> Options:
        """A small layer, in seconds."""
        return cls(sizes=((64, 96, 32),), rounds=2)


def run(options: Options, folder: Path, only: Sequence[str] | None, tell: Tell) -> Path:
    """Measure what is not yet in the records."""
    store = Store(folder / FILE, asdict(options))
    for size in options.sizes:
        if store.has(kind="layer", size=list(size)):
            continue
        for record in measured(size, chosen(LAYERS, only), options.rounds):
            store.add(record)
            tell(f"{size} {record['contestant']}: {record['seconds'] * 1e3:.1f} ms")
    return folder / FILE


def measured(
    size: tuple[int, int, int], contestants: Sequence[Contestant], rounds: int
) -> list[Record]:
    """A record of each contestant, and of the layer without an adapter."""
    ins, outs, tokens = size
    models: dict[str, nn.Module] = {"base": _layer(ins, outs).requires_grad_(False)}
    for contestant in contestants:
        models[contestant.key] = get_peft_model(
            _layer(ins, outs), contestant.make(target_modules=["0"])
        )
    x = torch.randn(tokens, ins, requires_grad=True)
    up = torch.randn(tokens, outs)
    times: dict[str, list[float]] = {key: [] for key in models}
    for turn in range(rounds + 2):
        for key, model in models.items():
            seconds = _step(model, x, up)
            # Plans and memory are settled in the first turns.
            if turn >= 2:
                times[key].append(seconds)
    labels = {"base": "no adapter", **{c.key: c.label for c in contestants}}
    records = []
    for key, model in models.items():
        counter = Flops()
        with counter:
            model(x).backward(up)
        kept = kept_bytes(partial(model, x), [*model.parameters(), x])
        own = sum(p.numel() for p in model.parameters() if p.requires_grad)
        records.append(
            {
                "kind": "layer",
                "size": list(size),
                "contestant": key,
                "label": labels[key],
                "parameters": own,
                "flops": counter.total,
                "kept_bytes": kept,
                "seconds": min(times[key]),
                "median": statistics.median(times[key]),
                # Of each turn, so that a ratio is of times that were taken one after the other.
                "turns": times[key],
            }
        )
    return records


def _layer(ins: int, outs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(ins, outs))


def _step(model: nn.Module, x: Tensor, up: Tensor) -> float:
    model.zero_grad()
    x.grad = None
    began = time.thread_time()
    # The backward's own thread would not be counted; gradients are asked for in this one.
    with torch.autograd.set_multithreading_enabled(False):
        model(x).backward(up)
    return time.thread_time() - began
