// Backward scan: from the last line to the first, g = u dy + (three transposed taps of the line after), and from g the
// gradients of x, lam, u and the logits. One launch for all directions, images and segments; every sum has a fixed order.
#pragma once

#include "scan.cuh"

template <typename T, typename L, int VEC, int SETS, int LANES, int AHEAD, int TURNS, int CLUSTER, int HAS, bool DECAY>
GSPN2_DEVICE void scan_backward(const Params& p) {
    static_assert(AHEAD % 2 == 0, "the buffer of a line is known from its place in the batch");
    constexpr bool LAM = HAS & HAS_LAM, U = HAS & HAS_U, PARTIAL = HAS & HAS_PARTIAL;
    using Vector = Packed<T, VEC>;
    const Place at = find_place<CLUSTER>(p);
    if (at.first >= at.last) return;
    const int lane = threadIdx.x, lines = at.last - at.first, left = p.channels / VEC - at.slice * LANES;
    const int first_channel = at.slice * LANES * VEC, channel = first_channel + (lane < left ? lane * VEC : 0);
    const int group = (SETS > 1 ? channel : first_channel) / (p.channels / p.groups);

    // Exchanged: the terms of g for the lower and for the higher position of the line before, and that line's state.
    Exchange<VEC, LANES> lower{nullptr, at.positions}, higher{nullptr, at.positions}, h{nullptr, at.positions};
    lower.data = clear_shared<CLUSTER>(3 * lower.size());
    higher.data = lower.data + lower.size();
    h.data = higher.data + lower.size();
    if (!at.owned) return;
    const Positions<TURNS> j = find_positions<TURNS>(at, lane < left);
    const int halo_bytes = (left < LANES ? left : LANES) * VEC * 4;

    const auto start = [&](auto walk_type, const View& view, long long offset) {
        return walk<typename decltype(walk_type)::Type>(view, at, p, at.last - 1, -1, j.first, offset);
    };
    auto x = start(Tag<const T>(), p.x, channel), lam = start(Tag<const T>(), p.lam, channel), u = start(Tag<const T>(), p.u, channel);
    auto dy = start(Tag<const T>(), p.y, channel), state = start(Tag<const T>(), p.state, channel);
    auto logits = start(Tag<const L>(), p.logits, group * p.logits.group);
    auto grad_x = start(Tag<T>(), p.grad_x, channel);
    // The gradients of lam and u lie as that of x does.
    const long long to_lam = static_cast<T*>(p.grad_lam.data) - static_cast<T*>(p.grad_x.data);
    const long long to_u = static_cast<T*>(p.grad_u.data) - static_cast<T*>(p.grad_x.data);
    auto grad_logits = start(Tag<L>(), p.grad_logits, group * p.grad_logits.group);
    auto partial = start(Tag<float>(), p.partial, group * p.partial.group + at.slice % p.parts * p.part_stride);

    // On their way: dy, u, lam, x of the next AHEAD lines, the state of the line before each (and, at the edges of a share,
    // of the neighbour's nearest position).
    Vector dy_next[AHEAD][TURNS], h_next[AHEAD][TURNS], edge_next[CLUSTER > 1 ? AHEAD : 1][TURNS];
    Vector u_next[U ? AHEAD : 1][TURNS], lam_next[LAM ? AHEAD : 1][TURNS], x_next[LAM ? AHEAD : 1][TURNS];
    Packed<L, 3 * VEC> taps_next[SETS > 1 ? AHEAD : 1][TURNS];
    float current[TURNS][VEC], carried[TURNS][VEC] = {};  // h of this line; the middle tap's term of the line after
    if constexpr (U) {
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) load_vector<T, VEC>(current[turn], state.at(j.away[turn]));
    }
    const auto fetch = [&](bool exists, bool has_before, int slot) {
        state.next();
        if (exists) {
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                dy_next[slot][turn].load(dy.at(j.away[turn]));
                if constexpr (U) u_next[slot][turn].load(u.at(j.away[turn]));
                if constexpr (LAM) lam_next[slot][turn].load(lam.at(j.away[turn]));
                if constexpr (LAM) x_next[slot][turn].load(x.at(j.away[turn]));
                if constexpr (SETS > 1) taps_next[slot][turn].load(logits.at(j.away[turn]));
                if (!has_before) continue;
                h_next[slot][turn].load(state.at(j.away[turn]));
                if constexpr (CLUSTER > 1) {
                    if (j.low_edge(turn)) edge_next[slot][turn].load(state.at(j.away[turn] - 1));
                    if (j.high_edge(turn)) edge_next[slot][turn].load(state.at(j.away[turn] + 1));
                }
            }
        }
        dy.next();
        if constexpr (U) u.next();
        if constexpr (LAM) lam.next(), x.next();
        if constexpr (SETS > 1) logits.next();
    };
