"""FID, KID and CLIP score: torchmetrics' classes against the formulas, computed apart; what is missing is named."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from gspn2_diffusion.cli import main
from gspn2_diffusion.evaluation import picture_metrics
from gspn2_diffusion.evaluation.picture_metrics import inception, list_pictures, load_clip
from gspn2_diffusion.loading import UserError

from . import tiny_models
from .training_runs import free_port, image_folder, start_command


class Pool(nn.Module):
    """uint8 (B, 3, H, W) -> (B, 12): means of quadrants."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 2).flatten(1)


def features(folder: Path) -> np.ndarray:
    """The same in numpy."""
    rows = []
    for path in sorted(folder.glob("*.png")):
        picture = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) / 255
        h, w = picture.shape[1] // 2, picture.shape[2] // 2
        rows.append([p.mean() for c in picture for p in (c[:h, :w], c[:h, w:], c[h:, :w], c[h:, w:])])
    return np.array(rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Real pictures, and generated ones of two sizes that are darker."""
    root = tmp_path_factory.mktemp("pictures")
    real = image_folder(root / "real", 30)
    made = image_folder(root / "made", 24, sizes=((16, 16), (24, 16)))
    for path in made.glob("*.png"):
        Image.open(path).point(lambda v: v // 2).save(path)
    return made, real


def test_fid_is_the_frechet_distance_of_two_gaussians(folders: tuple[Path, Path]) -> None:
    made, real = folders
    network = Pool()
    got = picture_metrics(made, real, ["fid"], features=network, batch_size=7, progress=False)
    a, b = features(made), features(real)
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert got["fid"] == pytest.approx(expected, rel=1e-4) and (got["pictures"], got["reference"]) == (24, 30)
    assert "forward" not in vars(network), "the shared cache stayed on the caller's module"
    assert picture_metrics(real, real, ["fid"], features=network, progress=False)["fid"] == pytest.approx(0, abs=1e-5)


def test_kid_is_the_unbiased_mmd_of_a_cubic_kernel(folders: tuple[Path, Path]) -> None:
    """Of subsets as large as the smaller side: all of the generated pictures, some of the real ones."""
    made, _ = folders
    network = Pool()
    got = picture_metrics(made, made.parent / "real", ["kid", "fid"], features=network, progress=False)
    a, b = features(made), features(made.parent / "real")
    n, kernel = len(a), lambda p, q: (p @ q.T / p.shape[1] + 1) ** 3
    inside = lambda p: (kernel(p, p).sum() - np.trace(kernel(p, p))) / (n * (n - 1))  # noqa: E731
    rng = np.random.default_rng(0)
    subsets = [b[rng.permutation(len(b))[:n]] for _ in range(400)]
    drawn = [inside(a) + inside(s) - 2 * kernel(a, s).mean() for s in subsets]
    assert got["kid"] == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 10)
    assert got["kid_std"] == pytest.approx(np.std(drawn), rel=0.5)
    runs = [size for size, _ in groupby(Image.open(path).size for path in sorted(made.glob("*.png")))]
    assert network.calls == 1 + len(runs), "not one pass for both: a batch of real pictures, and a run of each size"
    again = picture_metrics(made, made.parent / "real", ["kid"], features=network, progress=False)
    assert again["kid"] == got["kid"], "subsets depend on the seed alone"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP."""
    torch.manual_seed(0)
    text = dict(vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text |= dict(max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=16, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    size = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = CLIPProcessor(CLIPImageProcessor(**size), tiny_models.tokenizer())
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_clip_score_is_the_mean_cosine(folders: tuple[Path, Path], clip_folder: Path) -> None:
    made, _ = folders
    got = picture_metrics(made, metrics=["clip"], clip=clip_folder, batch_size=5, progress=False)
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    cosines = []
    for path, text in list_pictures(made, captions=True):
        inputs = processor(text=[text], images=Image.open(path).convert("RGB"), return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model(**inputs)
        cosines.append(float(nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)))
    assert got == {"pictures": 24, "clip": pytest.approx(max(100 * np.mean(cosines), 0), abs=1e-3)}


def test_what_is_missing_is_named(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, real = folders
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"torch-fidelity|Inception weights .* download https://"):
        inception()
    with pytest.raises(UserError, match=r"nobody/nothing is not in .*; run `hf download nobody/nothing`"):
        load_clip("nobody/nothing")
    with pytest.raises(ValueError, match="fid compare with real pictures"):
        picture_metrics(made, metrics=["fid"])
    with pytest.raises(ValueError, match=r"unknown metrics \['is'\]"):
        picture_metrics(made, metrics=["is"])
    with pytest.raises(UserError, match="has no pictures"):
        picture_metrics(tmp_path, real, ["fid"], features=Pool())
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.png")
    with pytest.raises(UserError, match=r"1 pictures of .* have no caption"):
        picture_metrics(tmp_path, metrics=["clip"])
    with pytest.raises(UserError, match="at least two pictures"):
        picture_metrics(tmp_path, real, ["fid"], features=Pool())
    for flags, message in (
        (["--metrics", "fid"], "pass --reference FOLDER"),
        (["--pictures", str(made)], "SceneEval makes its own pictures"),
    ):
        assert main(["evaluate", *flags, "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err


def test_evaluate_generates_then_scores_in_one_process_and_in_two(clip_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "a red fox"}\n{"prompt": "snow"}\n')
    flags = ["evaluate", "--device", "cpu", "--steps", "1", "--height", "64", "--width", "64", "--out", str(out)]
    flags += ["--metrics", "clip", "--clip-model", str(clip_folder), "--prompts", str(prompts), "--seeds", "0", "1"]
    flags += ["--batch-size", "2"]
    assert main(flags) == 0
    lines = [json.loads(line) for line in (out / "pictures" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [f"00000{place}.png" for place in range(4)]
    assert [(line["text"], line["seed"]) for line in lines] == [(t, s) for s in (0, 1) for t in ("a red fox", "snow")]
    result = json.loads((out / "metrics.json").read_text())
    again = picture_metrics(out / "pictures", metrics=["clip"], clip=clip_folder, progress=False)
    assert result["clip"] == again["clip"] and result["pictures"] == 4
    flags[flags.index(str(out))] = str(tmp_path / "two")
    port = free_port()
    ranks = [start_command(flags, rank, 2, port) for rank in range(2)]
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    for path in (out / "pictures").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "pictures" / path.name).read_bytes(), path.name
    shared = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert {**shared, "settings": {}} == {**result, "settings": {}}
    flags[flags.index(str(tmp_path / "two"))] = str(out)
    assert main(flags) == 1, "would score the old pictures with the new"
    flags[flags.index("--metrics") : flags.index("--clip-model")] = [
        "--metrics",
        "clip",
        "--pictures",
        f"{out}/pictures",
    ]
    assert main(flags) == 0
