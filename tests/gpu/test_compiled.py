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
    """Each table's forms for compute capability 9.0; for 8.0 and 10.0 fewer, all in bfloat16.

    These are the forms with products of tiles, which have instructions of their own on each GPU,
    and of each other kernel the first form of a kind, which stands before the sizes in its name.
    """
    for name in names():
        table = importlib.import_module(f"kernel_{name}")
        forms = list(getattr(table, "forms", tuple)())
        for capability in (80, 90, 100):
            wanted = [form for form in forms if capability in form.capabilities]
            if capability != 90:
                halves = [form for form in wanted if "bfloat16" in form.name]
                first = {_kind(form): form for form in reversed(halves)}
                wanted = [f for f in halves if f.tensor_cores or f is first[_kind(f)]]
            if wanted:
                yield pytest.param(wanted, capability, id=f"{name} {capability}")


def _kind(form: Form) -> tuple[Any, str]:
    return form.kernel, form.name.partition("(")[0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("forms", "capability"), list(cases()))
def test_compile_well(forms: list[Form], capability: int) -> None:
    codes = compiled(forms, capability)
    found = {f.name: faults(f, code, capability) for f, code in zip(forms, codes, strict=True)}
    assert {name: said for name, said in found.items() if said} == {}


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
