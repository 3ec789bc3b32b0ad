// The forward scan as a pipeline of warps: y = u h, h = lam x + (three taps of the line before).
//
// A line's critical path is short if the warps that walk along it do nothing else. Feeding warps load x, lam and the logits of
// a batch of lines, multiply, normalise, and leave lam x and the weights as float32 in shared memory; scanning warps turn lam x
// into h there, in place; two batches later the feeding warps take h, multiply by u and store y. All move from batch to batch
// together: one barrier for BATCH lines.
//
// A scanning warp owns CHANNELS channels of all positions that the block has: a lane has PLACES consecutive positions, so only
// the edges of a lane are shuffled and nothing waits for another warp. In a cluster a block also scans HALO positions beyond
// its share on either side. What they hold is wrong by one more position each line, so every HALO lines the neighbours send
// theirs: the latency of the exchange is paid once in HALO lines.
#pragma once

#include "scan.cuh"

// Shared memory of a block, in floats. Position p is kept PLACES apart from p + 1, so that the lanes of a scanning warp read and
// write side by side, and rows are padded so that the channels of a position, which one feeding warp writes, lie in other banks.
template <int WIDTH, int SETS, int BATCH, int PLACES, int CHANNELS, int HALO, int CLUSTER, bool DECAY>
struct Stage {
    static constexpr int WARPS = (WIDTH + CHANNELS - 1) / CHANNELS;  // that scan
    static constexpr int SPAN = 32 * PLACES;                         // positions
    static constexpr int UNIT = CHANNELS;
    static constexpr int STEP = PLACES == 2 ? 34 : 33;
    static constexpr int ROW = (PLACES * STEP * CHANNELS + 23) / 32 * 32 + 8;
    static constexpr int LINE = WARPS * ROW;
    static constexpr int WEIGHTS = SETS == 1 ? PLACES * STEP * 4 : 3 * LINE;
    static constexpr int INBOX = CLUSTER > 1 ? 4 * WARPS * HALO * CHANNELS : 0;  // of two exchanges, from both sides
    static constexpr int SIGNALS = CLUSTER > 1 ? 4 * WARPS * 2 : 0;
    static constexpr int FLOATS = SIGNALS + (INBOX + 3) / 4 * 4 + 3 * BATCH * LINE + 2 * BATCH * (WEIGHTS + (DECAY ? LINE : 0));

    GSPN2_DEVICE static float* floats() { return reinterpret_cast<float*>(shared_memory()); }
    GSPN2_DEVICE static Signal* signal(int exchange, int side, int warp) {
        return reinterpret_cast<Signal*>(shared_memory()) + (2 * (exchange & 1) + side) * WARPS + warp;
    }
    GSPN2_DEVICE static float* inbox(int exchange, int side, int warp) {
        return floats() + SIGNALS + ((2 * (exchange & 1) + side) * WARPS + warp) * HALO * CHANNELS;
    }
    // Lines of lam x, then h: being fed, scanned and stored. The other two: being fed and scanned.
    GSPN2_DEVICE static float* value() { return floats() + SIGNALS + (INBOX + 3) / 4 * 4; }
    GSPN2_DEVICE static float* weights() { return value() + 3 * BATCH * LINE; }
    GSPN2_DEVICE static float* keep() { return weights() + 2 * BATCH * WEIGHTS; }
    GSPN2_DEVICE static int slot(int position) { return position % PLACES * STEP + position / PLACES; }

    // What lies beyond the block's positions never changes: a state of 0.
    GSPN2_DEVICE static void clear(int first) {
        const auto rows = [](float* data, int count, int stride, int width, int position) {
            for (int row = threadIdx.x % 32; row < count; row += 32) {
                for (int e = 0; e < width; ++e) data[row * stride + slot(position) * width + e] = 0.f;
            }
        };
        for (int position = first + threadIdx.x / 32; position < SPAN; position += blockDim.x / 32) {
            rows(value(), 3 * BATCH * WARPS, ROW, CHANNELS, position);
            if constexpr (SETS == 1) {
                rows(weights(), 2 * BATCH, WEIGHTS, 4, position);
            } else {
                rows(weights(), 2 * BATCH * 3 * WARPS, ROW, CHANNELS, position);
            }
            if constexpr (DECAY) rows(keep(), 2 * BATCH * WARPS, ROW, CHANNELS, position);
        }
    }

