"""The documentation holds: every message has its entry, code blocks run, links lead somewhere, words are right."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gspn2_diffusion.assets import tiny_adapter_path, tiny_scenes_path
from gspn2_diffusion.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAVIGATION = (ROOT / "mkdocs.yml").read_text()
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)

sys.path.insert(0, str(ROOT / "docs"))
import messages  # noqa: E402

SHIPPED = (tiny_scenes_path() / "model_index.json").is_file() and (tiny_adapter_path() / "config.json").is_file()


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    """(line number, text) of the page's code blocks in these languages."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match[2] in languages:
            lines = [line[len(match[1]) :] for line in match[3].splitlines()]
            yield text[: match.start()].count("\n") + 1, "\n".join(lines) + "\n"


# Every message has its entry


def test_every_message_is_found():
    """The reader of the source, on a source written here, and against a plain search in the package's."""
    tree = ast.parse(
        "def f(x):\n"
        "    text = f'{x} is bad'\n"
        "    if x: raise ValueError(f'{x} is ' + 'odd; pass an even one.')\n"
        "    raise errors.UserError(text)\n"
        "parser.error('no such thing')\n"
    )
    assert {(text, name) for name, text, _ in messages._raised(tree)} == {
        ("\u2026 is odd; pass an even one.", "ValueError"),
        ("\u2026 is bad", "UserError"),
        ("no such thing", "error"),
    }
    found = {(message.file, message.line) for message in messages.messages()}
    texts = {message.text for message in messages.messages()}
    for path in (ROOT / "gspn2_diffusion").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if match := re.match(r"\s*raise \w+\(f?['\"](.+)['\"]\)$", line):
                text = re.sub(r"\{.*\}", "", match[1])[:20]
                assert (str(path.relative_to(ROOT)), number) in found or any(text in known for known in texts), line


def test_every_message_has_an_entry():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    assert "<!-- messages -->" in page
    listed = messages.markdown()
    missing = [message.text for message in messages.messages() if messages.escape(message.text) not in listed]
    assert len(messages.messages()) > 50 and not missing


def test_headings_that_quote_a_message_quote_it_right():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    known = [message.text for message in messages.messages()]
    for heading in re.findall(r"^## (.*\u2026.*)$", page, re.MULTILINE):
        parts = [re.escape(part.strip()) for part in heading.split("\u2026") if part.strip(" .")]
        assert any(re.search(".*".join(parts), text) for text in known), f"no message reads {heading!r}"


# Code blocks

NEEDS_MORE = re.compile(r"\.to\(\"cuda|device=\"cuda|from_pretrained\(\s*\"(?!\.|/)[\w.-]+/|push_to_hub|torchrun|\"my-")


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python", "py"))], ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page, one after the other, in one namespace and an empty folder.

    Of a block that needs a GPU, a hub or files of the reader's, and of pictures by a model that is not there, only the
    imports are run.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace = {"__name__": "__main__"}
    for line, text in blocks(page, "python", "py"):
        # Pictures in the documentation are worth more steps than a test can afford.
        tree = ast.parse(re.sub(r"num_inference_steps=\d+", "num_inference_steps=1", text))
        if NEEDS_MORE.search(text) or ("tiny_scenes_path" in text and not SHIPPED):
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(tree, f"{name_of(page)}, block at line {line}", "exec"), namespace)


def options_of(script, seen=()):
    """Every `--option` that appears in a script or in a module of ours that it imports."""
    text = script.read_text(encoding="utf-8")
    found = set(re.findall(r"[\"'](--[\w-]+)[\"']", text))
    # HfArgumentParser makes a flag of every field of a dataclass.
    found |= {f"--{name}" for name in re.findall(r"^    (\w+): [^=\n]+ = ", text, re.MULTILINE)}
    for module in re.findall(r"from (gspn2_diffusion[\w.]*|\.+[\w.]+) import", text):
        parts = module.lstrip(".").split(".")
        base = ROOT if module.startswith("gspn2") else script.parent
        if module.startswith(".."):
            base = script.parent.parent
        for path in (base.joinpath(*parts).with_suffix(".py"), base.joinpath(*parts, "__init__.py")):
            if path.is_file() and path not in seen:
                found |= options_of(path, (*seen, path, script))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "bash", "sh", "console"))], ids=name_of)
def test_shell_blocks_name_what_exists(page):
    """Shell blocks are not run (they install, train, serve): they parse, and every script, make target, command and
    option in them exists. `gspn2` itself is run by tests/test_cli.py."""
    makefile = (ROOT / "Makefile").read_text()
    for line, text in blocks(page, "bash", "sh", "console"):
        where = f"{name_of(page)}, line {line}"
        text = re.sub(r"^\$ ", "", text, flags=re.MULTILINE)
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0, where
        for command in text.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words[:1] == ["make"]:
                for target in words[1:]:
                    assert "=" in target or re.search(rf"^{target}:", makefile, re.MULTILINE), f"{where}: {target}"
            if words[:1] == ["gspn2"] and not words[1].startswith("-"):
                assert words[1] in COMMANDS, f"{where}: gspn2 {words[1]}"
                known = options_of(ROOT / "gspn2_diffusion/cli" / f"{words[1]}.py")
                check_options(words, known, where)
            for index, word in enumerate(words):
                if word.endswith(".py") and word.split("/")[0] in (
                    "examples",
                    "benchmarks",
                    "docs",
                    "tests",
                    "pipelines",
                ):
                    assert (ROOT / word).is_file(), f"{where}: {word} does not exist"
                    check_options(words[index:], options_of(ROOT / word), where)


def check_options(words, known, where):
    for word in words:
        if word.startswith("--") and len(word) > 2 and known:
            assert word.split("=")[0] in known | {"--help"}, f"{where}: {word} is no option of {words[0]}"


# Links and words


def anchors(page):
    """The ids that GitHub and MkDocs give to headings."""
    for heading in re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() or file.name in NAVIGATION, f"{name_of(page)} links to {target}"
        if anchor and file.suffix == ".md" and file.exists():
            assert anchor in set(anchors(file)), f"{name_of(page)} links to {target}"


def test_every_page_is_in_the_navigation():
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in NAVIGATION, f"docs/{page.name} is in no menu"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pictures_have_words(page):
    for words, _ in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text(encoding="utf-8")):
        assert len(words) > 3, f"{name_of(page)}: a picture without a description"


def test_spelling():
    pytest.importorskip("codespell_lib", reason="the spelling test needs codespell: pip install -e '.[dev]'")
    targets = ["README.md", "CHANGELOG.md", "docs", "gspn2_diffusion", "examples", "benchmarks", "pipelines"]
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", "--skip", "*.svg,*.png,*.json,*.safetensors,assets", *targets],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
