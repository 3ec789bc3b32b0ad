"""Sample, caption and draw scenes; write them as an image folder with `metadata.jsonl`.

    python examples/scenes/scenes.py --out outputs/scenes --num 40000 --seed 0
    python examples/scenes/scenes.py --prompts gspn2_diffusion/assets/scene_eval_prompts.jsonl --num 600 --seed 1

Training scenes never hold a combination of `HELD_OUT_*`; every held-out prompt names one.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from gspn2_diffusion.evaluation import CATEGORIES
from gspn2_diffusion.evaluation.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    PATTERN_SHADE,
    PATTERNS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZES,
    Claims,
    Group,
    shape_mask,
)

HELD_OUT_COLOURS = {
    ("circle", "pink"),
    ("square", "orange"),
    ("triangle", "cyan"),
    ("diamond", "red"),
    ("cross", "yellow"),
    ("ring", "blue"),
    ("circle", "black"),
    ("triangle", "green"),
}
"""(shape, colour) pairs kept out of training: each colour once."""

HELD_OUT_SHAPES = {frozenset(p) for p in (("circle", "cross"), ("square", "ring"), ("triangle", "diamond"))}
"""Pairs of shapes that never share a training picture."""

HELD_OUT_BACKGROUNDS = {
    ("large", "circle", "blue"),
    ("small", "circle", "pink"),
    ("large", "square", "green"),
    ("small", "square", "yellow"),
    ("large", "triangle", "gray"),
    ("small", "triangle", "blue"),
    ("large", "diamond", "pink"),
    ("small", "diamond", "green"),
    ("large", "cross", "gray"),
    ("small", "cross", "blue"),
    ("large", "ring", "yellow"),
    ("small", "ring", "gray"),
}
"""(size, shape, background) triples kept out of training."""


PLURAL_OF = {shape: plural for plural, shape in PLURALS.items()}
NUMBER_WORDS = {n: word for word, n in COUNTS.items()}


@dataclass(frozen=True)
class Scene:
    """A scene to draw: every group has a colour and a size; centres are (x, y) shares of the sides, one per object."""

    groups: tuple[Group, ...]
    centres: tuple[tuple[float, float], ...]
    relation: str | None
    background: str
    pattern: str


def holds_out(claims: Claims | Scene) -> bool:
    """Whether these groups name a combination that training never shows."""
    groups = claims.groups
    return (
        any((g.shape, g.colour) in HELD_OUT_COLOURS for g in groups)
        or any((g.size, g.shape, claims.background) in HELD_OUT_BACKGROUNDS for g in groups)
        or (len(groups) == 2 and frozenset(g.shape for g in groups) in HELD_OUT_SHAPES)
    )


def choose(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def place(rng: np.random.Generator, counts: list[int], relation: str | None) -> list[tuple[float, float]]:
    """Centres: groups of a relation in opposite halves, everything else in quadrants; jittered by 4 % of the side."""
    near, far, mid = 0.27, 0.73, 0.5
    if relation:
        centres = []
        for count, side in zip(counts, (near, far) if relation in ("left", "above") else (far, near), strict=True):
            centres += [(side, mid)] if count == 1 else [(side, near), (side, far)]
        if relation in ("above", "below"):
            centres = [(y, x) for x, y in centres]
    elif sum(counts) == 1:
        centres = [(mid, mid)]
    else:
        quadrants = [(near, near), (far, near), (near, far), (far, far)]
        centres = [quadrants[i] for i in rng.permutation(4)[: sum(counts)]]
    return [(x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.04, 0.04)) for x, y in centres]


KINDS = ("single", "count", "pair", "relation")
MIX = (0.3, 0.2, 0.2, 0.3)
"""Shares of pictures with one object, with several of one kind, of two kinds with nothing said of their places, of
two kinds in a relation."""


def sample_scene(rng: np.random.Generator, mix: Sequence[float] = MIX) -> Scene:
    """Draw a training scene, half of them on plain white; `mix`: the shares of KINDS."""
    while True:
        kind = rng.choice(KINDS, p=mix)
        counts = {
            "single": [1],
            "count": [int(rng.integers(2, 5))],
            "pair": choose(rng, [[1, 1], [1, 1], [1, 1], [2, 1], [1, 2], [2, 2], [3, 1], [1, 3]]),
            "relation": choose(rng, [[1, 1], [1, 1], [1, 1], [1, 1], [2, 1], [1, 2], [2, 2]]),
        }[kind]
        groups = tuple(Group(choose(rng, SHAPES), choose(rng, [*COLOURS]), choose(rng, [*SIZES]), n) for n in counts)
        if len(groups) == 2 and (groups[0].shape, groups[0].colour) == (groups[1].shape, groups[1].colour):
            continue
        relation = choose(rng, RELATIONS) if kind == "relation" else None
        said = rng.random() < 0.5
        background = choose(rng, [*BACKGROUNDS]) if said else "white"
        pattern = choose(rng, ["plain", *PATTERNS]) if said else "plain"
        scene = Scene(groups, (), relation, background, pattern)
        if not holds_out(scene):
            return Scene(groups, tuple(place(rng, counts, relation)), relation, background, pattern)


def name(rng: np.random.Generator, group: Group) -> str:
    number = NUMBER_WORDS[group.count] if group.count > 1 else "a"
    noun = PLURAL_OF[group.shape] if group.count > 1 else group.shape
    words = [w for w in (group.size, group.colour, noun) if w]
    if number == "a" and words[0][0] in "aeiou":
        number = "an"
    return " ".join([number, *words])


def caption(rng: np.random.Generator, scene: Scene | Claims, drop: float = 0.1) -> str:
    """Describe a scene in one of several phrasings; each size and colour is left out with probability `drop`."""
    groups = [
        Group(
            g.shape,
            g.colour if rng.random() >= drop else None,
            g.size if rng.random() >= drop else None,
            g.count,
        )
        for g in scene.groups
    ]
    text = choose(rng, ["", "", "", "", "a picture of ", "an image of "]) + name(rng, groups[0])
    if len(groups) == 2:
        phrases = {
            "left": ["to the left of", "left of"],
            "right": ["to the right of", "right of"],
            "above": ["above", "above", "over"],
            "below": ["below", "below", "under"],
            None: ["and", "and", "with"],
        }
        text += f" {choose(rng, phrases[scene.relation])} {name(rng, groups[1])}"
    if (scene.background, scene.pattern) not in (("white", "plain"), (None, None)) or rng.random() < 0.05:
        pattern = "" if scene.pattern in (None, "plain") else f"{scene.pattern} "
        if scene.background:
            text += f"{choose(rng, [',', ''])} on a {pattern}{scene.background} background"
    return text


@lru_cache(maxsize=64)
def background(colour: str, pattern: str, width: int, height: int) -> np.ndarray:
    """Float32 (height, width, 3): plain, horizontal stripes, or checks, of an eighth of the smaller side."""
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = BACKGROUNDS[colour]
    cell = max(min(width, height) // 8, 1)
    rows, columns = np.arange(height)[:, None] // cell, np.arange(width)[None] // cell
    odd = {"plain": rows < 0, "striped": rows % 2 == 1, "checkered": (rows + columns) % 2 == 1}[pattern]
    picture[np.broadcast_to(odd, (height, width))] *= PATTERN_SHADE
    return picture


def render(scene: Scene, width: int = 128, height: int = 128) -> np.ndarray:
    """Draw a scene, anti-aliased: uint8 (height, width, 3)."""
    picture = background(scene.background, scene.pattern, width, height).copy()
    kinds = [g for g in scene.groups for _ in range(g.count)]
    for group, (x, y) in zip(kinds, scene.centres, strict=True):
        mask = shape_mask(group.shape, SIZES[group.size or "large"] * min(width, height))[..., None]
        reach = mask.shape[0] // 2
        left, top = round(x * width) - reach, round(y * height) - reach
        mask = mask[max(-top, 0) : height - top, max(-left, 0) : width - left]
        area = picture[max(top, 0) :, max(left, 0) :][: mask.shape[0], : mask.shape[1]]
        area += mask * (np.float32(COLOURS[group.colour or "black"]) - area)
    return (picture + 0.5).astype(np.uint8)


def training_scene(index: int, seed: int, mix: Sequence[float] = MIX) -> tuple[Scene, str]:
    """Scene and caption number `index` of the training set `seed`."""
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng, mix)
    return scene, caption(rng, scene)


def held_out_prompt(rng: np.random.Generator, category: str) -> str:
    """One prompt of a category that names a held-out combination."""

    def colours() -> Group:
        return Group(choose(rng, SHAPES), choose(rng, [*COLOURS]))

    while True:
        claims = {
            "single_object": lambda: Claims(
                (Group(choose(rng, SHAPES), size=choose(rng, [*SIZES])),),
                background=choose(rng, [*BACKGROUNDS]),
                pattern=choose(rng, [None, None, "striped", "checkered"]),
            ),
            "two_objects": lambda: Claims((Group(choose(rng, SHAPES)), Group(choose(rng, SHAPES)))),
            "counting": lambda: Claims(
                (Group(choose(rng, SHAPES), choose(rng, [*COLOURS]), choose(rng, [*SIZES]), int(rng.integers(2, 5))),)
            ),
            "colours": lambda: Claims((colours(),), background=choose(rng, [None, *BACKGROUNDS])),
            "position": lambda: Claims((colours(), colours()), relation=choose(rng, RELATIONS)),
            "colour_attribution": lambda: Claims((colours(), colours())),
        }[category]()
        if category == "two_objects":
            # Sizes and a background make enough different prompts of three held-out pairs.
            claims = Claims(
                tuple(Group(g.shape, size=choose(rng, [*SIZES])) for g in claims.groups),
                background=choose(rng, [None, *BACKGROUNDS]),
            )
        elif category == "counting":
            claims = Claims(claims.groups, background=choose(rng, [None, *BACKGROUNDS]))
        if len({(g.shape, g.colour) for g in claims.groups}) < len(claims.groups) or not holds_out(claims):
            continue
        return caption(rng, claims, drop=0.0)


def held_out_prompts(number: int = 600, seed: int = 1) -> list[dict[str, str]]:
    """`number` different held-out prompts, the six categories in equal shares."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, str] = {}
    for category in CATEGORIES:
        wanted = len(prompts) + number // len(CATEGORIES)
        while len(prompts) < wanted:
            prompts.setdefault(held_out_prompt(rng, category), category)
    return [{"category": category, "prompt": prompt} for prompt, category in prompts.items()]


