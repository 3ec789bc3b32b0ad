"""Paints docs/images/first_picture.png: six prompts with attention (above) and with GSPN-2 (below), same seed.

python docs/first_picture.py
"""

from pathlib import Path

from PIL import Image

from gspn2_diffusion import gspn2_disabled
from gspn2_diffusion.cli.generate import paint
from gspn2_diffusion.loading import GUIDANCE_SCALE, load_pipeline
from gspn2_diffusion.pictures import side_by_side

PROMPTS = (
    "four large cyan triangles",
    "a large blue ring, on a gray background",
    "three small pink circles, on a green background",
    "a small yellow cross above a large pink circle",
    "four small red squares",
    "a large cyan circle to the left of a large black circle",
)
SETTINGS = {
    "negative_prompt": None,
    "seed": 0,
    "steps": 25,
    "guidance_scale": GUIDANCE_SCALE,
    "height": 128,
    "width": 128,
}


def row(label: str, pictures: list[Image.Image]) -> Image.Image:
    return side_by_side([(label if index == 0 else "", picture) for index, picture in enumerate(pictures)])


def main() -> None:
    pipe, _ = load_pipeline(device="cpu")
    student = [paint(pipe, {"prompt": prompt, **SETTINGS}) for prompt in PROMPTS]
    with gspn2_disabled(pipe):
        teacher = [paint(pipe, {"prompt": prompt, **SETTINGS}) for prompt in PROMPTS]
    above, below = row("attention", teacher), row("GSPN-2", student)
    canvas = Image.new("RGB", (above.width, above.height + below.height), "white")
    canvas.paste(above, (0, 0))
    canvas.paste(below, (0, above.height))
    canvas.save(Path(__file__).parent / "images" / "first_picture.png", optimize=True)


if __name__ == "__main__":
    main()
