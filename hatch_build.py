"""The README of the built package: a package index knows no files beside it.

Links to files of the repository become absolute where ``project.urls`` of ``pyproject.toml`` names
the repository as ``Source``, and plain words where it does not; a figure is then left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ModuleNotFoundError:  # only the function is wanted, as by the tests
    MetadataHookInterface = object

_LINK = re.compile(r"(?P<figure>!?)\[(?P<words>[^\]]*)\]\((?!\w+://|#)(?P<target>[^)]+)\)")


def for_an_index(text: str, repository: str | None = None) -> str:
    """The README with links that work away from the repository."""

    def replaced(link: re.Match[str]) -> str:
        figure, words, target = link.group("figure", "words", "target")
        if repository is None:
            return "" if figure else words
        view = "raw" if figure else "blob"
        return f"{figure}[{words}]({repository.rstrip('/')}/{view}/main/{target})"

    return _LINK.sub(replaced, text)


class ReadmeHook(MetadataHookInterface):
    """Fills in the dynamic field ``readme``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the README, with the links of an index."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Source")
        text = for_an_index(text, repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
