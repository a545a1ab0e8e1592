"""The study of training: its runs, what a step costs, a run that goes on, and its page."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.study.store import Store
from benchmarks.training import costs, jobs, language, layers, report, results, tasks, texts
from benchmarks.training.loop import Recipe, optimizer_of, train
from benchmarks.training.run import finished, run_all
from polyadic.formats import tensorize
from polyadic.nn import CPLinear

SHARED = jobs.common("language", 10, 16, 2)
ENTRIES = [
    jobs.Entry("dense", 8, 1, (1.0, 2.0, 4.0, 8.0)),
    jobs.Entry("cp:o1:r2", 8, 1, (1.0, 2.0, 4.0, 8.0), groups=True),
]


def ran(
    best: dict[bool, float], entries: list[jobs.Entry] = ENTRIES, rest: float | None = None
) -> list[jobs.Job]:
    """All runs of a study where a loss is the distance, in octaves, of a rate to the best one.

    The rate of the rest counts in the same way where it has a best one; else one rate for all does.
    """
    made: dict[jobs.Job, float] = {}
    while waiting := [job for job in jobs.due(entries, SHARED, made) if job not in made]:
        job = waiting[0]
        made[job] = abs(math.log2(job.lr / best[job.groups]))
        if rest is not None:
            made[job] += abs(math.log2((job.rest or job.lr) / rest))
        elif job.rest is not None:
            made[job] += 1
    return list(made)


def test_all_sweeps_come_before_repeats_and_the_recipe_is_dense_s_best_rate() -> None:
    found = [(job.layer, job.groups, job.lr, job.seed) for job in ran({False: 2.0, True: 4.0})]
    dense = [("dense", False, lr, 0) for lr in (1.0, 2.0, 4.0, 8.0)]
    dense += [("dense", False, 2.0, 0) for _ in jobs.REST_FACTORS]
    cp = [("cp:o1:r2", True, lr, 0) for lr in (1.0, 2.0, 4.0, 8.0)]
    repeats = [("dense", False, 2.0, seed) for seed in (1, 2)]
    repeats += [("cp:o1:r2", True, lr, seed) for lr in (4.0, 2.0) for seed in (1, 2)]
    assert found == dense + cp + repeats


def test_what_no_contestant_makes_learns_at_the_rate_that_suits_dense_in_all() -> None:
    found = ran({False: 2.0, True: 2.0}, rest=8.0)
    assert [job.rest for job in found[4:7]] == [4.0, 8.0, 16.0]
    repeated = [job for job in found[7:] if job.seed]
    assert {job.layer for job in repeated} == {"dense", "cp:o1:r2"}
    assert {job.rest for job in found[7:]} == {8.0}
    records = [
        {
            **dataclasses.asdict(job),
            "loss": abs(math.log2(job.lr / 2.0)) + ((job.rest or job.lr) != 8.0),
        }
        for job in found
    ]
    assert results.resting(records) == [record for record in records if record["rest"] == 8.0]
    old = [{key: value for key, value in records[0].items() if key != "rest"}]
    assert results.resting(old) == old


@pytest.mark.parametrize("groups", [False, True])
def test_the_rest_of_a_model_has_a_rate_of_its_own(groups: bool) -> None:
    model = nn.Module()
    model.blocks, model.head = nn.ModuleList([CPLinear(6, 8, rank=3)]), nn.Linear(8, 2)
    recipe = Recipe(1e-3, 1, groups=groups, rest=0.5)
    optimizer = optimizer_of(model, recipe, torch.device("cpu"))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert {rates[id(p)] for p in model.head.parameters()} == {0.5}
    own = {rates[id(p)] for p in model.blocks.parameters()}
    assert 0.5 not in own
    assert (own == {1e-3}) is not groups


def test_contestants_of_equal_parameters_are_so() -> None:
    for width in (128, 256):
        thin, narrow = jobs.matched(width, order=3, rank=64)
        own, *others = [
            language.LanguageModel(
                layers.maker(name), blocks=2, width=size, length=4
            ).block_parameters()
            for name, size in (
                ("cp:o3:r64", width),
                (f"lowrank:r{thin}", width),
                ("dense", narrow),
            )
        ]
        assert all(own / 1.2 < count < own * 1.2 for count in others)


@pytest.mark.parametrize(
    ("best", "last", "count"), [(16.0, 32.0, 6), (1e9, 128.0, 8), (0.5, 0.25, 6)]
)
def test_a_sweep_goes_on_beyond_a_best_rate_at_its_end(
    best: float, last: float, count: int
) -> None:
    rates = {job.lr for job in ran({False: best, True: 2.0}) if not job.groups}
    assert last in (max(rates), min(rates))
    assert len(rates) == count


def test_a_diverged_run_is_not_repeated() -> None:
    made = dict.fromkeys(jobs.due(ENTRIES[:1], SHARED, {}), math.inf)
    assert all(job.seed == 0 for job in jobs.due(ENTRIES[:1], SHARED, made))


def test_what_is_stored_is_not_run_again(tmp_path: Path) -> None:
    """Records of before a step had sizes of its own are of the sizes all had then."""
    store = Store(tmp_path / "runs.jsonl", {"steps": 10})
    job = jobs.Job("language", "dense", 8, 1, 1.0, False, 0, 10)
    old = dataclasses.asdict(job)
    del old["length"], old["sequences"]
    store.add({"kind": "training", **old, "loss": None})
    assert finished(store) == {job: math.inf}
    run_all(
        lambda _: [job],
        store,
        device="cpu",
        workers=1,
        seconds=None,
        checkpoints=None,
        tell=lambda line: pytest.fail(line),
    )


def test_held_out_bytes_are_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_bytes(b"~")
    for number in range(60):
        (tmp_path / f"file{number}.py").write_bytes(bytes([number]) * 3)
    found = texts.standard_library(tmp_path)
    train, held_out = (set(part.tolist()) for part in (found.train, found.held_out))
    assert train.isdisjoint(held_out)
    assert train | held_out == set(range(60))
    assert 0 < len(held_out) < 20
    (tmp_path / "file3.py").write_bytes(b"changed")
    assert texts.standard_library(tmp_path).digest != found.digest
    with pytest.raises(ValueError, match="must hold Python files for both parts"):
        texts.standard_library(tmp_path / "test")


def test_paired_modes_are_a_sum_of_kronecker_products() -> None:
    layer = layers.Paired(12, 8, order=2, rank=3).double()
    (m1, m2), (n1, n2) = tensorize(12, 8, 2)
    one, two = layer.factors
    assert (one.shape, two.shape) == ((3, m1, n1), (3, m2, n2))
    weight = sum(torch.kron(a, b) for a, b in zip(one, two, strict=True))
    x = torch.randn(5, 2, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ weight + layer.bias)


@pytest.mark.parametrize("name", ["lowrank:r64", "paired:o2:r4", "cp:o3:r64", "cp:o1:r64"])
def test_contestants_start_at_the_scale_of_torch(name: str) -> None:
    """Their outputs have the variance of nn.Linear's, to a few percent of the many sampled."""
    torch.manual_seed(0)
    x = torch.randn(200, 256)
    dense, own = (make(256, 192)(x).detach().var() for make in (nn.Linear, layers.maker(name)))
    assert 0.8 < float(own / dense) < 1.25


@pytest.mark.parametrize("name", ["qr:r3", "cp:three", "cp:o"])
def test_a_name_of_no_layer_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"the layers compared are|a layer is named like"):
        layers.maker(name)


class EndOfProcessError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("groups", [False, True])
def test_an_interrupted_run_goes_on_bit_for_bit(groups: bool, tmp_path: Path) -> None:
    def trained(stop_at: int | None, checkpoint: Path | None) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(CPLinear(6, 8, rank=3), nn.GELU(), nn.Linear(8, 2))

        def batch(step: int) -> tuple[Tensor, ...]:
            if step == stop_at:
                raise EndOfProcessError
            return (torch.randn(4, 6, generator=torch.Generator().manual_seed(step)),)

        def loss(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            return (model(inputs[0]) - inputs[0][:, :2]).square().mean()

        found = train(
            model,
            Recipe(1e-2, 12, groups=groups),
            batch,
            loss,
            lambda model: float(loss(model, (torch.ones(1, 6),)).detach()),
            validate_every=3,
            checkpoint=checkpoint,
            checkpoint_every=4,
        )
        return found, model.state_dict()

    whole, weights = trained(None, None)
    checkpoint = tmp_path / "run.checkpoint"
    for stop_at in (6, 11):
        with pytest.raises(EndOfProcessError):
            trained(stop_at, checkpoint)
        assert checkpoint.exists()
    again, same = trained(None, checkpoint)
    assert again["curve"] == whole["curve"]
    assert [step for step, _ in again["curve"]] == [3, 6, 9, 12]
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    # What is done is not done again.
    done, same = trained(0, checkpoint)
    assert done["curve"] == whole["curve"]
    assert all(torch.equal(same[name], weights[name]) for name in weights)


def test_what_a_step_costs() -> None:
    entries = [jobs.Entry("dense", 8, 1, ()), *ENTRIES]
    shared = jobs.common("digits", 1, 1, 1)
    dense, cp = costs.measure([dataclasses.replace(e, width=8) for e in entries], shared, rounds=2)
    assert (dense["layer"], cp["layer"]) == ("dense", "cp:o1:r2")
    assert dense["seconds"] >= dense["least_seconds"] > 0
    # Of four convolutions of 8 to 8 channels alone, forward: two at 8×8 and two at 4×4.
    assert dense["flops"] > 64 * 2 * (2 * 64 + 2 * 16) * 9 * 8 * 8 * 2
    assert cp["flops"] < dense["flops"]
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # Weights, gradients and two moments; AdamW counts its steps in a float for each parameter.
    assert costs.state_bytes(model, optimizer) == 4 * 8 * 4 + 2 * 4


ENVIRONMENT = {
    "kind": "environment", "date": "2026-01-02T03:04:05", "torch": "2", "python": "3",
    "cpu": "a processor", "settings": {"steps": 7, "length": 5, "sequences": 3, "gpu": None},
}  # fmt: skip


def run_records(
    layer: str,
    best: float,
    losses: tuple[float, ...],
    width: int = 8,
    groups: bool = False,
    count: int = 10,
) -> list[dict[str, Any]]:
    """Four rates with the first seed, worse by 1 than the best, which has all seeds."""
    shared = {
        "kind": "training",
        "layer": layer,
        "width": width,
        "blocks": 2,
        "groups": groups,
        "block_parameters": count,
        "commit": "abc",
    }
    made = [{**shared, "lr": best, "seed": seed, "loss": loss} for seed, loss in enumerate(losses)]
    others = [best * factor for factor in (0.5, 2, 4)]
    return made + [{**shared, "lr": lr, "seed": 0, "loss": losses[0] + 1} for lr in others]


def step_record(layer: str, seconds: float, flops: int, width: int = 8) -> dict[str, Any]:
    return {
        "kind": "step",
        "layer": layer,
        "width": width,
        "blocks": 2,
        "seconds": seconds,
        "flops": flops,
        "state_bytes": 2_000_000,
        "commit": "abc",
    }


CP = report.README_LAYER
LANGUAGE = [
    *run_records("dense", 0.25, (1.0, 1.25, 1.5), count=1000),
    *run_records(CP, 0.25, (2.0, 1.5, 1.75), groups=True, count=100),
    *run_records(CP, 8.0, (1.5, 1.625, 1.75), count=100),
    *run_records("cp:o2:r4", 0.25, (1.5, 1.5, 1.5), groups=True, count=300),
    *run_records("lowrank:r4", 1.0, (2.5, 2.5, 2.5), count=110),
    *run_records("dense", 0.25, (1.5, 1.5, 1.5), width=4, count=90),
    *run_records("lowrank:r9", 0.25, (1.5, 1.5, 1.5), count=700),
    # Too few rates to know the best.
    *run_records("paired:o2:r1", 1.0, (0.0, 0.0, 0.0), count=100)[:4],
]
STEPS = [
    step_record("dense", 0.010, 4_000_000),
    step_record(CP, 0.005, 1_000_000),
    step_record("cp:o2:r4", 0.011, 2_000_000),
    step_record("lowrank:r4", 0.0055, 1_000_000),
    step_record("lowrank:r9", 0.0045, 8_000_000),
]
DIGITS = [
    *run_records("dense", 0.25, (0.5, 0.5, 0.5), count=50),
    *run_records("cp:o2:r4", 0.25, (0.25, 0.25, 0.25), groups=True, count=20),
]


def stored(folder: Path) -> None:
    folder.mkdir()
    for name, records in (
        (tasks.runs_file("cpu", "language"), LANGUAGE),
        (tasks.runs_file("cuda", "language"), LANGUAGE),
        (tasks.runs_file("cpu", "digits"), DIGITS),
        (tasks.runs_file("cpu", "mnist"), DIGITS),
        (tasks.steps_file("language"), STEPS),
    ):
        lines = [json.dumps(record) for record in (ENVIRONMENT, *records)]
        (folder / name).write_text("\n".join(lines) + "\n")


def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    folder, docs, readme = tmp_path / "results", tmp_path / "docs", tmp_path / "README.md"
    docs.mkdir()
    markers = "<!-- training:begin -->\nbefore\n<!-- training:end -->"
    (docs / "training.md").write_text(f"Above.\n{markers}\nBelow.\n")
    readme.write_text(markers)
    folder.mkdir()
    with pytest.raises(ValueError, match="is not stored in results; run the study first"):
        report.write_report(folder, docs, readme)
    folder.rmdir()
    stored(folder)
    written = report.write_report(folder, docs, readme)
    text = (docs / "training.md").read_text()
    assert text.startswith("Above.\n")
    assert text.endswith("Below.\n")
    assert "before\n" not in text
    for wanted in (
        "7 steps of 3×5 bytes, 2 blocks of width 8. a processor, one thread, torch 2, Python 3, "
        "2026-01-02, commit abc.",
        "| dense | 1,000 | 10.0 | 4 | 2.00 | 0.25 | 1.250 ± 0.250 | - |",
        "| CP, order 3, R=64 | 100 | 5.0 | 1 | 2.00 | 8 | 1.625 ± 0.125 | +0.375 |",
        "| dense, width 4 | 90 | - | - | - | 0.25 | 1.500 ± 0.000 | +0.250 |",
        "| CP, order 3, R=64 | 1.750 ± 0.250 | 1.625 ± 0.125 | 8 | 0.125 |",
        "At 0.25, the dense model's best rate, with `polyadic.param_groups`. Within 0.02 nats of "
        "their own best: none. Not: CP, order 3, R=64 (0.125). Within it, but swept with groups "
        "alone: CP, order 2, R=4 (0.000). The dense model's own losses spread by 0.250 nats over "
        "its seeds at that rate, which is more than that bound: so few steps tell little about a "
        "recipe.",
        "| CP, order 3, R=64 (1.625) | block parameters | dense, width 4 -0.125; low rank, R=4 "
        "+0.875 |",
        "| CP, order 2, R=4 (1.500) | step time | dense -0.250 |",
        "| CP, order 3, R=64 (1.625) | FLOPs | low rank, R=4 +0.875 |",
        "Of equal block parameters CP is better in 1 of 2 comparisons with other layers "
        "(differences of -0.125 to +0.875 nats).",
        "By block parameters, nothing cheaper has a smaller loss than: dense, width 4; dense.",
        "By FLOPs, nothing cheaper has a smaller loss than: CP, order 3, R=64; CP, order 2, R=4; "
        "dense.",
        "The best CP contestant of all, CP, order 2, R=4, is 0.250 nats behind the dense model, "
        "with 3.3× fewer block parameters at 1.10 of its step time.",
        "The best CP contestant of all, CP, order 2, R=4, is 0.250 nats ahead of the dense model, "
        "with 2.5× fewer block parameters.",
        # Four factors: 0.25 was half of it.
        "| CP, order 2, R=4 | 2.500 at 0.062; 1.500 at 0.12; 2.500 at 0.25; 2.500 at 0.5 | 0.25 | "
        "1.000 |",
        "![Held-out loss over what a contestant costs](figures/training-language.svg)",
    ):
        assert wanted in text, wanted
    assert "paired" not in text
    assert "spread by 0.000" not in text
    first = readme.read_text()
    for wanted in (
        "a small byte-level language model with CP layers (order 3, R=64) has 10× fewer parameters "
        "in its blocks than the dense one at 0.50 of its step time, and ends 0.38 nats behind it "
        "(1.62 against 1.25).",
        "With as few parameters, a narrower dense model is 0.12 nats ahead of it and low rank is "
        "0.88 nats behind it; of models whose steps take no longer, the best, low rank, is 0.12 "
        "nats ahead of it.",
        "No CP model measured reaches the dense loss (3 seeds, each model at its own best",
    ):
        assert wanted in first, wanted
    assert {path.name for path in written} == {
        "README.md",
        "training.md",
        "training-language.svg",
        "training-digits.svg",
        "training-mnist.svg",
        "training-readme.svg",
    }
    before = [path.read_bytes() for path in written]
    report.write_report(folder, docs, readme)
    assert [path.read_bytes() for path in written] == before


def test_seeds_decide_between_the_bests_of_two_sweeps() -> None:
    """The first seed alone favours the rate that was chosen by it."""
    found = results.contestants(LANGUAGE)
    best = next(c for c in found if c.layer == CP).best
    assert (best.lr, best.grouped, best.mean) == (8.0, False, 1.625)
    diverged = [{**record, "loss": None} for record in run_records(CP, 1.0, (1.0, 1.0))]
    assert math.isinf(results.contestants(diverged)[0].best.mean)


def test_the_stored_page_is_made_of_the_stored_records() -> None:
    root = Path(__file__).parents[2]
    folder, docs = root / "benchmarks" / "results", root / "docs"
    loaded = tasks.load_all(folder)
    text = report.section(loaded, tasks.load(folder, "language", "cuda"))
    assert text in (docs / "training.md").read_text(encoding="utf-8")
    assert report.summary(loaded[0]) in (root / "README.md").read_text(encoding="utf-8")
    for name in (*(task.name for task in loaded), "readme"):
        assert (docs / "figures" / f"training-{name}.svg").exists()
