// Forward scan: y = u h, h = lam x + (three taps of the line before). One launch for all directions, images and segments.
#pragma once

#include "scan.cuh"

template <typename T, typename L, int VEC, int SETS, int STAGES, int CLUSTER>
GSPN2_DEVICE void scan_forward(const Params& p) {
    static_assert(STAGES == 0 || VEC * sizeof(T) >= 4, "asynchronous copies move at least 4 bytes");
    constexpr int RING = STAGES ? STAGES : 1, LOGITS = staged_logit_bytes(sizeof(L), VEC, SETS);
    const Place at = find_place<CLUSTER>(p);
    if (at.first >= at.last) return;  // the whole cluster: this direction has fewer segments

    const int lane = threadIdx.x, channel = (at.slice * p.lanes + lane) * VEC;
    const bool mine = lane < p.lanes && channel < p.channels;
    const int lines = at.horizontal ? p.width : p.height, group = channel / (p.channels / p.groups);
    const Lines<const T> x = lines_of<const T>(p.x, at, lines, channel);
    const Lines<const T> lam = lines_of<const T>(p.lam, at, lines, channel);
    const Lines<const T> u = lines_of<const T>(p.u, at, lines, channel);
    const Lines<const L> logits = lines_of<const L>(p.logits, at, lines, group * p.logits.group);
    const Lines<T> state = lines_of<T>(p.state, at, lines, channel);
    const Lines<T> y = lines_of<T>(p.y, at, lines, channel);

    // Shared memory: the exchanged lines, then for each stage x, lam, u and the logits of every vector that the block owns.
    const Exchange<VEC> h{reinterpret_cast<float*>(shared_memory()), p.lanes, at.positions};
    const int vectors = at.positions * p.lanes, tensor_bytes = round16(vectors * VEC * sizeof(T));
    const int stage_bytes = (1 + bool(lam) + bool(u)) * tensor_bytes + round16(vectors * LOGITS);
    unsigned char* const stages = reinterpret_cast<unsigned char*>(h.data + h.size());
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    for (int e = thread; e < h.size(); e += threads) h.data[e] = 0.f;

    const auto stage = [&](int i, int slot) {
        if constexpr (STAGES > 0) {
            if (i < at.last && mine) {
                for (int j = threadIdx.y; j < at.owned; j += blockDim.y) {
                    const int vector = j * p.lanes + lane;
                    unsigned char* to = stages + slot * stage_bytes + vector * VEC * sizeof(T);
                    copy_async<VEC * sizeof(T)>(to, x.at(i, j));
                    if (lam) copy_async<VEC * sizeof(T)>(to += tensor_bytes, lam.at(i, j));
                    if (u) copy_async<VEC * sizeof(T)>(to += tensor_bytes, u.at(i, j));
                    stage_logits<L, VEC, SETS>(
                        stages + (slot + 1) * stage_bytes - round16(vectors * LOGITS) + vector * LOGITS, logits.at(i, j));
                }
            }
            copy_commit();  // an empty group where there is nothing to copy, so that the count of groups stays the line's
        }
    };

    struct Vector {
        float input[VEC], gate[VEC], weight[SETS][3];
        float keep[GSPN2_DECAY ? VEC : 1];  // 1 - lam
    };
    // What a vector needs besides its neighbours.
    const auto prepare = [&](Vector& v, int i, int j, int slot) {
        const int vector = j * p.lanes + lane;
        const T* staged = reinterpret_cast<const T*>(stages + slot * stage_bytes + vector * VEC * sizeof(T));
        const int next = tensor_bytes / sizeof(T);
        load_vector<T, VEC>(v.input, STAGES ? staged : x.at(i, j));
        if (lam) {
            load_vector<T, VEC>(v.gate, STAGES ? staged += next : lam.at(i, j));
#pragma unroll
            for (int e = 0; e < VEC; ++e) v.input[e] *= v.gate[e];
            if constexpr (GSPN2_DECAY) {
#pragma unroll
                for (int e = 0; e < VEC; ++e) v.keep[e] = 1.f - v.gate[e];
            }
        }
        if (u) load_vector<T, VEC>(v.gate, STAGES ? staged + next : u.at(i, j));
        const L* taps = logits.at(i, j);
        if constexpr (STAGES > 0) {
            taps = staged_logits<L, SETS>(
                stages + (slot + 1) * stage_bytes - round16(vectors * LOGITS) + vector * LOGITS, taps);
        }
        float logit[SETS][3];
        load_logits<L, SETS>(logit, taps);
#pragma unroll
        for (int s = 0; s < SETS; ++s) {
            normalize(v.weight[s], logit[s], at.start + j > 0, at.start + j < at.length - 1, p.softmax);
        }
    };
    const auto finish = [&](Vector& v, int i, int j, int buffer) {
        float before[VEC];
#pragma unroll
        for (int t = 0; t < 3; ++t) {
            h.read(before, buffer ^ 1, j + t - 1, lane);
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                const float tap = v.weight[SETS > 1 ? e : 0][t];
                v.input[e] += (GSPN2_DECAY ? tap * v.keep[GSPN2_DECAY ? e : 0] : tap) * before[e];
            }
        }
        h.template publish<CLUSTER>(buffer, j, lane, v.input, at.rank);
        if (state) store_vector<T, VEC>(state.at(i, j), v.input);
        if (u) {
#pragma unroll
            for (int e = 0; e < VEC; ++e) v.input[e] *= v.gate[e];
        }
        store_vector<T, VEC>(y.at(i, j), v.input);
    };

    for (int ahead = 0; ahead < STAGES; ++ahead) stage(at.first + ahead, ahead);
    line_arrive<CLUSTER>();
    int slot = 0;
    for (int i = at.first; i < at.last; ++i) {
        const int buffer = i & 1, j = threadIdx.y;
        if constexpr (STAGES > 0) copy_wait<RING - 1>();
        Vector v;
        const bool work = mine && j < at.owned;
        if (work) prepare(v, i, j, slot);
        line_wait<CLUSTER>();
        if (work) finish(v, i, j, buffer);
        if (mine) {
            for (int further = j + blockDim.y; further < at.owned; further += blockDim.y) {
                prepare(v, i, further, slot);
                finish(v, i, further, buffer);
            }
        }
        line_arrive<CLUSTER>();
        stage(i + STAGES, slot);
        slot = slot + 1 == RING ? 0 : slot + 1;
    }
    // Nobody's shared memory may go while a neighbour can still write its edge there.
    if constexpr (CLUSTER > 1) line_wait<CLUSTER>();
}