    // The channels of a feeding thread, VEC from `channel` on, in a line's rows.
    template <int VEC>
    GSPN2_DEVICE static void put(float* line, int channel, const float (&values)[VEC]) {
        constexpr int PIECE = VEC < CHANNELS ? VEC : CHANNELS;
#pragma unroll
        for (int first = 0; first < VEC; first += PIECE) {
            float piece[PIECE];
#pragma unroll
            for (int e = 0; e < PIECE; ++e) piece[e] = values[first + e];
            store_vector<float, PIECE>(line + (channel + first) / CHANNELS * ROW + (channel + first) % CHANNELS, piece);
        }
    }
    template <int VEC>
    GSPN2_DEVICE static void get(const float* line, int channel, float (&values)[VEC]) {
        constexpr int PIECE = VEC < CHANNELS ? VEC : CHANNELS;
#pragma unroll
        for (int first = 0; first < VEC; first += PIECE) {
            float piece[PIECE];
            load_vector<float, PIECE>(piece, line + (channel + first) / CHANNELS * ROW + (channel + first) % CHANNELS);
#pragma unroll
            for (int e = 0; e < PIECE; ++e) values[first + e] = piece[e];
        }
    }
};

// The positions that a block scans: its share between those of its neighbours that it scans as well.
struct Reach {
    int low, owned, high;
    GSPN2_DEVICE int all() const { return low + owned + high; }
    GSPN2_DEVICE bool owns(int position) const { return position >= low && position < low + owned; }
};

