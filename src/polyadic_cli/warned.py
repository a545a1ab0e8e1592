"""Warnings on the command line: each is one line, without the place in the source it comes from."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Where torch's own code in C++ warned, which it writes behind the message.
_TRIGGERED = re.compile(r"\s*\(Triggered internally at [^)]*\)")
# What transformers colours.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def in_plain_words() -> Iterator[None]:
    """Print each warning, and each that transformers logs, as a line on standard error.

    Where the user asks for warnings by Python's own option ``-W`` or by ``PYTHONWARNINGS``, they
    are shown in Python's form, which names file and line.
    """
    shown = warnings.showwarning
    logger, handler = logging.getLogger("transformers"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    # A table of what a model's files lack, which is a sentence of ``compress``.
    handler.addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
    logger.addHandler(handler)
    if not sys.warnoptions:
        warnings.showwarning = _show
    try:
        yield
    finally:
        warnings.showwarning = shown
        logger.removeHandler(handler)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _line(record.getMessage(), record.levelname.lower())


def _show(message: Warning | str, *_: object, **__: object) -> None:
    print(_line(str(message)), file=sys.stderr)


def _line(message: str, level: str = "warning") -> str:
    plain = _COLOUR.sub("", _TRIGGERED.sub("", message))
    return f"polyadic: {level}: {' '.join(plain.split())}"
