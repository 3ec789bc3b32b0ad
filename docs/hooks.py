"""MkDocs hooks: the list of messages comes from the source, and the menu has only pages that exist."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import messages


def on_config(config: Any) -> Any:
    config.nav = existing(config.nav, Path(config.docs_dir))
    return config


def existing(entries: list[Any], folder: Path) -> list[Any]:
    """The menu without pages that are not written yet."""
    kept = []
    for entry in entries:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: existing(target, folder)})
        elif (folder / target).is_file():
            kept.append(entry)
    return kept


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "troubleshooting.md":
        return markdown.replace("<!-- messages -->", messages.markdown())
    return markdown
