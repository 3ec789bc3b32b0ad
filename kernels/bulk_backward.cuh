// The backward scan from boxes, the way bulk.cuh does the forward: g = u dy + (three transposed taps of the line after).
//
// The gradients of x, lam and u take the places of x, lam and u in their stage, from where the storing warps take them. Each
// scanning warp leaves its channels' sum of g h for each tap where dy and h were; the normalising warps, which made the weights,
// add these up, warp by warp, and go through the normaliser. One set of weights for all channels of a slice; weights for each
// channel take the backward of backward.cuh.
#pragma once

#include "bulk.cuh"

template <typename T, int WIDTH, int CHANNELS, int PLACES, int BATCH, int HALO, int CLUSTER, int HAS>
struct BackwardRing {
    static_assert(CHANNELS * sizeof(T) >= 8 && CHANNELS * sizeof(T) <= 16, "two sums fit where dy was, and a lane's channels stay together");
    using W = Weights<PLACES>;
    static constexpr int WARPS = WIDTH / CHANNELS;
    static constexpr bool LAM = HAS & HAS_LAM, U = HAS & HAS_U, PARTIAL = HAS & HAS_PARTIAL;
    // x is there for its gradient's sake, even where nothing needs it.
    static constexpr int LAM_TILE = 1, U_TILE = 1 + LAM, DY_TILE = U_TILE + U, H_TILE = DY_TILE + 1;
    static constexpr int INBOX = CLUSTER > 1 ? 4 * WARPS * HALO * CHANNELS * 4 : 0;
    static constexpr int SIGNALS = (4 * MOST_STAGES + (CLUSTER > 1 ? 4 * WARPS : 0)) * 8;
    static constexpr int ROW = WIDTH * static_cast<int>(sizeof(T)), ALIGN = box_alignment(ROW);
    static constexpr int BOXES = (SIGNALS + INBOX + ALIGN - 1) / ALIGN * ALIGN;
    int span, tile, taps_at, stage;
    GSPN2_DEVICE constexpr BackwardRing(int positions)
        : span(positions), tile((BATCH * positions * ROW + ALIGN - 1) / ALIGN * ALIGN),
          taps_at((H_TILE * tile + (BATCH + 1) * positions * ROW + ALIGN - 1) / ALIGN * ALIGN),
          stage((taps_at + BATCH * (positions * SLOT + W::LINE) + ALIGN - 1) / ALIGN * ALIGN) {}
    GSPN2_DEVICE int loaded() const { return span * ((H_TILE * BATCH + BATCH + 1) * ROW + BATCH * SLOT); }
    GSPN2_DEVICE static int element(int position, int channel) {
        constexpr int SIZE = sizeof(T);
        return swizzled<ROW>(position * ROW + channel * SIZE) / SIZE;
    }
    GSPN2_DEVICE static int place(int position, int warp) { return element(position, warp * CHANNELS); }

    GSPN2_DEVICE static Signal* signals() { return reinterpret_cast<Signal*>(shared_memory()); }
    GSPN2_DEVICE static Signal* full(int stage) { return signals() + stage; }
    GSPN2_DEVICE static Signal* ready(int stage) { return signals() + MOST_STAGES + stage; }
    GSPN2_DEVICE static Signal* done(int stage) { return signals() + 2 * MOST_STAGES + stage; }
    GSPN2_DEVICE static Signal* empty(int stage) { return signals() + 3 * MOST_STAGES + stage; }
    GSPN2_DEVICE static Signal* signal(int exchange, int side, int warp) {
        return signals() + 4 * MOST_STAGES + (2 * (exchange & 1) + side) * WARPS + warp;
    }
    GSPN2_DEVICE static float* inbox(int exchange, int side, int warp) {
        return reinterpret_cast<float*>(shared_memory() + SIGNALS) + ((2 * (exchange & 1) + side) * WARPS + warp) * HALO * CHANNELS;
    }
    GSPN2_DEVICE T* box(int index, int which) const { return reinterpret_cast<T*>(shared_memory() + BOXES + index * stage + which * tile); }
    GSPN2_DEVICE T* line(int index, int which, int row) const { return box(index, which) + row * span * WIDTH; }
    GSPN2_DEVICE unsigned char* taps(int index) const { return shared_memory() + BOXES + index * stage + taps_at; }
    GSPN2_DEVICE float* weights(int index, int row, int place) const {
        return reinterpret_cast<float*>(taps(index) + BATCH * span * SLOT + row * W::LINE + place);
    }
};

