"""Recovery: it recovers, continues bit by bit, keeps the best, and touches nothing else."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import polyadic
from polyadic.durable import checkpoint
from polyadic.finetune import Progress, distill, match_layers
from polyadic.nn import CPConv2d, CPLinear


def teacher_net() -> nn.Sequential:
    """Its first layer is exactly of CP rank 3, so that a student can reach it."""
    exact = CPLinear(12, 10, rank=3, order=2)
    first = nn.Linear(12, 10)
    with torch.no_grad():
        first.weight.copy_(exact.weight)
    return nn.Sequential(first, nn.ReLU(inplace=True), nn.LayerNorm(10), nn.Linear(10, 5))


def student_of(teacher: nn.Sequential, rank: int = 3, dropout: float = 0.0) -> nn.Sequential:
    """The teacher with its first layer replaced by a freshly drawn CP layer."""
    student = copy.deepcopy(teacher)
    layer = CPLinear(12, 10, rank=rank, order=2)
    with torch.no_grad():
        layer.bias.copy_(teacher[0].bias)
    student[0] = layer
    if dropout:
        student[1] = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))
    return student


def rows(count: int = 8, batch: int = 16) -> list[Tensor]:
    return [torch.randn(batch, 12) for _ in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


class KilledError(Exception):
    """What a killed process stands for."""


def test_it_recovers_a_reachable_teacher() -> None:
    """From factors that are off by a third of their size; far starts may end in other minima."""
    exact = CPLinear(12, 10, rank=3, order=2)
    teacher = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5))
    with torch.no_grad():
        teacher[0].weight.copy_(exact.weight)
        for factor in exact.cp.factors:
            factor += 0.3 * factor.std() * torch.randn_like(factor)
    student = nn.Sequential(exact, *copy.deepcopy(teacher[1:]))
    held_out = torch.randn(64, 12)
    before = nn.functional.mse_loss(student(held_out), teacher(held_out))
    found = distill(student, teacher, rows(), steps=600, lr=1e-2)
    after = nn.functional.mse_loss(student(held_out), teacher(held_out))
    assert after < before / 1000
    assert len(found.losses) == found.steps == found.best_step == 600
    assert not found.stopped_early


@pytest.mark.parametrize("loss", ["mse", "cosine", "kl"])
def test_losses_are_those_of_their_formulas(loss: str) -> None:
    teacher = teacher_net()
    student = student_of(teacher)
    x = torch.randn(7, 12)
    with torch.no_grad():
        ours, theirs = student(x), teacher(x)
    expected = {
        "mse": (ours - theirs).square().mean(),
        "cosine": 1 - ((ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1))).mean(),
        "kl": (theirs.softmax(1) * (theirs.softmax(1).log() - ours.softmax(1).log())).sum() / 7,
    }[loss]
    found = distill(student, teacher, [x], steps=1, loss=loss)
    assert found.losses[0] == pytest.approx(expected.item(), rel=1e-4)


def test_only_what_was_asked_for_changes() -> None:
    teacher = teacher_net()
    expected = {
        "cp": {"0.bias", *(f"0.cp.factors.{i}" for i in range(4))},
        "cp+norms": {"0.bias", *(f"0.cp.factors.{i}" for i in range(4)), "2.weight", "2.bias"},
    }
    expected["all"] = expected["cp+norms"] | {"3.weight", "3.bias"}
    choices: dict[Any, set[str]] = {
        **expected,
        (lambda name, p: p.dim() == 1): {"0.bias", "2.weight", "2.bias", "3.bias"},
    }
    for trainable, names in choices.items():
        student = student_of(teacher)
        before = state(student)
        distill(student, teacher, rows(2), steps=2, trainable=trainable)
        after = student.state_dict()
        assert {n for n in after if not torch.equal(after[n], before[n])} == names


def test_teacher_flags_modes_and_random_state_are_left_alone() -> None:
    teacher = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Dropout(0.5))
    student = copy.deepcopy(teacher)
    student[0] = CPLinear(12, 10, rank=2, order=2)
    teacher[1].eval()
    student[1].weight.requires_grad_(False)
    before, running = state(teacher), student[1].running_mean.clone()
    batches, held_out = rows(3), rows(1)
    random = torch.get_rng_state()
    distill(student, teacher, batches, steps=3, validation=held_out)
    assert torch.equal(random, torch.get_rng_state())
    assert same(before, teacher.state_dict())
    assert [m.training for m in teacher] == [True, False, True]
    assert all(m.training for m in student)
    assert not student[1].weight.requires_grad
    assert all(p.requires_grad for p in student[0].parameters())
    assert all(p.grad is None for m in (student, teacher) for p in m.parameters())
    assert torch.equal(running, student[1].running_mean)
    distill(student, teacher, batches, steps=3, train_mode=True, validation=False)
    assert not torch.equal(running, student[1].running_mean)


def loaders(kind: str) -> Any:
    data = TensorDataset(torch.linspace(-1, 1, 12 * 40).view(40, 12).sin())
    if kind == "list":
        return [x for (x,) in DataLoader(data, batch_size=8)]
    own = torch.Generator().manual_seed(5) if kind == "own generator" else None
    return DataLoader(data, batch_size=8, shuffle=True, generator=own)


@pytest.mark.parametrize("kind", ["list", "shuffled", "own generator"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("killed_at", [1, 6, 10])
def test_a_continued_training_is_the_uninterrupted_one(
    tmp_path: Path, kind: str, optimizer: Any, killed_at: int
) -> None:
    """Bit by bit, with dropout, shuffling, momenta, a schedule and validations."""
    teacher = teacher_net()
    start = student_of(teacher, dropout=0.3)
    settings: dict[str, Any] = {
        "steps": 13,
        "lr": 1e-2,
        "optimizer": optimizer,
        "schedule": "cosine",
        "warmup": 2,
        "train_mode": True,
        "validation": [torch.randn(9, 12)],
        "validate_every": 4,
        "seed": 3,
    }

    whole = copy.deepcopy(start)
    expected = distill(whole, teacher, loaders(kind), **settings)

    def kill(progress: Progress) -> None:
        if progress.step == killed_at:
            raise KilledError

    settings |= {"checkpoint": tmp_path / "state", "checkpoint_every": 3, "resume": True}
    parts = copy.deepcopy(start)
    with pytest.raises(KilledError):
        distill(parts, teacher, loaders(kind), callback=kill, **settings)
    torch.rand(17)
    # A new process has a new model; its parameters are to come from the file alone.
    other = copy.deepcopy(start)
    found = distill(other, teacher, loaders(kind), **settings)
    assert found.losses == expected.losses
    assert found.validations == expected.validations
    assert (found.best, found.best_step) == (expected.best, expected.best_step)
    assert same(other.state_dict(), whole.state_dict())

    again = distill(copy.deepcopy(start), teacher, loaders(kind), **settings)
    assert (again.losses, again.steps) == (found.losses, 13)


def test_the_end_of_a_continued_training_depends_on_all_that_is_stored(tmp_path: Path) -> None:
    """The optimizer's state and the random state are needed: without either the end differs."""
    teacher = teacher_net()
    start = student_of(teacher, dropout=0.3)
    settings: dict[str, Any] = {"steps": 8, "lr": 1e-2, "train_mode": True}
    whole = copy.deepcopy(start)
    distill(whole, teacher, loaders("list"), **settings)
    path = tmp_path / "state"

    def kill(progress: Progress) -> None:
        if progress.step == 4:
            raise KilledError

    settings |= {"checkpoint": path, "checkpoint_every": 4, "resume": True}
    with pytest.raises(KilledError):
        distill(copy.deepcopy(start), teacher, loaders("list"), callback=kill, **settings)
    stored = checkpoint.load(path, "polyadic.finetune")
    for spoil in ("rng", "optimizer", "epoch"):
        broken = copy.deepcopy(stored)
        if spoil == "rng":
            broken["rng"]["cpu"] = torch.Generator().manual_seed(1).get_state()
        elif spoil == "optimizer":
            broken["optimizer"]["state"][0]["exp_avg"].zero_()
        else:
            broken["index"] -= 1
        checkpoint.save(path, "polyadic.finetune", broken)
        if spoil == "epoch":
            with pytest.raises(ValueError, match="of other batches"):
                distill(copy.deepcopy(start), teacher, loaders("list"), **settings)
            continue
        student = copy.deepcopy(start)
        distill(student, teacher, loaders("list"), **settings)
        assert not same(student.state_dict(), whole.state_dict()), spoil


