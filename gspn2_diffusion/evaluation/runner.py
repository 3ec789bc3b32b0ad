"""Draw prompts with a pipeline and run SceneEval on it: the same picture for a prompt and a seed, whatever the batch
and the number of processes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ..assets import scene_eval_prompts_path
from ..loading import GUIDANCE_SCALE, UserError, check_size, default_size, exact_size
from ..patching.families import find_model
from .scene_eval import judge
from .vocabulary import parse_prompt

LATENTS = ("UNet2DConditionModel", "SD3Transformer2DModel")
"""Models whose pipelines take latents (B, C, h, w); the noise of others, often packed, is their pipelines' own."""

CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt and its category."""

    prompt: str
    category: str = "all"


@dataclass(frozen=True)
class Drawn:
    """A generated picture: its place in the evaluation, what it was drawn from, and itself."""

    place: int
    prompt: EvalPrompt
    seed: int
    image: Image.Image


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


class PictureFolder:
    """Pictures on disk, `000000.png` and so on, with a `metadata.jsonl` of their prompts: an image folder.

    Raises:
        FileExistsError: the folder holds other pictures, which would be scored with the new ones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rank, world = processes()
        taken = [rank == 0 and folder.is_dir() and any(folder.iterdir())]
        if rank == 0 and not taken[0]:
            folder.mkdir(parents=True, exist_ok=True)
        if world > 1:  # nobody writes before the first process has looked
            dist.broadcast_object_list(taken, src=0)
        if taken[0]:
            raise FileExistsError(f"{folder} is not empty; delete it or name another folder.")
        self.lines: list[tuple[int, dict]] = []

    def save(self, drawn: Drawn) -> None:
        name = f"{drawn.place:06d}.png"
        drawn.image.save(self.folder / name)
        self.lines.append((drawn.place, {"file_name": name, "text": drawn.prompt.prompt, "seed": drawn.seed}))

    def finish(self) -> None:
        """Writes metadata.jsonl. Every process calls it; afterwards the folder is whole."""
        lines = [json.dumps(line) + "\n" for _, line in _gather(self.lines)]
        if processes()[0] == 0:
            (self.folder / "metadata.jsonl").write_text("".join(lines))


