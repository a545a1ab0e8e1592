"""The training loop: schedule, clipping, validation with early stop, checkpoints, random state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyadic.durable import identity
from polyadic.durable.interrupts import Pending, deferred
from polyadic.durable.keeper import Keeper
from polyadic.finetune.checkpoint import check
from polyadic.finetune.settings import Progress, Settings
from polyadic.finetune.walk import Walk
from polyadic.progress import Meter


@dataclass(frozen=True, repr=False)
class Recovery:
    """How a training went.

    Attributes:
        steps: number of steps, over all resumed parts.
        losses: loss of each step's batch, before the step.
        validations: pairs (steps done, validation); the first is from before the first step.
        best_step: the step after which the parameters were what they are now.
        best: the validation of these parameters; infinite without validation.
        stopped_early: whether patience ran out.
        seconds: time spent.
    """

    steps: int
    losses: tuple[float, ...]
    validations: tuple[tuple[int, float], ...]
    best_step: int
    best: float
    stopped_early: bool
    seconds: float

    def __repr__(self) -> str:
        losses = f"{self.losses[0]:.4g} to {self.losses[-1]:.4g}" if self.losses else "none"
        return (
            f"Recovery(steps={self.steps}, losses={losses}, best={self.best:.4g} after step "
            f"{self.best_step}, stopped_early={self.stopped_early}, seconds={self.seconds:.3g})"
        )


class Loop:
    """One training from its first step to its last, over several runs if it is resumed.

    Args:
        parameters: the parameters that are trained, by name.
        buffers: buffers that a step may change, by name; they are stored with the parameters.
        batches: the batches of one epoch; walked again for every epoch.
        loss: function of a batch; its result has a graph.
        settings: how to train.
        record: further settings that must be equal when the training is continued.
        validate: function whose value is to become small; None for no validation.
        groups: the parameters in groups with rates of their own, where the settings have no rate.
        keeper: where the state is kept, after every ``checkpoint_every`` steps, after the last and
            at Ctrl-C; None to keep nothing.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        batches: Iterable[Any],
        loss: Callable[[Any], Tensor],
        settings: Settings,
        record: Mapping[str, Any],
        validate: Callable[[], float] | None = None,
        keeper: Keeper | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if settings.patience is not None and validate is None:
            raise ValueError("patience needs validation=, which it waits for to improve")
        self._parameters = list(parameters.values())
        self._tensors: dict[str, Tensor] = {**parameters, **buffers}
        self._settings, self._loss, self._validate = settings, loss, validate
        self._keeper = keeper
        if groups is None:
            self._optimizer = settings.optimizer(self._parameters, lr=settings.lr)
        else:
            self._optimizer = settings.optimizer(groups)
        self._record = {**settings.record(), **_options(self._optimizer), **record}
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._walk = Walk(batches, self._parameters[0].device, keeper is not None)
        self._step, self._stale, self._best_step = 0, 0, 0
        self._best, self._seconds, self._started = math.inf, 0.0, 0.0
        self._losses: list[float] = []
        self._validations: list[tuple[int, float]] = []
        self._kept: dict[str, Tensor] = {}
        self._stopped_early = self._done = False
        self._meter = Meter("training")

    def run(self) -> Recovery:
        """Train to the end, and leave the best parameters in place."""
        state = None if self._keeper is None else self._keeper.load()
        if state is not None:
            check(state, self._record, self._tensors)
        device = self._parameters[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._settings.seed)
            self._started = time.perf_counter()
            if state is not None:
                self._restore(state)
            elif self._validate is not None:
                self._judge()
            with self._meter:
                self._steps()
        if self._validate is not None:
            self._copy(self._kept)
        return Recovery(
            steps=self._step,
            losses=tuple(self._losses),
            validations=tuple(self._validations),
            best_step=self._step if self._validate is None else self._best_step,
            best=self._best,
            stopped_early=self._stopped_early,
            seconds=self._elapsed(),
        )

    def _steps(self) -> None:
        """Make all steps. A first Ctrl-C waits for the end of its step, a second one does not."""
        if self._keeper is None:
            while not self._done:
                self._one_step(self._walk.next())
            return
        with deferred(most=1) as pending:
            while not self._done:
                try:
                    batch = self._walk.next()
                except Exception:
                    # Ctrl-C ends the processes that a loader reads with, too.
                    self._saved_if(pending)
                    raise
                self._one_step(batch)
                self._saved_if(pending)

    def _saved_if(self, pending: Pending) -> None:
        if pending.count and self._keeper is not None and self._step:
            self._keeper.save(self._state())
        pending.check()

    def _one_step(self, batch: Any) -> None:
        settings = self._settings
        factor = settings.factor(self._step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.zero_grad()
        with torch.enable_grad():
            loss = self._loss(batch)
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the parameters that are trained")
        loss.backward()
        value = loss.item()
        norm = 0.0
        if settings.clip is not None:
            norm = float(nn.utils.clip_grad_norm_(self._parameters, settings.clip))
        if not (math.isfinite(value) and math.isfinite(norm)):
            left = "as it was before this step; with validation its best is kept"
            if self._validate is not None:
                self._copy(self._kept)
                left = "at its best so far"
            raise FloatingPointError(
                f"the loss is {value} and its gradient has norm {norm} at step {self._step + 1}; "
                f"lower lr={settings.lr}, warm up or clip; the model is left {left}"
            )
        self._optimizer.step()
        self._step += 1
        self._losses.append(value)
        self._done = self._step == settings.steps
        validation = None
        if self._validate is not None and (self._done or self._step % settings.validate_every == 0):
            validation = self._judge()
        if self._keeper is not None and (self._done or self._step % settings.checkpoint_every == 0):
            self._keeper.save(self._state())
        self._meter.tell("", self._step, settings.steps, f"loss {value:.3g}")
        if settings.callback is not None:
            rate = float(self._optimizer.param_groups[0]["lr"])
            settings.callback(
                Progress(
                    self._step, settings.steps, value, rate, validation, self._best, self._elapsed()
                )
            )

    def _judge(self) -> float:
        assert self._validate is not None
        with torch.no_grad():
            value = float(self._validate())
        self._validations.append((self._step, value))
        if value < self._best:
            self._best, self._best_step, self._stale = value, self._step, 0
            self._kept = {name: t.detach().clone() for name, t in self._tensors.items()}
        else:
            self._stale += 1
        if not self._kept:
            raise FloatingPointError(
                f"the loss on the batches that judge it is {value} before the first step"
            )
        if self._settings.patience is not None and self._stale >= self._settings.patience:
            self._stopped_early = self._done = True
        return value

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors.items():
            tensor.copy_(tensors[name])

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._started

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self._record,
            "step": self._step,
            "epoch": self._walk.epoch,
            "index": self._walk.index,
            "parameters": _detached(self._tensors),
            "best_parameters": _detached(self._kept or self._tensors),
            "best": self._best,
            "best_step": self._best_step,
            "stale": self._stale,
            "losses": torch.tensor(self._losses, dtype=torch.float64, device="cpu"),
            "validations": [list(pair) for pair in self._validations],
            "optimizer": self._optimizer.state_dict(),
            "rates": self._rates,
            "rng": self._walk.rng(),
            "epoch_rng": self._walk.epoch_rng,
            "seen": self._walk.seen(),
            "done": self._done,
            "stopped_early": self._stopped_early,
            "seconds": self._elapsed(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; the model is changed last, after everything was checked."""
        try:
            self._optimizer.load_state_dict(state["optimizer"])
            validations = [(int(step), float(value)) for step, value in state["validations"]]
            rates = [float(rate) for rate in state.get("rates", self._rates)]
            self._walk.go_to(state)
        except (AttributeError, LookupError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"the checkpoint is damaged: optimizer or random state does not fit ({error})"
            ) from error
        self._rates = rates
        self._step, self._stale, self._best_step = state["step"], state["stale"], state["best_step"]
        self._best, self._seconds = state["best"], state["seconds"]
        self._losses, self._validations = state["losses"].tolist(), validations
        self._done, self._stopped_early = state["done"], state["stopped_early"]
        self._kept = {n: t.to(self._tensors[n].device) for n, t in state["best_parameters"].items()}
        self._copy(state["parameters"])


def _options(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Name an optimizer's class and its options at the start; rates are stored, not compared."""
    found = {"optimizer class": type(optimizer).__qualname__}
    for number, group in enumerate(optimizer.param_groups):
        of = f" of group {number}" if number else ""
        for name, value in group.items():
            if name not in ("params", "lr"):
                found[f"optimizer's {name}{of}"] = identity.in_words(value)
    return found


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}
