"""The console script: runs the commands and reports a wrong argument in one line."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any, cast

from polyadic_cli import warned


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 a wrong argument.

    Args:
        arguments: the words after the program's name; by default those that the shell gave.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(f"polyadic {importlib.metadata.version('polyadic')}")
        sys.exit(0)
    try:
        import rich  # noqa: F401 - the commands import it where they print
        import typer

        from polyadic_cli.commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        sys.exit("polyadic: the command line needs typer and rich: pip install 'polyadic[cli]'")

    # the base of every usage error; by version, typer brings its own click or imports it
    usage_error = typer.BadParameter.__mro__[1]
    try:
        with warned.in_plain_words():
            code = app(args=given, prog_name="polyadic", standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, usage_error):
            raise
        wrong = cast(Any, error)
        message = " ".join(wrong.format_message().split()).removesuffix(".")
        command = "polyadic" if wrong.ctx is None else wrong.ctx.command_path
        print(f"polyadic: {message} (see {command} --help)", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
