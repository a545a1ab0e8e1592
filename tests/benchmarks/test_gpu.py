"""The benchmark for a GPU: every phase runs on a CPU with tiny sizes; floors, goals and pages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.gpu.__main__ as command
from benchmarks.gpu import stub, worker
from benchmarks.gpu.bench import HEAD_LETTERS, TAIL_LETTERS, Bench, said
from benchmarks.gpu.contest import Contestant, compete
from benchmarks.gpu.floors import Rates, linear
from benchmarks.gpu.goals import goals
from benchmarks.gpu.linears import Makers, cell
from benchmarks.gpu.phases import PHASES
from benchmarks.gpu.records import Run, Writer
from benchmarks.gpu.report import gains, pages, section, stored_runs
from benchmarks.gpu.table import short_table
from benchmarks.gpu.timer import Patience, Timer
from benchmarks.pages import between
from benchmarks.records import check, read

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Records and output of one dry run of every phase."""
    out = tmp_path_factory.mktemp("gpu")
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--dry", "--seconds", "600", "--out", str(out)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return next(out.glob("gpu-*-dry.jsonl")), done.stdout


def traced(x: Tensor, depth: int) -> Tensor:
    """What no compiler traces, found deep in the code that it is given."""
    return by_another(x, depth - 1) if depth else [x][str(x.shape)]


def by_another(x: Tensor, depth: int) -> Tensor:
    """Calls that take turns are all listed in a message."""
    return traced(x, depth)


def test_a_record_says_what_a_compiler_could_not_trace_and_where() -> None:
    compiled = torch.compile(traced, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported) as found:
        compiled(torch.ones(2), 8)
    text = said(found.value)
    assert str(found.value).count("in traced") == 9
    assert len(text) < HEAD_LETTERS + TAIL_LETTERS + 100
    assert "TypeError" in text
    line = traced.__code__.co_firstlineno + 2
    assert f"line {line}, in traced" in text


def test_every_phase_ends_well(dry: tuple[Path, str]) -> None:
    run = Run.load(dry[0])
    assert {name: r["status"] for name, r in run.phases().items()} == dict.fromkeys(PHASES, "done")
    wrong = [r for r in run.of("check") if r["status"] != "passed"]
    assert wrong == []
    statuses = {
        r["contestant"]: r["status"] for r in run.of("measurement") if r["status"] != "timed"
    }
    assert set(statuses) <= {"tltorch"}
    assert [r for r in run.of("note") if r["of"] not in ("kernels", "run")] == []
    layers = {cell["layer"] for cell in run.cells.values()}
    assert layers == {"linear", "embedding", "conv", "network"}


def test_records_are_the_benchmarks_own(dry: tuple[Path, str]) -> None:
    records = [json.loads(line) for line in dry[0].read_text(encoding="utf-8").splitlines()]
    shared = [r for r in records if r["kind"] in ("environment", "machine", "cell", "measurement")]
    assert {r["kind"] for r in shared} == {"environment", "machine", "cell", "measurement"}
    for record in shared:
        check(record)


def test_the_table_is_last_and_short(dry: tuple[Path, str]) -> None:
    table = short_table(Run.load(dry[0]))
    assert dry[1].endswith(table + "\n")
    assert len(table) <= 12_000
    for word in ("== goals", "== linear", "== conv", "== embedding", "== few rows", "GPT"):
        assert word in table


def test_the_pages_are_made_from_the_records() -> None:
    runs = stored_runs(ROOT / "benchmarks" / "results")
    for name, mark, made in (
        ("benchmarks.md", "gpu", pages(runs)),
        ("how/gpu.md", "gpu-how", gains(runs)),
    ):
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert between(page, mark, made) == page


