"""The benchmark: who is let in, what is counted and what is recorded."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench import Options, measure, run_bench, tuned
from benchmarks.bench.cases import ConvCase, LinearCase, all_cases, select
from benchmarks.bench.contestants import contestants
from benchmarks.bench.machine import Rates, work
from benchmarks.bench.measure import Gate, Patience, observed_step, time_interleaved
from benchmarks.bench.problem import Built, Contestant, NotApplicableError, Problem, leaf
from benchmarks.bench.run import admit
from benchmarks.bench.stored import Run
from benchmarks.bench.summary import criteria
from benchmarks.pages import between
from benchmarks.records import ROOT, check, read
from polyadic.measure import tuning
from polyadic.testing import Flops, LiveBytes

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
        (64, 56, 89, 4),
        (128, 28, 182, 4),
        (256, 14, 368, 4),
        (512, 7, 741, 4),
    ]
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
            with Flops() as counter:
                y = built.infer()
            counted["forward"] = counter.total
            with Flops() as counter:
                built.forward(built.x).backward(torch.ones_like(y))
            counted["training"] = counter.total
            # With one map kept, the backward makes the other again; the least work does not.
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
    assert any(criterion.of for criterion in criteria(run)), "no demand is judged by the cell"
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


def test_the_page_of_tuned_layers_is_made_from_the_records() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    records = read(ROOT / "benchmarks" / "results" / tuned.FILE)
    assert between(page, tuned.MARK, tuned.section(records)) == page


def test_a_tuned_layer_beside_its_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mode runs, leaves out what it has, and what it says follows from the records."""
    monkeypatch.setattr(tuned, "CLOSELY", HASTE)
    monkeypatch.setattr(tuned, "QUICK", HASTE)
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "MOST_ROUNDS", 1)
    monkeypatch.setattr(tuning, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(tuned, "select", lambda only: [LINEAR, CONV])
    for _ in range(2):
        tuned.main(["--out", str(tmp_path)])
        records = read(tmp_path / tuned.FILE)
        assert [r["kind"] for r in records] == ["environment", *["tuned"] * 4]
    for record in records[1:]:
        record["seconds"] = {"layer": 1.0, "best": 1.0, "plan": 1.0, "again": 1.02}
    records[2]["seconds"]["layer"] = 1.25
    text = tuned.section(records)
    assert "in 3 of 4**" in text
    assert f"the worst is {LINEAR.title}, training, with 1.250" in text
    assert "up to 1.020" in text
