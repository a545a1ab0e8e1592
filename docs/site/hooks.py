"""What the pages become on the site, so that they read well in the repository too.

Links to files of the repository, which a site has not, become plain words; the names on the page of
every public name become links to their reference.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[(?P<words>[^\]]+)\]\((?P<target>(?!\w+://|#)[^)#]+)(?:#[^)]*)?\)")

# A module's heading, and a name of it: a module has no reference of its own.
_NAMES = re.compile(
    r"^## `(?P<module>[\w.]+)`$|^- `(?P<name>(?!(?:nn|init|reference|functional|finetune)`)\w+)`:",
    re.M,
)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for each page before it is rendered."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link["target"]))
        return link["words"] if target.startswith("..") else link[0]

    module = ""

    def linked(found: re.Match[str]) -> str:
        nonlocal module
        if found["module"]:
            module = found["module"]
            return found[0]
        return f"- [`{found['name']}`][{module}.{found['name']}]:"

    if page.file.src_uri == "api.md":
        markdown = _NAMES.sub(linked, markdown)
    return _LINK.sub(replaced, markdown)