def test_a_phase_is_that_of_the_newest_run_that_made_it(tmp_path: Path) -> None:
    for day, phases in (
        ("01", {"ceilings": "done", "conv": "done", "tune": "done"}),
        ("02", {"ceilings": "skipped", "conv": "out of time", "tune": "crashed"}),
    ):
        writer = Writer(tmp_path / f"gpu-{day}.jsonl")
        writer.write("environment", gpu="G", date=f"2026-12-{day}", commit=f"c{day}")
        for phase, status in phases.items():
            if status != "skipped":
                writer.write("phase", phase=phase, status="begun")
                writer.write("rate", name=phase, value=int(day))
            writer.write("phase", phase=phase, status=status)
    (run,) = stored_runs(tmp_path)
    assert [run.rate(name) for name in ("ceilings", "conv", "tune")] == [1, 2, 1]
    assert len(run.of("rate")) == 3
    commits = {phase: source["commit"] for phase, source in run.sources.items() if phase}
    assert commits == {"ceilings": "c01", "conv": "c02", "tune": "c01"}
    assert run.environment["commit"] == "c02"


def test_a_page_of_a_run(dry: tuple[Path, str]) -> None:
    text = section(Run.load(dry[0]))
    for title in ("Goals", "Thin products", "Few rows, forward", "Embedding", "A whole training"):
        assert f"### {title}" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| 16→16 3×3")}
    assert len(widths) == 1


def test_floors_of_a_linear_layer() -> None:
    """Against counts by hand: 4096², R = 64, 8192 rows, 2 bytes an element."""
    T, d, R = 8192, 4096, 64
    found = linear(T, d, d, R, parameters=0, size=2)
    unit = 2 * T * d
    assert found["forward", "factorized"].bytes == 2 * unit
    # Forward X and Y; backward dY twice, X, dX.
    assert found["training", "factorized"].bytes == 6 * unit
    assert found["training", "dense"].bytes == 3 * (2 * unit + 2 * d * d)
    assert found["training", "factorized"].flops == 3 * 2 * T * R * 2 * d
    seconds = found["training", "factorized"].seconds(Rates(3e12, 8e14))
    assert seconds == pytest.approx(134.2e-6, rel=1e-3)


def stored(ours: float, dense: float, **changes: Any) -> list[dict[str, Any]]:
    """One linear cell timed in a graph, as a run writes it."""
    floor = {
        "mode": "training",
        "threads": 1,
        "route": "factorized",
        "flops": 1,
        "bytes": 1,
        "seconds": 1e-4,
        "byte_seconds": 1e-4,
    }
    cell = {
        "kind": "cell",
        "cell": "one",
        "title": "4096→4096 R=64 T=8192",
        "layer": "linear",
        "group": "linear",
        "T": 8192,
        "in": 4096,
        "out": 4096,
        "rank": 64,
        "floors": [floor],
    }
    timed = [
        {
            "kind": "measurement",
            "cell": "one",
            "contestant": name,
            "family": family,
            "status": "timed",
            "mode": "training",
            "launch": "graph",
            "median": median,
            "predicted": None,
        }
        for name, family, median in (("polyadic", "ours", ours), ("dense", "dense", dense))
    ]
    return [cell, *timed, *changes.get("more", [])]


@pytest.mark.parametrize(
    ("ours", "dense", "floor", "gain"),
    [
        (1.5e-4, 7e-4, "met", "met"),
        (1.7e-4, 7e-4, "missed", "met"),
        (1.5e-4, 5e-4, "met", "missed"),
    ],
)
def test_goals_are_judged(ours: float, dense: float, floor: str, gain: str) -> None:
    by_text = {goal.text: goal for goal in goals(Run(stored(ours, dense)))}
    verdicts = {text: goal.verdict for text, goal in by_text.items()}
    assert next(v for t, v in verdicts.items() if "1.6 × the byte floor" in t) == floor
    assert next(v for t, v in verdicts.items() if "≥ 4 × as fast as dense" in t) == gain
    assert next(v for t, v in verdicts.items() if "≥ 8 × as fast as dense" in t) == "not measured"


