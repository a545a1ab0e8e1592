"""Long jobs in small, each of which keeps its state in a folder, goes on, and ends in a digest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import polyadic
from benchmarks.training.loop import Recipe, train
from polyadic.durable.identity import Digest
from polyadic.durable.pieces import Pieces
from polyadic.finetune import distill, match_layers
from polyadic.nn import CPLinear

Told = Callable[[], object]


def digest(model: nn.Module, *values: Any) -> str:
    """A digest of a model's tensors and of other results."""
    found = Digest()
    found.add(model.state_dict())
    for value in values:
        found.add(value)
    return found.text()


def teacher() -> nn.Sequential:
    """A small network with fixed weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    ).eval()


def converted(model: nn.Sequential) -> nn.Sequential:
    """A copy whose first layers are in CP format, freshly drawn."""
    torch.manual_seed(1)
    student = copy.deepcopy(model)
    student[0] = CPLinear(12, 16, rank=3, order=2)
    student[3] = CPLinear(16, 10, rank=3, order=2)
    return student


def rows() -> Tensor:
    """What batches are made of."""
    return torch.linspace(-1, 1, 40 * 12).view(40, 12).sin()


def loader() -> DataLoader[Any]:
    """Batches in an order that torch's random state decides."""
    return DataLoader(TensorDataset(rows()), batch_size=8, shuffle=True)


def distilling(folder: Path, told: Told) -> str:
    """``distill`` with dropout, a shuffled loader, a schedule and validations."""
    model = teacher()
    student = converted(model)
    found = distill(
        student,
        model,
        loader(),
        steps=24,
        lr=1e-2,
        warmup=2,
        train_mode=True,
        validation=[rows()[:9]],
        validate_every=4,
        checkpoint=folder / "state",
        checkpoint_every=3,
        resume=True,
        callback=lambda progress: told(),
    )
    return digest(student, found.losses, found.validations, found.best_step)


def matching(mode: Any) -> Callable[[Path, Told], str]:
    """``match_layers`` in a mode."""

    def job(folder: Path, told: Told) -> str:
        model = teacher()
        student = converted(model)
        torch.manual_seed(2)
        found = match_layers(
            student,
            model,
            loader(),
            mode=mode,
            steps=12,
            lr=1e-2,
            checkpoint=folder / "state",
            checkpoint_every=5,
            resume=True,
            callback=lambda name, progress: told(),
        )
        return digest(student, [(name, one.before, one.after) for name, one in found.items()])

    return job


def compressing(folder: Path, told: Told) -> str:
    """``compress`` of two layers, with calibration batches."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 16))
    made, report = polyadic.compress(
        model,
        ratio=2.0,
        calibration=list(torch.linspace(-1, 1, 48 * 24).sin().view(3, 16, 24)),
        iterations=8,
        checkpoint=folder / "pieces",
        resume=True,
        callback=lambda *_: told(),
    )
    return digest(made, report.error, report.output_error, report.predicted_error)


def studying(folder: Path, told: Told) -> str:
    """The training loop of the study."""
    torch.manual_seed(4)
    model = nn.Sequential(CPLinear(12, 16, rank=3, order=2), nn.ReLU(), nn.Linear(16, 5))

    def batch(step: int) -> tuple[Tensor, ...]:
        told()
        generator = torch.Generator().manual_seed(step)
        return (torch.randn(8, 12, generator=generator),)

    def loss(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return F.mse_loss(model(inputs[0]), inputs[0][:, :5])

    found = train(
        model,
        Recipe(1e-2, 20, groups=True),
        batch,
        loss,
        lambda model: float(loss(model, (rows(),)).detach()),
        validate_every=5,
        checkpoint=folder / "state",
        checkpoint_every=3,
    )
    return digest(model, found["curve"])


def demonstrating(folder: Path, told: Told) -> str:
    """Trainings of the demo, each of which is kept when it is done."""
    from examples.demo import models, training

    members = [each for each in models.contestants(quick=True) if each.family == "MLP"][:2]
    settings = training.Settings(0, runs=2, mlp_epochs=1, rounds=2)
    pieces = Pieces(folder / "pieces", "demo", vars(settings), resume=True)
    data = training.load()

    def tell(what: str) -> None:
        told()

    _, trained = training.compare(members, data, settings, tell, pieces)
    return digest(nn.ModuleList(trained.values()))


def demonstrating_language(folder: Path, told: Told) -> str:
    """Language models of the demo, whose trainings go on from their own checkpoints."""
    from examples.demo import language

    def tell(what: str) -> None:
        told()

    pieces = Pieces(folder / "pieces", "demo", {"seed": 0}, resume=True)
    found = language.compare(0, True, tell, pieces)
    return digest(nn.Module(), [(one.parameters, one.loss, one.curve) for one in found])


def fitting(folder: Path, told: Told) -> str:
    """``decompose`` in a metric, with its race, further fits and a bound on the growth."""
    draw = torch.Generator().manual_seed(5)
    inputs = torch.randn(40, 24, generator=draw)
    found = polyadic.decompose(
        torch.randn(24, 30, generator=draw),
        ((4, 6), (5, 6)),
        7,
        metric=inputs.t() @ inputs,
        max_growth=1.5,
        iterations=16,
        tolerance=1e-3,
        checkpoint=folder / "state",
        checkpoint_every=3,
        resume=True,
        callback=lambda *_: told(),
    )
    numbers = found.error, found.history, found.raced, found.further, found.start, found.reason
    return digest(nn.Module(), list(found.cp.factors), numbers)


JOBS: dict[str, Callable[[Path, Told], str]] = {
    "distill": distilling,
    "match_layers, sequential": matching("sequential"),
    "match_layers, joint": matching("joint"),
    "compress": compressing,
    "trainer of the study": studying,
    "trainer of the demo": demonstrating,
    "trainer of the demo, language": demonstrating_language,
    "decompose": fitting,
}
