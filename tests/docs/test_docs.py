"""The documentation is true: its code runs, what it names exists, what it draws is the code."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import operator
import re
import runpy
import shlex
import subprocess
import sys
import tokenize
import types
import warnings
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import polyadic
from polyadic.nn.ranks import _warned as warned_before

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "polyadic"
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Examples that return the accuracies they reach; the others have tests of their own.
EXAMPLES = [p for p in sorted((ROOT / "examples").glob("*.py")) if "def main() ->" in p.read_text()]
GENERATED = re.compile(r"<!-- (\w+):begin -->(.*?)<!-- \1:end -->", re.DOTALL)


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", [pytest.param(p, id=p.name) for p in paths])


def blocks(path: Path, language: str) -> Iterator[tuple[int, str]]:
    """Fenced blocks of a language: where in the file their first line stands, and the text."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start(1)].count("\n") + 1, match.group(1)


def prose(path: Path) -> str:
    """The text without its fenced blocks and generated parts."""
    text = GENERATED.sub("", path.read_text(encoding="utf-8"))
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(path: Path) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", prose(path))


def promised(first: int, code: str) -> dict[int, str]:
    """What each ``print(...)  # result`` says it prints, by line of the file."""
    lines = {
        node.lineno
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "print"
    }
    tokens = tokenize.generate_tokens(StringIO(code).readline)
    comments = {t.start[0]: t.string[2:] for t in tokens if t.type == tokenize.COMMENT}
    silent = lines - comments.keys()
    assert not silent, f"line {first - 1 + min(silent)}: print(...) without the result behind it"
    return {first - 1 + line: comments[line] for line in lines}


def checked_print(path: Path, expected: dict[int, str]) -> Callable[..., None]:
    def check(*values: Any) -> None:
        line = sys._getframe(1).f_lineno
        got = " ".join(map(str, values))
        assert got == expected[line], f"{path.name}:{line} prints {got!r}, not {expected[line]!r}"

    return check


def run_blocks(path: Path) -> None:
    """Run the python blocks of a file one after the other in one namespace, without a warning."""
    names: dict[str, Any] = {"__name__": path.stem, "__builtins__": builtins}
    warned_before.clear()
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for first, code in blocks(path, "python"):
                names["print"] = checked_print(path, promised(first, code))
                # Empty lines in front: a traceback then shows the line of the file.
                exec(compile("\n" * (first - 1) + code, str(path), "exec"), names)
    finally:
        torch.set_default_dtype(torch.float32)
    # Those of other packages about themselves are not the page's.
    ours = [w for w in found if w.filename == str(path) or w.filename.startswith(str(SOURCE))]
    assert not ours, "\n".join(f"{w.filename}:{w.lineno}: {w.message}" for w in ours)


@named(DOCS)
def test_code_runs_and_prints_what_it_says(path: Path) -> None:
    run_blocks(path)


def test_a_wrong_promise_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for code in ("print(1 + 1)  # 3", "assert not True", "print(2)"):
        page.write_text(f"text\n```python\n{code}\n```\n")
        with pytest.raises(AssertionError):
            run_blocks(page)
    page.write_text("```python\na = 2\n```\n```python\nprint(a, 'x')  # 2 x\n```\n")
    run_blocks(page)


def test_readme_has_no_typed_measurements() -> None:
    """Numbers come from code that is run or from the benchmark, not from the keyboard."""
    for path in (
        ROOT / "README.md",
        *(ROOT / "docs" / n for n in ("index.md", "guide.md", "compression.md", "training.md")),
    ):
        found = re.findall(
            r"\b\d[\d.,]*\s?(?:%|x|×|times|ms|µs|us|s|[KMG]i?B|[kMG]?FLOP\S*)\b", prose(path)
        )
        assert not found, f"{path.name}: {found}"


