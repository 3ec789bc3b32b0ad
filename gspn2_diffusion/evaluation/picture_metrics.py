"""FID, KID and CLIP score of a folder of pictures, by torchmetrics. Nothing is downloaded: weights are cached."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..loading import UserError

logger = logging.getLogger(__name__)

METRICS = ("fid", "kid", "clip")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIP_MODEL = "openai/clip-vit-large-patch14"
INSTALL = 'run `pip install "gspn2-diffusion[eval]"`'
FEW = 2048
"""FID's features; the covariance of fewer pictures is singular."""


def list_pictures(folder: Path, captions: bool = False) -> list[tuple[Path, str]]:
    """Pictures of a folder in the order of their names, with their captions (from metadata.jsonl), or empty ones.

    Raises:
        UserError: there are none, or a caption is asked for and missing.
    """
    if not folder.is_dir():
        raise UserError(f"The folder {folder} does not exist; pass one with pictures.")
    metadata, texts = folder / "metadata.jsonl", {}
    if captions and metadata.is_file():
        try:
            records = [json.loads(line) for line in metadata.read_text().splitlines() if line.strip()]
            texts = {record["file_name"]: record["text"] for record in records}
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"{metadata} cannot be read ({error!r}); each line needs file_name and text.") from error
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"The folder {folder} has no pictures ({', '.join(SUFFIXES)}); pass one that has.")
    named = [(path, path.relative_to(folder).as_posix()) for path in paths]
    if captions and (missing := [name for _, name in named if name not in texts]):
        raise UserError(
            f"{len(missing)} pictures of {folder} have no caption (first: {missing[0]}); CLIP score needs a "
            "metadata.jsonl with file_name and text."
        )
    return [(path, texts.get(name, "")) for path, name in named]


def picture_metrics(
    pictures: str | Path,
    reference: str | Path | None = None,
    metrics: Sequence[str] = METRICS,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    features: nn.Module | None = None,
    clip: str | Path = CLIP_MODEL,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float | int]:
    """Scores a folder of pictures.

    Args:
        pictures: folder of the pictures to score; for CLIP score with `metadata.jsonl` (file_name, text).
        reference: folder of real pictures, for FID and KID.
        metrics: some of "fid" (arXiv 1706.08500), "kid" (arXiv 1801.01401), "clip" (arXiv 2104.08718).
        features: what FID and KID compare: uint8 (B, 3, H, W) -> (B, N). None is the usual InceptionV3.
        clip: a CLIP model of the hub that is in the cache, or a folder.
        seed: of KID's subsets.

    Returns:
        `fid`, `kid` and `kid_std` (over its subsets), `clip`, and the numbers of pictures.

    Raises:
        UserError: a package, weights, a folder or captions are missing; the message says what to do.
        ValueError: an unknown metric, or FID or KID without a reference.
    """
    if unknown := sorted(set(metrics) - {*METRICS}):
        raise ValueError(f"unknown metrics {unknown}; choose from {', '.join(METRICS)}.")
    compared = [name for name in metrics if name in ("fid", "kid")]
    if compared and reference is None:
        raise ValueError(f"{' and '.join(compared)} compare with real pictures; pass a reference folder.")
    # Everything is looked up before anything is computed.
    found = list_pictures(Path(pictures), captions="clip" in metrics)
    real = list_pictures(Path(reference)) if compared and reference is not None else []
    if compared and min(len(found), len(real)) < 2:
        raise UserError("FID and KID need at least two pictures on each side; add some.")
    network, clip_model = load_networks(metrics, clip, features)
    result: dict[str, float | int] = {"pictures": len(found)}
    if network is not None:
        if "fid" in compared and min(len(found), len(real)) < FEW:
            logger.warning(
                "FID of %d pictures is biased; compare only with FID of as many.", min(len(found), len(real))
            )
        result["reference"] = len(real)
        result |= _compare(found, real, compared, network, torch.device(device), batch_size, seed, progress)
    if clip_model is not None:
        result["clip"] = _clip_score(found, clip_model, torch.device(device), batch_size, progress)
    return result


def load_networks(
    metrics: Sequence[str], clip: str | Path = CLIP_MODEL, features: nn.Module | None = None
) -> tuple[nn.Module | None, tuple[Any, Any] | None]:
    """What `picture_metrics` needs: the network of FID and KID, CLIP's model and processor; None where not asked for.

    Raises:
        UserError: a package or weights are missing.
    """
    if find_spec("torchmetrics") is None:
        raise UserError(f"FID, KID and CLIP score need torchmetrics; {INSTALL}.")
    compared = {"fid", "kid"} & set(metrics)
    return (features or inception()) if compared else None, load_clip(clip) if "clip" in metrics else None


