"""The demo's pictures in the documentation: docs/images/demo.png, demo_sight.png and demo_time.png.

    python docs/demo_pictures.py

Needs the extras [demo] and [dev] and Chromium (`apt-get install chromium`). Run it again when the demo or the shipped
model has changed. `demo_time.png` holds a measurement of the machine at hand: leave that machine alone meanwhile.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from gspn2_diffusion.demo import launch

IMAGES = Path(__file__).resolve().parent / "images"
PATIENCE = 300_000  # milliseconds


def keep(page: Page, name: str) -> None:
    """The page up to its last element, in few colours: a third of the file."""
    page.wait_for_timeout(1500)  # transitions, and pictures that are still being fetched
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
    print(f"docs/images/{name}: {picture.width} x {picture.height}, {(IMAGES / name).stat().st_size // 1024} KB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a large blue ring, on a gray background")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    demo, address = launch(device="cpu", block=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 480})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.locator("#prompt textarea").fill(args.prompt)
        page.locator("#seed input").fill(str(args.seed))
        page.locator("#compare input").check()
        page.locator("#paint").click()
        page.locator("#status", has_text="GSPN-2, seed").wait_for()
        page.mouse.move(0, 0)
        keep(page, "demo.png")
        page.get_by_role("tab", name="What the scan sees").click()
        page.locator("#look").click()
        page.locator("#sight-status", has_text="Pixel").wait_for()
        keep(page, "demo_sight.png")
        page.get_by_role("tab", name="Time against resolution").click()
        page.locator("#measure").click()
        page.locator("#time-status", has_text="Measured").wait_for()
        keep(page, "demo_time.png")
        browser.close()
    demo.close()


if __name__ == "__main__":
    main()
