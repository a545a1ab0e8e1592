"""The training loop: schedule, clipping, validation with early stop, checkpoints, random state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyadic.finetune import checkpoint
from polyadic.finetune.settings import Progress, Settings


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


class _Walk:
    """Iterates over batches, epoch after epoch, and can start from any place in them."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self.epoch, self.index = 0, 0
        self.epoch_rng: dict[str, Tensor] = {}
        self._current: Iterator[Any] | None = None

    def rng(self) -> dict[str, Tensor]:
        """Return the random state of torch, and of the loader's generator if it has one."""
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        own = getattr(self._batches, "generator", None)
        if isinstance(own, torch.Generator):
            state["loader"] = own.get_state().cpu()
        return state

    def set_rng(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._device)
        if "loader" in state:
            self._batches.generator.set_state(state["loader"])  # type: ignore[attr-defined]

    def go_to(self, epoch: int, index: int, epoch_rng: Mapping[str, Tensor]) -> None:
        """Restart an epoch in its initial random state and skip the batches already used."""
        self.epoch, self.index, self.epoch_rng = epoch, index, dict(epoch_rng)
        self.set_rng(self.epoch_rng)
        self._current = iter(self._batches)
        for _ in range(index):
            if next(self._current, self) is self:
                raise ValueError("batches are fewer than when the checkpoint was written")

    def next(self) -> Any:
        if self._current is None:
            self.epoch_rng = self.rng()
            self._current = iter(self._batches)
        batch = next(self._current, self)
        if batch is self:
            if self.index == 0:
                raise ValueError("batches must hold at least one batch, got none")
            self.epoch, self.index, self._current = self.epoch + 1, 0, None
            return self.next()
        self.index += 1
        return batch


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
    ) -> None:
        if settings.patience is not None and validate is None:
            raise ValueError("patience needs validation=, which it waits for to improve")
        self._parameters = list(parameters.values())
        self._tensors: dict[str, Tensor] = {**parameters, **buffers}
        self._settings, self._loss, self._validate = settings, loss, validate
        self._record = {**settings.record(), **record}
        self._optimizer = settings.optimizer(self._parameters, lr=settings.lr)
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._walk = _Walk(batches, self._parameters[0].device)
        self._step, self._stale, self._best_step = 0, 0, 0
        self._best, self._seconds, self._started = math.inf, 0.0, 0.0
        self._losses: list[float] = []
        self._validations: list[tuple[int, float]] = []
        self._kept: dict[str, Tensor] = {}
        self._stopped_early = self._done = False

    def run(self) -> Recovery:
        """Train to the end, and leave the best parameters in place."""
        path = self._settings.checkpoint
        if path is not None and path.exists() and not self._settings.resume:
            raise ValueError(
                f"checkpoint {path.name} exists; pass resume=True to continue from it, or remove it"
            )
        device = self._parameters[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._settings.seed)
            self._started = time.perf_counter()
            if path is not None and path.exists():
                self._restore(checkpoint.load(path, self._record, self._tensors))
            elif self._validate is not None:
                self._judge()
            while not self._done:
                self._one_step()
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

    def _one_step(self) -> None:
        settings = self._settings
        batch = self._walk.next()
        factor = settings.factor(self._step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.zero_grad()
        with torch.enable_grad():
            loss = self._loss(batch)
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the parameters that are trained")
        loss.backward()  # type: ignore[no-untyped-call]
        value = loss.item()
        norm = 0.0
        if settings.clip is not None:
            norm = float(nn.utils.clip_grad_norm_(self._parameters, settings.clip))
        if not (math.isfinite(value) and math.isfinite(norm)):
            left = "as it was before this step; with validation= its best is kept"
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
        if settings.checkpoint is not None and (
            self._done or self._step % settings.checkpoint_every == 0
        ):
            checkpoint.save(settings.checkpoint, self._state())
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
            raise FloatingPointError(f"validation is {value} before the first step")
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
            "rng": self._walk.rng(),
            "epoch_rng": self._walk.epoch_rng,
            "done": self._done,
            "stopped_early": self._stopped_early,
            "seconds": self._elapsed(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; the model is changed last, after everything was checked."""
        try:
            self._optimizer.load_state_dict(state["optimizer"])
            validations = [(int(step), float(value)) for step, value in state["validations"]]
            self._walk.go_to(state["epoch"], state["index"], state["epoch_rng"])
            self._walk.set_rng(state["rng"])
        except (KeyError, TypeError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"the checkpoint is damaged: optimizer or random state does not fit ({error})"
            ) from error
        self._step, self._stale, self._best_step = state["step"], state["stale"], state["best_step"]
        self._best, self._seconds = state["best"], state["seconds"]
        self._losses, self._validations = state["losses"].tolist(), validations
        self._done, self._stopped_early = state["done"], state["stopped_early"]
        self._kept = {n: t.to(self._tensors[n].device) for n, t in state["best_parameters"].items()}
        self._copy(state["parameters"])


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}
