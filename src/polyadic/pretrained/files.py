"""Files of a saved model: configuration and tensors, written whole or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from polyadic.pretrained.config import MOST_BYTES, ModelConfig, loads

CONFIG = "polyadic_config.json"
TRANSFORMERS_CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
METHOD = "polyadic"


def write(directory: Path, config: str, tensors: Mapping[str, Tensor]) -> None:
    """Write both files beside the old ones and put them in their place when both are whole."""
    directory.mkdir(parents=True, exist_ok=True)
    with _temporary(directory / WEIGHTS) as weights, _temporary(directory / CONFIG) as text:
        save_file(dict(tensors), weights, metadata={"format": "pt"})
        text.write_text(config, encoding="utf-8")
        for file in (weights, text):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        os.replace(weights, directory / WEIGHTS)
        os.replace(text, directory / CONFIG)


def write_by(directory: Path, save: Callable[[Path], None]) -> None:
    """Let a function write into a temporary folder, then move its files into the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        save(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, directory / file.name)
    # A file that was left there would be read in their place.
    (directory / CONFIG).unlink(missing_ok=True)


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    file = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def read_config(directory: Path) -> ModelConfig:
    """Read the configuration: polyadic's own file, or the entry in that of transformers.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: there is no configuration, or it is not one.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    own, theirs = _described(directory / CONFIG), _described(directory / TRANSFORMERS_CONFIG)
    if own is None and theirs is None:
        raise ValueError(
            f"{directory} holds no {CONFIG}, and no {TRANSFORMERS_CONFIG} that describes CP layers "
            f"of polyadic: it was not written by polyadic.save_pretrained"
        )
    if own is not None and theirs is not None and own.layers != theirs.layers:
        raise ValueError(
            f"{CONFIG} and {TRANSFORMERS_CONFIG} in {directory} describe different layers; remove "
            f"the one that {WEIGHTS} was not saved with"
        )
    config = own or theirs
    assert config is not None
    return config


def _described(file: Path) -> ModelConfig | None:
    """What a file says of CP layers; None where there is none, or it is another model's."""
    if not file.exists():
        return None
    try:
        content = _json(file)
        if file.name == TRANSFORMERS_CONFIG:
            content = content.get("quantization_config") if isinstance(content, dict) else None
            if not isinstance(content, dict) or content.get("quant_method") != METHOD:
                return None
        return ModelConfig.from_dict(content)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _json(file: Path) -> Any:
    with open(file, "rb") as opened:
        return loads(opened.read(MOST_BYTES + 1))


class Tensors:
    """The tensors of a directory: their names and shapes, and each by name.

    Args:
        directory: with ``model.safetensors``, or the shards that transformers writes.

    Attributes:
        shapes: the shape of every tensor by name.

    Raises:
        ValueError: there is no such file, or it is not whole.
    """

    def __init__(self, directory: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file, expected in _shards(directory).items():
            with _opened(file) as opened:
                found = set(opened.keys())
                if expected is not None and found != expected:
                    odd = ", ".join(sorted(found ^ expected)[:5])
                    raise ValueError(f"{file.name} does not hold what {INDEX} says: {odd}")
                for name in found:
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                    self._files[name] = file

    def load(self) -> dict[str, Tensor]:
        """Read all tensors; they do not share memory with the file.

        Raises:
            ValueError: one cannot be read.
        """
        loaded: dict[str, Tensor] = {}
        for file in dict.fromkeys(self._files.values()):
            with _opened(file) as opened:
                for name, place in self._files.items():
                    if place == file:
                        # What is read is a view of the file, which may change later: copy it.
                        loaded[name] = opened.get_tensor(name).clone()
        return loaded


def _shards(directory: Path) -> dict[Path, set[str] | None]:
    """The files that hold tensors, with the names each must have where an index says so."""
    if (directory / WEIGHTS).exists():
        return {directory / WEIGHTS: None}
    if not (directory / INDEX).exists():
        pickles = [
            f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in directory.glob(pattern)
        ]
        hint = f"; {pickles[0]} may hold code and is not read" if pickles else ""
        raise ValueError(f"{directory} holds no {WEIGHTS}{hint}")
    try:
        content = _json(directory / INDEX)
        places = content["weight_map"] if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places:
            raise ValueError("it must be an object with 'weight_map'")
        shards: dict[Path, set[str] | None] = {}
        names: dict[str, set[str]] = {}
        for name, file in places.items():
            # Only files in the same folder are read: no subfolder, no parent, no absolute path.
            if (
                not isinstance(file, str)
                or not file.endswith(".safetensors")
                or set(file) & set("/\\:\0")
            ):
                raise ValueError(
                    f"{name!r:.80} must be in a .safetensors file beside it, got {file!r:.80}"
                )
            names.setdefault(file, set()).add(name)
        shards.update({directory / file: held for file, held in names.items()})
        return shards
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{directory / INDEX} cannot be read: {error}") from error


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def storable(name: str, value: Any) -> Tensor:
    """Return a tensor in the form in which it is written, or raise why it cannot be written.

    Raises:
        ValueError: it is not a plain, dense tensor with values, of a dtype that files can hold.
    """
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} is {type(value).__name__}; only tensors can be saved, no extra state"
        )
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"{name} is a {type(value).__name__}; gather it to a plain tensor first")
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        kind = "on the meta device" if value.is_meta else "sparse or quantized"
        raise ValueError(f"{name} is {kind}, so that it has no values to save")
    if value.dtype == torch.complex128:
        raise ValueError(
            f"{name} is torch.complex128, which files of safetensors cannot hold; save the model "
            f"in complex64, or its state_dict() by torch.save"
        )
    return value.detach().contiguous()
