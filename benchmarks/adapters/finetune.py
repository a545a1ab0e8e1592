"""A fine-tuning by each adapter, of whatever task: its last layers alone, the rest frozen.

Each contestant is trained once at each of its learning rates, and at further ones while the least
validation loss is at an end of them. The rate with the least is trained with further seeds, and the
page shows the test data at that rate alone. The states below the adapted layers are those of the
frozen model and are computed once. Steps are timed apart, the contestants taking turns.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.adapters.contestants import Contestant, Field, chosen
from benchmarks.adapters.texts import Labelled
from benchmarks.records import Record, rounded
from benchmarks.study import encoder
from benchmarks.study.store import Store
from polyadic.testing import LiveBytes

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to run; the same for all contestants.

    Attributes:
        layers: how many of the model's layers, from the last, are adapted.
        train: texts to train on.
        valid: texts to choose the learning rate by.
        test: texts to measure on.
        epochs: passes over ``train``.
        batch: texts in a batch.
        longest: most tokens of a text; longer ones are left out, for time.
        head_rate: learning rate of what trains beside the adapter, in every contestant.
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

    def quick(self) -> Options:
        """Shorten everything to about a minute; the numbers then mean little."""
        return replace(self, layers=1, train=64, valid=32, test=64, seeds=(0, 1), turns=2)


@dataclass(frozen=True)
class Batch:
    """Some texts, as far as the frozen layers take them.

    Attributes:
        states: (B, T, E), input of the adapted layers.
        mask: (B, T), 1 where there is a token.
        labels: (B,).
    """

    states: Tensor
    mask: Tensor
    labels: Tensor


Data = dict[str, list[Batch]]


@dataclass(frozen=True)
class Task:
    """What is learnt, by which model, and who takes part.

    Attributes:
        key: its name in commands and files, and the kind of its runs' records.
        title: of its part of the page.
        about: the model, the data and what is predicted, as a sentence's beginning for the page.
        of: how the page says of which layers some are adapted.
        options: what to run.
        field: the contestants and which of them are compared.
        targets: names of the linear layers that are adapted.
        new: names of modules that train whole, with every contestant.
        load: the layers from the first adapted one on, of ``Batch`` to scores (B, labels), and the
            data in the parts ``train``, ``valid`` and ``test``.
    """

    key: str
    title: str
    about: str
    of: str
    options: Options
    field: Field
    targets: tuple[str, ...]
    new: tuple[str, ...]
    load: Callable[[Options], tuple[nn.Module, Data]]

    @property
    def file(self) -> str:
        """Name of its records."""
        return f"adapters-{self.key}.jsonl"

    def runs(self, records: Sequence[Record], contestant: str) -> list[Record]:
        """The records of one contestant's runs."""
        return [r for r in records if r["kind"] == self.key and r["contestant"] == contestant]


def run(task: Task, options: Options, folder: Path, only: Sequence[str] | None, tell: Tell) -> Path:
    """Run what is not yet in the records."""
    store = Store(folder / task.file, asdict(options))
    base, data = task.load(options)
    contestants = chosen(task.field.contestants, only)
    if not task.new and not store.has(kind="before"):
        loss, accuracy = _measure(base, data["test"])
        store.add({"kind": "before", "test_loss": loss, "test_accuracy": accuracy})
    _costs(store, task, base, data["train"], contestants, options.turns)
    for contestant in contestants:
        one = partial(_once, store, task, base, data, options, contestant, tell)
        first, *others = options.seeds
        for rate in contestant.rates:
            one(rate, first)
        while further := next_rate(task.runs(store.records, contestant.key), first, options.tries):
            one(further, first)
        best = best_rate(task.runs(store.records, contestant.key), first)
        for seed in others:
            one(best, seed)
    return folder / task.file


def next_rate(runs: Sequence[Record], seed: int, tries: int) -> float | None:
    """A rate beyond the best one where that is the least or the largest of those tried."""
    tried = sorted({r["rate"] for r in runs if r["seed"] == seed})
    if not 1 < len(tried) < tries:
        return None
    best = best_rate(runs, seed)
    if best == tried[0]:
        return best * best / tried[1]
    return best * best / tried[-2] if best == tried[-1] else None


def best_rate(runs: Sequence[Record], seed: int) -> float:
    """The learning rate of one contestant's run with the least validation loss."""
    tried = [r for r in runs if r["seed"] == seed]
    # A run that diverged has no loss.
    losses = {r["rate"]: r["valid_loss"] for r in tried if r["valid_loss"] is not None}
    return float(min(losses, key=lambda rate: losses[rate]))


