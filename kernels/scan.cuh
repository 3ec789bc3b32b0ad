// What the forward and the backward scan share: arguments, addressing, vectors, weights, the exchanged lines.
//
// One block scans a slice of channels of one direction of one image (of one segment, for the local scan); a cluster of
// blocks splits lines that are too long for one. A thread owns a vector of VEC channels at one position of the line (at
// TURNS positions a block's height apart, where the line is longer than the block). All that it reads of x, lam and u is
// its own, so it loads it into registers AHEAD lines before it is needed, and nobody waits for it. Neighbouring positions
// meet only in the state of the line before, which is exchanged in shared memory behind one barrier a line. Lines are
// worked through in batches of AHEAD; the weights of a batch are normalised by the lanes of a position in turn, each for
// lines of its own, and handed to the others by shuffles.
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
    int slices, parts;                            // slices of the channels; of one group
    int softmax;
};

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

// A vector as it lies in memory, on its way in a register.
template <typename T, int N>
struct Packed {
    static constexpr int BYTES = word_bytes(N * sizeof(T)), WORDS = N * sizeof(T) / BYTES;
    using Bits = typename BitsOf<BYTES>::type;
    alignas(BYTES) Bits words[WORDS];
    GSPN2_DEVICE void load(const T* from) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) words[w] = reinterpret_cast<const Bits*>(from)[w];
    }
    GSPN2_DEVICE void unpack(float (&out)[N]) const {
        if constexpr (sizeof(T) == 2 && BYTES >= 4) {
            alignas(16) unsigned pairs[N / 2];
#pragma unroll
            for (int w = 0; w < WORDS; ++w) reinterpret_cast<Bits*>(pairs)[w] = words[w];
#pragma unroll
            for (int e = 0; e < N; e += 2) to_floats(pairs[e / 2], T{}, out[e], out[e + 1]);
        } else {
            alignas(16) T values[N];
#pragma unroll
            for (int w = 0; w < WORDS; ++w) reinterpret_cast<Bits*>(values)[w] = words[w];
#pragma unroll
            for (int e = 0; e < N; ++e) out[e] = to_float(values[e]);
        }
    }
    GSPN2_DEVICE void pack(const float (&in)[N]) {
        if constexpr (sizeof(T) == 2 && BYTES >= 4) {
            alignas(16) unsigned pairs[N / 2];
#pragma unroll
            for (int e = 0; e < N; e += 2) pairs[e / 2] = from_floats(T{}, in[e], in[e + 1]);
#pragma unroll
            for (int w = 0; w < WORDS; ++w) words[w] = reinterpret_cast<const Bits*>(pairs)[w];
        } else {
            alignas(16) T values[N];
#pragma unroll
            for (int e = 0; e < N; ++e) values[e] = from_float<T>(in[e]);
#pragma unroll
            for (int w = 0; w < WORDS; ++w) words[w] = reinterpret_cast<const Bits*>(values)[w];
        }
    }
    GSPN2_DEVICE void store(T* to) const {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) reinterpret_cast<Bits*>(to)[w] = words[w];
    }
};

template <typename T, int N>
GSPN2_DEVICE void load_vector(float (&out)[N], const T* from) {
    Packed<T, N> packed;
    packed.load(from);
    packed.unpack(out);
}

template <typename T, int N>
GSPN2_DEVICE void store_vector(T* to, const float (&in)[N]) {
    Packed<T, N> packed;
    packed.pack(in);
    packed.store(to);
}

// Which part of the work a block does.
struct Place {
    int rank, slice, batch, index;   // rank in the cluster; index of the direction
    bool horizontal, backwards;
    int first, last;                 // lines [first, last) of the scan
    int length;                      // positions in a whole line
    int start, positions, owned;     // this block's first position, its share, and how many of them exist
};

// LEAST: positions of a share, so that all that a block hands over is its own, and no thread is both edges of it. Shares begin
// at multiples of UNIT. MIXED, blocks that run at the same time go different ways.
template <int CLUSTER, int LEAST = 2, int UNIT = 1, bool MIXED = false>
GSPN2_DEVICE Place find_place(const Params& p) {
    Place at;
    int rest = blockIdx.x;
    at.rank = rest % CLUSTER, rest /= CLUSTER;
    if (MIXED) at.index = rest % p.count, rest /= p.count;
    at.slice = rest % p.slices, rest /= p.slices;
    const int segment = rest % p.segments;
    rest /= p.segments;
    if (!MIXED) at.index = rest % p.count, rest /= p.count;
    at.batch = rest;
    const int direction = p.directions >> (2 * at.index) & 3;
    at.horizontal = direction < 2;
    at.backwards = direction & 1;
    const int lines = at.horizontal ? p.width : p.height;
    at.length = at.horizontal ? p.height : p.width;
    at.first = segment * p.segment < lines ? segment * p.segment : lines;
    at.last = lines - at.first < p.segment ? lines : at.first + p.segment;
    at.positions = (at.length + CLUSTER - 1) / CLUSTER;
    if (CLUSTER > 1 && at.positions < LEAST) at.positions = LEAST;
    at.positions = (at.positions + UNIT - 1) / UNIT * UNIT;
    at.start = at.rank * at.positions;
    at.owned = at.length - at.start < at.positions ? at.length - at.start : at.positions;
    if (at.owned < 0) at.owned = 0;
    return at;
}

