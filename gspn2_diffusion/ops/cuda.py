"""The scan on CUDA: chooses a variant of the kernels in `kernels/`, compiles it once through CuPy and launches it.

`choose` is the table: a pure function of the shapes, the alignment and the device's limits. docs/kernel.md says why.
"""

import atexit
import ctypes
import itertools
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

STORAGE_NAMES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
SECTOR = 32  # bytes of a memory transaction
MOST_THREADS = 512  # of a block, so that a thread may have 128 registers
MOST_TURNS = 8  # positions of a thread
MOST_PLACES = 8  # positions of a lane of the forward from boxes: 256 in a box
MOST_STAGES = 8  # of its ring
SLOT = 32  # bytes of a position's logits where a slice has one set of weights
SWIZZLES = {32: 1, 64: 2, 128: 3}  # by bytes of a box's row
CLUSTERS = (*range(1, 9), 16)  # of the kernels from boxes: more than eight blocks is what a device may refuse
# Warps of the kernels from boxes that store and that normalise, in the forward and in the backward: the most for which
# there are registers.
HELPERS = (((1, 4), (1, 2), (1, 1)), ((2, 2), (1, 2), (1, 1)))
MAPS = 6  # of x, lam, u, logits, the state and y, for each of both ways along a map
RING_WORDS = (40, 16)  # registers for what is on its way, in the forward and in the backward


class Device(NamedTuple):
    capability: tuple[int, int]
    processors: int
    shared: int  # bytes that a block can have
    boxes: bool = False  # whether the kernels of bulk.cuh and bulk_backward.cuh may be chosen


