"""The last layers of a sentence encoder fine-tuned to tell film reviews apart, by each adapter.

Each contestant is trained once at each of its learning rates, and at further ones while the least
validation loss is at an end of them. The rate with the least is trained with further seeds, and the
page shows the test films at that rate alone. The states below the adapted layers are those of the
frozen encoder and are computed once. Steps are timed apart, the contestants taking turns.
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
from benchmarks.records import rounded
from benchmarks.study import encoder
from benchmarks.study.store import Store
from polyadic.testing import LiveBytes

FILE = "adapters-reviews.jsonl"
TARGETS = ["query", "key", "value", "dense"]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to run; the same for all contestants.

    Attributes:
        layers: how many of the encoder's six layers, from the last, are adapted.
        train: reviews to train on.
        valid: reviews to choose the learning rate by.
        test: reviews of other films to measure on.
        epochs: passes over ``train``.
        batch: reviews in a batch.
        longest: most tokens of a review; longer ones are left out, for time.
        head_rate: learning rate of the classifier, which every contestant trains.
        seeds: the first is used to choose the learning rate.
        tries: most learning rates of a contestant.
        turns: steps of each contestant that are timed.
    """

    layers: int = 2
    train: int = 1024
    valid: int = 400
    test: int = 1000
    epochs: int = 1
    batch: int = 16
    longest: int = 24
    head_rate: float = 5e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    tries: int = 5
    turns: int = 12

    @classmethod
    def quick(cls) -> Options:
        """Shorten everything to about a minute; the numbers then mean little."""
        return cls(layers=1, train=64, valid=32, test=64, epochs=1, seeds=(0, 1), turns=2)


@dataclass(frozen=True)
class Batch:
    """Some reviews, as far as the frozen layers take them.

    Attributes:
        states: (B, T, E), input of the adapted layers.
        mask: (B, T), 1 where there is a token.
        labels: (B,).
    """

    states: Tensor
    mask: Tensor
    labels: Tensor


class Classifier(nn.Module):
    """The last layers of the encoder, with a linear layer on the mean of their states.

    Args:
        layers: of the encoder.
        width: of its states.
    """

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(width, 2)

    def forward(self, batch: Batch) -> Tensor:
        states, kept = batch.states, batch.mask.to(batch.states.dtype)
        # What is added to attention scores: nothing, or what hides a token.
        hidden = (1 - kept)[:, None, None, :] * torch.finfo(states.dtype).min
        for layer in self.layers:
            found = layer(states, attention_mask=hidden)
            states = found[0] if isinstance(found, tuple) else found
        mean = (states * kept.unsqueeze(-1)).sum(1) / kept.sum(1, keepdim=True)
        # Normalised as the encoder's embeddings are, and then of entries of the order of 1.
        scores: Tensor = self.head(F.normalize(mean, dim=-1) * self.head.in_features**0.5)
        return scores


def run(options: Options, folder: Path, only: Sequence[str] | None, tell: Tell) -> Path:
    """Run what is not yet in the records."""
    store = Store(folder / FILE, asdict(options))
    parts = texts.load()
    model: Any
    model, tokenizer = encoder.load()
    sizes = {"train": options.train, "valid": options.valid, "test": options.test}
    frozen, top = split(model, options.layers)
    base = Classifier(top, model.config.hidden_size)
    data = {
        part: _batches(frozen, tokenizer, parts[part], size, options)
        for part, size in sizes.items()
    }
    contestants = chosen(FINE_TUNED, only)
    _costs(store, base, data["train"], contestants, options.turns)
    for contestant in contestants:
        first, *others = options.seeds
        for rate in contestant.rates:
            _once(store, base, data, options, contestant, rate, first, tell)
        while further := next_rate(store.records, contestant.key, first, options.tries):
            _once(store, base, data, options, contestant, further, first, tell)
        best = best_rate(store.records, contestant.key, first)
        for seed in others:
            _once(store, base, data, options, contestant, best, seed, tell)
    return folder / FILE


def next_rate(records: Sequence[dict[str, Any]], key: str, seed: int, tries: int) -> float | None:
    """A rate beyond the best one where that is the least or the largest of those tried."""
    tried = sorted({r["rate"] for r in _runs(records, key) if r["seed"] == seed})
    if not 1 < len(tried) < tries:
        return None
    best = best_rate(records, key, seed)
    if best == tried[0]:
        return best * best / tried[1]
    return best * best / tried[-2] if best == tried[-1] else None


def best_rate(records: Sequence[dict[str, Any]], key: str, seed: int) -> float:
    """The learning rate with the least validation loss."""
    tried = [r for r in _runs(records, key) if r["seed"] == seed]
    # A run that diverged has no loss.
    losses = {r["rate"]: r["valid_loss"] for r in tried if r["valid_loss"] is not None}
    return float(min(losses, key=lambda rate: losses[rate]))


