"""Runs the family tests and prints the table of supported models, one row for each family, one column for each concern.

    python benchmarks/test_matrix.py --json newest.json
    python benchmarks/test_matrix.py --page docs/supported_models.md newest.json oldest.json

The first form runs the tests with the diffusers that is installed; the second makes the page from such runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gspn2_diffusion.patching.families import FAMILIES  # noqa: E402

CONCERNS = {
    "right grid": "test_right_grid",
    "equals the definition": "test_equals_the_definition",
    "text conditions image": "test_text_conditions_the_image",
    "remove exact": "test_remove_is_exact",
    "save / load": "test_save_and_load",
    "checkpointed step": "test_checkpointed_step",
}
KINDS = {
    "unet": "self-attention in a UNet",
    "transformers": "self-attention",
    "sd3": "joint attention, image-only `attn2`",
    "flux": "joint attention, single-stream blocks, packed tokens",
    "auraflow": "joint attention, single-stream blocks",
    "cogview4": "joint attention with shared projections",
    "qwenimage": "joint attention, complex rotary embeddings",
}


class Collector:
    """Keeps the outcome of each test of a family."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, list[str]]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Any:
        report = (yield).get_result()
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        if family and (report.when == "call" or report.outcome != "passed"):
            self.outcomes.setdefault(family, {}).setdefault(item.originalname, []).append(report.outcome)


def run() -> dict[str, Any]:
    """Runs the tests and returns their outcomes with the versions they ran with."""
    collector = Collector()
    pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_families.py")], plugins=[collector])
    versions = {module.__name__: module.__version__ for module in (diffusers, transformers, torch)}
    return {"versions": versions, "python": platform.python_version(), "outcomes": collector.outcomes}


def page(runs: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    lines = [
        "# Supported models",
        "",
        "Every class below is tested with a tiny real model of its own (`tests/test_families.py`). A tick means that "
        "the test passed with every diffusers version in the row; a dash, that the concern does not apply.",
        "",
        "| model class | models | kind | " + " | ".join(CONCERNS) + " | diffusers |",
        "|" + "---|" * (len(CONCERNS) + 4),
    ]
    for name, family in FAMILIES.items():
        ran, cells = [], []
        for entry in runs:
            if any("skipped" not in outcomes for outcomes in entry["outcomes"].get(name, {}).values()):
                ran.append(entry)
        for test in CONCERNS.values():
            outcomes = [outcome for entry in ran for outcome in entry["outcomes"][name].get(test, [])]
            if not outcomes or set(outcomes) == {"skipped"}:
                cells.append("-")
            else:
                cells.append("✓" if "failed" not in outcomes else "failed")
        kind = KINDS[family.find_sites.__module__.rpartition(".")[2]]
        versions = ", ".join(entry["versions"]["diffusers"] for entry in ran) or "not tested"
        lines.append(f"| `{name}` | {family.examples} | {kind} | " + " | ".join(cells) + f" | {versions} |")
    lines += [
        "",
        "Run with `python benchmarks/test_matrix.py`, on a CPU, on " + datetime.date.today().isoformat() + ":",
        "",
    ]
    for entry in runs:
        listed = ", ".join(f"{module} {version}" for module, version in entry["versions"].items())
        lines.append(f"- {listed}, Python {entry['python']}")
    return "\n".join(lines) + "\n" + NOTES


NOTES = """
## What joint attention becomes

Image tokens get the scan over the image plus softmax over the text tokens alone, with a learnt share for each head;
text tokens keep softmax over everything. Queries, keys, values, norms, rotary embeddings and both output projections
stay the model's own, so the cost is linear in the number of image tokens and the prompt keeps its way into the image.

## Limits

- `DiTTransformer2DModel` itself takes square maps only, `UNet2DModel` itself only sides that its levels can halve.
- Flux' IP-Adapter and SD3's work inside the joint attentions that are replaced: they are refused, with the way out in
  the message. IP-Adapters of Stable Diffusion and SDXL work.
- Chroma builds its attention mask for all pairs of tokens before it calls the attention; with a mask, memory stays
  quadratic in the image.
- Flux, Chroma and Flux.2 learn the map's sides from `img_ids`, which waits for the device once for each tensor. The
  whole model compiles into one graph (`torch.compile(fullgraph=True)`), in which the sides are constants: another
  number of tokens compiles it anew, other sides of the same number raise an error that says so. The compiled blocks
  alone (`compile_repeated_blocks`) take any.
- Flux.2's cache of reference keys (`kv_cache_mode`) has no meaning for a scan and is refused.
- Reference images (Kontext, Qwen-Image-Edit, Flux.2) are scanned beside the image on one canvas, aligned at the top.
- Context parallelism is refused.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="run the tests and write their outcomes here")
    parser.add_argument("--page", type=Path, help="write the page here, from the runs given")
    parser.add_argument("runs", nargs="*", type=Path, help="files that --json wrote, newest diffusers first")
    arguments = parser.parse_args()
    if arguments.json:
        arguments.json.write_text(json.dumps(run(), indent=1))
        return
    runs = [json.loads(path.read_text()) for path in arguments.runs] or [run()]
    if arguments.page:
        arguments.page.write_text(page(runs))
    else:
        print(page(runs))


if __name__ == "__main__":
    main()
