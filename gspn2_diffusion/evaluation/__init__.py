"""SceneEval: does a generated picture show what its prompt claims? And FID, KID and CLIP score of folders."""

from .picture_metrics import picture_metrics
from .runner import CATEGORIES, EvalPrompt, PictureFolder, SceneEvalResult, draw, evaluate_pipeline, load_prompts
from .scene_eval import Object, Reading, Verdict, judge, read_picture
from .vocabulary import Claims, Group, parse_prompt

__all__ = [
    "CATEGORIES",
    "Claims",
    "EvalPrompt",
    "Group",
    "Object",
    "PictureFolder",
    "Reading",
    "SceneEvalResult",
    "Verdict",
    "draw",
    "evaluate_pipeline",
    "judge",
    "load_prompts",
    "parse_prompt",
    "picture_metrics",
    "read_picture",
]
