"""Hostile input to every loader, config, command line, constructor, function, shape and index.

An input is made by a function of a source of randomness, ``random.Random`` or that of hypothesis,
which finds a smallest input that fails. A call may succeed, or be refused by one of ``REFUSALS``
with a message; anything else is a fault.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

import polyadic
from polyadic import formats, functional, plans
from polyadic import nn as cp
from polyadic.compression.report import Report
from polyadic.durable import checkpoint
from polyadic.formats import ConvFormat, LinearFormat
from polyadic.pretrained import from_pretrained, save_pretrained
from polyadic.pretrained.config import ModelConfig

Call = Callable[[], object]
REFUSALS = (TypeError, ValueError, IndexError, FileNotFoundError)
SECONDS = 30

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
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
              torch.bool, torch.complex64, torch.uint8]  # fmt: skip
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


def constructor(draw: random.Random) -> Call:
    """A layer, on the meta device, where sizes cost nothing."""
    name = draw.choice(sorted(n for n in cp.__all__ if n.startswith("CP") and n != "CPTiedLinear"))
    kind = getattr(cp, name)
    positional = [size(draw), size(draw)]
    if "Conv" in name:
        positional.append(size(draw) if draw.random() < 0.5 else sizes(draw))
    given = options(
        draw, order=size, in_shape=sizes, out_shape=sizes, bias=odd, memory=odd, stride=sizes,
        padding=sizes, dilation=sizes, groups=size, padding_mode=odd, padding_idx=size, dtype=odd,
        output_padding=sizes,
    )  # fmt: skip
    rank = size(draw)
    return lambda: kind(*positional, rank=rank, **given, device="meta")


def tensor_call(draw: random.Random) -> Call:
    """A CP tensor and its methods."""
    shape: Any = [sizes(draw) for _ in range(draw.randrange(4))]
    if draw.random() < 0.2:
        shape = odd(draw)
    rank, factors = size(draw), [tensor(draw) for _ in range(draw.randrange(4))]
    if draw.random() < 0.5:
        return lambda: polyadic.CPTensor(shape, rank, device="meta")
    return lambda: polyadic.CPTensor.from_factors(shape, factors)


LAYERS: dict[str, nn.Module] = {
    "linear": cp.CPLinear(12, 8, rank=3),
    "conv1": cp.CPConv1d(4, 6, 3, rank=3),
    "conv2": cp.CPConv2d(4, 6, 3, rank=3, padding=1, groups=2),
    "transposed": cp.CPConvTranspose2d(4, 6, 3, rank=3, stride=2),
    "embedding": cp.CPEmbedding(12, 8, rank=3),
}


def fitting(draw: random.Random, kind: str) -> Any:
    """An input that a layer takes, of a size that is drawn, which may be 0."""
    batch = [draw.choice([0, 1, 2, 3]) for _ in range(draw.randrange(1, 3))]
    if kind == "embedding":
        return torch.zeros(batch, dtype=torch.int64) + draw.randrange(12)
    if kind == "linear":
        return torch.zeros(*batch, 12)
    spatial = [draw.choice([0, 1, 2, 5, 8]) for _ in range(1 if kind == "conv1" else 2)]
    return torch.zeros(*batch[:1], 4, *spatial)


def forward(draw: random.Random) -> Call:
    """A layer called with an input that fits, or with any other."""
    kind = draw.choice(sorted(LAYERS))
    fits = draw.random() < 0.5
    x = fitting(draw, kind) if fits else draw.choice([index, tensor, odd])(draw)
    return lambda: LAYERS[kind](x)


def function(draw: random.Random) -> Call:
    """A function of ``polyadic.functional`` with factors that fit, some of them exchanged."""
    kind = draw.choice(sorted(LAYERS))
    names = {"linear": "cp_linear", "embedding": "cp_embedding", "transposed": "cp_conv_transpose"}
    name = names.get(kind, "cp_conv")
    layer: Any = LAYERS[kind]
    groups: list[Any] = [list(part) for part in layer.cp.parts()[0]]
    x = fitting(draw, kind)
    while draw.random() < 0.4:
        if draw.random() < 0.3:
            x = draw.choice([index, tensor, odd])(draw)
        elif draw.random() < 0.3:
            groups[draw.randrange(len(groups))] = odd(draw)
        else:
            group = draw.choice(groups)
            if isinstance(group, list) and group:
                group[draw.randrange(len(group))] = draw.choice([tensor, odd])(draw)
    known = {"memory": odd, "plan": odd, "weights": tensor, "bias": tensor}
    if "conv" in name:
        known |= {"stride": sizes, "padding": sizes, "dilation": sizes, "groups": size}
    given = options(draw, **known)
    return lambda: getattr(functional, name)(x, *groups, **given)


def format_call(draw: random.Random) -> Call:
    """Formats, plans, ranks and their predictions."""
    which = draw.randrange(5)
    first, second, rank, other = sizes(draw), sizes(draw), size(draw), odd(draw)
    if which == 0:
        return lambda: formats.tensorize(rank, size(draw), size(draw))
    if which == 1:
        return lambda: polyadic.explain(LinearFormat(first, second, rank), batch=other)
    if which == 2:
        return lambda: ConvFormat(first, second, sizes(draw), rank)
    if which == 3:
        return lambda: plans.LinearPlan(plans.LinearRoute(first, second, other), other)
    return lambda: polyadic.rank_for(LAYERS["linear"], other)  # type: ignore[call-arg, arg-type]


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


def network() -> nn.Module:
    """The skeleton of what is loaded."""
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Conv1d(4, 2, 3))


class Files:
    """Saved files that are damaged for a call.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        model = nn.Sequential(
            cp.CPLinear(6, 4, rank=2), nn.ReLU(), cp.CPConv1d(4, 2, 3, rank=2, dtype=torch.float64)
        )
        save_pretrained(model, folder / "model")
        checkpoint.save(folder / "state", "test", {"x": torch.ones(3), "n": [1, (2, None)]})
        checkpoint.previous(folder / "state").unlink(missing_ok=True)
        names = ["model/model.safetensors", "model/polyadic_config.json", "state"]
        self._whole = {name: (folder / name).read_bytes() for name in names}
        layers = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
        self._report = polyadic.compress(layers, ratio=1.5, dry_run=True)[1].to_dict()
        self._config = json.loads(self._whole[names[1]])

    def load(self, draw: random.Random) -> Call:
        """A load of a damaged file, or of a description that says something else."""
        which = draw.randrange(5)
        if which == 0:
            content = changed(draw, self._config)
            return lambda: ModelConfig.from_dict(content)
        if which == 1:
            report = changed(draw, self._report)
            return lambda: Report.from_dict(report)
        name = draw.choice(sorted(self._whole))
        content = damaged(draw, self._whole[name])
        if name.endswith("json") and draw.random() < 0.7:
            content = json.dumps(changed(draw, self._config)).encode()

        def load() -> None:
            (self._folder / name).write_bytes(content)
            try:
                if name == "state":
                    checkpoint.load(self._folder / name, "test")
                else:
                    from_pretrained(self._folder / "model", network())
            finally:
                (self._folder / name).write_bytes(self._whole[name])

        return load


