"""How long a process waits for its first scan on a GPU: when nothing is compiled yet, and when an earlier process has.

    python benchmarks/first_launch.py

Starts processes of its own, one after another, with an empty folder for CuPy's compiled kernels. Each makes the inputs
of SDXL's 64 x 64 maps, then times importing CuPy and the first call of `gspn2_scan` until its result is there.
"""

import argparse
import os
import subprocess
import sys
import tempfile

FIRST_CALL = """
import time, torch
from gspn2_diffusion.ops import gspn2_scan
torch.manual_seed(0)
B, H, W, D, K = 2, 64, 64, 80, 4
row = torch.randn(B, H, W, 736, device="cuda", dtype=torch.bfloat16)
x, lam, u, logits, _ = row.split((D, K * D, K * D, 3 * K, 4), -1)
torch.cuda.synchronize()
start = time.perf_counter()
import cupy
imported = time.perf_counter()
with torch.no_grad():
    gspn2_scan(x, lam.unflatten(-1, (K, D)), u.unflatten(-1, (K, D)), logits.unflatten(-1, (K, 1, 3)))
    torch.cuda.synchronize()
print(imported - start, time.perf_counter() - imported)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "CUPY_CACHE_DIR": cache}
        for number in range(1, args.processes + 1):
            command = [sys.executable, "-c", FIRST_CALL]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            imported, called = map(float, done.stdout.split())
            print(f"process {number}: import of CuPy {imported:.3f} s, first scan {called:.3f} s", flush=True)


if __name__ == "__main__":
    main()
