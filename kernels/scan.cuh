// What the forward and the backward scan share: arguments, addressing, vectors, weights, the exchanged lines.
//
// One block scans a slice of channels of one direction of one image (of one segment, for the local scan); a cluster of
// blocks splits lines that are too long for one. A thread owns a vector of VEC channels at one position of the line (and
// further positions a block's height away, where the line is longer than the block): x, lam, u and the logits that it reads
// are its own, staged STAGES lines ahead by asynchronous copies that no other thread waits for. Neighbouring positions meet
// only in the state of the line before, which is exchanged in shared memory behind one barrier a line.
#pragma once

#include "device.cuh"

// Strides in elements; the last dimension is contiguous. `group` is for logits only.
struct View {
    void* data;
    long long batch, row, column, direction, group;
};

struct Params {
    View x, lam, u, logits;
    View state;                                   // h: written by the forward if asked for, read by the backward
    View y;                                       // the result, or its gradient in the backward
    View grad_x, grad_lam, grad_u, grad_logits;   // each direction apart
    View partial;                                 // float32 sums over part of a group's channels, where a group has `parts` > 1
    long long part_stride;
    int batches, height, width, channels, count, groups;  // B, H, W, D, K, G
    int directions;                               // two bits each: right 0, left 1, down 2, up 3
    int segment, segments;                        // lines of a segment; segments of the direction that has most
    int lanes, slices, parts;                     // vectors a block owns at each position; slices of channels; slices of a group
    int softmax, unused;
};

GSPN2_DEVICE constexpr int round16(int bytes) { return (bytes + 15) / 16 * 16; }

// Bytes of logits that a thread stages: three taps (two-byte taps may straddle two words), or three for each of VEC channels.
GSPN2_DEVICE constexpr int staged_logit_bytes(int logit_size, int vec, int sets) {
    return sets > 1 ? 3 * vec * logit_size : logit_size == 4 ? 12 : 8;
}

// Shared memory of a block that owns `positions` of a line; launcher and kernels agree on it through the tests.
GSPN2_DEVICE constexpr int forward_shared_bytes(int positions, int lanes, int size, int logit_size, int vec, int sets, int stages, int vectors) {
    return 2 * (positions + 2) * lanes * vec * 4 + stages * (vectors * round16(positions * lanes * vec * size) +
                                                             round16(positions * lanes * staged_logit_bytes(logit_size, vec, sets)));
}

GSPN2_DEVICE constexpr int backward_shared_bytes(int positions, int lanes, int size, int logit_size, int vec, int sets, int stages, int vectors) {
    return round16(2 * (positions + 2) * lanes * (vec + 3 * sets) * 4) +
           stages * (vectors * round16(positions * lanes * vec * size) +
                     round16(positions * lanes * staged_logit_bytes(logit_size, vec, sets))) +
           (stages ? (stages + 2) * round16((positions + 2) * lanes * vec * size) : 0);
}

// The largest access that moves `bytes` in equal parts.
GSPN2_DEVICE constexpr int word_bytes(int bytes) {
    return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;
}

template <int BYTES>
struct BitsOf;
template <>
struct BitsOf<16> {
    using type = uint4;
};
template <>
struct BitsOf<8> {
    using type = uint2;
};
template <>
struct BitsOf<4> {
    using type = unsigned;
};
template <>
struct BitsOf<2> {
    using type = unsigned short;
};

template <typename T, int N>
GSPN2_DEVICE void load_vector(float (&out)[N], const T* from) {
    constexpr int BYTES = word_bytes(N * sizeof(T)), EACH = BYTES / sizeof(T);
    using Bits = typename BitsOf<BYTES>::type;
#pragma unroll
    for (int part = 0; part < N / EACH; ++part) {
        alignas(16) T values[EACH];
        *reinterpret_cast<Bits*>(values) = *reinterpret_cast<const Bits*>(from + part * EACH);
#pragma unroll
        for (int e = 0; e < EACH; ++e) out[part * EACH + e] = to_float(values[e]);
    }
}