// The n-th line from the last: its row in a box of its batch, in one of h, whose boxes begin or end a line earlier, and in memory.
struct Rows {
    bool backwards;
    int last;  // line in memory of the scan's last
    GSPN2_DEVICE int row(int s, int batch_lines) const { return backwards ? s : batch_lines - 1 - s; }
    GSPN2_DEVICE int h_row(int s, int batch_lines) const { return backwards ? s : batch_lines - s; }
    GSPN2_DEVICE int h_row_before(int s, int batch_lines) const { return backwards ? s + 1 : batch_lines - 1 - s; }
    GSPN2_DEVICE int line(int n) const { return backwards ? last + n : last - n; }
    GSPN2_DEVICE int box_line(int batch, int batch_lines) const { return backwards ? line(batch * batch_lines) : line((batch + 1) * batch_lines - 1); }
    GSPN2_DEVICE int h_box_line(int batch, int batch_lines) const { return box_line(batch, batch_lines) - (backwards ? 0 : 1); }
};

template <typename L, int WIDTH, int BATCH, typename R>
GSPN2_DEVICE void load_backward_boxes(const BulkParams& bulk, const Place& at, const Reach& reach, const Rows& rows, const R& ring, int batch, int end) {
    const Params& p = bulk.scan;
    const TensorMap* const maps = bulk.maps[at.horizontal ? 0 : 1];
    const int channel = at.slice * WIDTH, position = at.start - reach.low;
    const int set = weight_set(at, p, WIDTH);
    const int lam_direction = p.lam.direction ? at.index : 0, u_direction = p.u.direction ? at.index : 0, y_direction = p.y.direction ? at.index : 0;
    Turn turn{0, batch > 0};
    for (; batch < end; ++batch, turn.next(bulk.stages)) {
        const int stage = turn.stage, line = rows.box_line(batch, BATCH);
        Signal* const full = R::full(stage);
        if (batch >= bulk.stages) signal_wait(R::empty(stage), turn.parity ^ 1);
        signal_expect(full, ring.loaded());
        load_box(ring.taps(stage), maps[MAP_LOGITS], box_logit<L>(3 * set), position, line, 0, at.batch, full);
        load_box(ring.box(stage, R::DY_TILE), maps[MAP_Y], channel, position, line, y_direction, at.batch, full);
        if constexpr (R::U) load_box(ring.box(stage, R::U_TILE), maps[MAP_U], channel, position, line, u_direction, at.batch, full);
        load_box(ring.box(stage, R::H_TILE), maps[MAP_STATE], channel, position, rows.h_box_line(batch, BATCH), at.index, at.batch, full);
        if constexpr (R::LAM) load_box(ring.box(stage, R::LAM_TILE), maps[MAP_LAM], channel, position, line, lam_direction, at.batch, full);
        load_box(ring.box(stage, 0), maps[MAP_X], channel, position, line, 0, at.batch, full);
    }
}

// A tile of each stage and where its lines go.
template <typename T>
struct Stored {
    int tile;
    Walk<T> to;
};

