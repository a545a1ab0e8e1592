"""``run_demo``: check the way is free, train and measure, write the files, print the table."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from examples.digits import data, models, pictures, plots, report, training
from examples.digits.environment import environment
from polyadic.nn import CPLinear

if TYPE_CHECKING:
    from rich.console import Console

_PLOTS = tuple(report.CAPTIONS)
_FILES = ("report.html", "results.json", *(f"{name}.png" for name in _PLOTS))
_PICTURED = "mlp-cp-16"
_MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class DemoResult:
    """What a demo run found, and where it wrote it.

    Attributes:
        out: Folder of all files.
        report: The HTML report.
        data: All numbers as JSON.
        plots: The plots as PNG files.
        models: One result per model.
        environment: Machine and versions.
        seconds: Time the run took, imports not included.
    """

    out: Path
    report: Path
    data: Path
    plots: tuple[Path, ...]
    models: tuple[training.ModelResult, ...]
    environment: dict[str, str]
    seconds: float


def run_demo(
    out: str | Path = Path("polyadic-demo"),
    seed: int = 0,
    quick: bool = False,
    threads: int | None = None,
    *,
    console: Console | None = None,
) -> DemoResult:
    """Train dense and CP models on scikit-learn's digits, print a table and write a report.

    The same seed gives bitwise the same losses and accuracies in every run with the same number
    of threads on the same machine. Torch's global generator and thread count are left as found.

    Args:
        out: Folder for report.html, results.json and the plots; made if missing. Files of these
            names in it are overwritten, all others left alone.
        seed: Seed of the first training; further trainings of a model take the seeds after it.
        quick: Train for a few seconds only; the accuracies then mean little.
        threads: Threads torch may use; one if None.
        console: Where to print; standard output if None.

    Returns:
        The numbers, and the paths of the files.

    Raises:
        ImportError: The extra "demo" is not installed.
        TypeError: ``seed`` or ``threads`` is not an integer.
        ValueError: ``seed`` is negative or too large, or ``threads`` below 1.
        NotADirectoryError: ``out`` or a part of its path is not a folder.
        PermissionError: ``out`` cannot be written to.
    """
    _require_extra()
    _check_int("seed", seed, 0, _MOST_SEED - training.Settings(0).runs)
    if threads is not None:
        _check_int("threads", threads, 1, 4096)
    out = _prepare(Path(out))

    from rich.console import Console

    console = console or Console()
    start = time.perf_counter()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or 1)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
            settings = training.Settings.quick(seed) if quick else training.Settings(seed)
            digits = data.load()
            results, trained = _compare(digits, settings, quick, console)
            where = environment()
    finally:
        torch.set_num_threads(threads_before)

    drawn, captions = _draw(results, trained)
    sizes = (len(digits.train_y), len(digits.test_y))
    page = report.html(results, settings, sizes, where, drawn, captions, quick)
    (out / "report.html").write_text(page, encoding="utf-8")
    for name, png in drawn.items():
        (out / f"{name}.png").write_bytes(png)
    seconds = time.perf_counter() - start
    record = _record(results, settings, sizes, where, quick, seconds)
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    console.print(report.table(results))
    if quick:
        console.print("A quick run: too short for the accuracies to mean much.")
    console.print(
        f"{seconds:.0f} s, {where['torch threads']} thread(s). Report: {out / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )
    return DemoResult(
        out=out,
        report=out / "report.html",
        data=out / "results.json",
        plots=tuple(out / f"{name}.png" for name in drawn),
        models=tuple(results),
        environment=where,
        seconds=seconds,
    )


def _require_extra() -> None:
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
    missing = [name for module, name in packages.items() if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"the demo needs {', '.join(missing)}, not installed here; "
            'install the extra: pip install -e ".[examples]"'
        )


def _check_int(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {value}")


def _prepare(out: Path) -> Path:
    """Make the folder and see that every file can be written, before any time is spent."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"out must be a folder, but {error.filename!r} is a file; name another folder"
        ) from error
    except PermissionError as error:
        raise PermissionError(
            f"out cannot be made: no permission for {str(out)!r}; name another folder"
        ) from error
    locked = [name for name in _FILES if (out / name).exists() and not _replaceable(out / name)]
    try:
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise PermissionError(
            f"out must be a folder that can be written to, got {str(out)!r} ({error.strerror}); "
            "name another folder"
        ) from error
    if locked:
        raise PermissionError(
            f"{str(out / locked[0])!r} is in the way and cannot be overwritten; "
            "remove it or name another folder as out"
        )
    return out


def _replaceable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.W_OK)


def _compare(
    digits: data.Digits, settings: training.Settings, quick: bool, console: Console
) -> tuple[list[training.ModelResult], dict[str, nn.Module]]:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    contestants = models.contestants(quick=quick)
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=training.work(contestants, settings))

        def advance(what: str, amount: int) -> None:
            progress.update(task, description=what, advance=amount)

        found = training.compare(contestants, digits, settings, advance)
        progress.update(task, description="done")
    return found


def _draw(
    results: Sequence[training.ModelResult], trained: Mapping[str, nn.Module]
) -> tuple[dict[str, bytes], dict[str, str]]:
    layer = cast(CPLinear, trained[_PICTURED].get_submodule("hidden1"))
    parts = pictures.take_apart(layer)
    drawn = {
        "curves": plots.curves(results),
        "accuracy-parameters": plots.accuracy_against_parameters(results),
        "costs": plots.costs(results),
        "factors": pictures.factors(parts),
        "rank-one-sum": pictures.rank_one_sum(parts),
    }
    inputs, outputs = parts.weight.shape
    numbers = {
        "rank": parts.norms.numel(),
        "break_even": inputs * outputs // (inputs + outputs),
        "dense": parts.weight.numel(),
        "stored": sum(factor.numel() for factor in (*parts.in_factors, *parts.out_factors)),
    }
    return drawn, {name: text.format(**numbers) for name, text in report.CAPTIONS.items()}


def _record(
    results: Sequence[training.ModelResult],
    settings: training.Settings,
    sizes: tuple[int, int],
    where: Mapping[str, str],
    quick: bool,
    seconds: float,
) -> dict[str, Any]:
    """All numbers; what the seed does not fix stands under "step_seconds" and "seconds"."""
    rows = []
    for result in results:
        contestant = result.contestant
        rows.append(
            {
                "key": contestant.key,
                "family": contestant.family,
                "kind": contestant.kind,
                "label": contestant.label,
                "rank": contestant.rank,
                "parameters": result.parameters,
                "converted_layers": list(contestant.converted),
                "converted_parameters": result.converted_parameters,
                "compression": result.compression,
                "accuracy": result.accuracy,
                "kept_bytes": result.kept_bytes,
                "curves": [asdict(curve) for curve in result.curves],
                "step_seconds": asdict(result.time),
            }
        )
    return {
        "format_version": 1,
        "settings": {**asdict(settings), "quick": quick},
        "images": {"train": sizes[0], "test": sizes[1]},
        "environment": dict(where),
        "models": rows,
        "seconds": seconds,
    }
