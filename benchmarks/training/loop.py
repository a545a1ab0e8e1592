"""One training run: schedule, steps (in a CUDA graph where there is a GPU), losses, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polyadic
from polyadic.durable import checkpoint as durable
from polyadic.durable.interrupts import deferred

KIND = "polyadic.study"
WARM_UP_SHARE = 0.05
Loss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
Batch = Callable[[int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        lr: the peak of the learning rate, reached after 5 % of the steps; half a cosine to 0 then.
        steps: of the optimizer.
        weight_decay: AdamW's.
        groups: whether factors get the rates of ``polyadic.param_groups``.
        rest: the peak of the rate of all parameters outside ``model.blocks``; ``lr`` where None.
    """

    lr: float
    steps: int
    weight_decay: float = 0.1
    groups: bool = False
    rest: float | None = None


def rate_at(step: int, steps: int) -> float:
    """Fraction of the peak learning rate at a step, counted from 0."""
    warm = max(1, round(WARM_UP_SHARE * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(
    model: nn.Module,
    recipe: Recipe,
    batch: Batch,
    loss: Loss,
    validate: Callable[[nn.Module], float],
    *,
    validate_every: int,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a model; continue where ``checkpoint`` was written, bit for bit.

    Ctrl-C is put off to the end of a step, whose state is written. The file stays after the last
    step, for whoever keeps the record to remove.

    Args:
        model: with values, on its device.
        recipe: how.
        batch: tensors of a step, by its number alone.
        loss: of a model and a batch.
        validate: the held-out loss.
        validate_every: steps between validations; one follows the last step.
        checkpoint: a file.
        checkpoint_every: steps between writes.
        identity: what else must be equal to continue, by name.

    Returns:
        ``curve``: [step, held-out loss] pairs; ``loss``: the last of them; ``seconds_per_step``:
        the median of the steps' wall time, not comparable between runs that share a machine.
    """
    device = next(model.parameters()).device
    optimizer = optimizer_of(model, recipe, device)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    curve: list[list[float]] = []
    start = 0
    own = {**dataclasses.asdict(recipe), **(identity or {})}
    if checkpoint is not None and durable.exists(checkpoint):
        state = durable.load(checkpoint, KIND)
        durable.same(checkpoint.name, state["identity"], own)
        model.load_state_dict(state["model"])
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # where a captured step reads it
        curve, start = state["curve"], state["step"]

    def save(step: int) -> None:
        if checkpoint is not None:
            model_state, moments = model.state_dict(), optimizer.state_dict()
            state = {"model": model_state, "optimizer": moments, "curve": curve, "step": step}
            durable.save(checkpoint, KIND, {**state, "identity": own})

    diverged = bool(curve) and not math.isfinite(curve[-1][1])
    times = []
    if start < recipe.steps and not diverged:
        step_on = stepper(model, optimizer, loss, batch(start), device)
        with deferred(most=1) as pending:
            for step in range(start, recipe.steps):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    _set_rate(group, peak * rate_at(step, recipe.steps))
                began = time.perf_counter()
                step_on(batch(step))
                times.append(time.perf_counter() - began)
                done = step + 1
                if done % validate_every == 0 or done == recipe.steps:
                    curve.append([done, validate(model)])
                    diverged = not math.isfinite(curve[-1][1])
                last = diverged or done == recipe.steps
                if last or done % checkpoint_every == 0 or pending.count:
                    save(done)
                pending.check()
                if last:
                    break
    seconds = sorted(times)[len(times) // 2] if times else None
    return {"curve": curve, "loss": curve[-1][1], "seconds_per_step": seconds}


def optimizer_of(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    """AdamW over all parameters, in the groups that the recipe asks for."""
    groups: Any = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if recipe.groups:
        groups = polyadic.param_groups(model, recipe.lr, recipe.weight_decay)
    if recipe.rest is not None:
        inside = {id(parameter) for parameter in model.get_submodule("blocks").parameters()}
        groups = [
            {**group, "params": chosen, **({} if within else {"lr": recipe.rest})}
            for group in groups
            for within in (True, False)
            if (chosen := [p for p in group["params"] if (id(p) in inside) is within])
        ]
    for group in groups:
        rate = float(group.get("lr", recipe.lr))
        # A captured step reads the rate of the day from memory.
        group["lr"] = torch.tensor(rate, device=device) if device.type == "cuda" else rate
    return torch.optim.AdamW(
        groups,
        lr=recipe.lr,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        capturable=device.type == "cuda",
        foreach=True,
    )


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def stepper(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    loss: Loss,
    example: tuple[Tensor, ...],
    device: torch.device,
) -> Callable[[tuple[Tensor, ...]], None]:
    """A function that makes one step from a batch."""
    inputs = tuple(tensor.clone() for tensor in example)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, inputs).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()

    run: Callable[[], Any] = step
    if device.type == "cuda":
        run = _captured(model, optimizer, step)

    def step_on(batch: tuple[Tensor, ...]) -> None:
        for own, new in zip(inputs, batch, strict=True):
            own.copy_(new)
        run()

    return step_on


def _captured(
    model: nn.Module, optimizer: torch.optim.AdamW, step: Callable[[], None]
) -> Callable[[], Any]:
    """The step as a CUDA graph; warming up changes neither the model nor the optimizer."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {
        parameter: {name: value.clone() for name, value in state.items()}
        for parameter, state in optimizer.state.items()
    }
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(kept[name])
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                before = moments.get(parameter)
                value.zero_() if before is None else value.copy_(before[name])
    return graph.replay
