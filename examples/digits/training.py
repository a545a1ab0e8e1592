"""Train every contestant on the same batches, and gather what the report tells about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn

from examples.digits.data import Digits
from examples.digits.measure import StepTime, kept_by_training_batch, time_steps
from examples.digits.models import Contestant, parameter_count


@dataclass(frozen=True)
class Settings:
    """One schedule for all contestants of a family.

    Attributes:
        seed: First seed; run number i trains with ``seed + i``.
        runs: Trainings per contestant.
        mlp_epochs: Epochs of the MLPs.
        cnn_epochs: Epochs of the CNNs.
        batch: Images in a batch; the last, smaller one of an epoch is dropped.
        learning_rate: Adam's, falling linearly to zero over the training.
        rounds: Timed steps of each contestant.
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


@dataclass(frozen=True)
class Curve:
    """One training.

    Attributes:
        seed: Seed of the initialisation and of the order of the batches.
        loss: Mean training loss (cross-entropy, nats) of each epoch.
        accuracy: Test accuracy after each epoch, in 0..1.
        wrong: Test images that the trained model gets wrong, by index.
    """

    seed: int
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    wrong: tuple[int, ...]


@dataclass(frozen=True)
class ModelResult:
    """What the demo measured of one contestant.

    Attributes:
        contestant: The model it is about.
        parameters: Parameters of the whole model.
        converted_parameters: Parameters of the layers that are CP in the CP models.
        dense_parameters: Parameters of those layers in the dense model of the family.
        curves: One per seed.
        kept_bytes: Bytes kept for backward by one training batch.
        time: Time of one training step.
    """

    contestant: Contestant
    parameters: int
    converted_parameters: int
    dense_parameters: int
    curves: tuple[Curve, ...]
    kept_bytes: int
    time: StepTime

    @property
    def compression(self) -> float:
        """Dense parameters over this model's, in the converted layers."""
        return self.dense_parameters / self.converted_parameters

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Test accuracy after the last epoch, one per seed."""
        return tuple(curve.accuracy[-1] for curve in self.curves)

    @property
    def accuracy(self) -> float:
        """Mean of the accuracies over the seeds."""
        return fmean(self.accuracies)


def mistakes(model: nn.Module, x: Tensor, y: Tensor) -> tuple[int, ...]:
    """List the images of ``x``, by index, that the model does not give their label in ``y``."""
    with torch.no_grad():
        wrong = (model(x).argmax(dim=1) != y).nonzero()
    return tuple(wrong.flatten().tolist())


def adam(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Make the optimizer: Adam, fused so that many small factors cost one call."""
    return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)


def train(
    contestant: Contestant,
    data: Digits,
    settings: Settings,
    seed: int,
    on_epoch: Callable[[], None] = lambda: None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> tuple[nn.Module, Curve]:
    """Train one contestant; everything follows from the seed.

    Args:
        contestant: Model to train.
        data: Images to train and test on.
        settings: Schedule.
        seed: Seeds torch's global generator, and the order of the batches, which is therefore
            the same for every contestant.
        on_epoch: Called after each epoch.
        penalty: Of the model, added to the loss of every step; the curve is without it.

    Returns:
        The trained model and its curve.
    """
    torch.manual_seed(seed)
    model = contestant.build()
    optimizer = adam(model, settings.learning_rate)
    order = torch.Generator().manual_seed(seed)
    epochs = settings.epochs(contestant.family)
    steps = len(data.train_y) // settings.batch
    losses, accuracies = [], []
    wrong: tuple[int, ...] = ()
    for epoch in range(epochs):
        shuffled = torch.randperm(len(data.train_y), generator=order)
        total = torch.zeros((), dtype=torch.float64)
        for step in range(steps):
            rows = shuffled[step * settings.batch : (step + 1) * settings.batch]
            done = (epoch * steps + step) / (epochs * steps)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - done)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
            whole = loss if penalty is None else loss + penalty(model)
            whole.backward()
            optimizer.step()
            total += loss.detach()
        losses.append(total.item() / steps)
        wrong = mistakes(model, data.test_x, data.test_y)
        accuracies.append(1 - len(wrong) / len(data.test_y))
        on_epoch()
    return model, Curve(seed, tuple(losses), tuple(accuracies), wrong)


def compare(
    contestants: Sequence[Contestant],
    data: Digits,
    settings: Settings,
    on_progress: Callable[[str, int], None] = lambda what, amount: None,
) -> tuple[list[ModelResult], dict[str, nn.Module]]:
    """Train, measure and time all contestants.

    Args:
        contestants: Models to compare; the first of each family is its dense one.
        data: Images to train and test on.
        settings: Schedule.
        on_progress: Called with what is being done, and how many units of
            [work][examples.digits.training.work] have just been done.

    Returns:
        One result per contestant, and by key the models of the first seed, trained.
    """
    trained: dict[str, nn.Module] = {}
    curves: dict[str, list[Curve]] = {contestant.key: [] for contestant in contestants}
    for contestant in contestants:
        tick = partial(on_progress, f"training {contestant.family} {contestant.label}")
        tick(0)
        for seed in range(settings.seed, settings.seed + settings.runs):
            model, curve = train(contestant, data, settings, seed, partial(tick, 1))
            curves[contestant.key].append(curve)
            trained.setdefault(contestant.key, model)

    x, y = data.train_x[: settings.batch].clone(), data.train_y[: settings.batch].clone()
    results = []
    for family in dict.fromkeys(contestant.family for contestant in contestants):
        members = [contestant for contestant in contestants if contestant.family == family]
        torch.manual_seed(settings.seed)
        models = [contestant.build() for contestant in members]
        optimizers = [adam(model, settings.learning_rate) for model in models]
        kept = [kept_by_training_batch(model, x, y) for model in models]
        times = time_steps(
            models,
            optimizers,
            x,
            y,
            settings.rounds,
            partial(on_progress, f"timing {family}", 1),
        )
        converted = [_converted_parameters(c, m) for c, m in zip(members, models, strict=True)]
        for contestant, model, own, bytes_, seconds in zip(
            members, models, converted, kept, times, strict=True
        ):
            results.append(
                ModelResult(
                    contestant,
                    parameter_count(model),
                    own,
                    converted[0],
                    tuple(curves[contestant.key]),
                    bytes_,
                    seconds,
                )
            )
    return results, trained


def work(contestants: Sequence[Contestant], settings: Settings) -> int:
    """Count the units of work of a comparison: epochs, and rounds of timing."""
    families = {contestant.family for contestant in contestants}
    epochs = sum(settings.runs * settings.epochs(c.family) for c in contestants)
    return epochs + settings.rounds * len(families)


def _converted_parameters(contestant: Contestant, model: nn.Module) -> int:
    return sum(parameter_count(model.get_submodule(name)) for name in contestant.converted)