// 16 bytes a thread, those of a position next to each other.
template <typename T, int WIDTH, int BATCH, typename R, int COUNT>
GSPN2_DEVICE void store_lines(const BulkParams& bulk, const Place& at, const Reach& reach, const Rows& rows, const R& ring, Stored<T> (&stored)[COUNT], int thread, int threads) {
    constexpr int CHUNK = 16 / sizeof(T), CHUNKS = WIDTH / CHUNK;
    const int lines = at.last - at.first, batches = (lines + BATCH - 1) / BATCH, left = bulk.scan.channels - at.slice * WIDTH;
    Turn turn{0, 0};
    for (int batch = 0; batch < batches; ++batch, turn.next(bulk.stages)) {
        const int stage = turn.stage, count = lines - batch * BATCH < BATCH ? lines - batch * BATCH : BATCH;
        signal_wait(R::done(stage), turn.parity);
        for (int item = thread; item < at.owned * CHUNKS; item += threads) {
            const int j = item / CHUNKS, channel = item % CHUNKS * CHUNK;
            if (channel >= left) continue;
            const int place = R::element(j + reach.low, channel);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                Packed<T, CHUNK> packed[BATCH];
#pragma unroll
                for (int s = 0; s < BATCH; ++s) packed[s].load(ring.line(stage, stored[i].tile, rows.row(s, BATCH)) + place);
#pragma unroll
                for (int s = 0; s < BATCH; ++s) {
                    const Walk<T>& to = stored[i].to;
                    if (s < count) packed[s].store(to.at(j) + static_cast<long long>(s) * to.next_line + channel);
                }
            }
        }
        warp_arrives(R::empty(stage));
#pragma unroll
        for (int i = 0; i < COUNT; ++i) stored[i].to.line += static_cast<long long>(BATCH) * stored[i].to.next_line;
    }
}

// Weights of a batch and, behind its scan, the logits' gradients; shared out as in the forward.
template <typename L, int WIDTH, int PLACES, int BATCH, typename R>
GSPN2_DEVICE void normalize_backward(const BulkParams& bulk, const Place& at, const Reach& reach, const Rows& rows, const R& ring, int thread, int threads) {
    const Params& p = bulk.scan;
    const int lines = at.last - at.first, batches = (lines + BATCH - 1) / BATCH;
    const int group = at.slice * WIDTH / (p.channels / p.groups);
    const int first = 3 * weight_set(at, p, WIDTH), skipped = first - box_logit<L>(first);
    const auto weigh = [&](const Turn& turn) {
        const int stage = turn.stage;
        signal_wait(R::full(stage), turn.parity);
        share_out<PLACES>(BATCH, thread, threads, [&](int s, int position) {
            if (position >= ring.span) return;
            const int j = at.start + position - reach.low;
            float logit[3], weight[3];
            read_logits<L>(logit, ring.taps(stage) + s * ring.span * SLOT, position, skipped);
            const float sum = normalize(weight, logit, j > 0, j < at.length - 1, p.softmax);
            const float four[4] = {weight[0], weight[1], weight[2], sum};
            store_vector<float, 4>(ring.weights(stage, s, R::W::at(position)), four);
        });
        warp_arrives(R::ready(stage));
    };
    Turn weighed{0, 0}, turn{0, 0};
    weigh(weighed);
    for (int batch = 0; batch < batches; ++batch, turn.next(bulk.stages)) {
        weighed.next(bulk.stages);
        if (batch + 1 < batches) weigh(weighed);
        const int stage = turn.stage, count = lines - batch * BATCH < BATCH ? lines - batch * BATCH : BATCH;
        signal_wait(R::done(stage), turn.parity);
        share_out<PLACES>(count, thread, threads, [&](int s, int position) {
            if (!reach.owns(position)) return;
            const int j = position - reach.low, row = rows.row(s, BATCH), line = rows.line(batch * BATCH + s);
            const auto left = [&](int which, int line_of_box, int warp) {
                return reinterpret_cast<const float*>(ring.line(stage, which, line_of_box) + R::place(position, warp));
            };
            float sum[3] = {};
#pragma unroll
            for (int warp = 0; warp < R::WARPS; ++warp) {
                float pair[2];
                load_vector<float, 2>(pair, left(R::DY_TILE, row, warp));
                sum[0] += pair[0], sum[1] += pair[1], sum[2] += *left(R::H_TILE, rows.h_row(s, BATCH), warp);
            }
            const auto offset = [&](const View& view) {
                return at.batch * view.batch + line * (at.horizontal ? view.column : view.row) +
                       (at.start + j) * (at.horizontal ? view.row : view.column) + at.index * view.direction + group * view.group;
            };
            if constexpr (R::PARTIAL) {
                float* const to = global_memory(static_cast<float*>(p.partial.data)) + offset(p.partial) + at.slice % p.parts * p.part_stride;
#pragma unroll
                for (int t = 0; t < 3; ++t) to[t] = sum[t];
            } else {
                float four[4];
                load_vector<float, 4>(four, ring.weights(stage, row, R::W::at(position)));
                const float mean = four[0] * sum[0] + four[1] * sum[1] + four[2] * sum[2];
                L* const to = global_memory(static_cast<L*>(p.grad_logits.data)) + offset(p.grad_logits);
#pragma unroll
                for (int t = 0; t < 3; ++t) to[t] = from_float<L>(four[t] * (1.f - four[t] * four[3]) * (sum[t] - mean));
            }
        });
        engine_fence();
        warp_arrives(R::empty(stage));
    }
}