template <typename T, typename L, int VEC, int SETS, int LANES, int BATCH, int HAS, bool DECAY, typename S>
GSPN2_DEVICE void feed(const Params& p, const Place& at, const Reach& reach) {
    constexpr bool LAM = HAS & HAS_LAM, U = HAS & HAS_U, STATE = HAS & HAS_STATE;
    constexpr int TAPS = SETS == 1 ? (3 + LANES - 1) / LANES : 1;  // of a thread, where all channels share them
    using Vector = Packed<T, VEC>;
    const int thread = threadIdx.x - 32 * S::WARPS, lane = thread % LANES, wanted = thread / LANES;
    const int lines = at.last - at.first, batches = (lines + BATCH - 1) / BATCH;
    const int channel = (at.slice * LANES + lane) * VEC;
    // Threads beyond the last position do again what is done there, but neither normalise nor store; a lane beyond the last
    // channel reads the first.
    const bool exists = wanted < reach.all();
    const int position = exists ? wanted : reach.all() - 1, j = position - reach.low, at_channel = channel < p.channels ? channel : 0;
    const bool stores = exists && channel < p.channels && reach.owns(position);
    const int group = (SETS > 1 ? at_channel : at.slice * LANES * VEC) / (p.channels / p.groups);
    const int place = S::slot(position);
    int tap[TAPS];
#pragma unroll
    for (int m = 0; m < TAPS; ++m) tap[m] = lane + m * LANES < 3 ? lane + m * LANES : 0;

    const auto start = [&](auto walk_type, const View& view, long long offset) {
        return walk<typename decltype(walk_type)::Type>(view, at, p, at.first, 1, j, offset);
    };
    auto x = start(Tag<const T>(), p.x, at_channel), lam = start(Tag<const T>(), p.lam, at_channel);
    auto u = start(Tag<const T>(), p.u, at_channel);
    auto y = start(Tag<T>(), p.y, at_channel), state = start(Tag<T>(), p.state, at_channel);
    auto logits = start(Tag<const L>(), p.logits, group * p.logits.group);

    Vector x_next[BATCH], lam_next[LAM ? BATCH : 1], u_next[U ? BATCH : 1];
    [[maybe_unused]] L raw[BATCH][TAPS];
    [[maybe_unused]] Packed<L, 3 * VEC> taps_next[SETS > 1 ? BATCH : 1];
    // `full`: all lines of the batch exist.
    const auto fetch = [&](auto full, int batch) {
#pragma unroll
        for (int s = 0; s < BATCH; ++s) {
            if (decltype(full)::value || batch * BATCH + s < lines) {
                x_next[s].load(x.line);
                if constexpr (LAM) lam_next[s].load(lam.line);
                if constexpr (SETS > 1) {
                    taps_next[s].load(logits.line);
                } else {
#pragma unroll
                    for (int m = 0; m < TAPS; ++m) raw[s][m] = logits.line[tap[m]];
                }
            }
            x.next(), logits.next();
            if constexpr (LAM) lam.next();
        }
    };
    const auto fetch_gates = [&](auto full, int batch) {
        if constexpr (U) {
#pragma unroll
            for (int s = 0; s < BATCH; ++s) {
                if (decltype(full)::value || batch * BATCH + s < lines) u_next[s].load(u.line);
                u.next();
            }
        }
    };
    const auto store = [&](auto full, int batch, int third) {
        if (stores) {
            const float* line = S::value() + third * BATCH * S::LINE + place * S::UNIT;
            auto to_y = y;
            [[maybe_unused]] auto to_state = state;
#pragma unroll
            for (int s = 0; s < BATCH; ++s) {
                if (!decltype(full)::value && batch * BATCH + s >= lines) break;
                float h[VEC];
                S::get(line + s * S::LINE, lane * VEC, h);
                if constexpr (STATE) store_vector<T, VEC>(to_state.line, h);
                if constexpr (U) {
                    float gate[VEC];
                    u_next[s].unpack(gate);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) h[e] *= gate[e];
                }
                store_vector<T, VEC>(to_y.line, h);
                to_y.next();
                if constexpr (STATE) to_state.next();
            }
        }
        y.line += static_cast<long long>(BATCH) * y.next_line;
        if constexpr (STATE) state.line += static_cast<long long>(BATCH) * state.next_line;
    };
    // As a whole where the batch is one, line by line at the end.
    const auto whole = [&](int batch) { return (batch + 1) * BATCH <= lines; };
    const auto on_batch = [&](const auto& work, int batch, auto... rest) {
        if (whole(batch)) {
            work(Constant<true>(), batch, rest...);
        } else {
            work(Constant<false>(), batch, rest...);
        }
    };
    on_batch(fetch, 0);
    S::clear(reach.all());

    int fed = 0;  // which third of the lines is fed in this step: the step's remainder by 3
    for (int step = 0; step < batches + 2; ++step) {
        const int stored = fed == 2 ? 0 : fed + 1;  // the step before the last one's
        if (step >= 2) on_batch(store, step - 2, stored);
        if (step >= 1) on_batch(fetch_gates, step - 1);
        if (step < batches) {
            float* const weights = S::weights() + (step & 1) * BATCH * S::WEIGHTS;
            const bool low = at.start + j > 0, high = at.start + j < at.length - 1;
#pragma unroll
            for (int s = 0; s < BATCH; ++s) {
                float value[VEC];
                x_next[s].unpack(value);
                if constexpr (LAM) {
                    float gate[VEC];
                    lam_next[s].unpack(gate);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) value[e] *= gate[e], gate[e] = 1.f - gate[e];
                    if constexpr (DECAY) {
                        S::put(S::keep() + ((step & 1) * BATCH + s) * S::LINE + place * S::UNIT, lane * VEC, gate);
                    }
                }
                S::put(S::value() + (fed * BATCH + s) * S::LINE + place * S::UNIT, lane * VEC, value);
                if constexpr (SETS > 1) {
                    float flat[3 * VEC], weight[3][VEC];
                    taps_next[s].unpack(flat);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) {
                        const float logit[3] = {flat[3 * e], flat[3 * e + 1], flat[3 * e + 2]};
                        float normalized[3];
                        normalize(normalized, logit, low, high, p.softmax);
#pragma unroll
                        for (int t = 0; t < 3; ++t) weight[t][e] = normalized[t];
                    }
#pragma unroll
                    for (int t = 0; t < 3; ++t) {
                        S::put(weights + s * S::WEIGHTS + t * S::LINE + place * S::UNIT, lane * VEC, weight[t]);
                    }
                }
                if constexpr (SETS == 1) {
#pragma unroll
                    for (int m = 0; m < TAPS; ++m) {
                        if (exists && lane + m * LANES < 3) weights[s * S::WEIGHTS + place * 4 + tap[m]] = to_float(raw[s][m]);
                    }
                }
            }
            on_batch(fetch, step + 1);
            if constexpr (SETS == 1) {
                // The lanes of a position have loaded its logits tap by tap; they normalise them line by line.
                warp_barrier();
#pragma unroll
                for (int m = 0; m < (BATCH + LANES - 1) / LANES; ++m) {
                    const int s = lane + m * LANES;
                    if (!exists || s >= BATCH) continue;
                    float* const taps = weights + s * S::WEIGHTS + place * 4;
                    float four[4];
                    load_vector<float, 4>(four, taps);
                    const float logit[3] = {four[0], four[1], four[2]};
                    float weight[3];
                    normalize(weight, logit, low, high, p.softmax);
                    four[0] = weight[0], four[1] = weight[1], four[2] = weight[2], four[3] = 0.f;
                    store_vector<float, 4>(taps, four);
                }
            }
        }
        block_barrier();
        fed = stored;
    }
}

