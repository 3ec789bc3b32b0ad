// The forward scan from boxes that the bulk copy engine moves: y = u h, h = lam x + (three taps of the line before).
//
// What limits a scan is not bytes but requests: a slice of a position is 16 to 160 bytes, and each is an access of its own for the
// load unit. The copy engine takes one instruction for a box (channels of the slice x positions of the block x BATCH lines) and
// no registers. One thread loads boxes of x, lam, u and the logits into a ring of stages in shared memory; normalising
// warps turn the logits into float32 weights; scanning warps walk along the lines and leave y where x was; one thread has
// the engine store it and frees the stage. They meet at signals of each stage, never all at once:
//
//     full (the engine's bytes) -> ready (weights) -> done (y is there) -> empty (y has been read)
//
// A scanning warp owns CHANNELS channels of all positions that the block has: a lane has PLACES consecutive positions, so only
// the edges of a lane are shuffled and nothing waits for another warp. In a cluster a block also scans HALO positions beyond
// its share on either side. What they hold is wrong by one more position each line, so every HALO lines the neighbours send
// theirs: the latency of the exchange is paid once in HALO lines. Beyond the tensor the engine fills in zeros. One set of weights
// for all channels of a slice; weights for each channel take the forward of forward.cuh.
#pragma once

#include "scan.cuh"

enum { MAP_X, MAP_LAM, MAP_U, MAP_LOGITS, MAP_STATE, MAP_Y, MAPS };

struct BulkParams {
    TensorMap maps[2][MAPS];  // for scans along rows and along columns: (channel, position, line, direction, batch)
    Params scan;
    int span, stages;         // positions of a box; stages of the ring
    int storers;              // warps that store (backward)
};

[[maybe_unused]] constexpr int BULK_SERVANTS = 2;  // warps of the forward before the normalising ones: the loading and the storing thread's
[[maybe_unused]] constexpr int MOST_STAGES = 8;

// A box begins at whole 16 bytes of its tensor, or the engine stops the kernel with an illegal instruction. Three logits begin
// anywhere, so a position has 32 bytes of them.
[[maybe_unused]] constexpr int SLOT = 32;
template <typename L>
GSPN2_DEVICE int box_logit(int logit) { return logit & -static_cast<int>(16 / sizeof(L)); }

// Lanes read 16 bytes of a row each, of rows next to each other: without conflicts if these lie in different 16 bytes of 128. Rows of
// an odd number of them do. In boxes with rows of 32, 64 or 128 bytes the engine swaps them (the map's swizzle), after the
// address in shared memory: boxes begin where its pattern does.
GSPN2_DEVICE constexpr int box_alignment(int row) { return row == 128 ? 1024 : row == 64 ? 512 : 256; }
template <int ROW>
GSPN2_DEVICE int swizzled(int at) {
    constexpr int parts = ROW == 32 ? 1 : ROW == 64 ? 3 : ROW == 128 ? 7 : 0;
    return at ^ (at >> 3 & parts << 4);
}

// A line's weights, four floats a position: those of a lane's first, second, ... PLACES are apart, so that lanes next to each other
// read 16 bytes next to each other, and so that normalising lanes, which have consecutive positions, write without conflicts.
template <int PLACES>
struct Weights {
    static constexpr int APART = PLACES == 2 || PLACES == 4 || PLACES == 8 ? 40 / PLACES : 0;
    static constexpr int GROUP = (APART ? 40 : 32) * 16, LINE = PLACES * GROUP;  // bytes of 32 positions, of a line
    GSPN2_DEVICE static int at(int position) {
        const int rest = position & 31;
        return (position >> 5) * GROUP + 16 * (APART ? rest % PLACES * APART + rest / PLACES : rest);
    }
};

