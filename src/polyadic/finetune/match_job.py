"""A matching of several layers, which goes on where its checkpoint was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyadic.durable.checkpoint import same
from polyadic.durable.keeper import FileKeeper, Keeper
from polyadic.finetune.checkpoint import check_tensors
from polyadic.finetune.walk import random_state, set_random_state

FORMAT = "polyadic.match_layers"


@dataclass(frozen=True)
class LayerMatch:
    """How well a layer matches the one it stands for.

    Attributes:
        before: ‖Y − Ŷ‖ / ‖Y‖ over all batches before the training, Y being the teacher's outputs.
        after: the relative error over all batches after the training.
        seconds: time of the training; for a joint one, that of all layers together.
    """

    before: float
    after: float
    seconds: float


class Job:
    """What has been done of a matching, and the state of the training that is under way.

    Args:
        path: the checkpoint, or None.
        resume: whether to go on from it.
        identity: settings and digests that must be equal for the checkpoint to be used.
        trained: the parameters of all layers, by name; those of a checkpoint are copied into them.
        batches: the batches.
        device: device of the training.
        together: whether processes must take the same steps, as of ``FileKeeper``.

    Attributes:
        found: the result of each layer that is done, by its name.
    """

    def __init__(
        self,
        path: Path | None,
        resume: bool,
        identity: dict[str, Any],
        trained: dict[str, nn.Parameter],
        batches: Iterable[Any],
        device: torch.device,
        together: bool,
    ) -> None:
        self._file = None if path is None else FileKeeper(path, resume, FORMAT, together)
        self._identity, self._trained = identity, trained
        self._batches, self._device = batches, device
        self.found: dict[str, LayerMatch] = {}
        # Of the training under way or the next: the random state and all parameters at its start,
        # its name, and where it has come to.
        self._rng = random_state(batches, device)
        self._initial = {n: parameter.detach().clone() for n, parameter in trained.items()}
        self._name: str | None = None
        self._loop: dict[str, Any] | None = None
        state = None if self._file is None else self._file.load()
        if state is None:
            return
        try:
            same("the checkpoint", state["identity"], identity)
            check_tensors("the checkpoint", state["initial"], trained)
            self.found = {name: LayerMatch(*values) for name, values in state["found"].items()}
            self._name, self._rng, self._initial = state["name"], state["rng"], state["initial"]
            self._loop = state["loop"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the checkpoint is damaged: it lacks {error}; remove it to begin anew"
            ) from error
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(self._initial[name])

    def begin(self, name: str) -> None:
        """Begin a training, or go on with it, in the random state in which it was begun."""
        if self._name != name:
            self._name, self._loop = name, None
        set_random_state(self._rng, self._batches, self._device)

    def initial(self, name: str) -> Tensor:
        """Return a parameter as it was before the training."""
        return self._initial[name]

    def end(self, found: dict[str, LayerMatch]) -> None:
        """Note the result of a training, and write the checkpoint."""
        self.found |= found
        self._name, self._loop = None, None
        self._rng = random_state(self._batches, self._device)
        self._initial = {n: parameter.detach().clone() for n, parameter in self._trained.items()}
        self._write()

    @property
    def keeper(self) -> Keeper | None:
        """Return where the training under way keeps its state."""
        return None if self._file is None else self

    def load(self) -> dict[str, Any] | None:
        """Return the state of the training under way."""
        return self._loop

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state of the training under way, with all that is done."""
        self._loop = dict(state)
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            found = {n: (one.before, one.after, one.seconds) for n, one in self.found.items()}
            self._file.save(
                {
                    "identity": self._identity,
                    "found": found,
                    "name": self._name,
                    "rng": self._rng,
                    "initial": self._initial,
                    "loop": self._loop,
                }
            )
