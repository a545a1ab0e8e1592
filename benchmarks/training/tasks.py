"""The tasks of the study as their stored records tell of them: who took part, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import Record
from benchmarks.study.store import environments, read
from benchmarks.training.results import Contestant, contestants, resting, title

TASKS = {"language": "Language model", "digits": "Digits", "mnist": "MNIST"}
# What counts as an equal cost, as a fraction.
EQUAL = 0.2
# Costs that contestants can be equal in: how they are named, and read.
COSTS: dict[str, Callable[[Contestant], float | None]] = {
    "block parameters": lambda c: c.block_parameters,
    "step time": lambda c: None if c.step is None else c.step["seconds"],
    "FLOPs": lambda c: None if c.step is None else c.step["flops"],
    "state": lambda c: None if c.step is None else c.step["state_bytes"],
}


def runs_file(device: str, task: str) -> str:
    """Name of the file that holds the runs of a task."""
    return f"training-{device}-{task}.jsonl"


def steps_file(task: str) -> str:
    """Name of the file that holds what steps of a task cost."""
    return f"training-steps-{task}.jsonl"


@dataclass(frozen=True)
class Task:
    """The stored records of one task on one device.

    Attributes:
        name: a key of ``TASKS``.
        environment: the first record of machine, versions and settings.
        processors: those that the runs were made on, in the order of their records.
        records: of the runs, at the rate of the rest that suits the dense model best.
        contestants: gathered from them, the dense model whose layers are replaced first.
    """

    name: str
    environment: Record
    processors: list[str]
    records: list[Record]
    contestants: list[Contestant]

    @property
    def dense(self) -> Contestant:
        """The model whose layers are replaced."""
        return self.contestants[0]

    @property
    def best_cp(self) -> Contestant | None:
        """The CP contestant of the smallest loss, if there is any."""
        cps = [c for c in self.contestants if c.kind == "cp"]
        return min(cps, key=lambda c: c.best.mean, default=None)

    def named(self, contestant: Contestant) -> str:
        """Title of a contestant; width and blocks where they are not the dense model's."""
        usual = self.dense.width, self.dense.blocks
        return title(contestant.layer, contestant.width, contestant.blocks, usual)

    def of(self, layer: str) -> Contestant | None:
        """The contestant of a layer in a model of the usual size."""
        usual = self.dense.width, self.dense.blocks
        return next(
            (c for c in self.contestants if c.layer == layer and (c.width, c.blocks) == usual), None
        )


def load(results: Path, name: str, device: str = "cpu") -> Task:
    """A task's stored records.

    Raises:
        ValueError: it is not stored, or no sweep of its dense model is complete.
    """
    path = results / runs_file(device, name)
    if not path.exists():
        raise ValueError(f"{path.name} is not stored in {results.name}; run the study first")
    environment, records = read(path)
    steps = results / steps_file(name)
    costs = read(steps)[1] if device == "cpu" and steps.exists() else []
    machines = environments(environment, records)
    processors = list(dict.fromkeys(str(machine["cpu"]) for machine in machines))
    records = resting(record for record in records if record["kind"] == "training")
    found = contestants(records, costs)
    if not found or found[0].kind != "dense":
        raise ValueError(f"{path.name} lacks a complete sweep of the dense model; run on")
    return Task(name, environment, processors, records, found)


def load_all(results: Path) -> list[Task]:
    """The stored records of all tasks; one beside the language model may not have been run yet.

    Raises:
        ValueError: as ``load``.
    """
    first, *others = TASKS
    there = [name for name in others if (results / runs_file("cpu", name)).exists()]
    return [load(results, name) for name in (first, *there)]


def equals(task: Task, one: Contestant, cost: str) -> list[Contestant]:
    """The other contestants whose cost is within a fifth of this one's, the best first."""
    own = COSTS[cost](one)
    found = [
        other
        for other in task.contestants
        if other is not one
        and own is not None
        and (its := COSTS[cost](other)) is not None
        and own / (1 + EQUAL) <= its <= own * (1 + EQUAL)
    ]
    return sorted(found, key=lambda c: c.best.mean)


def front(task: Task, cost: str) -> list[Contestant]:
    """Those that no contestant of less cost beats, the cheapest first."""
    priced = [(its, c) for c in task.contestants if (its := COSTS[cost](c)) is not None]
    found: list[Contestant] = []
    for _, contestant in sorted(priced, key=lambda pair: (pair[0], pair[1].best.mean)):
        if not found or contestant.best.mean < found[-1].best.mean:
            found.append(contestant)
    return found