MODULES = ["polyadic", "polyadic.nn", "polyadic.functional", "polyadic.reference",
           "polyadic.init", "polyadic.testing", "polyadic.finetune",
           "polyadic.adapters", "polyadic.distributed"]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_api_page_lists_the_public_names(module: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `([\w.]+)`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    listed = re.findall(r"^- `(\w+)`: \S", sections[module], re.MULTILINE)
    assert sorted(listed) == sorted(set(listed)), "a name is listed twice"
    assert set(listed) == set(public_names(importlib.import_module(module)))


def public_names(module: Any) -> list[str]:
    """``__all__``, or where there is none the public names defined in the module."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def test_the_reference_shows_every_public_name() -> None:
    """Each once, with its docstring; modules are chapters of it."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    shown = [n for page in pages for n in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)]
    assert len(shown) == len(set(shown)), "a name is shown twice"
    wanted = {
        f"{module}.{name}"
        for module in MODULES
        for name in public_names(importlib.import_module(module))
        if not isinstance(getattr(importlib.import_module(module), name), type(polyadic))
    }
    assert set(shown) == wanted
    assert all(inspect.getdoc(operator.attrgetter(n)(namespace())) for n in shown)


def test_the_reference_has_an_example_for_every_public_name() -> None:
    """The first block of code behind a name uses it; blocks are run as those of any page."""
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for shown in re.finditer(r"^::: (?:\w+\.)+(\w+)$", text, re.MULTILINE):
            code = re.search(r"^```python\n(.*?)^```$", text[shown.end() :], re.DOTALL | re.M)
            used = set()
            if code is not None:
                nodes = list(ast.walk(ast.parse(code[1])))
                used = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
                used |= {n.id for n in nodes if isinstance(n, ast.Name)}
            assert shown[1] in used, f"{page.name}: no example uses {shown[1]}"


def namespace() -> Any:
    """Where dotted names begin."""
    for module in MODULES:
        importlib.import_module(module)
    return types.SimpleNamespace(polyadic=polyadic)


def test_the_sites_menu_has_every_page() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- [^:]+: ([\w/]+\.md)$", menu, re.MULTILINE)
    pages = (ROOT / "docs").rglob("*.md")
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "docs")) for p in pages)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    layers = (tmp_path / "reference" / "layers.html").read_text(encoding="utf-8")
    assert "polyadic.nn.CPConv2d" in layers


@named(DOCS)
def test_names_in_backticks_exist(path: Path) -> None:
    """``polyadic.a.b``, ``CPTensor.a`` and ``layer.a`` of a CPLinear can be looked up."""
    for span in spans(path):
        match = re.fullmatch(r"((?:polyadic|CP\w+|\w+Plan|\w+Route)(?:\.\w+)*)(?:\(.*\))?", span)
        if match:
            assert resolves(match.group(1)), f"{path.name} names `{span}`, which does not exist"


def resolves(dotted: str) -> bool:
    head, *rest = dotted.split(".")
    if head == "polyadic":
        value: Any = polyadic
    else:
        places = polyadic, polyadic.nn, importlib.import_module("polyadic.adapters")
        value = next((getattr(m, head) for m in places if hasattr(m, head)), None)
    for i, name in enumerate(rest):
        if not hasattr(value, name) and isinstance(value, type(polyadic)):
            try:
                importlib.import_module(".".join([head, *rest[: i + 1]]))
            except ImportError:
                return False
        value = getattr(value, name, None)
    return value is not None


@named(DOCS)
def test_files_named_exist(path: Path) -> None:
    """Linked files, and paths in backticks: from the root or from the package."""
    text = prose(path)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links {target}"
    for span in spans(path):
        if re.fullmatch(r"[\w./-]+(?:\.(?:py|md|toml|txt|cff)|/)", span):
            made = span.startswith(("polyadic-demo/", ".venv", "~"))
            assert made or (ROOT / span).exists() or (SOURCE / span).exists(), (
                f"{path.name} names {span}"
            )


def test_tests_named_exist() -> None:
    there = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for path in DOCS:
        for span in spans(path):
            if re.fullmatch(r"test_\w+", span):
                assert f"def {span}(" in there, f"{path.name} names {span}"


def commands(path: Path) -> list[list[str]]:
    """Command lines of the sh blocks and of backticks."""
    lines = [line for _, block in blocks(path, "sh") for line in block.splitlines()]
    lines += [s for s in spans(path) if re.match(r"(make|polyadic) [a-z]", s)]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words]


@named(DOCS)
def test_commands_exist(path: Path) -> None:
    typer = pytest.importorskip("typer")
    from polyadic_cli.commands import app

    group = typer.main.get_command(app)
    makefile = (ROOT / "Makefile").read_text()
    for program, *words in commands(path):
        if program == "make":
            for target in words:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
        elif program == "polyadic":
            # Parses the arguments against the command's own options and runs nothing.
            command = group.commands[words[0]]
            if len(words) > 1:
                command.make_context(words[0], words[1:])
        else:
            assert program in {"git", "cd", "pip", ".venv/bin/python"}, f"{path.name}: {program}"


