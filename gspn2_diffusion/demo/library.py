"""The models and adapters that a demo offers: those it was given at its start, by label, and nothing else."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..adapter import GSPN2Adapter
from ..assets import tiny_adapter_path, tiny_scenes_path
from ..loading import ATTENTION, SHIPPED, UserError, load_pipeline, pick_device
from ..patching import apply_gspn2, remove_gspn2

SHIPPED_ADAPTER = "tiny-scenes-gspn2"
ATTENTION_LABEL = "none (the model's own attention)"
UNTRAINED_LABEL = "untrained (started from the attention)"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Library:
    """Pipelines by label, loaded when first asked for, at most `keep` of them in memory.

    A pipeline has state of its own during a call (scheduler, guidance), so whoever uses one holds `lock` meanwhile.

    Args:
        models: folders of diffusers pipelines. None of them offers the shipped model.
        adapters: folders of GSPN2Adapters. The shipped one comes with the shipped model.
        allow_hub: take hub ids too, which downloads.
        device: where to; None is the best there is.
        dtype: None is float32 on the CPU and float16 elsewhere.
        keep: pipelines held in memory at once; the one unused for longest goes.

    Raises:
        UserError: a folder is not a pipeline or not an adapter, there is no model, or the device does not exist here.
    """

    def __init__(
        self,
        models: Iterable[str | os.PathLike[str]] = (),
        adapters: Iterable[str | os.PathLike[str]] = (),
        *,
        allow_hub: bool = False,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        keep: int = 2,
    ) -> None:
        self.device = pick_device(device)
        self.dtype, self.allow_hub, self.keep = dtype, allow_hub, keep
        self.lock = threading.Lock()
        models, adapters = list(models), list(adapters)
        self.models: dict[str, str | Path] = {}
        self.adapters: dict[str, str | Path | None] = {}
        if not models and (Path(tiny_scenes_path()) / "model_index.json").is_file():
            self.models[SHIPPED] = SHIPPED
            if (Path(tiny_adapter_path()) / "config.json").is_file():
                self.adapters[SHIPPED_ADAPTER] = Path(tiny_adapter_path())
        for folder in models:
            self.models[_label(_folder(folder, "model_index.json", "pipeline"), self.models)] = Path(folder)
        for folder in adapters:
            self.adapters[_label(_folder(folder, "config.json", "adapter"), self.adapters)] = Path(folder)
        self.adapters[UNTRAINED_LABEL] = None
        self.adapters[ATTENTION_LABEL] = ATTENTION
        if not self.models and not allow_hub:
            raise UserError("There is no model to offer; pass the folder of a diffusers pipeline.")
        self._loaded: OrderedDict[str, Any] = OrderedDict()
        self._applied: dict[str, tuple[str, GSPN2Adapter | None]] = {}

    def pipeline(self, model: str, adapter: str) -> tuple[Any, GSPN2Adapter | None]:
        """The pipeline behind the labels (or hub ids), patched as asked; call it while holding `lock`.

        Raises:
            UserError: a label is not on offer, or the model or adapter cannot be loaded; what was loaded stays.
        """
        model_source = self._source(model, self.models, "model")
        adapter_source = self._source(adapter, self.adapters, "adapter")
        if model not in self._loaded:
            pipe, _ = load_pipeline(model_source, ATTENTION, device=self.device, dtype=self.dtype)
            pipe.set_progress_bar_config(disable=True)
            self._loaded[model] = pipe
            while len(self._loaded) > self.keep:
                gone, _ = self._loaded.popitem(last=False)
                self._applied.pop(gone, None)
        self._loaded.move_to_end(model)
        pipe = self._loaded[model]
        if self._applied.get(model, (ATTENTION_LABEL, None))[0] != adapter:
            self._applied[model] = adapter, _patch(pipe, adapter_source)
        return pipe, self._applied.get(model, (ATTENTION_LABEL, None))[1]

    def _source(self, label: str, offered: dict[str, Any], what: str) -> Any:
        if isinstance(label, str):
            if label in offered:
                return offered[label]
            # A hub id that is also a local path would be opened from the disk.
            if self.allow_hub and HUB_ID.fullmatch(label) and not os.path.exists(label):
                return label
        raise UserError(f"The {what} {str(label)[:80]!r} is not on offer; choose one of {', '.join(offered)}.")


def _patch(pipe: Any, source: Any) -> GSPN2Adapter | None:
    try:
        if source == ATTENTION:
            remove_gspn2(pipe)
            return None
        return apply_gspn2(pipe, source)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"The adapter could not be applied: {error}") from error


def _folder(folder: str | os.PathLike[str], needs: str, what: str) -> Path:
    if not (Path(folder) / needs).is_file():
        raise UserError(f"{folder} has no {needs}, so it is no {what}; pass a folder that save_pretrained wrote.")
    return Path(folder)


def _label(folder: Path, taken: dict[str, Any]) -> str:
    """The folder's name, with a number where two folders have one name; never the path, which is nobody's business."""
    name = folder.resolve().name
    return next(label for label in (name, *(f"{name} ({n})" for n in range(2, len(taken) + 3))) if label not in taken)
