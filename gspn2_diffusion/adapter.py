"""The trained layers as a thing of their own: saved, loaded and shared like any diffusers model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from torch import nn

from .layers import GSPN2Config, GSPN2Layer
from .version import __version__

logger = logging.getLogger(__name__)


class GSPN2Adapter(ModelMixin, ConfigMixin):
    """The GSPN-2 layers of one base model, under the names of the attentions they replace.

    `save_pretrained`, `from_pretrained`, `push_to_hub`, variants and `torch_dtype` are diffusers' own: a folder with
    `config.json` and `diffusion_pytorch_model.safetensors`.

    Args:
        base_class: class name of the model the layers belong to, such as `"UNet2DConditionModel"`.
        layers: attention name -> `{"channels": C, "out_channels": width of to_out's input}`, and `"text_heads"` in a
            joint attention.
        operator: a `GSPN2Config` as a dict.
        gspn2_version: the version of gspn2_diffusion that made it.
    """

    @register_to_config
    def __init__(
        self,
        base_class: str,
        layers: dict[str, dict[str, int]],
        operator: dict[str, Any],
        gspn2_version: str = __version__,
    ) -> None:
        super().__init__()
        config = GSPN2Config.from_dict(operator)
        for name, widths in layers.items():
            _place(
                self, name, GSPN2Layer(widths["channels"], widths["out_channels"], config, widths.get("text_heads", 0))
            )

    def __getattr__(self, name: str) -> Any:
        # ModelMixin prefers a config entry to a child of the same name; Lumina's blocks are called "layers".
        children = vars(self).get("_modules", {})
        return children[name] if name in children else super().__getattr__(name)

    @property
    def base_class(self) -> str:
        """Class name of the model the layers belong to."""
        return self.config["base_class"]

    @property
    def operator_config(self) -> GSPN2Config:
        """The options that every layer shares."""
        return GSPN2Config.from_dict(self.config["operator"])

    @property
    def layer_names(self) -> list[str]:
        """Names of the attentions that the layers replace, in the base model's order."""
        return list(self.config["layers"])

    def layer(self, name: str) -> GSPN2Layer:
        """The layer that replaces the attention `name`."""
        return self.get_submodule(f"{name}.gspn2")  # type: ignore[return-value]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> GSPN2Adapter:
        """diffusers' `from_pretrained`, for a folder or a hub id.

        Raises:
            OSError: there is no adapter there, or its file is damaged.
            ValueError: the weights do not have the names and shapes that its config gives; nothing is filled in.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_dir() and not (path / "config.json").is_file():
            raise OSError(f"{path} has no config.json; pass a folder written by GSPN2Adapter.save_pretrained.")
        try:
            adapter, report = super().from_pretrained(
                pretrained_model_name_or_path, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except (SafetensorError, json.JSONDecodeError) as error:
            raise OSError(
                f"The adapter at {pretrained_model_name_or_path} is damaged ({error}); download or save it again."
            ) from error
        wrong = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(key)}
        if wrong:
            listed = "; ".join(f"{key.replace('_', ' ')}: {few(values)}" for key, values in wrong.items())
            raise ValueError(
                f"The adapter at {pretrained_model_name_or_path} does not match its own config ({listed}); "
                "save it again with GSPN2Adapter.save_pretrained."
            )
        bad = [name for name, parameter in adapter.named_parameters() if not torch.isfinite(parameter).all()]
        if bad:
            logger.warning(
                "The adapter at %s has NaN or infinite weights in %s; pictures made with it will be broken, "
                "use an earlier checkpoint.",
                pretrained_model_name_or_path,
                few(bad),
            )
        return adapter


def _place(root: Any, name: str, layer: GSPN2Layer) -> None:
    """Registers `layer` under the dotted name the attention has in its model, so that state_dict keys agree."""
    parent = root
    for part in name.split("."):
        if part not in parent._modules:
            parent._modules[part] = nn.Module()
        parent = parent._modules[part]  # type: ignore[assignment]
    parent.add_module("gspn2", layer)


def few(items: Any, count: int = 3) -> str:
    """The first few of many names, for an error message."""
    items = [str(item) for item in items]
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
