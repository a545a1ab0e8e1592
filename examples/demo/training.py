"""Train every contestant on the same batches, and measure what one training step costs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.demo.models import FAMILIES, Contestant, parameters
from polyadic.durable.pieces import Pieces
from polyadic.testing import kept_bytes


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) float32 and labels (N,) int64: 1347 to train, 450 to test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load() -> Digits:
    """Load scikit-learn's digits, which ship with it, standardised, in one stratified split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    places = range(len(labels))
    train, test = train_test_split(places, test_size=450, stratify=labels, random_state=0)
    mean, std = pixels[train].mean(), pixels[train].std(correction=0)
    images = ((pixels - mean) / std).to(torch.float32).reshape(-1, 1, 8, 8)
    return Digits(images[train], labels[train].long(), images[test], labels[test].long())


@dataclass(frozen=True)
class Settings:
    """One schedule for all: ``runs`` trainings with seeds from ``seed`` on, ``rounds`` timed steps.

    Adam's learning rate falls linearly to zero over a training.
    """

    seed: int
    runs: int = 3
    mlp_epochs: int = 30
    cnn_epochs: int = 20
    batch: int = 64
    learning_rate: float = 3e-3
    rounds: int = 100

    @classmethod
    def quick(cls, seed: int) -> Settings:
        """Shorten everything to a few seconds; the accuracies then mean little."""
        return cls(seed, runs=1, mlp_epochs=4, cnn_epochs=2, rounds=8)

    def epochs(self, family: str) -> int:
        """Epochs of a family, ``"MLP"`` or ``"CNN"``."""
        return self.mlp_epochs if family == "MLP" else self.cnn_epochs


class Curve(NamedTuple):
    """One training: by epoch the mean loss in nats, and the test accuracy in percent."""

    loss: list[float]
    accuracy: list[float]


class Result(NamedTuple):
    """What was measured of one contestant.

    ``converted`` are the parameters of the layers that are CP in CP models, ``ratio`` those of the
    dense model over them; ``kept`` the bytes that autograd keeps for the backward pass of a batch
    beside parameters, images and labels; ``step`` the quartiles of a step's processor time.
    """

    contestant: Contestant
    parameters: int
    converted: int
    ratio: float
    curves: list[Curve]
    kept: int
    step: list[float]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy in percent after the last epoch, one per seed."""
        return [curve.accuracy[-1] for curve in self.curves]


def adam(model: nn.Module, settings: Settings) -> torch.optim.Adam:
    """Make the optimizer: Adam, fused so that many small factors cost one call."""
    return torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)


def accuracy(model: nn.Module, data: Digits) -> float:
    """Test accuracy in percent."""
    with torch.no_grad():
        right = model(data.test_x).argmax(dim=1) == data.test_y
    return 100 * int(right.sum()) / len(right)


def train(
    build: Callable[[], nn.Module],
    epochs: int,
    data: Digits,
    settings: Settings,
    seed: int,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> tuple[nn.Module, Curve]:
    """Make a model and train it; everything, the order of batches too, follows from the seed.

    A ``penalty`` of the model is added to the loss of every step, but is not in the curve.
    """
    torch.manual_seed(seed)
    model = build()
    optimizer = adam(model, settings)
    order = torch.Generator().manual_seed(seed)
    steps = len(data.train_y) // settings.batch
    curve = Curve([], [])
    for epoch in range(epochs):
        shuffled = torch.randperm(len(data.train_y), generator=order)
        total = torch.zeros((), dtype=torch.float64)
        for step in range(steps):
            rows = shuffled[step * settings.batch : (step + 1) * settings.batch]
            done = (epoch * steps + step) / (epochs * steps)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - done)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
            (loss if penalty is None else loss + penalty(model)).backward()
            optimizer.step()
            total += loss.detach()
        curve.loss.append(total.item() / steps)
        curve.accuracy.append(accuracy(model, data))
    return model, curve


def measure(
    curves: Mapping[Contestant, list[Curve]], data: Digits, settings: Settings
) -> list[Result]:
    """Count and time training steps of one batch, interleaved, of newly made models of a family.

    In each round every model makes one step, beginning with another model each time, so that a
    slow moment of the machine falls on all of them. Five rounds before the first are not counted.
    """
    torch.manual_seed(settings.seed)
    x, y = data.train_x[: settings.batch].clone(), data.train_y[: settings.batch].clone()
    models = [c.build() for c in curves]
    losses = [partial(lambda m: nn.functional.cross_entropy(m(x), y), m) for m in models]
    optimizers = [adam(m, settings) for m in models]
    seconds: list[list[float]] = [[] for _ in models]
    for number in range(-5, settings.rounds):
        for turn in range(len(models)):
            index = (turn + number) % len(models)
            start = time.process_time()
            optimizers[index].zero_grad()
            losses[index]().backward()
            optimizers[index].step()
            seconds[index] += [time.process_time() - start] * (number >= 0)
    results: list[Result] = []
    for c, m, loss, times in zip(curves, models, losses, seconds, strict=True):
        converted = sum(parameters(m.get_submodule(n)) for n in FAMILIES[c.family].converted)
        ratio = results[0].converted / converted if results else 1.0
        kept = kept_bytes(loss, leave_out=[*m.parameters(), x, y])
        found = Result(c, parameters(m), converted, ratio, curves[c], kept, quantiles(times))
        results.append(found)
    return results


def _trained(c: Contestant, data: Digits, settings: Settings, seed: int) -> dict[str, Any]:
    """A training, as it is kept."""
    model, curve = train(c.build, settings.epochs(c.family), data, settings, seed)
    return {"model": model.state_dict(), **curve._asdict()}


def compare(
    contestants: Sequence[Contestant],
    data: Digits,
    settings: Settings,
    tell: Callable[[str], None],
    pieces: Pieces,
) -> tuple[dict[str, list[Result]], dict[Contestant, nn.Module]]:
    """Train, count and time all contestants, the first of each family being its dense one.

    ``tell`` is told of each training that begins; ``pieces`` keeps those that are done. Returned
    are the results by family, and the trained models of the first seed.
    """
    trained: dict[Contestant, nn.Module] = {}
    results: dict[str, list[Result]] = {}
    for family in dict.fromkeys(c.family for c in contestants):
        members = [c for c in contestants if c.family == family]
        curves: dict[Contestant, list[Curve]] = {c: [] for c in members}
        for c in members:
            for seed in reversed(range(settings.seed, settings.seed + settings.runs)):
                tell(f"training {family} {c.label}")
                name = "-".join(map(str, (*c, seed)))
                made = pieces.get(name, partial(_trained, c, data, settings, seed))
                trained[c] = c.build()
                trained[c].load_state_dict(made["model"])
                curves[c].insert(0, Curve(made["loss"], made["accuracy"]))
        results[family] = measure(curves, data, settings)
    return results, trained