def test_early_stop_keeps_the_best() -> None:
    teacher = teacher_net()
    student = student_of(teacher)
    values = iter([5.0, 4.0, 3.0, 3.5, 3.0, 9.0, 0.0])
    snapshots = []

    def validate(model: nn.Module) -> float:
        assert not model.training
        snapshots.append(state(model))
        return next(values)

    found = distill(
        student, teacher, rows(), steps=100, validation=validate, validate_every=5, patience=3
    )
    assert found.stopped_early
    assert (found.steps, found.best, found.best_step) == (25, 3.0, 10)
    assert found.validations == ((0, 5.0), (5, 4.0), (10, 3.0), (15, 3.5), (20, 3.0), (25, 9.0))
    assert same(student.state_dict(), snapshots[2])
    assert not same(student.state_dict(), snapshots[-1])


def test_the_initial_parameters_are_kept_where_training_does_harm() -> None:
    teacher = teacher_net()
    student = student_of(teacher)
    before = state(student)
    values = iter([1.0, 2.0, math.nan, 3.0])
    found = distill(
        student, teacher, rows(), steps=3, validation=lambda m: next(values), validate_every=1
    )
    assert (found.best, found.best_step, found.steps) == (1.0, 0, 3)
    assert same(student.state_dict(), before)


def test_batches_are_handed_over_as_they_are_made() -> None:
    class Two(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"out": self.layer(a) + b, "ids": torch.zeros(1, dtype=torch.int64)}

    teacher, student = Two(nn.Linear(4, 3)), Two(CPLinear(4, 3, rank=2, order=1))
    a, b = torch.randn(5, 4), torch.randn(5, 3)
    losses = [
        distill(copy.deepcopy(student), teacher, [batch], steps=1).losses
        for batch in ((a, b), [a, b], {"a": a, "b": b})
    ]
    assert losses[0] == losses[1] == losses[2]

    def half(model: nn.Module, batch: Any) -> Tensor:
        return model(*batch)["out"][:, :2]

    found = distill(student, teacher, [(a, b)], steps=1, forward=half)
    assert found.losses != losses[0]


