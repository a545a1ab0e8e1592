"""Every kind of layer against float64 on this GPU, before its speed is believed.

- *values*: output and gradients err at most twice as much as plain torch does in the same dtype,
  while every ``torch.empty`` is filled with NaN.
- *exact*: on small integers, where nothing is rounded, every element is equal.
- *repeats*: twenty runs give the same bits.
- *graph*: the replay of a captured step gives the bits of the eager step.
- *no waiting*: the host waits for the GPU nowhere in a step.
- *opcheck*, *export*, *compile*: operators and layers in torch's other modes.
- *index outside*: a lookup outside the table is an error, though no operation checks it.
"""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, said
from benchmarks.gpu.contest import relative_error
from benchmarks.gpu.subjects import Leaves, Subject, step, subjects
from polyadic.nn import CPConv2d, CPLinear

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
# In these a step is also repeated, captured, and searched for waiting.
WHOLE = (torch.bfloat16, torch.float32)
REPEATS = 20
# Where plain torch's error is a rounding or two, ours may be a few: sums of few terms in another
# order. In half precision plain torch rounds more often than we do, and one rounding is enough.
ROUNDINGS = {torch.float64: 8, torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}


def run(bench: Bench) -> None:
    """All subjects in all dtypes, then the other modes."""
    found = subjects(bench.dry)
    for dtype in DTYPES[:2] if bench.dry else DTYPES:
        for seed, subject in enumerate(found):
            if bench.left() < 1:
                raise TimeoutError(f"stopped before {subject.name} in {dtype}")
            with bench.guarded(f"{subject.name} {dtype}"):
                _subject(bench, subject, dtype, seed)
    with bench.guarded("opcheck"):
        opcheck(bench)
    with bench.guarded("export"):
        _check(
            bench,
            "a linear layer and a convolution",
            bench.dtype,
            "export",
            partial(_export, bench),
        )


def compiled(bench: Bench) -> None:
    """Apart from the rest, as compiling takes long."""
    with bench.guarded("compile"):
        _check(bench, "a linear layer", bench.dtype, "compile", partial(_compile, bench))


LOOKUP_OUTSIDE = """
import sys
import torch
from polyadic.nn import CPEmbedding
layer = CPEmbedding(500, 48, rank=8, device=sys.argv[1])
with torch.no_grad():
    y = layer(torch.tensor([3, 499, 0], device=sys.argv[1]))
    assert y.isfinite().all()
    layer(torch.tensor([3, 500, 0], device=sys.argv[1]))
    if sys.argv[1] == "cuda":
        torch.cuda.synchronize()
"""


def outside(bench: Bench) -> None:
    """An index outside a table ends in an error; in a process of its own, as it ends the GPU's."""
    with bench.guarded("outside"):
        _check(bench, "an embedding", bench.dtype, "index outside", partial(_outside, bench))


def _outside(bench: Bench) -> str:
    given = [sys.executable, "-c", LOOKUP_OUTSIDE, bench.device.type]
    done = subprocess.run(given, capture_output=True, text=True, timeout=60, check=False)
    wanted = "device-side assert" if bench.device.type == "cuda" else "IndexError"
    if done.returncode == 0:
        return "nothing was said"
    return "" if wanted in done.stderr else f"another error: {done.stderr[-200:]}"


