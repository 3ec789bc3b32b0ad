"""Distillation and fine-tuning of GSPN-2 layers."""

from .arguments import TextToImageArguments, TrainingArguments, parse_args
from .trainer import train

__all__ = ["TextToImageArguments", "TrainingArguments", "parse_args", "train"]