def test_clipping_and_schedule_reach_the_optimizer() -> None:
    teacher, rates, norms = teacher_net(), [], []

    class Watch(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            (group,) = self.param_groups
            rates.append(group["lr"])
            norms.append(math.hypot(*(p.grad.norm() for p in group["params"])))
            super().step()

    distill(
        student_of(teacher),
        teacher,
        rows(),
        steps=6,
        lr=0.1,
        optimizer=Watch,
        clip=0.01,
        schedule="linear",
        warmup=2,
    )
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])
    assert max(norms) <= 0.0100001


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"steps": 1, "epochs": 1}, ValueError, "one of steps and epochs"),
        ({"steps": None}, ValueError, "one of steps and epochs"),
        ({"steps": 0}, ValueError, "steps must be a positive int"),
        ({"steps": 1.5}, TypeError, "steps must be a positive int"),
        ({"lr": -1.0}, ValueError, "lr must be finite and above 0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite and above 0"),
        ({"lr": "big"}, TypeError, "lr must be a number"),
        ({"clip": 0.0}, ValueError, "clip must be finite and above 0"),
        ({"loss": "l3"}, ValueError, "'cosine', 'kl', 'mse'"),
        ({"schedule": "poly"}, ValueError, "'constant', 'cosine', 'linear'"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be a class"),
        ({"trainable": "biases"}, ValueError, "'cp', 'cp\\+norms', 'all'"),
        ({"trainable": 3}, TypeError, "'cp', 'cp\\+norms', 'all'"),
        ({"trainable": lambda name, p: False}, ValueError, "selects no parameter"),
        ({"patience": 2, "validation": False}, ValueError, "patience needs validation"),
        ({"resume": True}, ValueError, "resume=True needs checkpoint"),
        ({"checkpoint": "no/such/folder/file"}, ValueError, "folder of checkpoint"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be a path"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"warmup": 1.0}, TypeError, "warmup must be an int"),
        ({"batches": []}, ValueError, "at least one batch"),
        ({"batches": [], "steps": None, "epochs": 2}, ValueError, "at least one batch"),
        ({"batches": torch.ones(3, 12)}, TypeError, "a list of one"),
        ({"batches": iter([torch.ones(3, 12)])}, TypeError, "walked again"),
        ({"batches": 3}, TypeError, "must be an iterable of batches"),
        ({"validation": []}, ValueError, "validation must hold at least one batch"),
        ({"loss": lambda s, t: (s - t).square()}, ValueError, "tensor of no dimension"),
        ({"loss": lambda s, t: t.sum()}, ValueError, "does not depend on the parameters"),
        ({"teacher": nn.Linear(12, 4)}, ValueError, r"one shape, got \(3, 5\) and \(3, 4\)"),
        ({"teacher": "bert"}, TypeError, "teacher must be a torch.nn.Module"),
        ({"student": teacher_net()}, ValueError, "holds no CP layer"),
    ],
)
def test_mistakes_are_told(change: dict[str, Any], error: type[Exception], text: str) -> None:
    teacher = teacher_net()
    arguments: dict[str, Any] = {
        "student": student_of(teacher),
        "teacher": teacher,
        "batches": [torch.ones(3, 12)],
        "steps": 1,
    }
    with pytest.raises(error, match=text):
        distill(**(arguments | change))


