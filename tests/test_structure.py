"""The shape of the package: one direction of imports, light to import, short files, documented."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import polyadic
from polyadic import finetune, functional, init, nn, reference

PACKAGE = Path(polyadic.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 460
# What only some users have, or takes long to import.
HEAVY = [
    "tltorch",
    "tensorly",
    "matplotlib",
    "sklearn",
    "typer",
    "rich",
    "triton",
    "pandas",
    "transformers",
    "peft",
    "neuralop",
]
COMPILER = ["torch._dynamo", "torch._inductor"]


def module_name(path: Path) -> str:
    """polyadic.kernels.conv of kernels/conv.py; a package by the name of its folder."""
    parts = ["polyadic", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports_of(source: str, name: str, is_package: bool) -> set[str]:
    """Names of the modules a module imports from its own package, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # "from package import module" is an import of the module, else of the package.
            submodules = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {s for s in submodules if s in MODULES} or {origin}
            if any(s not in MODULES for s in submodules):
                found.add(origin)
    return {target for target in found if target in MODULES and target != name}


def import_graph() -> dict[str, set[str]]:
    return {
        name: imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        for name, path in MODULES.items()
    }


def test_imports_go_in_one_direction() -> None:
    """No cycle, not even one hidden by an import inside a function."""
    graph = import_graph()
    assert sum(map(len, graph.values())) > len(graph)
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")
    assert order.index("polyadic.formats") < order.index("polyadic.functional.linear")
    assert order.index("polyadic.functional") < order.index("polyadic.nn")


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("import polyadic.tensor", "polyadic.nn", {"polyadic.tensor"}),
        ("from polyadic.tensor import CPTensor", "polyadic.nn", {"polyadic.tensor"}),
        ("from polyadic import init", "polyadic.tensor", {"polyadic.init"}),
        ("from polyadic import init, tensorize", "polyadic.cli", {"polyadic.init", "polyadic"}),
        ("from . import tensor", "polyadic.init", {"polyadic.tensor"}),
        ("from .tensor import CPTensor", "polyadic.init", {"polyadic.tensor"}),
        ("def f():\n    from polyadic import nn", "polyadic.init", {"polyadic.nn"}),
        ("import torch\nfrom torch import nn", "polyadic.init", set()),
    ],
)
def test_imports_are_found(source: str, name: str, expected: set[str]) -> None:
    assert imports_of(source, name, is_package=False) == expected


def test_a_hidden_circle_is_found() -> None:
    graph = import_graph()
    graph["polyadic.formats"] |= imports_of(
        "def late():\n    from polyadic.nn import CPLinear", "polyadic.formats", is_package=False
    )
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())


ALLOWED = {
    # The arithmetic knows nothing of layers, the reference nothing of the arithmetic.
    "polyadic.formats": set(),
    "polyadic.plans": {"polyadic.formats"},
    "polyadic._torch": set(),
    "polyadic.reference": set(),
}


@pytest.mark.parametrize(("name", "allowed"), ALLOWED.items())
def test_modules_at_the_bottom_import_nothing(name: str, allowed: set[str]) -> None:
    assert import_graph()[name] <= allowed


def test_kernels_do_not_know_layers_or_functions() -> None:
    for name, targets in import_graph().items():
        if name.startswith("polyadic.kernels"):
            below = ("polyadic.kernels", "polyadic.plans", "polyadic._torch")
            assert all(target.startswith(below) for target in targets), name


def test_the_planner_does_not_know_layers_or_functions() -> None:
    """A layer makes its request, and the functions ask for a plan."""
    for name, targets in import_graph().items():
        if name.startswith("polyadic.planner"):
            above = ("polyadic.nn", "polyadic.functional", "polyadic.compression")
            assert not any(target.startswith(above) for target in targets), name


def test_nothing_imports_what_only_checks() -> None:
    """What the package itself counts, as the peak of memory, stands below the layers."""
    graph = import_graph()
    users = {name for name, targets in graph.items() if any(map(checks_only, targets))}
    assert users == {name for name in users if checks_only(name)}
    assert "polyadic.live_bytes" in graph["polyadic.nn.peak"]


def checks_only(module: str) -> bool:
    return module.startswith("polyadic.testing")


def private_words_of_torch(source: str) -> set[str]:
    """Names that begin with an underscore and belong to torch, one of its modules or classes."""
    tree = ast.parse(source)
    torchs = {"torch"}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            torchs |= {alias.asname or alias.name for alias in node.names}
        else:
            continue
        found |= {name for name in names if any(p.startswith("_") for p in name.split("."))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, *rest = ast.unparse(node).split(".")
            private = [p for p in rest if p.startswith("_") and not p.startswith("__")]
            if root in torchs and private:
                found.add(ast.unparse(node))
    return found


def test_private_words_of_torch_stand_in_one_file() -> None:
    """They change without notice, so that a new version of torch is checked against one file."""
    for path in FILES:
        if path.name != "_torch.py":
            assert not private_words_of_torch(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._get_tracing_state()",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch.utils._pytree import tree_leaves",
        "from torch import Tensor\nTensor._typed_storage",
    ],
)
def test_a_private_word_would_be_seen(source: str) -> None:
    assert private_words_of_torch(source)
    assert not private_words_of_torch(source.replace("._", ".").replace("C._", "C."))


MOST_ROOT_MODULES = 12


