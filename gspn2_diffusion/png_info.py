"""How a picture was made, kept inside the picture: PNG text chunks, shared by the command line and the demo."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

KEY = "gspn2"


def save_png(image: Image.Image, path: str | os.PathLike[str], parameters: Mapping[str, Any]) -> Path:
    """Writes `image` to `path` as a PNG that carries `parameters` as JSON in its text chunk `gspn2`.

    The picture is written beside its place and then moved there, so a broken write leaves no half file.

    Args:
        image: any PIL picture.
        path: ends in `.png`; its folder is made if it is missing.
        parameters: JSON values by name, such as `{"prompt": "a red circle", "seed": 0}`.

    Returns:
        The path.

    Raises:
        ValueError: the path does not end in `.png`.
        TypeError: a parameter is not a JSON value.
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} does not end in .png; parameters are kept in PNG files only, so name it .png.")
    try:
        text = json.dumps(dict(parameters), ensure_ascii=False)
    except TypeError as error:
        raise TypeError(f"The parameters of {path.name} are not JSON ({error}); pass text, numbers, lists.") from None
    info = PngInfo()
    info.add_itxt(KEY, text)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, format="PNG", pnginfo=info)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(f"{path} cannot be written ({error}); choose a folder that you may write to.") from error
    return path


def read_png(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters that `save_png` put into a picture.

    Raises:
        OSError: the file is missing or is no picture.
        ValueError: the picture carries no parameters of ours.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(KEY)
    except UnidentifiedImageError as error:
        raise OSError(f"{path} is not a picture ({error}); pass a PNG file.") from error
    try:
        parameters = json.loads(text) if text is not None else None
    except (TypeError, json.JSONDecodeError):
        parameters = None
    if not isinstance(parameters, dict):
        raise ValueError(f"{path} carries no parameters; only PNG files made by gspn2_diffusion do.")
    return parameters
