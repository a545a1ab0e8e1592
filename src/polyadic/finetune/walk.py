"""The way through the batches, epoch after epoch, which can go on from any place."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from polyadic.durable.identity import Digest


def random_state(batches: Any, device: torch.device) -> dict[str, Any]:
    """Return the random state of torch, Python and NumPy, and of a loader's own generator."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "python": (version, torch.tensor(words), gauss),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    own = getattr(batches, "generator", None)
    if isinstance(own, torch.Generator):
        state["loader"] = own.get_state().cpu()
    if (numpy := sys.modules.get("numpy")) is not None:
        name, words, *rest = numpy.random.get_state()
        state["numpy"] = (name, torch.tensor(words.tolist()), *rest)
    return state


def set_random_state(state: Mapping[str, Any], batches: Any, device: torch.device) -> None:
    """Set what ``random_state`` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if "loader" in state:
        batches.generator.set_state(state["loader"])
    # Versions before did not store the two.
    if "python" in state:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        name, words, *rest = state["numpy"]
        numpy.random.set_state((name, words.tolist(), *rest))


def first(batches: Iterable[Any], most: int, seed: int, device: torch.device) -> list[Any]:
    """Return the first batches as a seed draws them; the random state is what it was."""
    with drawn_by(seed, batches, device):
        return list(itertools.islice(batches, most))


@contextmanager
def drawn_by(seed: int, batches: Any, device: torch.device) -> Iterator[None]:
    """Draw batches by a seed within the block, and put the random state back after it."""
    state = random_state(batches, device)
    try:
        torch.manual_seed(seed)
        own = getattr(batches, "generator", None)
        if isinstance(own, torch.Generator):
            own.manual_seed(seed)
        yield
    finally:
        set_random_state(state, batches, device)


class Walk:
    """Iterates over batches, epoch after epoch, and can start from any place in them.

    Args:
        batches: the batches of one epoch.
        device: device of the training.
        watched: whether batches are remembered by a digest, so that others are noticed.

    Attributes:
        epoch: epochs that are done.
        index: batches of this epoch that are done.
        epoch_rng: the random state in which this epoch began.
    """

    def __init__(self, batches: Iterable[Any], device: torch.device, watched: bool) -> None:
        self._batches, self._device, self._watched = batches, device, watched
        self.epoch, self.index = 0, 0
        self.epoch_rng: dict[str, Any] = {}
        self._current: Iterator[Any] | None = None
        self._seen = Digest()

    def rng(self) -> dict[str, Any]:
        """Return the random state."""
        return random_state(self._batches, self._device)

    def seen(self) -> str:
        """Return the digest of the batches of this epoch so far."""
        return self._seen.text()

    def go_to(self, state: Mapping[str, Any]) -> None:
        """Restart an epoch in its random state, skip the batches already used, restore the rest.

        Raises:
            ValueError: the batches are not those that were used.
        """
        self.epoch, self.index = state["epoch"], state["index"]
        self.epoch_rng = dict(state["epoch_rng"])
        set_random_state(self.epoch_rng, self._batches, self._device)
        self._begin()
        assert self._current is not None
        for number in range(self.index):
            batch = next(self._current, self)
            if batch is self:
                raise ValueError(
                    f"the checkpoint is of other batches: it has used {self.index} of an epoch, "
                    f"and this one has {number}; give the same batches"
                )
            self._note(batch)
        if state.get("seen", self.seen()) != self.seen():
            raise ValueError(
                f"the checkpoint is of other batches: the first {self.index} of an epoch are not "
                f"those it was trained on; give the same in the same order, and seed in __iter__ "
                f"what draws from a generator of its own"
            )
        set_random_state(state["rng"], self._batches, self._device)

    def next(self) -> Any:
        """Return the next batch, of the next epoch where one ends."""
        if self._current is None:
            self.epoch_rng = self.rng()
            self._begin()
        assert self._current is not None
        batch = next(self._current, self)
        if batch is self:
            if self.index == 0:
                raise ValueError("batches must hold at least one batch, got none")
            self.epoch, self.index, self._current = self.epoch + 1, 0, None
            return self.next()
        self.index += 1
        self._note(batch)
        return batch

    def _begin(self) -> None:
        self._current, self._seen = iter(self._batches), Digest()

    def _note(self, batch: Any) -> None:
        if self._watched:
            self._seen.add(batch)