def test_a_teacher_that_would_be_trained_is_refused() -> None:
    student = student_of(teacher_net())
    with pytest.raises(ValueError, match=r"copy\.deepcopy of the original"):
        distill(student, student, rows(1), steps=1)


def test_a_frozen_layer_is_refused() -> None:
    teacher = teacher_net()
    student = polyadic.freeze(student_of(teacher))
    with pytest.raises(RuntimeError, match="unfreeze"):
        distill(student, teacher, rows(1), steps=1)


def test_batches_without_a_length_need_steps() -> None:
    class Stream:
        def __iter__(self) -> Iterator[Tensor]:
            return iter([torch.ones(3, 12), torch.zeros(2, 12)])

    teacher = teacher_net()
    with pytest.raises(ValueError, match="give steps"):
        distill(student_of(teacher), teacher, Stream(), epochs=1)
    assert distill(student_of(teacher), teacher, Stream(), steps=5).steps == 5
    assert distill(student_of(teacher), teacher, rows(3), epochs=2).steps == 6


def test_outputs_of_several_tensors_need_a_choice() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = CPLinear(4, 3, rank=1, order=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), x

    student = Pair()
    with pytest.raises(ValueError, match=r"floating tensors are: 0, 1; give forward="):
        distill(student, copy.deepcopy(student), [torch.ones(2, 4)], steps=1)


@pytest.mark.parametrize("rank", [2, 12])
def test_by_default_no_training_ends_worse_than_it_began(rank: int) -> None:
    """Neither a fit that is nearly exact nor a poor one, even at a rate that is far too high."""
    teacher = teacher_net()
    batches = rows(4)
    for lr in (None, 1.0):
        student = student_of(teacher, rank=rank)
        found = distill(student, teacher, batches, steps=20, lr=lr)
        assert found.best == min(value for _, value in found.validations)
        with torch.no_grad():
            left = sum(F.mse_loss(student(x), teacher(x)).item() for x in batches) / len(batches)
        assert left == pytest.approx(found.best, rel=1e-4)
        assert found.best <= found.validations[0][1]


def test_each_factor_is_trained_at_the_rate_that_its_scale_asks_for() -> None:
    teacher = teacher_net()
    student = student_of(teacher)
    layer = next(module for module in student.modules() if isinstance(module, CPLinear))
    rates = {
        id(p): rate for p, (rate, _) in polyadic.training.rates.factor_rates(layer, 3e-4).items()
    }
    seen: dict[int, float] = {}

    def adam(groups: Any, **options: Any) -> torch.optim.Optimizer:
        assert not options
        seen.update({id(p): group["lr"] for group in groups for p in group["params"]})
        return torch.optim.Adam(groups)

    distill(student, teacher, rows(2), steps=1, optimizer=adam)
    assert {key: seen[key] for key in rates} == rates
    assert set(rates) < set(seen)


def test_a_loader_with_labels_is_explained() -> None:
    teacher = teacher_net()
    labelled = [(torch.randn(4, 12), torch.zeros(4))]
    with pytest.raises(ValueError, match="leave out labels, or say how to run it by forward="):
        distill(student_of(teacher), teacher, labelled, steps=1)


