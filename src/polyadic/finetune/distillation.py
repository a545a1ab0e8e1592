"""``distill``: train a converted model towards the outputs of the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyadic.batches import keeping_modes, moved, require_batches
from polyadic.checks import check_flag, check_function, check_module
from polyadic.durable import identity
from polyadic.durable.keeper import FileKeeper, path_of
from polyadic.finetune import models
from polyadic.finetune.loop import Loop, Recovery
from polyadic.finetune.settings import (
    MakeOptimizer,
    Progress,
    Schedule,
    Settings,
    batch_count,
    total_steps,
)
from polyadic.finetune.walk import drawn_by, first
from polyadic.nn.wrapped import check_unwrapped
from polyadic.training.rates import param_groups

FORMAT = "polyadic.finetune"

Loss = Literal["mse", "cosine", "kl"] | Callable[[Tensor, Tensor], Tensor]
# The rate of a dense weight that factors follow by default, and the batches that judge by default.
# Among rates from 3e-5 to 1e-3 none was best both for fits that were nearly exact (lower ones) and
# for poor ones (higher ones); with this one every network tried ended below the loss it began with,
# after 100 steps and after 400 (digits, November 2026). Adam's first steps, which are all of full
# size, raise the loss without a warm-up.
DENSE_RATE, JUDGING = 3e-4, 4
Validation = Iterable[Any] | Callable[[nn.Module], float]


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    if student.is_complex():
        return (student - teacher).abs().square().mean()
    return F.mse_loss(student, teacher)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    rows = student.flatten(0, -2), teacher.flatten(0, -2)
    ours, theirs = (row.log_softmax(-1) for row in rows)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "kl": _kl,
    "mse": _mse,
}


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    epochs: int | None = None,
    loss: Loss = "mse",
    forward: models.Forward | None = None,
    trainable: models.Trainable = "cp",
    lr: float | None = None,
    optimizer: MakeOptimizer = torch.optim.Adam,
    schedule: Schedule = "cosine",
    warmup: int | None = None,
    clip: float | None = 1.0,
    train_mode: bool = False,
    validation: Validation | Literal[False] | None = None,
    validate_every: int = 100,
    patience: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    callback: Callable[[Progress], object] | None = None,
    seed: int = 0,
) -> Recovery:
    """Train a converted model towards the outputs of the original, on batches without labels.

    Per batch the loss compares the student's output with the teacher's, which is computed without
    gradients. Source: Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015;
    for compressed layers Phan et al., ECCV 2020 (fine-tuning after CPD-EPC).

    If a training is stopped, by a kill at any moment or by Ctrl-C, and continued on one machine
    from its checkpoint, its result is bit for bit that of an uninterrupted training: parameters,
    optimizer, the place in the batches and the random state of torch, Python and NumPy are stored.
    A checkpoint is a file without code and with a checksum; it is written whole or not at all, and
    the one before it stays beside it as ``<name>.previous``, for the case that the last is damaged.
    Ctrl-C is put off to the end of the step, whose state is written; a second one is not put off.
    What must be equal to go on is compared by name: the settings, the optimizer's options, digests
    of the teacher, of the student's tensors that are not trained, and of the batches used so far in
    the epoch. Batches that draw from a generator of their own have to seed it in ``__iter__``.

    Args:
        student: the converted model, trained in place.
        teacher: the original, which is in evaluation mode while this runs, and not changed.
        batches: an iterable that can be walked again, such as a list or a DataLoader. A tensor
            is given to the models as ``model(batch)``, a tuple or list as ``model(*batch)``, a
            mapping as ``model(**batch)``, on the device of the student's parameters.
        steps: batches to train on; the iterable is walked as often as that needs.
        epochs: number of walks through ``batches``, to be given in place of ``steps``.
        loss: ``"mse"``; ``"cosine"``, 1 less the mean cosine along the last dimension; ``"kl"``,
            the divergence of softmax outputs along it; or a function (student's, teacher's output)
            → scalar. Low precisions are compared in float32. For complex outputs ``"mse"``, the
            mean squared modulus, or a function.
        forward: function (model, batch) → tensor to compare; by default the model's output, which
            must then be one tensor.
        trainable: ``"cp"``, factors and biases of the CP layers; ``"cp+norms"``, the normalisation
            layers too; ``"all"``; or a function (name, parameter) → bool.
        lr: learning rate of all parameters. By default each factor has a rate of its own, at which
            its tensor changes as a dense weight does at 3e-4 (``polyadic.param_groups``), since the
            best rate depends on the scale of the factors.
        optimizer: class or function, called with a list of parameters and ``lr=``, by default with
            groups of parameters that hold their rates.
        schedule: the factor of the learning rate: ``"constant"``, ``"linear"`` or ``"cosine"`` (to
            zero), or a function of the part done in [0, 1) → factor.
        warmup: steps over which the learning rate rises linearly first, by default a tenth.
        clip: largest norm of the gradient over all trained parameters, None for no limit.
        train_mode: whether the student is trained in training mode (dropout, batch statistics).
        validation: batches on which the loss is measured, or a function of the student whose
            value is to become small. The best parameters found are kept, the initial ones included,
            so that no training ends worse than it began. By default the first four of ``batches``;
            False keeps the last parameters, whatever they are.
        validate_every: steps between validations; there is one before the first and after the last.
        patience: validations without improvement after which to stop; None for never.
        checkpoint: a file to write after every ``checkpoint_every`` steps and after the last.
        checkpoint_every: steps between writes of the checkpoint.
        resume: continue from ``checkpoint`` if that file exists; without ``resume`` an existing
            file is an error.
        callback: called with a ``Progress`` after each step; what it raises ends the training.
        seed: seed of torch's random state during the training; the caller's state is restored.

    Returns:
        A ``Recovery`` with the losses, the validations and the step of the best one. The student
        has its best parameters, or the last with ``validation=False``.

    Raises:
        TypeError: an argument is of the wrong type; batches that can be walked only once.
        ValueError: an argument does not fit, the teacher would be trained too, outputs differ in
            shape, or the checkpoint is damaged or of another training; the student is wrapped
            (DistributedDataParallel, DataParallel, FSDP) or sharded.
        OSError: the checkpoint cannot be written, for a full disk for instance; the last one stays.
        RuntimeError: a layer of the student is frozen for inference.
        FloatingPointError: loss or gradient is not finite; the student keeps its best parameters,
            or with ``validation=False`` those before that step.
    """
    check_unwrapped(student, "distill", "student")
    check_module(teacher, "teacher")
    require_batches(batches, "batches")
    train_mode = check_flag(train_mode, "train_mode")
    compare = _comparison(loss)
    trained = models.select(student, trainable)
    models.refuse_shared(trained, teacher)
    check_function(forward, "forward")
    run_model = forward or models.output_tensor
    device = models.device_of(student)
    total = total_steps(steps, epochs, batches)
    settings = Settings(
        steps=total,
        lr=lr,
        schedule=schedule,
        warmup=total // 10 if warmup is None else warmup,
        optimizer=optimizer,
        clip=clip,
        validate_every=validate_every,
        patience=patience,
        checkpoint=path_of(checkpoint, resume),
        checkpoint_every=checkpoint_every,
        callback=callback,
        seed=seed,
    )

    def batch_loss(batch: Any) -> Tensor:
        batch = moved(batch, device)
        with torch.no_grad():
            theirs = run_model(teacher, batch)
        return _checked(compare, run_model(student, batch), theirs)

    judges = first(batches, JUDGING, seed, device) if validation is None else validation
    validate = _validator(judges, student, batch_loss)
    record = {
        "loss": identity.named(loss),
        "train_mode": train_mode,
        "batches": batch_count(batches),
    }
    buffers = dict(student.named_buffers()) if train_mode else {}
    keeper = None
    if settings.checkpoint is not None:
        together = models.is_sharded(teacher)
        keeper = FileKeeper(settings.checkpoint, resume, FORMAT, together)
        changed = {*trained, *buffers}
        record |= {
            "forward": identity.named(forward),
            "validation": _judged_by(validation, seed, device),
            "teacher": identity.of_module(teacher),
            "the student's other tensors": identity.of_module(student, changed),
        }
    groups = _groups(student, trained) if lr is None else None
    loop = Loop(trained, buffers, batches, batch_loss, settings, record, validate, keeper, groups)
    with models.prepared(student, teacher, trained, train_mode):
        return loop.run()


def _groups(student: nn.Module, trained: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The trained parameters in groups of one rate; see ``DENSE_RATE``."""
    try:
        groups = param_groups(student, DENSE_RATE)
    except ValueError as error:
        raise ValueError(
            f"the factors have no learning rates by default: {error}; give lr="
        ) from error
    wanted = {id(parameter) for parameter in trained.values()}
    kept = [
        {"params": [p for p in group["params"] if id(p) in wanted], "lr": group["lr"]}
        for group in groups
    ]
    return [group for group in kept if group["params"]]