template <typename T, int CHANNELS, int PLACES, int BATCH, int HALO, int CLUSTER, bool DECAY, typename R>
GSPN2_DEVICE void scan_backward_boxes(const BulkParams& bulk, const Place& at, const Reach& reach, const Rows& rows, const R& ring, int warp) {
    constexpr int OFTEN = HALO < BATCH ? HALO : BATCH;
    const int lane = threadIdx.x % 32, lines = at.last - at.first, batches = (lines + BATCH - 1) / BATCH;
    int place[PLACES];
#pragma unroll
    for (int k = 0; k < PLACES; ++k) {
        const int position = lane * PLACES + k < ring.span ? lane * PLACES + k : ring.span - 1;
        place[k] = R::place(position, warp);
    }

    // Of the line after: what goes through its taps, and these; of this one: h.
    float passed[PLACES][CHANNELS] = {}, weight[PLACES][3] = {}, current[PLACES][CHANNELS] = {};
    Turn turn{0, 0};
    for (int batch = 0; batch < batches; ++batch, turn.next(bulk.stages)) {
        const int stage = turn.stage, count = lines - batch * BATCH < BATCH ? lines - batch * BATCH : BATCH;
        // Implied by the next line; told so that a race checker sees it.
        if (batch >= bulk.stages) signal_wait(R::empty(stage), turn.parity ^ 1);
        signal_wait(R::full(stage), turn.parity);
        signal_wait(R::ready(stage), turn.parity);
        if (R::U && batch == 0) {
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                load_vector<T, CHANNELS>(current[k], ring.line(stage, R::H_TILE, rows.h_row(0, BATCH)) + place[k]);
            }
        }
#pragma unroll
        for (int s = 0; s < BATCH; ++s) {
            if (s >= count) break;
            const int n = batch * BATCH + s;
            if constexpr (CLUSTER > 1) {
                const int exchange = n / HALO;
                if (s % OFTEN == 0 && n % HALO == 0 && exchange > 0) {
                    receive_edges<R, HALO>(reach, exchange, warp, passed);
                }
            }
            const int row = rows.row(s, BATCH);
            T* const x = ring.line(stage, 0, row);
            T* const lam = ring.line(stage, R::LAM_TILE, row);
            T* const u = ring.line(stage, R::U_TILE, row);
            T* const dy = ring.line(stage, R::DY_TILE, row);
            T* const h = ring.line(stage, R::H_TILE, rows.h_row(s, BATCH));
            const T* const h_before = ring.line(stage, R::H_TILE, rows.h_row_before(s, BATCH));
            float before[PLACES][CHANNELS];
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                load_vector<T, CHANNELS>(before[k], h_before + place[k]);
                if (n + 1 >= lines) {
#pragma unroll
                    for (int e = 0; e < CHANNELS; ++e) before[k][e] = 0.f;
                }
            }
            float from_low[CHANNELS], from_high[CHANNELS], h_low[CHANNELS], h_high[CHANNELS];
#pragma unroll
            for (int e = 0; e < CHANNELS; ++e) {
                from_low[e] = shuffle_up(weight[PLACES - 1][2] * passed[PLACES - 1][e]);
                from_high[e] = shuffle_down(weight[0][0] * passed[0][e]);
                h_low[e] = shuffle_up(before[PLACES - 1][e]), h_high[e] = shuffle_down(before[0][e]);
                if (lane == 0) from_low[e] = 0.f;
                if (lane == 31) from_high[e] = 0.f;
            }
            float terms[PLACES][CHANNELS];  // from the line after
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
#pragma unroll
                for (int e = 0; e < CHANNELS; ++e) {
                    const float low = k > 0 ? weight[k > 0 ? k - 1 : 0][2] * passed[k > 0 ? k - 1 : 0][e] : from_low[e];
                    const float high = k + 1 < PLACES ? weight[k + 1 < PLACES ? k + 1 : 0][0] * passed[k + 1 < PLACES ? k + 1 : 0][e] : from_high[e];
                    terms[k][e] = weight[k][1] * passed[k][e] + low + high;
                }
            }
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                const bool inside = lane * PLACES + k < ring.span;
                float gradient[CHANNELS], whole[CHANNELS], gate[CHANNELS], value[CHANNELS], result[CHANNELS], four[4], sum[3] = {};
                load_vector<T, CHANNELS>(gradient, dy + place[k]);
                if constexpr (R::U) load_vector<T, CHANNELS>(whole, u + place[k]);
                if constexpr (R::LAM) load_vector<T, CHANNELS>(gate, lam + place[k]), load_vector<T, CHANNELS>(value, x + place[k]);
                const int position = lane * PLACES + k < ring.span ? lane * PLACES + k : ring.span - 1;
                load_vector<float, 4>(four, ring.weights(stage, rows.row(s, BATCH), R::W::at(position)));
