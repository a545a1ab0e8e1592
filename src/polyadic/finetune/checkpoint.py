"""The file from which a training is continued: tensors and plain values; reading runs no code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "polyadic.finetune"
VERSION = 1

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


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint in one step: a crash leaves the old file or the new one, no half."""
    part = path.with_name(path.name + ".part")
    torch.save({"format": FORMAT, "version": VERSION, **state}, part)
    os.replace(part, path)


def load(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read a checkpoint and check that it belongs to this training.

    Args:
        path: the file.
        settings: settings of this training, to which those in the file must be equal.
        tensors: by name, the tensors to which the file's parameters will be copied.

    Raises:
        ValueError: the file is not a checkpoint, is damaged, or is of another training.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises pickle, zip, end-of-file and runtime errors, depending on what is damaged.
        raise ValueError(
            f"{path.name} cannot be read as a checkpoint ({type(error).__name__}); it is damaged "
            f"or something else; remove it to begin anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path.name} is not a checkpoint of {FORMAT}; name another file")
    if state.get("version") != VERSION:
        raise ValueError(
            f"{path.name} has format version {state.get('version')!r}, this library reads "
            f"{VERSION}; use the version of polyadic that wrote it, or begin anew"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(
                f"{path.name} is damaged: {name} should be a {kind.__name__}, is "
                f"{type(state.get(name)).__name__}; remove it to begin anew"
            )
    _same_settings(path.name, state["settings"], settings)
    for name in ("parameters", "best_parameters"):
        _same_tensors(path.name, state[name], tensors)
    return state


def _same_settings(file: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise ValueError(
                f"{file} is of a training with {name}={saved.get(name)!r}, this one has "
                f"{own.get(name)!r}; give the same, or another checkpoint file"
            )


def _same_tensors(file: str, saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
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
