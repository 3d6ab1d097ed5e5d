"""A hook of mkdocs: the pages of the repository's root become pages of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace links between the root and the folder of the documents."""
    inside = page.file.src_uri not in OUTSIDE.values()

    def moved(match: re.Match[str]) -> str:
        path = match[1].removeprefix("../") if inside else match[1].removeprefix("docs/")
        return f"]({OUTSIDE.get(path, path)}"

    return re.sub(r"\]\(((?:\.\./|docs/)?[\w./-]+\.md)", moved, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Make the empty corner of a table a cell: a header without text confuses screen readers."""
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", html)