#pragma unroll
                for (int t = 0; t < 3; ++t) weight[k][t] = four[t];
                float mixed[CHANNELS];
#pragma unroll
                for (int e = 0; e < CHANNELS; ++e) {
                    const float low = k > 0 ? before[k > 0 ? k - 1 : 0][e] : h_low[e], high = k + 1 < PLACES ? before[k + 1 < PLACES ? k + 1 : 0][e] : h_high[e];
                    whole[e] = terms[k][e] + (R::U ? whole[e] * gradient[e] : gradient[e]);
                    // What a lane beyond the span makes of what it reads must not come back through its taps.
                    passed[k][e] = inside ? (DECAY ? (1.f - gate[e]) * whole[e] : whole[e]) : 0.f;
                    sum[0] += passed[k][e] * low, sum[1] += passed[k][e] * before[k][e], sum[2] += passed[k][e] * high;
                    if constexpr (DECAY) mixed[e] = four[0] * low + four[1] * before[k][e] + four[2] * high;
                }
                // Lanes beyond the span have read what the last one within it writes.
                warp_barrier();
                if (!inside) continue;
                if constexpr (R::U) {
#pragma unroll
                    for (int e = 0; e < CHANNELS; ++e) result[e] = current[k][e] * gradient[e];
                    store_vector<T, CHANNELS>(u + place[k], result);
                }
                if constexpr (R::LAM) {
#pragma unroll
                    for (int e = 0; e < CHANNELS; ++e) result[e] = gate[e] * whole[e];
                    store_vector<T, CHANNELS>(x + place[k], result);
#pragma unroll
                    for (int e = 0; e < CHANNELS; ++e) result[e] = (DECAY ? value[e] - mixed[e] : value[e]) * whole[e];
                    store_vector<T, CHANNELS>(lam + place[k], result);
                } else {
                    store_vector<T, CHANNELS>(x + place[k], whole);
                }
                const float pair[2] = {sum[0], sum[1]};
                store_vector<float, 2>(reinterpret_cast<float*>(dy + place[k]), pair);
                *reinterpret_cast<float*>(h + place[k]) = sum[2];
            }
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
#pragma unroll
                for (int e = 0; e < CHANNELS; ++e) current[k][e] = before[k][e];
            }
            if constexpr (CLUSTER > 1) {
                const int after = n + 1, exchange = after / HALO;
                if ((s + 1) % OFTEN == 0 && after % HALO == 0 && after < lines) {
                    send_edges<R, HALO>(reach, at.rank, exchange, warp, passed);
                }
            }
        }
        engine_fence();
        warp_arrives(R::done(stage));
    }
}

