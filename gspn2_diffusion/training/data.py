"""Where pictures and captions come from, and to which size each picture is brought."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from .arguments import TrainingArguments, TrainingError

Size = tuple[int, int]
"""(height, width) in pixels."""


class Row(NamedTuple):
    """One sample before decoding: the name to report, the picture (path or encoded bytes) and its caption."""

    name: str
    picture: Any
    caption: str


class Rows:
    """The samples of a source, in a fixed order, read lazily.

    Args:
        args: the run's options.
        most: use only the first so many.

    Raises:
        ValueError: the folder has no metadata.jsonl, or a column is missing.
    """

    def __init__(self, args: TrainingArguments, most: int | None = None) -> None:
        self.args = args
        if args.train_data_dir is not None:
            self.records: Any = _folder(Path(args.train_data_dir), args.caption_column)
        else:
            self.records = _dataset(args)
        total = len(self.records)
        self.length = min(total, most or total)
        if not self.length:
            raise TrainingError("The data set is empty; training needs at least one captioned image.")

    def __len__(self) -> int:
        return self.length

    def read(self, first: int, last: int) -> Iterator[Row]:
        """Samples `first` to `last` - 1."""
        for index in range(first, min(last, self.length)):
            record = self.records[index]
            if isinstance(record, Row):
                yield record
                continue
            picture = record[self.args.image_column]
            name = f"{index} ({picture['path']})" if picture and picture.get("path") else str(index)
            yield Row(name, picture, record[self.args.caption_column])


def _folder(folder: Path, caption_column: str) -> list[Row]:
    """An image folder as `datasets` defines it. Read directly: its builder takes a minute for 40,000 files."""
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise TrainingError(
            f"{folder} has no metadata.jsonl; write one line for each image: "
            '{"file_name": "0.png", "text": "its caption"}.'
        )
    rows = []
    for number, line in enumerate(metadata.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            rows.append(Row(record["file_name"], folder / record["file_name"], str(record[caption_column])))
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{metadata} line {number}: {error!r}; needed are file_name and {caption_column}."
            ) from error
    return rows


def _dataset(args: TrainingArguments) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TrainingError("--dataset_name needs the package datasets; install it.") from error
    try:
        dataset = datasets.load_dataset(
            args.dataset_name, args.dataset_config_name, data_files=args.data_files, split=args.dataset_split
        )
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:
        raise TrainingError(
            f"The dataset {args.dataset_name} could not be loaded ({error}); check --dataset_name, --data_files, "
            "--dataset_config_name and --dataset_split."
        ) from error
    for column in (args.image_column, args.caption_column):
        if column not in dataset.column_names:
            raise TrainingError(f"The dataset has no column {column!r}; it has {', '.join(dataset.column_names)}.")
    dataset = dataset.select_columns([args.image_column, args.caption_column])
    # Decoded by us, one at a time: a broken image must not end the run.
    return dataset.cast_column(args.image_column, datasets.Image(decode=False))


def open_picture(picture: Any) -> Image.Image:
    """Decodes a picture wholly, upright and in RGB.

    Raises:
        OSError, ValueError, SyntaxError: it is missing or damaged (Pillow's own).
    """
    if isinstance(picture, dict):
        picture = BytesIO(picture["bytes"]) if picture.get("bytes") is not None else picture["path"]
    with Image.open(picture) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """Sizes (height, width) of about `resolution`^2 pixels whose sides are multiples of `step`, up to `max_aspect`."""
    area, sizes = resolution**2, set()
    for width in range(step, int(resolution * math.sqrt(max_aspect)) + step, step):
        height = max(step, round(area / width / step) * step)
        if max(height / width, width / height) <= max_aspect:
            sizes |= {(height, width), (width, height)}
    return sorted(sizes)


def fitting_size(image: Image.Image, sizes: list[Size]) -> Size:
    """The size whose aspect ratio is nearest (in logarithm) to the image's."""
    aspect = math.log(image.height / image.width)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


def fit(image: Image.Image, size: Size) -> Image.Image:
    """The image scaled to cover `size`, its centre cut out."""
    height, width = size
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
