"""The gradients of a scan from planes: what training takes on Hopper, where the table has a row.

`choose` is the table; docs/kernel.md says why. `planes.py` has the forward.
"""

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from . import cuda
from .cuda import Device, Launch
from .planes import (
    MOST_SLOTS,
    MOST_STAGES,
    SERVANTS,
    Layout,
    Work,
    addressable,
    chunk_of,
    find_rows,
    kernel_defines,
    lane_places,
    launch_of,
    make_box,
    narrowest,
    options_of,
    pack_params,
    share_of,
    takes_two,
    up,
    view_of,
    widths_of,
    work_of,
)

MAPS = 7  # of u, logits, dy, the state, g, the gradient of u and inputs, for each of both ways along a map
FEATURES, GRAD_Y, STATE, G, GRAD_U = 0, 5, 4, 7, 8  # tensors, by the number that a launch's boxes have
HAS_INPUTS, HAS_PARTS = 16, 32
H_HALO = 8  # positions of the state on either side of a share
SUM = struct.Struct("2Q2q3i4x")  # of planes
RESERVED = 1 << 10  # bytes of a processor's shared memory for each of its blocks
MOST_SUMS = 6  # the logits of each direction, u where directions share it, what pads the features
FINISH_THREADS = 256


class Variant(NamedTuple):
    sets: int  # of weights: one, or one for each channel
    cluster: int
    # For scans along rows and along columns.
    widths: tuple[int, int]  # channels of a slice
    parts: tuple[int, int]  # slices of a group
    spans: tuple[int, int]  # positions of a block, halos included
    shares: tuple[int, int]  # without
    places: tuple[int, int]  # positions of a scanning lane
    lines: tuple[int, int]  # of a box
    units: tuple[int, int]  # what a normalising lane does at once
    stages: tuple[int, int]
    slots: int
    halo: int
    workers: int  # warps that make gradients
    normalizers: int  # warps
    slices: int
    threads: int
    shared: int
    grid: int
    promotion: int
    mixed: int
    keep: int  # whether the second-level cache is to keep g rather than the rest
    early: int  # whether the second launch begins with what is done while the first still runs
    inputs: bool  # whether it makes the gradients of x and lam, and no g

    @property
    def partial(self) -> bool:
        """Whether a group's channels are in several slices, which leave parts of the logits' gradients."""
        return max(self.parts) > 1