// Shared memory of a block, in bytes from its beginning.
template <typename T, int WIDTH, int CHANNELS, int PLACES, int BATCH, int HALO, int CLUSTER, int HAS>
struct Ring {
    static_assert(CHANNELS * sizeof(T) <= 16, "a lane's channels of a position stay together");
    using W = Weights<PLACES>;
    static constexpr int SLICE = WIDTH, WARPS = WIDTH / CHANNELS;  // that scan
    static constexpr int ROW = WIDTH * static_cast<int>(sizeof(T)), ALIGN = box_alignment(ROW);
    static constexpr bool LAM = HAS & HAS_LAM, U = HAS & HAS_U, STATE = HAS & HAS_STATE;
    // h goes where lam was.
    static constexpr int LAM_TILE = 1, U_TILE = 1 + LAM, TILES = 1 + (LAM || STATE) + U;
    static constexpr int INBOX = CLUSTER > 1 ? 4 * WARPS * HALO * CHANNELS * 4 : 0;
    static constexpr int SIGNALS = (4 * MOST_STAGES + (CLUSTER > 1 ? 4 * WARPS : 0)) * 8;
    static constexpr int BOXES = (SIGNALS + INBOX + ALIGN - 1) / ALIGN * ALIGN;
    int span, tile, stage;
    GSPN2_DEVICE constexpr Ring(int positions)
        : span(positions), tile((BATCH * positions * ROW + ALIGN - 1) / ALIGN * ALIGN),
          stage((TILES * tile + BATCH * (positions * SLOT + W::LINE) + ALIGN - 1) / ALIGN * ALIGN) {}
    // Bytes that arrive for a stage.
    GSPN2_DEVICE int loaded() const { return BATCH * span * ((1 + LAM + U) * ROW + SLOT); }
    // The element with which a scanning warp's channels begin, within a line of a box.
    GSPN2_DEVICE static int place(int position, int warp) {
        constexpr int SIZE = sizeof(T);
        return swizzled<ROW>(position * ROW + warp * CHANNELS * SIZE) / SIZE;
    }

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
    GSPN2_DEVICE unsigned char* taps(int index) const { return shared_memory() + BOXES + index * stage + TILES * tile; }
    GSPN2_DEVICE float* weights(int index, int row, int place) const {
        return reinterpret_cast<float*>(taps(index) + BATCH * span * SLOT + row * W::LINE + place);
    }
};

// A warp meets and arrives at a signal, one lane for all. A race checker counts an arrival for the lane that makes it: for it each
// lane arrives (GSPN2_EVERY_LANE), which is slower.
#if defined(GSPN2_EVERY_LANE)
[[maybe_unused]] constexpr int WARP_ARRIVALS = 32;
#else
[[maybe_unused]] constexpr int WARP_ARRIVALS = 1;
#endif
GSPN2_DEVICE void warp_arrives(Signal* signal) {
    warp_barrier();
    if (threadIdx.x % 32 < WARP_ARRIVALS) signal_arrive(signal);
}