class Work(NamedTuple):
    """What the choice of a variant depends on."""

    B: int
    H: int
    W: int
    D: int
    G: int
    K: int
    segment: int  # lines
    size: int  # bytes of an element
    logit_size: int
    aligned: int  # bytes to which every vector of channels is aligned
    logits_aligned: int  # the same of logits, 0 where a pixel's groups do not follow one another
    gates: int  # how many of lam and u there are
    backward: bool
    decay: bool = False
    boxed: bool = False  # whether the copy engine can address all tensors
    saves: bool = False  # the state

    @property
    def segments(self) -> int:
        return -(-max(self.H, self.W) // self.segment)

    @property
    def line(self) -> int:
        return max(self.H, self.W)


class Variant(NamedTuple):
    vec: int
    sets: int
    lanes: int
    ahead: int
    turns: int
    cluster: int
    slices: int
    parts: int
    block: tuple[int, int]
    shared: int
    grid: int
    # Of the kernels from boxes, 0 in the others. There `vec` is the channels of a scanning lane, `lanes` the warps that
    # scan a slice, `ahead` the lines of a box.
    places: int = 0
    halo: int = 0
    span: int = 0
    stages: int = 0
    promotion: int = 0
    storers: int = 0  # warps
    normalizers: int = 0


class Box(NamedTuple):
    """What a TensorMap of bulk.cuh is encoded from: (channel, position, line, direction, batch), strides in bytes."""

    place: int  # in the kernel's parameters
    tensor: int  # of x, lam, u, logits, the state, y and the gradients of x, lam and u
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element: int  # bytes
    promotion: int  # what a miss brings into the second-level cache: 0 the box's bytes, 1 to 3 whole 64, 128 or 256
    swizzle: int  # how many bits of its rows' addresses in shared memory choose between a row's 16-byte parts


class Launch(NamedTuple):
    kernel: str
    defines: tuple[str, ...]
    params: bytes  # the Params of scan.cuh; of bulk.cuh what follows the maps
    grid: int
    block: tuple[int, int]
    cluster: int
    shared: int
    boxes: tuple[Box, ...] = ()
    maps: int = 2 * MAPS  # places for them
    follows: bool = False  # whether it may begin before the launch before it has ended, and waits for that itself

    def arguments(self, encode: Callable[[Box], bytes]) -> bytearray:
        """The kernel's parameters, a multiple of 64 bytes where it has maps."""
        if not self.boxes:
            return bytearray(self.params)
        packed = bytearray(self.maps * MAP_BYTES) + self.params
        packed += bytes(-len(packed) % 64)
        for box in self.boxes:
            packed[box.place * MAP_BYTES : (box.place + 1) * MAP_BYTES] = encode(box).ljust(MAP_BYTES, b"\0")
        return packed


def shared_bytes(work: Work, vec: int, lanes: int, cluster: int, positions: int) -> int:
    """forward_shared_bytes and backward_shared_bytes of scan.cuh."""
    exchanged = 3 if work.backward else 1
    return (32 if cluster > 1 else 0) + exchanged * 2 * (positions + 2) * lanes * vec * 4


def largest_block(work: Work, vec: int, sets: int, cluster: int) -> int:
    """Threads of a block: half where a thread takes more than 128 registers. Those are weights for each channel and, in
    the backward, float32, decay over a cluster and a block of all channels, which goes through the normaliser."""
    whole = work.D * work.size <= SECTOR and vec * work.size > 4
    wide = work.backward and vec > 1 and (work.size == 4 or whole or (work.decay and cluster > 1))
    return MOST_THREADS // 2 if sets > 1 or wide else MOST_THREADS


def lines_ahead(work: Work, vec: int, sets: int, turns: int, lanes: int) -> int:
    """Lines on their way in registers: what RING_WORDS hold, and an even number, since two buffers take turns."""
    if work.decay and lanes == 1:  # which has the logits of every line, too
        return 2
    tensors = (3 + 2 * (work.gates > 0) if work.backward else 1) + work.gates
    bytes_each = vec * work.size * tensors + (3 * vec * work.logit_size if sets > 1 else 0)
    return 4 if turns * bytes_each <= RING_WORDS[work.backward] else 2


def _vectors(work: Work) -> Iterator[tuple[int, int]]:
    """(channels of a thread, its weight sets) that alignment and groups allow, widest first."""
    group = work.D // work.G
    for vec in (4, 2):
        # The backward has twice as many tensors on their way: 8 bytes of each fill a thread's registers, but where a
        # pixel is one sector at most: narrower float32 would be parts of a sector, and blocks have fewer threads there.
        widest = 8 if work.backward and (work.D * work.size > SECTOR or work.size == 2) else 16
        if vec * work.size > min(work.aligned, widest) or work.D % vec:
            continue
        if group % vec == 0:
            yield vec, 1
        elif group == 1 and work.logits_aligned >= vec * work.logit_size:
            yield vec, vec
    yield 1, 1


def _slices(work: Work, vec: int, sets: int, lanes: int) -> tuple[int, int] | None:
    """(slices of the channels, of one group) for `lanes` vectors a block; None where lanes would not share a group."""
    vectors, group = work.D // vec, work.D // work.G // vec
    if sets > 1:
        return -(-vectors // lanes), 1
    if work.D // work.G % vec:
        return None
    if work.G == 1:
        return -(-vectors // lanes), -(-vectors // lanes)
    return (vectors // lanes, group // lanes) if group and group % lanes == 0 else None


def make_variant(work: Work, vec: int, sets: int, lanes: int, cluster: int, ahead: int | None = None) -> Variant | None:
    """The variant with these choices, None where a block cannot have it."""
    sliced = _slices(work, vec, sets, lanes)
    positions = -(-work.line // cluster)
    if cluster > 1:
        positions = max(positions, 2)
    height = largest_block(work, vec, sets, cluster) // lanes
    turns = -(-positions // height)
    if sliced is None or turns > MOST_TURNS:
        return None
    threads = -(-(-(-positions // turns) * lanes) // 32) * 32
    slices, parts = sliced
    return Variant(
        vec,
        sets,
        lanes,
        ahead or lines_ahead(work, vec, sets, turns, lanes),
        turns,
        cluster,
        slices,
        parts,
        (lanes, threads // lanes),
        shared_bytes(work, vec, lanes, cluster, positions),
        work.B * work.K * work.segments * slices * cluster,
    )


def make_bulk(
    work: Work,
    width: int,
    cluster: int = 1,
    batch: int = 4,
    channels: int = 4,
    halo: int = 8,
    shared: int = 227 << 10,
    most_stages: int = MOST_STAGES,
    promotion: int = 0,
) -> Variant | None:
    """The kernel from boxes with these choices, as many stages as `shared` bytes hold and the first of HELPERS for
    which there are registers; None where a block cannot have it."""
    row = width * work.size
    share = -(-work.line // cluster) if cluster == 1 else max(-(-work.line // cluster), halo)
    span = -(-(share if cluster == 1 else share + 2 * halo) // 8) * 8
    places, warps = -(-span // 32), width // channels
    if not work.boxed or width % channels or row % 16 or width > 256 or (work.backward and channels * work.size < 8):
        return None
    if (work.D // work.G % width and work.G > 1) or channels * work.size > 16 or places > MOST_PLACES:
        return None
    if not work.backward and cluster > 1 and halo * row % 128:
        return None  # what the engine stores begins behind the halo

    unit = {128: 1024, 64: 512}.get(row, 256)

    def up(count: int) -> int:
        return -(-count // unit) * unit

    exchange = 4 * warps * (8 + halo * channels * 4) if cluster > 1 else 0
    header = up(4 * MOST_STAGES * 8 + exchange)
    tiles = 1 + work.gates + (1 if work.backward else work.saves and work.gates < 2)
    tile, weights = up(batch * span * row), places * (640 if places in (2, 4, 8) else 512)
    stage = tiles * tile + (up((batch + 1) * span * row) if work.backward else 0)
    stage = up(stage + batch * (span * SLOT + weights))
    stages = min(most_stages, -(-min(work.segment, work.line) // batch) + 1, (shared - header) // stage)
    if stages < 2:
        return None
    # Registers, as nvcc uses them: a lane's positions, and what is read of the next line.
    registers = 56 + places * channels * 7 if work.backward else 48 + places * channels * 3
    for storers, normalizers in HELPERS[work.backward]:
        threads = 32 * (1 + storers + normalizers + warps)
        if threads <= 1024 and registers <= 65536 // (-(-threads // 128) * 128):
            break
    else:
        return None
    slices = -(-work.D // width)
    grid = work.B * work.K * work.segments * slices * cluster
    ring = (places, halo, span, stages, promotion, storers, normalizers)
    used = header + stages * stage
    return Variant(channels, 1, warps, batch, 1, cluster, slices, slices // work.G, (threads, 1), used, grid, *ring)


class Boxes(NamedTuple):
    """A row of the table of kernels from boxes, one for each class of shapes that was timed (docs/kernel.md)."""

    backward: bool
    shortest: int  # positions of a line
    longest: int
    channels: int  # that D has at least
    scans: int  # images x directions at most
    positions: int  # of a block, halos included, where clusters may be large enough for that
    width: int  # most channels of a slice
    vec: int  # channels of a lane
    lines: int  # most of a box
    halo: int
    promotion: int


ANY = 1 << 30
# The first that fits.
BOXES = (
    Boxes(False, 32, 47, 0, ANY, 64, 16, 4, 8, 8, 0),
    Boxes(False, 48, 64, 0, ANY, 64, 16, 4, 4, 8, 2),
    Boxes(False, 65, 96, 0, ANY, 64, 16, 8, 4, 8, 0),
    Boxes(False, 97, 191, 0, ANY, 32, 80, 8, 4, 4, 1),
    Boxes(False, 192, 383, 128, ANY, 80, 32, 8, 2, 8, 0),
    Boxes(False, 384, 1280, 128, ANY, 120, 32, 4, 2, 8, 0),
    Boxes(False, 192, 383, 48, 4, 24, 80, 8, 4, 4, 0),
    Boxes(False, 192, 1280, 48, ANY, 72, 48, 8, 2, 4, 0),
    Boxes(False, 192, 512, 0, ANY, 72, 48, 8, 2, 4, 0),
    Boxes(False, 513, 1280, 0, ANY, 80, 40, 8, 8, 8, 0),
    Boxes(False, 1281, 3072, 0, ANY, 80, 40, 4, 2, 8, 0),  # not timed
    Boxes(True, 56, 64, 0, ANY, 32, 32, 8, 2, 4, 0),
    Boxes(True, 65, 128, 0, ANY, 32, 80, 8, 2, 4, 1),
    Boxes(True, 129, 512, 0, ANY, 24, 80, 8, 2, 4, 0),
    Boxes(True, 513, 1280, 0, ANY, 32, 24, 4, 8, 8, 0),
)
SMALL = 64  # positions of a line up to which boxes were timed only with all blocks running at once
ENOUGH = (40, 64)  # blocks, of a small map's forward and else: narrower slices are chosen to have them


def box_row(work: Work) -> Boxes | None:
    """The row of the table that `work` follows."""

    def fits(row: Boxes) -> bool:
        length = row.shortest <= work.line <= row.longest
        return row.backward == work.backward and length and row.channels <= work.D and row.scans >= work.B * work.K

    return next(filter(fits, BOXES), None)


def _bulks(work: Work, device: Device) -> Iterator[Variant]:
    """Kernels from boxes, the widest slices first."""
    row = box_row(work)
    if not (device.boxes and work.boxed and work.size == 2 and min(work.segment, work.line) >= 32 and row):
        return
    fitting = (n for n in CLUSTERS if work.line <= n * (row.positions - (2 * row.halo if n > 1 else 0)))
    cluster = next(fitting, CLUSTERS[-1])
    unit = 128 // (row.halo * work.size) if cluster > 1 else 8  # a halo begins at whole 128 bytes
    for slices in range(-(-work.D // row.width), -(-work.D // 8) + 1):
        width = -(-work.D // (slices * unit)) * unit
        # Slices of 16 bytes share their sectors; two warps scan one faster than one does.
        vec, promotion = (row.vec, row.promotion) if width > 8 else (4, 2)
        for batch in (n for n in (8, 4, 2) if n <= row.lines):
            made = make_bulk(work, width, cluster, batch, vec, row.halo, device.shared, promotion=promotion)
            if made and made.stages > 2 and not (work.line <= SMALL and made.grid > device.processors):
                yield made
                break


def _candidates(work: Work, device: Device) -> Iterator[Variant]:
    """From the most to the least wanted."""
    boxes = list(_bulks(work, device))
    yield from (v for v in boxes if v.grid >= ENOUGH[work.backward or work.line > SMALL])
    yield from boxes
    clusters = (1, 2, 4, 8) if device.capability >= (9, 0) else (1,)
    long_lines = []
    for vec, sets in _vectors(work):
        sector = min(max(SECTOR // (vec * work.size), 1), 1 << (work.D // vec - 1).bit_length())
        made = [make_variant(work, vec, sets, lanes, n) for lanes in (8, 4, 2, 1) if lanes <= sector for n in clusters]
        possible = [v for v in made if v is not None]
        long_lines += possible[::-1]
        one_turn = [v for v in possible if v.turns == 1]
        widest = max((v.lanes for v in possible), default=1)
        if not work.backward:
            # One block to a line, at half sectors if that alone gives work to half of the processors.
            whole = [v for v in one_turn if v.cluster == 1 and 2 * v.lanes >= widest]
            yield from (v for v in whole if 2 * v.grid >= device.processors)
            yield from whole[-1:]
        yield from one_turn
    # Each position of a thread takes registers of its own.
    yield from sorted(long_lines, key=lambda v: v.turns * v.vec > 4)


@lru_cache(4096)
def choose(work: Work, device: Device) -> Variant:
    """The variant for `work`.

    Raises ValueError where no variant's line fits the device.
    """
    for variant in _candidates(work, device):
        if variant.shared <= device.shared:
            return variant
    raise ValueError(
        f"A line of {work.line} positions does not fit a block of this GPU; scan a smaller map, or run it on the CPU."
    )


PARAMS = struct.Struct("66q q 12i")
MAP_BYTES = 128
_ADDRESS = struct.Struct("Q")
PORTABLE_CLUSTER = 8
NON_PORTABLE = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


def _view(t: torch.Tensor | None) -> tuple[int, ...]:
    """The View of scan.cuh for (B, H, W, D), (B, H, W, K, D) or (B, H, W, K, G, 3); one direction is shared by all."""
    if t is None:
        return (0,) * 6
    strides = t.stride()
    direction = strides[3] if t.dim() > 4 and t.shape[3] > 1 else 0
    return (t.data_ptr(), strides[0], strides[1], strides[2], direction, strides[4] if t.dim() == 6 else 0)


def _alignment(*tensors: torch.Tensor | None) -> int:
    """Bytes (a power of two, at most 16) to which every row of the last dimension of every tensor is aligned."""
    bits = 16
    for t in tensors:
        if t is not None:
            bits |= t.data_ptr()
            for extent, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
                if extent > 1:
                    bits |= stride * t.element_size()
    return bits & -bits


def expanded(*tensors: torch.Tensor | None) -> bool:
    """Whether an element of these stands for several."""
    present = [t for t in tensors if t is not None]
    return any(s == 0 for t in present for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1)


def _boxed(logits: torch.Tensor, *tensors: torch.Tensor | None) -> bool:
    """Whether the copy engine can address these: steps of whole 16 bytes, and a pixel's logits one after another."""
    following = logits.shape[3] == 1 or logits.stride(3) == 3 * logits.shape[4]
    return (
        following
        and not expanded(*tensors)
        and _alignment(*tensors) == 16
        and _logits_alignment(logits) > 0
        and _alignment(logits.flatten(3)) == 16
    )


def _logits_alignment(*tensors: torch.Tensor) -> int:
    if any(t.shape[4] > 1 and t.stride(4) != 3 for t in tensors):
        return 0
    return _alignment(*[t.flatten(4) for t in tensors])


@cache
def defines(
    kernel: str, variant: Variant, storage: torch.dtype, logits: torch.dtype, has: int = 3, decay: bool = False
) -> tuple[str, ...]:
    """Options that compile one of gspn2.cu's kernels, FORWARD, BACKWARD or SUM_PARTIALS, for `variant`; `has`: 1 for
    lam, 2 for u, 4 for the forward's state or the backward's partial sums."""
    threads = variant.block[0] * variant.block[1]
    choices: dict[str, object] = dict(LOGITS=STORAGE_NAMES[logits], CLUSTER=1, THREADS=256)
    if kernel != "SUM_PARTIALS":
        choices |= dict(
            STORAGE=STORAGE_NAMES[storage],
            VEC=variant.vec,
            SETS=variant.sets,
            LANES=variant.lanes,
            CLUSTER=variant.cluster,
            HAS=has,
            DECAY=int(decay),
        )
        if variant.places:
            del choices["VEC"], choices["SETS"], choices["LANES"]
            choices |= dict(WIDTH=variant.vec * variant.lanes, CHANNELS=variant.vec, PLACES=variant.places)
            choices |= dict(BATCH=variant.ahead, HALO=variant.halo, THREADS=-(-threads // 128) * 128)
        else:
            choices |= dict(AHEAD=variant.ahead, TURNS=variant.turns, THREADS=256 if threads <= 256 else MOST_THREADS)
    return (f"-DGSPN2_{kernel}", *(f"-DGSPN2_{name}={value}" for name, value in choices.items()))


class _Arguments(NamedTuple):
    x: torch.Tensor
    lam: torch.Tensor | None
    u: torch.Tensor | None
    logits: torch.Tensor
    directions: Sequence[int]
    softmax: bool
    segment: int
    decay: bool

    def work(self, aligned: int, logits_aligned: int, backward: bool, boxed: bool = False, saves: bool = False) -> Work:
        B, H, W, D = self.x.shape
        gates = sum(t is not None for t in (self.lam, self.u))
        return Work(
            B,
            H,
            W,
            D,
            self.logits.shape[4],
            len(self.directions),
            min(self.segment or max(H, W), max(H, W)),
            self.x.element_size(),
            self.logits.element_size(),
            aligned,
            logits_aligned,
            gates,
            backward,
            self.decay,
            boxed,
            saves,
        )

    def boxes(self, variant: Variant, tensors: Sequence[torch.Tensor | None], backward: bool) -> tuple[Box, ...]:
        """`tensors`: x, lam, u, logits, the state, y."""
        B, H, W, D = self.x.shape
        width, halo = variant.vec * variant.lanes, variant.halo if variant.cluster > 1 else 1
        made = []
        for along, tensor in itertools.product(
            sorted({direction // 2 for direction in self.directions}), range(len(tensors))
        ):
            t = tensors[tensor]
            if t is None:
                continue
            size = t.element_size()
            step = [t.stride(i) * size if t.shape[i] > 1 else 16 for i in range(3)]
            directions = t.shape[3] if tensor != 3 and t.dim() > 4 else 1
            per_direction = t.stride(3) * size if directions > 1 else 16
            length = W if along else H
            share = max(-(-length // variant.cluster), halo)
            channels, wide, positions, lines = D, width, variant.span, variant.ahead
            if tensor == 3:
                channels = t[0, 0, 0].numel()
                wide = SLOT // size
            elif tensor > 3 and not backward:
                positions, lines = share, 1
            elif tensor == 4:
                lines += 1
            sizes = (channels, length, H if along else W, directions, B)
            strides = (step[1 + along], step[2 - along], per_direction, step[0])
            box = (wide, positions, lines, 1, 1)
            place = MAPS * along + tensor
            swizzle = SWIZZLES.get(wide * size, 0)
            made.append(Box(place, tensor, t.data_ptr(), sizes, strides, box, size, variant.promotion, swizzle))
        return tuple(made)

    def launch(
        self,
        kernel: str,
        work: Work,
        variant: Variant,
        outputs: Sequence[torch.Tensor | None],
        partial: torch.Tensor | None,
    ) -> Launch:
        """`outputs`: state, y, and the gradients of x, lam, u and logits."""
        tensors = (self.x, self.lam, self.u, self.logits, *outputs, None if partial is None else partial[0])
        views = [_view(t) for t in tensors]
        if max(step for view in views for step in view[2:4]) >= 2**31:
            raise ValueError("gspn2_scan on a GPU takes rows of less than 2**31 elements; scan a smaller map.")
        packed = sum(direction << 2 * k for k, direction in enumerate(self.directions))
        params = PARAMS.pack(
            *(v for view in views for v in view),
            0 if partial is None else partial.stride(0),
            *(work.B, work.H, work.W, work.D, work.K, work.G, packed, work.segment, work.segments),
            *(variant.slices, variant.parts, self.softmax),
        )
        grid, block, cluster, shared = variant.grid, variant.block, variant.cluster, variant.shared
        if partial is not None and kernel == "SUM_PARTIALS":
            grid, block, cluster, shared = -(-partial[0].numel() // 768), (256, 1), 1, 0
        boxes: tuple[Box, ...] = ()
        if variant.places and kernel != "SUM_PARTIALS":
            boxes = self.boxes(variant, tensors[:MAPS], kernel == "BACKWARD")
            kernel = "BULK_BACKWARD" if kernel == "BACKWARD" else "BULK"
            params += struct.pack("3i", variant.span, variant.stages, variant.storers)
        last = partial if kernel.endswith("BACKWARD") else outputs[0]
        has = (self.lam is not None) + 2 * (self.u is not None) + 4 * (last is not None)
        chosen = defines(kernel, variant, self.x.dtype, self.logits.dtype, has, self.decay)
        return Launch(f"gspn2_{kernel.lower()}", chosen, params, grid, block, cluster, shared, boxes)


def scan_forward(
    x: torch.Tensor,
    lam: torch.Tensor | None,
    u: torch.Tensor | None,
    logits: torch.Tensor,
    directions: Sequence[int],
    softmax: bool,
    segment: int,
    merge_sum: bool,
    save_state: bool,
    decay: bool = False,
    *,
    device: Device | None = None,
    execute: Callable[[Launch], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`eager.scan_forward` in one launch, and torch's sum for `merge_sum`; `device` and `execute` are for tests."""
    B, H, W, D = x.shape
    y = x.new_empty(B, H, W, len(directions), D)
    state = x.new_empty(y.shape if save_state else (0,))
    if B:
        arguments = _Arguments(x, lam, u, logits, directions, softmax, segment, decay)
        boxed = _boxed(logits, x, lam, u, y)
        work = arguments.work(_alignment(x, lam, u, y), _logits_alignment(logits), False, boxed, save_state)
        variant = choose(work, device or device_limits(x.device.index))
        saved = state if save_state else None
        (execute or _execute)(arguments.launch("FORWARD", work, variant, (saved, y, None, None, None, None), None))
    return (y.sum(3, dtype=x.dtype) if merge_sum else y), state


def scan_backward(
    grad_y: torch.Tensor,
    saved: torch.Tensor,
    x: torch.Tensor,
    lam: torch.Tensor | None,
    u: torch.Tensor | None,
    logits: torch.Tensor,
    directions: Sequence[int],
    softmax: bool,
    segment: int,
    merge_sum: bool,
    decay: bool = False,
    *,
    device: Device | None = None,
    execute: Callable[[Launch], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`eager.scan_backward` in one launch, one more where a group's channels span blocks, and torch's sums."""
    if grad_y.shape[-1] > 1 and grad_y.stride(-1) != 1:
        grad_y = grad_y.contiguous()
    if merge_sum:
        grad_y = grad_y.unsqueeze(3)
    each = saved.shape
    grad_x = x.new_empty(each)
    grad_lam, grad_u = (x.new_empty((0,) if t is None else each) for t in (lam, u))
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if x.shape[0]:
        arguments = _Arguments(x, lam, u, logits, directions, softmax, segment, decay)
        aligned = _alignment(x, lam, u, grad_y, saved, grad_x)
        boxed = _boxed(logits, x, lam, u, grad_y, saved, grad_x)
        work = arguments.work(aligned, _logits_alignment(logits, grad_logits), True, boxed)
        variant = choose(work, device or device_limits(x.device.index))
        partial = None
        if variant.parts > 1:
            partial = torch.empty((variant.parts, *logits.shape), dtype=torch.float32, device=x.device)
        outputs = (
            saved,
            grad_y,
            grad_x,
            *(None if t is None else g for t, g in ((lam, grad_lam), (u, grad_u))),
            grad_logits,
        )
        run = execute or _execute
        run(arguments.launch("BACKWARD", work, variant, outputs, partial))
        if partial is not None:
            run(arguments.launch("SUM_PARTIALS", work, variant, outputs, partial))

    def shared_by_directions(grad: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        return grad.sum(3, keepdim=True, dtype=grad.dtype) if t is not None and t.shape[3] < grad.shape[3] else grad

    grad_x = grad_x.sum(3, dtype=x.dtype) if len(directions) > 1 else grad_x.squeeze(3)
    return grad_x, shared_by_directions(grad_lam, lam), shared_by_directions(grad_u, u), grad_logits


def kernel_folder() -> Path:
    """The folder of the CUDA sources: inside the package where it is installed, beside it in an editable install."""
    installed = Path(str(resources.files("gspn2_diffusion"))) / "kernels"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "kernels"


def kernel_source(name: str = "gspn2.cu", _seen: set[str] | None = None) -> str:
    """A source with its own includes put in place, so that compiler caches see every line that they depend on."""
    seen = set() if _seen is None else _seen
    lines = []
    for line in (kernel_folder() / name).read_text().splitlines():
        included = line.split('"')[1] if line.startswith("#include") and '.cuh"' in line else None
        if included is None:
            lines.append("" if line == "#pragma once" else line)
        elif included not in seen:
            seen.add(included)
            lines.append(kernel_source(included, seen))
    return "\n".join(lines)


def _import_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        major = (torch.version.cuda or "13").split(".")[0]
        raise ImportError(
            f"gspn2_scan on a GPU needs CuPy ({error}); run `pip install cupy-cuda{major}x`, or stay on the CPU."
        ) from error
    return cupy


@cache
def device_limits(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        raise RuntimeError(
            f"gspn2_scan on a GPU needs compute capability 8.0 or newer and {properties.name} has {capability[0]}."
            f"{capability[1]}; run it on the CPU."
        )
    runtime = _import_cupy().cuda.runtime
    shared = runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index)
    # Timed on Hopper only (docs/kernel.md).
    boxes = capability[0] == 9 and os.environ.get("GSPN2_BOXES") != "0"
    return Device(capability, properties.multi_processor_count, shared, boxes)


_functions: dict[tuple[int, tuple[str, ...]], Any] = {}
_compiling = threading.Lock()


def _function(launch: Launch, index: int) -> Any:
    """The compiled kernel on device `index` (the current one); CuPy keeps the binary on disk for the next process."""
    key = (index, launch.defines)
    if key not in _functions:
        with _compiling:
            if key not in _functions:
                cupy = _import_cupy()
                # For a race checker (kernels/bulk.cuh), whose script sets it.
                checked = ("-DGSPN2_EVERY_LANE",) if os.environ.get("GSPN2_EVERY_LANE") else ()
                options = ("-std=c++17", *launch.defines, *checked)
                try:
                    kernel = cupy.RawModule(code=kernel_source(), options=options).get_function(launch.kernel)
                    kernel.max_dynamic_shared_size_bytes = device_limits(index).shared
                    if launch.cluster > PORTABLE_CLUSTER and _driver().cuFuncSetAttribute(
                        ctypes.c_void_p(kernel.kernel.ptr), NON_PORTABLE, 1
                    ):
                        raise RuntimeError("clusters of 16 blocks are refused")
                except Exception as error:
                    version = cupy.cuda.runtime.runtimeGetVersion() // 1000
                    raise RuntimeError(
                        f"The scan's kernel did not compile or load with CuPy {cupy.__version__} for CUDA {version} "
                        f"under torch for CUDA {torch.version.cuda}; install the CuPy of torch's CUDA version."
                    ) from error
                _functions[key] = kernel.kernel
    return _functions[key]


# The address alone, without an object around it: what Triton's launches use. Not in torch's builds for the CPU.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class _Config(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


# The driver's CUlaunchAttribute for a launch that follows: PROGRAMMATIC_STREAM_SERIALIZATION.
_FOLLOWS = ctypes.create_string_buffer(struct.pack("I4xi60x", 6, 1))
FOLLOWS_SINCE = 12030  # the driver's version that captures such launches into graphs


@cache
def _driver() -> Any:
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    driver.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return driver


@cache
def _attributes(follows: bool) -> tuple[int | None, int]:
    """Of a launch: where they are, and how many. An older driver's launches wait for the one before."""
    version = ctypes.c_int()
    if not follows or _driver().cuDriverGetVersion(ctypes.byref(version)) or version.value < FOLLOWS_SINCE:
        return None, 0
    return ctypes.addressof(_FOLLOWS), 1


class Starter:
    """`launch` as the driver reads it, with what `params` holds when it is called; not for two threads at once."""

    def __init__(self, function: Any, launch: Launch, params: bytearray) -> None:
        self.kernel = launch.kernel
        self.given = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(params)))
        self.config = _Config(launch.grid, 1, 1, *launch.block, 1, launch.shared, None, *_attributes(launch.follows))
        self.arguments = ctypes.addressof(self.config), function.ptr, ctypes.addressof(self.given), None
        self.params = params
        self.start = _driver().cuLaunchKernelEx

    def __call__(self, index: int) -> None:
        """On torch's current stream of device `index`, which is the current one."""
        self.config.stream = _raw_stream(index) if _raw_stream else torch.cuda.current_stream(index).cuda_stream
        if error := self.start(*self.arguments):
            raise RuntimeError(
                f"The driver did not start {self.kernel} (CUDA error {error}); run with CUDA_LAUNCH_BLOCKING=1 to see "
                "whether an earlier kernel failed."
            )


def _encode(box: Box) -> bytes | None:
    """The driver's TensorMap, None where it refuses."""
    buffer = ctypes.create_string_buffer(MAP_BYTES + 64)
    address = -(-ctypes.addressof(buffer) // 64) * 64

    def words(kind: Any, values: Sequence[int]) -> Any:
        return (kind * len(values))(*values)

    refused = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        1 if box.element == 2 else 2,  # integers of 16 or 32 bits: only zeros are filled in
        len(box.sizes),
        ctypes.c_void_p(box.address),
        words(ctypes.c_uint64, box.sizes),
        words(ctypes.c_uint64, box.strides),
        words(ctypes.c_uint32, box.box),
        words(ctypes.c_uint32, (1,) * len(box.sizes)),
        0,  # not interleaved
        box.swizzle,
        box.promotion,
        0,  # zeros beyond the tensor
    )
    return None if refused else ctypes.string_at(address, MAP_BYTES)


_templates: dict[Box, tuple[bytes, int | None]] = {}


def _template(box: Box) -> tuple[bytes, int | None]:
    """A TensorMap for `box` at any address, and where in it the address is: the word by which two of them differ. None
    where this driver keeps it in another way."""
    key = box._replace(address=0)
    if key not in _templates:
        addresses = box.address, box.address + (1 << 21)
        maps = [_encode(box._replace(address=address)) for address in addresses]
        if maps[0] is None:
            raise RuntimeError(f"The driver refused to encode {box}; please report this shape.")
        place = None
        if maps[1] is not None:
            words = zip(*(struct.unpack(f"{MAP_BYTES // 8}Q", m) for m in maps if m is not None), strict=True)
            differing = [(i, pair) for i, pair in enumerate(words) if pair[0] != pair[1]]
            if len(differing) == 1 and differing[0][1] == addresses:
                place = 8 * differing[0][0]
        _templates[key] = maps[0], place
    return _templates[key]


def encode_box(box: Box) -> bytes:
    """The driver's TensorMap."""
    template, place = _template(box)
    if place is None:
        return _encode(box) or b""
    return template[:place] + _ADDRESS.pack(box.address) + template[place + 8 :]


def _execute(launch: Launch) -> None:
    index = torch.cuda.current_device()
    Starter(_function(launch, index), launch, launch.arguments(encode_box))(index)


# What Inductor's code makes its results with, in a third of the time; not in every build.
_empty_strided: Callable[..., torch.Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def maker_of(y: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Makes uninitialised tensors like `y`, on the current device, which is y's."""
    if y.is_cuda and _empty_strided:
        return partial(_empty_strided, tuple(y.shape), y.stride(), y.dtype)
    return partial(torch.empty, y.shape, dtype=y.dtype, device=y.device)


Inputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]
"""x, lam, u, logits."""


class Repeated:
    """A launch worked out once, of which only addresses change: in its maps, and where `words` says, (64-bit word of
    the parameters, tensor)."""

    def __init__(self, launch: Launch, index: int, words: Iterable[tuple[int, int]] = ()) -> None:
        self.index = index
        self.function, self.launch = _function(launch, index), launch
        self.params = launch.arguments(encode_box)
        places = [(box, _template(box)[1]) for box in launch.boxes]
        self.words = [
            *words,
            *(((box.place * MAP_BYTES + at) // 8, box.tensor) for box, at in places if at is not None),
        ]
        self.maps = [box for box, at in places if at is None]  # that this driver keeps in another way
        self.idle: list[tuple[memoryview, Starter]] = []  # each thread takes one for the time of its launch

    def __call__(self, addresses: Sequence[int]) -> None:
        """`addresses`: of each tensor by its number."""
        try:
            words, start = self.idle.pop()
        except IndexError:
            params = self.params[:]
            words, start = memoryview(params).cast("Q"), Starter(self.function, self.launch, params)
        for word, tensor in self.words:
            words[word] = addresses[tensor]
        for box in self.maps:
            encoded = encode_box(box._replace(address=addresses[box.tensor]))
            start.params[box.place * MAP_BYTES : (box.place + 1) * MAP_BYTES] = encoded
        start(self.index)
        self.idle.append((words, start))


class Plan:
    """A forward that needs no gradient, worked out once: a call only fills in addresses and launches.

    It may be called with any tensors that agree with the first in all that `plan_key` holds.
    """

    def __init__(
        self,
        tensors: Inputs,
        directions: Sequence[int],
        softmax: bool,
        segment: int,
        merge_sum: bool,
        decay: bool,
    ) -> None:
        launches: list[Launch] = []
        y, _ = scan_forward(*tensors, directions, softmax, segment, False, False, decay, execute=launches.append)
        (launch,) = launches
        # Of scan.cuh's Params the first word of each view's six is the address of x, lam, u, logits, the state and y.
        given = [] if launch.boxes else [n for n in (0, 1, 2, 3, 5) if n > 3 or tensors[n] is not None]
        self.launch = Repeated(launch, y.device.index, [(6 * n, n) for n in given])
        self.make = maker_of(y)
        self.merge_sum = merge_sum

    def __call__(self, tensors: Inputs) -> torch.Tensor:
        y = self.make()
        self.launch([*(0 if t is None else t.data_ptr() for t in tensors), 0, y.data_ptr()])
        return y.sum(3, dtype=y.dtype) if self.merge_sum else y


# Where there is a CUDA tensor, torch's own is ready and need not be asked whether it is.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_plans: dict[tuple, Any] = {}
_MOST_PLANS = 4096


def plan_key(tensors: Sequence[torch.Tensor | None], directions: Sequence[str], *options: Any) -> tuple | None:
    """What a Plan depends on, or None where there can be none: torch's own machinery has to see those calls, and the
    checks of the arguments those that are not of the right kind."""
    x = tensors[0]
    if torch.is_grad_enabled() or type(x) is not torch.Tensor or not x.is_cuda or torch.compiler.is_compiling():
        return None
    key: list[Any] = [directions, options, x.get_device()]
    for t in tensors:
        if t is None:
            key.append(None)
        elif type(t) is torch.Tensor:
            key += (t.shape, t.stride(), t.dtype, t.data_ptr() & 15)
        else:
            return None
    if type(directions) is not tuple or x.dtype not in STORAGE_NAMES or _current_device() != key[2]:
        return None
    return tuple(key)


# Binaries are unloaded while CuPy is still there, not when the interpreter takes modules apart.
atexit.register(_functions.clear)
atexit.register(_plans.clear)


def planned(key: tuple) -> Any:
    return _plans.get(key)


def remember(key: tuple, plan: Any) -> Any:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan
