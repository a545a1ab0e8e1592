"""``match_layers``: train each converted layer towards the outputs of the one it stands for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyadic.batches import call, moved, require_batches
from polyadic.checks import check_function, check_module, check_word
from polyadic.durable.identity import of_module
from polyadic.durable.keeper import path_of
from polyadic.finetune import models
from polyadic.finetune.loop import Loop
from polyadic.finetune.match_job import Job, LayerMatch
from polyadic.finetune.settings import (
    MakeOptimizer,
    Progress,
    Schedule,
    Settings,
    batch_count,
    total_steps,
)
from polyadic.nn.wrapped import check_unwrapped


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its arguments, and what the teacher's layer put out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def match_layers(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str] | None = None,
    *,
    mode: Literal["sequential", "joint"] = "sequential",
    steps: int | None = None,
    epochs: int | None = None,
    lr: float = 1e-3,
    optimizer: MakeOptimizer = torch.optim.Adam,
    schedule: Schedule = "cosine",
    warmup: int = 0,
    clip: float | None = 1.0,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    callback: Callable[[str, Progress], object] | None = None,
    seed: int = 0,
) -> dict[str, LayerMatch]:
    """Train each converted layer to put out what the teacher's layer of that name puts out.

    The loss is ‖Y − Ŷ‖² / ‖Y‖², so that layers of any scale weigh alike.

    - ``"sequential"``: one layer after the other, in the order in which the teacher calls them. A
      layer's inputs are those it gets *in the student*, whose earlier layers are matched by then,
      and its targets are the teacher's outputs, so that it makes up for what earlier layers lost
      (the asymmetric reconstruction of Zhang, Zou, He & Sun, TPAMI 2016). Inputs and targets of
      the layer in training are held in memory for all batches.
    - ``"joint"``: all layers at once, each on the teacher's inputs; the teacher runs forward once
      per step, and nothing is held in memory.

    A layer whose error over all batches would rise keeps its parameters.

    A matching that was stopped goes on from its checkpoint as a training by ``distill`` does, with
    the same result bit for bit.

    Args:
        student: the converted model, trained in place.
        teacher: the original, not changed.
        batches: as in ``distill``.
        names: layers to train; by default every CP layer that the teacher has as another one.
        mode: ``"sequential"`` or ``"joint"``, as described above.
        steps: batches to train on, for each layer (sequential) or for all (joint).
        epochs: number of walks through ``batches``, to be given in place of ``steps``.
        lr: learning rate; the best one depends on the scale of the factors (docs/compression.md).
        optimizer: as in ``distill``.
        schedule: as in ``distill``.
        warmup: as in ``distill``.
        clip: as in ``distill``.
        checkpoint: a file to write after every ``checkpoint_every`` steps, after each layer and at
            Ctrl-C.
        checkpoint_every: steps between writes of the checkpoint.
        resume: as in ``distill``.
        callback: called with the layer's name (joint: ``""``) and a ``Progress`` after each step.
        seed: as in ``distill``.

    Returns:
        By layer, in the order in which the teacher calls them, the errors before and after.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument does not fit; a layer is missing, is not converted, is never called
            or puts out another shape; training would change the teacher; the student is wrapped
            (DistributedDataParallel, DataParallel, FSDP) or sharded; the checkpoint is damaged or
            of another matching.
        OSError: the checkpoint cannot be written; the last one stays.
        RuntimeError: a layer of the student is frozen for inference.
        FloatingPointError: a loss is not finite.
    """
    check_unwrapped(student, "match_layers", "student")
    check_module(teacher, "teacher")
    require_batches(batches, "batches")
    check_word(mode, "mode", ("sequential", "joint"))
    check_function(callback, "callback")
    layers = _layers(student, teacher, names)
    trained = {
        f"{name}.{own}": parameter
        for name, layer in layers.items()
        for own, parameter in models.select(layer, "cp").items()
    }
    models.refuse_shared(trained, teacher)
    number = total_steps(steps, epochs, batches)
    device = models.device_of(student)

    def settings(name: str) -> Settings:
        tell = None if callback is None else (lambda progress: callback(name, progress))
        return Settings(
            steps=number,
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            optimizer=optimizer,
            clip=clip,
            validate_every=number,
            patience=None,
            checkpoint=path_of(checkpoint, resume),
            checkpoint_every=checkpoint_every,
            callback=tell,
            seed=seed,
        )

    file = settings("").checkpoint
    identity: dict[str, Any] = {"mode": mode, "layers": list(layers)}
    if file is not None:
        identity["batches"] = batch_count(batches)
        identity["teacher"] = of_module(teacher)
        identity["the student's other tensors"] = of_module(student, trained)
    with models.prepared(student, teacher, trained, False):
        called = _order(teacher, layers, batches, device)
        together = models.is_sharded(teacher)
        job = Job(file, resume, identity, trained, batches, device, together)
        if mode == "joint":
            return _joint(teacher, layers, called, batches, settings(""), job, device)
        for name in called:
            if name not in job.found:
                job.begin(name)
                pairs = list(_sequential_calls(student, teacher, name, batches, device))
                alone = {name: layers[name]}
                job.end(_train(alone, pairs, lambda calls: calls, settings(name), job))
        return {name: job.found[name] for name in called}


def _layers(
    student: nn.Module, teacher: nn.Module, names: Sequence[str] | None
) -> dict[str, nn.Module]:
    ours, theirs = dict(student.named_modules()), dict(teacher.named_modules())
    converted = {
        name: module
        for name, module in ours.items()
        if models.is_cp_layer(module) and name in theirs and not models.is_cp_layer(theirs[name])
    }
    if names is None:
        if not converted:
            raise ValueError(
                "the student holds no CP layer that the teacher has as another layer; convert it "
                "first, and keep a copy of the original as the teacher"
            )
        return converted
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(
            f"names must be a sequence of names, got the {type(names).__name__} {names!r}; give a "
            f"list"
        )
    names = list(names)
    for name in names:
        if name not in converted:
            raise ValueError(
                f"{name!r} is not a converted layer; those are: {', '.join(converted) or 'none'}"
            )
    if not names:
        raise ValueError("names must hold at least one name, got none")
    return {name: converted[name] for name in names}


@contextmanager
def _recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[_Call]]]:
    """Record the calls of layers; tensors are copied, since later layers may work in place."""
    calls: dict[str, list[_Call]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            copied = tuple(_copied(value) for value in args)
            named = {key: _copied(value) for key, value in kwargs.items()}
            calls.setdefault(name, []).append(_Call(copied, named, _copied(output)))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
        for name in names
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _order(
    teacher: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Any], device: torch.device
) -> list[str]:
    """Return the names of the layers in the order in which the first batch calls them."""
    for batch in batches:
        with torch.no_grad(), _recorded(teacher, layers) as calls:
            call(teacher, moved(batch, device))
        idle = [name for name in layers if name not in calls]
        if idle:
            raise ValueError(
                f"the teacher never calls {', '.join(idle)} as a module on the first batch; leave "
                f"it out of names"
            )
        return list(calls)
    raise ValueError("batches must hold at least one batch, got none")


def _sequential_calls(
    student: nn.Module,
    teacher: nn.Module,
    name: str,
    batches: Iterable[Any],
    device: torch.device,
) -> Iterator[dict[str, list[_Call]]]:
    """Pair the student's inputs of a layer with the teacher's outputs, batch by batch."""
    for batch in batches:
        batch = moved(batch, device)
        with torch.no_grad(), _recorded(teacher, [name]) as theirs:
            call(teacher, batch)
        with torch.no_grad(), _recorded(student, [name]) as ours:
            call(student, batch)
        pairs = zip(ours.get(name, []), theirs.get(name, []), strict=True)
        yield {name: [_Call(own.args, own.kwargs, other.output) for own, other in pairs]}


def _joint(
    teacher: nn.Module,
    layers: dict[str, nn.Module],
    called: Sequence[str],
    batches: Iterable[Any],
    settings: Settings,
    job: Job,
    device: torch.device,
) -> dict[str, LayerMatch]:
    def capture(batch: Any) -> dict[str, list[_Call]]:
        with torch.no_grad(), _recorded(teacher, layers) as calls:
            call(teacher, moved(batch, device))
        return calls

    if not job.found:
        job.begin("")
        in_order = {name: layers[name] for name in called}
        job.end(_train(in_order, batches, capture, settings, job))
    return {name: job.found[name] for name in called}


def _train(
    layers: dict[str, nn.Module],
    batches: Iterable[Any],
    capture: Callable[[Any], dict[str, list[_Call]]],
    settings: Settings,
    job: Job,
) -> dict[str, LayerMatch]:
    """Train layers together on their own losses; each keeps the better of before and after."""
    start = time.perf_counter()
    trained: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        trained |= {f"{name}.{own}": p for own, p in models.select(layer, "cp").items()}

    def loss(batch: Any) -> Tensor:
        calls = capture(batch)
        terms = []
        for name, layer in layers.items():
            for record in calls.get(name, []):
                missed, size = _squares(layer, record, name)
                if record.output.numel():
                    terms.append(missed / size.clamp_min(torch.finfo(size.dtype).tiny))
        if not terms:
            raise ValueError("a batch must reach one of the layers at least, this one does not")
        return torch.stack(terms).sum()

    before = _errors(layers, batches, capture)
    Loop(trained, {}, batches, loss, settings, {}, keeper=job.keeper).run()
    after = _errors(layers, batches, capture)
    seconds = time.perf_counter() - start
    for name in layers:
        # "after > before" would be false for NaN and keep it.
        if not after[name] <= before[name]:
            after[name] = before[name]
            for own, parameter in trained.items():
                if own.startswith(f"{name}."):
                    parameter.data.copy_(job.initial(own))
    return {name: LayerMatch(before[name], after[name], seconds) for name in layers}


def _errors(
    layers: dict[str, nn.Module],
    batches: Iterable[Any],
    capture: Callable[[Any], dict[str, list[_Call]]],
) -> dict[str, float]:
    missed, size = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    with torch.no_grad():
        for batch in batches:
            calls = capture(batch)
            for name, layer in layers.items():
                for record in calls.get(name, []):
                    own, whole = _squares(layer, record, name)
                    missed[name] += own.item()
                    size[name] += whole.item()
    return {n: (missed[n] / size[n]) ** 0.5 if size[n] > 0 else missed[n] ** 0.5 for n in layers}


def _squares(layer: nn.Module, call: _Call, name: str) -> tuple[Tensor, Tensor]:
    """‖Y − Ŷ‖² and ‖Y‖² of one call."""
    own = layer(*call.args, **call.kwargs)
    if own.shape != call.output.shape:
        raise ValueError(
            f"layer {name!r} puts out {tuple(own.shape)} in the student and "
            f"{tuple(call.output.shape)} in the teacher"
        )
    wide = torch.promote_types(own.dtype, torch.float32)
    target = call.output.to(wide)
    return (own.to(wide) - target).abs().square().sum(), target.abs().square().sum()