#pragma unroll
    for (int s = 0; s < AHEAD; ++s) fetch(s < lines, s + 1 < lines, s);
    using Shared = SharedTaps<L, LANES, AHEAD, TURNS>;
    Shared shared_next = {};
    if constexpr (SETS == 1) shared_next.load(logits, j, lane, lines);

    // FULL: this batch and the next have all their lines, and one more.
    const auto scan_batch = [&](auto full, int batch) {
        constexpr bool FULL = decltype(full)::value;
        [[maybe_unused]] float shared_logit[TURNS][Shared::OWN][3], shared_weight[TURNS][Shared::OWN][3];
        [[maybe_unused]] float shared_sum[TURNS][Shared::OWN][3];  // d loss / d weights of the lines whose weights this lane has
        if constexpr (SETS == 1) {
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
#pragma unroll
                for (int m = 0; m < Shared::OWN; ++m) {
#pragma unroll
                    for (int t = 0; t < 3; ++t) shared_logit[turn][m][t] = to_float(shared_next.taps[turn][m][t]);
                    normalize(shared_weight[turn][m], shared_logit[turn][m], j.has_lower(turn), j.has_higher(turn), p.softmax);
                }
            }
            logits.line += static_cast<long long>(AHEAD) * logits.next_line;
            shared_next.load(logits, j, lane, FULL ? AHEAD : lines - batch - AHEAD);
        }
#pragma unroll
        for (int s = 0; s < AHEAD; ++s) {
            const int n = batch + s, buffer = s & 1;
            if (!FULL && n >= lines) break;
            const bool has_before = FULL || n + 1 < lines;
            float h_before[TURNS][VEC];
            [[maybe_unused]] float logit[TURNS][SETS][3], weight[TURNS][SETS][3];
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                h_next[s][turn].unpack(h_before[turn]);
                if (!has_before) {
#pragma unroll
                    for (int e = 0; e < VEC; ++e) h_before[turn][e] = 0.f;
                }
                if (j.own(turn)) store_vector<float, VEC>(h.at(buffer, j[turn], lane), h_before[turn]);
                if constexpr (CLUSTER > 1) {
                    if (j.low_edge(turn) || j.high_edge(turn)) {
                        float edge[VEC] = {};
                        if (has_before) edge_next[s][turn].unpack(edge);
                        store_vector<float, VEC>(h.at(buffer, j.low_edge(turn) ? -1 : at.owned, lane), edge);
                    }
                }
                if constexpr (SETS == 1) {
#pragma unroll
                    for (int t = 0; t < 3; ++t) weight[turn][0][t] = from_owner<LANES>(shared_weight[turn][s / LANES][t], s);
                } else {
                    float flat[3 * VEC];
                    taps_next[s][turn].unpack(flat);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) {
#pragma unroll
                        for (int t = 0; t < 3; ++t) logit[turn][e][t] = flat[3 * e + t];
                        normalize(weight[turn][e], logit[turn][e], j.has_lower(turn), j.has_higher(turn), p.softmax);
                    }
                }
            }
            block_barrier();  // the terms from the line after and the state of the line before are complete
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
                if constexpr (CLUSTER > 1) {
                    if (n > 0 && j.low_edge(turn)) receive(buffer ^ 1, 0, (n - 1) / 2, lane, halo_bytes);
                    if (n > 0 && j.high_edge(turn)) receive(buffer ^ 1, 1, (n - 1) / 2, lane, halo_bytes);
                }
                [[maybe_unused]] float gradient[VEC], whole[VEC], gate[VEC], value[VEC];
                dy_next[s][turn].unpack(gradient);
                if constexpr (U) u_next[s][turn].unpack(whole);
                if constexpr (LAM) lam_next[s][turn].unpack(gate), x_next[s][turn].unpack(value);
