"""The benchmark: who is let in, what is counted and recorded, and what is made of records."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from polyadic import cli
from polyadic.bench import Options, measure, run_bench
from polyadic.bench import run as bench_run
from polyadic.bench.cases import ConvCase, LinearCase, all_cases, describe, select
from polyadic.bench.contestants import contestants
from polyadic.bench.machine import Rates, work
from polyadic.bench.measure import Gate, LiveBytes, Patience, observed_step, time_interleaved
from polyadic.bench.problem import Built, Contestant, NotApplicableError, Problem, leaf
from polyadic.bench.records import Run, check
from polyadic.bench.report import between, short_table, stored_runs, three_digits, write_report
from polyadic.bench.run import admit
from polyadic.bench.summary import criteria, exponent, spearman

LINEAR = LinearCase((2, 3), (3, 2), 4, 5)
CONV = ConvCase((2, 2), (3, 1), 3, 4, 2, 5)
STRIDED = ConvCase((2, 2), (3, 1), 5, 4, 2, 7, stride=2)
HASTE = Patience(seconds=0.0, repeats=1, block=1e-9, limit=0.0)
PEERS = ("tltorch", "opt_einsum")


def draw(case: Any, dtype: torch.dtype = torch.float64) -> Problem:
    return Problem.draw(case, dtype, "cpu")


def named(case: Any, name: str) -> Contestant:
    return next(c for c in contestants(case) if c.name == name)


def test_the_grid_is_whole_and_every_name_is_its_own() -> None:
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    grid = [case for case in cases if case.group == "grid"]
    assert sum(case.kind == "linear" for case in grid) == 25
    assert sum(case.kind == "conv" for case in grid) == 12
    stages = [c for c in grid if c.name.startswith("resnet18")]
    assert [(c.x_shape[1], c.x_shape[2], c.rank, c.batch) for c in stages] == [
        (64, 56, 89, 4), (128, 28, 182, 4), (256, 14, 368, 4), (512, 7, 741, 4),
    ]  # fmt: skip
    assert {"linear", "conv"} == {case.kind for case in select(quick=True)}


def test_cells_are_chosen_by_part_or_pattern_and_an_unknown_one_is_refused() -> None:
    assert {c.rank for c in select(only="linear_16x16x16*_B8")} == {64, 256}
    assert len(select(only="resnet18")) == 4
    with pytest.raises(ValueError, match=r"no cell matches 'nothing'; the cells are linear_4x4x16"):
        select(only="nothing")


@pytest.mark.parametrize("case", [LINEAR, CONV, STRIDED], ids=lambda case: case.name)
def test_every_contestant_passes_the_gate(case: Any) -> None:
    for peer in PEERS:
        pytest.importorskip(peer)
    problem = draw(case)
    gate = Gate(problem)
    for contestant in contestants(case):
        built, found = admit(contestant, problem, gate, torch.float64)
        if built is None:
            assert (contestant.name, found["status"]) == ("reference", "skipped")
            continue
        assert found["error"] <= 1e-12, contestant.name
        if not contestant.inference:
            assert found["kept_bytes"] >= problem.x.nbytes
            assert found["peak_bytes"] > found["kept_bytes"]


class _Bent(torch.autograd.Function):
    """The dense layer with its output, and the two gradients, stretched by a little."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stretch: tuple[float, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stretch = stretch
        return stretch[0] * (x @ weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        return ctx.stretch[1] * (grads[0] @ weight), ctx.stretch[2] * (grads[0].t() @ x), None


def bent(*stretch: float) -> Contestant:
    def build(problem: Problem) -> Built:
        dense = named(LINEAR, "dense").build(problem)
        (weight,) = dense.parameters
        return Built(lambda x: _Bent.apply(x, weight, stretch), dense.x, (weight,), "weight")

    return Contestant("bent", "dense", build)


@pytest.mark.parametrize(
    ("stretch", "wrong"),
    [
        ((1.0, 1.0, 1.001), "gradient of parameter 0"),
        ((1.0, 1.001, 1.0), "gradient of x"),
        ((1.001, 1.0, 1.0), "y"),
        ((1.0, 1.0, float("nan")), "gradient of parameter 0"),
    ],
)
def test_the_gate_refuses_a_wrong_output_or_gradient(
    stretch: tuple[float, ...], wrong: str
) -> None:
    problem = draw(LINEAR, torch.float32)
    built, _ = admit(bent(1.0, 1.0, 1.0), problem, Gate(problem), torch.float32)
    assert built is not None
    built, found = admit(bent(*stretch), problem, Gate(problem), torch.float32)
    assert built is None
    assert (found["status"], found["error_of"]) == ("refused", wrong)
    assert "against float64 autograd" in found["reason"]


def test_who_cannot_compete_is_recorded_with_the_reason() -> None:
    problem = draw(LINEAR)

    def absent(problem: Problem) -> Built:
        raise ModuleNotFoundError("No module named 'peer'", name="peer")

    def unfit(problem: Problem) -> Built:
        raise NotApplicableError("linear layers only")

    def broken(problem: Problem) -> Built:
        return Built(lambda x: x @ x, leaf(problem.x), (), "weight")

    reasons = []
    for build in (absent, unfit, broken):
        built, found = admit(
            Contestant("c", "einsum", build), problem, Gate(problem), torch.float64
        )
        assert built is None
        reasons.append((found["status"], found["reason"].split(":")[0]))
    assert reasons == [
        ("skipped", "peer is not installed"),
        ("skipped", "linear layers only"),
        ("failed", "RuntimeError"),
    ]


def test_a_contestant_too_large_is_never_run() -> None:
    devices = []

    def build(problem: Problem) -> Built:
        devices.append(problem.x.device.type)
        return named(LINEAR, "dense").build(problem)

    problem = draw(LINEAR)
    large = Contestant("large", "dense", build, memory=100)
    built, found = admit(large, problem, Gate(problem), torch.float64)
    assert built is None
    assert found["reason"].startswith("would need")
    assert devices == ["meta"]


def test_live_bytes_are_counted_storage_by_storage() -> None:
    x = torch.ones(10)
    with LiveBytes([x]) as live:
        assert live.current == 40
        y = x * 2
        view = y[2:5]
        assert live.current == 80
        del y
        assert live.current == 80
        del view
        assert live.current == 40
        torch.ones(100)
        x.add_(1)
    assert (live.current, live.peak) == (40, 440)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_kept_bytes_count_the_input_but_no_parameter(device: str) -> None:
    problem = draw(LINEAR) if device == "cpu" else draw(LINEAR).on_meta()
    x, z = 8 * 5 * 6, 8 * 5 * 4
    for name, kept in (("dense", x), ("plan 2 → 2", x + z), ("polyadic, least memory", x)):
        step = observed_step(named(LINEAR, name).build(problem), problem.grad)
        assert step.kept == kept
        assert step.peak is not None
        assert step.peak > kept


class Clock:
    """A clock that steps move on, in place of the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def step(self, seconds: float) -> Callable[[], None]:
        def advance() -> None:
            self.now += seconds

        return advance


def test_timing_takes_turns_until_each_has_had_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times = {"short": 1e-5, "fair": 4e-3, "long": 0.4, "hopeless": 0.2}
    steps = {name: clock.step(seconds) for name, seconds in times.items() if name != "long"}
    patience = Patience(seconds=0.25, repeats=7, block=1e-3, limit=1.0, hopeless=20.0)
    timings = time_interleaved(steps, patience)
    for name, timing in timings.items():
        assert timing.record()["median"] == pytest.approx(times[name])
        assert timing.record()["min"] == pytest.approx(times[name])
    assert timings["short"].calls == 100
    assert timings["short"].elapsed >= patience.seconds
    assert timings["fair"].calls == 1
    assert len(timings["fair"].samples) >= patience.repeats
    assert timings["hopeless"].stopped_early
    assert len(timings["hopeless"].samples) == 2
    alone = time_interleaved({"long": clock.step(times["long"])}, patience)["long"]
    assert (len(alone.samples), alone.stopped_early) == (3, False)


def test_work_is_what_torch_counts() -> None:
    for case, plan in ((LINEAR, "plan 2 → 2"), (CONV, "plan separable channels_last")):
        for name, route in ((plan, "contract"), ("dense", "dense")):
            built = named(case, name).build(draw(case))
            counted = {}
            with FlopCounterMode(display=False) as counter:
                y = built.infer()
            counted["forward"] = counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:
                built.forward(built.x).backward(torch.ones_like(y))
            counted["training"] = counter.get_total_flops()
            # torch counts more for the backward of a grouped convolution than it does.
            modes = ("forward",) if name.startswith("plan sep") else ("forward", "training")
            for mode in modes:
                assert work(case, mode, 8)[route].flops == counted[mode], (case.name, name, mode)


def test_least_bytes_and_the_floor() -> None:
    x, y, factors, weight = 5 * 6, 5 * 6, 4 * 10, 36
    found = work(LINEAR, "training", 4)
    assert found["factorized"].bytes == 4 * (2 * (x + y) + 2 * factors)
    assert found["dense"].bytes == 4 * (2 * (x + y) + 2 * weight)
    assert work(LINEAR, "forward", 4)["dense"].bytes == 4 * (x + y + weight)
    assert found["factorized"].flops == min(found["contract"].flops, found["rebuild"].flops)
    slow_copy = Rates(1e12, ((100, 5.0), (10_000, 2.0)))
    assert found["dense"].floor(slow_copy) == found["dense"].bytes / 2.0
    slow_gemm = Rates(10.0, ((100, 1e12), (10_000, 1e12)))
    assert found["dense"].floor(slow_gemm) == found["dense"].flops / 10.0


def test_a_small_cell_is_really_run(tmp_path: Path) -> None:
    options = Options(only="linear_4x4_2x5*", quick=True)
    told: list[tuple[int, int, str]] = []
    path = run_bench(options, tmp_path / "new", lambda *news: told.append(news))
    assert path.name.endswith("-cpu-quick.jsonl")
    assert told == [(0, 1, "linear_4x4_2x5_R2_B4"), (1, 1, "")]
    text = path.read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    for record in records:
        check(record)
    run = Run(records)
    assert len(run.timed) == 2
    for timed in run.timed.values():
        assert {"polyadic", "dense", "plan 2 → 2", "plan rebuild"} <= timed.keys()
        assert all(0 < r["min"] <= r["q1"] <= r["median"] <= r["q3"] for r in timed.values())
        assert timed["polyadic"]["predicted"] > 0
    assert run.machines[1]["flops"] > 0
    assert all(criterion.of >= criterion.met for criterion in criteria(run))
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu'"),
        ({"dtype": torch.int32}, "dtype must be one of float64"),
        ({"modes": ("backward",)}, "modes must be among forward, training"),
        ({"threads": (0,)}, "threads must be positive ints"),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**wrong)


def test_a_malformed_record_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        check({"kind": "guess"})
    with pytest.raises(ValueError, match="needs flops, bandwidth, cost_model"):
        check({"kind": "machine", "threads": 1})
    measurement = {"kind": "measurement", "status": "lost"}
    with pytest.raises(ValueError, match="status must be one of"):
        check(measurement)
    with pytest.raises(ValueError, match="no environment line"):
        Run([])


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


def stored(times: dict[str, float] = TIMES, **changes: Any) -> list[dict[str, Any]]:
    """Records of two cells and of a sweep whose time grows with the batch, as ``run`` writes."""
    records: list[dict[str, Any]] = [
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
    rates = Rates(1e11, ((65536, 4e10), (2**28, 1e10)))
    cases = [c for c in all_cases() if c.group == "scaling" or "R128_B256" in c.name]
    cases += [c for c in all_cases() if c.name.startswith("resnet18_stage1")]
    for case in cases:
        floors = [
            {
                "mode": mode, "threads": 1, "route": route, "flops": w.flops, "bytes": w.bytes,
                "seconds": w.floor(rates),
            }
            for mode in ("forward", "training")
            for route, w in work(case, mode, 4).items()
        ]  # fmt: skip
        records.append({"kind": "cell", **describe(case), "floors": floors})
        for mode in ("forward", "training"):
            for place, (name, seconds) in enumerate(times.items()):
                seconds *= case.batch * case.rank * case.x_shape[1] / 2**25
                family = name.split()[0].replace("polyadic", "ours").rstrip(",")
                records.append({
                    "kind": "measurement", "cell": case.name, "contestant": name, "mode": mode,
                    "family": family, "layout": "given", "compiled": False, "threads": 1,
                    "status": "timed", "median": seconds, "min": seconds, "q1": seconds,
                    "q3": seconds, "repeats": 7, "calls_per_repeat": 1, "stopped_early": False,
                    "error": 1e-7, "predicted": seconds if family == "plan" else None,
                    "plan": {"route": place} if family == "plan" else None,
                    "parameter_bytes": 100, "kept_bytes": 1000 * place, "peak_bytes": 1000,
                    **changes,
                })  # fmt: skip
    return records


def test_the_criteria_count_what_is_met_and_name_what_is_missed() -> None:
    judged = {c.text.split(":")[0]: c for c in criteria(Run(stored()))}
    choice = judged["our choice ≤ 1.05 × the best of all contestants and forced plans, each eager "
                    "and given the same input"]  # fmt: skip
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
        "benchmarks.md", "benchmark-ratios-cpu.png", "benchmark-roofline-cpu.png",
        "benchmark-scaling-cpu.png",
    }  # fmt: skip
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


def test_a_wrong_argument_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--only", "nothing"], "no cell matches 'nothing'"),
        (["--threads", "two"], "--threads must be counts separated by commas"),
        (["--dtype", "float31"], "--dtype must be a torch dtype"),
        (["--mode", "back"], "modes must be among"),
        (["--only", ""], "the pattern of cells must not be empty"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["bench", *arguments])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:-40], r"line \d+ of \d+ of 2026-01-02-cpu.jsonl is no JSON"),
        (lambda text: text + "[1, 2]\n", "2026-01-02-cpu.jsonl: kind must be one of"),
        (lambda text: text.replace('"kind": "cell"', '"kind": "machine", "flops": 1, '
                                   '"bandwidth": [], "cost_model": "", "threads": 1'),
         "of which there is no cell line"),
        (lambda text: text.replace('"threads": 1', '"threads": 2', 1),
         "measurements are of 1, of which there is no machine line"),
        (lambda text: "", "no environment line"),
    ],
    ids=["truncated", "list", "no cell", "no machine", "empty"],
)  # fmt: skip
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
        cli.main(["bench", "--report", "--out", str(tmp_path), "--docs", str(docs)])
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
        cli.main(["bench", "--quick", "--out", str(taken)])
    assert exit_.value.code == 2
    assert "taken" in capsys.readouterr().err


def test_a_report_without_matplotlib_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "2026-01-02-cpu.jsonl", stored())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    docs = tmp_path / "docs"
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "--report", "--out", str(tmp_path), "--docs", str(docs)])
    assert exit_.value.code == 1
    told = capsys.readouterr().err
    assert "pip install 'polyadic[bench]'" in told
    assert told.count("\n") == 1
    assert not docs.exists()


def test_figures_without_matplotlib_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyadic.bench.plots import save_figures

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"polyadic\[bench\]"):
        save_figures(Run(stored()), tmp_path, "cpu")
