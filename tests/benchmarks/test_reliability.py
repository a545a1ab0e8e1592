"""Hostile input, equal bits, and the page of what was tried; each check can fail."""

from __future__ import annotations

import ast
import inspect
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import Partial

import polyadic
from benchmarks.pages import between
from benchmarks.reliability import (
    damage,
    determinism,
    hostile,
    hostile_models,
    hostile_tools,
    report,
)
from benchmarks.reliability.__main__ import CALLS
from polyadic import (
    adapters,
    distributed,
    finetune,
    functional,
    init,
    pretrained,
    testing,
    training,
)
from polyadic import nn as cp_nn
from polyadic.adapters import CPConfig, from_lora
from polyadic.distributed import RankParallel
from polyadic.nn import CPConv2d, CPLinear, CPSharedInput, CPSpectralConv1d

HOSTILE = pytest.mark.parametrize("kind", CALLS)


@HOSTILE
def test_any_input_is_taken_or_refused_with_a_message(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input that fails is made small by hypothesis."""
    monkeypatch.chdir(tmp_path)
    make = hostile.Files(tmp_path).load if kind == "files" else hostile.KINDS[kind]

    @settings(
        max_examples=25 if CALLS[kind] <= 20_000 else 100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(draw=st.randoms(use_true_random=False))
    def check(draw: random.Random) -> None:
        end = hostile.attempt(make(draw))
        assert end in ("done", "refused"), end

    check()


@HOSTILE
def test_inputs_are_hostile_and_some_are_not(kind: str) -> None:
    found = hostile.run(kind, 25 if CALLS[kind] <= 20_000 else 100, seed=3)
    assert found["faults"] == {}
    assert found["done"] > 0
    assert found["refused"] > 0


# What the library makes and hands out, and PEFT's class, which only PEFT makes.
RETURNED = {
    "Allocation", "CPModel", "Check", "ConvSaved", "DecomposeInterrupted", "Decomposition",
    "Explanation", "FactorizeReport", "Flops", "FromLora", "KeptBytes", "LayerMatch",
    "LinearSaved", "LiveBytes", "ModelExplanation", "Operations", "Problem", "Progress",
    "Recovery", "Result", "TuneReport", "TunedLayer",
}  # fmt: skip
MODULES = (
    polyadic, functional, finetune, pretrained, testing, training, adapters, distributed, cp_nn,
    init,
)  # fmt: skip
GENERATORS = (hostile, hostile_models, hostile_tools)


def called_by(source: str) -> set[str]:
    """Names that the functions of a module use, and those in its tables of names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def public_names() -> Iterator[str]:
    """Of what can be called with arguments."""
    for module in MODULES:
        own = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not name.startswith("_")
        ]
        names = getattr(module, "__all__", own)
        for name in names:
            value = getattr(module, name)
            is_own = getattr(value, "__module__", "").startswith("polyadic")
            if callable(value) and is_own and inspect.signature(value).parameters:
                yield name


def test_every_public_name_is_given_hostile_input() -> None:
    """A name without a generator fails here; ``constructor`` draws from all of ``nn.__all__``."""
    sources = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in GENERATORS]
    reached = set().union(*map(called_by, sources))
    assert "cp.__all__" in sources[0]
    names = {name for name in public_names() if name not in RETURNED}
    # register_transformers takes nothing, and calibrate measures the machine whatever it is told.
    assert names - reached - set(cp_nn.__all__) <= {"calibrate"}
    assert {"tune", "CPConfig", "factorize", "param_groups", "rank_for", "RankParallel"} <= names
    assert names.isdisjoint(RETURNED)


@pytest.mark.parametrize("error", [RuntimeError("raw"), AttributeError("x"), ValueError("")])
def test_a_fault_would_be_seen(error: Exception) -> None:
    def fail() -> None:
        raise error

    assert hostile.attempt(fail) not in ("done", "refused")