def test_the_root_has_few_modules() -> None:
    modules = list(PACKAGE.glob("*.py"))
    assert len(modules) <= MOST_ROOT_MODULES


@pytest.mark.parametrize("package", [polyadic, finetune, functional, nn])
def test_no_module_bears_the_name_of_a_public_function(package: Any) -> None:
    """``polyadic.explain`` would otherwise be a function or a module, as imports happened."""
    functions = {name for name in package.__all__ if inspect.isfunction(getattr(package, name))}
    folder = Path(package.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    assert not functions & modules


def test_layers_do_no_arithmetic() -> None:
    """Layers go through the functions, never to the kernels' modules by themselves.

    What is frozen has no factors, and no function: it is products of matrices alone.
    """
    arithmetic = {
        "polyadic.kernels.multilinear",
        "polyadic.kernels.linear",
        "polyadic.functional.boundary",
    }
    for name, targets in import_graph().items():
        if name.startswith("polyadic.nn") and name != "polyadic.nn.freezing":
            assert targets.isdisjoint(arithmetic), name


# Run in one fresh process: what torch loads by itself, then what importing and using us adds, and
# which of torch's settings changed.
FRESH = f"""
import json, sys, torch
WATCHED = {HEAVY + COMPILER!r}
def loaded():
    return sorted(set(WATCHED) & set(sys.modules))
def settings():
    return [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
            torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
            torch.get_rng_state().tolist()]
torch.manual_seed(3)
found = {{"torch": loaded()}}
before = settings()
import polyadic
found["settings"] = before == settings()
found["imported"] = loaded()
polyadic.nn.CPLinear(8, 6, rank=2)(torch.ones(3, 8)).sum().backward()
polyadic.nn.CPConv2d(4, 4, 3, rank=2)(torch.ones(1, 4, 5, 5)).sum().backward()
found["used"] = loaded()
import rich
found["seen"] = loaded()
print(json.dumps(found))
"""


def test_importing_and_using_is_light_and_changes_no_setting() -> None:
    """Neither what only some users have is loaded, nor torch's compiler, a second or more."""
    pytest.importorskip("rich")
    run = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert not set(found["torch"]) & set(COMPILER)
    assert found["imported"] == found["torch"]
    assert set(found["used"]) - set(COMPILER) == set(found["torch"])
    assert found["settings"]
    assert "rich" in found["seen"]


def test_files_are_short() -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert {path: n for path, n in lines.items() if n > MOST_LINES} == {}


def kept_lines(source: str) -> tuple[int, int]:
    """How many statements the formatter leaves as they are, and how many of them are constants."""
    tree = ast.parse(source)
    outside = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    ends = {
        node.end_lineno
        for scope in outside
        for node in scope.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
    }
    kept = {i for i, line in enumerate(source.splitlines(), 1) if line.endswith("# fmt: skip")}
    return len(kept), len(kept & ends)


def test_the_formatter_decides_the_lines_of_code() -> None:
    """Constants alone, which are tables of data, keep the lines that they are written in."""
    root = Path(__file__).parents[1]
    folders = ("src", "tests", "benchmarks", "examples", "docs")
    for path in [path for folder in folders for path in (root / folder).rglob("*.py")]:
        every, constants = kept_lines(path.read_text(encoding="utf-8"))
        assert every == constants, path
    assert kept_lines("A = (\n    1, 2,\n)  # fmt: skip") == (1, 1)
    assert kept_lines("def f():\n    return (\n        1, 2,\n    )  # fmt: skip") == (1, 0)


PUBLIC = [
    pytest.param(module, name, id=f"{module.__name__}.{name}")
    for module in (polyadic, finetune, functional, nn, init, reference)
    for name in getattr(module, "__all__", [])
]


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_names_are_documented(module: Any, name: str) -> None:
    value = getattr(module, name)
    doc = inspect.getdoc(value) if not inspect.ismodule(value) else value.__doc__
    assert doc, f"{name} has no docstring"
    if inspect.isclass(value):
        # A dataclass without one gets its signature, a module class that of nn.Module.
        assert not doc.startswith(f"{value.__name__}("), f"{name} has no docstring of its own"
        assert "__doc__" in vars(value)
    if inspect.isfunction(value):
        parameters = [p for p in inspect.signature(value).parameters if p not in ("args", "kwargs")]
        assert not parameters or "Args:" in doc, f"{name} does not describe its arguments"
        assert all(f"{p}:" in doc for p in parameters), f"{name} leaves out an argument"


def test_public_names_exist_once() -> None:
    for module in (polyadic, finetune, functional, nn):
        names = module.__all__
        assert sorted(set(names)) == list(names), f"{module.__name__}.__all__ is not sorted"
        assert all(hasattr(module, name) for name in names)


def test_what_an_older_compiler_misreads_is_asked_in_one_place() -> None:
    """The compiler of torch 2.11 takes the one for true, and cannot trace the other."""
    asked = {"is_exporting": "_torch.py", "is_autocast_available": "_torch.py"}
    for name, place in asked.items():
        found = [p.name for p in FILES if name in p.read_text(encoding="utf-8")]
        assert found == [place], name


def test_nothing_names_a_machine_or_holds_a_leftover() -> None:
    marks = ("TODO", "FIXME", "XXX", "print(torch", "breakpoint(", "/tmp/", "/home/")
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not [mark for mark in marks if mark in text], path
