"""The words of the scenes: what a prompt can claim, how it is written, and what each word looks like.

Shared by the renderer (`examples/scenes/`), which draws scenes, and by SceneEval, which reads pictures.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 35),
    "orange": (255, 125, 0),
    "yellow": (245, 215, 0),
    "green": (0, 145, 55),
    "cyan": (0, 190, 215),
    "blue": (30, 60, 215),
    "pink": (235, 60, 185),
    "black": (20, 20, 25),
}
"""Colours of objects, RGB: far apart, and far from every background."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (190, 190, 190),
    "green": (185, 235, 185),
    "blue": (185, 205, 255),
    "yellow": (255, 245, 180),
    "pink": (255, 205, 225),
}
"""Colours of backgrounds, RGB: pale, so that "a green circle on a green background" can be seen."""

PATTERN_SHADE = 0.86
"""The second colour of a pattern is the background times this."""

PATTERNS = ("plain", "striped", "checkered")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES: dict[str, float] = {"large": 0.175, "small": 0.1}
"""Half the width of an object, as a share of the picture's smaller side."""

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = ("left", "right", "above", "below")
PLURALS = {f"{shape}es" if shape.endswith("s") else f"{shape}s": shape for shape in SHAPES}
SPELLINGS = {"grey": "gray", "big": "large", "little": "small", "under": "below", "over": "above", "beneath": "below"}
MAX_OBJECTS = 4


@dataclass(frozen=True)
class Group:
    """Objects of one kind. `colour` or `size` None: the prompt does not say."""

    shape: str
    colour: str | None = None
    size: str | None = None
    count: int = 1

    def __str__(self) -> str:
        return " ".join(w for w in (str(self.count), self.size, self.colour, self.shape) if w)


@dataclass(frozen=True)
class Claims:
    """What a prompt says: its groups, where the first is of the second, and the background."""

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None
    pattern: str | None = None


@lru_cache(maxsize=256)
def shape_mask(shape: str, radius: float) -> np.ndarray:
    """How much of each pixel a centred shape covers: float32 (2R + 1, 2R + 1) in [0, 1], R = ceil(radius) + 1."""
    reach, fine = int(np.ceil(radius)) + 1, 8
    axis = (np.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    x, y = np.meshgrid(axis / radius, axis / radius)
    distance = np.hypot(x, y)
    if shape == "circle":
        inside = distance <= 1
    elif shape == "ring":
        inside = (distance <= 1) & (distance >= 0.55)
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.92
    elif shape == "diamond":
        inside = abs(x) + abs(y) <= 1.08
    elif shape == "triangle":
        inside = (abs(x) <= (y + 0.9) / 1.8) & (y <= 0.9)
    elif shape == "cross":
        inside = (np.maximum(abs(x), abs(y)) <= 1) & (np.minimum(abs(x), abs(y)) <= 0.34)
    else:
        raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    return inside.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).mean((1, 3), dtype=np.float32)


def parse_prompt(prompt: str) -> Claims:
    """Read a prompt such as "a large red circle to the left of two small blue squares, on a green background".

    Words it does not know are skipped. Raises ValueError when the prompt names no shape.
    """
    words = [SPELLINGS.get(w, w) for w in re.findall(r"[a-z]+|\d+", prompt.lower())]
    groups: list[Group] = []
    relation = background = pattern = None
    count, size, colour = 1, None, None
    for word in words:
        if word in COUNTS or word.isdigit():
            count = COUNTS[word] if word in COUNTS else int(word)
        elif word in SIZES:
            size = word
        elif word in PATTERNS:
            pattern = word
        elif word in COLOURS or word in BACKGROUNDS:
            colour = word
        elif word == "background":
            background = colour
            count, size, colour = 1, None, None
        elif word in SHAPES or word in PLURALS:
            groups.append(Group(PLURALS.get(word, word), colour, size, count))
            count, size, colour = 1, None, None
        elif word in RELATIONS:
            relation = word
    if not groups:
        raise ValueError(f"the prompt {prompt!r} names no shape; use one of {', '.join(SHAPES)}")
    return Claims(tuple(groups), relation if len(groups) == 2 else None, background, pattern)
