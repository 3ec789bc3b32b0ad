"""Parameters survive the trip into a PNG and back; bad paths leave nothing behind."""

import os

import pytest
from PIL import Image

from gspn2_diffusion.png_info import read_png, save_png


def picture():
    return Image.effect_noise((33, 17), 40).convert("RGB")


def test_round_trip(tmp_path):
    image = picture()
    parameters = {"prompt": "ein roter Kreis über ☂", "seed": 2**53 - 1, "size": [128, 96], "adapter": None, "x": 0.1}
    path = save_png(image, tmp_path / "new folder" / "a.png", parameters)
    assert read_png(path) == parameters
    assert Image.open(path).tobytes() == image.tobytes()
    assert os.listdir(path.parent) == ["a.png"]


def test_other_programs_can_read_it(tmp_path):
    path = save_png(picture(), tmp_path / "a.png", {"prompt": "a"})
    assert b"iTXtgspn2\x00" in path.read_bytes()  # a standard PNG chunk, plain UTF-8


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_only_png(tmp_path, name):
    with pytest.raises(ValueError, match=r"does not end in \.png"):
        save_png(picture(), tmp_path / name, {})
    assert not list(tmp_path.iterdir())


def test_parameters_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="not JSON"):
        save_png(picture(), tmp_path / "a.png", {"seed": object()})
    assert not list(tmp_path.iterdir())


def test_unwritable_place(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        save_png(picture(), blocker / "a.png", {})
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError, match="cannot be written"):
        save_png(picture(), tmp_path / "a.png", {})
    assert sorted(os.listdir(tmp_path)) == ["a.png", "file"]


def test_reading_what_is_not_ours(tmp_path):
    picture().save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="carries no parameters"):
        read_png(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(OSError, match="is not a picture"):
        read_png(tmp_path / "text.png")
    with pytest.raises(OSError):
        read_png(tmp_path / "missing.png")