template <typename T, int N>
GSPN2_DEVICE void store_vector(T* to, const float (&in)[N]) {
    constexpr int BYTES = word_bytes(N * sizeof(T)), EACH = BYTES / sizeof(T);
    using Bits = typename BitsOf<BYTES>::type;
#pragma unroll
    for (int part = 0; part < N / EACH; ++part) {
        alignas(16) T values[EACH];
#pragma unroll
        for (int e = 0; e < EACH; ++e) values[e] = from_float<T>(in[part * EACH + e]);
        *reinterpret_cast<Bits*>(to + part * EACH) = *reinterpret_cast<const Bits*>(values);
    }
}

// A tensor seen by one direction: line i in scan order, position j in the line.
template <typename T>
struct Lines {
    T* origin;
    long long line, position;
    GSPN2_DEVICE T* at(int i, int j) const { return origin + i * line + j * position; }
    GSPN2_DEVICE explicit operator bool() const { return origin != nullptr; }
};

// Which part of the work a block does.
struct Place {
    int rank, slice, batch, index;   // rank in the cluster; index of the direction
    bool horizontal, backwards;
    int first, last;                 // lines [first, last) of the scan
    int length;                      // positions in a whole line
    int start, positions, owned;     // this block's first position, its share, and how many of them exist
};

template <int CLUSTER>
GSPN2_DEVICE Place find_place(const Params& p) {
    Place at;
    int rest = blockIdx.x;
    at.rank = rest % CLUSTER, rest /= CLUSTER;
    at.slice = rest % p.slices, rest /= p.slices;
    const int segment = rest % p.segments;
    rest /= p.segments;
    at.index = rest % p.count;
    at.batch = rest / p.count;
    const int direction = p.directions >> (2 * at.index) & 3;
    at.horizontal = direction < 2;
    at.backwards = direction & 1;
    const int lines = at.horizontal ? p.width : p.height;
    at.length = at.horizontal ? p.height : p.width;
    at.first = segment * p.segment < lines ? segment * p.segment : lines;
    at.last = lines - at.first < p.segment ? lines : at.first + p.segment;
    at.positions = (at.length + CLUSTER - 1) / CLUSTER;
    at.start = at.rank * at.positions;
    at.owned = at.length - at.start < at.positions ? at.length - at.start : at.positions;
    if (at.owned < 0) at.owned = 0;
    return at;
}

template <typename T>
GSPN2_DEVICE Lines<T> lines_of(const View& view, const Place& at, int lines, long long offset) {
    if (!view.data) return {nullptr, 0, 0};
    const long long line = at.horizontal ? view.column : view.row, position = at.horizontal ? view.row : view.column;
    T* origin = static_cast<T*>(view.data) + at.batch * view.batch + at.index * view.direction + offset + at.start * position;
    return at.backwards ? Lines<T>{origin + (lines - 1) * line, -line, position} : Lines<T>{origin, line, position};
}

// Weights of the three taps, summing to 1 over those that exist; sigmoid's as 1 / (exp(c - l) + exp(c)), which is the sigmoid
// times exp(-c): the largest is at least 1/2, so no logits give 0 / 0.
GSPN2_DEVICE void normalize(float (&weight)[3], const float (&logit)[3], bool low, bool high, bool softmax) {
    float top = logit[1];
    if (low && logit[0] > top) top = logit[0];
    if (high && logit[2] > top) top = logit[2];
    const float c = top < 0.f ? top : 0.f, shift = softmax ? 0.f : fast_exp(c);
#pragma unroll
    for (int t = 0; t < 3; ++t) {
        weight[t] = softmax ? fast_exp(logit[t] - top) : fast_divide(1.f, fast_exp(c - logit[t]) + shift);
    }
    if (!low) weight[0] = 0.f;
    if (!high) weight[2] = 0.f;
    const float scale = fast_divide(1.f, weight[0] + weight[1] + weight[2]);
#pragma unroll
    for (int t = 0; t < 3; ++t) weight[t] *= scale;
}

// d weight[t] / d logit[t] is slope[t] (1 - weight[t]), d weight[t] / d logit[s] is - weight[t] slope[s].
GSPN2_DEVICE float slope(float weight, float logit, bool softmax) {
    return softmax ? weight : fast_divide(weight, 1.f + fast_exp(logit));
}