def write_one(index: int, out: Path, seed: int, size: int, mix: Sequence[float] = MIX) -> dict:
    scene, text = training_scene(index, seed, mix)
    name = f"{index // 1000:03d}/{index:06d}.png"
    Image.fromarray(render(scene, size, size)).save(out / name, compress_level=1)
    return {"file_name": name, "text": text, "scene": {k: v for k, v in asdict(scene).items() if k != "centres"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="folder for pictures and metadata.jsonl")
    target.add_argument("--prompts", type=Path, help="file for held-out prompts, one JSON object a line")
    parser.add_argument("--num", type=int, default=40000, help="how many pictures or prompts")
    parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    parser.add_argument(
        "--mix",
        type=float,
        nargs=len(KINDS),
        default=MIX,
        metavar="SHARE",
        help="shares of pictures with one object, several of one kind, two kinds, two kinds in a relation (sum 1)",
    )
    args = parser.parse_args()
    if min(args.mix) < 0 or abs(sum(args.mix) - 1) > 1e-6:
        parser.error(f"--mix got {args.mix}, which sum to {sum(args.mix):g}; pass four shares that sum to 1.")
    if args.prompts:
        lines = held_out_prompts(args.num, args.seed)
        args.prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return
    for folder in range((args.num + 999) // 1000):
        (args.out / f"{folder:03d}").mkdir(parents=True, exist_ok=True)
    work = partial(write_one, out=args.out, seed=args.seed, size=args.size, mix=args.mix)
    with ProcessPoolExecutor(args.workers) as pool, open(args.out / "metadata.jsonl", "w") as metadata:
        for line in tqdm(pool.map(work, range(args.num), chunksize=250), total=args.num, desc="scenes"):
            metadata.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
