"""The ablation benchmark: every variant is valid, and a toy run ends with a table; a second call runs nothing again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablations


def test_every_variant_changes_the_layer(tmp_path: Path) -> None:
    args = ablations.parse_args(["--out", str(tmp_path)])
    made = {
        name: ablations.training_arguments(args, options, 0, tmp_path).operator_config()
        for name, options in ablations.VARIANTS.items()
    }
    assert len({str(config) for config in made.values()}) == len(ablations.VARIANTS)


def test_a_toy_run_ends_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, docs = tmp_path / "out", tmp_path / "page.md"
    docs.write_text("before\n{}\nold\n{}\nafter\n".format(*ablations.MEASURED))
    flags = [
        *["--out", str(out), "--samples", "4", "--steps", "2", "--batch", "2", "--limit", "1", "--seeds", "1"],
        *["--inference-steps", "1", "--sizes", "64x64", "96x64", "--processes", "1", "--device", "cpu"],
        *["--variants", "decay 1 - lam", "--docs", str(docs)],
    ]
    ablations.main(flags)
    assert "failed" not in capsys.readouterr().out
    page = docs.read_text()
    assert page.startswith("before") and page.endswith("after\n") and "old" not in page
    assert "| decay 1 - lam | 1 | 109,960 |" in page and "| teacher (attention) | 1 |" in page
    assert (tmp_path / "images" / "ablations.svg").stat().st_size > 0
    result = json.loads((out / "results" / "decay-1---lam-seed0.json").read_text())
    assert set(result["sizes"]) == {"64x64", "96x64"} and result["distances"][-1]["step"] == 2

    written = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    ablations.main(flags)
    assert {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()} == written
    with pytest.raises(SystemExit, match="batch 2, now 4"):
        ablations.main([*flags, "--batch", "4"])
