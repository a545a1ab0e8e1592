"""Sentences that ship with Python: the topics of ``pydoc`` and the standard library's docstrings.

They need no network, and the same version of Python has the same sentences.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_HELD_OUT_SHARE = 0.15
_LEAST_WORDS, _MOST_CHARACTERS = 5, 220
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}


@dataclass(frozen=True)
class Texts:
    """Sentences to calibrate and train on, and others to measure on.

    Attributes:
        train: In a fixed order that depends on the sentences alone.
        held_out: Likewise; none of them, nor one that differs in digits, signs or case only, is
            among ``train``.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def load(train: int, held_out: int) -> Texts:
    """Collect sentences.

    Args:
        train: How many to train on.
        held_out: How many to measure on.

    Raises:
        ValueError: there are not as many.
    """
    parts = _all()
    for name, wanted, there in (
        ("train", train, len(parts.train)),
        ("held_out", held_out, len(parts.held_out)),
    ):
        if there < wanted:
            raise ValueError(f"{name} must be at most {there} sentences, got {wanted}")
    return Texts(parts.train[:train], parts.held_out[:held_out])


@cache
def _all() -> Texts:
    return split(sentence for text in _documents() for sentence in sentences(text))


def split(found: Iterable[str]) -> Texts:
    """Divide sentences by a hash of their letters, each kept once, ordered by that hash."""
    chosen: dict[str, str] = {}
    for sentence in found:
        letters = re.sub(r"[^a-z]+", " ", sentence.lower()).strip()
        key = hashlib.sha256(letters.encode()).hexdigest()
        chosen.setdefault(key, sentence)
    limit = int(_HELD_OUT_SHARE * 16**8)
    train: list[str] = []
    held_out: list[str] = []
    for key in sorted(chosen, key=lambda key: key[8:]):
        (held_out if int(key[:8], 16) < limit else train).append(chosen[key])
    return Texts(tuple(train), tuple(held_out))


def sentences(text: str) -> Iterator[str]:
    """Sentences of running text: paragraphs without code, tables and lists of arguments."""
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(text)):
        lines = paragraph.splitlines()
        if any(
            re.match(r"\s{3,}\S|\s*(>>>|\.\.|\*{2,}|={3,}|-{3,}|\+-|\|)", line) for line in lines
        ):
            continue
        joined = " ".join(" ".join(lines).split())
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", joined):
            words = re.findall(r"[A-Za-z]{2,}", sentence)
            fits = len(words) >= _LEAST_WORDS and len(sentence) <= _MOST_CHARACTERS
            if fits and sentence[0].isupper() and sentence[-1] in ".!?":
                yield sentence


def _documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            yield from docstrings(path.read_text(encoding="utf-8", errors="replace"))


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module's source; it is parsed, not run."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
