"""What a training needs to go on, and what must be equal when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyadic.durable import checkpoint as durable

_FIELDS = {
    "settings": dict,
    "step": int,
    "epoch": int,
    "index": int,
    "parameters": dict,
    "best_parameters": dict,
    "best": float,
    "best_step": int,
    "stale": int,
    "losses": Tensor,
    "validations": list,
    "optimizer": dict,
    "rng": dict,
    "epoch_rng": dict,
    "done": bool,
    "stopped_early": bool,
    "seconds": float,
}


def check(
    state: Mapping[str, Any], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Check that a state belongs to this training.

    Args:
        state: what was loaded.
        settings: settings of this training, to which those in the file must be equal.
        tensors: by name, the tensors to which the file's parameters will be copied.

    Raises:
        ValueError: a part is missing or of another type, or the state is of another training.
    """
    for name, kind in _FIELDS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(
                f"the checkpoint is damaged: {name} should be a {kind.__name__}, is "
                f"{type(state.get(name)).__name__}; remove it to begin anew"
            )
    step, steps = state["step"], settings.get("steps")
    if len(state["losses"]) != step or state["index"] < 0:
        raise ValueError("the checkpoint is damaged: its counts of steps do not fit together")
    if isinstance(steps, int) and step >= steps and not state["done"]:
        raise ValueError(
            f"the checkpoint is of a job with {step} steps done, this one has steps={steps}"
        )
    saved = state["settings"]
    if state.get("version") == 1:
        # It names neither teacher nor data, and partial functions by that word alone.
        settings = {name: settings.get(name) for name in saved}
        saved = {n: settings[n] if value == "partial" else value for n, value in saved.items()}
    for name in ("parameters", "best_parameters"):
        check_tensors("the checkpoint", state[name], tensors)
    durable.same("the checkpoint", saved, settings)


def check_tensors(file: str, saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names, shapes or dtypes than those they are to be copied to.

    Raises:
        ValueError: one differs.
    """
    if saved.keys() != own.keys():
        odd = sorted(saved.keys() ^ own.keys())[:3]
        raise ValueError(
            f"{file} is of another model: {', '.join(map(str, odd))} is in one of them only"
        )
    for name, tensor in own.items():
        value = saved[name]
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{file} is of another model: {name} has shape {tuple(tensor.shape)} here, {got} "
                f"there"
            )
        if value.dtype != tensor.dtype:
            raise ValueError(
                f"{file} is of another model: {name} is {tensor.dtype} here, {value.dtype} there"
            )
