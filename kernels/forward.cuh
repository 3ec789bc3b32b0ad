// Forward scan: y = u h, h = lam x + (three taps of the line before). One launch for all directions, images and segments.
#pragma once

#include "scan.cuh"

template <typename T, typename L, int VEC, int SETS, int LANES, int AHEAD, int TURNS, int CLUSTER, int HAS, bool DECAY>
GSPN2_DEVICE void scan_forward(const Params& p) {
    static_assert(AHEAD % 2 == 0, "the buffer of a line is known from its place in the batch");
    constexpr bool LAM = HAS & HAS_LAM, U = HAS & HAS_U, STATE = HAS & HAS_STATE;
    using Vector = Packed<T, VEC>;
    const Place at = find_place<CLUSTER>(p);
    if (at.first >= at.last) return;  // the whole cluster: this direction has fewer segments
    const int lane = threadIdx.x, lines = at.last - at.first, left = p.channels / VEC - at.slice * LANES;
    const int first_channel = at.slice * LANES * VEC, channel = first_channel + (lane < left ? lane * VEC : 0);
    const int group = (SETS > 1 ? channel : first_channel) / (p.channels / p.groups);

    Exchange<VEC, LANES> h{nullptr, at.positions};
    h.data = clear_shared<CLUSTER>(h.size());
    if (!at.owned) return;
    const Positions<TURNS> j = find_positions<TURNS>(at, lane < left);
    const int halo_bytes = (left < LANES ? left : LANES) * VEC * 4;

    const auto start = [&](auto walk_type, const View& view, long long offset) {
        return walk<typename decltype(walk_type)::Type>(view, at, p, at.first, 1, j.first, offset);
    };
    auto x = start(Tag<const T>(), p.x, channel), lam = start(Tag<const T>(), p.lam, channel), u = start(Tag<const T>(), p.u, channel);
    auto logits = start(Tag<const L>(), p.logits, group * p.logits.group);
    auto y = start(Tag<T>(), p.y, channel), state = start(Tag<T>(), p.state, channel);

    // On their way: x, lam, u (and logits, where each channel has its own weights) of the next AHEAD lines.
    Vector x_next[AHEAD][TURNS], lam_next[LAM ? AHEAD : 1][TURNS], u_next[U ? AHEAD : 1][TURNS];
    Packed<L, 3 * VEC> taps_next[SETS > 1 ? AHEAD : 1][TURNS];
    const auto fetch = [&](bool exists, int slot) {
        if (exists) {
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                x_next[slot][turn].load(x.at(j.away[turn]));
                if constexpr (LAM) lam_next[slot][turn].load(lam.at(j.away[turn]));
                if constexpr (U) u_next[slot][turn].load(u.at(j.away[turn]));
                if constexpr (SETS > 1) taps_next[slot][turn].load(logits.at(j.away[turn]));
            }
        }
        x.next();
        if constexpr (LAM) lam.next();
        if constexpr (U) u.next();
        if constexpr (SETS > 1) logits.next();
    };
#pragma unroll
    for (int s = 0; s < AHEAD; ++s) fetch(s < lines, s);
    using Shared = SharedTaps<L, LANES, AHEAD, TURNS>;
    Shared shared_next = {};
    if constexpr (SETS == 1) shared_next.load(logits, j, lane, lines);

    float before[TURNS][VEC] = {};  // this thread's own state of the line before
    // FULL: this batch and the next have all their lines.
    const auto scan_batch = [&](auto full, int batch) {
        constexpr bool FULL = decltype(full)::value;
        [[maybe_unused]] float shared_weight[TURNS][Shared::OWN][3];
        if constexpr (SETS == 1) {
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
#pragma unroll
                for (int m = 0; m < Shared::OWN; ++m) {
                    float logit[3];
#pragma unroll
                    for (int t = 0; t < 3; ++t) logit[t] = to_float(shared_next.taps[turn][m][t]);
                    normalize(shared_weight[turn][m], logit, j.has_lower(turn), j.has_higher(turn), p.softmax);
                }
            }
            logits.line += static_cast<long long>(AHEAD) * logits.next_line;
            shared_next.load(logits, j, lane, FULL ? AHEAD : lines - batch - AHEAD);
        }
