"""Runs the tests of families and neighbours and prints the page of supported models: a row for each family with a
column for each concern, and a row for each neighbour with a column for each diffusers.

    python benchmarks/test_matrix.py --json newest.json
    python benchmarks/test_matrix.py --page docs/supported_models.md newest.json oldest.json

The first form runs the tests with the diffusers that is installed; the second makes the page from such runs. Several
runs with one diffusers count together.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import sys
from importlib import metadata
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


NEIGHBOURS = {
    "img2img and inpaint by `from_pipe`": ("test_pipelines_share_the_patched_unet", "test_other_tasks_from_pipe"),
    "ControlNet beside, and itself patched": (
        "test_controlnet_beside_and_patched",
        "test_controlnet_from_a_patched_unet",
    ),
    "LoRA, loaded before or after": ("TestLora",),
    "IP-Adapter of UNets, loaded before or after": ("test_ip_adapter_in_either_order",),
    "IP-Adapter inside joint attention (SD3, Flux.1, Chroma), loaded before or after": ("test_ip_adapters.py",),
    "perturbed-attention guidance": ("test_perturbed_attention_guidance_keeps_its_own", "test_pag_pipeline"),
    "`set_attn_processor`, attention slicing, `fuse_qkv_projections`": ("test_are_noticed_and_put_back",),
    "sequential and group CPU offload, before or after": ("TestOffloading",),
    "layerwise casting (float8), before or after": ("test_layerwise",),
    "torchao's int8 weights, base and layers": ("test_quantised_base",),
    "`torch.compile`: UNet and Flux in one graph, repeated blocks": ("TestCompile",),
    "first-block cache": ("test_first_block_cache",),
    "deepcopy and pickle": ("test_copies_and_pickles",),
    "`save_pretrained` of the patched pipeline": ("test_a_patched_pipeline_reloads_as_the_base_model",),
    "averaged weights (`EMAModel`)": ("test_averages_of_the_layers",),
    "DDP, two processes, other aspect ratios": ("test_ddp",),
    "context parallelism": ("test_context_parallelism_is_refused",),
}
"""What else touches a model -> the tests of it, by parts of their names."""
FILES = ("families", "neighbours", "ip_adapters", "patching", "parallel")


class Collector:
    """Keeps the outcome of each test of a family, and of each test of a neighbour."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, list[str]]] = {}
        self.neighbours: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        test, _, parameters = report.nodeid.partition("[")
        family = parameters.rstrip("]").split("-")[0]
        if family in FAMILIES and "test_families.py" in test:
            self.outcomes.setdefault(family, {}).setdefault(test.rpartition("::")[2], []).append(report.outcome)
        for neighbour, names in NEIGHBOURS.items():
            if any(name in test for name in names):
                self.neighbours.setdefault(neighbour, []).append(report.outcome)


def run(select: str) -> dict[str, Any]:
    """Runs the tests and returns their outcomes with the versions they ran with. `select`: pytest's -k."""
    collector = Collector()
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in FILES]
    pytest.main(["-q", "-p", "no:cacheprovider", "-k", select, *files], plugins=[collector])
    versions = {module.__name__: module.__version__ for module in (diffusers, transformers, torch)}
    versions |= {
        name: metadata.version(name) for name in ("accelerate", "peft", "torchao") if importlib.util.find_spec(name)
    }
    return {
        "versions": versions,
        "python": platform.python_version(),
        "outcomes": collector.outcomes,
        "neighbours": collector.neighbours,
    }


def verdict(outcomes: list[str]) -> str:
    if "failed" in outcomes:
        return "failed"
    return "✓" if "passed" in outcomes else "-"


def neighbours(runs: list[dict[str, Any]]) -> list[str]:
    """Lines of the second table."""
    versions = list(dict.fromkeys(entry["versions"]["diffusers"] for entry in runs))
    lines = [
        "## Neighbours",
        "",
        "What else touches a model, tested on tiny real ones (`tests/test_neighbours.py`, `test_ip_adapters.py`, "
        "`test_patching.py`, `test_parallel.py`). A dash: this diffusers does not have it, or the library was not "
        "there.",
        "",
        "| neighbour | outcome | " + " | ".join(f"diffusers {version}" for version in versions) + " |",
        "|" + "---|" * (len(versions) + 2),
    ]
    for neighbour, names in NEIGHBOURS.items():
        of = [(entry["versions"]["diffusers"], entry["neighbours"].get(neighbour, [])) for entry in runs]
        cells = [verdict([o for other, outcomes in of if other == version for o in outcomes]) for version in versions]
        outcome = "refused with a message" if any("refused" in name for name in names) else "works"
        outcome = "noticed and put back" if "test_are_noticed_and_put_back" in names else outcome
        lines.append(f"| {neighbour} | {outcome} | " + " | ".join(cells) + " |")
    return [*lines, ""]


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
            cells.append(verdict([o for entry in ran for o in entry["outcomes"][name].get(test, [])]))
        kind = KINDS[family.find_sites.__module__.rpartition(".")[2]]
        versions = ", ".join(entry["versions"]["diffusers"] for entry in ran) or "not tested"
        lines.append(f"| `{name}` | {family.examples} | {kind} | " + " | ".join(cells) + f" | {versions} |")
    lines += [
        "",
        *neighbours(runs),
        "Run with `python benchmarks/test_matrix.py`, on a CPU, on " + datetime.date.today().isoformat() + ":",
        "",
    ]
    described = []
    for entry in runs:
        listed = ", ".join(f"{module} {version}" for module, version in entry["versions"].items())
        described.append(f"- {listed}, Python {entry['python']}")
    lines += dict.fromkeys(described)
    return "\n".join(lines) + "\n" + NOTES


NOTES = """
## What joint attention becomes

Image tokens get the scan over the image plus softmax over the text tokens alone, with a learnt share for each head;
text tokens keep softmax over everything. Queries, keys, values, norms, rotary embeddings and both output projections
stay the model's own, so the cost is linear in the number of image tokens and the prompt keeps its way into the image.

## Limits

- `DiTTransformer2DModel` itself takes square maps only, `UNet2DModel` itself only sides that its levels can halve.
- Group offloading of diffusers 0.35 needs an accelerator; without one only sequential offloading is tested there.
- The IP-Adapter of Flux.1 and Chroma adds its term as diffusers defines it, linear in the image. SD3's reads the image
  and the prompt by one softmax; the image part is exact up to 32 x 32 tokens (512 px) and beyond that reads means over
  32 x 32 cells, to stay linear. What the means change in pictures of a trained model has not been measured. Other
  IP-Adapters inside joint attention are refused, with the way out in the message.
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
    parser.add_argument("--select", default="", help="only tests whose names match, as pytest's -k")
    parser.add_argument("--page", type=Path, help="write the page here, from the runs given")
    parser.add_argument("runs", nargs="*", type=Path, help="files that --json wrote, newest diffusers first")
    arguments = parser.parse_args()
    if arguments.json:
        arguments.json.write_text(json.dumps(run(arguments.select), indent=1))
        return
    runs = [json.loads(path.read_text()) for path in arguments.runs] or [run(arguments.select)]
    if arguments.page:
        arguments.page.write_text(page(runs))
    else:
        print(page(runs))


if __name__ == "__main__":
    main()
