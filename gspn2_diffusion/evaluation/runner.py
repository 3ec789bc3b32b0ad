"""Run SceneEval on a pipeline: the same picture for a prompt and a seed, whatever the batch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ..assets import scene_eval_prompts_path
from ..loading import default_size
from ..patching.families import find_model
from .scene_eval import judge
from .vocabulary import parse_prompt

CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt of SceneEval and its category."""

    prompt: str
    category: str


@dataclass
class SceneEvalResult:
    """What came of an evaluation. `records`: one dict for each picture, with its prompt, category, seed and claims."""

    records: list[dict]
    settings: dict = field(default_factory=dict)
    pictures: list[Image.Image] = field(default_factory=list, repr=False)

    def score(self, category: str | None = None, seed: int | None = None) -> float:
        """Share of pictures that hold every claim; NaN where there is none."""
        passed = [
            r["passed"] for r in self.records if category in (None, r["category"]) and seed in (None, r["seed"])
        ]  # fmt: skip
        return float(np.mean(passed)) if passed else float("nan")

    @property
    def categories(self) -> list[str]:
        present = {r["category"] for r in self.records}
        return [c for c in CATEGORIES if c in present] + sorted(present - {*CATEGORIES})

    @property
    def seeds(self) -> list[int]:
        return sorted({r["seed"] for r in self.records})

    def summary(self) -> dict[str, dict]:
        """For each category and `overall`: score, standard deviation over the seeds (0 for one seed), pictures."""
        out = {}
        for category in [*self.categories, None]:
            by_seed = [self.score(category, seed) for seed in self.seeds]
            number = sum(category in (None, r["category"]) for r in self.records)
            spread = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else 0.0
            out[category or "overall"] = {"score": self.score(category), "spread": spread, "pictures": number}
        return out

    def table(self) -> str:
        """The summary as a Markdown table, in percent."""
        lines = ["| category | score | spread over seeds | pictures |", "|---|---|---|---|"]
        for category, row in self.summary().items():
            score, spread = 100 * row["score"], 100 * row["spread"]
            lines.append(f"| {category.replace('_', ' ')} | {score:.1f} % | {spread:.1f} | {row['pictures']} |")
        return "\n".join(lines)

    def save_json(self, path: str | Path) -> None:
        """Write settings, summary and every picture's verdict."""
        content = {"settings": self.settings, "summary": self.summary(), "records": self.records}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    def grid(self, columns: int = 10, limit: int = 60) -> Image.Image:
        """Pictures in rows, evenly taken from all, framed green where every claim holds and red where one does not."""
        if not self.pictures:
            raise ValueError("no pictures were kept; evaluate with keep_pictures=True to draw a grid")
        chosen = np.unique(np.linspace(0, len(self.pictures) - 1, min(limit, len(self.pictures))).astype(int))
        width, height = self.pictures[0].size
        frame = max(2, min(width, height) // 32)
        columns = min(columns, len(chosen))
        rows = -(-len(chosen) // columns)
        sheet = Image.new("RGB", (columns * (width + 3 * frame), rows * (height + 3 * frame)), "white")
        draw = ImageDraw.Draw(sheet)
        for place, i in enumerate(chosen):
            x, y = place % columns * (width + 3 * frame), place // columns * (height + 3 * frame)
            colour = (40, 160, 60) if self.records[i]["passed"] else (210, 40, 40)
            draw.rectangle((x, y, x + width + 2 * frame - 1, y + height + 2 * frame - 1), fill=colour)
            sheet.paste(self.pictures[i], (x + frame, y + frame))
        return sheet


def load_prompts(path: str | Path | None = None, limit: int | None = None) -> list[EvalPrompt]:
    """The held-out prompts that come with the package, or those of a JSONL file; `limit` takes equally many of each
    category, the first ones."""
    lines = Path(path or scene_eval_prompts_path()).read_text().splitlines()
    prompts = [EvalPrompt(**json.loads(line)) for line in lines if line.strip()]
    if limit is None or limit >= len(prompts):
        return prompts
    present = list(dict.fromkeys(p.category for p in prompts))
    share = [limit // len(present) + (i < limit % len(present)) for i in range(len(present))]
    return [p for c, n in zip(present, share, strict=True) for p in [q for q in prompts if q.category == c][:n]]


def initial_noise(pipe, seed: int, prompt: str, height: int, width: int) -> torch.Tensor:
    """Start of one picture, float32 (C, h, w), drawn on the CPU from the seed and the prompt's letters alone."""
    mixed = np.random.SeedSequence([seed, *prompt.encode()]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed))
    factor = pipe.vae_scale_factor
    denoiser: Any = find_model(pipe)
    return torch.randn((denoiser.config.in_channels, height // factor, width // factor), generator=generator)


@torch.no_grad()
def evaluate_pipeline(
    pipe,
    prompts: Sequence[EvalPrompt] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    steps: int = 25,
    guidance_scale: float = 5.0,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    keep_pictures: bool = True,
    progress: bool = True,
) -> SceneEvalResult:
    """Generate a picture for every prompt and seed with a text-to-image pipeline of a UNet or of SD3 and judge each.

    `prompts` None: all 600 held-out prompts. Each picture's noise comes from its seed and its prompt, so that neither
    `batch_size` nor the choice of prompts changes it. Raises ValueError for a prompt that names no shape or for a side
    that the VAE's factor does not divide, before anything is generated.
    """
    prompts = load_prompts() if prompts is None else list(prompts)
    default, denoiser = default_size(pipe), cast(Any, find_model(pipe))
    height, width = height or default[0], width or default[1]
    for name, value in (("height", height), ("width", width)):
        if value % pipe.vae_scale_factor:
            raise ValueError(f"{name} {value} is not divisible by {pipe.vae_scale_factor}, the VAE's factor; round it")
    for prompt in prompts:
        parse_prompt(prompt.prompt)
    work = [(prompt, seed) for seed in seeds for prompt in prompts]
    result = SceneEvalResult([], {"steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width})
    silent = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        with tqdm(total=len(work), desc="SceneEval", disable=not progress) as bar:
            for start in range(0, len(work), batch_size):
                part = work[start : start + batch_size]
                noise = [initial_noise(pipe, seed, p.prompt, height, width) for p, seed in part]
                images = pipe(
                    [p.prompt for p, _ in part],
                    height=height,
                    width=width,
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    latents=torch.stack(noise).to(pipe.device, denoiser.dtype),
                ).images
                for (prompt, seed), image in zip(part, images, strict=True):
                    verdict = judge(image, prompt.prompt)
                    record = {**asdict(prompt), "seed": seed, "passed": verdict.passed, "claims": verdict.claims}
                    result.records.append(record)
                    if keep_pictures:
                        result.pictures.append(image)
                bar.update(len(part))
                bar.set_postfix(score=f"{100 * result.score():.1f} %")
    finally:
        pipe.set_progress_bar_config(**silent)
    return result
