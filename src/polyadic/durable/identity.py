"""What a job is made of, in words and digests that are equal for equal things."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Digest:
    """A digest of values that are added one after the other."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, value: Any) -> None:
        """Add a value: tensors, arrays and plain values in lists, tuples and mappings."""
        if isinstance(value, Tensor):
            self._text(f"{value.dtype}{tuple(value.shape)}")
            if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
                self._bytes(value)
        elif isinstance(value, Mapping):
            for key in value:
                self._text(repr(key))
                self.add(value[key])
        elif isinstance(value, (list, tuple)):
            self._text(f"{type(value).__name__}{len(value)}")
            for part in value:
                self.add(part)
        elif isinstance(value, (str, bytes, int, float, complex, type(None))):
            self._text(repr(value))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            self.add(vars(value))
        elif hasattr(value, "__array_interface__") and not value.dtype.hasobject:
            self._text(f"{value.dtype}{value.shape}")
            self._hash.update(value.tobytes())
        else:
            self._text(type(value).__name__)

    def text(self) -> str:
        """Return the digest of what was added so far."""
        return self._hash.hexdigest()

    def _text(self, text: str) -> None:
        self._hash.update(text.encode(errors="surrogatepass"))

    @torch.no_grad()
    def _bytes(self, value: Tensor) -> None:
        if value.is_meta or value.is_quantized or not value.numel():
            return
        flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        self._hash.update(flat.view(torch.uint8).numpy().data)


def of_module(model: nn.Module, leave_out: Collection[str] = ()) -> str:
    """Return a digest of a model's parameters and buffers with their names."""
    digest = Digest()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name not in leave_out:
            digest.add(name)
            digest.add(value)
    return digest.text()


def of_batches(batches: Iterable[Any]) -> str:
    """Return a digest of batches in their order."""
    digest = Digest()
    for batch in batches:
        digest.add(batch)
    return digest.text()


def named(value: Any) -> str:
    """Name a function or class, and what a partial function is bound to."""
    if isinstance(value, str):
        return value
    if isinstance(value, functools.partial):
        bound = [*map(in_words, value.args)]
        bound += [f"{key}={in_words(each)}" for key, each in value.keywords.items()]
        return f"{named(value.func)}({', '.join(bound)})"
    return getattr(value, "__qualname__", type(value).__name__)


def in_words(value: Any) -> str:
    """Say what a value is, without addresses, which are others in every process."""
    if isinstance(value, (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, Tensor):
        digest = Digest()
        digest.add(value)
        return f"tensor {digest.text()}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{in_words(k)}: {in_words(v)}' for k, v in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(in_words, value))})"
    return named(value)
