"""The demo as a visitor meets it: Debian's Chromium, driven by Playwright, against the served page."""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from gspn2_diffusion.demo.library import Library
from gspn2_diffusion.demo.painting import Limits, Request, paint
from gspn2_diffusion.loading import GUIDANCE_SCALE
from gspn2_diffusion.png_info import read_png

from . import demo_folders

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytest.importorskip("gradio", reason="the demo needs Gradio: pip install 'gspn2-diffusion[demo]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright, see [dev]")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the browser tests need Chromium: apt-get install chromium")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 120_000  # milliseconds; a busy machine is slow, and no test waits longer than it must


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return demo_folders.save(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def address(folders):
    from gspn2_diffusion.demo import launch

    demo, address = launch([folders[0]], [folders[1]], device="cpu", limits=Limits(side=128), block=False)
    yield address.rstrip("/")
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """One open page and what it fetched from elsewhere."""

    def __init__(self, browser, address, width=1280, height=900):
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.elsewhere: list[str] = []
        self.page.on("request", self._note)
        self.address = address
        self.page.goto(address)
        self.page.wait_for_selector("#paint")
        self.set("steps", 2)

    def _note(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def set(self, field, value):
        box = self.page.locator(f"#{field} input[type=number], #{field} textarea").first
        box.fill(str(value))
        box.blur()

    def paint(self):
        self.page.locator("#paint").click()

    def finished(self, words="memory in use"):
        self.page.locator("#status", has_text=words).wait_for()
        return self.page.locator("#status").inner_text()

    def pictures(self):
        """The gallery's pictures, as files."""
        sources = self.page.locator("#gallery .grid-container img, #gallery .gallery-item img").evaluate_all(
            "images => images.map(image => image.src)"
        )
        return [urllib.request.urlopen(source).read() for source in dict.fromkeys(sources)]

    def toast(self):
        box = self.page.locator(".toast-body").first
        box.wait_for()
        return box.inner_text()


@pytest.fixture
def visit(browser, address):
    visitors = []

    def arrive(**size):
        visitors.append(Visitor(browser, address, **size))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.context.close()


def expected(folders, **changes):
    """What the request paints without a browser."""
    values = dict(
        prompt="a",
        negative_prompt="",
        seed=0,
        steps=2,
        guidance_scale=GUIDANCE_SCALE,
        height=32,
        width=32,
        model="painter",
        adapter="scans",
        num_images=1,
    )
    library = Library([folders[0]], [folders[1]], device="cpu")
    request = Request.checked(Limits(), **{**values, **changes})
    return [np.asarray(picture.image) for picture in paint(library, request, threading.Event())]


def test_generate_and_compare(visit, folders, tmp_path):
    """Both pictures are those of the request, carry it inside, and nothing is fetched from elsewhere."""
    visitor = visit()
    visitor.set("prompt", "a b")
    visitor.set("seed", 5)
    visitor.set("width", 48)
    visitor.page.locator("#compare input").check()
    visitor.paint()
    assert "attention, seed 5" in visitor.finished("GSPN-2, seed 5")
    visitor.page.locator("#slider img").first.wait_for()
    visitor.page.wait_for_function("document.querySelectorAll('#gallery img').length >= 2")
    files = visitor.pictures()
    wanted = expected(folders, prompt="a b", seed=5, width=48, compare=True)
    assert len(files) == 2
    for file, picture in zip(files, wanted, strict=True):
        assert (np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) == picture).all()
    (tmp_path / "picture.png").write_bytes(files[0])
    parameters = read_png(tmp_path / "picture.png")
    assert (parameters["prompt"], parameters["seed"], parameters["width"]) == ("a b", 5, 48)
    assert str(folders[0].parent) not in str(parameters)
    assert not visitor.elsewhere


def test_cancel(visit):
    visitor = visit()
    visitor.set("steps", 100)
    visitor.set("images", 8)
    visitor.paint()
    # Before its first step the request waits in Gradio's queue, where there is nothing of it to stop.
    visitor.page.locator("#gallery .progress-text", has_text="/800 steps").first.wait_for(state="attached")
    # The page's last word about a cancelled request: what it asks before that might be taken for the same.
    with visitor.page.expect_response(lambda response: response.url.endswith("/reset")):
        visitor.page.locator("#cancel").click()
    visitor.finished("Cancelled.")
    visitor.set("steps", 1)
    visitor.set("images", 1)
    visitor.paint()
    visitor.finished("GSPN-2, seed 0")


def test_bad_input_is_a_toast_and_the_next_request_works(visit):
    visitor = visit()
    visitor.set("prompt", "   ")
    visitor.paint()
    assert "The prompt is empty" in visitor.toast()
    visitor.set("prompt", "a")
    visitor.set("steps", 1)
    visitor.paint()
    visitor.finished()


def test_two_visitors_get_their_own_pictures(visit, folders):
    one, two = visit(), visit()
    one.set("seed", 1)
    two.set("seed", 2)
    two.set("height", 48)
    for visitor in (one, two):
        visitor.set("prompt", "a")
        visitor.paint()
    for visitor, changes in ((one, {"seed": 1}), (two, {"seed": 2, "height": 48})):
        visitor.finished(f"seed {changes['seed']}")
        visitor.page.locator("#gallery img").first.wait_for()
        picture = np.asarray(Image.open(io.BytesIO(visitor.pictures()[0])).convert("RGB"))
        assert (picture == expected(folders, **changes)[0]).all()


def test_what_the_scan_sees(visit):
    visitor = visit()
    visitor.page.get_by_role("tab", name="What the scan sees").click()
    visitor.page.locator("#look").click()
    visitor.page.locator("#sight img").first.wait_for()
    visitor.page.locator("#sight-status", has_text="step 1 of 2").wait_for()
    before = visitor.page.locator("#sight-status").inner_text()
    visitor.page.locator("#seen img").click(position={"x": 6, "y": 6})
    visitor.page.wait_for_function("before => document.querySelector('#sight-status').innerText != before", arg=before)
    assert "down 0.0.0" in visitor.page.locator("#reach").inner_text()


def test_time_against_resolution(visit):
    """All four curves are drawn, each in its colour."""
    from gspn2_diffusion.demo.app import CURVES

    visitor = visit()
    visitor.page.get_by_role("tab", name="Time against resolution").click()
    visitor.page.locator("#measure").click()
    visitor.page.locator("#time-status", has_text="Measured on cpu").wait_for()
    for colour in CURVES.values():
        visitor.page.locator(f"#plot svg path[stroke='{colour}']").first.wait_for(state="attached")


def test_narrow_screen(visit):
    """A telephone: on no tab does anything stick out sideways, and the picture comes before the settings."""
    visitor = visit(width=375, height=740)
    page, width = visitor.page, "document.documentElement.scrollWidth"
    visitor.set("steps", 1)
    visitor.paint()
    visitor.finished()
    assert page.evaluate(width) <= 375
    above, below = (page.locator(part).bounding_box()["y"] for part in ("#gallery", "#steps"))
    assert above < below
    page.locator(".overflow-menu button").first.click()
    page.get_by_text("What the scan sees").last.click()
    page.locator("#look").click()
    page.locator("#sight img").first.wait_for()
    page.locator("#reach", has_text="down 0.0.0").wait_for()
    assert page.evaluate(width) <= 375


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "pyproject.toml", __file__])
def test_no_file_of_the_machine_is_served(address, path):
    for route in ("gradio_api/file=", "file="):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{address}/{route}{path}")
        assert refusal.value.code in (403, 404)


def test_it_listens_on_this_machine_only(address):
    assert address.startswith("http://127.0.0.1:")
    assert not Path("/proc/net/tcp").exists() or not _listens_everywhere(int(address.rsplit(":", 1)[1]))


def _listens_everywhere(port):
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1] == f"00000000:{port:04X}" for line in lines)


def test_a_short_stress(address, folders):
    """The stress script's judge on two dozen requests from four clients; docs/demo.md has the long run."""
    script = Path(__file__).resolve().parent.parent / "benchmarks/stress_demo.py"
    specification = importlib.util.spec_from_file_location("stress_demo", script)
    module = sys.modules["stress_demo"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    offered = [str(folders[0])], [str(folders[1])]
    report = module.stress(address, psutil.Process(), *offered, requests=25, clients=4, steps=1)
    assert not report.failures
    assert (report.right, report.refused) == (21, 5)