def command(draw: random.Random) -> Call:
    """The command line."""
    words = [
        "plan", "compress", "verify", "--in", "--out", "8,8", "64", "4x4", "--rank", "16", "-1",
        "--batch", "1e3", "--ratio", "nan", "2", "--dry-run", "/nowhere", "", "\udcff", "--help",
        "--orders", "1,,2", "--json", "--max-error", "inf", "--speed", "--dtype", "float33",
    ]  # fmt: skip
    given = [draw.choice(words) for _ in range(draw.randrange(6))]

    def run() -> None:
        from polyadic_cli.main import main

        kept, sys.argv = sys.argv, ["polyadic", *given]
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                main()
        except SystemExit as error:
            if error.code not in (0, 1, 2):
                raise RuntimeError(f"{given} ends with {error.code}") from error
        finally:
            sys.argv = kept

    return run


KINDS: dict[str, Callable[[random.Random], Call]] = {
    "constructors": constructor,
    "CP tensors": tensor_call,
    "forwards": forward,
    "functions": function,
    "formats, plans, ranks": format_call,
    "command lines": command,
}


class SlowError(Exception):
    """A call took longer than ``SECONDS``."""


def attempt(call: Call) -> str:
    """Make a call; how it ended: ``"done"``, ``"refused"``, or the fault in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except REFUSALS as error:
        return "refused" if str(error) else f"{type(error).__name__} without a message"
    except Exception as error:
        if "allocate memory" in str(error):
            return "refused"  # by torch: what was asked for is larger than the memory
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.100}"
    return "done"


def run(kind: str, calls: int, seed: int) -> dict[str, Any]:
    """Make many calls of a kind in one process.

    Returns:
        A record: ``calls``, how many were ``done`` and ``refused``, the ``faults`` with their
        numbers, and ``grown``: by how many MiB the process grew after its first tenth.
    """
    draw, ends = random.Random(seed), Counter[str]()
    folder = Path(tempfile.mkdtemp())
    make = Files(folder).load if kind == "files" else KINDS[kind]
    before = 0

    def late(number: int, frame: FrameType | None) -> None:
        raise SlowError

    # What asks for much memory is refused, in place of taking it from others.
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, limits[1]))
    kept = signal.signal(signal.SIGALRM, late)
    try:
        for number in range(calls):
            if number == calls // 10:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.alarm(SECONDS)
            ends[attempt(make(draw))] += 1
            signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, kept)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        shutil.rmtree(folder)
    done, refused = ends.pop("done", 0), ends.pop("refused", 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    record = {"kind": "hostile", "input": kind, "calls": calls, "done": done, "refused": refused}
    return {**record, "faults": dict(ends), "grown": grown}