def _check(
    bench: Bench, subject: str, dtype: torch.dtype, name: str, check: Callable[[], str]
) -> None:
    """Record whether a check passes; it returns what is wrong, or nothing."""
    try:
        wrong = check()
    except Exception as error:
        wrong = said(error)
        bench.recover()
    bench.writer.write(
        "check",
        phase=bench.phase,
        subject=subject,
        dtype=bench.dtype_name(dtype),
        check=name,
        status="failed" if wrong else "passed",
        reason=wrong,
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        switch: Any = torch.utils.deterministic
        fill, switch.fill_uninitialized_memory = switch.fill_uninitialized_memory, True
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            switch.fill_uninitialized_memory = fill


def _subject(bench: Bench, subject: Subject, dtype: torch.dtype, seed: int) -> None:
    check = partial(_check, bench, subject.name, dtype)
    leaves, grad = placed(bench, subject, dtype, seed, integers=False)
    check("values", partial(_values, subject, leaves, grad))
    if dtype in WHOLE:
        check("repeats", partial(_repeats, subject, leaves, grad, 2 if bench.dry else REPEATS))
        if bench.device.type == "cuda" and leaves["x"].numel():
            check("graph", partial(_graph, bench, subject, leaves, grad))
            check("no waiting", partial(_no_waiting, subject, leaves, grad))
    if subject.exact:
        leaves, grad = placed(bench, subject, dtype, seed, integers=True)
        check("exact", partial(_exact, subject, leaves, grad))


def placed(
    bench: Bench, subject: Subject, dtype: torch.dtype, seed: int, integers: bool
) -> tuple[Leaves, Tensor]:
    """Leaves and a gradient of the output on the device."""
    drawn = subject.leaves(seed, integers)
    shape = subject.plain(subject.placed(drawn, torch.device("meta"), torch.float64)).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grad = grad.sign() * (grad.abs() > 1) if integers else grad
    return subject.placed(drawn, bench.device, dtype), grad.to(bench.device, dtype)


def _in_double(subject: Subject, leaves: Leaves, grad: Tensor) -> dict[str, Tensor]:
    exact = {n: t.detach().double() if t.is_floating_point() else t for n, t in leaves.items()}
    return step(subject.plain, _leafs(exact), grad.double())


def _leafs(leaves: Leaves) -> Leaves:
    return {n: t.requires_grad_() if t.is_floating_point() else t for n, t in leaves.items()}


def _values(subject: Subject, leaves: Leaves, grad: Tensor) -> str:
    right = _in_double(subject, leaves, grad)
    plain = step(subject.plain, leaves, grad)
    with poisoned():
        ours = step(subject.ours, leaves, grad)
    least = ROUNDINGS[grad.dtype] * torch.finfo(grad.dtype).eps
    if grad.dtype == torch.float64:
        # Plain torch is the yardstick itself here: two ways of summing K terms may differ by √K.
        least *= math.sqrt(max(*leaves["x"].shape, *grad.shape, 1))
    wrong = []
    for name, truth in right.items():
        theirs, error = relative_error(plain[name], truth), relative_error(ours[name], truth)
        if not error <= 2 * theirs + least:
            wrong.append(f"{name} {error:.1e}, plain torch {theirs:.1e}")
    return "; ".join(wrong)


def _exact(subject: Subject, leaves: Leaves, grad: Tensor) -> str:
    right = _in_double(subject, leaves, grad)
    with poisoned():
        ours = step(subject.ours, leaves, grad)
    most = max(float(t.abs().max()) for t in right.values())
    assert most <= 256, f"the subject is no test of integers: {most:g} is not exact in bfloat16"
    return ", ".join(name for name in right if not torch.equal(ours[name].double(), right[name]))


def _repeats(subject: Subject, leaves: Leaves, grad: Tensor, repeats: int) -> str:
    first = step(subject.ours, leaves, grad)
    other = set()
    for _ in range(repeats - 1):
        again = step(subject.ours, leaves, grad)
        other |= {name for name in first if not torch.equal(first[name], again[name])}
    return f"not the same bits: {', '.join(sorted(other))}" if other else ""


def _no_waiting(subject: Subject, leaves: Leaves, grad: Tensor) -> str:
    """Nothing in a warm step waits for the GPU; torch raises where something does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(subject.ours, leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _graph(bench: Bench, subject: Subject, leaves: Leaves, grad: Tensor) -> str:
    eager = step(subject.ours, leaves, grad)
    captured = bench.timer.capture([partial(step, subject.ours, leaves, grad)])
    captured.replay()
    bench.timer.synchronize()
    replayed = captured.outputs[0]
    other = [
        f"{name} ({relative_error(replayed[name], eager[name]):.1e})"
        for name in eager
        if not torch.equal(eager[name], replayed[name])
    ]
    return f"not the bits of the eager step: {', '.join(other)}" if other else ""


def opcheck(bench: Bench) -> None:
    """``torch.library.opcheck`` of every operator of the library that runs on this device."""
    x, w = bench.randn(7, 12), bench.randn(10, 12)
    factors = [bench.randn(mode, 5) for mode in (2, 3, 4, 6)]
    arguments: dict[str, tuple[Any, ...]] = {
        "linear": (x, w, bench.randn(10)),
        "khatri_rao": (factors, [3, 1], torch.float32, 8),
        "mttkrp": ([bench.randn(24, 8), bench.randn(6, 8)], factors, [3, 1]),
    }
    for name, given in arguments.items():
        if not hasattr(torch.ops.polyadic, name):
            continue
        operator = getattr(torch.ops.polyadic, name).default
        key = "CUDA" if bench.device.type == "cuda" else "CPU"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key):
            continue
        _check(
            bench, f"polyadic::{name}", bench.dtype, "opcheck", partial(_opcheck, operator, given)
        )


def _opcheck(operator: Any, given: tuple[Any, ...]) -> str:
    found = torch.library.opcheck(operator, given, raise_exception=False)
    return "; ".join(f"{name}: {said}" for name, said in found.items() if said != "SUCCESS")


def _compile(bench: Bench) -> str:
    """One linear layer under ``torch.compile``, forward and backward, against eager."""
    layer = CPLinear(96, 60, rank=13, device=bench.device, dtype=bench.dtype)
    x, grad = bench.randn(33, 96).requires_grad_(), bench.randn(33, 60)
    wanted = (x, *layer.parameters())
    y = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend=bench.compiler)(x)
    pairs = [
        (compiled, y),
        *zip(
            torch.autograd.grad(compiled, wanted, grad),
            torch.autograd.grad(y, wanted, grad),
            strict=True,
        ),
    ]
    worst = max(relative_error(got.detach(), right.detach()) for got, right in pairs)
    limit = 4 * torch.finfo(bench.dtype).eps
    return "" if worst <= limit else f"{worst:.1e} from eager, more than {limit:.1e}"


def _export(bench: Bench) -> str:
    """A linear layer and a convolution exported, against eager."""
    where: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    wrong = []
    for layer, x in (
        (CPLinear(96, 60, rank=13, **where), bench.randn(33, 96)),
        (CPConv2d(8, 12, 3, padding=1, rank=5, **where), bench.randn(2, 8, 9, 9)),
    ):
        with torch.no_grad():
            right = layer(x)
            got = torch.export.export(layer, (x,)).module()(x)
        error = relative_error(got, right)
        if not error <= 4 * torch.finfo(bench.dtype).eps:
            wrong.append(f"{type(layer).__name__} {error:.1e} from eager")
    return "; ".join(wrong)