def test_the_text_to_try_a_conversion_on_is_made(tmp_path: Path) -> None:
    """By the page's own line: enough of it to calibrate on and to hold out."""
    ((_, block),) = blocks(ROOT / "docs" / "how" / "convert.md", "bash")
    made = block[block.index('python -c "\n') :].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(made, shell=True, cwd=tmp_path, check=True)
    lines = (tmp_path / "texts.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 256 + 64
    assert all(8 <= len(line.split()) <= 60 for line in lines)


def test_every_command_is_in_the_readme() -> None:
    pytest.importorskip("typer")
    from polyadic_cli.commands import app

    named_there = {words[1] for words in commands(ROOT / "README.md") if words[0] == "polyadic"}
    assert named_there >= {(c.name or c.callback.__name__) for c in app.registered_commands}


@named(EXAMPLES)
def test_examples(path: Path, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    found = runpy.run_path(str(path))["main"]()
    assert capsys.readouterr().out
    accuracies = found.values() if isinstance(found, dict) else [found]
    assert min(accuracies) > 0.85, found


def test_the_readme_names_every_example() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "examples").glob("*.py")} - {"__init__.py"}
    assert {name for name in names if name not in text} == set()


def drawn() -> list[set[str]]:
    """The layers of modules drawn in docs/design.md, from the bottom up."""
    (first, *_), *_ = [(text, at) for at, text in blocks(ROOT / "docs" / "design.md", "text")]
    return [set(re.findall(r"\w+", line.split(":")[0])) for line in first.splitlines() if line]


def units() -> dict[str, set[str]]:
    """What each module, or package taken as one, imports of the others."""
    found: dict[str, set[str]] = {}
    for file in SOURCE.rglob("*.py"):
        unit = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        found.setdefault(unit, set()).update(imported(file) - {unit})
    del found["__init__"], found["__main__"]
    return found


def imported(file: Path) -> set[str]:
    """Modules and packages right below ``polyadic`` that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.startswith("polyadic.")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = node.module == "polyadic"
            names |= {f"polyadic.{a.name}" for a in node.names} if below else {node.module}
    return {name.split(".")[1] for name in names if name.startswith("polyadic.")}


def test_the_drawn_import_direction_is_the_codes() -> None:
    layers, imports = drawn(), units()
    height = {unit: level for level, units_ in enumerate(layers) for unit in units_}
    assert height.keys() == imports.keys(), "drawn in docs/design.md and in src differ"
    for unit, others in imports.items():
        for other in others:
            assert height[other] < height[unit], f"{unit} imports {other}"


ROWS = ("nn", "functional", "planner", "kernels")
COLUMNS = ("linear", "conv", "conv_transpose", "embedding", "spectral")


@pytest.mark.parametrize("row", ROWS)
def test_the_page_on_design_places_every_file_of_the_grid(row: str) -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    files = {path.stem for path in (SOURCE / row).glob("*.py")} - {"__init__", *COLUMNS}
    assert {stem for stem in files if f"`{row}/{stem}.py`" not in text} == set()


def test_the_fast_code_does_not_know_the_reference() -> None:
    users = {unit for unit, others in units().items() if "reference" in others}
    assert users <= {"testing"}


def test_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\]", text, re.MULTILINE)
    assert re.search(r"^## \[Unreleased\]", text, re.MULTILINE)
    assert released[0] == polyadic.__version__


# Written so that no pattern matches its own line.
FOREIGN = {
    "a path of one machine": r"(?<![\w.)}\]*])/(?:home|root|tmp|work|mnt|opt|Users|private)/[\w.]",
    "a package index": r"(?:extra-|--)index[-]url|simple/[\w-]+/?\"",
}
HOSTS = {"github.com", "doi.org", "arxiv.org", "keepachangelog.com", "semver.org", "www.w3.org"}


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_text_files_name_no_foreign_place() -> None:
    """No machine's paths, no package index, links to known hosts alone."""
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        for what, pattern in FOREIGN.items():
            found = re.search(pattern, text)
            assert not found, f"{path.relative_to(ROOT)} names {what}: {found}"
        hosts = set(re.findall(r"https?://([\w.-]+)", text))
        assert hosts <= HOSTS, f"{path.relative_to(ROOT)} links {hosts - HOSTS}"


def test_readme_code_runs_without_optional_einsum_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inequalities of both pages hold whether or not opt_einsum is installed."""
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", False)
    run_blocks(ROOT / "README.md")
    run_blocks(ROOT / "docs" / "guide.md")
