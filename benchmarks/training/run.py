"""One run of the study in this process, and the pool of processes that makes them all."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.store import Store
from benchmarks.training import images, language, texts
from benchmarks.training.jobs import Job
from benchmarks.training.layers import maker
from benchmarks.training.loop import Recipe, train
from polyadic.durable import checkpoint as durable

IMAGES = 64
HELD_OUT_BATCHES = 40
VALIDATIONS = 4
CHECKPOINTS = 10


def run(job: Job, device_type: str, checkpoints: Path | None = None) -> dict[str, Any]:
    """Make one run and return its record."""
    device = torch.device(device_type)
    torch.manual_seed(job.seed)
    began = time.perf_counter()
    model, batch, loss, validate = made(job, device)
    file = _file(job, checkpoints)
    found = train(
        model,
        Recipe(job.lr, job.steps, groups=job.groups, rest=job.rest),
        batch,
        loss,
        validate,
        validate_every=max(1, job.steps // VALIDATIONS),
        checkpoint=file,
        checkpoint_every=max(1, job.steps // CHECKPOINTS),
        identity=dataclasses.asdict(job),
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "kind": "training",
        **dataclasses.asdict(job),
        "block_parameters": model.block_parameters(),
        "parameters": parameters,
        "device": device_type,
        "seconds": time.perf_counter() - began,
        **found,
    }


def made(job: Job, device: torch.device) -> Any:
    """Of a run: its model, batch of a step, loss of a batch and held-out loss."""
    return _language(job, device) if job.task == "language" else _images(job, device)


def _file(job: Job, checkpoints: Path | None) -> Path | None:
    """The checkpoint of a run, or None where none are kept."""
    slug = "-".join(str(value).replace(":", "_") for value in dataclasses.astuple(job))
    return None if checkpoints is None else checkpoints / f"{slug}.checkpoint"


def _language(job: Job, device: torch.device) -> Any:
    found = texts.standard_library()
    model = language.LanguageModel(
        maker(job.layer), blocks=job.blocks, width=job.width, length=job.length
    ).to(device)
    train_bytes, held_out = found.train.to(device), found.held_out.to(device)
    window = torch.arange(job.length + 1, device=device)

    def cut(content: Tensor, seed: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(content) - job.length - 1, (count, 1), generator=generator)
        return content[starts.to(device) + window].long()

    def batch(step: int) -> tuple[Tensor, ...]:
        return (cut(train_bytes, 1_000_003 * (job.seed + 1) + step, job.sequences),)

    def loss(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        (tokens,) = inputs
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def validate(model: nn.Module) -> float:
        model.eval()
        # The same windows for every contestant and seed.
        total = sum(
            float(loss(model, (cut(held_out, number, job.sequences),)))
            for number in range(HELD_OUT_BATCHES)
        )
        model.train()
        return total / HELD_OUT_BATCHES

    return model, batch, loss, validate


def _images(job: Job, device: torch.device) -> Any:
    load, stride = images.SETS[job.task]
    model = images.ImagesNet(job.layer, job.width, stride).to(device)
    (x, y), (held_x, held_y) = (
        tuple(part.to(device) for part in pair) for pair in images.split(*load())
    )

    def batch(step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1_000_003 * (job.seed + 1) + step)
        chosen = torch.randint(len(x), (IMAGES,), generator=generator).to(device)
        return x[chosen], y[chosen]

    def loss(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(model(inputs[0]), inputs[1])

    @torch.no_grad()
    def validate(model: nn.Module) -> float:
        return float(loss(model, (held_x, held_y)))

    return model, batch, loss, validate


def run_all(
    due: Callable[[Mapping[Job, float]], list[Job]],
    store: Store,
    *,
    device: str,
    workers: int,
    seconds: float | None,
    checkpoints: Path | None,
    tell: Callable[[str], None],
) -> None:
    """Make every run that is not in the store yet, several at once; stop starting after a while.

    Args:
        due: the runs to make, by the losses of those made.
        store: of the records.
        device: where to train.
        workers: runs at once, each in a process of its own.
        seconds: start no run after so long.
        checkpoints: folder for those of unfinished runs.
        tell: takes a line about each run that ended.
    """
    began = time.perf_counter()
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_one_thread
    ) as pool:
        running: dict[Future[dict[str, Any]], Job] = {}
        failed: set[Job] = set()
        while True:
            losses = finished(store)
            late = seconds is not None and time.perf_counter() - began > seconds
            ready = [
                job
                for job in due(losses)
                if job not in losses and job not in failed and job not in running.values()
            ]
            free = 0 if late else workers - len(running)
            for job in ready[:free]:
                running[pool.submit(run, job, device, checkpoints)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                if (error := future.exception()) is not None:
                    failed.add(job)
                    tell(f"{job}: failed: {error!r}")
                    continue
                record = future.result()
                store.add(record)
                if (file := _file(job, checkpoints)) is not None:
                    durable.remove(file)
                tell(
                    f"{job.task} {job.layer} width {job.width} blocks {job.blocks} "
                    f"lr {job.lr:g}{' groups' if job.groups else ''}"
                    f"{'' if job.rest is None else f' rest {job.rest:g}'} seed {job.seed}: "
                    f"loss {record['loss']:.4f} after {record['seconds']:.0f} s; "
                    f"{len(ready[free:])} wait"
                )


def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")


def finished(store: Store) -> dict[Job, float]:
    """The last held-out loss of each run in the store; infinity for one that diverged."""
    names = [field.name for field in dataclasses.fields(Job)]
    return {
        Job(**{name: record[name] for name in names if name in record}): (
            math.inf if record["loss"] is None else record["loss"]
        )
        for record in store.records
        if record["kind"] == "training"
    }