@pytest.mark.parametrize("validated", [True, False])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_model(validated: bool) -> None:
    teacher = teacher_net()
    student = student_of(teacher)
    good, bad = torch.randn(4, 12), torch.full((4, 12), math.inf)
    reached: dict[str, Tensor] = {}

    def note(progress: Progress) -> None:
        reached.update(state(student))

    with pytest.raises(FloatingPointError, match="at step 3; lower lr"):
        distill(
            student,
            teacher,
            [good, good, bad],
            steps=9,
            callback=note,
            validation=[good] if validated else False,
            validate_every=1,
        )
    assert reached
    assert same(student.state_dict(), reached)


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('executed')",))


def written(tmp_path: Path, **change: Any) -> tuple[Path, dict[str, Any]]:
    teacher = teacher_net()
    path = tmp_path / "state"
    arguments: dict[str, Any] = {
        "student": student_of(teacher),
        "teacher": teacher,
        "batches": rows(2),
        "steps": 3,
        "checkpoint": path,
    }
    distill(**(arguments | change))
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    return path, arguments | {"resume": True}


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, kept: float) -> None:
    path, arguments = written(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    before = state(arguments["student"])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        distill(**arguments)
    assert same(before, arguments["student"].state_dict())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (Evil(), "cannot be read as a checkpoint"),
        ([1, 2], "is not a checkpoint of"),
        ({"weights": torch.ones(2)}, "is not a checkpoint of"),
        ({"format": "polyadic.finetune", "version": 99}, "format version 99"),
        ({"format": "polyadic.finetune", "version": 1}, "settings should be a dict"),
    ],
)
def test_a_foreign_or_hostile_checkpoint_is_refused(
    tmp_path: Path, content: Any, text: str
) -> None:
    path, arguments = written(tmp_path)
    if isinstance(content, Evil):
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    before = state(arguments["student"])
    with pytest.raises(ValueError, match=text):
        distill(**arguments)
    assert same(before, arguments["student"].state_dict())


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("step", "three", "step should be a int"),
        ("rng", {}, "optimizer or random state"),
        ("optimizer", {"state": {}}, "optimizer or random state"),
        ("parameters", {}, "is of another model"),
        ("losses", [1.0], "losses should be a Tensor"),
    ],
)
def test_a_damaged_field_is_refused(tmp_path: Path, field: str, value: Any, text: str) -> None:
    path, arguments = written(tmp_path)
    stored = checkpoint.load(path, "polyadic.finetune")
    checkpoint.save(path, "polyadic.finetune", stored | {field: value})
    before = state(arguments["student"])
    with pytest.raises(ValueError, match=text):
        distill(**arguments)
    assert same(before, arguments["student"].state_dict())


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path, arguments = written(tmp_path)
    for change, text in (
        ({"lr": 0.5}, "with lr=None, this one has 0.5"),
        ({"steps": 4}, "with steps=3, this one has 4"),
        ({"loss": "cosine"}, "with loss='mse'"),
        ({"batches": rows(3)}, "with batches=2, this one has 3"),
        ({"student": student_of(arguments["teacher"], rank=2)}, "has shape"),
        ({"student": student_of(arguments["teacher"]).double()}, "is torch.float64 here"),
        ({"trainable": "all"}, "is of another model"),
        ({"resume": False}, "pass resume=True"),
    ):
        with pytest.raises(ValueError, match=text):
            distill(**(arguments | change))
    assert path.exists()


def low_rank_optimum(weight: Tensor, x: Tensor, rank: int) -> float:
    """Least ‖X(W − Ŵ)ᵀ‖/‖XWᵀ‖ over matrices of a rank: the tail of the singular values of XWᵀ."""
    s = torch.linalg.svdvals(x.double() @ weight.double().t())
    return (s[rank:].square().sum() / s.square().sum()).sqrt().item()


