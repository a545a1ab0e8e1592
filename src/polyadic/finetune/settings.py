"""How to train: validated settings, and what a callback is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from polyadic import checks
from polyadic.durable.identity import named
from polyadic.formats import positive_int

Schedule = Literal["constant", "cosine", "linear"] | Callable[[float], float]
MakeOptimizer = Callable[..., torch.optim.Optimizer]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each step.

    Attributes:
        step: number of steps done.
        steps: number of steps in all.
        loss: loss of the step's batch, before the step.
        learning_rate: learning rate of the step, that of the first group of parameters.
        validation: validation after this step; None if there was none.
        best: best validation so far; infinite if there is none.
        seconds: time spent so far, over all resumed parts.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    validation: float | None
    best: float
    seconds: float


@dataclass(frozen=True)
class Settings:
    """How to train; ``distill`` says what each means."""

    steps: int
    lr: float | None
    schedule: Schedule
    warmup: int
    optimizer: MakeOptimizer
    clip: float | None
    validate_every: int
    patience: int | None
    checkpoint: Path | None
    checkpoint_every: int
    callback: Callable[[Progress], object] | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "validate_every", "checkpoint_every"):
            positive_int(getattr(self, name), name)
        if self.patience is not None:
            positive_int(self.patience, "patience")
        for name in ("warmup", "seed"):
            checks.an_int(getattr(self, name), name, least=0)
        if self.lr is not None:
            checks.a_number(self.lr, "lr", above=0)
        if self.clip is not None:
            checks.a_number(self.clip, "clip", above=0)
        if not callable(self.optimizer):
            raise TypeError(
                f"optimizer must be a class such as torch.optim.Adam or a function (parameters, "
                f"lr=...) that makes one, got {type(self.optimizer).__name__}"
            )
        if not callable(self.schedule) and self.schedule not in tuple(SCHEDULES):
            known = ", ".join(map(repr, SCHEDULES))
            raise ValueError(
                f"schedule must be one of {known} or a function of the part done, got "
                f"{self.schedule!r}"
            )
        checks.check_function(self.callback, "callback")

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        schedule = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        return float(schedule(done))

    def record(self) -> dict[str, Any]:
        """Return the settings that must be equal when a training is continued."""
        return {
            "steps": self.steps,
            "lr": None if self.lr is None else float(self.lr),
            "schedule": named(self.schedule),
            "warmup": self.warmup,
            "optimizer": named(self.optimizer),
            "clip": None if self.clip is None else float(self.clip),
            "validate_every": self.validate_every,
            "patience": self.patience,
            "seed": self.seed,
        }


def total_steps(steps: int | None, epochs: int | None, batches: Iterable[Any]) -> int:
    """Return the number of steps, from the one of ``steps`` and ``epochs`` that is given.

    Raises:
        ValueError: both or none are given, or the batches cannot be counted.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"give one of steps and epochs, got steps={steps!r}, epochs={epochs!r}")
    if steps is not None:
        return positive_int(steps, "steps")
    count = positive_int(epochs, "epochs")
    number = batch_count(batches)
    if number is None:
        raise ValueError(
            f"epochs needs batches with a length, got {type(batches).__name__}; give steps"
        )
    if number < 1:
        raise ValueError("batches must hold at least one batch, got none")
    return count * number


def batch_count(batches: Iterable[Any]) -> int | None:
    """Return the number of batches, or None if only a walk through them would tell."""
    return len(batches) if isinstance(batches, Sized) else None