def _runs(records: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [r for r in records if r["kind"] == "reviews" and r["contestant"] == key]


def split(model: Any, layers: int) -> tuple[Any, nn.ModuleList]:
    """The encoder without its last layers, and these."""
    every = model.encoder.layer
    top = nn.ModuleList(every[-layers:])
    model.encoder.layer = every[:-layers]
    return model, top


@torch.no_grad()
def _batches(
    frozen: Any, tokenizer: Any, part: texts.Reviews, size: int, options: Options
) -> list[Batch]:
    tokens = tokenizer(list(part.texts))["input_ids"]
    short = [i for i, ids in enumerate(tokens) if len(ids) <= options.longest][:size]
    if len(short) < size:
        raise ValueError(f"there are {len(short)} such reviews, fewer than {size}")
    labels = torch.tensor(part.labels)[short]
    made = []
    for one in encoder.batches(tokenizer, [part.texts[i] for i in short], options.batch):
        ids, mask = one["input_ids"], one["attention_mask"]
        states = frozen(input_ids=ids, attention_mask=mask).last_hidden_state
        made.append(Batch(states, mask, labels[one["index"]]))
    return made


def _once(
    store: Store,
    base: Classifier,
    data: dict[str, list[Batch]],
    options: Options,
    contestant: Contestant,
    rate: float,
    seed: int,
    tell: Tell,
) -> None:
    if store.has(kind="reviews", contestant=contestant.key, rate=rounded(rate), seed=seed):
        return
    torch.manual_seed(seed)
    model = adapted(base, contestant)
    train_loss = _train(model, data["train"], options, rate, seed)
    valid_loss, valid_accuracy = _measure(model, data["valid"])
    # Rates that another one beats already are not shown the test films.
    earlier = [r["valid_loss"] for r in _runs(store.records, contestant.key) if r["seed"] == seed]
    best = all(loss is None or valid_loss <= loss for loss in earlier)
    test_loss, test_accuracy = _measure(model, data["test"]) if best else (None, None)
    store.add({
        "kind": "reviews", "contestant": contestant.key, "rate": rate, "seed": seed,
        "train_loss": train_loss, "valid_loss": valid_loss, "valid_accuracy": valid_accuracy,
        "test_loss": test_loss, "test_accuracy": test_accuracy,
    })  # fmt: skip
    tell(f"{contestant.key} at {rate:g}, seed {seed}: {valid_loss:.3f}, {valid_accuracy:.3f}")


def adapted(base: Classifier, contestant: Contestant) -> PeftModel:
    """A copy of the layers with a new head, and the adapter on all their linear layers."""
    model = copy.deepcopy(base)
    model.head.reset_parameters()
    config = contestant.make(target_modules=TARGETS, modules_to_save=["head"])
    return get_peft_model(model, config)


def _parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What trains of the adapter, and of the classifier."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [p for n, p in trained if ".head." not in n], [p for n, p in trained if ".head." in n]


def _train(
    model: nn.Module, batches: Sequence[Batch], options: Options, rate: float, seed: int
) -> float:
    """Train; the mean loss of the last quarter of steps."""
    own, head = _parameters(model)
    groups = [{"params": own, "lr": rate}, {"params": head, "lr": options.head_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = options.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate, options.head_rate], total_steps=steps, pct_start=0.1
    )
    order = torch.Generator().manual_seed(seed)
    losses = []
    # No dropout, so that what differs is the adapter.
    model.eval()
    for _ in range(options.epochs):
        for i in torch.randperm(len(batches), generator=order):
            loss = F.cross_entropy(model(batches[i]), batches[i].labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return statistics.fmean(losses[-len(losses) // 4 :])


def _costs(
    store: Store,
    base: Classifier,
    batches: Sequence[Batch],
    contestants: Sequence[Contestant],
    turns: int,
) -> None:
    """Parameters, file, peak memory and times of a step, the contestants taking turns."""
    if store.has(kind="costs"):
        return
    models = {contestant.key: adapted(base, contestant).eval() for contestant in contestants}
    # Reviews of a middle length.
    batch = batches[len(batches) // 2]
    times: dict[str, list[float]] = {key: [] for key in models}
    for turn in range(turns + 2):
        for key, model in models.items():
            seconds = _step(model, batch)
            # Plans and memory are settled in the first turns.
            if turn >= 2:
                times[key].append(seconds)
    for contestant in contestants:
        model = models[contestant.key]
        store.add({
            "kind": "costs", "contestant": contestant.key, "label": contestant.label,
            "parameters": sum(p.numel() for p in _parameters(model)[0]),
            "file_bytes": _file_bytes(model), "peak_bytes": _peak(model, batches),
            "turns": times[contestant.key],
        })  # fmt: skip


def _step(model: nn.Module, batch: Batch) -> float:
    began = time.thread_time()
    # The backward's own thread would not be counted; gradients are asked for in this one.
    with torch.autograd.set_multithreading_enabled(False):
        F.cross_entropy(model(batch), batch.labels).backward()
    seconds = time.thread_time() - began
    model.zero_grad()
    return seconds


@torch.no_grad()
def _measure(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean cross entropy and accuracy."""
    scores = torch.cat([model(batch) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    right = (scores.argmax(1) == labels).double().mean()
    return float(F.cross_entropy(scores, labels)), float(right)


def _file_bytes(model: PeftModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def _peak(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Most bytes alive at once in a step on the longest reviews, parameters included."""
    batch = batches[-1]
    held = [*model.parameters(), *model.buffers(), batch.states, batch.mask, batch.labels]
    with LiveBytes(held) as live:
        F.cross_entropy(model(batch), batch.labels).backward()
    model.zero_grad()
    return live.peak
