"""The training script of the shipped model: an interrupted run goes on as if it had not been, and all stages run."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspn2_diffusion.assets import tiny_scenes_path
from gspn2_diffusion.evaluation import evaluate_pipeline, load_prompts
from gspn2_diffusion.loading import load_pipeline

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    sys.path[:0] = [str(EXAMPLES / "scenes"), str(EXAMPLES / "tiny_model")]
    import scenes

    out = tmp_path_factory.mktemp("scenes")
    lines = []
    (out / "000").mkdir()
    for i in range(8):
        lines.append(scenes.json.dumps(scenes.write_one(i, out, seed=0, size=128)))
    (out / "metadata.jsonl").write_text("\n".join(lines))
    return out


def run(monkeypatch, data: Path, out: Path, *flags: str) -> None:
    import train

    common = ["--data", str(data), "--out", str(out), "--device", "cpu", "--batch", "4", "--log_every", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *common, *flags])
    train.main()


def test_interrupted_run_goes_on_exactly(monkeypatch, data, tmp_path) -> None:
    import train

    flags = ("--stage", "text", "--steps", "4", "--save_every", "1", "--ema", "0.9")
    run(monkeypatch, data, tmp_path / "whole", *flags)

    forward, calls = train.TextReader.forward, []

    def interrupted(self, captions):
        calls.append(captions)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, captions)

    with monkeypatch.context() as patch:
        patch.setattr(train.TextReader, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(patch, data, tmp_path / "halves", *flags)
    assert train.steps_done(tmp_path / "halves" / "text") == 2
    run(monkeypatch, data, tmp_path / "halves", *flags)
    whole, halves = (load_file(tmp_path / n / "text" / "checkpoint.safetensors") for n in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], rtol=1e-5, atol=1e-6, msg=name)


def test_stages_end_in_a_pipeline(monkeypatch, data, tmp_path) -> None:
    from diffusers import StableDiffusionPipeline

    for stage in ("vae", "text", "unet"):
        run(monkeypatch, data, tmp_path / "run", "--stage", stage, "--steps", "1")
    import export

    monkeypatch.setattr(sys, "argv", ["export.py", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "pipe")])
    export.main()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe("a red circle", num_inference_steps=1, output_type="pt").images.isfinite().all()


def test_joint_stage_ends_in_a_pipeline(monkeypatch, data, tmp_path) -> None:
    """Stable Diffusion 3 around the shipped VAE and text encoder, in as many steps as fit, then judged by SceneEval."""
    import export
    import train

    # A clock that ticks a second whenever it is read: two steps are timed, then a few more fit into 12 seconds.
    monkeypatch.setattr(train, "TIMED", 2)
    with monkeypatch.context() as patch:
        patch.setattr(train.time, "monotonic", itertools.count().__next__)
        run(patch, data, tmp_path, "--stage", "joint", "--fill", "--minutes", "0.2", "--ema", "0.9")
    assert 2 < train.steps_done(tmp_path / "joint") < 10
    monkeypatch.setattr(
        sys, "argv", ["export.py", "--stage", "joint", "--run", str(tmp_path), "--out", str(tmp_path / "p")]
    )
    export.main()
    pipe, _ = load_pipeline(tmp_path / "p", "none", device="cpu")
    result = evaluate_pipeline(pipe, load_prompts(limit=2), steps=1, progress=False)
    assert len(result.records) == 2 and result.settings["height"] == 128


def test_the_joint_models_text_encoder_is_the_trained_one(monkeypatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "tiny_model")
    import models
    from transformers import CLIPTextModel, CLIPTokenizer

    base = tiny_scenes_path()
    trained = CLIPTextModel.from_pretrained(base / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    ids = tokenizer(["two red circles", "a ring"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = trained(ids).last_hidden_state
        given = models.with_projection(trained)(ids, output_hidden_states=True)
        normed = torch.nn.functional.layer_norm(
            given.hidden_states[-2],
            (128,),
            *(trained.state_dict()[name] for name in trained.state_dict() if "final_layer_norm" in name),
        )
    torch.testing.assert_close(normed, expected)
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    torch.testing.assert_close(given.text_embeds, expected[range(2), ends])


def test_standardised_latents_decode_alike(monkeypatch, data, tmp_path) -> None:
    """Mean and deviation of the latents move into the 1 x 1 convolutions without changing what the VAE does."""
    import argparse

    import train
    from accelerate import Accelerator

    run(monkeypatch, data, tmp_path, "--stage", "vae", "--steps", "2")
    raw = train.make_vae().eval()
    raw.load_state_dict(train.stage_weights(tmp_path / "vae"))
    args = argparse.Namespace(data=data, out=tmp_path, limit=None)
    latents, vae = train.encode_all(args, Accelerator(cpu=True))
    assert latents.float().mean((0, 2, 3)).abs().max() < 1e-2
    torch.testing.assert_close(latents.float().std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)
    pictures = train.to_model(train.Folder(data).pictures(), "cpu")
    with torch.no_grad():
        mine, theirs = (v.decode(v.encode(pictures).latent_dist.mean).sample for v in (vae, raw))
        torch.testing.assert_close(vae.encode(pictures).latent_dist.mean, latents.float(), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_refuses_a_device_that_is_not_there(monkeypatch, data, tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="no CUDA device"):
        run(monkeypatch, data, tmp_path, "--stage", "text", "--device", "cuda")
