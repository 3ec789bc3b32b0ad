"""The scan of a projection's output that lies in planes, a map for each feature: what inference takes on Hopper.

`choose` is the table; docs/kernel.md says why. What launches is `cuda.py`'s.
"""

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from . import cuda
from .cuda import Box, Device, Launch

MOST_STAGES = 8  # of a ring
MOST_SLOTS = 4  # chunks of weights
MOST_PLACES = 8  # positions of a lane
SERVANTS = 2  # warps: the loading and the storing thread's
MAPS = 5  # of features, logits, y, the state and u, for each of both ways along a map
FEATURES, BIAS, STATE, Y = 0, 1, 4, 5  # tensors, by the number that a launch's boxes have
WAYS = ("ROWS", "COLUMNS")


class Layout(NamedTuple):
    """Which features are what: x (D), lam and u (`gates` x D each, where they are), logits (K x G x 3)."""

    D: int
    G: int
    directions: tuple[int, ...]
    gates: int  # directions that have gates of their own: K, or 1 where they share them
    lam: bool
    u: bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        gate = self.gates * self.D
        return self.D, gate * self.lam, gate * self.u, len(self.directions) * self.G * 3

    @property
    def starts(self) -> tuple[int, int, int]:
        """The first planes of lam, u and logits."""
        x, lam, u, _ = self.sizes
        return x, x + lam, x + lam + u

    @property
    def own(self) -> bool:
        """Whether each channel has weights of its own."""
        return self.G == self.D > 1

    @property
    def alone(self) -> bool:
        """Whether nothing of other directions is to be added to the gradients of x and lam."""
        return self.lam and len(self.directions) == 1

    @property
    def gate_step(self) -> int:
        """Planes from one direction's gates to the next one's."""
        return self.D if self.gates > 1 else 0


