"""The checkpoint of a job: one file of tensors and plain values, and the one before it.

The file is a safetensors file with a checksum. Its metadata holds the state as JSON, in which a
tensor stands as ``{"tensor": name}``, a tuple as ``{"tuple": [...]}`` and a dict as ``{"dict":
[[key, value], ...]}``, so that a state is read back as it was, bit for bit. Reading runs no code.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyadic.durable import sealed
from polyadic.durable.files import check_regular, replacing

VERSION = 2
_ENTRY = "polyadic_checkpoint"
_TORCH_SAVE = b"PK\x03\x04"


def previous(path: Path) -> Path:
    """Return where the checkpoint before the last one stands."""
    return path.with_name(f"{path.name}.previous")


def exists(path: Path) -> bool:
    """Whether there is a checkpoint to go on from, in either generation."""
    return path.exists() or previous(path).exists()


def remove(path: Path) -> None:
    """Remove a checkpoint with the one before it."""
    path.unlink(missing_ok=True)
    previous(path).unlink(missing_ok=True)


def save(path: Path, kind: str, state: Mapping[str, Any], generations: int = 2) -> None:
    """Write a checkpoint in one step; the one before it is kept.

    Args:
        path: the file.
        kind: the kind of job, such as ``"polyadic.finetune"``.
        state: tensors, numbers, strings and None in dicts, lists and tuples.
        generations: 2, or 1 to keep none but the last.

    Raises:
        TypeError: a value is of another type.
        OSError: the file cannot be written; the last checkpoint is as it was.
    """
    tensors = _Tensors()
    plain = _to_plain(state, tensors, "state")
    content = json.dumps({"format": kind, "version": VERSION, "state": plain})
    with replacing(path, previous(path) if generations > 1 else None) as draft:
        sealed.write(draft, tensors.by_name, {_ENTRY: content})


def load(path: Path, kind: str) -> dict[str, Any]:
    """Read a checkpoint; where the last one is damaged, the one before it, with a warning.

    Raises:
        ValueError: the checkpoint is damaged, of another kind or of another version, and there is
            none before it.
    """
    try:
        return _read(path, kind)
    except ValueError as error:
        if not previous(path).exists():
            raise
        state = _read(previous(path), kind)
        warnings.warn(
            f"{error}; going on from {previous(path).name}, the one before it",
            RuntimeWarning,
            stacklevel=2,
        )
        return state


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        check_regular(path)
        with open(path, "rb") as opened:
            old = opened.read(4) == _TORCH_SAVE
        content = _of_torch_save(path) if old else _of_safetensors(path)
    except Exception as error:
        # torch raises pickle, zip, end-of-file and runtime errors, depending on what is damaged.
        raise ValueError(
            f"{path.name} cannot be read as a checkpoint ({type(error).__name__}: {error}); it is "
            f"damaged or something else; remove it to begin anew"
        ) from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError(f"{path.name} is not a checkpoint of {kind}; name another file")
    if content.get("version") != (1 if old else VERSION):
        raise ValueError(
            f"{path.name} has format version {content.get('version')!r}, this library reads "
            f"1 and {VERSION}; use the version of polyadic that wrote it, or begin anew"
        )
    state: Any = content if old else content.get("state")
    if not isinstance(state, dict):
        raise ValueError(f"{path.name} is damaged: it holds no state; remove it to begin anew")
    return state


def _of_safetensors(path: Path) -> Any:
    with sealed.opened(path, required=True) as opened:
        content = json.loads((opened.metadata() or {})[_ENTRY])
        # What is read is a view of the file, which may change later.
        names: list[str] = list(opened.keys())
        tensors = {name: opened.get_tensor(name).clone() for name in names}
    content["state"] = _from_plain(content["state"], tensors)
    return content


def _of_torch_save(path: Path) -> Any:
    """Read what polyadic 0.1 wrote; its loader checks no checksum, but its zip file has them."""
    with zipfile.ZipFile(path) as archive:
        if (broken := archive.testzip()) is not None:
            raise ValueError(f"{broken} in it is damaged")
    # Tensors and plain values alone; whatever else a pickle asks for is refused.
    return torch.load(path, map_location="cpu", weights_only=True)


class _Tensors:
    """Tensors to be stored; what stands in several places is stored once."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}

    def name_of(self, value: Tensor) -> str:
        place = value.data_ptr(), value.device, value.dtype, value.shape, value.stride()
        key = place if value.numel() else id(value)
        if key not in self._names:
            self._names[key] = name = str(len(self.by_name))
            # Views that overlap in memory in part are stored as separate tensors.
            self.by_name[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return self._names[key]


def _to_plain(value: Any, tensors: _Tensors, place: str) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": tensors.name_of(value)}
    if isinstance(value, (str, bool, int, float, type(None))):
        return value
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, (str, int))]:
            raise TypeError(f"{place} has the key {wrong[0]!r}; expected strings or ints")
        return {"dict": [[k, _to_plain(v, tensors, f"{place}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_to_plain(each, tensors, f"{place}[{i}]") for i, each in enumerate(value)]
        return parts if isinstance(value, list) else {"tuple": parts}
    raise TypeError(
        f"{place} is a {type(value).__name__}, which no checkpoint can hold; expected tensors, "
        f"numbers, strings and None in dicts, lists and tuples"
    )


def _from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_plain(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    make: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[content],
        "tuple": lambda: tuple(_from_plain(each, tensors) for each in content),
        "dict": lambda: {key: _from_plain(each, tensors) for key, each in content},
    }
    return make[kind]()


def check_continued(file: str, saved: str | None, own: str | None) -> None:
    """Refuse a checkpoint that exists although no earlier job is to be continued.

    Args:
        file: name of the checkpoint, for the message.
        saved: the run of several processes that wrote it, or None.
        own: this process's run, or None. What another process of the same run has written is not an
            old checkpoint.

    Raises:
        ValueError: another run wrote it.
    """
    if own is None or saved != own:
        raise ValueError(
            f"checkpoint {file} exists; pass resume=True to continue from it, or remove it"
        )


def same(file: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is not of this job, by the name of what differs.

    Args:
        file: name of the checkpoint, for the message.
        saved: what its job was made of, by name.
        own: what this job is made of.

    Raises:
        ValueError: something differs.
    """
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise ValueError(
                f"{file} is of a job with {name}={saved.get(name)!r}, this one has "
                f"{own.get(name)!r}; give the same, or another checkpoint file"
            )
