"""MkDocs hooks: the troubleshooting page gets its list of messages from the source."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import messages


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "troubleshooting.md":
        return markdown.replace("<!-- messages -->", messages.markdown())
    return markdown
