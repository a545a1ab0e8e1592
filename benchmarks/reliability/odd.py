"""Values that fit nothing, or fit by chance, from a source of randomness."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 30]
ODD: list[Any] = [
    -1, 0, 1, 2, 3, 6, 2**31, 2**62, 2**63, 10**30, -(2**63), 0.0, 1.0, 2.5, -1.5, math.nan,
    math.inf, True, False, None, "", "x", "2", "same", "valid", "break-even", "fast", "least",
    "reflect", b"x", (), (0,), (1,), (2,), (2, 3), (2, 2, 3), [2], [3, 2], [[2], [3]],
    (2.0, 3), (True, 2), ("2", 3), {}, {"a": 1}, {2}, range(2), object, 1j,
    torch.float32, torch.int64, torch.float8_e4m3fn, torch.complex64, "cuda", "meta", "float32",
]  # fmt: skip


def odd(draw: random.Random) -> Any:
    """A value that fits nothing, or fits by chance."""
    special = draw.randrange(12)
    if special == 0:
        return np.int64(draw.choice(SIZES))
    if special == 1:
        return torch.tensor(draw.choice(SIZES))
    if special == 2:
        return tensor(draw)
    return draw.choice(ODD)


def size(draw: random.Random) -> Any:
    """Mostly a size."""
    return draw.choice(SIZES) if draw.random() < 0.95 else odd(draw)


def sizes(draw: random.Random) -> Any:
    """Mostly a few sizes."""
    if draw.random() < 0.1:
        return odd(draw)
    return tuple(size(draw) for _ in range(draw.randrange(4)))


def tensor(draw: random.Random) -> Any:
    """A tensor of any shape, dtype, layout and state."""
    shape = [draw.choice([0, 1, 2, 3, 4, 8]) for _ in range(draw.randrange(5))]
    dtypes = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.bool,
        torch.complex64,
        torch.uint8,
    ]
    dtype = draw.choice(dtypes[:2] if draw.random() < 0.6 else dtypes)
    made = torch.zeros(shape, dtype=dtype)
    kind = draw.randrange(12)
    if kind == 0 and made.dim() > 1:
        return made.transpose(0, 1)
    if kind == 1:
        return made.to("meta")
    if kind == 2 and made.dim() == 2 and dtype is torch.float32:
        return made.to_sparse()
    if kind == 3 and made.is_floating_point():
        return (made + math.nan).requires_grad_()
    if kind == 4:
        return made.expand(2, *made.shape)
    return made


def index(draw: random.Random) -> Any:
    """Indices, some of them out of range."""
    values = [draw.choice([-1, 0, 1, 5, 11, 12, 2**31, -(2**40)]) for _ in range(draw.randrange(4))]
    if draw.random() < 0.2:
        return tensor(draw)
    return torch.tensor(values).to(draw.choice([torch.int64, torch.int32, torch.int16]))


def options(draw: random.Random, **known: Callable[[random.Random], Any]) -> dict[str, Any]:
    """Some of the options, and now and then one that there is not."""
    given = {name: make(draw) for name, make in known.items() if draw.random() < 0.12}
    if draw.random() < 0.02:
        given["unknown"] = odd(draw)
    return given


def plain(draw: random.Random, depth: int = 0) -> Any:
    """A JSON document."""
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind < 6:
        values = [None, True, 0, -1, 10**30, 0.5, "", "CPLinear", "float32", "x", 2**31, "polyadic"]
        return draw.choice(values)
    if kind < 7:
        return [plain(draw, depth + 1) for _ in range(draw.randrange(4))]
    words = [
        "layers",
        "format_version",
        "class",
        "arguments",
        "rank",
        "ties",
        "saved",
        "x",
        "dtype",
    ]
    return {draw.choice(words): plain(draw, depth + 1) for _ in range(draw.randrange(4))}


def changed(draw: random.Random, content: Any) -> Any:
    """A document with one value replaced, somewhere."""
    if draw.random() < 0.1 or not isinstance(content, (dict, list)) or not content:
        return plain(draw)
    found = content.copy()
    keys: Sequence[Any] = list(found) if isinstance(found, dict) else range(len(found))
    key = draw.choice(keys)
    if isinstance(found, dict) and draw.random() < 0.1:
        del found[key]
    else:
        found[key] = changed(draw, found[key])
    return found


def damaged(draw: random.Random, content: bytes) -> bytes:
    """A file with some bytes changed, cut, doubled or added."""
    found = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(found) + 1)
        kind = draw.randrange(4)
        if kind == 0 and at < len(found):
            found[at] = draw.randrange(256)
        elif kind == 1:
            del found[at : at + draw.randrange(1, 40)]
        elif kind == 2:
            found[at:at] = found[at : at + draw.randrange(1, 40)]
        else:
            found[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 12)))
    return bytes(found)
