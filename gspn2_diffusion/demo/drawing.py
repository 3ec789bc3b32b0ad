"""Pictures of what the scan sees: one row for each layer, one column for each direction, attention at the end."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .sight import Recording, attention_row, reach_in_tokens, scan_reach

TILE = 112
GAP = 6
LABELS = 96
# Anchors of a dark-to-bright scale whose brightness rises evenly, so that it also reads in grey.
SCALE = np.array([[12, 10, 40], [88, 24, 110], [190, 55, 85], [245, 140, 45], [252, 250, 190]], dtype=np.float32)


def heat(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A map of non-negative numbers as colours, as large as `size`; the square root makes the faint parts visible."""
    peak = float(values.max())
    level = np.sqrt(values / peak) if peak > 0 else np.zeros_like(values)
    at = level * (len(SCALE) - 1)
    low = np.clip(at.astype(int), 0, len(SCALE) - 2)
    part = (at - low)[..., None]
    colours = SCALE[low] * (1 - part) + SCALE[low + 1] * part
    return Image.fromarray(colours.round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def token_of(pixel: tuple[int, int], picture: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the token under pixel (x, y) of a picture of (width, height)."""
    row = min(pixel[1] * grid[0] // picture[1], grid[0] - 1)
    return row, min(pixel[0] * grid[1] // picture[0], grid[1] - 1)


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices, evenly over range(count), both ends among them."""
    picked = min(count, most)
    return sorted({round(index * (count - 1) / max(1, picked - 1)) for index in range(picked)})


def draw_sight(
    recording: Recording, pixel: tuple[int, int], most_layers: int = 16
) -> tuple[Image.Image, list[list[str | int]]]:
    """The figure for one pixel, and a table: layer, map, then for each direction the tokens within which 90 % of what
    the pixel's token sees lies.

    Each tile has its own scale: bright is where this pixel's token reads most.
    """
    picture = recording.image
    layers = [recording.layers[index] for index in spread(len(recording.layers), most_layers)]
    directions = layers[0].mixer.config.directions
    columns = [*directions, "all", "attention"]
    ratio = min(TILE / picture.width, TILE / picture.height)
    tile = (max(8, round(picture.width * ratio)), max(8, round(picture.height * ratio)))
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    top = 24
    canvas = Image.new(
        "RGB", (LABELS + (tile[0] + GAP) * len(columns), top + (tile[1] + GAP) * len(layers)), (255, 255, 255)
    )
    draw = ImageDraw.Draw(canvas)
    for index, name in enumerate(columns):
        draw.text((LABELS + index * (tile[0] + GAP) + tile[0] // 2, top // 2), name, "black", font, anchor="mm")
    table: list[list[str | int]] = []
    for index, layer in enumerate(layers):
        row, column = token_of(pixel, picture.size, layer.grid)
        seen = scan_reach(layer, row, column)
        attention = attention_row(layer, row, column)
        maps = [*seen, seen.sum(0), attention]
        y = top + index * (tile[1] + GAP)
        draw.multiline_text(
            (4, y + tile[1] // 2),
            f"{short(layer.name)}\n{layer.grid[0]} x {layer.grid[1]}",
            "black",
            small,
            anchor="lm",
        )
        for place, values in enumerate(maps):
            x = LABELS + place * (tile[0] + GAP)
            if values is None:
                draw.text((x + tile[0] // 2, y + tile[1] // 2), "not drawn", (110, 110, 110), small, anchor="mm")
                continue
            canvas.paste(heat(values.cpu().numpy(), tile), (x, y))
            mark(draw, (x, y), tile, layer.grid, (row, column))
        reach = [reach_in_tokens(part, name, row, column) for part, name in zip(seen, directions, strict=True)]
        table.append([short(layer.name), f"{layer.grid[0]} x {layer.grid[1]}", *reach])
    return canvas, table


def mark(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    size: tuple[int, int],
    grid: tuple[int, int],
    token: tuple[int, int],
) -> None:
    """A frame round one token of a tile."""
    left, right = (corner[0] + size[0] * (token[1] + side) // grid[1] for side in (0, 1))
    upper, lower = (corner[1] + size[1] * (token[0] + side) // grid[0] for side in (0, 1))
    draw.rectangle((left - 1, upper - 1, right, lower), outline=(90, 230, 255), width=1)


def short(name: str) -> str:
    """`down_blocks.0.attentions.1.transformer_blocks.0.attn1` as `down 0.1`, with what else tells layers apart."""
    parts = name.replace("_blocks", "").replace("_block", "").split(".")
    numbers = [part for part in parts[1:] if part.isdigit()]
    return f"{parts[0]} {'.'.join(numbers)}"


def enlargement(picture: Image.Image, side: int = 384) -> int:
    """The whole factor by which a small picture is shown larger, so that a point of it can be hit."""
    return max(1, side // max(picture.size))


def mark_pixel(picture: Image.Image, pixel: tuple[int, int]) -> Image.Image:
    """The picture, enlarged, with a ring round the chosen pixel."""
    factor = enlargement(picture)
    marked = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(marked)
    radius = max(4, min(marked.size) // 40)
    x, y = (int((place + 0.5) * factor) for place in pixel)
    for width, colour in ((4, "black"), (2, (90, 230, 255))):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)
    return marked
