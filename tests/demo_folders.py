"""A tiny pipeline and its adapter as folders, made once for all tests of the demo."""

from __future__ import annotations

from pathlib import Path

import torch

from gspn2_diffusion import GSPN2Config, apply_gspn2

from . import tiny_models


def save(folder: Path) -> tuple[Path, Path]:
    """(pipeline folder, adapter folder), with gates that differ from pixel to pixel."""
    pipe = tiny_models.sd_pipe()
    pipe.save_pretrained(folder / "painter")
    adapter = apply_gspn2(pipe, config=GSPN2Config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapter.save_pretrained(folder / "scans")
    return folder / "painter", folder / "scans"
