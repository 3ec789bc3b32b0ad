"""What a box costs Hopper's copy engine, by the bytes of its rows: cycles for each row of one position.

    python benchmarks/copy_engine.py

Every processor (or one alone) moves boxes of 64 positions x 4 lines of a map whose positions are 1472 bytes apart:
loads, with four boxes on their way, and stores. `near` stays in the second-level cache, `far` does not. docs/kernel.md
says what follows from it. Needs a GPU of compute capability 9.0.
"""

import argparse

import cupy
import numpy as np
import torch

from gspn2_diffusion.ops import cuda

POSITIONS, LINES, COLUMN, TALL = 64, 4, 256, 64  # of a box; positions and lines of an image
PITCH, BOXES, RING = 1472, 256, 4

SOURCE = """
extern "C" __global__ void rows(
    const __grid_constant__ TensorMap map, int bytes, int lines, int stores, long long* cycles) {
    Signal* const full = reinterpret_cast<Signal*>(shared_memory());
    unsigned char* const boxes = shared_memory() + 1024;
    if (threadIdx.x) return;
    for (int i = 0; i < RING; ++i) signal_init(full + i);
    signals_ready();
    const int column = blockIdx.x % (COLUMN / POSITIONS) * POSITIONS, image = blockIdx.x / (COLUMN / POSITIONS);
    const long long began = clock64();
    for (int i = 0; i < BOXES + RING; ++i) {
        const int stage = i % RING, line = i * LINES % lines;
        if (stores) {
            if (i == BOXES) break;
            store_box(map, 0, column, line, 0, image, boxes + stage * bytes);
            end_group();
            groups_read<RING - 1>();
            continue;
        }
        if (i >= RING) signal_wait(full + stage, (i / RING - 1) & 1);
        if (i >= BOXES) continue;
        signal_expect(full + stage, bytes);
        load_box(boxes + stage * bytes, map, 0, column, line, 0, image, full + stage);
    }
    if (stores) groups_read<0>();
    cycles[blockIdx.x] = clock64() - began;
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 48, 64, 80, 96, 128, 160], help="bytes")
    args = parser.parse_args()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    names = ("POSITIONS", "LINES", "COLUMN", "BOXES", "RING")
    options = ("-std=c++17", *(f"-D{name}={globals()[name]}" for name in names))
    kernel = cupy.RawModule(code=cuda.kernel_source("device.cuh") + SOURCE, options=options).get_function("rows")
    kernel.max_dynamic_shared_size_bytes = cuda.device_limits(0).shared
    images = -(-processors * POSITIONS // COLUMN)
    memory = torch.zeros(images * TALL * COLUMN * PITCH, dtype=torch.uint8, device="cuda")
    cycles = torch.zeros(processors, dtype=torch.int64, device="cuda")

    def cycles_per_row(width: int, blocks: int, lines: int, stores: bool) -> float:
        sizes, box = (width // 2, COLUMN, TALL, 1, images), (width // 2, POSITIONS, LINES, 1, 1)
        strides = (PITCH, COLUMN * PITCH, 16, TALL * COLUMN * PITCH)
        encoded = cuda.encode_box(cuda.Box(0, 0, memory.data_ptr(), sizes, strides, box, 2, 2, 0))
        arguments = (np.frombuffer(encoded, np.dtype((np.void, cuda.MAP_BYTES))),)
        arguments += tuple(np.int32(n) for n in (POSITIONS * LINES * width, lines, stores))
        best = float("inf")
        for _ in range(3):
            shared = 1024 + RING * POSITIONS * LINES * width
            kernel((blocks,), (32,), (*arguments, np.int64(cycles.data_ptr())), shared_mem=shared)
            best = min(best, cycles[:blocks].double().mean().item())
        return best / (BOXES * LINES * POSITIONS)

    print(f"{torch.cuda.get_device_name()}; {processors} processors; cycles for a row")
    print("bytes of a row | load: one processor   all, near   all, far | store: one processor   all, near   all, far")
    for width in args.widths:
        columns = ((1, LINES), (processors, LINES), (processors, TALL))
        shown = ["   ".join(f"{cycles_per_row(width, *c, s):6.2f}" for c in columns) for s in (False, True)]
        print(f"{width:5d} | {shown[0]} | {shown[1]}", flush=True)


if __name__ == "__main__":
    main()