template <typename T, typename L, int WIDTH, int CHANNELS, int PLACES, int BATCH, int HALO, int CLUSTER, int HAS, bool DECAY>
GSPN2_DEVICE void scan_bulk_backward(const BulkParams& bulk) {
    static_assert(WIDTH % CHANNELS == 0, "the scanning warps share out a slice");
    static_assert(BATCH % HALO == 0 || HALO % BATCH == 0, "known when a batch is unrolled");
    using R = BackwardRing<T, WIDTH, CHANNELS, PLACES, BATCH, HALO, CLUSTER, HAS>;
    const Place at = find_place<CLUSTER, HALO>(bulk.scan);
    if (at.first >= at.last) return;
    const R ring(bulk.span);
    const int warp = warp_index(), normalizers = blockDim.x / 32 - 1 - bulk.storers - R::WARPS;
    const int rest = at.length - at.start - at.owned, all = at.horizontal ? bulk.scan.width : bulk.scan.height;
    const Reach reach{CLUSTER > 1 ? HALO : 0, at.owned, at.rank > 0 ? HALO : 0, rest < HALO ? rest : HALO};
    const Rows rows{at.backwards, at.backwards ? all - at.last : at.last - 1};
    const int batches = (at.last - at.first + BATCH - 1) / BATCH, ahead = batches < bulk.stages ? batches : bulk.stages;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < bulk.stages; ++stage) signal_init(R::full(stage));
        signals_ready();
        if (at.owned) load_backward_boxes<L, WIDTH, BATCH>(bulk, at, reach, rows, ring, 0, ahead);
    }
    if (threadIdx.x >= 32 && threadIdx.x < 32 + bulk.stages) {
        const int stage = threadIdx.x - 32;
        signal_init(R::ready(stage), normalizers * WARP_ARRIVALS);
        signal_init(R::done(stage), R::WARPS * WARP_ARRIVALS);
        signal_init(R::empty(stage), (bulk.storers + normalizers) * WARP_ARRIVALS);
    }
    if constexpr (CLUSTER > 1) {
        for (int i = threadIdx.x - 32; i >= 0 && i < 4 * R::WARPS; i += blockDim.x - 32) signal_init(R::signal(0, 0, 0) + i);
        cluster_ready();
    } else {
        signals_ready();
        block_barrier();
    }
    if (!at.owned) return;
    if (warp == 0) {
        if (threadIdx.x == 0) load_backward_boxes<L, WIDTH, BATCH>(bulk, at, reach, rows, ring, ahead, batches);
    } else if (warp < 1 + bulk.storers) {
        const auto to = [&](const View& view) { return walk<T>(view, at, bulk.scan, at.last - 1, -1, 0, at.slice * WIDTH); };
        Stored<T> stored[1 + R::LAM + R::U];
        stored[0] = {0, to(bulk.scan.grad_x)};
        if constexpr (R::LAM) stored[R::LAM_TILE] = {R::LAM_TILE, to(bulk.scan.grad_lam)};
        if constexpr (R::U) stored[R::U_TILE] = {R::U_TILE, to(bulk.scan.grad_u)};
        store_lines<T, WIDTH, BATCH>(bulk, at, reach, rows, ring, stored, threadIdx.x - 32, 32 * bulk.storers);
    } else if (warp < 1 + bulk.storers + normalizers) {
        normalize_backward<L, WIDTH, PLACES, BATCH>(bulk, at, reach, rows, ring, threadIdx.x - 32 * (1 + bulk.storers), 32 * normalizers);
    } else {
        scan_backward_boxes<T, CHANNELS, PLACES, BATCH, HALO, CLUSTER, DECAY>(bulk, at, reach, rows, ring, warp - 1 - bulk.storers - normalizers);
    }
}
