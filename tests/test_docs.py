"""The documentation holds: every message has its entry, code blocks run, links lead somewhere, words are right."""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gspn2_diffusion.assets import tiny_adapter_path, tiny_scenes_path
from gspn2_diffusion.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAVIGATION = (ROOT / "mkdocs.yml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M))
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


class Accepted(Exception):
    """A script's own parser has read its command line; the argument is what it did not know."""


@pytest.fixture
def parse_only(monkeypatch):
    """Programs run as far as their arguments are read, by their own parsers."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self, *arguments, **options):
        raise Accepted(parse(self, *arguments, **options)[1])

    def check(where, words, program):
        try:
            with monkeypatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
                patch.setattr(sys, "argv", [word for word in words if word != "..."])
                program()
        except Accepted as accepted:
            assert accepted.args == ([],), f"{where}: {words[0]} does not know {accepted.args[0]}"
        except SystemExit:
            pytest.fail(f"{where}: {' '.join(words)} is refused")
        else:
            pytest.fail(f"{where}: {words[0]} reads no arguments")

    return check


def shell_commands(page):
    """(where, words) of each command in the page's shell blocks."""
    for line, text in blocks(page, "bash", "sh", "console"):
        where = f"{name_of(page)}, block at line {line}"
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0, where
        for command in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(command, comments=True):
                yield where, words


SHELL_PAGES = [page for page in PAGES if any(blocks(page, "bash", "sh", "console"))]
SHORT = {"generate": ["--steps", "1"], "evaluate": ["--steps", "1", "--limit", "1"], "info": []}
LAUNCHERS = {"python": 1, "torchrun": 1, "accelerate": 2}  # words before their own options and the script


@pytest.mark.parametrize("page", SHELL_PAGES, ids=name_of)
def test_shell_blocks_run(page, tmp_path, monkeypatch, parse_only):
    """`gspn2` with the shipped model runs, with one step. What needs the reader's files, installs, trains, serves or
    needs a GPU runs until its own parser has read its arguments, or, if it is make or pip, names a target or an extra
    that exists. No other command may stand there.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for where, words in shell_commands(page):
        program, rest = words[0], words[1:]
        if program == "make":
            for target in rest:
                assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"{where}: {target} is no target"
        elif words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\[(.*?)\]", " ".join(rest)):
                assert set(extra.split(",")) <= EXTRAS, f"{where}: {extra}"
        elif program == "gspn2" and rest[0] in SHORT and SHIPPED and "--model" not in rest:
            # Of 13 steps even a strength of 0.08 leaves one.
            assert main([*rest, *(["--steps", "13"] if "--upscale" in rest else SHORT[rest[0]])]) == 0, where
        elif program == "gspn2" or "--no_python" in rest:
            at = words.index("gspn2") + 1
            parse_only(where, words[at - 1 :], lambda rest=words[at:]: main(rest))
        elif program in LAUNCHERS and "-m" in rest:
            at = rest.index("-m") + 1
            parse_only(where, rest[at:], lambda name=rest[at]: runpy.run_module(name, run_name="__main__"))
        elif program in LAUNCHERS:
            at = next(index for index, word in enumerate(rest) if word.endswith(".py"))
            options, script = rest[LAUNCHERS[program] - 1 : at], ROOT / rest[at]
            assert all((ROOT / word).is_file() for word in options if word.endswith(".yaml")), where
            monkeypatch.syspath_prepend(script.parent)
            parse_only(where, rest[at:], lambda script=script: runpy.run_path(str(script), run_name="__main__"))
        else:
            pytest.fail(f"{where}: this test cannot run {program}")


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


# Figures

DEVICE = re.compile(r"\bEPYC\b|\b[HAB]\d00\b|\bRTX\b")
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
COMMAND = re.compile(r"`[^`\n]*\b(python|pytest|gspn2|accelerate|torchrun|make)\b|```bash")
FIGURE = re.compile(r"\d (%|(s|ms|us|MB|GiB|GB/s|TB/s|images/s|cores)\b)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_say_where_they_come_from(page):
    """A section with figures of a device says when, and its page with which command; a table of figures is on a page
    that names the device, or in a section that names a source (arXiv) or says that they are computed."""
    text = page.read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        where = f"{name_of(page)}, {section.partition(chr(10))[0]!r}"
        if DEVICE.search(section) and FIGURE.search(section) and "arXiv" not in section:
            assert DATE.search(section) and COMMAND.search(text), f"{where}: a device without its date or command"
        table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
        if FIGURE.search(table):
            assert re.search(r"arXiv|comput|plan", section) or DEVICE.search(text), f"{where}: figures of no device"