def make_variant(
    work: Work,
    width: int | tuple[int, int],
    cluster: int = 1,
    lines: tuple[int, int] = (16, 8),
    places: tuple[int, int] = (3, 4),
    units: tuple[int, int] = (4, 2),
    workers: int = 4,
    normalizers: int = 4,
    slots: int = 3,
    halo: int = 8,
    promotion: int = 2,
    mixed: int = 0,
    keep: int = 0,
    early: int = 0,
    shared: int = 227 << 10,
    most_stages: int = MOST_STAGES,
) -> Variant | None:
    """The variant with these choices (as the forward's) and as many stages as `shared` bytes hold, None where a block
    cannot have it."""
    D, G, own = work.layout.D, work.layout.G, work.layout.own
    widths = widths_of(work, width)
    if widths is None or not 1 <= slots <= MOST_SLOTS:
        return None
    parts = (1, 1) if own else (-(-D // G // widths[0]), -(-D // G // widths[1]))
    low = halo if cluster > 1 else 0  # on either side
    spans, shares, stages, at_once = [8 + 2 * low] * 2, [8, 8], [1, 1], [1, 1]
    chosen = [lane_places(spans[0], 2, 1)] * 2  # of a way that no direction goes
    warps = used = 0
    for along in (0, 1):
        width, each = widths[along], lines[along]
        sets, chunk = width if own else 1, chunk_of(work, along, each, halo)
        if not chunk or halo % 8:
            return None
        if along not in work.ways:
            continue
        fit = share_of(work, along, each, cluster, low, 2 * low, places[along])
        if fit is None or 3 * sets > 256:
            return None
        span, share, chosen[along] = fit
        spans[along], shares[along] = span, share
        at_once[along] = units[along] if along else min(units[along], chunk)
        row, tiles = each * work.size, [span, *[span] * work.layout.u, share + (2 * H_HALO if cluster > 1 else 0)]
        tiles += [share, share] * work.layout.alone
        stage = sum(up(width * row * positions) for positions in tiles) + up(3 * sets * row * span)
        scanning = -(-width // (32 // (span // chosen[along])))
        exchange = 4 * halo * width * 4 if cluster > 1 else 0
        signals = up(8 * (3 * MOST_STAGES + 3 * MOST_SLOTS + (4 * scanning if cluster > 1 else 0)), 16)
        sigmoids = 0 if max(parts) > 1 else 4
        before = up(signals + exchange) + up(slots * chunk * sets * span * (2 * work.size + sigmoids))
        batches = -(-work.lines(along) // each)
        stages[along] = min(most_stages, batches, (shared - before) // stage)
        if stages[along] < min(2, batches):
            return None
        used = max(used, before + stages[along] * stage)
        warps = max(warps, scanning)
    threads = 32 * (SERVANTS + workers + normalizers + warps)
    if threads > 1024:
        return None
    slices = -(-D // min(widths))
    grid = work.blocks * slices * cluster
    return Variant(
        max(widths) if own else 1,
        cluster,
        widths,
        parts,
        (spans[0], spans[1]),
        (shares[0], shares[1]),
        (chosen[0], chosen[1]),
        lines,
        (at_once[0], at_once[1]),
        (stages[0], stages[1]),
        slots,
        halo,
        workers,
        normalizers,
        slices,
        threads,
        used,
        grid,
        promotion,
        mixed,
        keep,
        early,
        work.layout.alone,
    )


class Row(NamedTuple):
    """A row of the table, one for each class of shapes (docs/kernel.md)."""

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
    workers: int
    normalizers: int
    halo: int = 16
    slots: int = 3
    promotion: int = 2
    mixed: int = 0
    keep: int = 0
    early: int = 0  # in more than two waves of blocks
    stages: int = MOST_STAGES  # of a ring at most
    most: int = 1 << 30  # channels of all slices


ROWS = (
    Row(32, 40, False, 2, 40, 16, (16, 8), (2, 2), (4, 2), 8, 2, promotion=1),
    Row(41, 96, False, 2, 96, 8, (16, 4), (2, 2), (4, 2), 4, 4, promotion=1),
    Row(97, 128, False, 2, 64, (6, 8), (16, 8), (3, 4), (2, 2), 4, 4, mixed=1, keep=1, stages=4, early=1),
    Row(97, 128, False, 2, 32, 12, (16, 8), (3, 4), (2, 2), 2, 4, 8, mixed=1, keep=1),
    Row(129, 640, False, 2, 32, (8, 16), (16, 8), (2, 4), (4, 2), 4, 4, mixed=1, keep=1, early=1),
    Row(129, 640, False, 2, 32, 8, (16, 8), (2, 4), (4, 2), 4, 4, mixed=1, keep=1, early=1),
    Row(641, 1280, False, 2, 64, 8, (16, 2), (5, 8), (4, 2), 4, 3, 8, most=8, early=1),
    Row(641, 1280, False, 2, 64, (6, 10), (32, 8), (5, 4), (8, 2), 2, 4, 8, mixed=1, keep=1, stages=3, early=1),
    Row(641, 1280, False, 2, 64, 6, (32, 8), (5, 4), (8, 2), 2, 4, 8, mixed=1, keep=1, stages=4, early=1),
    Row(1281, 2048, False, 2, 64, (3, 6), (16, 8), (5, 8), (8, 4), 4, 4, early=1),
    Row(1281, 2048, False, 2, 64, 6, (16, 8), (5, 8), (8, 4), 4, 3, early=1),
    Row(641, 1280, True, 2, 64, 1, (64, 8), (3, 4), (8, 2), 4, 4, early=1),
    Row(641, 1280, True, 4, 64, 1, (32, 2), (3, 4), (4, 2), 4, 4, early=1),
)


def rows_of(height: int, width: int, channels: int, groups: int, size: int) -> list[Row]:
    """The rows of the table for maps of these sides, none where channels last are to be scanned."""
    return [row for row in find_rows(ROWS, height, width, channels, groups, size) if channels <= row.most]


@lru_cache(4096)
def choose(work: Work, device: Device) -> Variant | None:
    """The variant for `work`, None where channels last are to be scanned."""
    known = device.boxes and not work.decay
    rows = rows_of(work.H, work.W, work.layout.D, work.layout.G, work.size) if known else []
    made = (variant_of(row, work, device) for row in rows)
    v = next((v for v in made if v is not None), None)
    return v and v._replace(early=int(v.early and may_be_early(v, device)))


def variant_of(row: Row, work: Work, device: Device) -> Variant | None:
    D, options = work.layout.D, options_of(row, work, device, "workers", "early")
    if isinstance(row.width, tuple):
        two = takes_two(row.width, work, options["cluster"], device)
        return make_variant(work, row.width, **options) if two else None
    # As wide as all slices need, so that none is nearly empty.
    widths = [-(-D // slices) for slices in range(-(-D // row.width), D + 1)]
    if options["cluster"] == 1:
        widths = narrowest(work, range(row.width, 0, -1), device.processors * 2 // 3) + widths
    made = (make_variant(work, n, **options) for n in dict.fromkeys(widths))
    return next((v for v in made if v is not None), None)


def may_be_early(v: Variant, device: Device) -> bool:
    """Only in more than two waves of blocks. In fewer, those of the second launch would gather on the few processors
    that are free. And in several, some block has ended before the last begins: so what came before the scan, zeroed
    counts too, is in memory by then."""
    at_once = device.processors * ((device.shared + RESERVED) // (v.shared + RESERVED))
    return v.grid > 2 * at_once


def defines(variant: Variant, storage: torch.dtype, has: int) -> tuple[str, ...]:
    """Options that compile gspn2.cu's PLANES_BACKWARD; `has`: 2 for u, 4 for a bias."""
    pairs = dict(SHARE="shares", STAGES="stages")
    has = has & 6 | HAS_INPUTS * variant.inputs | HAS_PARTS * variant.partial
    return kernel_defines("PLANES_BACKWARD", variant, storage, has, pairs, THREADS=up(variant.threads, 64))


class Gradients(NamedTuple):
    """What a launch writes: (planes, B, H, W) each, every direction apart; of the logits each slice's part of a group,
    two for each three, (parts, planes, B, H, W)."""

    g: torch.Tensor  # or, where the variant has inputs, the gradients of x and lam
    u: torch.Tensor | None
    logits: torch.Tensor


def make_launch(
    grad_y: torch.Tensor,
    state: torch.Tensor,
    features: torch.Tensor,
    bias: torch.Tensor | None,
    grads: Gradients,
    work: Work,
    variant: Variant,
    softmax: bool,
    done: torch.Tensor | None = None,
) -> Launch:
    """`features` (F, B, H, W), `grad_y` (K D or D, B, H, W) and `state` (K D, B, H, W); their rows are contiguous."""
    layout, boxes = work.layout, []

    def add(place: int, along: int, tensor: int, t: torch.Tensor, positions: int, planes: int) -> None:
        boxes.append(make_box(work, variant, MAPS * along + place, along, tensor, t, positions, planes))

    for along in work.ways:
        span, share, width = variant.spans[along], variant.shares[along], variant.widths[along]
        halo = H_HALO if variant.cluster > 1 else 0
        add(0, along, FEATURES, features, span, width)
        add(1, along, FEATURES, features, span, 3 * min(variant.sets, width))
        add(2, along, GRAD_Y, grad_y, span, width)
        add(3, along, STATE, state, share + 2 * halo, width)
        if variant.inputs:
            add(6, along, FEATURES, features, share, width)
        if not along:
            add(4, along, G, grads.g, share, 1)
            if grads.u is not None:
                add(5, along, GRAD_U, grads.u, share, 1)
    views = {n: view_of(t, layout.D) for n, t in ((G, grads.g), (GRAD_U, grads.u)) if t is not None}
    apart, plane, *steps = grads.logits.stride()
    of_set = 2 if variant.partial else 3
    views[9] = (grads.logits.data_ptr(), *steps[:2], 1, of_set * layout.G * plane, plane)
    params = pack_params(work, variant, views, softmax, apart)
    address = 0 if bias is None else bias.data_ptr()
    per_y = layout.D if grad_y.shape[0] == state.shape[0] else 0
    addresses = (address, 0 if done is None else done.data_ptr())
    params += struct.pack("2Q6i", *addresses, *layout.starts, layout.gate_step, per_y, variant.workers)
    chosen = defines(variant, features.dtype, 2 * layout.u + 4 * (bias is not None))
    return launch_of("gspn2_planes_backward", chosen, params, variant, boxes, 2 * MAPS)


def scan_backward(
    grad_y: torch.Tensor,
    state: torch.Tensor,
    features: torch.Tensor,
    bias: torch.Tensor | None,
    layout: Layout,
    softmax: bool,
    segment: int,
    decay: bool,
    *,
    device: Device | None = None,
    execute: Callable[[Launch], None] | None = None,
) -> torch.Tensor | None:
    """The gradient of `features`, (F, B, H, W), in two launches (one where it leaves nothing to add or to clear), None
    where there is no variant.

    `grad_y` is (K D, B, H, W), or (D, B, H, W) of the directions' sum; `state` what the forward saved. `device` and
    `execute` are for tests.
    """
    work = work_of(features, layout, segment, decay)
    variant = None if work is None else choose(work, device or cuda.device_limits(features.device.index))
    if work is None or variant is None:
        return None
    run = execute or cuda._execute
    if not features[0].is_contiguous():
        features = features.contiguous()
    grad_y, state = (t if addressable(t) else t.clone(memory_format=torch.contiguous_format) for t in (grad_y, state))
    grad, K = features.new_empty(features.shape), len(layout.directions)
    sizes = layout.sizes
    of_x, of_lam, of_u, of_logits, padding = grad.split((*sizes, len(grad) - sum(sizes)))
    sums: list[Sum] = []

    # In the place of lam's gradient, or of x's, where there is just as much of these.
    places = of_lam if layout.lam else of_x
    if variant.inputs:
        g = grad[: 2 * layout.D]
    elif len(places) == K * layout.D:
        g = places
    else:
        g = features.new_empty(K * layout.D, *features.shape[1:])
    grad_u = of_u if layout.u else None
    if layout.u and layout.gates < K:
        apart = of_u.new_empty(K, *of_u.shape)
        sums.append(Sum(of_u, apart))
        grad_u = apart.flatten(0, 1)
    grad_logits = of_logits.unsqueeze(0)
    if variant.partial:
        grad_logits = of_logits.new_empty(max(variant.parts), 2 * K * layout.G, *of_logits.shape[1:])
        each = zip(of_logits.split(3 * layout.G), grad_logits.split(2 * layout.G, 1), strict=True)
        for k, (to, parts) in enumerate(each):
            sums.append(Sum(to, parts[: variant.parts[layout.directions[k] // 2]], k))
    grads = Gradients(g, grad_u, grad_logits)
    if len(padding):
        sums.append(Sum(padding, None))
    more = not variant.inputs and (layout.lam or g is not of_x)
    done = features.new_zeros(work.B * layout.D, dtype=torch.int32) if more and variant.early else None
    run(make_launch(grad_y, state, features, bias, grads, work, variant, softmax, done))
    if more or sums:
        run(finish_launch(features, bias, g, grad, work, variant, more, sums, softmax, done))
    return grad


def count_of(work: Work, variant: Variant) -> int:
    """How many say so, of an image's channel, when all g of it is in memory: of each block that has positions one
    thread along rows, all warps that make gradients along columns."""
    count = 0
    for along in (direction // 2 for direction in work.layout.directions):
        lanes = chunk_of(work, 1, variant.lines[1], variant.halo) * variant.shares[1] * work.size // 16
        warps = min(variant.workers, variant.slots * -(-lanes // 32)) if along else 1
        count += work.segments_of(along) * -(-work.length(along) // variant.shares[along]) * warps
    return count


class Sum(NamedTuple):
    to: torch.Tensor
    terms: torch.Tensor | None  # the sum's, along its first dimension; none: zero
    direction: int | None = None  # whose logits' gradients are to be made of it, by its place among the layout's


def finish_launch(
    features: torch.Tensor,
    bias: torch.Tensor | None,
    g: torch.Tensor,
    grad: torch.Tensor,
    work: Work,
    variant: Variant,
    more: bool,
    sums: list[Sum],
    softmax: bool,
    done: torch.Tensor | None,
) -> Launch:
    """The gradients of x and lam from g, (K D, B, H, W), if there is `more` to them than g, and `sums`."""
    layout = work.layout
    vectors = [s.to.nbytes // 16 // (1 if s.direction is None else 3) for s in sums]
    params = b""
    for (to, terms, k), count in zip(sums, vectors, strict=True):
        of_terms = (0, 0) if terms is None else (terms.stride(0), len(terms))
        of_logits = (0, 0) if k is None else (layout.starts[2] + 3 * k * layout.G, layout.directions[k] // 2)
        address = 0 if terms is None else terms.data_ptr()
        params += SUM.pack(address, to.data_ptr(), count, *of_terms, *of_logits)
    params += bytes((MOST_SUMS - len(sums)) * SUM.size)
    tensors = (features, bias, g, grad, done)
    params += struct.pack("5Q2q", *(0 if t is None else t.data_ptr() for t in tensors), features.stride(0), g.stride(0))
    K, maps, vectors_of_map = len(layout.directions), work.B * layout.D * more, g[0, 0].nbytes // 16
    threads, summed = maps * vectors_of_map, sum(vectors) + 1
    before, expected = (0, 0) if done is None else (threads, count_of(work, variant))
    sizes = (before, summed, expected, vectors_of_map, layout.D, maps)
    params += struct.pack("2q4I5i4x", *sizes, layout.starts[0], layout.gates < K, work.H, work.W, softmax)
    name = cuda.STORAGE_NAMES[grad.dtype]
    choices = dict(STORAGE=name, CLUSTER=1, THREADS=FINISH_THREADS, DIRECTIONS=K, HAS=int(layout.lam))
    chosen = ("-DGSPN2_FINISH_PLANES", *(f"-DGSPN2_{name}={value}" for name, value in choices.items()))
    grid = -(-(threads + summed) // FINISH_THREADS)
    return Launch("gspn2_finish_planes", chosen, params, grid, (FINISH_THREADS, 1), 1, 0, follows=True)