def test_matching_reaches_the_optimum_that_is_known() -> None:
    """An order-1 layer without bias is a matrix of rank R: the optimum is a singular value tail."""
    teacher = nn.Sequential(nn.Linear(12, 10, bias=False), nn.ReLU(inplace=True), nn.Linear(10, 5))
    student = copy.deepcopy(teacher)
    student[0] = CPLinear(12, 10, rank=4, order=1, bias=False)
    batches = [x * torch.linspace(0.2, 2, 12) for x in rows()]
    told = []
    found = match_layers(
        student,
        teacher,
        batches,
        steps=600,
        lr=2e-2,
        clip=None,
        callback=lambda name, progress: told.append((name, progress.step)),
    )
    assert list(found) == ["0"]
    optimum = low_rank_optimum(teacher[0].weight.detach(), torch.cat(batches), 4)
    assert optimum * (1 - 1e-4) <= found["0"].after <= optimum * 1.02
    assert found["0"].before > 2 * optimum
    assert told == [("0", step + 1) for step in range(600)]
    with torch.no_grad():
        x = torch.cat(batches)
        y = nn.functional.linear(x, teacher[0].weight)
        error = (student[0](x) - y).norm() / y.norm()
    assert found["0"].after == pytest.approx(error.item(), rel=1e-4)


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(6 * 25, 7),
    )


def converted_conv_net(teacher: nn.Sequential) -> nn.Sequential:
    student = copy.deepcopy(teacher)
    student[2] = CPConv2d(8, 6, 3, padding=1, rank=8)
    student[0] = CPConv2d(3, 8, 3, padding=1, rank=6)
    return student


@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_matching_improves_each_layer_and_the_whole(mode: Any) -> None:
    teacher = conv_net()
    student = converted_conv_net(teacher)
    batches = [torch.randn(8, 3, 5, 5) for _ in range(4)]
    untouched, theirs = state(student[5]), state(teacher)

    def whole() -> float:
        with torch.no_grad():
            x = torch.cat(batches)
            return nn.functional.mse_loss(student(x), teacher(x)).item()

    before = whole()
    found = match_layers(student, teacher, batches, mode=mode, steps=150, lr=1e-2)
    assert list(found) == ["0", "2"], "in the order of the calls"
    # How far an optimizer comes in so many steps is a matter of the draw. What has learned nothing
    # of the teacher's outputs, and is silent, has a relative error of 1.
    assert all(layer.after < min(layer.before, 1) for layer in found.values())
    assert whole() < before
    assert same(untouched, student[5].state_dict())
    assert same(theirs, teacher.state_dict())


def test_sequential_inputs_are_the_students() -> None:
    """What is reported is the error on them: here the student's output is the layer's."""
    teacher = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    student = nn.Sequential(CPLinear(12, 12, rank=3, order=1), CPLinear(12, 12, rank=12, order=1))
    batches = rows()
    found = match_layers(student, teacher, batches, ["1"], steps=400, lr=1e-2)
    with torch.no_grad():
        x = torch.cat(batches)
        y = teacher(x)
        error = (student(x) - y).norm() / y.norm()
    assert found["1"].after == pytest.approx(error.item(), rel=1e-4)


def test_a_layer_that_training_harms_keeps_its_parameters() -> None:
    teacher = teacher_net()
    student = student_of(teacher)
    before = state(student)
    found = match_layers(student, teacher, rows(2), steps=3, lr=50.0, clip=None)
    assert found["0"].after == found["0"].before
    assert same(before, student.state_dict())


def test_mistakes_in_matching_are_told() -> None:
    teacher = teacher_net()
    student = student_of(teacher)

    class Idle(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return x

    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"names": ["3"]}, ValueError, "'3' is not a converted layer; those are: 0"),
        ({"names": []}, ValueError, "at least one name"),
        ({"names": "0"}, TypeError, "a sequence of names"),
        ({"mode": "both"}, ValueError, "mode must be one of 'sequential', 'joint', got 'both'"),
        ({"student": teacher}, ValueError, "holds no CP layer that the teacher has"),
        ({"batches": []}, ValueError, "at least one batch"),
        ({"lr": 0}, ValueError, "lr must be finite and above 0"),
        (
            {"student": Idle(CPLinear(3, 3, rank=1)), "teacher": Idle(nn.Linear(3, 3))},
            ValueError,
            "never calls layer as a module",
        ),
    ]
    for change, error, text in cases:
        arguments: dict[str, Any] = {
            "student": student,
            "teacher": teacher,
            "batches": rows(1),
            "steps": 1,
        }
        with pytest.raises(error, match=text):
            match_layers(**(arguments | change))