// The stage that comes next, and how often the ring has been around, as a parity.
struct Turn {
    int stage, parity;
    GSPN2_DEVICE void next(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// The block's share of a line within the span that it scans, which begins `low` positions before the share. Of the neighbours'
// positions it gets what they have: `from_low` and `from_high`.
struct Reach {
    int low, owned, from_low, from_high;
    GSPN2_DEVICE bool owns(int position) const { return position >= low && position < low + owned; }
};

// Of the block's first channel, among all that a pixel has.
GSPN2_DEVICE int weight_set(const Place& at, const Params& p, int width) {
    return at.index * p.groups + at.slice * width / (p.channels / p.groups);
}

// The line in memory with which the box of a batch begins: that of its last line where the scan goes backwards.
GSPN2_DEVICE int first_line(const Place& at, const Params& p, int batch, int lines) {
    const int all = at.horizontal ? p.width : p.height, first = at.first + batch * lines;
    return at.backwards ? all - first - lines : first;
}

// Batches from `batch` on, of which the first finds the ring's first stage free.
template <typename L, int WIDTH, int BATCH, typename R>
GSPN2_DEVICE void load_boxes(const BulkParams& bulk, const Place& at, const Reach& reach, const R& ring, int batch, int end) {
    const Params& p = bulk.scan;
    const TensorMap* const maps = bulk.maps[at.horizontal ? 0 : 1];
    const int channel = at.slice * WIDTH, position = at.start - reach.low;
    const int set = weight_set(at, p, WIDTH);
    const int lam_direction = p.lam.direction ? at.index : 0, u_direction = p.u.direction ? at.index : 0;
    Turn turn{0, batch > 0};
    for (; batch < end; ++batch, turn.next(bulk.stages)) {
        const int stage = turn.stage, line = first_line(at, p, batch, BATCH);
        Signal* const full = R::full(stage);
        if (batch >= bulk.stages) signal_wait(R::empty(stage), turn.parity ^ 1);
        signal_expect(full, ring.loaded());
        load_box(ring.taps(stage), maps[MAP_LOGITS], box_logit<L>(3 * set), position, line, 0, at.batch, full);
        load_box(ring.box(stage, 0), maps[MAP_X], channel, position, line, 0, at.batch, full);
        if constexpr (R::LAM) load_box(ring.box(stage, R::LAM_TILE), maps[MAP_LAM], channel, position, line, lam_direction, at.batch, full);
        if constexpr (R::U) load_box(ring.box(stage, R::U_TILE), maps[MAP_U], channel, position, line, u_direction, at.batch, full);
    }
}

template <int WIDTH, int BATCH, typename R>
GSPN2_DEVICE void store_boxes(const BulkParams& bulk, const Place& at, const Reach& reach, const R& ring) {
    const TensorMap* const maps = bulk.maps[at.horizontal ? 0 : 1];
    const int lines = at.last - at.first, batches = (lines + BATCH - 1) / BATCH, channel = at.slice * WIDTH;
    Turn turn{0, 0};
    int before = 0;
    for (int batch = 0; batch < batches; ++batch, turn.next(bulk.stages)) {
        const int stage = turn.stage, line = first_line(at, bulk.scan, batch, BATCH);
        const int count = lines - batch * BATCH < BATCH ? lines - batch * BATCH : BATCH;
        signal_wait(R::done(stage), turn.parity);
        for (int s = 0; s < count; ++s) {
            const int row = at.backwards ? BATCH - 1 - s : s, offset = (row * ring.span + reach.low) * WIDTH;
            store_box(maps[MAP_Y], channel, at.start, line + row, at.index, at.batch, ring.box(stage, 0) + offset);
            if constexpr (R::STATE) {
                store_box(maps[MAP_STATE], channel, at.start, line + row, at.index, at.batch, ring.box(stage, R::LAM_TILE) + offset);
            }
        }
        end_group();
        if (batch > 0) {
            groups_read<1>();
            signal_arrive(R::empty(before));
        }
        before = stage;
    }
    groups_read<0>();
}

// A position's three logits, `skipped` elements into its 32 bytes.
template <typename L>
GSPN2_DEVICE void read_logits(float (&logit)[3], const unsigned char* taps, int position, int skipped) {
    const auto word = [&](int w) { return taps + swizzled<SLOT>(position * SLOT + 4 * w); };
    if constexpr (sizeof(L) == 2) {
        float four[4];
        to_floats(*reinterpret_cast<const unsigned*>(word(skipped / 2)), L{}, four[0], four[1]);
        to_floats(*reinterpret_cast<const unsigned*>(word(skipped / 2 + 1)), L{}, four[2], four[3]);
#pragma unroll
        for (int t = 0; t < 3; ++t) logit[t] = skipped & 1 ? four[t + 1] : four[t];
    } else {
#pragma unroll
        for (int t = 0; t < 3; ++t) logit[t] = to_float(*reinterpret_cast<const L*>(word(skipped + t)));
    }
}

// Calls each(line, position) for this thread's part: warps share out `lines` of a batch and their positions, 32 of a line at a time.
template <int PLACES, typename F>
GSPN2_DEVICE void share_out(int lines, int thread, int threads, const F& each) {
    for (int unit = thread / 32; unit < PLACES * lines; unit += threads / 32) each(unit / PLACES, unit % PLACES * 32 + thread % 32);
}

template <typename L, int PLACES, int BATCH, typename R>
GSPN2_DEVICE void normalize_boxes(const BulkParams& bulk, const Place& at, const Reach& reach, const R& ring, int thread, int threads) {
    const int batches = (at.last - at.first + BATCH - 1) / BATCH;
    const int first = 3 * weight_set(at, bulk.scan, R::SLICE), skipped = first - box_logit<L>(first);
    Turn turn{0, 0};
    for (int batch = 0; batch < batches; ++batch, turn.next(bulk.stages)) {
        const int stage = turn.stage;
        // Implied by the next line, through the warps that store and load; told so that a race checker sees it.
        if (batch >= bulk.stages) signal_wait(R::done(stage), turn.parity ^ 1);
        signal_wait(R::full(stage), turn.parity);
        share_out<PLACES>(BATCH, thread, threads, [&](int s, int position) {
            if (position >= ring.span) return;
            const int j = at.start + position - reach.low;
            float logit[3], weight[3];
            read_logits<L>(logit, ring.taps(stage) + s * ring.span * SLOT, position, skipped);
            normalize(weight, logit, j > 0, j < at.length - 1, bulk.scan.softmax);
            const float four[4] = {weight[0], weight[1], weight[2], 0.f};
            store_vector<float, 4>(ring.weights(stage, s, R::W::at(position)), four);
        });
        warp_arrives(R::ready(stage));
    }
}

// What the neighbours of a cluster scanned of their own positions, into the halos of a scanning warp's state.
template <typename R, int HALO, int PLACES, int CHANNELS>
GSPN2_DEVICE void receive_edges(const Reach& reach, int exchange, int warp, float (&value)[PLACES][CHANNELS]) {
    const int lane = threadIdx.x % 32;
    if (reach.from_low) {
        if (lane == 0) signal_expect(R::signal(exchange, 0, warp), HALO * CHANNELS * 4);
        signal_wait(R::signal(exchange, 0, warp), (exchange - 1) / 2 & 1);
    }
    if (reach.from_high) {
        if (lane == 0) signal_expect(R::signal(exchange, 1, warp), reach.from_high * CHANNELS * 4);
        signal_wait(R::signal(exchange, 1, warp), (exchange - 1) / 2 & 1);
    }
#pragma unroll
    for (int k = 0; k < PLACES; ++k) {
        const int position = lane * PLACES + k, beyond = position - reach.low - reach.owned;
        if (position < reach.from_low) load_vector<float, CHANNELS>(value[k], R::inbox(exchange, 0, warp) + position * CHANNELS);
        if (beyond >= 0 && beyond < reach.from_high) {
            load_vector<float, CHANNELS>(value[k], R::inbox(exchange, 1, warp) + beyond * CHANNELS);
        }
    }
}

// The edges of the own positions, into the neighbours' halos.
template <typename R, int HALO, int PLACES, int CHANNELS>
GSPN2_DEVICE void send_edges(const Reach& reach, int rank, int exchange, int warp, const float (&value)[PLACES][CHANNELS]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < PLACES; ++k) {
        const int position = lane * PLACES + k - reach.low, from_end = position - (reach.owned - HALO);
        if (position < 0 || position >= reach.owned) continue;
        constexpr int PART = CHANNELS < 4 ? CHANNELS : 4;
#pragma unroll
        for (int first = 0; first < CHANNELS; first += PART) {
            float part[PART];
#pragma unroll
            for (int e = 0; e < PART; ++e) part[e] = value[k][first + e];
            if (reach.from_low && position < HALO) {
                send(R::inbox(exchange, 1, warp) + position * CHANNELS + first, part, R::signal(exchange, 1, warp), rank - 1);
            }
            if (reach.from_high && from_end >= 0) {
                send(R::inbox(exchange, 0, warp) + from_end * CHANNELS + first, part, R::signal(exchange, 0, warp), rank + 1);
            }
        }
    }
}

// Lanes of two places read rows that are two apart, which use half of the banks; so every other four lanes take their second place
// first. Into order, or back.
template <typename T, int CHANNELS, int PLACES>
GSPN2_DEVICE void exchange_places(Packed<T, CHANNELS> (&value)[PLACES], bool exchanged) {
    if constexpr (PLACES == 2) {
        using P = Packed<T, CHANNELS>;
        const P first = value[0], second = value[1];
#pragma unroll
        for (int w = 0; w < P::WORDS; ++w) {
            value[0].words[w] = exchanged ? second.words[w] : first.words[w];
            value[1].words[w] = exchanged ? first.words[w] : second.words[w];
        }
    }
}

template <typename T, int CHANNELS, int PLACES, int BATCH, int HALO, int CLUSTER, bool DECAY, typename R>
GSPN2_DEVICE void scan_boxes(const BulkParams& bulk, const Place& at, const Reach& reach, const R& ring, int warp) {
    constexpr int OFTEN = HALO < BATCH ? HALO : BATCH;  // exchanges within a batch
    constexpr bool EARLY = PLACES * CHANNELS <= 16;  // the next line is read before this one is done
    const int lane = threadIdx.x % 32, lines = at.last - at.first, batches = (lines + BATCH - 1) / BATCH;
    const bool exchanged = PLACES == 2 && lane & 4;

    using P = Packed<T, CHANNELS>;
    struct Line {
        P x[PLACES], lam[R::LAM ? PLACES : 1], u[R::U ? PLACES : 1];
        Packed<float, 4> weights[PLACES];
    };
    // Beyond the span a lane does again what its last position does.
    int place[PLACES], weigh[PLACES];
    bool inside[PLACES];
#pragma unroll
    for (int k = 0; k < PLACES; ++k) {
        const int position = lane * PLACES + k, taken = position ^ exchanged, end = ring.span - 1;
        place[k] = R::place(taken < end ? taken : end, warp);
        weigh[k] = R::W::at(position < end ? position : end);
        inside[k] = taken <= end;
    }
    const auto read = [&](Line& line, int stage, int row) {
#pragma unroll
        for (int k = 0; k < PLACES; ++k) {
            line.x[k].load(ring.line(stage, 0, row) + place[k]);
            if constexpr (R::LAM) line.lam[k].load(ring.line(stage, R::LAM_TILE, row) + place[k]);
            if constexpr (R::U) line.u[k].load(ring.line(stage, R::U_TILE, row) + place[k]);
            line.weights[k].load(ring.weights(stage, row, weigh[k]));
        }
    };

    float h[PLACES][CHANNELS] = {};
    Turn turn{0, 0};
    for (int batch = 0; batch < batches; ++batch, turn.next(bulk.stages)) {
        const int stage = turn.stage, count = lines - batch * BATCH < BATCH ? lines - batch * BATCH : BATCH;
        const auto row_of = [&](int s) { return at.backwards ? BATCH - 1 - s : s; };
        signal_wait(R::full(stage), turn.parity);
        signal_wait(R::ready(stage), turn.parity);
        Line line;
        if constexpr (EARLY) read(line, stage, row_of(0));
#pragma unroll
        for (int s = 0; s < BATCH; ++s) {
            if (s >= count) break;
            if constexpr (CLUSTER > 1) {
                const int exchange = (batch * BATCH + s) / HALO;
                if (s % OFTEN == 0 && (batch * BATCH + s) % HALO == 0 && exchange > 0) {
                    receive_edges<R, HALO>(reach, exchange, warp, h);
                }
            }
            float lower[CHANNELS], higher[CHANNELS];
#pragma unroll
            for (int e = 0; e < CHANNELS; ++e) lower[e] = shuffle_up(h[PLACES - 1][e]), higher[e] = shuffle_down(h[0][e]);
            [[maybe_unused]] Line next;
            if constexpr (EARLY) {
                if (s + 1 < BATCH) read(next, stage, row_of(s + 1));
            } else {
                read(line, stage, row_of(s));
            }
            exchange_places<T, CHANNELS>(line.x, exchanged);
            if constexpr (R::LAM) exchange_places<T, CHANNELS>(line.lam, exchanged);
            if constexpr (R::U) exchange_places<T, CHANNELS>(line.u, exchanged);
            P y[PLACES];
            [[maybe_unused]] P state[PLACES];
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                float value[CHANNELS], keep[CHANNELS];
                line.x[k].unpack(value);
                if constexpr (R::LAM) {
                    line.lam[k].unpack(keep);
#pragma unroll
                    for (int e = 0; e < CHANNELS; ++e) value[e] *= keep[e], keep[e] = 1.f - keep[e];
                }
                float weight[4];
                line.weights[k].unpack(weight);
#pragma unroll
                for (int e = 0; e < CHANNELS; ++e) {
                    const float before = h[k][e], high = k + 1 < PLACES ? h[k + 1 < PLACES ? k + 1 : 0][e] : higher[e];
                    if constexpr (DECAY) {
                        h[k][e] = value[e] + keep[e] * (weight[1] * before + weight[0] * lower[e] + weight[2] * high);
                    } else {
                        h[k][e] = weight[2] * high + (weight[0] * lower[e] + (weight[1] * before + value[e]));
                    }
                    lower[e] = before;
                }
                if constexpr (R::STATE) state[k].pack(h[k]);
                float result[CHANNELS];
                if constexpr (R::U) line.u[k].unpack(result);
#pragma unroll
                for (int e = 0; e < CHANNELS; ++e) result[e] = R::U ? result[e] * h[k][e] : h[k][e];
                y[k].pack(result);
            }
            // Lanes beyond the span have read what the last one within it writes.
            warp_barrier();
            exchange_places<T, CHANNELS>(y, exchanged);
            if constexpr (R::STATE) exchange_places<T, CHANNELS>(state, exchanged);
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                if (!inside[k]) continue;
                if constexpr (R::STATE) state[k].store(ring.line(stage, R::LAM_TILE, row_of(s)) + place[k]);
                y[k].store(ring.line(stage, 0, row_of(s)) + place[k]);
            }
            if constexpr (CLUSTER > 1) {
                const int after = batch * BATCH + s + 1, exchange = after / HALO;
                if ((s + 1) % OFTEN == 0 && after % HALO == 0 && after < lines) {
                    send_edges<R, HALO>(reach, at.rank, exchange, warp, h);
                }
            }
            if constexpr (EARLY) line = next;
        }
        engine_fence();
        warp_arrives(R::done(stage));
    }
}

