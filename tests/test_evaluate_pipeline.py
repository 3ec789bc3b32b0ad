"""evaluate_pipeline on the shipped pipeline: few steps, few prompts."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from gspn2_diffusion.assets import tiny_scenes_path
from gspn2_diffusion.cli import main
from gspn2_diffusion.evaluation import EvalPrompt, draw, evaluate_pipeline, load_prompts
from gspn2_diffusion.loading import UserError

from . import tiny_models
from .training_runs import free_port, start_command


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_scenes_path())


def test_shipped_pipeline_is_whole_and_small(pipe) -> None:
    assert sum(f.stat().st_size for f in tiny_scenes_path().rglob("*") if f.is_file()) < 20 * 2**20
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 128
    known = pipe.tokenizer("a large red circle to the left of two small blue squares, on a green background").input_ids
    assert len(known) == 17 + 2


def test_pictures_depend_on_seed_and_prompt_alone(pipe) -> None:
    prompts = load_prompts(limit=3)
    run = lambda chosen, batch: evaluate_pipeline(  # noqa: E731
        pipe, chosen, seeds=(0, 5), steps=2, batch_size=batch, height=64, width=64, progress=False
    )
    together, alone = run(prompts, 6), run(prompts[1:2], 1)
    assert [r["seed"] for r in together.records] == [0, 0, 0, 5, 5, 5]
    for ours, theirs in zip((together.pictures[1], together.pictures[4]), alone.pictures, strict=True):
        # Convolutions may sum in another order for another batch: a grey level, no more.
        difference = torch.tensor(list(ours.tobytes())).sub(torch.tensor(list(theirs.tobytes()))).abs()
        assert difference.max() <= 1


def test_result_writes_json_table_and_grid(pipe, tmp_path) -> None:
    result = evaluate_pipeline(pipe, load_prompts(limit=6), seeds=(1, 2), steps=1, height=64, width=64, progress=False)
    summary = result.summary()
    assert len(summary) == 7 and summary["overall"]["pictures"] == 12
    assert result.table().count("\n") == 8
    assert result.grid(columns=4).size == (4 * (64 + 6), 3 * (64 + 6))
    result.save_json(tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["summary"] == summary and len(saved["records"]) == 12 and saved["settings"]["steps"] == 1


def test_two_processes_write_the_same_bytes_as_one(tmp_path) -> None:
    """Seven pictures in batches of two: an uneven share for each."""
    flags = ["evaluate", "--adapter", "none", "--device", "cpu", "--steps", "1", "--height", "64", "--width", "64"]
    flags += ["--limit", "7", "--batch-size", "2", "--out"]
    assert main([*flags, str(tmp_path / "one")]) == 0
    port = free_port()
    ranks = [start_command([*flags, str(tmp_path / "two")], rank, 2, port) for rank in range(2)]
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    for name in ("scene_eval.json", "scene_eval.md", "scene_eval.png"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_transformers_are_drawn_from_the_seed_and_prompt_too() -> None:
    pipe = tiny_models.pixart_pipe()
    prompts = [EvalPrompt("a"), EvalPrompt("b")]
    options = dict(steps=1, height=32, width=32, progress=False)
    together = [drawn.image for drawn in draw(pipe, prompts, batch_size=2, **options)]
    alone = [drawn.image for drawn in draw(pipe, prompts[1:], batch_size=1, **options)]
    difference = torch.tensor(list(together[1].tobytes())).sub(torch.tensor(list(alone[0].tobytes()))).abs()
    assert difference.max() <= 1


def test_bad_input_is_refused_before_anything_is_generated(pipe) -> None:
    with pytest.raises(ValueError, match="names no shape"):
        evaluate_pipeline(pipe, [EvalPrompt("a circle", "x"), EvalPrompt("an astronaut", "x")])
    with pytest.raises(UserError, match="height is 100; this model needs a multiple of 8"):
        evaluate_pipeline(pipe, load_prompts(limit=1), height=100)
