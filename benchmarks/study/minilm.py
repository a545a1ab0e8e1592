"""A trained sentence encoder, converted by several methods at equal parameters, and recovered."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study import encoder, fits, texts
from benchmarks.study.agreement import Agreement, agreement
from benchmarks.study.store import Store
from polyadic.finetune import Progress, Recovery, distill
from polyadic.surgery import replace

FILE = "study-minilm.jsonl"
# One batch in so many is shown to methods that run the whole model once for each layer.
CALIBRATION = 3
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to run; the same for all methods.

    Attributes:
        ratios: Weights of the linear layers of the dense encoder over numbers stored instead.
        train: Sentences to calibrate and distill on.
        validation: How many of these are set aside to keep the best of the distillation.
        held_out: Sentences to measure on.
        batch: Sentences in a batch.
        sweeps: Of alternating least squares, at most.
        steps: Of distillation.
        lr: Adam's learning rate in the distillation, falling to zero by half a cosine.
        seed: Of the fits and of the order of batches.
    """

    ratios: tuple[float, ...] = (10.0, 4.0, 2.0)
    train: int = 2100
    validation: int = 100
    held_out: int = 400
    batch: int = 16
    sweeps: int = 8
    steps: int = 80
    lr: float = 3e-4
    seed: int = 0

    @classmethod
    def quick(cls) -> Options:
        """Shorten everything to about a minute; the numbers then mean little."""
        return cls((10.0,), train=200, validation=20, held_out=60, sweeps=2, steps=5)


class Bench:
    """The original model with the sentences, and what every method needs of them.

    Args:
        options: what to run.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model, tokenizer = encoder.load()
        self.layers = encoder.linear_layers(self.model)
        sentences = texts.load(options.train, options.held_out)
        train = sentences.train[options.validation :]
        self.train = encoder.batches(tokenizer, train, options.batch)
        self.validation = encoder.batches(
            tokenizer, sentences.train[: options.validation], options.batch
        )
        self.held_out = encoder.batches(tokenizer, sentences.held_out, options.batch)
        self.original = encoder.embed(self.model, self.held_out)
        for part in (self.train, self.validation):
            for batch in part:
                with torch.no_grad():
                    batch["target"] = encoder.sentence_embeddings(self.model, batch)

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Second moments of the layers' inputs on the training sentences."""
        return encoder.second_moments(self.model, self.train)

    @cached_property
    def held_out_moments(self) -> dict[str, Tensor]:
        """The same on the held-out sentences, to measure with."""
        return encoder.second_moments(self.model, self.held_out)


def run(options: Options, out: Path, only: Sequence[str] | None = None, tell: Tell = print) -> Path:
    """Convert, measure, distill, measure; a record for each method and ratio.

    What the file already holds is not done again, so that a run can be stopped at any time.

    Args:
        options: what to run.
        out: folder of the records.
        only: keys of methods; all by default.
        tell: told in a line what is being done.

    Returns:
        The file.

    Raises:
        ImportError: a package is missing.
        ValueError: the file holds records of other settings, or a method is unknown.
    """
    wanted = methods(only)
    store = Store(out / FILE, asdict(options))
    work = [
        (ratio, method)
        for ratio in options.ratios
        for method in wanted
        if not store.has(method=method.key, ratio=ratio)
    ]
    if work:
        bench = Bench(options)
        for ratio, method in work:
            tell(f"{method.key} at ratio {ratio:g}")
            store.add(study_one(bench, method, ratio, tell))
    return out / FILE


def methods(only: Sequence[str] | None) -> list[fits.Method]:
    """The methods of these keys, all by default.

    Raises:
        ValueError: one is unknown.
    """
    known = [method.key for method in fits.METHODS]
    for key in only or ():
        if key not in known:
            raise ValueError(f"methods are {', '.join(known)}, got {key!r}")
    return [m for m in fits.METHODS if only is None or m.key in only]