template <typename T>
struct Tag {
    using Type = T;
};

template <bool VALUE>
struct Constant {
    static constexpr bool value = VALUE;
};

// Which of the optional tensors a kernel has: the forward a state to save, the backward partial sums.
enum { HAS_LAM = 1, HAS_U = 2, HAS_STATE = 4, HAS_PARTIAL = 4 };

// The positions of a thread. One beyond the block's share stands on the last of it: it may read, but writes nothing, and so
// does a lane beyond the last channel on the first lane's channels. What is true of them is kept as bits, in one register.
template <int TURNS>
struct Positions {
    int first, away[TURNS], facts[TURNS];  // position; from the first
    GSPN2_DEVICE int operator[](int turn) const { return first + away[turn]; }
    GSPN2_DEVICE bool own(int turn) const { return facts[turn] & 1; }
    // Whether the line goes on below and above.
    GSPN2_DEVICE bool has_lower(int turn) const { return facts[turn] & 2; }
    GSPN2_DEVICE bool has_higher(int turn) const { return facts[turn] & 4; }
    // Whether it does so in another block.
    GSPN2_DEVICE bool low_edge(int turn) const { return facts[turn] & 8; }
    GSPN2_DEVICE bool high_edge(int turn) const { return facts[turn] & 16; }
};

template <int TURNS>
GSPN2_DEVICE Positions<TURNS> find_positions(const Place& at, bool lane_has_channels) {
    Positions<TURNS> to;
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int wanted = threadIdx.y + turn * blockDim.y, j = wanted < at.owned ? wanted : at.owned - 1;
        if (turn == 0) to.first = j;
        to.away[turn] = turn == 0 ? 0 : j - to.first;
        const bool own = lane_has_channels && wanted < at.owned;
        const bool lower = at.start + j > 0, higher = at.start + j < at.length - 1;
        to.facts[turn] = own | lower << 1 | higher << 2 | (own && lower && j == 0) << 3 | (own && higher && j == at.owned - 1) << 4;
    }
    return to;
}

// A thread's place in a tensor as one direction sees it, and the steps to the next line and to the next position.
template <typename T>
struct Walk {
    T* line;
    int next_line, next_position;  // the launcher refuses longer steps; 64 bits would cost registers and instructions
    GSPN2_DEVICE T* at(int away) const { return line + static_cast<long long>(away) * next_position; }
    GSPN2_DEVICE void next() { line += next_line; }
};

// Begins at line `first` of the scan, at the block's position j; goes `step` lines at a time, in scan order or against it.
template <typename T>
GSPN2_DEVICE Walk<T> walk(const View& view, const Place& at, const Params& p, int first, int step, int j, long long offset) {
    const int lines = at.horizontal ? p.width : p.height;
    const long long position = at.horizontal ? view.row : view.column;
    long long line = at.horizontal ? view.column : view.row;
    T* origin = global_memory(static_cast<T*>(view.data)) + at.batch * view.batch + at.index * view.direction + offset;
    if (at.backwards) origin += (lines - 1) * line, line = -line;
    return {origin + first * line + (at.start + j) * position, static_cast<int>(step * line), static_cast<int>(position)};
}

constexpr float LOG2_E = 1.44269504f;
GSPN2_DEVICE float fast_exp(float value) { return fast_exp2(value * LOG2_E); }

// Weights of the three taps, summing to 1 over those that exist, from the logits times LOG2_E. Sigmoid's are 1 / a[t] over their sum,
// a[t] = 1 + exp(-l[t]). Where even the largest logit is below -20, all are raised until it is there: sigmoids of so little are
// exponentials, whose ratios that leaves as they were. exp(40) is as good as infinity then (such a tap weighs 2e-9 of the largest
// at most), and the products below stay within float32. Returns the sum of the sigmoids: each is its weight times that (0 for softmax).
GSPN2_DEVICE float normalize_scaled(float (&weight)[3], const float (&scaled)[3], bool low, bool high, bool softmax) {
    constexpr float MOST = 57.7f, FAR = 28.85f;  // 40 and 20 times LOG2_E
    float top = scaled[1], reciprocal = 0.f;
    if (low) top = larger(top, scaled[0]);
    if (high) top = larger(top, scaled[2]);
    if (softmax) {
        weight[0] = low ? fast_exp2(scaled[0] - top) : 0.f;
        weight[1] = fast_exp2(scaled[1] - top);
        weight[2] = high ? fast_exp2(scaled[2] - top) : 0.f;
    } else {
        const float raised = smaller(top + FAR, 0.f);
        float a[3];
#pragma unroll
        for (int t = 0; t < 3; ++t) a[t] = 1.f + fast_exp2(smaller(raised - scaled[t], MOST));
        if (!low) a[0] = 1.f;
        if (!high) a[2] = 1.f;
        weight[0] = low ? a[1] * a[2] : 0.f;
        weight[1] = a[0] * a[2];
        weight[2] = high ? a[0] * a[1] : 0.f;
        reciprocal = a[1];
    }
    const float scale = fast_divide(1.f, weight[0] + weight[1] + weight[2]);
#pragma unroll
    for (int t = 0; t < 3; ++t) weight[t] *= scale;
    return softmax ? 0.f : fast_divide(1.f, reciprocal * weight[1]);
}
GSPN2_DEVICE float normalize(float (&weight)[3], const float (&logit)[3], bool low, bool high, bool softmax) {
    const float scaled[3] = {LOG2_E * logit[0], LOG2_E * logit[1], LOG2_E * logit[2]};
    return normalize_scaled(weight, scaled, low, high, softmax);
}