def _comparison(
    loss: str | Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    if callable(loss):
        return loss
    if loss not in tuple(LOSSES):
        known = ", ".join(map(repr, LOSSES))
        raise ValueError(f"loss must be one of {known} or a function, got {loss!r}")
    return LOSSES[loss]


def _checked(compare: Callable[[Tensor, Tensor], Tensor], ours: Tensor, theirs: Tensor) -> Tensor:
    for output in (ours, theirs):
        if not isinstance(output, Tensor):
            raise TypeError(
                f"forward must return the tensor to compare, got {type(output).__name__}"
            )
    if ours.shape != theirs.shape:
        raise ValueError(
            f"student and teacher must give outputs of one shape, got {tuple(ours.shape)} and "
            f"{tuple(theirs.shape)}"
        )
    if ours.is_complex() and compare in (LOSSES["cosine"], LOSSES["kl"]):
        raise ValueError(f"loss must be 'mse' or a function for outputs of {ours.dtype}")
    wide = torch.promote_types(ours.dtype, torch.float32)
    value = compare(ours.to(wide), theirs.to(wide))
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a tensor of no dimension, got {got}")
    return value


def _judged_by(validation: Any, seed: int, device: torch.device) -> str:
    """Return a text that tells what judges the student: a digest of batches, or a function's name.

    The first batches judge it by default. They are part of the batches, which are compared anyway.
    """
    if validation is None or validation is False or callable(validation):
        return identity.in_words(validation)
    require_batches(validation, "validation")
    with drawn_by(seed, validation, device):
        return identity.of_batches(validation)


def _validator(
    validation: Any, student: nn.Module, batch_loss: Callable[[Any], Tensor]
) -> Callable[[], float] | None:
    if validation is False:
        return None
    measure: Callable[[], float]
    if callable(validation):

        def measure() -> float:
            return float(validation(student))
    else:
        require_batches(validation, "validation")

        def measure() -> float:
            values = [batch_loss(batch).item() for batch in validation]
            if not values:
                raise ValueError("validation must hold at least one batch, got none")
            return math.fsum(values) / len(values)

    def evaluate() -> float:
        """Measure in evaluation mode: without dropout, and without a change of batch statistics."""
        with keeping_modes(student):
            student.eval()
            return measure()

    return evaluate
