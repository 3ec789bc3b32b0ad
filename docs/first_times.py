"""Draws docs/images/first_times.png from the table "Times" of docs/kernel.md.

python docs/first_times.py
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

DOCS = Path(__file__).parent


def rows() -> list[tuple[str, float, float, float]]:
    """(work, floor, general kernel, boxes), times in microseconds."""
    section = (DOCS / "kernel.md").read_text().split("\n## Times")[1].split("\n## ")[0]
    pattern = r"^\| ((?:forward|backward)[^|]*?) \| ([\d.]+) us \| \**([\d.]+) us\** \| \**([\d.]+) us\** \|"
    found = re.findall(pattern, section, re.MULTILINE)
    return [(work, float(floor), float(general), float(boxes)) for work, floor, general, boxes in found]


def main() -> None:
    table = rows()
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(table) + 1), layout="constrained")
    for offset, column, label, colour in (
        (-0.25, 2, "general kernel", "#c7cbd6"),
        (0.0, 3, "boxes", "#6366f1"),
        (0.25, 1, "floor: every element moved once", "#22a06b"),
    ):
        places = [place + offset for place in range(len(table))]
        axes.barh(places, [row[column] for row in table], 0.24, label=label, color=colour)
    axes.set_yticks(range(len(table)), [row[0].replace(", the first GSPN's work,", " (first GSPN)") for row in table])
    axes.set(xscale="log", xlabel="microseconds, one H100, bf16, 2026-11-24")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(DOCS / "images" / "first_times.png", dpi=110)


if __name__ == "__main__":
    main()