// d weight[t] / d logit[t] is slope[t] (1 - weight[t]), d weight[t] / d logit[s] is - weight[t] slope[s].
GSPN2_DEVICE float slope(float weight, float logit, bool softmax) {
    return softmax ? weight : fast_divide(weight, 1.f + fast_exp(logit));
}

// d loss / d logits from d loss / d weights.
GSPN2_DEVICE void through_normalizer(float (&result)[3], const float (&weight)[3], const float (&logit)[3], const float (&grad)[3], bool softmax) {
    float mean = 0.f;
#pragma unroll
    for (int t = 0; t < 3; ++t) mean += weight[t] * grad[t];
#pragma unroll
    for (int t = 0; t < 3; ++t) result[t] = slope(weight[t], logit[t], softmax) * (grad[t] - mean);
}

// Logits of a batch where all lanes of a position share one set of weights: lane l has lines l, l + LANES, ... of it.
template <typename L, int LANES, int AHEAD, int TURNS>
struct SharedTaps {
    static constexpr int OWN = (AHEAD + LANES - 1) / LANES;
    L taps[TURNS][OWN][3];
    GSPN2_DEVICE void load(const Walk<const L>& from, const Positions<TURNS>& j, int lane, int lines) {
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
#pragma unroll
            for (int m = 0; m < OWN; ++m) {
                const int s = lane + m * LANES;
                if (s >= AHEAD || s >= lines) continue;
                const L* at = from.at(j.away[turn]) + static_cast<long long>(s) * from.next_line;
#pragma unroll
                for (int t = 0; t < 3; ++t) taps[turn][m][t] = at[t];
            }
        }
    }
};

// Of the lane that has line s of a batch.
template <int LANES>
GSPN2_DEVICE float from_owner(float value, int s) {
    if constexpr (LANES == 1) return value;
    const int thread = threadIdx.y * LANES + threadIdx.x;
    return shuffle(value, (thread & 31 & ~(LANES - 1)) + s % LANES);
}

// Two lines of floats, VEC for each lane of each position, one being read while the other is written, with an empty position
// on both sides.
template <int VEC, int LANES>
struct Exchange {
    float* data;
    int positions;
    GSPN2_DEVICE int size() const { return 2 * VEC * LANES * (positions + 2); }
    GSPN2_DEVICE float* at(int buffer, int j, int lane) const {
        return data + ((buffer * (positions + 2) + j + 1) * LANES + lane) * VEC;
    }
};

// The first bytes of shared memory in a cluster: signals of what arrives from the lower and from the higher neighbour, for
// each of the two lines in exchange.
constexpr int SIGNAL_BYTES = 32;
GSPN2_DEVICE Signal* signal_of(int buffer, int side) { return reinterpret_cast<Signal*>(shared_memory()) + 2 * buffer + side; }

// Shared memory of a block that owns `positions` of a line; launcher and kernels agree on it through the tests.
GSPN2_DEVICE constexpr int forward_shared_bytes(int positions, int lanes, int vec, int cluster) {
    return (cluster > 1 ? SIGNAL_BYTES : 0) + 2 * (positions + 2) * lanes * vec * 4;
}
GSPN2_DEVICE constexpr int backward_shared_bytes(int positions, int lanes, int vec, int cluster) {
    return (cluster > 1 ? SIGNAL_BYTES : 0) + 3 * 2 * (positions + 2) * lanes * vec * 4;
}

// Zeroes `count` floats after the signals, and prepares these. Returns when the whole cluster has done so.
template <int CLUSTER>
GSPN2_DEVICE float* clear_shared(int count) {
    float* const data = reinterpret_cast<float*>(shared_memory() + (CLUSTER > 1 ? SIGNAL_BYTES : 0));
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int e = thread; e < count; e += blockDim.x * blockDim.y) data[e] = 0.f;
    if constexpr (CLUSTER > 1) {
        if (thread < 4) signal_init(signal_of(thread / 2, thread % 2));
        cluster_ready();
    } else {
        block_barrier();
    }
    return data;
}

// Wait for what the neighbour on `side` sent for the line that went through `buffer`, the `use`-th that did; `bytes` in all.
GSPN2_DEVICE void receive(int buffer, int side, int use, int lane, int bytes) {
    Signal* const signal = signal_of(buffer, side);
    if (lane == 0) signal_expect(signal, bytes);
    signal_wait(signal, use & 1);
}
