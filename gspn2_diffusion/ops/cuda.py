"""The scan on CUDA: chooses a variant of the kernels in `kernels/`, compiles it once through CuPy and launches it.

`choose` is the table: a pure function of the shapes, the alignment and the device's limits. docs/kernel.md says why.
"""

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

STORAGE_NAMES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
STAGES = (8, 4, 3, 2, 1)
LARGEST_CLUSTER = 8  # blocks; what every device with clusters can schedule
SHORTEST_SHARE = 64  # positions; a cluster's barrier costs more than a block's, so shorter lines stay in one block
SECTOR = 32  # bytes of a memory transaction
IN_FLIGHT = 48 * 1024  # bytes that a processor should have on their way to hide the memory's latency


class Device(NamedTuple):
    capability: tuple[int, int]
    processors: int
    shared: int  # bytes that a block can have


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
    tensors: int  # staged next to the logits
    backward: bool

    @property
    def segments(self) -> int:
        return -(-max(self.H, self.W) // self.segment)

    @property
    def line(self) -> int:
        return max(self.H, self.W)


class Variant(NamedTuple):
    vec: int
    sets: int
    stages: int
    cluster: int
    lanes: int
    slices: int
    parts: int
    block: tuple[int, int]
    shared: int
    grid: int


class Launch(NamedTuple):
    kernel: str
    defines: tuple[str, ...]
    params: np.ndarray  # one element, the Params of scan.cuh
    grid: int
    block: tuple[int, int]
    cluster: int
    shared: int


def _round16(count: int) -> int:
    return -(-count // 16) * 16


def shared_bytes(work: Work, vec: int, sets: int, stages: int, lanes: int, positions: int) -> int:
    """forward_shared_bytes and backward_shared_bytes of scan.cuh."""
    vectors = positions * lanes
    tap_bytes = 3 * vec * work.logit_size if sets > 1 else 12 if work.logit_size == 4 else 8
    staged = stages * (work.tensors * _round16(vectors * vec * work.size) + _round16(vectors * tap_bytes))
    edged = (positions + 2) * lanes
    if not work.backward:
        return 2 * edged * vec * 4 + staged
    states = (stages + 2) * _round16(edged * vec * work.size) if stages else 0
    return _round16(2 * edged * (vec + 3 * sets) * 4) + staged + states


def largest_block(sets: int, backward: bool) -> int:
    """Threads of a block; the backward, and weights for each channel, need more registers than 512 leave."""
    return 256 if backward or sets > 1 else 512


def _vectors(work: Work) -> Iterator[tuple[int, int]]:
    """(channels of a thread, its weight sets), widest first: 16 bytes where alignment and groups allow it."""
    group = work.D // work.G
    for vec in (8, 4, 2):
        if vec * work.size > min(16, work.aligned) or work.D % vec:
            continue
        if group % vec == 0:
            yield vec, 1
        elif group == 1 and work.logits_aligned >= min(16, vec * work.logit_size):
            yield vec, vec
    yield 1, 1


def _slices(work: Work, vec: int, sets: int, lanes: int) -> tuple[int, int] | None:
    """(slices of the channels, of one group) for `lanes` vectors a block; None if groups would split unevenly."""
    vectors, group = work.D // vec, work.D // work.G // vec
    if sets > 1:
        return -(-vectors // lanes), 1
    if work.G == 1:
        return -(-vectors // lanes), -(-vectors // lanes)
    if lanes % group == 0:
        return -(-vectors // lanes), 1
    if group % lanes == 0:
        return vectors // lanes, group // lanes
    return None


def _candidates(work: Work, device: Device) -> Iterator[tuple[int, int, int, int]]:
    """(vec, sets, lanes, cluster) from the most to the least wanted."""
    for vec, sets in _vectors(work):
        options = [n for n in range(1, min(32, work.D // vec) + 1) if _slices(work, vec, sets, n)]
        wanted = -(-SECTOR // (vec * work.size))

        def blocks(lanes: int, vec: int = vec, sets: int = sets) -> int:
            return work.B * work.K * work.segments * (_slices(work, vec, sets, lanes) or (1, 1))[0]

        # Whole sectors; fewer lanes where a short line would leave half of the processors idle, more for tiny blocks.
        at = next((i for i, lanes in enumerate(options) if lanes >= wanted), len(options) - 1)
        splits = device.capability >= (9, 0) and work.line >= 2 * SHORTEST_SHARE
        while at > 0 and not splits and 2 * blocks(options[at]) <= device.processors:
            at -= 1
        while (
            at + 1 < len(options) and work.line * options[at] < 64 and blocks(options[at + 1]) >= 2 * device.processors
        ):
            at += 1
        for lanes in options[at::-1]:
            cluster = 1
            if splits:
                cluster = max(1, min(LARGEST_CLUSTER, device.processors // blocks(lanes), work.line // SHORTEST_SHARE))
            largest = LARGEST_CLUSTER if device.capability >= (9, 0) else 1
            for size in range(cluster, max(cluster, min(largest, work.line)) + 1):
                yield vec, sets, lanes, size


@lru_cache(4096)
def choose(work: Work, device: Device) -> Variant:
    """The variant for `work`: widest vectors, whole sectors, enough blocks, then as many staged lines as fit.

    Raises ValueError where no variant's line fits the device's shared memory.
    """
    least = None
    for fewest in (2, 1, 0):
        for vec, sets, lanes, cluster in _candidates(work, device):
            positions = -(-work.line // cluster)
            line_bytes = positions * lanes * (work.tensors * vec * work.size + 3 * sets * work.logit_size)
            wanted = max(IN_FLIGHT // line_bytes + 1, 3)
            deepest = 0 if vec * work.size < 4 else next(s for s in STAGES if s <= wanted)
            depths = [s for s in (*STAGES, 0) if s <= deepest and (s >= fewest or deepest < fewest)]
            for stages in depths if fewest else [0]:
                needed = shared_bytes(work, vec, sets, stages, lanes, positions)
                least = needed if least is None else min(least, needed)
                if needed > device.shared:
                    continue
                slices, parts = _slices(work, vec, sets, lanes) or (1, 1)
                width = 1 << (lanes - 1).bit_length()
                height = min(largest_block(sets, work.backward), -(-positions * width // 32) * 32) // width
                grid = work.B * work.K * work.segments * slices * cluster
                return Variant(vec, sets, stages, cluster, lanes, slices, parts, (width, height), needed, grid)
    raise ValueError(
        f"A line of {work.line} positions needs at least {least} bytes of shared memory and this GPU has "
        f"{device.shared}; scan a smaller map, or run it on the CPU."
    )


PARAMS = struct.Struct("66q q 14i")
_PARAMS_DTYPE = np.dtype((np.void, PARAMS.size))


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


def _logits_alignment(*tensors: torch.Tensor) -> int:
    if any(t.shape[4] > 1 and t.stride(4) != 3 for t in tensors):
        return 0
    return _alignment(*[t.flatten(4) for t in tensors])


@cache
def defines(
    kernel: str, variant: Variant, storage: torch.dtype, logits: torch.dtype, decay: bool = False
) -> tuple[str, ...]:
    """Options that compile one of gspn2.cu's kernels, FORWARD, BACKWARD or SUM_PARTIALS, for `variant`."""
    if kernel == "SUM_PARTIALS":
        choices: dict[str, object] = dict(LOGITS=STORAGE_NAMES[logits], CLUSTER=1, THREADS=256)
    else:
        choices = dict(
            STORAGE=STORAGE_NAMES[storage],
            LOGITS=STORAGE_NAMES[logits],
            VEC=variant.vec,
            SETS=variant.sets,
            STAGES=variant.stages,
            CLUSTER=variant.cluster,
            THREADS=largest_block(variant.sets, kernel == "BACKWARD"),
        )
        if decay:
            choices["DECAY"] = 1
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

    def work(self, aligned: int, logits_aligned: int, backward: bool) -> Work:
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
            1 + gates + (backward and self.lam is not None),
            backward,
        )

    def launch(
        self,
        kernel: str,
        work: Work,
        variant: Variant,
        outputs: Sequence[torch.Tensor | None],
        partial: torch.Tensor | None,
    ) -> Launch:
        """`outputs`: state, y, and the gradients of x, lam, u and logits."""
        views = [v for t in (self.x, self.lam, self.u, self.logits, *outputs) for v in _view(t)]
        packed = sum(direction << 2 * k for k, direction in enumerate(self.directions))
        params = PARAMS.pack(
            *views,
            *_view(None if partial is None else partial[0]),
            0 if partial is None else partial.stride(0),
            *(work.B, work.H, work.W, work.D, work.K, work.G, packed, work.segment, work.segments),
            *(variant.lanes, variant.slices, variant.parts, self.softmax, 0),
        )
        grid, block, cluster, shared = variant.grid, variant.block, variant.cluster, variant.shared
        if kernel == "SUM_PARTIALS":
            grid, block, cluster, shared = (
                -(-(partial if partial is not None else self.x)[0].numel() // 768),
                (256, 1),
                1,
                0,
            )
        chosen = defines(kernel, variant, self.x.dtype, self.logits.dtype, self.decay)
        packed_params = np.frombuffer(params, _PARAMS_DTYPE)
        return Launch(f"gspn2_{kernel.lower()}", chosen, packed_params, grid, block, cluster, shared)


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
        work = arguments.work(_alignment(x, lam, u, y), _logits_alignment(logits), backward=False)
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
        work = arguments.work(aligned, _logits_alignment(logits, grad_logits), backward=True)
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
    return Device(capability, properties.multi_processor_count, shared)


_functions: dict[tuple[int, tuple[str, ...]], Any] = {}
_compiling = threading.Lock()


def _function(launch: Launch, index: int) -> Any:
    """The compiled kernel on device `index` (the current one); CuPy keeps the binary on disk for the next process."""
    key = (index, launch.defines)
    if key not in _functions:
        with _compiling:
            if key not in _functions:
                cupy = _import_cupy()
                options = ("-std=c++17", *launch.defines)
                try:
                    kernel = cupy.RawModule(code=kernel_source(), options=options).get_function(launch.kernel)
                    kernel.max_dynamic_shared_size_bytes = device_limits(index).shared
                except Exception as error:
                    version = cupy.cuda.runtime.runtimeGetVersion() // 1000
                    raise RuntimeError(
                        f"The scan's kernel did not compile or load with CuPy {cupy.__version__} for CUDA {version} "
                        f"under torch for CUDA {torch.version.cuda}; install the CuPy of torch's CUDA version."
                    ) from error
                _functions[key] = kernel.kernel
    return _functions[key]


def _execute(launch: Launch) -> None:
    index = torch.cuda.current_device()
    function = _function(launch, index)
    stream = _import_cupy().cuda.ExternalStream(torch.cuda.current_stream(index).cuda_stream, index)
    function((launch.grid,), launch.block, (launch.params,), launch.shared, stream)
