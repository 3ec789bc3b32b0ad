"""Draws docs/images/*.svg. The cones are what `gspn2_scan` does to an impulse, not an artist's idea of it:

python docs/draw.py
"""

from pathlib import Path

import torch

from gspn2_diffusion.ops import gspn2_scan

OUT = Path(__file__).parent / "images"
STYLE = (
    "<style>text{font:13px system-ui,sans-serif;fill:#24292f}.s{font-size:11px;fill:#57606a}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9da7b3}}</style>"
)
INK = "#4f46e5"


def svg(name: str, width: int, height: int, title: str, parts: list[str]) -> None:
    body = "\n".join(parts)
    OUT.mkdir(exist_ok=True)
    (OUT / name).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{title}">\n<title>{title}</title>\n{STYLE}\n{body}\n</svg>\n'
    )


def cell(x: float, y: float, side: float, level: float, ring: bool = False) -> str:
    stroke = ' stroke="#f97316" stroke-width="2"' if ring else ' stroke="#8c959f" stroke-width="0.4"'
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" fill="{INK}" '
        f'fill-opacity="{level:.3f}"{stroke}/>'
    )


def cones(n: int = 11, side: int = 13) -> None:
    """One impulse in the middle, lam = u = 1, equal taps: what each direction carries where."""
    x = torch.zeros(1, n, n, 1)
    x[0, n // 2, n // 2] = 1
    lit = gspn2_scan(x, None, None, torch.zeros(1, n, n, 4, 1, 3))[0, :, :, :, 0]
    gap, parts = 18, []
    for k, name in enumerate(("right", "left", "down", "up", "all four")):
        left = 6 + k * (n * side + gap)
        values = lit.sum(-1) if k == 4 else lit[:, :, k]
        for i in range(n):
            for j in range(n):
                level = min(1.0, float(values[i, j])) ** 0.5
                parts.append(cell(left + j * side, 26 + i * side, side, level, i == j == n // 2))
        parts.append(f'<text x="{left + n * side / 2:g}" y="16" text-anchor="middle">{name}</text>')
    svg("cones.svg", 5 * (n * side + gap) - 6, 34 + n * side, "What one pixel reaches in each scan direction", parts)


def step(side: int = 44) -> None:
    """The recurrence: three neighbours of the line before, and the pixel's own input."""
    parts = []
    for line, (x, label) in enumerate(((40, "line i-1"), (220, "line i"))):
        for j in range(5):
            level = (0.5 if j in (1, 2, 3) else 0.08) if line == 0 else (0.85 if j == 2 else 0.08)
            parts.append(cell(x, 40 + j * side, side, level, line == 1 and j == 2))
        parts.append(f'<text x="{x + side / 2}" y="28" text-anchor="middle">{label}</text>')
    centre = 40 + 2.5 * side
    for tap, j in ((-1, 1), (0, 2), (1, 3)):
        y = 40 + (j + 0.5) * side
        parts.append(f'<path d="M{40 + side},{y:g} L218,{centre + tap * 8:g}" stroke="{INK}" fill="none"/>')
        parts.append(f'<text class="s" x="{110}" y="{y - 6 + (centre - y) * 0.35:g}">w[{tap:+d}]</text>')
    parts.append(f'<path d="M330,{centre:g} L268,{centre:g}" stroke="#f97316" fill="none"/>')
    parts.append(f'<text x="336" y="{centre + 4:g}">lam · x</text>')
    parts.append(f'<text class="s" x="300" y="{40 + 4.3 * side:g}">the three weights</text>')
    parts.append(f'<text class="s" x="300" y="{40 + 4.3 * side + 15:g}">sum to 1</text>')
    svg("step.svg", 420, 50 + 5 * side, "One step of the scan: three weights from the line before", parts)


def who_reads_whom(n: int = 7, side: int = 18) -> None:
    """Pairs that are computed: all of them for attention, neighbours of the line before for the scan."""
    parts = []
    for which, (left, name, note) in enumerate(
        (
            (6, "attention", "each of N pixels reads all N"),
            (250, "scan, four directions", "each reads 4 x 3 neighbours"),
        )
    ):
        middle = (left + (n // 2 + 0.5) * side, 26 + (n // 2 + 0.5) * side)
        for i in range(n):
            for j in range(n):
                near = max(abs(i - n // 2), abs(j - n // 2)) == 1
                parts.append(cell(left + j * side, 26 + i * side, side, 0.06, i == j == n // 2))
                if (which == 0 or near) and not i == j == n // 2:
                    x, y = left + (j + 0.5) * side, 26 + (i + 0.5) * side
                    parts.append(
                        f'<path d="M{x:g},{y:g} L{middle[0]:g},{middle[1]:g}" stroke="{INK}" stroke-opacity="0.7"/>'
                    )
        parts.append(f'<text x="{left}" y="16">{name}</text>')
        parts.append(f'<text class="s" x="{left}" y="{44 + n * side}">{note}</text>')
    svg("pairs.svg", 430, 56 + n * side, "Who reads whom: attention and the line scan", parts)


if __name__ == "__main__":
    cones()
    step()
    who_reads_whom()