template <int SETS, int BATCH, int PLACES, int CHANNELS, int HALO, int CLUSTER, bool DECAY, typename S>
GSPN2_DEVICE void scan_lines(const Place& at, const Reach& reach) {
    constexpr int WEIGHT = SETS == 1 ? 4 : CHANNELS;  // floats read at once
    constexpr int READS = SETS == 1 ? 1 : 3;
    constexpr int OFTEN = HALO < BATCH ? HALO : BATCH;  // within a batch
    constexpr bool EARLY = PLACES * CHANNELS <= 16;  // the next line is read before this one is done
    const int warp = warp_index(), lane = threadIdx.x % 32;
    const int lines = at.last - at.first, batches = (lines + BATCH - 1) / BATCH;
    S::clear(reach.all());
    block_barrier();

    struct Line {
        float value[PLACES][CHANNELS], keep[DECAY ? PLACES : 1][CHANNELS], weight[PLACES][READS][WEIGHT];
    };
    const auto read = [&](Line& line, const float* value, const float* keep, const float* weights) {
#pragma unroll
        for (int k = 0; k < PLACES; ++k) {
            load_vector<float, CHANNELS>(line.value[k], value + k * S::STEP * CHANNELS);
            if constexpr (DECAY) load_vector<float, CHANNELS>(line.keep[k], keep + k * S::STEP * CHANNELS);
#pragma unroll
            for (int t = 0; t < READS; ++t) {
                load_vector<float, WEIGHT>(line.weight[k][t], weights + t * S::LINE + k * S::STEP * WEIGHT);
            }
        }
    };

    float h[PLACES][CHANNELS] = {};
    int slot = 0;
    for (int batch = 0; batch < batches; ++batch) {
        const int count = lines - batch * BATCH < BATCH ? lines - batch * BATCH : BATCH;
        float* value = S::value() + slot * BATCH * S::LINE + warp * S::ROW + lane * CHANNELS;
        const float* keep = S::keep() + (batch & 1) * BATCH * S::LINE + warp * S::ROW + lane * CHANNELS;
        const float* weights = S::weights() + (batch & 1) * BATCH * S::WEIGHTS + (SETS == 1 ? lane * 4 : warp * S::ROW + lane * CHANNELS);
        Line line;
        if constexpr (EARLY) read(line, value, keep, weights);
#pragma unroll
        for (int s = 0; s < BATCH; ++s) {
            if (s >= count) break;
            if constexpr (CLUSTER > 1) {
                const int exchange = (batch * BATCH + s) / HALO;
                if (s % OFTEN == 0 && (batch * BATCH + s) % HALO == 0 && exchange > 0) {
                    if (reach.low) {
                        if (lane == 0) signal_expect(S::signal(exchange, 0, warp), HALO * CHANNELS * 4);
                        signal_wait(S::signal(exchange, 0, warp), (exchange - 1) / 2 & 1);
                    }
                    if (reach.high) {
                        if (lane == 0) signal_expect(S::signal(exchange, 1, warp), reach.high * CHANNELS * 4);
                        signal_wait(S::signal(exchange, 1, warp), (exchange - 1) / 2 & 1);
                    }
#pragma unroll
                    for (int k = 0; k < PLACES; ++k) {
                        const int position = lane * PLACES + k, beyond = position - reach.low - reach.owned;
                        if (position < reach.low) load_vector<float, CHANNELS>(h[k], S::inbox(exchange, 0, warp) + position * CHANNELS);
                        if (beyond >= 0 && beyond < reach.high) {
                            load_vector<float, CHANNELS>(h[k], S::inbox(exchange, 1, warp) + beyond * CHANNELS);
                        }
                    }
                }
            }
            float lower[CHANNELS], higher[CHANNELS];
#pragma unroll
            for (int e = 0; e < CHANNELS; ++e) lower[e] = shuffle_up(h[PLACES - 1][e]), higher[e] = shuffle_down(h[0][e]);
            [[maybe_unused]] Line next;
            if constexpr (EARLY) {
                if (s + 1 < BATCH) read(next, value + S::LINE, keep + S::LINE, weights + S::WEIGHTS);
            } else {
                read(line, value, keep, weights);
            }
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
#pragma unroll
                for (int e = 0; e < CHANNELS; ++e) {
                    const float w[3] = {SETS == 1 ? line.weight[k][0][0] : line.weight[k][0][e],
                                        SETS == 1 ? line.weight[k][0][1] : line.weight[k][READS / 2][e],
                                        SETS == 1 ? line.weight[k][0][2] : line.weight[k][READS - 1][e]};
                    const float before = h[k][e], high = k + 1 < PLACES ? h[k + 1 < PLACES ? k + 1 : 0][e] : higher[e];
                    if constexpr (DECAY) {
                        h[k][e] = line.value[k][e] + line.keep[k][e] * (w[1] * before + w[0] * lower[e] + w[2] * high);
                    } else {
                        h[k][e] = line.value[k][e] + w[1] * before + w[0] * lower[e] + w[2] * high;
                    }
                    lower[e] = before;
                }
                store_vector<float, CHANNELS>(value + k * S::STEP * CHANNELS, h[k]);
            }
            if constexpr (CLUSTER > 1) {
                const int after = batch * BATCH + s + 1, exchange = after / HALO;
                if ((s + 1) % OFTEN == 0 && after % HALO == 0 && after < lines) {
#pragma unroll
                    for (int k = 0; k < PLACES; ++k) {
                        const int position = lane * PLACES + k - reach.low, from_end = position - (reach.owned - HALO);
                        if (position < 0 || position >= reach.owned) continue;
                        if (reach.low && position < HALO) {
                            send<CHANNELS>(S::inbox(exchange, 1, warp) + position * CHANNELS, h[k], S::signal(exchange, 1, warp), at.rank - 1);
                        }
                        if (reach.high && from_end >= 0) {
                            send<CHANNELS>(S::inbox(exchange, 0, warp) + from_end * CHANNELS, h[k], S::signal(exchange, 0, warp), at.rank + 1);
                        }
                    }
                }
            }
            value += S::LINE, keep += S::LINE, weights += S::WEIGHTS;
            if constexpr (EARLY) line = next;
        }
        slot = slot == 2 ? 0 : slot + 1;
        block_barrier();
    }
    block_barrier();  // the last batch is being stored
}

