"""What a conversion does to the outputs for texts that it was not calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# Lines that are held out: those after the calibration's, or this share of a shorter text.
MOST, SHARE, LEAST = 64, 1 / 8, 16


def divide(lines: Sequence[str], samples: int) -> tuple[list[str], list[str]]:
    """Divide lines into at most ``samples`` to calibrate on, and others to measure on.

    A text of fewer than ``LEAST`` lines is calibrated on as a whole.
    """
    if len(lines) < LEAST:
        return list(lines[:samples]), []
    cut = min(samples, round(len(lines) * (1 - SHARE)))
    return list(lines[:cut]), list(lines[cut : cut + MOST])


class HeldOut:
    """The original's outputs for held-out texts, to compare a converted model with.

    Args:
        model: the original, in evaluation mode.
        batches: the texts.
        output: called with a model and a batch: a tensor (B, ...), zero where text is padded.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        output: Callable[[nn.Module, Any], Tensor],
    ) -> None:
        self._batches, self._output = batches, output
        self._before = self._vectors(model)

    def sentence(self, model: nn.Module) -> str:
        """Say how the outputs of a converted model agree with the original's."""
        import torch

        cosines = torch.nn.functional.cosine_similarity(self._vectors(model), self._before)
        return (
            f"on {len(cosines)} lines that were held out, the cosine of its outputs with the "
            f"original's is {cosines.mean():.3f} on average and {cosines.min():.3f} at least"
        )

    def _vectors(self, model: nn.Module) -> Tensor:
        """A vector (lines, ...) for each line: the sum of the outputs for its tokens."""
        import torch

        with torch.no_grad():
            found = [self._output(model, batch) for batch in self._batches]
        return torch.cat([y.sum(1) if y.dim() > 2 else y.flatten(1) for y in found]).double()
