"""Every message that the package raises, read out of its source: for the troubleshooting page and its test."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("gspn2_diffusion", "pipelines", "examples")
GAP = "\u2026"  # stands for what is only known when it happens


@dataclass(frozen=True)
class Message:
    """A raised message: its template, its exception, the file (relative to the repository) and line."""

    text: str
    exception: str
    file: str
    line: int

    @property
    def remedy(self) -> str:
        """What the message itself says to do: the part after its last semicolon."""
        last = self.text.rpartition("; ")[2].strip()
        return last[:1].upper() + last[1:] if "; " in self.text else ""


def template(node: ast.expr, names: dict[str, ast.expr]) -> str:
    """The text of a string expression with gaps for its variables; a lone gap where nothing of it is literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, names) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, names) + template(node.right, names)
    if isinstance(node, ast.Name) and node.id in names:
        return template(names[node.id], {})
    return GAP


@functools.cache
def messages() -> list[Message]:
    """All of them, in the order of the source, each text once for a file."""
    found: dict[tuple[str, str], Message] = {}
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            file = str(path.relative_to(ROOT))
            for exception, text, line in _raised(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault((file, text), Message(text, exception, file, line))
    return list(found.values())


def _raised(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for scope in [*functions, tree]:
        names = {
            target.id: node.value
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(scope):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            # Gradio's toasts and argparse's refusals reach the user as raised errors do.
            if isinstance(node, ast.Raise) or name in ("gr.Error", "parser.error"):
                text = " ".join(template(call.args[0], names).split())
                if text.replace(GAP, "").strip(" .;:"):
                    yield name.rpartition(".")[2], text, node.lineno


def markdown() -> str:
    """One heading for each message, under its file."""
    lines: list[str] = []
    file = ""
    for message in messages():
        if message.file != file:
            file = message.file
            lines += [f"### `{file}`", ""]
        remedy = f" **{message.remedy}**" if message.remedy else ""
        lines += [f"#### {escape(message.text)}", "", f"`{message.exception}`.{escape(remedy)}", ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Plain words for Markdown: no HTML, no emphasis out of underscores."""
    return text.replace("<", "&lt;").replace(">", "&gt;").replace("_", "\\_").replace("[", "\\[")
