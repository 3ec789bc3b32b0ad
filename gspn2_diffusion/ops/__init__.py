"""The GSPN-2 line scan: `gspn2_scan`, and `gspn2_scan_reference`, the slow truth it is tested against."""

from .reference import gspn2_scan_reference
from .scan import gspn2_scan

__all__ = ["gspn2_scan", "gspn2_scan_reference"]
