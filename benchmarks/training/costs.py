"""What one training step of each contestant costs: time, FLOPs, bytes of its state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.records import Record
from benchmarks.training.jobs import Entry, Job
from benchmarks.training.loop import Recipe, optimizer_of, stepper
from benchmarks.training.run import made
from polyadic.testing import flops

ROUNDS, WARM_UP = 15, 2


@dataclass
class _Subject:
    job: Job
    model: nn.Module
    step: Callable[[], None]
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)


def measure(
    entries: Sequence[Entry],
    common: Job,
    rounds: int = ROUNDS,
    tell: Callable[[str], None] = print,
) -> list[Record]:
    """A record of the kind ``step`` for each layer, width and number of blocks among the entries.

    Steps are made in turns, so that what disturbs the machine disturbs all alike. Time is the
    processor time of this thread, so that other processes count only by what they leave in its
    caches.

    Args:
        entries: the contestants. What they would be trained with does not matter here.
        common: the task and the sizes of a step.
        rounds: steps timed of each.
        tell: takes a line about each contestant left out because its package is not installed.
    """
    shapes = dict.fromkeys((e.layer, e.width, e.blocks) for e in entries)
    subjects: list[_Subject] = []
    for layer, width, blocks in shapes:
        job = dataclasses.replace(common, layer=layer, width=width, blocks=blocks)
        try:
            subjects.append(_subject(job))
        except ImportError as error:
            tell(f"{layer} is left out: {error}")
    for number in range(WARM_UP + rounds):
        for subject in subjects:
            began = time.thread_time()
            subject.step()
            if number >= WARM_UP:
                subject.seconds.append(time.thread_time() - began)
    return [
        {
            "kind": "step",
            "task": common.task,
            "layer": subject.job.layer,
            "width": subject.job.width,
            "blocks": subject.job.blocks,
            "seconds": median(subject.seconds),
            "least_seconds": min(subject.seconds),
            "rounds": rounds,
            "flops": flops(subject.step),
            "state_bytes": state_bytes(subject.model, subject.optimizer),
        }
        for subject in subjects
    ]


def _subject(job: Job) -> _Subject:
    device = torch.device("cpu")
    torch.manual_seed(0)
    model, batch, loss, _ = made(job, device)
    optimizer = optimizer_of(model, Recipe(1e-3, 1), device)
    inputs = batch(0)
    step_on = stepper(model, optimizer, loss, inputs, device)
    return _Subject(job, model, lambda: step_on(inputs), optimizer)


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a model's weights, their gradients and what the optimizer keeps, after a step."""
    kept: list[Any] = []
    for parameter in model.parameters():
        state = optimizer.state[parameter].values()
        kept += [parameter, parameter.grad, *(v for v in state if isinstance(v, torch.Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)
