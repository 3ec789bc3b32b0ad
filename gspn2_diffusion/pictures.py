"""Pictures beside one another, with words over them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8


def side_by_side(labelled: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Puts pictures of one height in a row, each under its label."""
    font = ImageFont.load_default(size=14)
    height = max(picture.height for _, picture in labelled)
    width = sum(picture.width for _, picture in labelled) + MARGIN * (len(labelled) + 1)
    canvas = Image.new("RGB", (width, height + 3 * MARGIN + 14), "white")
    draw = ImageDraw.Draw(canvas)
    left = MARGIN
    for label, picture in labelled:
        draw.text((left, MARGIN), label, fill="black", font=font)
        canvas.paste(picture, (left, 2 * MARGIN + 14))
        left += picture.width + MARGIN
    return canvas