def test_a_missed_goal_says_what_to_run_first() -> None:
    run = Run(
        [
            *stored(1.7e-4, 7e-4),
            {
                "kind": "environment",
                "dtype": "bfloat16",
                "torch": "",
                "python": "",
                "versions": {},
                "commit": "",
                "date": "",
            },
        ]
    )
    (missed,) = [goal for goal in goals(run) if goal.misses]
    assert f"*Next, for: {missed.text}.* {missed.first}" in section(run)
    for goal in goals(run):
        for names in re.findall(r"--phases\s([\w,-]+)", goal.first):
            assert set(names.split(",")) <= {*PHASES}


def test_without_a_gpu_the_script_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker.main([str(tmp_path / "records.jsonl"), "environment", "60"]) == worker.NO_DEVICE
    assert "finds no CUDA device; --dry tries the script" in capsys.readouterr().out


def test_a_python_without_torch_is_named(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(bare)}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "has no torch and no safetensors; name a Python that has" in done.stderr


def test_a_failed_check_is_a_miss() -> None:
    failed = {
        "kind": "check",
        "check": "repeats",
        "subject": "a layer",
        "dtype": "bfloat16",
        "status": "failed",
        "reason": "not the same bits: y",
    }
    goal = next(g for g in goals(Run([failed])) if "20 runs" in g.text)
    assert (goal.verdict, goal.misses) == ("missed", ("a layer bfloat16: not the same bits: y",))