template <typename T, typename L, int WIDTH, int CHANNELS, int PLACES, int BATCH, int HALO, int CLUSTER, int HAS, bool DECAY>
GSPN2_DEVICE void scan_bulk(const BulkParams& bulk) {
    static_assert(WIDTH % CHANNELS == 0, "the scanning warps share out a slice");
    static_assert(BATCH % HALO == 0 || HALO % BATCH == 0, "known when a batch is unrolled");
    using R = Ring<T, WIDTH, CHANNELS, PLACES, BATCH, HALO, CLUSTER, HAS>;
    const Place at = find_place<CLUSTER, HALO>(bulk.scan);
    if (at.first >= at.last) return;  // the whole cluster: this direction has fewer segments
    const R ring(bulk.span);
    const int warp = warp_index(), normalizers = blockDim.x / 32 - BULK_SERVANTS - R::WARPS;
    const int rest = at.length - at.start - at.owned;
    const Reach reach{CLUSTER > 1 ? HALO : 0, at.owned, at.rank > 0 ? HALO : 0, rest < HALO ? rest : HALO};
    const int batches = (at.last - at.first + BATCH - 1) / BATCH, ahead = batches < bulk.stages ? batches : bulk.stages;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < bulk.stages; ++stage) signal_init(R::full(stage));
        signals_ready();
        // On their way before the block, or even the cluster, has met.
        if (at.owned) load_boxes<L, WIDTH, BATCH>(bulk, at, reach, ring, 0, ahead);
    }
    if (threadIdx.x >= 32 && threadIdx.x < 32 + bulk.stages) {
        const int stage = threadIdx.x - 32;
        signal_init(R::ready(stage), normalizers * WARP_ARRIVALS);
        signal_init(R::done(stage), R::WARPS * WARP_ARRIVALS);
        signal_init(R::empty(stage));
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
        if (threadIdx.x == 0) load_boxes<L, WIDTH, BATCH>(bulk, at, reach, ring, ahead, batches);
    } else if (warp == 1) {
        if (threadIdx.x == 32) store_boxes<WIDTH, BATCH>(bulk, at, reach, ring);
    } else if (warp < BULK_SERVANTS + normalizers) {
        normalize_boxes<L, PLACES, BATCH>(bulk, at, reach, ring, threadIdx.x - 32 * BULK_SERVANTS, 32 * normalizers);
    } else {
        scan_boxes<T, CHANNELS, PLACES, BATCH, HALO, CLUSTER, DECAY>(bulk, at, reach, ring, warp - BULK_SERVANTS - normalizers);
    }
}
