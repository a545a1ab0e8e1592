"""A sentence encoder fine-tuned to tell film reviews apart, with each adapter at its best rate.

Each contestant is trained once at each of its learning rates. The rate with the least validation
loss is trained with further seeds, and the page shows the test films at that rate alone.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.adapters import texts
from benchmarks.adapters.contestants import FINE_TUNED, Contestant, chosen
from benchmarks.study import encoder
from benchmarks.study.store import Store
from polyadic.testing.counting import LiveBytes

FILE = "adapters-reviews.jsonl"
TARGETS = ["query", "key", "value", "dense"]
Tell = Callable[[str], None]
Batch = tuple[encoder.Batch, Tensor]


@dataclass(frozen=True)
class Options:
    """What to run; the same for all contestants.

    Attributes:
        train: reviews to train on.
        valid: reviews to choose the learning rate by.
        test: reviews of other films to measure on.
        epochs: passes over ``train``.
        batch: reviews in a batch.
        head_rate: learning rate of the classifier, which every contestant trains.
        seeds: the first is used to choose the learning rate.
    """

    train: int = 512
    valid: int = 300
    test: int = 800
    epochs: int = 2
    batch: int = 32
    head_rate: float = 5e-3
    seeds: tuple[int, ...] = (0, 1, 2)

    @classmethod
    def quick(cls) -> Options:
        """Shorten everything to about a minute; the numbers then mean little."""
        return cls(train=64, valid=32, test=64, epochs=1, seeds=(0, 1))


class Classifier(nn.Module):
    """The encoder with a linear layer on the mean of its last states.

    Args:
        model: the encoder.
        width: of its states.
    """

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = model
        self.head = nn.Linear(width, 2)

    def forward(self, batch: encoder.Batch) -> Tensor:
        # The embeddings have length 1; a classifier wants entries of the order of 1.
        embedded = encoder.sentence_embeddings(self.encoder, batch)
        scores: Tensor = self.head(embedded * self.head.in_features**0.5)
        return scores


def run(options: Options, folder: Path, only: Sequence[str] | None, tell: Tell) -> Path:
    """Run what is not yet in the records."""
    store = Store(folder / FILE, asdict(options))
    parts = texts.load()
    model, tokenizer = encoder.load()
    sizes = {"train": options.train, "valid": options.valid, "test": options.test}
    data = {
        part: _batches(tokenizer, parts[part], size, options.batch) for part, size in sizes.items()
    }
    for contestant in chosen(FINE_TUNED, only):
        first, *others = options.seeds
        for rate in contestant.rates:
            _once(store, model, data, options, contestant, rate, first, tell)
        best = best_rate(store.records, contestant.key, first)
        for seed in others:
            _once(store, model, data, options, contestant, best, seed, tell)
    return folder / FILE


def best_rate(records: Sequence[dict[str, Any]], key: str, seed: int) -> float:
    """The learning rate with the least validation loss."""
    tried = [r for r in records if r["contestant"] == key and r["seed"] == seed]
    # A run that diverged has no loss.
    losses = {r["rate"]: r["valid_loss"] for r in tried if r["valid_loss"] is not None}
    return float(min(losses, key=lambda rate: losses[rate]))


def _batches(tokenizer: Any, part: texts.Reviews, size: int, batch: int) -> list[Batch]:
    labels = torch.tensor(part.labels[:size])
    if len(labels) < size:
        raise ValueError(f"there are {len(labels)} reviews, fewer than {size}")
    made = encoder.batches(tokenizer, part.texts[:size], batch)
    return [(one, labels[one["index"]]) for one in made]


def _once(
    store: Store,
    base: nn.Module,
    data: dict[str, list[Batch]],
    options: Options,
    contestant: Contestant,
    rate: float,
    seed: int,
    tell: Tell,
) -> None:
    if store.has(contestant=contestant.key, rate=rate, seed=seed):
        return
    torch.manual_seed(seed)
    model = adapted(base, contestant)
    losses, seconds = _train(model, data["train"], options, rate, seed)
    valid_loss, valid_accuracy = _measure(model, data["valid"])
    test_loss, test_accuracy = _measure(model, data["test"])
    own = sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and ".head." not in n
    )
    store.add({
        "kind": "reviews", "contestant": contestant.key, "label": contestant.label, "rate": rate,
        "seed": seed, "parameters": own, "file_bytes": _file_bytes(model), "train_loss": losses,
        "valid_loss": valid_loss, "valid_accuracy": valid_accuracy, "test_loss": test_loss,
        "test_accuracy": test_accuracy, "step_seconds": seconds,
        "peak_bytes": _peak(model, data["train"]) if rate == contestant.rates[0] else None,
    })  # fmt: skip
    tell(f"{contestant.key} at {rate:g}, seed {seed}: {valid_accuracy:.3f} {test_accuracy:.3f}")


def adapted(base: nn.Module, contestant: Contestant) -> PeftModel:
    """A copy of the encoder with a new head, and the adapter on all its linear layers."""
    model = Classifier(copy.deepcopy(base), base.config.hidden_size)
    config = contestant.make(target_modules=TARGETS, modules_to_save=["head"])
    return get_peft_model(model, config)


def _train(
    model: nn.Module, batches: Sequence[Batch], options: Options, rate: float, seed: int
) -> tuple[float, float]:
    """Train; the mean loss of the last quarter of steps, and the thread's seconds a step."""
    head = [p for n, p in model.named_parameters() if p.requires_grad and ".head." in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and ".head." not in n]
    groups = [{"params": rest, "lr": rate}, {"params": head, "lr": options.head_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate, options.head_rate], total_steps=steps, pct_start=0.1
    )
    order = torch.Generator().manual_seed(seed)
    losses, seconds = [], []
    # No dropout, so that what differs is the adapter.
    model.eval()
    for _ in range(options.epochs):
        for i in torch.randperm(len(batches), generator=order):
            began = time.thread_time()
            batch, labels = batches[i]
            loss = F.cross_entropy(model(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            seconds.append(time.thread_time() - began)
    return statistics.fmean(losses[-len(losses) // 4 :]), statistics.median(seconds)


@torch.no_grad()
def _measure(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean cross entropy and accuracy."""
    scores = torch.cat([model(batch) for batch, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    right = (scores.argmax(1) == labels).double().mean()
    return float(F.cross_entropy(scores, labels)), float(right)


def _file_bytes(model: PeftModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def _peak(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Most bytes alive at once in a step on the longest reviews, parameters included."""
    batch, labels = batches[-1]
    held = [*model.parameters(), *model.buffers(), *batch.values()]
    with LiveBytes(held) as live:
        F.cross_entropy(model(batch), labels).backward()
    model.zero_grad()
    return live.peak