class Work(NamedTuple):
    """What the choice of a variant depends on."""

    B: int
    H: int
    W: int
    layout: Layout
    segment: int  # lines, 0 for all
    size: int  # bytes of an element
    decay: bool

    @property
    def ways(self) -> tuple[int, ...]:
        """0: scans along rows, whose lines are columns; 1: along columns."""
        return tuple(sorted({direction // 2 for direction in self.layout.directions}))

    def length(self, along: int) -> int:
        """Positions of a line."""
        return self.W if along else self.H

    def all_lines(self, along: int) -> int:
        return self.H if along else self.W

    def lines(self, along: int) -> int:
        """Of a segment."""
        return min(self.segment or 1 << 30, self.all_lines(along))

    def segments_of(self, along: int) -> int:
        return -(-self.all_lines(along) // self.lines(along))

    @property
    def longest(self) -> int:
        return max(self.length(along) for along in self.ways)

    @property
    def segments(self) -> int:
        return max(self.segments_of(along) for along in self.ways)

    @property
    def blocks(self) -> int:
        """For each slice of channels, where lines are not split."""
        return self.B * len(self.layout.directions) * self.segments


class Variant(NamedTuple):
    sets: int  # of weights: one, or one for each channel
    cluster: int
    # For scans along rows and along columns.
    widths: tuple[int, int]  # channels of a slice
    spans: tuple[int, int]  # positions of a block, halos included
    shares: tuple[int, int]  # without
    places: tuple[int, int]  # positions of a lane
    lines: tuple[int, int]  # of a box
    units: tuple[int, int]  # what a normalising lane does at once
    stages: tuple[int, int]
    slots: int
    halo: int
    normalizers: int  # warps
    slices: int
    threads: int
    shared: int
    grid: int
    promotion: int
    mixed: int
    keep: int  # whether the second-level cache is to keep x rather than the rest


def up(count: int, unit: int = 1024) -> int:
    return -(-count // unit) * unit


def lane_places(span: int, most: int, along: int) -> int:
    """Positions of a lane, `most` at most where that is possible. Where a line is a row, lanes read theirs at once: a
    power of two."""
    fitting = [n for n in range(1, MOST_PLACES + 1) if span % n == 0 and span <= 32 * n]
    kinds = [n for n in fitting if n & (n - 1) == 0] if along else fitting
    return max([n for n in kinds if n <= most] or kinds[:1], default=0)


def widths_of(work: Work, width: int | tuple[int, int]) -> tuple[int, int] | None:
    """For scans along rows and along columns; None where a slice would have channels of two groups but not weights for
    each."""
    D, G = work.layout.D, work.layout.G
    widths = width if isinstance(width, tuple) else (width, width)
    return None if 1 < G < D and any(D // G % n for n in widths) else widths


def chunk_of(work: Work, along: int, lines: int, halo: int) -> int:
    """Lines of a chunk of a box with so many, 0 where there is none: chunks are of 16 bytes along rows, and edges are
    exchanged between them."""
    chunk = min(lines, 8) if along else 16 // work.size
    whole = along or lines * work.size in (16, 32, 64, 128)
    return 0 if not whole or lines % chunk or halo % chunk else chunk


def share_of(
    work: Work, along: int, lines: int, cluster: int, least: int, halos: int, places: int
) -> tuple[int, int, int] | None:
    """Positions that a block has of a line, `least` at least, with `halos` and without, and those of a lane; None where
    it cannot have them, or boxes of so many lines not the map."""
    # A box may reach beyond a map but not into the next segment, from either end.
    all_lines = work.lines(along)
    if all_lines < work.all_lines(along) and (all_lines % lines or (not along and work.W % lines)):
        return None
    share = max(up(-(-work.length(along) // cluster), 8), least)
    span = share + halos
    lane = lane_places(span, places, along)
    return (span, share, lane) if lane and span <= 256 and lines <= 256 else None


def make_variant(
    work: Work,
    width: int | tuple[int, int],
    cluster: int = 1,
    lines: tuple[int, int] = (32, 16),
    places: tuple[int, int] = (5, 4),
    units: tuple[int, int] = (4, 4),
    normalizers: int = 4,
    slots: int = 3,
    halo: int = 8,
    promotion: int = 2,
    mixed: int = 1,
    keep: int = 0,
    shared: int = 227 << 10,
    most_stages: int = MOST_STAGES,
) -> Variant | None:
    """The variant with these choices (of `places` and `units` the most; two widths of slices for scans along rows and
    along columns) and as many stages as `shared` bytes hold, None where a block cannot have it."""
    D, own = work.layout.D, work.layout.own
    widths = widths_of(work, width)
    if widths is None:
        return None
    spans, shares, stages, chosen, at_once = [8, 8], [8, 8], [1, 1], [1, 1], [1, 1]
    most_warps = used = 0
    for along in (0, 1):
        width, each = widths[along], lines[along]
        sets, chunk = width if own else 1, chunk_of(work, along, each, halo)
        if not chunk or chunk % 2:
            return None
        if along not in work.ways:
            continue
        # Blocks at a line's ends have one halo; of two blocks, both are.
        fit = share_of(work, along, each, cluster, halo, min(cluster - 1, 2) * halo, places[along])
        if fit is None:
            return None
        span, shares[along], chosen[along] = fit
        spans[along], at_once[along] = span, units[along] if along else min(units[along], chunk)
        warps = -(-width // (32 // (span // chosen[along])))
        exchange = 4 * (8 * warps + halo * width * 4) if cluster > 1 else 0
        header = up(8 * (4 * MOST_STAGES + 2 * MOST_SLOTS) + exchange)
        tiles = [span, *[span] * work.layout.lam, *[shares[along]] * work.layout.u]  # u is for own positions only
        row = each * work.size
        stage = sum(up(width * row * positions) for positions in tiles) + up(3 * sets * row * span)
        weights = up(slots * chunk * sets * span * 2 * work.size)
        batches = -(-work.lines(along) // each)
        stages[along] = min(most_stages, batches, (shared - header - weights) // stage)
        if stages[along] < min(2, batches):
            return None
        used = max(used, header + weights + stages[along] * stage)
        most_warps = max(most_warps, warps)
    threads = 32 * (SERVANTS + normalizers + most_warps)
    if threads > 1024:
        return None
    slices = -(-D // min(widths))
    grid = work.blocks * slices * cluster
    return Variant(
        max(widths) if own else 1,
        cluster,
        widths,
        (spans[0], spans[1]),
        (shares[0], shares[1]),
        (chosen[0], chosen[1]),
        lines,
        (at_once[0], at_once[1]),
        (stages[0], stages[1]),
        slots,
        halo,
        normalizers,
        slices,
        threads,
        used,
        grid,
        promotion,
        mixed,
        keep,
    )


class Row(NamedTuple):
    """A row of the table, one for each class of shapes that was faster than channels last (docs/kernel.md)."""

    shortest: int  # positions of a line
    longest: int
    own: bool  # whether each channel has weights of its own
    size: int  # bytes of an element
    share: int  # positions of a block at most, halos not included, where clusters may be large enough for that
    # Channels of a slice at most; two where scans along columns have wider ones, for more than two waves of blocks.
    width: int | tuple[int, int]
    lines: tuple[int, int]
    places: tuple[int, int]
    units: tuple[int, int]
    normalizers: int
    halo: int = 8
    promotion: int = 2
    slots: int = 3
    mixed: int = 0
    keep: int = 0
    stages: int = MOST_STAGES  # of a ring at most
    once: bool = False  # only where all blocks run at once, and are on more than half of the processors
    only: int | None = None  # 1: where all directions go along columns


ROWS = (
    Row(32, 40, False, 2, 40, 10, (16, 4), (2, 2), (4, 2), 2, promotion=0, mixed=1),
    Row(41, 96, False, 2, 96, 5, (16, 4), (2, 2), (4, 2), 4, promotion=0, mixed=1),
    Row(97, 128, False, 2, 128, (4, 8), (16, 8), (4, 4), (4, 2), 6, mixed=1, keep=1),
    Row(97, 128, False, 2, 128, 4, (16, 8), (4, 4), (4, 4), 4, promotion=1, slots=2, keep=1, stages=4),
    Row(129, 383, False, 2, 128, 5, (16, 8), (5, 8), (8, 2), 5, 32, keep=1, stages=3, once=True),
    Row(129, 383, False, 2, 64, (7, 8), (16, 8), (3, 4), (4, 2), 4, 16, mixed=1, keep=1),
    Row(129, 383, False, 2, 64, 8, (16, 8), (3, 4), (4, 4), 4, 16, mixed=1, keep=1, stages=4),
    Row(384, 640, False, 2, 64, (5, 8), (32, 8), (3, 4), (8, 2), 4, 16, slots=2, mixed=1, keep=1),
    Row(384, 640, False, 2, 64, 6, (16, 8), (3, 4), (4, 4), 2, 16, mixed=1, keep=1),
    Row(641, 1280, False, 2, 64, (5, 7), (32, 8), (3, 4), (8, 2), 3, 16, mixed=1, keep=1),
    Row(641, 1280, False, 2, 64, 8, (16, 8), (3, 4), (8, 4), 4, 16, slots=2, stages=4),
    Row(1281, 2048, False, 2, 64, (3, 6), (16, 8), (5, 8), (4, 4), 2, 16),
    Row(1281, 2048, False, 2, 64, 4, (16, 8), (5, 8), (4, 2), 2, 16),
    Row(641, 1280, True, 2, 64, 1, (16, 8), (3, 4), (4, 2), 3, stages=4, only=1),
    Row(641, 1280, True, 2, 128, 1, (16, 4), (5, 4), (4, 1), 3, 16, stages=3),
    Row(641, 1280, True, 4, 64, 1, (16, 4), (3, 4), (4, 2), 3, 16, only=1),
    Row(641, 1280, True, 4, 64, 1, (16, 4), (3, 4), (4, 1), 6, 16, mixed=1, stages=3),
)
CLUSTERS = (1, 2, 4, 8, 16)
MOST_SPARED = 4  # channels fewer than the row's
WAVE_COSTS = 5  # channels


def find_rows(rows: Sequence[Any], height: int, width: int, channels: int, groups: int, size: int) -> list[Any]:
    """Those of `rows` that are for maps of these sides; the first that can be is taken. Rows of a map are whole 16
    bytes."""
    longest, kind = max(height, width), (groups == channels > 1, size)
    fits = [row for row in rows if row.shortest <= longest <= row.longest and (row.own, row.size) == kind]
    return fits if width % 8 == 0 else []


def rows_of(height: int, width: int, channels: int, groups: int, size: int) -> list[Row]:
    """The rows of the table for maps of these sides, none where channels last are to be scanned."""
    return find_rows(ROWS, height, width, channels, groups, size)


def cluster_of(row: Any, work: Work) -> int:
    return next((n for n in CLUSTERS if work.longest <= n * row.share), CLUSTERS[-1])


def options_of(row: Any, work: Work, device: Device, *more: str) -> dict[str, Any]:
    """What `make_variant` takes of a row, but for the width of a slice; `more`: what only one pass has."""
    names = ("lines", "places", "units", "normalizers", "halo", "slots", "promotion", "mixed", "keep", *more)
    options = dict(cluster=cluster_of(row, work), most_stages=row.stages, shared=device.shared)
    return {name: getattr(row, name) for name in names} | options


def narrowest(work: Work, widths: Sequence[int], processors: int) -> list[int]:
    """Of `widths`, falling, the least with which all blocks still run at once, where one does."""
    return [n for n in widths if work.blocks * -(-work.layout.D // n) <= processors][-1:]


def takes_two(widths: tuple[int, int], work: Work, cluster: int, device: Device) -> bool:
    """Whether slices of two widths are for `work`: in more than two waves of blocks, and where none is nearly empty,
    which would take as long as the others."""
    D = work.layout.D
    left_over = any(10 * (-D % n) > D for n in widths)
    return work.blocks * -(-D // widths[0]) * cluster > 2 * device.processors and not left_over


@lru_cache(4096)
def choose(work: Work, device: Device) -> Variant | None:
    """The variant for `work`, whose features come first already; None where there is none."""
    rows = rows_of(work.H, work.W, work.layout.D, work.layout.G, work.size) if device.boxes else []
    made = (variant_of(row, work, device) for row in rows)
    return next((v for v in made if v is not None), None)


def variant_of(row: Row, work: Work, device: Device) -> Variant | None:
    if row.only is not None and work.ways != (row.only,):
        return None
    options = options_of(row, work, device)
    D, cluster = work.layout.D, options["cluster"]
    if isinstance(row.width, tuple):
        return make_variant(work, row.width, **options) if takes_two(row.width, work, cluster, device) else None
    widths = list(range(min(row.width, D), 0, -1))
    if row.once:
        at_once = device.processors // cluster
        widths = [n for n in narrowest(work, widths[:2], at_once) if 2 * work.blocks * -(-D // n) > at_once]
    elif cluster == 1:
        widths = narrowest(work, widths, device.processors) + widths
    elif not row.own and row.width >= MOST_SPARED:
        # Clusters run in waves, and slices of a few channels more or less may need one wave less. A wave takes as long
        # as if a slice had some channels more than it has.
        at_once = device.processors // cluster
        spared = [min(n, D) for n in range(row.width, row.width - MOST_SPARED, -2)]
        widths.insert(0, min(spared, key=lambda n: -(-work.blocks * -(-D // n) // at_once) * (n + WAVE_COSTS)))
    made = (make_variant(work, n, **options) for n in widths)
    return next((v for v in made if v is not None), None)


def kernel_defines(
    kernel: str, variant: Any, storage: torch.dtype, has: int, pairs: dict[str, str], **more: object
) -> tuple[str, ...]:
    """Options that compile `kernel` of gspn2.cu; `pairs`: fields with a value for each way that only one pass has."""
    name = cuda.STORAGE_NAMES[storage]
    choices: dict[str, object] = dict(
        STORAGE=name,
        LOGITS=name,
        SETS=variant.sets,
        SLOTS=variant.slots,
        HALO=variant.halo,
        CLUSTER=variant.cluster,
        MIXED=variant.mixed,
        KEEP=variant.keep,
        HAS=has,
        **more,
    )
    pairs = dict(WIDTH="widths", SPAN="spans", PLACES="places", LINES="lines", UNIT="units") | pairs
    for what, field in pairs.items():
        choices |= {f"{what}_{way}": value for way, value in zip(WAYS, getattr(variant, field), strict=True)}
    return (f"-DGSPN2_{kernel}", *(f"-DGSPN2_{name}={value}" for name, value in choices.items()))


def defines(variant: Variant, storage: torch.dtype, has: int, decay: bool) -> tuple[str, ...]:
    """Options that compile gspn2.cu's PLANES; `has`: 1 for lam, 2 for u, 4 for a bias, 8 for a state."""
    return kernel_defines("PLANES", variant, storage, has, {}, THREADS=variant.threads, DECAY=int(decay))


def make_box(
    work: Work, variant: Any, place: int, along: int, tensor: int, t: torch.Tensor, positions: int, planes: int
) -> Box:
    """Of a lane's `positions` and all lines of a box, in so many planes of `t`."""
    line, size = variant.lines[along], work.size
    inner = (line, positions) if not along else (positions, line)
    return Box(
        place,
        tensor,
        t.data_ptr(),
        (work.W, work.H, work.B, t.shape[0], 1),
        (*(t.stride(n) * size if t.shape[n] > 1 else 16 for n in (2, 1, 0)), 16),
        (*inner, 1, planes, 1),
        size,
        variant.promotion,
        0 if along else cuda.SWIZZLES.get(line * size, 0),
    )


def pack_params(
    work: Work, variant: Any, views: dict[int, tuple[int, ...]], softmax: bool, part_stride: int = 0
) -> bytes:
    """scan.cuh's Params, with `views` by the number of their tensor."""
    layout = work.layout
    packed = sum(direction << 2 * k for k, direction in enumerate(layout.directions))
    return cuda.PARAMS.pack(
        *(v for n in range(11) for v in views.get(n, (0,) * 6)),
        part_stride,
        *(work.B, work.H, work.W, layout.D, len(layout.directions), layout.G, packed),
        *(work.segment or max(work.H, work.W), work.segments, variant.slices, 1, softmax),
    )


def view_of(t: torch.Tensor, channels: int) -> tuple[int, ...]:
    """scan.cuh's View of (K D, B, H, W)."""
    plane, image, row, column = t.stride()
    return t.data_ptr(), image, row, column, channels * plane, plane


def launch_of(
    kernel: str, chosen: tuple[str, ...], params: bytes, variant: Any, boxes: Sequence[Box], maps: int
) -> Launch:
    """Its blocks wait for the launch before it themselves."""
    block, placed = (variant.threads, 1), tuple(boxes)
    grid, cluster, shared = variant.grid, variant.cluster, variant.shared
    return Launch(kernel, chosen, params, grid, block, cluster, shared, placed, maps, follows=True)


def make_launch(
    features: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    work: Work,
    variant: Variant,
    softmax: bool,
    state: torch.Tensor | None = None,
) -> Launch:
    """`features` (F, B, H, W), `y` (K D, B, H, W) and `state` as `y`, rows of which are contiguous."""
    layout, boxes = work.layout, []

    def add(place: int, along: int, tensor: int, t: torch.Tensor, positions: int, planes: int) -> None:
        boxes.append(make_box(work, variant, MAPS * along + place, along, tensor, t, positions, planes))

    for along in work.ways:
        add(0, along, FEATURES, features, variant.spans[along], variant.widths[along])
        add(1, along, FEATURES, features, variant.spans[along], 3 * min(variant.sets, variant.widths[along]))
        if layout.u:
            add(4, along, FEATURES, features, variant.shares[along], variant.widths[along])
        if not along:
            add(2, along, Y, y, variant.shares[along], 1)
            if state is not None:
                add(3, along, STATE, state, variant.shares[along], 1)
    views = {n: view_of(t, layout.D) for n, t in ((Y, y), (STATE, state)) if t is not None}
    params = pack_params(work, variant, views, softmax)
    address = 0 if bias is None else bias.data_ptr()
    params += struct.pack("q6i", address, *variant.stages, *layout.starts, layout.gate_step)
    has = layout.lam + 2 * layout.u + 4 * (bias is not None) + 8 * (state is not None)
    chosen = defines(variant, features.dtype, has, work.decay)
    return launch_of("gspn2_planes", chosen, params, variant, boxes, 2 * MAPS)


def addressable(features: torch.Tensor) -> bool:
    """Whether the copy engine can read these planes: rows of whole 16 bytes, one after another."""
    return features.stride(3) == 1 and not cuda.expanded(features) and cuda._alignment(features) == 16


def work_of(features: torch.Tensor, layout: Layout, segment: int, decay: bool) -> Work | None:
    """None where the features are not as the kernels need them."""
    _, B, H, W = features.shape
    if features.dtype not in cuda.STORAGE_NAMES or not features.numel() or not addressable(features):
        return None
    return Work(B, H, W, layout, 0 if segment >= max(H, W) else segment, features.element_size(), decay)


def scan(
    features: torch.Tensor,
    bias: torch.Tensor | None,
    layout: Layout,
    softmax: bool,
    segment: int,
    decay: bool,
    state: torch.Tensor | None = None,
    *,
    device: Device | None = None,
    execute: Callable[[Launch], None] | None = None,
) -> torch.Tensor | None:
    """(F, B, H, W) -> (K D, B, H, W) in one launch, None where there is no variant. `state`, as large as the result,
    gets h; only with an output gate, without which the result is h.

    `device` and `execute` are for tests.
    """
    work = work_of(features, layout, segment, decay)
    variant = None if work is None else choose(work, device or cuda.device_limits(features.device.index))
    if work is None or variant is None:
        return None
    y = features.new_empty(len(layout.directions) * layout.D, *features.shape[1:])
    (execute or cuda._execute)(make_launch(features, bias, y, work, variant, softmax, state))
    return y


class Plan:
    """A scan worked out once, as `cuda.Plan`; `count` directions are added if it is not 0."""

    def __init__(
        self, features: torch.Tensor, bias: torch.Tensor | None, launch: Launch, y: torch.Tensor, count: int
    ) -> None:
        maps = launch.maps * cuda.MAP_BYTES // 8
        words = [(maps + 6 * Y, Y)] + [(maps + cuda.PARAMS.size // 8, BIAS)] * (bias is not None)
        self.launch = cuda.Repeated(launch, features.device.index, words)
        self.make, self.count = cuda.maker_of(y), count

    def __call__(self, features: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = self.make()
        self.launch((features.data_ptr(), 0 if bias is None else bias.data_ptr(), 0, 0, 0, y.data_ptr()))
        return sum_of_directions(y, self.count) if self.count else y


def sum_of_directions(y: torch.Tensor, count: int) -> torch.Tensor:
    """(K D, B, H, W) -> (D, B, H, W)."""
    return y.unflatten(0, (count, -1)).sum(0, dtype=y.dtype)


def parts(features: torch.Tensor, layout: Layout) -> Sequence[torch.Tensor | None]:
    """x, lam, u and logits as `gspn2_scan` takes them, views of (F, B, H, W)."""
    last = features.permute(1, 2, 3, 0)
    x, lam, u, logits, _ = last.split((*layout.sizes, last.shape[-1] - sum(layout.sizes)), dim=-1)
    gate = (layout.gates, layout.D)
    taps = (len(layout.directions), layout.G, 3)
    return (
        x,
        lam.unflatten(-1, gate) if layout.lam else None,
        u.unflatten(-1, gate) if layout.u else None,
        logits.unflatten(-1, taps),
    )