@pytest.mark.long
@pytest.mark.parametrize("kind", CALLS)
def test_many_hostile_calls(kind: str) -> None:
    """No fault, no hang, no growth."""
    found = hostile.run(kind, CALLS[kind], seed=1)
    assert found["faults"] == {}
    assert found["grown"] < 64


def test_a_million_calls_are_made_of_every_kind_there_is() -> None:
    assert sum(CALLS.values()) >= 10**6
    assert CALLS.keys() == {*hostile.KINDS, "files"}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: CPLinear(4, 4, rank=2, bias="no"), "bias must be True or False"),
        (lambda: CPConv2d(4, 4, 3, rank=2, bias=torch.ones(2)), "bias must be True or False"),
        (lambda: CPLinear(4, 4, rank=2, dtype="float32"), "dtype must be floating point"),
        (lambda: CPLinear(4, 4, rank=2, dtype=0), "dtype must be floating point"),
        (lambda: CPLinear(torch.ones(2), 4, rank=2), "must be a positive int"),
        (lambda: CPLinear(4, 4, rank=2, order=2**31), "order must be a positive int of at most 64"),
        (lambda: CPLinear.joint(2**70, 4, 4, rank=2), "layers must be a positive int of at most"),
        (lambda: CPLinear(2**61 - 1, 4, rank=2), "in_features must be a positive int of at most"),
        (lambda: CPLinear(4, 4, rank=2**62, order=1), "is too large|at most"),
        (lambda: CPLinear(4, 4, rank=2)(torch.eye(4).to_sparse()), "must be a dense tensor"),
        (
            lambda: CPConv2d(4, 4, 3, rank=2, padding=2)(torch.ones(1, 4, 0, 8)),
            "must not be empty in a spatial dimension",
        ),
        (lambda: CPSharedInput([CPLinear(4, 4, rank=2)])("x"), "x must be a tensor"),
        (lambda: CPSpectralConv1d(4, 4, 3, rank=2, fft_norm=torch.ones(2)), "fft_norm must be one"),
        (lambda: CPSpectralConv1d(4, 4, 3, rank=2, bias="no"), "bias must be True or False"),
        (lambda: polyadic.explain(nn.Sequential(CPLinear(4, 4, rank=2)), "x"), "expects a tensor"),
        (
            lambda: polyadic.explain(CPLinear(4, 4, rank=2), batch=1, stride=torch.ones(2)),
            "stride is not an option",
        ),
        (lambda: polyadic.rank_for((4, 4), flops=1.0, training="x"), "training must be True"),
        (
            lambda: polyadic.param_groups(nn.Linear(2, 2), 1e-3, optimizer=torch.ones(2)),
            "optimizer",
        ),
        (
            lambda: polyadic.second_moments(nn.Sequential(nn.Linear(2, 2)), ["x"], ["0"]),
            "must be Tensor",
        ),
        (
            lambda: polyadic.second_moments(nn.Sequential(nn.Linear(2, 2)), torch.ones(2, 2), []),
            "batches must be an iterable of batches",
        ),
        (lambda: RankParallel(use_local_output=torch.ones(2)), "use_local_output must be True"),
        (lambda: RankParallel(output_layouts=Partial()), "output_layouts must be Replicate"),
        (lambda: init.cp_orthonormal_([torch.empty(3, 0)], 1.0), "no size of 0"),
        (lambda: init.cp_orthonormal_([torch.empty(0, 2)], 1.0), "no size of 0"),
        (lambda: init.cp_orthonormal_([torch.empty(2, 1).expand(2, 3)], 1.0), "expanded tensor"),
        (lambda: init.torch_bias_(torch.empty(1).expand(3), 2), "expanded tensor"),
        (lambda: init.mup_std(0, 4), "must be a positive int"),
        (lambda: CPLinear(4, 4, rank=2, device=-1), "device must be one torch knows"),
        (lambda: CPSpectralConv1d(4, 4, 3, rank=2, device=2.0), "device must be text"),
        (lambda: polyadic.untune(stored="no"), "stored must be True or False"),
        (lambda: testing.environment(torch.ones(0)), "packages must be a sequence"),
        (lambda: CPConfig(rank_pattern={"(": 2}), "no regular expression"),
        (lambda: CPConfig(target_modules=[2]), "target_modules must be names"),
        (lambda: CPConfig(share=torch.ones(2)), "share must be one of"),
        (lambda: CPConfig(dropout="x"), "dropout must be a number"),
        (lambda: from_lora("nowhere", 2), "is no file; expected the folder of a LoRA"),
        (lambda: from_lora((LoraConfig(), {"x.lora_A": "y"}), 2), "must hold tensors by name"),
    ],
)
def test_what_hostile_input_found_is_refused_by_name(call: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        call()


def test_no_pickle_is_on_a_load_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the package unpickles, except for the restricted loader of old checkpoints."""
    root = Path(sys.modules["polyadic"].__file__ or "").parent
    loads = []
    for path in [*root.rglob("*.py"), *(root.parent / "polyadic_cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "shelve", "marshal", "joblib"} & set(names), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path
                loads.append(path.name)
    assert loads == ["checkpoint.py"]

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a pickle was opened")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr("torch.load", refuse)
    files = hostile.Files(tmp_path)
    draw = random.Random(0)
    ends = [hostile.attempt(files.load(draw)) for _ in range(40)]
    assert set(ends) == {"done", "refused"}


@pytest.mark.parametrize(
    "way", [way for way in determinism.WAYS if "new process" not in way and "8" not in way]
)
def test_the_same_bits(way: str) -> None:
    found = determinism.compare(way, determinism.everything())
    assert (
        found["equal"]
        == found["compared"]
        == sum(len(case.dtypes) for case in determinism.CASES)
        > 50
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in 8 threads at once", "in a new process"])
def test_the_same_bits_in_many_threads_and_new_processes(way: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = determinism.compare(way, determinism.everything())
    finally:
        torch.set_num_threads(threads)
    assert (
        found["equal"]
        == found["compared"]
        == sum(len(case.dtypes) for case in determinism.CASES)
        > 50
    )


def test_other_bits_would_be_seen() -> None:
    wanted = determinism.everything()
    wanted["linear 1 torch.float32"] = "another"
    assert determinism.compare("a second time", wanted)["equal"] == len(wanted) - 1


def test_a_shared_layer_in_eight_threads_at_once() -> None:
    """One layer, many threads, forward and backward to their own inputs."""
    layers = [CPLinear(24, 12, rank=4), CPConv2d(4, 6, 3, rank=4)]
    inputs = [torch.randn(5, 24), torch.randn(2, 4, 7, 7)]
    layers[0].requires_grad_(False)
    layers[1].requires_grad_(False)

    def results() -> list[torch.Tensor]:
        found = []
        for layer, x in zip(layers, inputs, strict=True):
            own = x.clone().requires_grad_()
            y = layer(own)
            found += [y.detach(), *torch.autograd.grad(y.square().sum(), own)]
        return found

    wanted = results()
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(not torch.equal(a, b) for a, b in zip(results(), wanted, strict=True))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 8 * 20 * 4
    assert not any(wrong)


def test_flips_and_readers_are_counted() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for found in (
            damage.flipped_model(Path(folder) / "model", 301),
            damage.flipped_checkpoint(Path(folder) / "state", 301),
        ):
            assert found["noticed"] == found["tried"] > 3


def test_the_page_is_that_of_the_records() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == between(page, report.MARK, report.section(*report.stored()))
    for record in report.stored()[1]:
        assert record.get("equal", 0) == record.get("ends", record.get("compared", 0)) or (
            record["kind"] not in ("kills", "kills at calls", "determinism")
        )