@torch.no_grad()
def states(frozen: Any, tokenizer: Any, parts: Mapping[str, Labelled], options: Options) -> Data:
    """What the layers below the adapted ones make of each part's texts, short ones first."""
    return {
        part: _batches(frozen, tokenizer, parts[part], size, options)
        for part, size in (
            ("train", options.train),
            ("valid", options.valid),
            ("test", options.test),
        )
    }


def _batches(
    frozen: Any, tokenizer: Any, part: Labelled, size: int, options: Options
) -> list[Batch]:
    tokens = tokenizer(list(part.texts))["input_ids"]
    short = [i for i, ids in enumerate(tokens) if len(ids) <= options.longest][:size]
    if len(short) < size:
        raise ValueError(f"there are {len(short)} such texts, fewer than {size}")
    labels = torch.tensor(part.labels)[short]
    made = []
    for one in encoder.batches(tokenizer, [part.texts[i] for i in short], options.batch):
        ids, mask = one["input_ids"], one["attention_mask"]
        states = frozen(input_ids=ids, attention_mask=mask).last_hidden_state
        made.append(Batch(states, mask, labels[one["index"]]))
    return made


def _once(
    store: Store,
    task: Task,
    base: nn.Module,
    data: Data,
    options: Options,
    contestant: Contestant,
    tell: Tell,
    rate: float,
    seed: int,
) -> None:
    if store.has(kind=task.key, contestant=contestant.key, rate=rounded(rate), seed=seed):
        return
    torch.manual_seed(seed)
    model = adapted(task, base, contestant)
    train_loss = _train(task, model, data["train"], options, rate, seed)
    valid_loss, valid_accuracy = _measure(model, data["valid"])
    # Rates that another one beats already are not shown the test data.
    earlier = [
        r["valid_loss"] for r in task.runs(store.records, contestant.key) if r["seed"] == seed
    ]
    best = all(loss is None or valid_loss <= loss for loss in earlier)
    test_loss, test_accuracy = _measure(model, data["test"]) if best else (None, None)
    store.add(
        {
            "kind": task.key,
            "contestant": contestant.key,
            "rate": rate,
            "seed": seed,
            "train_loss": train_loss,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
        }
    )
    tell(f"{contestant.key} at {rate:g}, seed {seed}: {valid_loss:.3f}, {valid_accuracy:.3f}")


def adapted(task: Task, base: nn.Module, contestant: Contestant) -> PeftModel:
    """A copy of the layers with an adapter on all their linear layers, and new what is new."""
    model = copy.deepcopy(base)
    for name in task.new:
        fresh: Any = model.get_submodule(name)
        fresh.reset_parameters()
    config = contestant.make(
        target_modules=list(task.targets), modules_to_save=list(task.new) or None
    )
    return get_peft_model(model, config)


def _parameters(task: Task, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What trains of the adapter, and of what is new."""
    trained = [
        (bool(set(name.split(".")) & set(task.new)), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return [p for new, p in trained if not new], [p for new, p in trained if new]


def _train(
    task: Task,
    model: nn.Module,
    batches: Sequence[Batch],
    options: Options,
    rate: float,
    seed: int,
) -> float:
    """Train; the mean loss of the last quarter of steps."""
    own, new = _parameters(task, model)
    groups = [{"params": own, "lr": rate}, {"params": new, "lr": options.head_rate}]
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
    task: Task,
    base: nn.Module,
    batches: Sequence[Batch],
    contestants: Sequence[Contestant],
    turns: int,
) -> None:
    """Parameters, file, peak memory and times of a step, the contestants taking turns."""
    if store.has(kind="costs"):
        return
    models = {contestant.key: adapted(task, base, contestant).eval() for contestant in contestants}
    # Texts of a middle length.
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
        store.add(
            {
                "kind": "costs",
                "contestant": contestant.key,
                "label": contestant.label,
                "parameters": sum(p.numel() for p in _parameters(task, model)[0]),
                "file_bytes": _file_bytes(model),
                "peak_bytes": _peak(model, batches),
                "turns": times[contestant.key],
            }
        )


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
    """Most bytes alive at once in a step on the longest texts, parameters included."""
    batch = batches[-1]
    held = [*model.parameters(), *model.buffers(), batch.states, batch.mask, batch.labels]
    with LiveBytes(held) as live:
        F.cross_entropy(model(batch), batch.labels).backward()
    model.zero_grad()
    return live.peak
