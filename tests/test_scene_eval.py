"""SceneEval against rendered truth: it must believe what was drawn, and nothing else."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "scenes"))
import scenes

from gspn2_diffusion.evaluation import CATEGORIES, Group, judge, load_prompts, parse_prompt, read_picture

SEED = 20


def drawn(number: int, width: int = 128, height: int = 128, seed: int = SEED):
    for i in range(number):
        scene, caption = scenes.training_scene(i, seed)
        yield scenes.render(scene, width, height), caption


@pytest.mark.parametrize(
    ("width", "height", "number"), [(128, 128, 200), (256, 128, 30), (128, 256, 30), (256, 256, 30), (1024, 1024, 3)]
)
def test_believes_what_was_drawn(width: int, height: int, number: int) -> None:
    passed = [judge(picture, caption).passed for picture, caption in drawn(number, width, height)]
    assert np.mean(passed) >= 0.99, f"seed {SEED}"


@pytest.mark.parametrize(("blur", "noise"), [(1.0, 0.0), (0.0, 10.0), (1.0, 8.0)])
def test_survives_blur_and_noise(blur: float, noise: float) -> None:
    rng = np.random.default_rng(SEED)
    passed = []
    for picture, caption in drawn(50):
        worn = ndimage.gaussian_filter(picture.astype(np.float32), (blur, blur, 0))
        worn = np.clip(worn + rng.normal(0, noise, worn.shape), 0, 255).astype(np.uint8)
        passed.append(judge(worn, caption).passed)
    assert np.mean(passed) >= 0.97, f"seed {SEED}"


def test_shuffled_prompts_are_near_chance() -> None:
    pictures, captions = zip(*drawn(100), strict=True)
    passed = [judge(picture, captions[i - 7]).passed for i, picture in enumerate(pictures)]
    assert np.mean(passed) <= 0.03, f"seed {SEED}"


@pytest.mark.parametrize("claim", ["colour", "size", "shape", "count", "relation", "background"])
def test_one_wrong_word_fails(claim: str) -> None:
    truth = {
        "count": "two",
        "size": "small",
        "colour": "red",
        "shape": "squares",
        "relation": "above",
        "ground": "blue",
    }
    wrong = {
        "count": "three",
        "size": "large",
        "colour": "pink",
        "shape": "rings",
        "relation": "below",
        "ground": "green",
    }
    text = "{count} {size} {colour} {shape} {relation} a large green circle on a {ground} background"
    groups = (Group("square", "red", "small", 2), Group("circle", "green", "large"))
    scene = scenes.Scene(groups, ((0.3, 0.25), (0.7, 0.25), (0.5, 0.75)), "above", "blue", "plain")
    picture = scenes.render(scene)
    key = "ground" if claim == "background" else claim
    assert judge(picture, text.format(**truth)).passed
    verdict = judge(picture, text.format(**{**truth, key: wrong[key]}))
    assert not verdict.passed
    assert [c for c, held in verdict.claims.items() if not held]


def test_an_extra_object_fails() -> None:
    scene = scenes.Scene((Group("ring", "red", "large", 2),), ((0.3, 0.5), (0.7, 0.5)), None, "white", "plain")
    assert judge(scenes.render(scene), "a red ring").claims["nothing else"] is False


def test_reads_a_blank_picture_and_pil_modes() -> None:
    blank = Image.new("RGBA", (64, 64), (255, 205, 225, 255))
    reading = read_picture(blank)
    assert reading.objects == () and reading.background == "pink" and reading.pattern == "plain"
    assert not judge(blank, "a circle").passed


def test_parses_phrasings() -> None:
    claims = parse_prompt(
        "A picture of a big grey-backed red circle under 2 little squares, on a striped grey background"
    )
    assert claims.groups == (Group("circle", "red", "large"), Group("square", None, "small", 2))
    assert (claims.relation, claims.background, claims.pattern) == ("below", "gray", "striped")
    with pytest.raises(ValueError, match="names no shape"):
        parse_prompt("an astronaut on the moon")


def test_held_out_prompts_are_held_out() -> None:
    prompts = load_prompts()
    assert len(prompts) == len({p.prompt for p in prompts}) == 600
    assert [sum(p.category == c for p in prompts) for c in CATEGORIES] == [100] * 6
    assert all(scenes.holds_out(parse_prompt(p.prompt)) for p in prompts)
    assert not any(scenes.holds_out(scenes.training_scene(i, 0)[0]) for i in range(500))
    assert [vars(p) for p in prompts] == [
        {"prompt": p["prompt"], "category": p["category"]} for p in scenes.held_out_prompts(600, seed=1)
    ]


def test_writes_an_image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scenes.py", "--out", str(tmp_path), "--num", "5", "--workers", "1"])
    scenes.main()
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 5
    for i, line in enumerate(map(scenes.json.loads, lines)):
        picture = Image.open(tmp_path / line["file_name"])
        assert picture.size == (128, 128)
        assert line["text"] == scenes.training_scene(i, 0)[1]
        assert judge(picture, line["text"]).passed


def test_the_mix_of_a_training_set_is_what_was_asked_for(tmp_path: Path) -> None:
    found = [scenes.training_scene(i, 0, (0.0, 0.0, 1.0, 0.0))[0] for i in range(40)]
    assert all(len(scene.groups) == 2 and scene.relation is None for scene in found)
    script = Path(scenes.__file__)
    command = [sys.executable, str(script), "--out", str(tmp_path), "--num", "2", "--mix", "1", "1", "0", "0"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "which sum to 2; pass four shares that sum to 1" in refused.stderr
