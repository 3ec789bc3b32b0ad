"""The GSPN-2 line scan: `gspn2_scan`, `gspn2_scan_planes` for features that come first, and `gspn2_scan_reference`, the
slow truth they are tested against."""

from .reference import gspn2_scan_reference
from .scan import gspn2_scan, gspn2_scan_planes, scans_planes

__all__ = ["gspn2_scan", "gspn2_scan_planes", "gspn2_scan_reference", "scans_planes"]