#pragma unroll
        for (int s = 0; s < AHEAD; ++s) {
            const int n = batch + s, buffer = s & 1;
            if (!FULL && n >= lines) break;
            [[maybe_unused]] float value[TURNS][VEC], gate[TURNS][VEC], keep[TURNS][VEC], weight[TURNS][SETS][3];
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                x_next[s][turn].unpack(value[turn]);
                if constexpr (LAM) {
                    float input[VEC];
                    lam_next[s][turn].unpack(input);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) value[turn][e] *= input[e], keep[turn][e] = 1.f - input[e];
                }
                if constexpr (U) u_next[s][turn].unpack(gate[turn]);
                if constexpr (SETS == 1) {
#pragma unroll
                    for (int t = 0; t < 3; ++t) weight[turn][0][t] = from_owner<LANES>(shared_weight[turn][s / LANES][t], s);
                } else {
                    float flat[3 * VEC];
                    taps_next[s][turn].unpack(flat);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) {
                        const float logit[3] = {flat[3 * e], flat[3 * e + 1], flat[3 * e + 2]};
                        normalize(weight[turn][e], logit, j.has_lower(turn), j.has_higher(turn), p.softmax);
                    }
                }
            }
            fetch(FULL || n + AHEAD < lines, s);
            block_barrier();  // the line before is complete
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                if constexpr (CLUSTER > 1) {
                    if (n > 0 && j.low_edge(turn)) receive(buffer ^ 1, 0, (n - 1) / 2, lane, halo_bytes);
                    if (n > 0 && j.high_edge(turn)) receive(buffer ^ 1, 1, (n - 1) / 2, lane, halo_bytes);
                }
                float low[VEC], high[VEC], h_now[VEC];
                load_vector<float, VEC>(low, h.at(buffer ^ 1, j[turn] - 1, lane));
                load_vector<float, VEC>(high, h.at(buffer ^ 1, j[turn] + 1, lane));
#pragma unroll
                for (int e = 0; e < VEC; ++e) {
                    const float (&w)[3] = weight[turn][SETS > 1 ? e : 0];
                    if constexpr (DECAY) {
                        h_now[e] = value[turn][e] + keep[turn][e] * (w[1] * before[turn][e] + w[0] * low[e] + w[2] * high[e]);
                    } else {
                        h_now[e] = value[turn][e] + w[1] * before[turn][e] + w[0] * low[e] + w[2] * high[e];
                    }
                    before[turn][e] = h_now[e];
                }
                if (!j.own(turn)) continue;
                store_vector<float, VEC>(h.at(buffer, j[turn], lane), h_now);
                if constexpr (CLUSTER > 1) {
                    if (FULL || n + 1 < lines) {
                        if (j.low_edge(turn)) send<VEC>(h.at(buffer, h.positions, lane), h_now, signal_of(buffer, 1), at.rank - 1);
                        if (j.high_edge(turn)) send<VEC>(h.at(buffer, -1, lane), h_now, signal_of(buffer, 0), at.rank + 1);
                    }
                }
                if constexpr (STATE) store_vector<T, VEC>(state.at(j.away[turn]), h_now);
                if constexpr (U) {
#pragma unroll
                    for (int e = 0; e < VEC; ++e) h_now[e] *= gate[turn][e];
                }
                store_vector<T, VEC>(y.at(j.away[turn]), h_now);
            }
            if constexpr (STATE) state.next();
            y.next();
        }
    };
    int batch = 0;
    for (; batch + 2 * AHEAD <= lines; batch += AHEAD) scan_batch(Constant<true>(), batch);
    for (; batch < lines; batch += AHEAD) scan_batch(Constant<false>(), batch);
}
