"""The command line itself: light to ask for help, whole lines, errors that say where help is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from polyadic_cli.main import main

typer = pytest.importorskip("typer")

COMMANDS = ("compress", "plan", "verify")
SOURCE = Path(__file__).parents[2] / "src"


def modules_after(*arguments: str, without: str = "") -> tuple[int, str, set[str]]:
    """Exit code, output and loaded modules of the command in a fresh interpreter."""
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        f"sys.modules.update(dict.fromkeys({without.split()!r}))\n"
        "from polyadic_cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    code = end.code\n"
        "print('modules:', *sorted(sys.modules))\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    out, _, loaded = done.stdout.partition("modules:")
    return done.returncode, out, set(loaded.split())


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", "", *(f"{name} --help" for name in COMMANDS)]
)
def test_help_and_version_import_no_torch(arguments: str) -> None:
    code, out, loaded = modules_after(*arguments.split())
    assert code == 0
    assert out
    assert not {"torch", "transformers", "polyadic"} & loaded


def test_the_version_needs_no_extra() -> None:
    code, out, _ = modules_after("--version", without="typer rich")
    assert code == 0
    assert out.startswith("polyadic 0.")


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_no_line_of_help_is_cut_off(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    assert "..." not in capsys.readouterr().out.replace("COMMAND [ARGS]...", "")


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["nope"], "(see polyadic --help)"),
        (["plan", "--in", "3"], "(see polyadic plan --help)"),
        (["verify", "--nope"], "(see polyadic verify --help)"),
    ],
)
def test_an_error_says_where_the_help_is(
    arguments: list[str], where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert where in err
    assert err.count("\n") == 1


def test_python_m_polyadic_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "polyadic", "plan", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: polyadic plan")
