"""Files are written by ``polyadic.durable``, and lines of records by ``benchmarks.records``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("src", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# These write drafts and records for all others; these damage files on purpose.
WRITERS = ("durable/files.py", "durable/sealed.py", "benchmarks/records.py")
DAMAGERS = ("reliability/damage.py", "reliability/hostile.py")
# By the name of a call, which of its arguments is the file; -1 is what it is a method of.
CALLS = {
    "write_bytes": -1, "save": 1, "save_file": 1, "copy": 1, "copy2": 1, "copyfile": 1,
    "copytree": 1, "move": 1, "savefig": 0, "tofile": 0, "savez": 0, "savetxt": 0,
}  # fmt: skip
MODULES = ("torch", "np", "numpy", "shutil")
# What gives a name that may be written to: a draft, or a file in memory.
SAFE = ("replacing", "drafts", "BytesIO", "StringIO")


def called(node: ast.expr) -> str:
    """The last part of the name of what is called."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def safe_names(tree: ast.AST) -> set[str]:
    """Names that stand for drafts and files in memory."""
    found: set[str] = set()
    for node in ast.walk(tree):
        pairs: list[tuple[ast.expr, ast.expr | None]] = []
        if isinstance(node, ast.With):
            pairs = [(item.context_expr, item.optional_vars) for item in node.items]
        elif isinstance(node, ast.Assign):
            pairs = [(node.value, target) for target in node.targets]
        if pairs and isinstance(pairs[0][0], ast.Tuple):
            pairs = [*zip(pairs[0][0].elts, getattr(pairs[0][1], "elts", ()), strict=False)]
        for value, target in pairs:
            if isinstance(value, ast.Call) and called(value.func) in SAFE:
                found |= {target.id} if isinstance(target, ast.Name) else set()
    return found


def target_of(call: ast.Call) -> ast.expr | None:
    """The file that a call writes; None where it writes none."""
    name = called(call.func)
    receiver = call.func.value if isinstance(call.func, ast.Attribute) else None
    if name == "open":
        arguments = call.args[1:] if receiver is None else call.args
        modes = [*arguments[:1], *(k.value for k in call.keywords if k.arg == "mode")]
        words = [str(mode.value) for mode in modes if isinstance(mode, ast.Constant)]
        writes = any(set(word) & set("wax+") for word in words)
        return (receiver or call.args[0]) if writes else None
    if name == "write_text":
        return receiver
    if name not in CALLS:
        return None
    place = CALLS[name]
    module = getattr(receiver, "id", "")
    if name in ("save", "copy") and module not in MODULES:
        return None  # of a dict, a tensor, a checkpoint
    if name == "save" and module in ("np", "numpy"):
        place = 0
    return receiver if place < 0 else (call.args[place] if len(call.args) > place else call)


def writes(source: str) -> Iterator[str]:
    """What a module writes that is neither a draft nor in memory."""
    tree = ast.parse(source)
    safe = safe_names(tree)
    for node in ast.walk(tree):
        target = target_of(node) if isinstance(node, ast.Call) else None
        if target is not None:
            names = {each.id for each in ast.walk(target) if isinstance(each, ast.Name)}
            if not names & safe:
                yield ast.unparse(node)


def test_files_are_written_in_one_place() -> None:
    """Whole or not at all: a write in place leaves half a file where the process is killed."""
    found = {
        path.relative_to(ROOT).as_posix(): list(writes(path.read_text(encoding="utf-8")))
        for path in FILES
        if not path.as_posix().endswith((*WRITERS, *DAMAGERS))
    }
    assert len(found) > 100
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('x')",
        "path.write_text('')",
        "path.write_bytes(b'')",
        "torch.save(state, path)",
        "save_file(tensors, path)",
        "shutil.copyfile(a, b)",
        "figure.savefig(path)",
        "np.save(path, x)",
    ],
)
def test_a_write_would_be_seen(source: str) -> None:
    assert list(writes(source))
    assert not list(writes(f"with replacing(file) as path, replacing(other) as b:\n {source}"))


def test_reading_is_no_writing() -> None:
    assert not list(writes("open(path)\nopen(path, 'rb')\npath.open()\nwrite_text(path, text)"))
    assert not list(writes("cache.copy()\ncheckpoint.save(path, kind, state)"))
