"""The console script: runs the commands and reports a wrong argument in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 a wrong argument.

    Args:
        arguments: what follows the program's name; by default what the shell gave.
    """
    try:
        import typer

        from polyadic.cli.commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        sys.exit("polyadic: the command line needs typer and rich: pip install 'polyadic[cli]'")

    # the base of every usage error; by version, typer brings its own click or imports it
    usage_error = typer.BadParameter.__mro__[1]
    try:
        code = app(args=arguments, prog_name="polyadic", standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, usage_error):
            raise
        message = " ".join(cast(Any, error).format_message().split())
        print(f"polyadic: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