#pragma unroll
                for (int e = 0; e < VEC; ++e) whole[e] = U ? whole[e] * gradient[e] : gradient[e];
                float from_low[VEC], from_high[VEC], h_low[VEC], h_high[VEC], to_low[VEC], to_high[VEC], result[VEC];
                float sum[SETS][3] = {};  // over this thread's channels
                load_vector<float, VEC>(from_low, higher.at(buffer ^ 1, j[turn] - 1, lane));
                load_vector<float, VEC>(from_high, lower.at(buffer ^ 1, j[turn] + 1, lane));
                load_vector<float, VEC>(h_low, h.at(buffer, j[turn] - 1, lane));
                load_vector<float, VEC>(h_high, h.at(buffer, j[turn] + 1, lane));
#pragma unroll
                for (int e = 0; e < VEC; ++e) {
                    const float (&w)[3] = weight[turn][SETS > 1 ? e : 0];
                    whole[e] += carried[turn][e] + from_low[e] + from_high[e];
                    const float passed = DECAY ? (1.f - gate[e]) * whole[e] : whole[e];
                    to_low[e] = w[0] * passed;
                    carried[turn][e] = w[1] * passed;
                    to_high[e] = w[2] * passed;
                    float (&total)[3] = sum[SETS > 1 ? e : 0];
                    total[0] += passed * h_low[e];
                    total[1] += passed * h_before[turn][e];
                    total[2] += passed * h_high[e];
                }
                if (j.own(turn)) {
                    store_vector<float, VEC>(lower.at(buffer, j[turn], lane), to_low);
                    store_vector<float, VEC>(higher.at(buffer, j[turn], lane), to_high);
                    if constexpr (CLUSTER > 1) {
                        if (FULL || n + 1 < lines) {
                            if (j.low_edge(turn)) send<VEC>(lower.at(buffer, h.positions, lane), to_low, signal_of(buffer, 1), at.rank - 1);
                            if (j.high_edge(turn)) send<VEC>(higher.at(buffer, -1, lane), to_high, signal_of(buffer, 0), at.rank + 1);
                        }
                    }
                }
                if constexpr (U) {
#pragma unroll
                    for (int e = 0; e < VEC; ++e) result[e] = current[turn][e] * gradient[e], current[turn][e] = h_before[turn][e];
                    if (j.own(turn)) store_vector<T, VEC>(grad_x.at(j.away[turn]) + to_u, result);
                }
                if constexpr (LAM) {
#pragma unroll
                    for (int e = 0; e < VEC; ++e) result[e] = gate[e] * whole[e];
                    if (j.own(turn)) store_vector<T, VEC>(grad_x.at(j.away[turn]), result);
#pragma unroll
                    for (int e = 0; e < VEC; ++e) {
                        const float (&w)[3] = weight[turn][SETS > 1 ? e : 0];
                        const float mixed = w[0] * h_low[e] + w[1] * h_before[turn][e] + w[2] * h_high[e];
                        result[e] = (DECAY ? value[e] - mixed : value[e]) * whole[e];
                    }
                    if (j.own(turn)) store_vector<T, VEC>(grad_x.at(j.away[turn]) + to_lam, result);
                } else {
                    if (j.own(turn)) store_vector<T, VEC>(grad_x.at(j.away[turn]), whole);
                }
                if constexpr (SETS == 1) {  // over the lanes of the position, in an order that does not change
#pragma unroll
                    for (int t = 0; t < 3; ++t) {
                        float total = lane < left ? sum[0][t] : 0.f;
#pragma unroll
                        for (int mask = 1; mask < LANES; mask *= 2) total += shuffle_xor(total, mask);
                        if (LANES == 1 || s % LANES == lane) shared_sum[turn][s / LANES][t] = total;
                    }
                } else if (j.own(turn)) {
                    float flat[3 * VEC];
#pragma unroll
                    for (int e = 0; e < VEC; ++e) {
                        float each[3];
                        through_normalizer(each, weight[turn][e], logit[turn][e], sum[e], p.softmax);
#pragma unroll
                        for (int t = 0; t < 3; ++t) flat[3 * e + t] = each[t];
                    }
                    store_vector<L, 3 * VEC>(grad_logits.at(j.away[turn]), flat);
                }
            }
            grad_x.next();
            fetch(FULL || n + AHEAD < lines, FULL || n + AHEAD + 1 < lines, s);
            if constexpr (SETS > 1) grad_logits.next();
        }
        if constexpr (SETS == 1) {
#pragma unroll
            for (int turn = 0; turn < TURNS; ++turn) {
#pragma unroll
                for (int m = 0; m < Shared::OWN; ++m) {
                    const int s = lane + m * LANES;
                    if (s >= AHEAD || (!FULL && batch + s >= lines) || threadIdx.y + turn * blockDim.y >= at.owned) continue;
                    if constexpr (PARTIAL) {
                        float* to = partial.at(j.away[turn]) + static_cast<long long>(s) * partial.next_line;
#pragma unroll
                        for (int t = 0; t < 3; ++t) to[t] = shared_sum[turn][m][t];
                    } else {
                        float result[3];
                        through_normalizer(result, shared_weight[turn][m], shared_logit[turn][m], shared_sum[turn][m], p.softmax);
                        L* to = grad_logits.at(j.away[turn]) + static_cast<long long>(s) * grad_logits.next_line;
#pragma unroll
                        for (int t = 0; t < 3; ++t) to[t] = from_float<L>(result[t]);
                    }
                }
            }
            partial.line += static_cast<long long>(AHEAD) * partial.next_line;
            grad_logits.line += static_cast<long long>(AHEAD) * grad_logits.next_line;
        }
    };
    int batch = 0;
    for (; batch + 2 * AHEAD < lines; batch += AHEAD) scan_batch(Constant<true>(), batch);
    for (; batch < lines; batch += AHEAD) scan_batch(Constant<false>(), batch);
}

