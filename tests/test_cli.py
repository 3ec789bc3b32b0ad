"""The command line on a tiny real pipeline saved to a folder."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
import torch
from gspn2_diffusion.pipelines.gspn2_upscale import GSPN2UpscalePipeline
from PIL import Image

from gspn2_diffusion import GSPN2Config, apply_gspn2
from gspn2_diffusion.cli import main
from gspn2_diffusion.loading import load_pipeline
from gspn2_diffusion.png_info import read_png

from . import tiny_models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_models.sd_pipe().save_pretrained(folder / "pipe")
    pipe = tiny_models.sd_pipe()
    apply_gspn2(pipe, config=GSPN2Config(init="random")).save_pretrained(folder / "adapter")
    return ["--model", str(folder / "pipe"), "--adapter", str(folder / "adapter")]


def generate(*arguments):
    return main(["generate", *arguments, "--device", "cpu", "--steps", "2"])


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_picture_with_its_parameters(model, tmp_path, capsys):
    assert generate("a b", *model, "--height", "32", "--width", "48", "--seed", "3", "--out", str(tmp_path)) == 0
    path = tmp_path / "a-b-3.png"
    assert str(path) in capsys.readouterr().out
    assert pixels(path).shape == (32, 48, 3)
    parameters = read_png(path)
    assert (parameters["prompt"], parameters["seed"], parameters["height"], parameters["width"]) == ("a b", 3, 32, 48)


def test_the_seed_makes_the_picture_and_the_adapter_changes_it(model, tmp_path):
    for folder in ("one", "two"):
        generate("a", *model, "--out", str(tmp_path / folder), "--num-images", "2")
    assert (pixels(tmp_path / "one/a-0.png") == pixels(tmp_path / "two/a-0.png")).all()
    assert (pixels(tmp_path / "one/a-0.png") != pixels(tmp_path / "one/a-1.png")).any()
    generate("a", *model[:2], "--adapter", "none", "--out", str(tmp_path / "attention"))
    assert (pixels(tmp_path / "one/a-0.png") != pixels(tmp_path / "attention/a-0.png")).any()


def test_compare_shows_both(model, tmp_path):
    """Cut out of the comparison, the two pictures are those made alone."""
    generate("a", *model, "--compare", "--out", str(tmp_path / "both.png"))
    generate("a", *model, "--out", str(tmp_path / "student.png"))
    generate("a", *model[:2], "--adapter", "none", "--out", str(tmp_path / "teacher.png"))
    both, student, teacher = (pixels(tmp_path / f"{name}.png") for name in ("both", "student", "teacher"))
    rows, columns = student.shape[:2]
    top = both.shape[0] - rows - 8
    assert (both[top : top + rows, 8 : 8 + columns] == teacher).all()
    assert (both[top : top + rows, 16 + columns : 16 + 2 * columns] == student).all()


def test_upscaling_keeps_its_stages_and_goes_on_from_them(model, tmp_path, capsys):
    options = ["--height", "64", "--width", "48", "--upscale", "--strengths", "0.5", "--guidance-scales", "1"]
    assert generate("a b", *model, *options, "--seed", "3", "--out", str(tmp_path)) == 0
    assert "64 x 48" not in (planned := capsys.readouterr().err) and "48 x 64" in planned and "fits" in planned
    parameters = read_png(tmp_path / "a-b-3.png")
    assert parameters["guidance_scales"] == [1.0] and parameters["strengths"] == [0.5]

    pipe, _ = load_pipeline(model[1], model[3], device=torch.device("cpu"))
    large = GSPN2UpscalePipeline.from_pipe(pipe)
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "strengths": [0.5], "guidance_scales": [1.0]}
    expected = large("a b", 64, 48, generator=torch.Generator().manual_seed(3), **call).images[0]
    assert (pixels(tmp_path / "a-b-3.png") == np.asarray(expected)).all()

    stages = sorted((tmp_path / "a-b-3-stages").glob("*.png"))
    assert [path.name for path in stages] == ["stage_1_24x32.png", "stage_2_48x64.png"]
    stages[1].unlink()
    (tmp_path / "a-b-3.png").unlink()
    made = stages[0].stat().st_mtime_ns
    generate("a b", *model, *options, "--seed", "3", "--out", str(tmp_path))
    assert (pixels(tmp_path / "a-b-3.png") == np.asarray(expected)).all() and stages[0].stat().st_mtime_ns == made


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "There is no prompt"),
        (["  "], "There is no prompt"),
        (["a", "--height", "33"], "height is 33; this model needs a multiple of"),
        (["a", "--model", "/nowhere/at/all"], "could not be loaded"),
        (["a", "--adapter", "/nowhere/at/all"], "adapter could not be applied"),
        (["a", "--out", "/dev/null/folder"], "cannot be written to"),
        (["a", "b", "--out", "one.png"], "names one file for 2 pictures"),
        (["a", "--out", "one.jpg"], "names a .jpg file; pictures are PNG"),
        (["a", "--device", "cuda"], "CUDA was asked for"),
        (["a", "--device", "toaster"], "is not one that PyTorch knows"),
        (["a", "--adapter", "none", "--compare"], "needs an adapter"),
        (["a", "--guidance-scales", "1"], "--guidance-scales would have no effect; add --upscale"),
        (["a", "--upscale", "--height", "64", "--strengths", "2"], "strengths is (2.0,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_explained_in_a_sentence_and_nothing_is_written(
    model, tmp_path, monkeypatch, capsys, arguments, message
):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert main(["generate", *model, *arguments, *device, "--steps", "1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("gspn2 generate: ")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    "option",
    [
        ["--steps", "-1"],
        ["--steps", "x"],
        ["--hieght", "64"],
        ["--seed", "-1"],
        ["--guidance-scale", "nan"],
        ["--guidance-scale", "x"],
    ],
    ids=str,
)
def test_misspelt_and_impossible_options_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a", *option])
    assert stopped.value.code == 2 and option[0] in capsys.readouterr().err


def test_info_lists_what_there_is(capsys):
    assert main(["info", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "UNet2DConditionModel" in text and "Scan:" in text


def test_evaluate_writes_verdicts_table_and_pictures(model, tmp_path, capsys):
    arguments = [*model, "--limit", "7", "--seeds", "0", "1", "--device", "cpu", "--steps", "1", "--batch-size"]
    for size in ("4", "3"):
        assert main(["evaluate", *arguments, size, "--out", str(tmp_path / size)]) == 0
    result, other = (json.loads((tmp_path / size / "scene_eval.json").read_text()) for size in ("4", "3"))
    assert len(result["records"]) == 14 and result["summary"]["overall"]["pictures"] == 14
    assert [r["claims"] for r in result["records"]] == [r["claims"] for r in other["records"]]
    assert "overall" in (tmp_path / "4" / "scene_eval.md").read_text() and "overall" in capsys.readouterr().out
    assert pixels(tmp_path / "4" / "scene_eval.png").shape[2] == 3
    broken = tmp_path / "broken.jsonl"
    for text, message in (("not json", "could not be read"), ('["a"]', "could not be read"), ("\n", "has no prompts")):
        broken.write_text(text)
        assert main(["evaluate", *model, "--prompts", str(broken), "--out", str(tmp_path)]) == 1
        assert f"broken.jsonl {message}" in capsys.readouterr().err


def test_distill_hands_its_flags_to_the_training_script(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--misspelt"])
    assert "--misspelt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    assert "--max_train_steps" in capsys.readouterr().out


def test_distill_explains_mistakes_in_a_sentence(model, tmp_path, capsys):
    def complaint(*flags):
        assert main(["distill", *flags, "--output_dir", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    data = "--train_data_dir", str(tmp_path)
    assert "has no metadata.jsonl" in complaint("--pretrained_model_name_or_path", model[1], *data)
    assert "could not be loaded" in complaint("--pretrained_model_name_or_path", "/nowhere/at/all", *data)


def test_the_demo_refuses_a_port_that_cannot_be(capsys):
    pytest.importorskip("gradio")
    assert main(["demo", "--port", "99999", "--device", "cpu"]) == 1
    assert "cannot listen on 127.0.0.1, port 99999" in capsys.readouterr().err


def test_plan_prints_time_and_memory(model, capsys):
    assert main(["plan", *model, "--device", "cpu", "--height", "32", "--width", "64"]) == 0
    assert "GiB" in capsys.readouterr().out
    assert main(["plan", *model, "--device", "cpu", "--height", "33", "--width", "64"]) == 1


def test_a_reader_that_stops_reading_is_no_error(monkeypatch):
    """As under `head`: a pipe that nobody reads from."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info"]) == 0
