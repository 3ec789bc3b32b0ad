// Backward scan: from the last line to the first, g = u dy + (three transposed taps of the line after), and from g the
// gradients of x, lam, u and the logits. One launch for all directions, images and segments; every sum has a fixed order.
#pragma once

#include "scan.cuh"

template <typename T, typename L, int VEC, int SETS, int STAGES, int CLUSTER>
GSPN2_DEVICE void scan_backward(const Params& p) {
    static_assert(STAGES == 0 || VEC * sizeof(T) >= 4, "asynchronous copies move at least 4 bytes");
    constexpr int RING = STAGES ? STAGES : 1, LOGITS = staged_logit_bytes(sizeof(L), VEC, SETS);
    constexpr int STATES = STAGES + 2;  // staged lines of h: two in use, STAGES on their way
    const Place at = find_place<CLUSTER>(p);
    if (at.first >= at.last) return;

    const int lane = threadIdx.x, channel = (at.slice * p.lanes + lane) * VEC;
    const bool mine = lane < p.lanes && channel < p.channels;
    const int lines = at.horizontal ? p.width : p.height, group_channels = p.channels / p.groups;
    const int group = channel / group_channels;
    // Lanes of this block that share the group, and the one among them that writes the group's gradient.
    const int sharing = SETS > 1 || group_channels < VEC                ? 1
                        : group_channels / VEC < p.lanes ? group_channels / VEC
                                                                        : p.lanes;
    const bool leads = mine && lane % sharing == 0;
    const Lines<const T> x = lines_of<const T>(p.x, at, lines, channel);
    const Lines<const T> lam = lines_of<const T>(p.lam, at, lines, channel);
    const Lines<const T> u = lines_of<const T>(p.u, at, lines, channel);
    const Lines<const T> dy = lines_of<const T>(p.y, at, lines, channel);
    const Lines<const T> state = lines_of<const T>(p.state, at, lines, channel);
    const Lines<const L> logits = lines_of<const L>(p.logits, at, lines, group * p.logits.group);
    const Lines<T> grad_x = lines_of<T>(p.grad_x, at, lines, channel);
    const Lines<T> grad_lam = lines_of<T>(p.grad_lam, at, lines, channel);
    const Lines<T> grad_u = lines_of<T>(p.grad_u, at, lines, channel);
    const Lines<L> grad_logits = lines_of<L>(p.grad_logits, at, lines, group * p.grad_logits.group);
    const Lines<float> partial =
        lines_of<float>(p.partial, at, lines, group * p.partial.group + at.slice % p.parts * p.part_stride);

    // Shared memory: the exchanged lines of g and of the weights; the staged lines of h, which neighbours read too; then for
    // each stage dy, u, lam, x and the logits.
    const Exchange<VEC> g{reinterpret_cast<float*>(shared_memory()), p.lanes, at.positions};
    const Exchange<3 * SETS> weights{g.data + g.size(), p.lanes, at.positions};
    const int exchanged = g.size() + weights.size(), vectors = at.positions * p.lanes;
    const int tensor_bytes = round16(vectors * VEC * sizeof(T));
    const int state_bytes = round16((at.positions + 2) * p.lanes * VEC * sizeof(T));
    const int stage_bytes = (1 + bool(u) + 2 * bool(lam)) * tensor_bytes + round16(vectors * LOGITS);
    unsigned char* const states = shared_memory() + round16(exchanged * 4);
    unsigned char* const stages = states + (STAGES ? STATES * state_bytes : 0);
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    for (int e = thread; e < exchanged; e += threads) g.data[e] = 0.f;

    const auto state_slot = [&](int i, int j) {
        return reinterpret_cast<T*>(states + (i - at.first) % STATES * state_bytes) + ((j + 1) * p.lanes + lane) * VEC;
    };
    const auto stage_state = [&](int i) {
        if constexpr (STAGES > 0) {
            if (i >= at.first && mine) {
                for (int j = threadIdx.y; j < at.owned; j += blockDim.y) {
                    copy_async<VEC * sizeof(T)>(state_slot(i, j), state.at(i, j));
                    if (j == 0 && at.start > 0) copy_async<VEC * sizeof(T)>(state_slot(i, -1), state.at(i, -1));
                    if (j == at.owned - 1 && at.start + at.owned < at.length) {
                        copy_async<VEC * sizeof(T)>(state_slot(i, j + 1), state.at(i, j + 1));
                    }
                }
            }
        }
    };
    // The gates and logits of line i and the state of the line before it.
    const auto stage = [&](int i, int slot) {
        if constexpr (STAGES > 0) {
            if (i >= at.first && mine) {
                for (int j = threadIdx.y; j < at.owned; j += blockDim.y) {
                    const int vector = j * p.lanes + lane;
                    unsigned char* to = stages + slot * stage_bytes + vector * VEC * sizeof(T);
                    copy_async<VEC * sizeof(T)>(to, dy.at(i, j));
                    if (u) copy_async<VEC * sizeof(T)>(to += tensor_bytes, u.at(i, j));
                    if (lam) copy_async<VEC * sizeof(T)>(to += tensor_bytes, lam.at(i, j));
                    if (lam) copy_async<VEC * sizeof(T)>(to += tensor_bytes, x.at(i, j));
                    stage_logits<L, VEC, SETS>(
                        stages + (slot + 1) * stage_bytes - round16(vectors * LOGITS) + vector * LOGITS, logits.at(i, j));
                }
            }
            stage_state(i - 1);
            copy_commit();
        }
    };

    struct Vector {
        float gradient[VEC], gated[VEC], weight[SETS][3], logit[SETS][3];
    };
    const auto prepare = [&](Vector& v, int i, int j, int slot) {
        const int vector = j * p.lanes + lane;
        const T* staged = reinterpret_cast<const T*>(stages + slot * stage_bytes + vector * VEC * sizeof(T));
        load_vector<T, VEC>(v.gradient, STAGES ? staged : dy.at(i, j));
#pragma unroll
        for (int e = 0; e < VEC; ++e) v.gated[e] = v.gradient[e];
        if (u) {
            float gate[VEC];
            load_vector<T, VEC>(gate, STAGES ? staged + tensor_bytes / sizeof(T) : u.at(i, j));
#pragma unroll
            for (int e = 0; e < VEC; ++e) v.gated[e] *= gate[e];
        }
        const L* taps = logits.at(i, j);
        if constexpr (STAGES > 0) {
            taps = staged_logits<L, SETS>(
                stages + (slot + 1) * stage_bytes - round16(vectors * LOGITS) + vector * LOGITS, taps);
        }
        load_logits<L, SETS>(v.logit, taps);
#pragma unroll
        for (int s = 0; s < SETS; ++s) {
            normalize(v.weight[s], v.logit[s], at.start + j > 0, at.start + j < at.length - 1, p.softmax);
        }
    };
    const auto finish = [&](Vector& v, int i, int j, int slot, int buffer, bool work) {
        float product[SETS][3] = {};  // sums over this thread's channels of g times the state of the line before
        if (work) {
            float after[VEC], taps[3 * SETS];
#pragma unroll
            for (int t = 0; t < 3; ++t) {  // position j - (t - 1) of the line after reached here through its tap t
                g.read(after, buffer ^ 1, j + 1 - t, lane);
                weights.read(taps, buffer ^ 1, j + 1 - t, lane);
#pragma unroll
                for (int e = 0; e < VEC; ++e) v.gated[e] += taps[SETS > 1 ? 3 * e + t : t] * after[e];
            }
            float whole[VEC], carried[VEC] = {};  // g; with decay, the sum over the taps of this line
#pragma unroll
            for (int e = 0; e < VEC; ++e) whole[e] = v.gated[e];
            const int vector = j * p.lanes + lane, next = tensor_bytes / sizeof(T);
            const T* staged = reinterpret_cast<const T*>(stages + slot * stage_bytes + vector * VEC * sizeof(T)) + bool(u) * next;
            if constexpr (GSPN2_DECAY) {
                load_vector<T, VEC>(after, STAGES ? staged + next : lam.at(i, j));
#pragma unroll
                for (int e = 0; e < VEC; ++e) v.gated[e] *= 1.f - after[e];
            }
            g.template publish<CLUSTER>(buffer, j, lane, v.gated, at.rank);
#pragma unroll
            for (int s = 0; s < SETS; ++s)
#pragma unroll
                for (int t = 0; t < 3; ++t) taps[3 * s + t] = v.weight[s][t];
            weights.template publish<CLUSTER>(buffer, j, lane, taps, at.rank);

            float other[VEC], result[VEC];
            if (u) {
                load_vector<T, VEC>(other, STAGES ? state_slot(i, j) : state.at(i, j));
#pragma unroll
                for (int e = 0; e < VEC; ++e) result[e] = other[e] * v.gradient[e];
                store_vector<T, VEC>(grad_u.at(i, j), result);
            }
            if (lam) {
                load_vector<T, VEC>(other, STAGES ? staged + next : lam.at(i, j));
#pragma unroll
                for (int e = 0; e < VEC; ++e) result[e] = other[e] * whole[e];
                store_vector<T, VEC>(grad_x.at(i, j), result);
                if constexpr (!GSPN2_DECAY) {
                    load_vector<T, VEC>(other, STAGES ? staged + 2 * next : x.at(i, j));
#pragma unroll
                    for (int e = 0; e < VEC; ++e) result[e] = other[e] * whole[e];
                    store_vector<T, VEC>(grad_lam.at(i, j), result);
                }
            } else {
                store_vector<T, VEC>(grad_x.at(i, j), whole);
            }
            if (i > at.first) {
#pragma unroll
                for (int t = 0; t < 3; ++t) {
                    const int neighbour = at.start + j + t - 1;
                    if (neighbour < 0 || neighbour >= at.length) continue;
                    load_vector<T, VEC>(other, STAGES ? state_slot(i - 1, j + t - 1) : state.at(i - 1, j + t - 1));
#pragma unroll
                    for (int e = 0; e < VEC; ++e) {
                        product[SETS > 1 ? e : 0][t] += v.gated[e] * other[e];
                        if constexpr (GSPN2_DECAY) carried[e] += v.weight[SETS > 1 ? e : 0][t] * other[e];
                    }
                }
            }
            if constexpr (GSPN2_DECAY) {
                load_vector<T, VEC>(other, STAGES ? staged + 2 * next : x.at(i, j));
#pragma unroll
                for (int e = 0; e < VEC; ++e) result[e] = (other[e] - carried[e]) * whole[e];
                store_vector<T, VEC>(grad_lam.at(i, j), result);
            }
        }
        if constexpr (SETS == 1) {  // over the lanes of the group, in their order
#pragma unroll
            for (int t = 0; t < 3; ++t) {
                float total = product[0][t];
                for (int s = 1; s < sharing; ++s) total += shuffle_down(product[0][t], s);
                product[0][t] = total;
            }
        }
        if (!work || !leads) return;
        if (partial) {
#pragma unroll
            for (int t = 0; t < 3; ++t) partial.at(i, j)[t] = product[0][t];
            return;
        }
        float result[3 * SETS];
#pragma unroll
        for (int s = 0; s < SETS; ++s) {
            float mean = 0.f;
#pragma unroll
            for (int t = 0; t < 3; ++t) mean += v.weight[s][t] * product[s][t];
#pragma unroll
            for (int t = 0; t < 3; ++t) {
                result[3 * s + t] = slope(v.weight[s][t], v.logit[s][t], p.softmax) * (product[s][t] - mean);
            }
        }
        if constexpr (SETS == 1) {
#pragma unroll
            for (int t = 0; t < 3; ++t) grad_logits.at(i, j)[t] = from_float<L>(result[t]);
        } else {
            store_vector<L, 3 * SETS>(grad_logits.at(i, j), result);
        }
    };

    if (u) stage_state(at.last - 1);
    for (int ahead = 0; ahead < STAGES; ++ahead) stage(at.last - 1 - ahead, ahead);
    // Neighbours read the staged h, so a thread's copies for a line land before it arrives at that line's barrier.
    if constexpr (STAGES > 0) copy_wait<RING - 1>();
    line_arrive<CLUSTER>();
    int slot = 0;
    for (int i = at.last - 1; i >= at.first; --i) {
        const int buffer = i & 1;
        Vector v;
        int j = threadIdx.y;
        bool work = mine && j < at.owned;
        if (work) prepare(v, i, j, slot);
        line_wait<CLUSTER>();
        finish(v, i, j, slot, buffer, work);
        // All threads of a warp take every turn: they meet in the shuffles.
        for (int turn = blockDim.y; turn < at.owned; turn += blockDim.y) {
            j = turn + threadIdx.y;
            work = mine && j < at.owned;
            if (work) prepare(v, i, j, slot);
            finish(v, i, j, slot, buffer, work);
        }
        stage(i - STAGES, slot);
        if constexpr (STAGES > 0) copy_wait<RING - 1>();
        line_arrive<CLUSTER>();
        slot = slot + 1 == RING ? 0 : slot + 1;
    }
    if constexpr (CLUSTER > 1) line_wait<CLUSTER>();
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
    float logit[1][3], weight[3], total[3] = {0.f, 0.f, 0.f}, mean = 0.f;
    load_logits<L, 1>(logit, static_cast<const L*>(p.logits.data) + offset(p.logits));
    normalize(weight, logit[0], j > 0, j < length - 1, p.softmax);
    const float* from = static_cast<const float*>(p.partial.data) + offset(p.partial);
    for (int part = 0; part < p.parts; ++part) {
#pragma unroll
        for (int t = 0; t < 3; ++t) total[t] += from[part * p.part_stride + t];
    }
    L* to = static_cast<L*>(p.grad_logits.data) + offset(p.grad_logits);
#pragma unroll
    for (int t = 0; t < 3; ++t) mean += weight[t] * total[t];
#pragma unroll
    for (int t = 0; t < 3; ++t) to[t] = from_float<L>(slope(weight[t], logit[0][t], p.softmax) * (total[t] - mean));
}
