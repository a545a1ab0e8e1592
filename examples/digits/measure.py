"""Two measurements of a training step: the bytes it keeps for backward, and its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def kept_bytes(forward: Callable[[], Tensor], leave_out: Iterable[Tensor] = ()) -> int:
    """Count the bytes autograd keeps between a forward pass and its backward pass.

    The rule: every tensor handed to autograd's ``save_for_backward`` counts with the whole storage
    behind it, each storage once however many tensors view it, and storages of ``leave_out`` not
    at all. Copies of those, being other storages, do count.

    Args:
        forward: Runs the forward pass and returns its result, usually the loss.
        leave_out: Tensors that exist anyway, usually the parameters, buffers and the batch.

    Returns:
        Bytes, an exact count and not an estimate.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
    kept: dict[int, int] = {}
    # Held until the count is done, so that no address is given out a second time.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with saved_tensors_hooks(pack, unpack), torch.enable_grad():
        alive.append(forward())
    return sum(kept.values())


def kept_by_training_batch(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Count what one training batch keeps for backward, from the images to the loss.

    Args:
        model: Classifier from ``x`` to logits.
        x: Images, ``(B, ...)``.
        y: Labels, ``(B,)`` int64.

    Returns:
        Bytes by the rule of [kept_bytes][examples.digits.measure.kept_bytes]; parameters, buffers,
        images and labels are left out.
    """
    leave_out = [*model.parameters(), *model.buffers(), x, y]
    return kept_bytes(lambda: nn.functional.cross_entropy(model(x), y), leave_out)


@dataclass(frozen=True)
class StepTime:
    """Time of one training step over the rounds, in seconds.

    Attributes:
        median: Median of the whole step: forward, backward and optimizer.
        low: First quartile of the same.
        high: Third quartile of the same.
        gradient: Median of forward and backward alone.
    """

    median: float
    low: float
    high: float
    gradient: float


def time_steps(
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    x: Tensor,
    y: Tensor,
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> list[StepTime]:
    """Time training steps of several models, interleaved.

    In each round every model makes one step, beginning with another model each time, so that a
    slow moment of the machine falls on all of them. A few rounds before the first are not counted.

    Args:
        models: Classifiers from ``x`` to logits; they are trained by this.
        optimizers: One per model.
        x: Images, ``(B, ...)``.
        y: Labels, ``(B,)`` int64.
        rounds: Rounds that count, at least 2.
        on_round: Called after each counted round.

    Returns:
        One time per model, in their order.
    """
    warm_up = 5
    whole: list[list[float]] = [[] for _ in models]
    gradient: list[list[float]] = [[] for _ in models]
    for number in range(-warm_up, rounds):
        for turn in range(len(models)):
            index = (turn + number) % len(models)
            start = time.perf_counter()
            optimizers[index].zero_grad()
            nn.functional.cross_entropy(models[index](x), y).backward()
            middle = time.perf_counter()
            optimizers[index].step()
            end = time.perf_counter()
            if number >= 0:
                whole[index].append(end - start)
                gradient[index].append(middle - start)
        if number >= 0:
            on_round()
    times = []
    for steps, parts in zip(whole, gradient, strict=True):
        low, _, high = quantiles(steps, n=4)
        times.append(StepTime(median(steps), low, high, median(parts)))
    return times
