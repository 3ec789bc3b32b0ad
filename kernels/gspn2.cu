// One kernel, for one set of choices that the launcher (gspn2_diffusion/ops/cuda.py) makes when it compiles it. Each is named
// GSPN2_ and: FORWARD, BACKWARD or SUM_PARTIALS, the kernel; STORAGE, LOGITS, element types; VEC, channels of a thread; SETS, its
// weight sets (1, or VEC where each channel has its own); LANES, vectors of a block at each position; AHEAD, lines on their way
// into registers; TURNS, positions of a thread; CLUSTER, blocks to a line; THREADS, threads of a block; HAS, the optional
// tensors (1 lam, 2 u, 4 the forward's state or the backward's partial sums); DECAY, whether the state decays by 1 - lam.
// BULK and BULK_BACKWARD, those of bulk.cuh and bulk_backward.cuh, have CHANNELS of a scanning lane and WIDTH of a block instead
// of VEC, SETS and LANES; PLACES, positions of a lane; BATCH, lines of a box; and HALO, lines between exchanges in a cluster.
// PLANES, that of planes.cuh, has SETS, too, and WIDTH, PLACES and LINES of a box twice: for scans along rows and along columns;
// MIXED, whether blocks that run at once go different ways; KEEP, whether the second-level cache keeps what is read again.
// PLANES_BACKWARD, that of planes_backward.cuh, also has SHARE, of SPAN without halos, and STAGES. FINISH_PLANES follows it.
#include "backward.cuh"
#include "bulk_backward.cuh"
#include "forward.cuh"
#include "planes.cuh"
#include "planes_backward.cuh"

#if GSPN2_CLUSTER > 1
#define GSPN2_KERNEL extern "C" __global__ void __cluster_dims__(GSPN2_CLUSTER, 1, 1) __launch_bounds__(GSPN2_THREADS, 1)
#else
#define GSPN2_KERNEL extern "C" __global__ void __launch_bounds__(GSPN2_THREADS, 1)
#endif
#define GSPN2_CHOICES \
    GSPN2_STORAGE, GSPN2_LOGITS, GSPN2_VEC, GSPN2_SETS, GSPN2_LANES, GSPN2_AHEAD, GSPN2_TURNS, GSPN2_CLUSTER, GSPN2_HAS, GSPN2_DECAY
#define GSPN2_BOX_CHOICES                                                                                              \
    GSPN2_STORAGE, GSPN2_LOGITS, GSPN2_WIDTH, GSPN2_CHANNELS, GSPN2_PLACES, GSPN2_BATCH, GSPN2_HALO, GSPN2_CLUSTER, GSPN2_HAS, GSPN2_DECAY

#if defined(GSPN2_FORWARD)
GSPN2_KERNEL gspn2_forward(const Params p) { scan_forward<GSPN2_CHOICES>(p); }
#elif defined(GSPN2_BULK)
GSPN2_KERNEL gspn2_bulk(const __grid_constant__ BulkParams p) {
    scan_bulk<GSPN2_BOX_CHOICES>(p);
}
#elif defined(GSPN2_PLANES)
GSPN2_KERNEL gspn2_planes(const __grid_constant__ PlaneParams p) {
    scan_planes<GSPN2_STORAGE, GSPN2_WIDTH_ROWS, GSPN2_WIDTH_COLUMNS, GSPN2_SETS, GSPN2_SPAN_ROWS, GSPN2_SPAN_COLUMNS,
                GSPN2_PLACES_ROWS, GSPN2_PLACES_COLUMNS, GSPN2_LINES_ROWS, GSPN2_LINES_COLUMNS, GSPN2_UNIT_ROWS, GSPN2_UNIT_COLUMNS,
                GSPN2_SLOTS, GSPN2_HALO, GSPN2_CLUSTER, GSPN2_THREADS, GSPN2_MIXED, GSPN2_KEEP, GSPN2_HAS, GSPN2_DECAY>(p);
}
#elif defined(GSPN2_PLANES_BACKWARD)
GSPN2_KERNEL gspn2_planes_backward(const __grid_constant__ PlaneBackwardParams p) {
    scan_planes_backward<GSPN2_STORAGE, GSPN2_WIDTH_ROWS, GSPN2_WIDTH_COLUMNS, GSPN2_SETS, GSPN2_SPAN_ROWS, GSPN2_SPAN_COLUMNS,
                         GSPN2_SHARE_ROWS, GSPN2_SHARE_COLUMNS, GSPN2_PLACES_ROWS, GSPN2_PLACES_COLUMNS, GSPN2_LINES_ROWS,
                         GSPN2_LINES_COLUMNS, GSPN2_UNIT_ROWS, GSPN2_UNIT_COLUMNS, GSPN2_STAGES_ROWS, GSPN2_STAGES_COLUMNS, GSPN2_SLOTS,
                         GSPN2_HALO, GSPN2_CLUSTER, GSPN2_THREADS, GSPN2_MIXED, GSPN2_KEEP, GSPN2_HAS>(p);
}
#elif defined(GSPN2_FINISH_PLANES)
GSPN2_KERNEL gspn2_finish_planes(const PlaneFinish p) { finish_planes<GSPN2_STORAGE, GSPN2_DIRECTIONS, GSPN2_HAS & HAS_LAM>(p); }
#elif defined(GSPN2_BULK_BACKWARD)
GSPN2_KERNEL gspn2_bulk_backward(const __grid_constant__ BulkParams p) {
    scan_bulk_backward<GSPN2_BOX_CHOICES>(p);
}
#elif defined(GSPN2_BACKWARD)
GSPN2_KERNEL gspn2_backward(const Params p) { scan_backward<GSPN2_CHOICES>(p); }
#elif defined(GSPN2_SUM_PARTIALS)
GSPN2_KERNEL gspn2_sum_partials(const Params p) { sum_partials<GSPN2_LOGITS>(p); }
#endif
