"""Hostile input to every loader, config, command line, constructor, function, shape and index.

An input is made by a function of a source of randomness, ``random.Random`` or that of hypothesis,
which finds a smallest input that fails. A call may succeed, or be refused by one of ``REFUSALS``
with a message; anything else is a fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import polyadic
from benchmarks.reliability import hostile_models, hostile_tools
from benchmarks.reliability.odd import (
    changed,
    damaged,
    index,
    odd,
    options,
    size,
    sizes,
    tensor,
)
from polyadic import functional
from polyadic import nn as cp
from polyadic.compression.report import Report
from polyadic.durable import checkpoint
from polyadic.pretrained import from_pretrained, save_pretrained
from polyadic.pretrained.config import ModelConfig

Call = Callable[[], object]
REFUSALS = (TypeError, ValueError, IndexError, FileNotFoundError)
# Of the processor, and on the clock for what waits: a loaded machine makes no call hang.
SECONDS, SECONDS_WAITED = 30, 900
SPREAD = "several processes"


def constructor(draw: random.Random) -> Call:
    """A layer, on the meta device, where sizes cost nothing."""
    name = draw.choice(sorted(n for n in cp.__all__ if n.startswith("CP") and n != "CPTiedLinear"))
    kind = getattr(cp, name)
    positional = [size(draw), size(draw)]
    if "Conv" in name:
        positional.append(size(draw) if draw.random() < 0.5 else sizes(draw))
    given = options(
        draw,
        order=size,
        in_shape=sizes,
        out_shape=sizes,
        bias=odd,
        memory=odd,
        stride=sizes,
        padding=sizes,
        dilation=sizes,
        groups=size,
        padding_mode=odd,
        padding_idx=size,
        dtype=odd,
        output_padding=sizes,
    )
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
    "head": cp.CPEmbedding(8, 12, rank=3).as_linear(True),
    "joint": cp.CPLinear.joint(2, 12, 8, rank=3)[1],
    "shared": cp.CPSharedInput([cp.CPLinear(12, 8, rank=3), cp.CPLinear(12, 4, rank=2)]),
    "spectral1": cp.CPSpectralConv1d(4, 6, 3, rank=3),
    "spectral2": cp.CPSpectralConv2d(4, 6, (4, 3), rank=3),
}
SPATIAL = {"conv1": 1, "spectral1": 1}


def fitting(draw: random.Random, kind: str) -> Any:
    """An input that a layer takes, of a size that is drawn, which may be 0."""
    batch = [draw.choice([0, 1, 2, 3]) for _ in range(draw.randrange(1, 3))]
    if kind == "embedding":
        return torch.zeros(batch, dtype=torch.int64) + draw.randrange(12)
    if kind in ("linear", "head", "joint", "shared"):
        return torch.zeros(*batch, 12)
    spatial = [draw.choice([0, 1, 2, 5, 8]) for _ in range(SPATIAL.get(kind, 2))]
    return torch.zeros(*batch[:1], 4, *spatial)


def forward(draw: random.Random) -> Call:
    """A layer called with an input that fits, or with any other."""
    kind = draw.choice(sorted(LAYERS))
    fits = draw.random() < 0.5
    x = fitting(draw, kind) if fits else draw.choice([index, tensor, odd])(draw)
    return lambda: LAYERS[kind](x)


FUNCTIONS = {
    "linear": ["cp_linear", "cp_linear_forward"],
    "conv1": ["cp_conv"],
    "conv2": ["cp_conv", "cp_conv_forward"],
    "transposed": ["cp_conv_transpose"],
    "embedding": ["cp_embedding"],
    "shared": ["cp_linear_shared"],
    "spectral1": ["cp_spectral_conv", "cp_spectral_product"],
    "spectral2": ["cp_spectral_conv", "cp_spectral_product"],
}


def function(draw: random.Random) -> Call:
    """A function of ``polyadic.functional`` with factors that fit, some of them exchanged."""
    kind = draw.choice(sorted(FUNCTIONS))
    name = draw.choice(FUNCTIONS[kind])
    layer: Any = LAYERS[kind]
    if kind == "shared":
        parts = [each.cp.parts()[0] for each in layer.layers]
        groups: list[Any] = [[list(part[side]) for part in parts] for side in range(2)]
    else:
        groups = [list(part) for part in layer.cp.parts()[0]]
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
    if "spectral" in name:
        known |= {"fft_norm": odd, "output_size": sizes, "precision": odd}
    elif "conv" in name:
        known |= {"stride": sizes, "padding": sizes, "dilation": sizes, "groups": size}
    given = options(draw, **known)
    return lambda: getattr(functional, name)(x, *groups, **given)


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


WORDS: dict[str, list[str]] = {
    "--in": ["64", "12", "1", "0", "-1", "x", str(2**70)],
    "--out": ["64", "10", "1", "0", "2.5", ""],
    "--rank": ["16", "1", "0.5", "break-even", "faster", "-1", "nan", "x", "0"],
    "--batch": ["32", "1", "0", "1e3", str(2**40)],
    "--order": ["1", "2", "3", "0", "99"],
    "--kernel": ["3x3", "1x5", "3", "0x0", "ax b", str(2**65)],
    "--size": ["8x8", "32", "0x4", "x", "-1x3"],
    "--stride": ["1", "2", "0"],
    "--padding": ["1", "same", "valid", "-1", "\u0661", "full"],
    "--dtype": ["float32", "float64", "float33", "int8", "__doc__", ""],
    "--memory": ["fast", "least", "x"],
    "--threads": ["1", "0", "x"],
    "--seed": ["1", "-1", str(2**70)],
    "--ratio": ["2", "0.5", "nan", "inf", "-1"],
    "--max-error": ["0.1", "1", "inf", "x"],
    "--flops-ratio": ["2", "0"],
    "--orders": ["1,2", "1,,2", "0", "\udcff"],
    "--target": [".*", "(", "dense", ""],
    "--exclude": ["nothing", "*"],
    "--html": ["/nowhere/page", "/"],
    "--iterations": ["2", "0"],
    "--inference": [],
    "--json": [],
    "--dry-run": [],
    "--weights": [],
    "--help": [],
}
NEEDED = {
    "plan": {"--in": "64", "--out": "32", "--rank": "8"},
    "verify": {"--in": "8", "--out": "6", "--rank": "2", "--order": "2", "--batch": "3"},
    "compress": {"/nowhere": "", "--ratio": "2"},
}


def command(draw: random.Random) -> Call:
    """The command line, in this process; a usage error is a refusal if it says something."""
    name = draw.choice([*NEEDED, "plan", "plan", "x", ""])
    given = {name: "", **{word: v for word, v in NEEDED.get(name, {}).items() if odds(draw)}}
    for _ in range(draw.randrange(4)):
        word = draw.choice(sorted(WORDS))
        given[word] = draw.choice(WORDS[word] or [""])
    words = [each for pair in given.items() for each in pair if each]
    if draw.random() < 0.1:
        words.insert(draw.randrange(len(words) + 1), draw.choice(["--", "-", "", "\udcff", "--no"]))

    def run() -> None:
        from polyadic_cli.main import main

        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                main(words)
        except SystemExit as error:
            if error.code not in (0, 1, 2):
                raise RuntimeError(f"{words} ends with {error.code}") from error
            if error.code:
                raise ValueError(said.getvalue()) from error

    return run


def odds(draw: random.Random) -> bool:
    """Mostly true."""
    return draw.random() < 0.9


KINDS: dict[str, Callable[[random.Random], Call]] = {
    "constructors": constructor,
    "CP tensors": tensor_call,
    "forwards": forward,
    "functions": function,
    "formats, plans, ranks": hostile_tools.planning,
    "conversions": hostile_tools.converting,
    "initial values, problems": hostile_tools.filling,
    "tuning, accelerations, saving": hostile_tools.surrounding,
    "adapters as LoRA": hostile_tools.adapting_back,
    "whole models": hostile_models.changing,
    "rates, ranks, fits, recovery": hostile_models.asking,
    "adapters": hostile_models.adapting,
    SPREAD: hostile_models.spreading,
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


def held() -> float:
    """MiB of memory that the process holds, free parts given back to the system first."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # of the GNU library
        library.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def run(kind: str, calls: int, seed: int) -> dict[str, Any]:
    """Make many calls of a kind in one process.

    Returns:
        A record: ``calls``, how many were ``done`` and ``refused``, the ``faults`` with their
        numbers, and ``grown``: by how many MiB what the process holds grew after its first tenth.
    """
    draw, ends = random.Random(seed), Counter[str]()
    folder = Path(tempfile.mkdtemp())
    make = Files(folder).load if kind == "files" else KINDS[kind]
    before = 0.0

    def late(number: int, frame: FrameType | None) -> None:
        raise SlowError

    # What asks for much memory is refused, in place of taking it from others.
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, limits[1]))
    late_signals = (signal.SIGALRM, signal.SIGPROF)
    kept, here = [signal.signal(number, late) for number in late_signals], Path.cwd()
    os.chdir(folder)  # names of files are among the arguments
    # torch keeps what it knows of each group of processes, so that all calls have one.
    spread = hostile_models.one_process() if kind == SPREAD else contextlib.nullcontext()
    try:
        with spread:
            for number in range(calls):
                if number == calls // 10:
                    before = held()
                call = make(draw)
                signal.alarm(SECONDS_WAITED)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                ends[attempt(call)] += 1
                signal.alarm(0)
                signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        for number, handler in zip(late_signals, kept, strict=True):
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        os.chdir(here)
        shutil.rmtree(folder)
    done, refused = ends.pop("done", 0), ends.pop("refused", 0)
    grown = held() - before
    record = {"kind": "hostile", "input": kind, "calls": calls, "done": done, "refused": refused}
    return {**record, "faults": dict(ends), "grown": grown}
