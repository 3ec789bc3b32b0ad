"""The GSPN-2 layer, its options and its start from the teacher."""

from .config import GSPN2Config
from .init import random_init, teacher_init
from .scan_layer import GSPN2Layer, canvas_sides

__all__ = ["GSPN2Config", "GSPN2Layer", "canvas_sides", "random_init", "teacher_init"]
