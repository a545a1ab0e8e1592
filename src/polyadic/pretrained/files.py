"""Files of a saved model: configuration and tensors, written whole or not at all."""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyadic.durable import sealed
from polyadic.durable.files import check_regular, drafts, place, replacing, sync_folder, write_text
from polyadic.pretrained.config import MOST_BYTES, ModelConfig, dumps, loads

CONFIG = "polyadic_config.json"
TRANSFORMERS_CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
METHOD = "polyadic"
_TRIES = 100


def write(directory: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a description and tensors; whenever the process is killed, one version loads.

    The file of tensors holds the description too, so that one file decides. Both carry the mark of
    this save, which tells them from a description of another save.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sealed.check_name(directory)
    mark = secrets.token_hex(8)
    text = dumps(config, mark)
    _mark_as_old(directory / CONFIG)
    with replacing(directory / WEIGHTS) as draft:
        sealed.write(draft, tensors, {"format": "pt", METHOD: text})
    write_text(directory / CONFIG, text)


def _mark_as_old(file: Path) -> None:
    """Mark a description without a mark, so that it is not taken for that of new tensors."""
    if file.is_file():
        try:
            content = _json(file)
        except ValueError:
            return
        if isinstance(content, dict) and "saved" not in content:
            write_text(file, json.dumps({**content, "saved": "before"}))


def write_by(directory: Path, save: Callable[[Path], None]) -> None:
    """Let transformers write into a folder of drafts, then put its files into the directory.

    As in ``write`` one file decides: that of the tensors, or the index of their shards. Shards get
    new names, since an older index may name the old ones until it is replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sealed.check_name(directory)
    mark = secrets.token_hex(8)
    with drafts(directory / TRANSFORMERS_CONFIG) as folder:
        save(folder)
        own = _marked_config(folder / TRANSFORMERS_CONFIG, mark)
        index = folder / INDEX
        shards = sorted(folder.glob("*.safetensors"))
        if index.exists():
            _rename_shards(index, shards, mark, own)
            shards = sorted(folder.glob("*.safetensors"))
            for file in shards:
                sealed.add(file, {})
        else:
            sealed.add(folder / WEIGHTS, {METHOD: own})
        last = index if index.exists() else folder / WEIGHTS
        stale = {directory / WEIGHTS, directory / INDEX, directory / CONFIG, *_named(directory)}
        files = [file for file in folder.iterdir() if file not in (last, folder / "lock")]
        for file in [*sorted(files), last]:
            place(file, directory / file.name)
        sync_folder(directory)
    # A file of that name would be read in the place of the shards.
    for file in stale - {directory / file.name for file in [*files, last]}:
        file.unlink(missing_ok=True)


def _marked_config(file: Path, mark: str) -> str:
    """Mark the description in a configuration of transformers, and return it as text."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["quantization_config"]["saved"] = mark
    write_text(file, json.dumps(content, indent=2) + "\n")
    return json.dumps(content["quantization_config"])


def _rename_shards(index: Path, shards: list[Path], mark: str, own: str) -> None:
    content = json.loads(index.read_text(encoding="utf-8"))
    names = {file.name: file.name.replace("model-", f"model-{mark}-", 1) for file in shards}
    content["weight_map"] = {n: names[file] for n, file in content["weight_map"].items()}
    content["metadata"] = {**content.get("metadata", {}), METHOD: own}
    write_text(index, json.dumps(content, indent=2) + "\n")
    for file in shards:
        file.rename(file.with_name(names[file.name]))


def _named(directory: Path) -> set[Path]:
    """Return the shards that the index in a directory names."""
    try:
        return set(_shards(directory, _index(directory)))
    except ValueError:
        return set()


@dataclass(frozen=True)
class Saved:
    """A saved model whose files are open, so that nobody can change what will be read.

    Attributes:
        config: the description of its layers.
        shapes: the shape of every tensor by name.
    """

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    _places: dict[str, Any]

    def load(self) -> dict[str, Tensor]:
        """Read all tensors; they do not share memory with the file.

        Raises:
            ValueError: one cannot be read.
        """
        try:
            # What is read is a view of the file, which may change later: copy it.
            return {name: held.get_tensor(name).clone() for name, held in self._places.items()}
        except (SafetensorError, OSError, RuntimeError, TypeError) as error:
            raise ValueError(f"the tensors cannot be read: {error}") from error


@contextmanager
def opened(directory: Path) -> Iterator[Saved]:
    """Open a saved model; while another process writes, it is wholly the old one or the new one.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: a file is missing, damaged or not what it should be.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    with ExitStack() as stack:
        for _ in range(_TRIES):
            index = _index(directory)
            try:
                saved = _opened(directory, index, stack)
                break
            except ValueError:
                # Shards are removed once a newer index is in the place of the one that names them.
                if _index(directory) == index:
                    raise
        else:
            raise ValueError(f"{directory} is written to all the time")
        yield saved


def _opened(directory: Path, index: bytes | None, stack: ExitStack) -> Saved:
    shards = _shards(directory, index)
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Any] = {}
    own = None if index is None else _object(index).get("metadata", {}).get(METHOD)
    for file, expected in shards.items():
        held = stack.enter_context(sealed.opened(file))
        found = set(held.keys())
        if expected is not None and found != expected:
            odd = ", ".join(sorted(found ^ expected)[:5])
            raise ValueError(f"{file.name} does not hold what {INDEX} says: {odd}")
        for name in found:
            shapes[name] = tuple(held.get_slice(name).get_shape())
            places[name] = held
        if expected is None:
            metadata = held.metadata() or {}
            own = metadata.get(METHOD)
            if own is not None and "crc32" not in metadata:
                raise ValueError(f"{file} cannot be read: it is damaged, it has lost its checksum")
    return Saved(_config(directory, own), shapes, places)


def held_by_tensors(files: Sequence[str]) -> ModelConfig | None:
    """Return the description that files of tensors hold, or their index; None if there is none."""
    try:
        first = Path(files[0])
        if first.name == WEIGHTS:
            with safe_open(first, framework="pt") as held:
                own = (held.metadata() or {}).get(METHOD)
        else:
            own = _object(_text(first.with_name(INDEX))).get("metadata", {}).get(METHOD)
        return None if own is None else ModelConfig.from_dict(loads(own))
    except (ValueError, OSError, IndexError, AttributeError, SafetensorError):
        return None


def _config(directory: Path, own: str | None) -> ModelConfig:
    """Return the description of a saved model.

    Args:
        directory: where it may stand in a file: polyadic's own, or that of transformers.
        own: the description that the file of tensors holds; None if it holds none. A file with the
            mark of another save is ignored: its process was killed, or is at work.
    """
    held = None if own is None else ModelConfig.from_dict(loads(own))
    files = {name: _described(directory / name) for name in (CONFIG, TRANSFORMERS_CONFIG)}
    configs = {
        name: config
        for name, config in files.items()
        if config is not None and (held is None or config.saved in (None, held.saved))
    }
    if not configs and held is None:
        raise ValueError(
            f"{directory} holds no {CONFIG}, and no {TRANSFORMERS_CONFIG} that describes CP layers "
            f"of polyadic: it was not written by polyadic.save_pretrained"
        )
    if len({id(config) for config in configs.values()}) > 1:
        first, second = configs.values()
        if first.layers != second.layers:
            raise ValueError(
                f"{CONFIG} and {TRANSFORMERS_CONFIG} in {directory} describe different layers; "
                f"remove the one that {WEIGHTS} was not saved with"
            )
    if not configs:
        assert held is not None
        return held
    name, config = next(iter(configs.items()))
    if held is not None and (config.layers, config.ties) != (held.layers, held.ties):
        warnings.warn(
            f"{name} in {directory} is not as it was saved: it was edited, or is damaged; it is "
            f"followed",
            RuntimeWarning,
            stacklevel=6,
        )
    return config


def _described(file: Path) -> ModelConfig | None:
    """Return what a file says of CP layers; None if there is no file, or it is another model's."""
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


def _text(file: Path) -> bytes:
    check_regular(file)
    with open(file, "rb") as opened:
        return opened.read(MOST_BYTES + 1)


def _json(file: Path) -> Any:
    return loads(_text(file))


def _object(text: str | bytes) -> dict[str, Any]:
    content = loads(text)
    if not isinstance(content, dict):
        raise ValueError("it must be an object")
    return content


def _index(directory: Path) -> bytes | None:
    """Return the index of shards, or None if the tensors are in one file or there are none."""
    file = directory / INDEX
    if (directory / WEIGHTS).exists() or not file.exists():
        return None
    try:
        return _text(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _shards(directory: Path, index: bytes | None) -> dict[Path, set[str] | None]:
    """Return the files that hold tensors, with the names each must have where an index says so."""
    if index is None:
        if (directory / WEIGHTS).exists():
            return {directory / WEIGHTS: None}
        _config(directory, None)
        pickles = [
            f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in directory.glob(pattern)
        ]
        hint = f"; {pickles[0]} may hold code and is not read" if pickles else ""
        raise ValueError(f"{directory} holds no {WEIGHTS}{hint}")
    try:
        content = _object(index)
        places = content["weight_map"]
        if not isinstance(places, dict) or not places:
            raise ValueError("it must be an object with 'weight_map'")
        if not isinstance(content.get("metadata", {}), dict):
            raise ValueError("its metadata must be an object")
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
        return {directory / file: held for file, held in names.items()}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{directory / INDEX} cannot be read: {error}") from error


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
    if name == sealed.RESERVED:
        raise ValueError(
            f"{name} is the name of a tensor, which the file keeps for itself; rename it"
        )
    return value.detach().contiguous()