def _batches(found: list[tuple[Path, str]], size: int) -> Iterator[tuple[Tensor, list[str]]]:
    """uint8 (B, 3, H, W) of pictures of one size that follow one another, and their captions."""

    def opened() -> Iterator[tuple[np.ndarray, str]]:
        for path, text in found:
            with Image.open(path) as image:
                yield np.asarray(image.convert("RGB")), text

    for _, run in groupby(opened(), key=lambda pair: pair[0].shape):
        while part := list(islice(run, size)):
            yield torch.from_numpy(np.stack([p for p, _ in part])).permute(0, 3, 1, 2), [text for _, text in part]


def _compare(
    found: list[tuple[Path, str]],
    real: list[tuple[Path, str]],
    names: list[str],
    network: nn.Module,
    device: torch.device,
    batch_size: int,
    seed: int,
    progress: bool,
) -> dict[str, float]:
    # Not from torchmetrics.image, which offers them only beside torch-fidelity.
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    from torchmetrics.wrappers import FeatureShare

    made: dict[str, Any] = {}
    if "fid" in names:
        made["fid"] = FrechetInceptionDistance(feature=network)
    if "kid" in names:
        made["kid"] = KernelInceptionDistance(feature=network, subset_size=min(1000, len(found), len(real)))
    # One pass through the network for both.
    shared = FeatureShare(made).to(device)
    try:
        with torch.no_grad(), tqdm(total=len(found) + len(real), desc="features", disable=not progress) as bar:
            for side, is_real in ((real, True), (found, False)):
                for batch, _ in _batches(side, batch_size):
                    shared.update(batch.to(device), real=is_real)
                    bar.update(len(batch))
    finally:
        vars(network).pop("forward", None)  # FeatureShare's cache, which would keep batches alive
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = shared.compute()
    out: dict[str, float] = {}
    if "fid" in names:
        out["fid"] = float(values["fid"])
    if "kid" in names:
        out |= {"kid": float(values["kid"][0]), "kid_std": float(values["kid"][1])}
    return out


def _clip_score(
    found: list[tuple[Path, str]], loaded: tuple[Any, Any], device: torch.device, batch_size: int, progress: bool
) -> float:
    from torchmetrics.multimodal import CLIPScore

    score = CLIPScore(model_name_or_path=lambda: loaded).to(device)
    with torch.no_grad(), tqdm(total=len(found), desc="CLIP", disable=not progress) as bar:
        for batch, texts in _batches(found, batch_size):
            score.update(list(batch.to(device)), texts)
            bar.update(len(batch))
    return float(score.compute())


def inception() -> nn.Module:
    """The InceptionV3 of FID with its weights from torch.hub's cache: uint8 (B, 3, H, W) -> (B, 2048).

    Raises:
        UserError: torch-fidelity or the weights are missing, or the file is not what it should be.
    """
    if find_spec("torch_fidelity") is None:
        raise UserError(f"FID and KID need torch-fidelity; {INSTALL}.")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchmetrics.image.fid import NoTrainInceptionV3

    weights = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    if not weights.is_file():
        raise UserError(
            f"The Inception weights of FID and KID are not at {weights}; download {URL_INCEPTION_V3} there once."
        )
    try:
        # torch-fidelity unpickles whatever it is given; this refuses all but tensors first.
        torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{weights} is damaged or no file of weights; delete it and download it again.") from error
    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))


class _Clip(nn.Module):
    """A CLIP model whose features are tensors: since transformers 5 they come inside an output object."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *args: Any) -> Tensor:
        return _tensor(self.model.get_image_features(*args))

    def get_text_features(self, *args: Any) -> Tensor:
        return _tensor(self.model.get_text_features(*args))


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


def load_clip(name: str | Path = CLIP_MODEL) -> tuple[Any, Any]:
    """A CLIP model and its processor, from the Hugging Face cache or a folder.

    Raises:
        UserError: it is in neither.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(name, local_files_only=True, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The CLIP model {name} is not in {HF_HUB_CACHE} and no folder with safetensors; run `hf download {name}` "
            "once, or name a folder that has it."
        ) from error
    return _Clip(model).eval(), processor
