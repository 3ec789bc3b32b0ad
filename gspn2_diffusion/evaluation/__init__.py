"""SceneEval: does a generated picture show what its prompt claims?"""

from .runner import CATEGORIES, EvalPrompt, SceneEvalResult, evaluate_pipeline, load_prompts
from .scene_eval import Object, Reading, Verdict, judge, read_picture
from .vocabulary import Claims, Group, parse_prompt

__all__ = [
    "CATEGORIES",
    "Claims",
    "EvalPrompt",
    "Group",
    "Object",
    "Reading",
    "SceneEvalResult",
    "Verdict",
    "evaluate_pipeline",
    "judge",
    "load_prompts",
    "parse_prompt",
    "read_picture",
]
