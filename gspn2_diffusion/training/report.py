"""What a run did, as Markdown and pictures: `report.md`, `report.png`, `validation.png` in its folder.

python -m gspn2_diffusion.training.report RUN
python -m gspn2_diffusion.training.report RUN OTHER_RUN --compare distances.png
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from .arguments import LAYER_OPTIONS

logger = logging.getLogger(__name__)

STEM = "step-"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.

    Raises:
        FileNotFoundError: the folder has none.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no log.jsonl; pass the --output_dir of a training run.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_report(folder: Path) -> Path:
    """Writes the report of the run in `folder` from its log and validation pictures; returns the Markdown file."""
    lines = read_log(folder)
    if importlib.util.find_spec("matplotlib"):
        _plot_run(lines, folder / "report.png")
    else:
        # A night's run must not end in an error for a missing picture.
        logger.warning("No report.png, as matplotlib is missing; install it and run this module on %s.", folder)
    strips = stack_strips(folder / "validation")
    if strips is not None:
        strips.save(folder / "validation.png")
    options = json.loads((folder / "training_args.json").read_text())
    losses = [line for line in lines if "loss" in line]
    distances = [line for line in lines if "distance" in line]
    text = ["# Training report", ""]
    if losses:
        speeds = sorted(line["samples_per_second"] for line in losses)
        text += [
            f"- steps: {losses[-1]['step']}, loss {losses[0]['loss']:.4g} at step {losses[0]['step']}, "
            f"{losses[-1]['loss']:.4g} at the end",
            f"- steps without a finite gradient: {sum(line['skipped_steps'] for line in losses)}",
            f"- samples per second: {speeds[len(speeds) // 2]:.4g} (median of the log's lines)",
        ]
        if "peak_memory_gib" in losses[-1]:
            text.append(f"- peak memory of the first process: {losses[-1]['peak_memory_gib']:.2f} GiB")
    text += ["", "![losses, distance to the teacher, learning rate, samples per second](report.png)", ""]
    if distances:
        text += [
            "Squared distance to the teacher on held-out samples, relative to the teacher's own size:",
            "",
            "| step | output | attention outputs (mean) |",
            "|---|---|---|",
            *(f"| {row['step']} | {row['distance']:.4g} | {row['layer_distance']:.4g} |" for row in distances),
            "",
        ]
    if strips is not None:
        text += [
            "Validation pictures: the teacher's on top, then the student's, oldest first; columns: "
            + "; ".join(options["validation_prompts"])
            + ".",
            "",
            "![validation pictures](validation.png)",
            "",
        ]
    idle = () if options.get("adapter") is None else LAYER_OPTIONS
    shown = (f"{key}: {json.dumps(value)}" for key, value in options.items() if value is not None and key not in idle)
    text += ["Options:", "", "```yaml", *shown, "```", ""]
    path = folder / "report.md"
    path.write_text("\n".join(text))
    return path


def stack_strips(folder: Path) -> Image.Image | None:
    """The teacher's strip of pictures above the student's, in the order of their steps; None if there are none."""
    found = sorted(folder.glob(STEM + "*.png"), key=lambda path: int(path.stem[len(STEM) :]))
    strips = [Image.open(path) for path in [folder / "teacher.png", *found] if path.is_file()]
    if not found:
        return None
    whole = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole


def _plot_run(lines: list[dict[str, Any]], path: Path) -> None:
    panels = [
        ("loss", ["loss", "noise", "output", "guided", "layers"], True),
        ("distance to the teacher", ["distance", "layer_distance"], True),
        ("learning rate", ["lr"], False),
        ("samples per second", ["samples_per_second"], False),
    ]
    figure, axes = _figure(2, 2)
    for axis, (title, names, logarithmic) in zip(axes.flat, panels, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None, label=name)
        axis.set(title=title, xlabel="step", yscale="log" if logarithmic else "linear")
        if len(names) > 1:
            axis.legend()
    figure.savefig(path)


def plot_distances(folders: list[Path], path: Path) -> None:
    """The distance to the teacher over the steps of several runs (teacher start and random start, say)."""
    figure, axes = _figure(1, 2)
    for axis, (name, title) in zip(
        axes.flat, (("distance", "model's output"), ("layer_distance", "attention outputs")), strict=True
    ):
        for folder in folders:
            points = [(line["step"], line[name]) for line in read_log(folder) if name in line]
            axis.plot(*zip(*points, strict=True), marker=".", label=folder.name)
        axis.set(title=f"distance to the teacher: {title}", xlabel="step", yscale="log")
        axis.set_xscale("symlog", linthresh=100)
        axis.legend()
    figure.savefig(path)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="--output_dir of training runs")
    parser.add_argument("--compare", type=Path, help="plot the runs' distances to the teacher into this file")
    args = parser.parse_args()
    if args.compare:
        plot_distances(args.runs, args.compare)
        return
    for run in args.runs:
        print(write_report(run))


if __name__ == "__main__":
    main()
