// The kernels as the launcher would compile them, callable from Python through ctypes.
#include "gspn2.cu"

#if defined(GSPN2_BULK) || defined(GSPN2_BULK_BACKWARD)
using Arguments = BulkParams;
#elif defined(GSPN2_PLANES)
using Arguments = PlaneParams;
#elif defined(GSPN2_PLANES_BACKWARD)
using Arguments = PlaneBackwardParams;
#elif defined(GSPN2_FINISH_PLANES)
using Arguments = PlaneFinish;
#else
using Arguments = Params;
#endif

#if defined(GSPN2_FORWARD)
#define KERNEL gspn2_forward
#elif defined(GSPN2_BULK)
#define KERNEL gspn2_bulk
#elif defined(GSPN2_PLANES)
#define KERNEL gspn2_planes
#elif defined(GSPN2_PLANES_BACKWARD)
#define KERNEL gspn2_planes_backward
#elif defined(GSPN2_FINISH_PLANES)
#define KERNEL gspn2_finish_planes
#elif defined(GSPN2_BULK_BACKWARD)
#define KERNEL gspn2_bulk_backward
#elif defined(GSPN2_BACKWARD)
#define KERNEL gspn2_backward
#else
#define KERNEL gspn2_sum_partials
#endif

extern "C" int run(const Arguments* params, int grid, int block_x, int block_y, int cluster,
                   int shared_bytes, unsigned seed, char* message, int message_size) {
    const std::string error = emulation::launch([=] { KERNEL(*params); }, grid, {block_x, block_y, 1}, cluster, shared_bytes, seed);
    std::snprintf(message, message_size, "%s", error.c_str());
    return error.empty() ? 0 : 1;
}

#if !defined(GSPN2_SUM_PARTIALS) && !defined(GSPN2_FINISH_PLANES)
// The kernels' own count of the shared memory that a block needs.
extern "C" int needed_shared_bytes(int positions, int stages) {
#if defined(GSPN2_FORWARD)
    return forward_shared_bytes(positions, GSPN2_LANES, GSPN2_VEC, GSPN2_CLUSTER);
#elif defined(GSPN2_BULK)
    using R = Ring<GSPN2_STORAGE, GSPN2_WIDTH, GSPN2_CHANNELS, GSPN2_PLACES, GSPN2_BATCH, GSPN2_HALO, GSPN2_CLUSTER, GSPN2_HAS>;
    return R::BOXES + stages * R(positions).stage;
#elif defined(GSPN2_BULK_BACKWARD)
    using R = BackwardRing<GSPN2_STORAGE, GSPN2_WIDTH, GSPN2_CHANNELS, GSPN2_PLACES, GSPN2_BATCH, GSPN2_HALO, GSPN2_CLUSTER, GSPN2_HAS>;
    return R::BOXES + stages * R(positions).stage;
#elif defined(GSPN2_PLANES)
    // The larger of both ways, `stages` of each.
    using Rows = PlaneRing<GSPN2_STORAGE, GSPN2_WIDTH_ROWS, GSPN2_SETS, GSPN2_SPAN_ROWS, GSPN2_PLACES_ROWS, GSPN2_LINES_ROWS, GSPN2_SLOTS, GSPN2_UNIT_ROWS, GSPN2_HALO, GSPN2_CLUSTER, GSPN2_HAS, false>;
    using Columns = PlaneRing<GSPN2_STORAGE, GSPN2_WIDTH_COLUMNS, GSPN2_SETS, GSPN2_SPAN_COLUMNS, GSPN2_PLACES_COLUMNS, GSPN2_LINES_COLUMNS, GSPN2_SLOTS, GSPN2_UNIT_COLUMNS, GSPN2_HALO, GSPN2_CLUSTER, GSPN2_HAS, true>;
    return std::max(Rows::BOXES + stages * Rows::STAGE, Columns::BOXES + stages * Columns::STAGE);
#elif defined(GSPN2_PLANES_BACKWARD)
    using Rows = BackwardPlaneRing<GSPN2_STORAGE, GSPN2_WIDTH_ROWS, GSPN2_SETS, GSPN2_SPAN_ROWS, GSPN2_SHARE_ROWS, GSPN2_PLACES_ROWS, GSPN2_LINES_ROWS, GSPN2_STAGES_ROWS, GSPN2_SLOTS, GSPN2_UNIT_ROWS, GSPN2_HALO, GSPN2_CLUSTER, GSPN2_THREADS, GSPN2_KEEP, GSPN2_HAS, false>;
    using Columns = BackwardPlaneRing<GSPN2_STORAGE, GSPN2_WIDTH_COLUMNS, GSPN2_SETS, GSPN2_SPAN_COLUMNS, GSPN2_SHARE_COLUMNS, GSPN2_PLACES_COLUMNS, GSPN2_LINES_COLUMNS, GSPN2_STAGES_COLUMNS, GSPN2_SLOTS, GSPN2_UNIT_COLUMNS, GSPN2_HALO, GSPN2_CLUSTER, GSPN2_THREADS, GSPN2_KEEP, GSPN2_HAS, true>;
    return std::max(Rows::BOXES + Rows::STAGES * Rows::STAGE, Columns::BOXES + Columns::STAGES * Columns::STAGE);
#else
    return backward_shared_bytes(positions, GSPN2_LANES, GSPN2_VEC, GSPN2_CLUSTER);
#endif
}
#endif

extern "C" int params_bytes() { return sizeof(Arguments); }
