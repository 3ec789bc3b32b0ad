"""SceneEval, the judge: reads a picture of a scene with colours and connected components, no neural network, and says
which claims of its prompt hold.

Categories follow GenEval (Ghosh et al. 2023, arXiv 2310.11513). The rules are stricter: a group must be there exactly
as often as said, and nothing else may be.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from .vocabulary import BACKGROUNDS, COLOURS, PATTERN_SHADE, SHAPES, SIZES, Claims, Group, parse_prompt, shape_mask

SIDE = 128
"""Pictures are read with their smaller side at this many pixels."""
MIN_AREA = 90
"""Smaller patches are specks; the smallest object covers about 350 pixels."""
MIN_OVERLAP = 0.62
"""An object has the shape whose outline it overlaps best, if by at least this intersection over union."""
GRID = 40
"""Outlines are compared in their bounding boxes, stretched to GRID x GRID."""

_PALETTE = np.array(
    [*COLOURS.values(), *BACKGROUNDS.values(), *(np.multiply(c, PATTERN_SHADE) for c in BACKGROUNDS.values())],
    np.float32,
)
_NAMES = list(COLOURS)
_GROUNDS = list(BACKGROUNDS)


@dataclass(frozen=True)
class Object:
    """One thing seen. `shape` None: no known outline. `x`, `y` are shares of the sides, `radius` of the smaller."""

    shape: str | None
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    objects: tuple[Object, ...]
    background: str
    pattern: str


@dataclass(frozen=True)
class Verdict:
    """Each claim of a prompt, in words, and whether it holds; the picture passes when all do."""

    claims: dict[str, bool]
    reading: Reading

    @property
    def passed(self) -> bool:
        return all(self.claims.values())


def _to_pixels(picture: Image.Image | np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image = image.convert("RGB")
    scale = SIDE / min(image.size)
    if scale != 1:
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        image = image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32)
    return ndimage.gaussian_filter(pixels, (0.6, 0.6, 0))


def _stretch(mask: np.ndarray) -> np.ndarray:
    image = Image.fromarray((mask * 255).astype(np.uint8))
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BILINEAR), np.float32) / 255


@lru_cache(maxsize=1)
def _outlines() -> dict[str, np.ndarray]:
    out = {}
    for shape in SHAPES:
        mask = shape_mask(shape, 60.0)
        rows, columns = np.flatnonzero(mask.max(1) > 0.5), np.flatnonzero(mask.max(0) > 0.5)
        out[shape] = _stretch(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return out


def _name_shape(mask: np.ndarray) -> str | None:
    height, width = mask.shape
    if not 0.6 < width / height < 1.67:
        return None
    seen = _stretch(mask)
    overlap = {s: float(np.minimum(seen, o).sum() / np.maximum(seen, o).sum()) for s, o in _outlines().items()}
    best = max(overlap, key=overlap.__getitem__)
    return best if overlap[best] >= MIN_OVERLAP else None


def _read_background(labels: np.ndarray, ground: np.ndarray) -> tuple[str, str]:
    if not ground.any():
        return "white", "plain"
    kinds = labels - len(COLOURS)
    number = len(BACKGROUNDS)
    votes = np.bincount(kinds[ground] % number, minlength=number)
    shaded = np.where(ground, kinds >= number, np.nan)
    share = np.nanmean(shaded)
    if not 0.25 < share < 0.75:
        # Shaded all over is the neighbour that a shade looks like, or a darker tone of the same: not a pattern.
        return _GROUNDS[int(votes.argmax())], "plain"
    rows = np.array([np.nanmean(row) for row in shaded if not np.isnan(row).all()])
    striped = rows.var() > 0.5 * share * (1 - share)
    return _GROUNDS[int(votes.argmax())], "striped" if striped else "checkered"


def read_picture(picture: Image.Image | np.ndarray) -> Reading:
    """Find the objects and the background of a picture of any size: PIL image, or uint8 (height, width, 3)."""
    pixels = _to_pixels(picture)
    height, width = pixels.shape[:2]
    # Nearest colour: |p - c|^2 without |p|^2.
    labels = ((_PALETTE**2).sum(-1) - 2 * pixels @ _PALETTE.T).argmin(-1)
    foreground = labels < len(COLOURS)
    cross = ndimage.generate_binary_structure(2, 1)
    # Opening takes off the rims, one or two pixels wide, where two colours blend into a third.
    seeds = np.zeros(labels.shape, np.int32)
    colours: list[str] = []
    for i in np.unique(labels[foreground]):
        parts, number = ndimage.label(ndimage.binary_opening(labels == i, np.ones((3, 3))), np.ones((3, 3)))
        areas = ndimage.sum_labels(np.ones_like(parts), parts, np.arange(1, number + 1))
        for part in np.flatnonzero(areas >= MIN_AREA):
            colours.append(_NAMES[i])
            seeds[parts == part + 1] = len(colours)
    # Give the corners that opening cut back to the object they belong to.
    for _ in range(2):
        grown = ndimage.grey_dilation(seeds, footprint=cross)
        seeds = np.where((seeds == 0) & foreground, grown, seeds)
    objects = []
    for colour, (number, box) in zip(colours, enumerate(ndimage.find_objects(seeds), 1), strict=True):
        mask = seeds[box] == number
        radius = max(mask.shape) / 2 / min(height, width)
        y, x = ((s.start + s.stop) / 2 for s in box)
        size = min(SIZES, key=lambda s: abs(SIZES[s] - radius))
        objects.append(Object(_name_shape(mask), colour, size, x / width, y / height, radius))
    return Reading(tuple(objects), *_read_background(labels, ~foreground))


def _fits(group: Group, seen: Object) -> bool:
    return group.shape == seen.shape and group.colour in (None, seen.colour) and group.size in (None, seen.size)


def _related(relation: str, first: list[Object], second: list[Object], margin: float = 0.1) -> bool:
    axis, sign = {"left": ("x", 1), "right": ("x", -1), "above": ("y", 1), "below": ("y", -1)}[relation]
    return all(sign * (getattr(b, axis) - getattr(a, axis)) > margin for a in first for b in second)


def judge(picture: Image.Image | np.ndarray, prompt: str | Claims) -> Verdict:
    """Say which claims of a prompt a picture holds. Raises ValueError for a prompt that names no shape."""
    claims = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    reading = read_picture(picture)
    slots = [i for i, group in enumerate(claims.groups) for _ in range(group.count)]
    fit = np.array([[_fits(claims.groups[i], seen) for seen in reading.objects] for i in slots], bool)
    members: list[list[Object]] = [[] for _ in claims.groups]
    if fit.size:
        for slot, number in zip(*linear_sum_assignment(fit, maximize=True), strict=True):
            if fit[slot, number]:
                members[slots[slot]].append(reading.objects[number])
    held = {str(group): len(found) == group.count for group, found in zip(claims.groups, members, strict=True)}
    held["nothing else"] = len(reading.objects) <= len(slots)
    if claims.relation:
        held[claims.relation] = all(members) and _related(claims.relation, members[0], members[1])
    if claims.background:
        held[f"{claims.background} background"] = reading.background == claims.background
    if claims.pattern:
        held[f"{claims.pattern} background"] = reading.pattern == claims.pattern
    return Verdict(held, reading)