// Where a group's channels are spread over several blocks: adds their partial sums, in order, and goes through the normaliser.
// One thread for each pixel, direction and group.
template <typename L>
GSPN2_DEVICE void sum_partials(const Params& p) {
    const long long pixels = static_cast<long long>(p.batches) * p.height * p.width;
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= pixels * p.count * p.groups) return;
    const int group = index % p.groups, k = index / p.groups % p.count;
    const long long pixel = index / p.groups / p.count;
    const int column = pixel % p.width, row = pixel / p.width % p.height;
    const long long batch = pixel / p.width / p.height;
    const auto offset = [&](const View& view) {
        return batch * view.batch + row * view.row + column * view.column + k * view.direction + group * view.group;
    };
    const bool horizontal = (p.directions >> (2 * k) & 3) < 2;
    const int j = horizontal ? row : column, length = horizontal ? p.height : p.width;
    float logit[3], weight[3], total[3] = {0.f, 0.f, 0.f}, result[3];
    const L* taps = static_cast<const L*>(p.logits.data) + offset(p.logits);
#pragma unroll
    for (int t = 0; t < 3; ++t) logit[t] = to_float(taps[t]);
    normalize(weight, logit, j > 0, j < length - 1, p.softmax);
    const float* from = static_cast<const float*>(p.partial.data) + offset(p.partial);
    for (int part = 0; part < p.parts; ++part) {
#pragma unroll
        for (int t = 0; t < 3; ++t) total[t] += from[part * p.part_stride + t];
    }
    through_normalizer(result, weight, logit, total, p.softmax);
    L* to = static_cast<L*>(p.grad_logits.data) + offset(p.grad_logits);
#pragma unroll
    for (int t = 0; t < 3; ++t) to[t] = from_float<L>(result[t]);
}