def load_prompts(path: str | Path | None = None, limit: int | None = None) -> list[EvalPrompt]:
    """The held-out prompts that come with the package, or those of a JSONL file: `prompt` (or `text`, as an image
    folder's metadata.jsonl calls it) and `category`. `limit` takes equally many of each category, the first ones.

    Raises:
        UserError: the file cannot be read, or has no prompts.
    """
    file = Path(path or scene_eval_prompts_path())
    try:
        records = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        prompts = [EvalPrompt(r["prompt"] if "prompt" in r else r["text"], r.get("category", "all")) for r in records]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} could not be read ({error!r}); it needs a JSON object with prompt and category a line."
        ) from error
    if not prompts:
        raise UserError(f"{file} has no prompts; it needs a JSON object with prompt and category a line.")
    if limit is None or limit >= len(prompts):
        return prompts
    present = list(dict.fromkeys(p.category for p in prompts))
    share = [limit // len(present) + (i < limit % len(present)) for i in range(len(present))]
    return [p for c, n in zip(present, share, strict=True) for p in [q for q in prompts if q.category == c][:n]]


def _generator(seed: int, prompt: str) -> torch.Generator:
    """On the CPU, from the seed and the prompt's letters alone."""
    mixed = np.random.SeedSequence([seed, *prompt.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))


def initial_noise(pipe, seed: int, prompt: str, height: int, width: int) -> torch.Tensor:
    """Start of one picture of a model of `LATENTS`, float32 (C, h, w)."""
    factor = pipe.vae_scale_factor
    denoiser: Any = find_model(pipe)
    shape = (denoiser.config.in_channels, height // factor, width // factor)
    return torch.randn(shape, generator=_generator(seed, prompt))


def processes() -> tuple[int, int]:
    """(rank, number) of the processes that share an evaluation."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _gather(items: list[Any]) -> list[Any]:
    """Everybody's items, in the order of their places. Each item begins with its place."""
    if processes()[1] == 1:
        return items
    parts: list[Any] = [None] * processes()[1]
    dist.all_gather_object(parts, items)
    return sorted((item for part in parts for item in part), key=lambda item: item[0])


def picture_size(pipe, height: int | None, width: int | None) -> tuple[int, int]:
    """The sides asked for, in pixels; None is the model's own. Raises UserError as `check_size` does."""
    check_size(pipe, height, width)
    own = default_size(pipe)
    return height or own[0], width or own[1]


@torch.no_grad()
def draw(
    pipe,
    prompts: Sequence[EvalPrompt],
    seeds: Sequence[int] = (0,),
    *,
    steps: int = 25,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
) -> Iterator[Drawn]:
    """A picture for every prompt and seed, with any diffusers text-to-image pipeline.

    Each picture's noise comes from its seed and its prompt, so that neither `batch_size` nor the choice of prompts
    changes it. Under several processes (`accelerate launch`) whole batches are dealt out in turn: each yields its own,
    and the pictures have the same bits as one process's on the same device.
    """
    height, width = picture_size(pipe, height, width)
    work = [(prompt, seed) for seed in seeds for prompt in prompts]
    rank, world = processes()
    denoiser: Any = find_model(pipe)
    takes_latents = bool({cls.__name__ for cls in type(denoiser).__mro__} & {*LATENTS})
    silent = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        with tqdm(total=len(work), desc="pictures", disable=not progress or rank > 0) as bar:
            for start in range(rank * batch_size, len(work), world * batch_size):
                part = work[start : start + batch_size]
                if takes_latents:
                    noise = torch.stack([initial_noise(pipe, seed, p.prompt, height, width) for p, seed in part])
                    options: dict[str, Any] = {"latents": noise.to(pipe.device, denoiser.dtype)}
                else:
                    options = {"generator": [_generator(seed, p.prompt) for p, seed in part]}
                images = pipe(
                    [p.prompt for p, _ in part],
                    height=height,
                    width=width,
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    **options,
                    **exact_size(pipe),
                ).images
                for place, (prompt, seed), image in zip(range(start, start + len(part)), part, images, strict=True):
                    yield Drawn(place, prompt, seed, image)
                bar.update(min(world * batch_size, len(work) - bar.n))
    finally:
        pipe.set_progress_bar_config(**silent)


def evaluate_pipeline(
    pipe,
    prompts: Sequence[EvalPrompt] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    steps: int = 25,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    keep_pictures: bool = True,
    progress: bool = True,
    save_to: PictureFolder | None = None,
) -> SceneEvalResult:
    """Generate a picture for every prompt and seed (see `draw`) and judge each.

    `prompts` None: all 600 held-out prompts. Under several processes every one returns the same records; the pictures
    are kept on the first. `save_to` writes them to a folder too. Raises ValueError for a prompt that names no shape and
    UserError for a side that does not fit the model, before anything is generated.
    """
    prompts = load_prompts() if prompts is None else list(prompts)
    height, width = picture_size(pipe, height, width)
    for prompt in prompts:
        parse_prompt(prompt.prompt)
    judged: list[tuple[int, dict, Image.Image | None]] = []
    for drawn in draw(
        pipe,
        prompts,
        seeds,
        steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        height=height,
        width=width,
        progress=progress,
    ):
        verdict = judge(drawn.image, drawn.prompt.prompt)
        record = {**asdict(drawn.prompt), "seed": drawn.seed, "passed": verdict.passed, "claims": verdict.claims}
        judged.append((drawn.place, record, drawn.image if keep_pictures else None))
        if save_to is not None:
            save_to.save(drawn)
    judged = _gather(judged)
    settings = {"steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    pictures = [image for _, _, image in judged if image is not None]
    return SceneEvalResult([record for _, record, _ in judged], settings, pictures if processes()[0] == 0 else [])