def test_a_cut_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"kind": "note", "of": "a"}\n{"kind": "no', encoding="utf-8")
    assert [r["of"] for r in read(path, growing=True)] == ["a"]
    Writer(path).write("note", of="b", value=float("nan"))
    assert [(r["of"], r.get("value")) for r in read(path)] == [("a", None), ("b", None)]


def test_a_lost_worker_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A phase is tried twice, then left; what comes behind it still runs."""
    ran: list[list[str]] = []

    def work(path: Path, phases: list[str], seconds: float, options: Any) -> None:
        ran.append(list(phases))
        writer = Writer(path)
        for name in phases:
            writer.write("phase", phase=name, status="begun", limit=1.0)
            if name == "products":
                return  # as if the process had died here
            writer.write("phase", phase=name, status="done", seconds=0.0, reason="")

    monkeypatch.setattr(command, "_work", work)
    command.main(["--out", str(tmp_path), "--phases", "ceilings,products,conv", "--dry"])
    assert ran == [["ceilings", "products", "conv"], ["products", "conv"], ["conv"]]
    statuses = {n: r["status"] for n, r in Run.load(next(tmp_path.iterdir())).phases().items()}
    assert statuses == {"ceilings": "done", "products": "crashed", "conv": "done"}


def test_a_failing_cell_spoils_no_other(tmp_path: Path) -> None:
    """Records say who failed and why; a wrong contestant is refused, not timed."""

    class Wrong(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1.0 if x.dtype == torch.float64 else 1.1)

    def broken() -> torch.nn.Module:
        raise RuntimeError("out of order")

    path = tmp_path / "records.jsonl"
    bench = Bench(torch.device("cpu"), torch.bfloat16, Writer(path), True)
    make = Makers(bench, 8, 12, 20, 3)
    wrong = Contestant("wrong", "dense", lambda: Wrong(12, 20, dtype=torch.bfloat16))
    contestants = [Contestant("broken", "ours", broken), wrong, make.ours(), make.frozen()]
    compete(bench, cell(bench, 8, 12, 20, 3, group="linear"), contestants)
    run = Run.load(path)
    statuses = {r["contestant"]: r["status"] for r in run.of("measurement")}
    assert statuses == {
        "broken": "failed",
        "wrong": "refused",
        "polyadic": "timed",
        "polyadic, frozen": "timed",
    }
    assert "out of order" in run.of("measurement", contestant="broken")[0]["reason"]
    name = next(iter(run.cells))
    assert set(run.timed(name, "training", "graph")) == {"polyadic"}
    assert set(run.timed(name, "forward", "eager")) == {"polyadic", "polyadic, frozen"}


def test_a_cell_once_begun_is_not_begun_again(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "records.jsonl")
    writer.write("cell", cell="a")
    bench = Bench(torch.device("cpu"), torch.bfloat16, writer, True)
    assert list(bench.fresh(["a", "b"])) == ["b"]
    bench.deadline = 0.0
    with pytest.raises(TimeoutError, match="stopped before b"):
        list(bench.fresh(["a", "b"]))


class PretendGraph:
    """A CUDA graph that records nothing."""

    def __init__(self) -> None:
        self.replays = 0

    def capture_begin(self) -> None:
        """Begin."""

    def capture_end(self) -> None:
        """End; of a broken capture torch's raises."""

    def replay(self) -> None:
        """Count."""
        self.replays += 1


class PretendEvent:
    """An event that takes a millisecond."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        """Nothing."""

    def synchronize(self) -> None:
        """Nothing."""

    def elapsed_time(self, other: PretendEvent) -> float:
        """Milliseconds."""
        return 1.0


class PretendStream:
    """A stream that waits for others."""

    def wait_stream(self, other: PretendStream) -> None:
        """Nothing."""


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Timer:
    """A timer that believes it has a GPU."""
    monkeypatch.setattr(torch.cuda, "Stream", PretendStream)
    monkeypatch.setattr(torch.cuda, "current_stream", PretendStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
    monkeypatch.setattr(torch.cuda, "Event", PretendEvent)
    return Timer(torch.device("cuda"), Patience(seconds=0.0, samples=3, block=5e-3))


def test_graphs_are_timed_by_events(pretend_gpu: Timer) -> None:
    """A sample lasts a block: five replays of a millisecond, each of two calls."""
    ran: list[int] = []
    piece = pretend_gpu.capture([lambda: ran.append(0), lambda: ran.append(1)])
    assert ran == [0, 1, 0, 1], "warmed up, then captured"
    timing = pretend_gpu.graphs({"piece": piece})["piece"]
    assert timing.calls == 10
    # An event says a millisecond for five replays.
    assert timing.median == pytest.approx(1e-4)
    assert len(timing.samples) == 3


def test_a_broken_capture_says_what_broke_it(pretend_gpu: Timer) -> None:
    calls = iter(range(10))

    def breaks_at_last() -> None:
        if next(calls) == 3:
            raise ValueError("the host waits for the GPU here")

    with pytest.raises(ValueError, match="the host waits"):
        pretend_gpu.capture([breaks_at_last] * 3)


def test_contexts_are_entered_outside_of_what_is_timed(pretend_gpu: Timer) -> None:
    seen: list[str] = []

    @contextmanager
    def inside() -> Iterator[None]:
        seen.append("in")
        yield
        seen.append("out")

    timings = pretend_gpu.eagers({"a": [lambda: seen.append("call")]}, {"a": inside})
    assert len(timings["a"].samples) == 3
    # Whatever is called is called between "in" and "out".
    depth = 0
    for word in seen:
        depth += {"in": 1, "out": -1}.get(word, 0)
        assert word != "call" or depth == 1


def test_time_of_a_processor_alone() -> None:
    """Every case starts its kernels by the driver, which is not there, and has three passes."""
    pytest.importorskip("triton")
    for case, starts in (("linear", 3), ("convolution", 5), ("two nn.Linear", 0)):
        found = stub.measure(case, {"this": ROOT}, rounds=2, calls=1)
        assert [record["pass"] for record in found] == ["forward without grad", "forward", "step"]
        assert {record["starts_of_a_step"] for record in found} == {starts}
        assert all(0 < record["min"] <= record["median"] for record in found)