// Taps of one thread's SETS weight sets, from `from`; `skip` bytes precede them where they were staged by whole words.
template <typename L, int SETS>
GSPN2_DEVICE void load_logits(float (&logit)[SETS][3], const L* from) {
    if constexpr (SETS == 1) {
#pragma unroll
        for (int t = 0; t < 3; ++t) logit[0][t] = to_float(from[t]);
    } else {
        float flat[3 * SETS];
        load_vector<L, 3 * SETS>(flat, from);
#pragma unroll
        for (int s = 0; s < SETS; ++s)
#pragma unroll
            for (int t = 0; t < 3; ++t) logit[s][t] = flat[3 * s + t];
    }
}

// Stage one thread's logits: whole vectors where it has a set for each channel, else the words that hold its three taps.
template <typename L, int VEC, int SETS>
GSPN2_DEVICE void stage_logits(unsigned char* slot, const L* from) {
    if constexpr (SETS > 1) {
        constexpr int BYTES = 3 * VEC * sizeof(L), EACH = VEC * sizeof(L) < 16 ? VEC * sizeof(L) : 16;
#pragma unroll
        for (int at = 0; at < BYTES; at += EACH) copy_async<EACH>(slot + at, reinterpret_cast<const unsigned char*>(from) + at);
    } else if constexpr (sizeof(L) == 4) {
#pragma unroll
        for (int t = 0; t < 3; ++t) copy_async<4>(slot + 4 * t, from + t);
    } else {
        const unsigned long long address = reinterpret_cast<unsigned long long>(from), odd = address & 2;
        const unsigned char* word = reinterpret_cast<const unsigned char*>(from) - odd;
        copy_async<4>(slot, word);
        copy_async_word(slot + 4, word + 4, odd ? 4 : 2);
    }
}

template <typename L, int SETS>
GSPN2_DEVICE const L* staged_logits(const unsigned char* slot, const L* from) {
    const bool odd = SETS == 1 && sizeof(L) == 2 && (reinterpret_cast<unsigned long long>(from) & 2);
    return reinterpret_cast<const L*>(slot + (odd ? 2 : 0));
}

// Two lines of N floats for each lane of each position, one being read while the other is written, with an empty position on
// both sides. Kept as planes of four channels, so that neighbouring threads touch neighbouring 16 bytes.
template <int N>
struct Exchange {
    static constexpr int EACH = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
    float* data;
    int lanes, positions;
    GSPN2_DEVICE int size() const { return 2 * N * lanes * (positions + 2); }
    GSPN2_DEVICE float* at(int buffer, int part, int position, int lane) const {
        return data + (((buffer * (N / EACH) + part) * (positions + 2) + position + 1) * lanes + lane) * EACH;
    }
    GSPN2_DEVICE void read(float (&out)[N], int buffer, int position, int lane) const {
        float part[EACH];
#pragma unroll
        for (int q = 0; q < N / EACH; ++q) {
            load_vector<float, EACH>(part, at(buffer, q, position, lane));
#pragma unroll
            for (int e = 0; e < EACH; ++e) out[q * EACH + e] = part[e];
        }
    }
    GSPN2_DEVICE void write(int buffer, int position, int lane, const float (&in)[N], int peer = -1) const {
        float part[EACH];
#pragma unroll
        for (int q = 0; q < N / EACH; ++q) {
#pragma unroll
            for (int e = 0; e < EACH; ++e) part[e] = in[q * EACH + e];
            float* target = at(buffer, q, position, lane);
            store_vector<float, EACH>(peer < 0 ? target : cluster_peer(target, peer), part);
        }
    }
    // Also hand the edges of this block's share to the blocks that continue the line.
    template <int CLUSTER>
    GSPN2_DEVICE void publish(int buffer, int position, int lane, const float (&in)[N], int rank) const {
        write(buffer, position, lane, in);
        if constexpr (CLUSTER > 1) {
            if (position == 0 && rank > 0) write(buffer, positions, lane, in, rank - 1);
            if (position == positions - 1 && rank < CLUSTER - 1) write(buffer, -1, lane, in, rank + 1);
        }
    }
};

// One barrier a line. In a cluster it is split, so that the wait overlaps with the work that needs no neighbour.
template <int CLUSTER>
GSPN2_DEVICE void line_arrive() {
    if constexpr (CLUSTER > 1) cluster_arrive();
}
template <int CLUSTER>
GSPN2_DEVICE void line_wait() {
    if constexpr (CLUSTER > 1) {
        cluster_wait();
    } else {
        block_barrier();
    }
}