def study_one(bench: Bench, method: fits.Method, ratio: float, tell: Tell) -> dict[str, Any]:
    """The record of a method at a ratio."""
    student = copy.deepcopy(bench.model)
    start = time.perf_counter()
    converted = method.convert(student, task(bench, ratio))
    seconds = time.perf_counter() - start
    tell(f"  fitted in {seconds:.0f} s")
    weight_errors, output_errors = _errors(bench, converted)
    before, recovery, after = recover(bench, student, converted, bench.options.lr, tell)
    dense = sum(layer.weight.numel() for layer in bench.layers.values())
    own = sum(_stored(student.get_submodule(name)) for name in bench.layers)
    return {
        "kind": "encoder",
        "method": method.key,
        "label": method.label,
        "ratio": ratio,
        "parameters": own,
        "dense_parameters": dense,
        "model_parameters": sum(p.numel() for p in student.parameters()),
        "dense_model_parameters": sum(p.numel() for p in bench.model.parameters()),
        "ranks": {name: getattr(layer, "rank", None) for name, layer in converted.items()},
        "orders": sorted({len(layer.cp.tensorized_shape[0]) for layer in converted.values()}),
        "fit_seconds": seconds,
        "weight_errors": weight_errors,
        "output_errors": output_errors,
        "before": asdict(before),
        "after": asdict(after),
        "recovery": {
            "steps": recovery.steps,
            "best_step": recovery.best_step,
            "seconds": recovery.seconds,
            "validations": recovery.validations,
        },
    }


def task(bench: Bench, ratio: float) -> fits.Task:
    """What is to be converted."""
    return fits.Task(
        bench.layers,
        ratio,
        bench.moments,
        bench.options.sweeps,
        bench.train[::CALIBRATION],
        encoder.sentence_embeddings,
        lambda batch: batch["attention_mask"],
    )


def _stored(layer: nn.Module) -> int:
    """Numbers stored for a weight, without the bias."""
    return sum(p.numel() for n, p in layer.named_parameters() if n != "bias")


def _errors(bench: Bench, converted: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Relative weight and held-out output errors of every layer, 0 of those left dense."""
    weights, outputs = [], []
    for name, linear in bench.layers.items():
        layer = converted.get(name)
        weights.append(0.0 if layer is None else fits.weight_error(layer, linear))
        moment = bench.held_out_moments[name]
        outputs.append(0.0 if layer is None else fits.output_error(layer, linear, moment))
    return weights, outputs


def recover(
    bench: Bench, student: nn.Module, layers: Mapping[str, nn.Module], lr: float, tell: Tell
) -> tuple[Agreement, Recovery, Agreement]:
    """Put layers into a copy of the original and distill it; the agreement before and after."""
    for name, layer in layers.items():
        replace(student, name, layer)
    before = agreement(encoder.embed(student, bench.held_out), bench.original)
    tell(f"  cosine {before.cosine:.4f}")
    recovery = _distill(bench, student, lr, tell)
    after = agreement(encoder.embed(student, bench.held_out), bench.original)
    tell(f"  recovered in {recovery.seconds:.0f} s, cosine {after.cosine:.4f}")
    return before, recovery, after


def _distill(bench: Bench, student: nn.Module, lr: float, tell: Tell) -> Recovery:
    """Distill towards the original's sentence embeddings, computed once for all methods."""
    options = bench.options
    order = torch.Generator().manual_seed(options.seed)

    def forward(model: nn.Module, batch: encoder.Batch) -> Tensor:
        if model is bench.model:
            return batch["target"]
        return encoder.sentence_embeddings(model, batch)

    def report(progress: Progress) -> None:
        if progress.validation is not None:
            tell(f"  step {progress.step}: validation {progress.validation:.4f}")

    shuffled = [bench.train[i] for i in torch.randperm(len(bench.train), generator=order)]
    return distill(
        student,
        bench.model,
        shuffled,
        steps=options.steps,
        loss="cosine",
        forward=forward,
        lr=lr,
        warmup=min(20, options.steps // 5),
        validation=bench.validation,
        validate_every=max(1, options.steps // 2),
        callback=report,
        seed=options.seed,
    )
