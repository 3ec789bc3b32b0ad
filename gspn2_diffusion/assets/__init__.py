"""What is shipped: a tiny text-to-image pipeline trained on scenes, its GSPN-2 adapter, and SceneEval's prompts."""

from __future__ import annotations

from pathlib import Path


def tiny_scenes_path() -> Path:
    """Folder of the shipped StableDiffusionPipeline (128 x 128 pixels)."""
    return Path(__file__).parent / "tiny-scenes"


def tiny_adapter_path() -> Path:
    """Folder of the shipped pipeline's GSPN2Adapter."""
    return Path(__file__).parent / "tiny-scenes-gspn2"


def scene_eval_prompts_path() -> Path:
    """The 600 held-out prompts, one JSON object (`category`, `prompt`) a line."""
    return Path(__file__).parent / "scene_eval_prompts.jsonl"
