"""The benchmark: what is made of records, and what the command says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench import Options, run_bench
from benchmarks.bench import run as bench_run
from benchmarks.bench.__main__ import main
from benchmarks.bench.cases import all_cases, describe
from benchmarks.bench.machine import Rates, work
from benchmarks.bench.report import short_table, stored_runs, write_report
from benchmarks.bench.stored import Run
from benchmarks.bench.summary import criteria, exponent, spearman
from benchmarks.pages import between, three_digits


def test_rank_correlation_and_exponent() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    assert exponent([(1, 3.0), (2, 12.0), (4, 48.0)]) == pytest.approx(2)


TIMES = {
    "polyadic": 2e-3, "dense": 4e-3, "tltorch factorized": 8e-3, "einsum": 9e-3, "reference": 4e-2,
    "polyadic, least memory": 2.5e-3, "polyadic, frozen": 1.9e-3, "plan 3 → 3": 2e-3,
    "plan 3 → 1+2": 3e-3, "plan 1+2 → 3": 4e-3, "plan rebuild": 5e-3,
}  # fmt: skip


# What stands before the cells in stored records.
FIRST: list[dict[str, Any]] = [
    {
        "kind": "environment", "date": "2026-01-02T03:04:05+00:00", "torch": "2.13.0",
        "python": "3.11", "system": "Linux", "machine": "x86_64", "cpu": "A processor",
        "cores": 2, "device": "cpu", "dtype": "float32", "commit": "abc", "tolerance": 2e-5,
        "versions": {"polyadic": "0.1.0", "peer": None},
    },
    {
        "kind": "machine", "threads": 1, "flops": 1e11, "cost_model": "built-in",
        "bandwidth": [[65536, 4e10], [2**28, 1e10]],
    },
    {
        "kind": "measurement", "cell": "linear_8x8x16_8x8x16_R128_B256", "contestant": "bent",
        "family": "dense", "layout": "given", "compiled": False, "threads": 1,
        "status": "refused", "reason": "relative error 1.0e-03 of y against float64 autograd",
    },
]  # fmt: skip


def stored(times: dict[str, float] = TIMES, **changes: Any) -> list[dict[str, Any]]:
    """Records of two cells and of a sweep whose time grows with the batch, as ``run`` writes."""
    records = [dict(record) for record in FIRST]
    rates = Rates(1e11, ((65536, 4e10), (2**28, 1e10)))
    cases = [c for c in all_cases() if c.group == "scaling" or "R128_B256" in c.name]
    cases += [c for c in all_cases() if c.name.startswith("resnet18_stage1")]
    for case in cases:
        floors = [
            {
                "mode": mode,
                "threads": 1,
                "route": route,
                "flops": w.flops,
                "bytes": w.bytes,
                "seconds": w.floor(rates),
            }
            for mode in ("forward", "training")
            for route, w in work(case, mode, 4).items()
        ]
        records.append({"kind": "cell", **describe(case), "floors": floors})
        for mode in ("forward", "training"):
            for place, (name, seconds) in enumerate(times.items()):
                seconds *= case.batch * case.rank * case.x_shape[1] / 2**25
                family = name.split()[0].replace("polyadic", "ours").rstrip(",")
                records.append(
                    {
                        "kind": "measurement",
                        "cell": case.name,
                        "contestant": name,
                        "mode": mode,
                        "family": family,
                        "layout": "given",
                        "compiled": False,
                        "threads": 1,
                        "status": "timed",
                        "median": seconds,
                        "min": seconds,
                        "q1": seconds,
                        "q3": seconds,
                        "repeats": 7,
                        "calls_per_repeat": 1,
                        "stopped_early": False,
                        "error": 1e-7,
                        "predicted": seconds if family == "plan" else None,
                        "plan": {"route": place} if family == "plan" else None,
                        "parameter_bytes": 100,
                        "kept_bytes": 1000 * place,
                        "peak_bytes": 1000,
                        **changes,
                    }
                )
    return records


def test_the_criteria_count_what_is_met_and_name_what_is_missed() -> None:
    judged = {c.text.split(":")[0]: c for c in criteria(Run(stored()))}
    choice = judged[
        "our choice ≤ 1.05 × the best of all contestants and forced plans, each eager "
        "and given the same input"
    ]
    assert (choice.met, choice.of, choice.verdict) == (4, 4, "met")
    assert judged["conv, training"].verdict == "met"
    grows = [c for text, c in judged.items() if "GEMM-bound" in text]
    assert [c.value for c in grows] == ["1.00 over 4 cells"] * 3
    slower = Run(stored({**TIMES, "polyadic": 2.2e-3}))
    missed = criteria(slower)[0]
    assert (missed.met, missed.of, missed.verdict) == (0, 4, "missed")
    assert str(missed.misses[0]) == (
        "1024→1024 R=128 B=256, forward: 1.10× plan 3 → 3 (1.10× by the least times)"
    )
    assert criteria(Run(stored()[:2]))[0].verdict == "not measured"


def write(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / name).write_text(lines, encoding="utf-8")


def test_the_report_is_made_from_the_newest_whole_run_and_always_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    write(results, "2026-01-02-cpu.jsonl", stored())
    write(results, "2026-01-01-cpu.jsonl", stored()[:2])
    write(results, "2026-01-03-cpu-quick.jsonl", stored()[:2])
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark:begin -->\nold\n<!-- benchmark:end -->\nafter\n")
    pages = []
    for docs in (tmp_path / "a", tmp_path / "b"):
        written = write_report(results, docs, readme)
        pages.append({p.relative_to(docs): p.read_bytes() for p in written if p != readme})
        assert all(path.stat().st_size < 150_000 for path in written)
    assert pages[0] == pages[1]
    assert {p.name for p in pages[0]} == {
        "benchmarks.md",
        "benchmark-ratios-cpu.png",
        "benchmark-roofline-cpu.png",
        "benchmark-scaling-cpu.png",
    }
    page = (tmp_path / "a" / "benchmarks.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| 1024→1024"))
    assert "| **2.00** | **2.00** 3 → 3 | 4.00 | 8.00 | 9.00 | 40.0 |" in row
    assert "bent, refused: relative error 1.0e-03 of y" in page
    short = readme.read_text(encoding="utf-8")
    assert short.startswith("before\n")
    assert short.endswith("after\n")
    assert "old" not in short
    assert "| 1024→1024 R=128 B=256 | **2.00** | 4.00 | 8.00 | 40.0 |" in short


def test_a_report_without_records_or_markers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole run is stored"):
        stored_runs(tmp_path)
    with pytest.raises(ValueError, match="must hold the markers <!-- mark:begin -->"):
        between("nothing", "mark", "new")


@pytest.mark.parametrize(
    ("value", "text"), [(0.001234, "0.0012"), (0.5, "0.500"), (12.345, "12.3"), (1234.5, "1234")]
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_a_wrong_argument_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--only", "nothing"], "no cell matches 'nothing'"),
        (["--threads", "two"], "--threads: must be counts separated by commas"),
        (["--dtype", "float31"], "--dtype: must be a torch dtype"),
        (["--mode", "back"], "modes must be among"),
        (["--only", ""], "the pattern of cells must not be empty"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:-40], r"line \d+ of \d+ of 2026-01-02-cpu.jsonl is no JSON"),
        (lambda text: text + "[1, 2]\n", "2026-01-02-cpu.jsonl: kind must be one of"),
        (
            lambda text: text.replace(
                '"kind": "cell"',
                '"kind": "machine", "flops": 1, "bandwidth": [], "cost_model": "", "threads": 1',
            ),
            "of which there is no cell line",
        ),
        (
            lambda text: text.replace('"threads": 1', '"threads": 2', 1),
            "measurements are of 1, of which there is no machine line",
        ),
        (lambda text: "", "no environment line"),
    ],
    ids=["truncated", "list", "no cell", "no machine", "empty"],
)
def test_damaged_records_are_refused_by_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, message: str
) -> None:
    write(tmp_path, "2026-01-02-cpu.jsonl", stored())
    path = tmp_path / "2026-01-02-cpu.jsonl"
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Run.load(path)
    pytest.importorskip("matplotlib")
    docs = tmp_path / "docs"
    with pytest.raises(SystemExit) as exit_:
        main(["--report", "--out", str(tmp_path), "--docs", str(docs)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not docs.exists()


def test_a_stopped_run_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any) -> Any:
        yield stored()[0]
        raise KeyboardInterrupt

    options = Options(only="linear_4x4_2x5*")
    monkeypatch.setattr(bench_run, "_records", lambda *given: iter(stored()))
    path = run_bench(options, tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(bench_run, "_records", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_bench(options, tmp_path)
    assert path.read_bytes() == before
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".jsonl", ".unfinished"]
    monkeypatch.setattr(bench_run, "_records", lambda *given: iter(stored()[:2]))
    assert run_bench(options, tmp_path) == path
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


def test_a_short_table_without_the_contestants_it_shows() -> None:
    records = [r for r in stored() if r.get("family") in (None, "plan")]
    assert "| 1024→1024 R=128 B=256 | - | - | - | - |" in short_table(Run(records))


def test_a_folder_that_cannot_be_written_to_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(SystemExit) as exit_:
        main(["--quick", "--out", str(taken)])
    assert exit_.value.code == 2
    assert "taken" in capsys.readouterr().err


def test_a_report_without_matplotlib_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "2026-01-02-cpu.jsonl", stored())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    docs = tmp_path / "docs"
    with pytest.raises(SystemExit) as exit_:
        main(["--report", "--out", str(tmp_path), "--docs", str(docs)])
    told = exit_.value.code
    assert isinstance(told, str)
    assert "pip install -e '.[benchmarks]'" in told
    assert "\n" not in told
    assert not docs.exists()


def test_figures_without_matplotlib_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.bench.plots import save_figures

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"\[benchmarks\]"):
        save_figures(Run(stored()), tmp_path, "cpu")


def test_a_small_layer_is_held_against_its_like() -> None:
    """Eager against eager dense; compiled against that and against compiled dense."""
    small = "linear_4x4x16_4x4x8_R16_B32"
    times = {"polyadic": 3e-3, "polyadic, compiled": 2e-3, "dense": 1e-3, "dense, compiled": 2.5e-3}
    records = [
        {**record, "cell": small} if record["kind"] == "measurement" else record
        for record in stored(times)
        if record["kind"] != "measurement" or record["cell"] == "linear_8x8x16_8x8x16_R128_B256"
    ]
    (case,) = [case for case in all_cases() if case.name == small]
    floors = next(record["floors"] for record in records if record["kind"] == "cell")
    records.append({"kind": "cell", **describe(case), "floors": floors})
    judged = {c.text.split(": ")[1]: c for c in criteria(Run(records)) if c.text.startswith("256→")}
    assert {text: (c.value, c.verdict) for text, c in judged.items()} == {
        "polyadic ≤ 1.5 × dense eager": ("3.00×", "missed"),
        "polyadic, compiled ≤ 1 × dense eager": ("2.00×", "missed"),
        "polyadic, compiled ≤ 1 × dense, compiled": ("0.80×", "met"),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--report", "--quick"], "--quick: of a run, but --report measures nothing"),
        (["--report", "--threads", "1", "--mode", "training"], "--threads, --mode: of a run"),
        (["--docs", "pages"], "--docs is where --report writes to, which is not asked for"),
    ],
)
def test_no_option_of_the_command_is_ignored(
    capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*given])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_readmes_numbers_are_those_of_the_stored_records() -> None:
    root = Path(__file__).parents[2]
    stored_cpu = stored_runs(root / "benchmarks" / "results")["cpu"]
    assert short_table(stored_cpu) in (root / "README.md").read_text(encoding="utf-8")
