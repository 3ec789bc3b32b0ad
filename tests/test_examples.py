"""The notebook-style examples run from top to bottom, on tiny real models and with few steps."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from . import demo_folders

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.read_text().startswith("# %% [markdown]"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return demo_folders.save(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run_it(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run_it


def test_which_examples_are_notebooks():
    assert NOTEBOOKS == [
        "digits_classifier.py",
        "distil_your_folder.py",
        "high_resolution.py",
        "patch_a_pipeline.py",
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_are_well_formed(name):
    """Every cell of code parses by itself and every cell of words is a comment, so that notebook tools can split it."""
    for cell in re.split(r"^# %%", (EXAMPLES / name).read_text(), flags=re.MULTILINE)[1:]:
        title, _, body = cell.partition("\n")
        if "[markdown]" in title:
            assert all(line.startswith("#") or not line.strip() for line in body.splitlines())
        else:
            ast.parse(body)


def test_patch_a_pipeline(run, folders, capsys):
    run("patch_a_pipeline.py", "--model", folders[0], "--adapter", folders[1], "--steps", 1, "--prompt", "a")
    assert "paints what it painted before" in capsys.readouterr().out
    assert Image.open("outputs/patched.png").width > 2 * 32


def test_high_resolution(run, folders):
    arguments = ("--height", 48, "--width", 80, "--steps", 2, "--strengths", 0.5, "--prompt", "a")
    run("high_resolution.py", "--model", folders[0], "--adapter", folders[1], *arguments)
    assert Image.open("outputs/large/stage-2-80x48.png").size == (80, 48)


def test_digits_classifier(run, capsys):
    """It runs and reports both mixers; one epoch is too few to judge them by."""
    pytest.importorskip("sklearn", reason="the digits example needs scikit-learn: pip install scikit-learn")
    best = run("digits_classifier.py", "--epochs", 1)["best"]
    assert set(best) == {"Scan", "SoftmaxAttention"} and all(0 <= accuracy <= 1 for accuracy in best.values())
    assert len(re.findall(r"% right, [0-9.]+ s, \d+ parameters", capsys.readouterr().out)) == 2


def test_distil_your_folder(run, folders, tmp_path):
    pytest.importorskip("datasets", reason="training needs the extra [train]")
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    with (tmp_path / "pictures/metadata.jsonl").open("w") as metadata:
        for index in range(6):
            pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"pictures/{index}.png")
            metadata.write(json.dumps({"file_name": f"{index}.png", "text": "a b"}) + "\n")
    few = ("--max_train_steps", 1, "--layerwise_steps", 1, "--train_batch_size", 1, "--steps", 1, "--prompt", "a")
    run("distil_your_folder.py", "--model", folders[0], "--train_data_dir", "pictures", *few)
    assert (tmp_path / "outputs/distilled/adapter/config.json").is_file()
    assert (tmp_path / "outputs/distilled/comparison.png").is_file()
