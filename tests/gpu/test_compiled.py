"""Every form of every kernel, compiled for GPUs that are not there."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from check import names
from compiled import Code, Form, compiled, faults

pytest.importorskip("triton")
# Where kernels are interpreted there is nothing to compile.
numerics = pytest.importorskip("polyadic.kernels.triton.numerics")
if numerics.INTERPRETED.value:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)


def cases() -> Iterator[Any]:
    """Each form for compute capability 9.0, those in bfloat16 for 8.0 and 10.0 too, if for them."""
    for name in names():
        table = importlib.import_module(f"kernel_{name}")
        for form in getattr(table, "forms", tuple)():
            others = (80, 100) if "bfloat16" in form.name else ()
            for capability in sorted({90, *others} & {*form.capabilities}):
                yield pytest.param(form, capability, id=f"{name} {form.name} {capability}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "capability"), list(cases()))
def test_compiles_well(form: Form, capability: int) -> None:
    assert faults(form, compiled(form, capability), capability) == []


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (Code(8, 0, 255, "LDG.E.128 HMMA"), "spills"),
        (Code(0, 0, 255, "LDG.E.128 HMMA STL"), "spills"),
        (Code(0, 10**6, 32, "LDG.E.128 HMMA"), "shared memory"),
        (Code(0, 0, 32, "LDG.E.64 HMMA"), "16 bytes"),
        (Code(0, 0, 32, "LDG.E.128 FFMA"), "tensor cores"),
        (Code(0, 0, 32, "LDG.E.128 HMMA", (64, 64)), "parameters"),
    ],
)
def test_faults_are_seen(code: Code, fault: str) -> None:
    form = Form("", None, (), (), tensor_cores=True)
    assert [fault in found for found in faults(form, code, 90)] == [True]
    assert faults(form, Code(0, 0, 32, "LDGSTS.E.BYPASS.128 HGMMA"), 90) == []
