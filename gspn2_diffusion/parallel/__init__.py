"""One image over several GPUs: rows are sharded, and scans run on channel shards in between."""

from .exchange import row_heights
from .scan import sharded_gspn2_scan
from .unet import shard_rows

__all__ = ["row_heights", "shard_rows", "sharded_gspn2_scan"]