template <typename T, typename L, int VEC, int SETS, int LANES, int BATCH, int PLACES, int CHANNELS, int HALO, int CLUSTER, int HAS, bool DECAY>
GSPN2_DEVICE void scan_pipeline(const Params& p) {
    static_assert(BATCH % HALO == 0 || HALO % BATCH == 0, "known when a batch is unrolled");
    using S = Stage<VEC * LANES, SETS, BATCH, PLACES, CHANNELS, HALO, CLUSTER, DECAY>;
    const Place at = find_place<CLUSTER, HALO>(p);
    if (at.first >= at.last) return;  // the whole cluster: this direction has fewer segments
    if constexpr (CLUSTER > 1) {
        if (threadIdx.x < 4 * S::WARPS) signal_init(S::signal(0, 0, 0) + threadIdx.x);
        cluster_ready();
    }
    if (!at.owned) return;
    const int rest = at.length - at.start - at.owned;
    const Reach reach{at.rank > 0 ? HALO : 0, at.owned, rest < HALO ? rest : HALO};
    if (warp_index() < S::WARPS) {
        scan_lines<SETS, BATCH, PLACES, CHANNELS, HALO, CLUSTER, DECAY, S>(at, reach);
    } else {
        feed<T, L, VEC, SETS, LANES, BATCH, HAS, DECAY, S>(p, at, reach);
    }
}
