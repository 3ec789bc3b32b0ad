// The forward scan from planes: every channel of the projection's output is a map of its own, so what a block reads is whole
// rows of memory or whole parts of them, whatever the slice of channels and the direction are.
//
// Tokens come channels last, and a product can leave its result either way round: as (tokens, features), of which a direction
// reads pieces of D elements, or as (features, batch, height, width). Here it is the latter, with the bias still to be added.
// The engine of bulk.cuh loads boxes of (LINES x SPAN positions x WIDTH channels) into a ring of stages. A chunk of lines at a
// time, normalising warps make weights of the logits, and scanning lanes take what they need of x, lam and u into registers,
// walk along the lines, and leave y:
//
//     full (the engine's bytes) -> ready (a chunk's weights) -> used (they have been read), taken (the stage has), done (y is there)
//
// A lane has PLACES positions of a channel, the next lane the next ones, and after the last ones of a channel the next channel's
// first, as many channels as a warp has lanes for: what a lane gets from beyond its channel's ends meets a weight of zero there, or
// a halo that is wrong anyway. VERTICAL,
// a line is a row: a lane reads PLACES positions of it, and stores them to memory itself, next to its neighbours'. Otherwise a
// line is a column: a lane reads 16 bytes, a chunk of lines, of each of its positions, and leaves y there for one thread to have
// the engine store it. In a cluster, halos as in bulk.cuh; u, which only y needs, has none.
#pragma once

#include "bulk.cuh"

enum { PLANES_FEATURES, PLANES_LOGITS, PLANES_Y, PLANES_STATE, PLANES_U, PLANES_MAPS };

struct PlaneParams {
    TensorMap maps[2][PLANES_MAPS];  // for scans along rows and along columns: (column, row, batch, plane, 1)
    Params scan;                     // of whose views only y is there, its channels apart by `group`, and, laid out as y, the state
    const void* bias;                // of every plane
    int stages[2];                   // for scans along rows and along columns
    int lam, u, logits;              // their first planes
    int gates;                       // planes from one direction's gates to the next one's
};

enum { HAS_BIAS = 4, HAS_H = 8 };  // h is for the backward, where y is something else
[[maybe_unused]] constexpr int MOST_SLOTS = 4;

// The weights of a position, as they lie in shared memory: those of the two outer taps, side by side. The middle one's is what is left
// of 1. So what half precision does to a weight (2^-12) moves a little of the state to a neighbour, and takes nothing from their sum.
template <typename T>
struct WeightOf {
    using type = Half;
};
template <>
struct WeightOf<float> {
    using type = float;
};

// Those of N positions.
template <typename T, int N>
struct OuterWeights {
    using Type = typename WeightOf<T>::type;
    Packed<Type, 2 * N> outer;
    GSPN2_DEVICE void load(const Type* from) { outer.load(from); }
    GSPN2_DEVICE void get(float (&to)[3][N]) const {
        float each[2 * N];
        outer.unpack(each);
#pragma unroll
        for (int k = 0; k < N; ++k) to[0][k] = each[2 * k], to[2][k] = each[2 * k + 1], to[1][k] = 1.f - each[2 * k] - each[2 * k + 1];
    }
    // Of those made from `first` on.
    template <int MADE>
    GSPN2_DEVICE static void store(Type* to, const float (&made)[3][MADE], int first = 0) {
        float each[2 * N];
#pragma unroll
        for (int k = 0; k < N; ++k) each[2 * k] = made[0][first + k], each[2 * k + 1] = made[2][first + k];
        store_vector<Type, 2 * N>(to, each);
    }
};

// Bytes into a box, of so many positions of several planes, at which a position's chunk begins (a line is a column), or a line's
// positions (it is a row).
template <int LINES, int SIZE>
struct PlaneBox {
    GSPN2_DEVICE static int column_part(int span, int plane, int position, int chunk) {
        constexpr int ROW = LINES * SIZE;
        return swizzled<ROW>((plane * span + position) * ROW) ^ chunk * 16;
    }
    GSPN2_DEVICE static int row_part(int span, int plane, int line, int position) { return ((plane * LINES + line) * span + position) * SIZE; }
};

// SETS: weight sets of a slice, 1 or, where more are asked for, one for each channel. SLOTS: chunks of weights. UNIT: what a normalising lane does at once,
// lines of a position or, VERTICAL, positions of a line.
template <typename T, int WIDTH_, int SETS_, int SPAN_, int PLACES_, int LINES_, int SLOTS_, int UNIT_, int HALO_, int CLUSTER_, int HAS, bool VERTICAL_>
struct PlaneRing : PlaneBox<LINES_, sizeof(T)> {
    using Type = T;
    static constexpr int WIDTH = WIDTH_, SETS = SETS_ > 1 ? WIDTH_ : 1, SPAN = SPAN_, PLACES = PLACES_, LINES = LINES_, SLOTS = SLOTS_, UNIT = UNIT_;
    static constexpr int HALO = HALO_, CLUSTER = CLUSTER_;
    static constexpr bool VERTICAL = VERTICAL_;
    static constexpr bool LAM = HAS & HAS_LAM, U = HAS & HAS_U, BIAS = HAS & HAS_BIAS, STATE = HAS & HAS_H;
    static constexpr int SIZE = sizeof(T), PART = 16 / SIZE;  // elements of 16 bytes
    static constexpr int CHUNK = !VERTICAL ? PART : LINES < 8 ? LINES : 8;
    static constexpr int CHUNKS = LINES / CHUNK, ROW = LINES * SIZE, PER_CHANNEL = SPAN / PLACES;  // lanes
    static constexpr int PER_WARP = 32 / PER_CHANNEL, WARPS = (WIDTH + PER_WARP - 1) / PER_WARP;  // channels; warps that scan
    static_assert(SETS_ == 1 || SETS_ >= WIDTH, "one for all channels or for each of the wider way's");
    static_assert(U || !STATE, "without output gate y is h; else h goes where u was");
    static_assert(VERTICAL || (ROW & (ROW - 1)) == 0, "a chunk is some bits of its address");
    static_assert(PER_CHANNEL <= 32, "a channel stays within a warp");
    static_assert(SPAN % 8 == 0 && SPAN % PLACES == 0 && LINES % CHUNK == 0 && HALO % CHUNK == 0, "edges are exchanged between chunks");
    static_assert(CHUNK % 2 == 0, "a line's registers are those of the one before last");
    // Blocks at a line's ends have one halo; of two blocks, both are.
    static constexpr int SHARE = SPAN - (CLUSTER < 3 ? CLUSTER - 1 : 2) * HALO;
    static constexpr int LAM_TILE = 1, U_TILE = 1 + LAM;
    using Weight = typename WeightOf<T>::type;
    static constexpr int COUNT = 4 * MOST_STAGES + 2 * MOST_SLOTS;
    static constexpr int SIGNALS = (COUNT + (CLUSTER > 1 ? 4 * WARPS : 0)) * 8, INBOX = WIDTH * HALO;
    static constexpr int up(int bytes) { return (bytes + 1023) / 1024 * 1024; }
    static constexpr int HEADER = up(SIGNALS + (CLUSTER > 1 ? 4 * INBOX * 4 : 0));
    static constexpr int SLOT = CHUNK * SETS * SPAN * 2, BOXES = HEADER + up(SLOTS * SLOT * SIZE);
    static constexpr int TILE = up(WIDTH * LINES * SPAN * SIZE), TAPS_AT = U_TILE * TILE + U * up(WIDTH * LINES * SHARE * SIZE);
    static constexpr int STAGE = TAPS_AT + up(3 * SETS * LINES * SPAN * SIZE);
    static constexpr int LOADED = LINES * SIZE * (SPAN * (WIDTH * (1 + LAM) + 3 * SETS) + U * SHARE * WIDTH);  // bytes that arrive for a stage

    GSPN2_DEVICE static Signal* signals() { return reinterpret_cast<Signal*>(shared_memory()); }
    GSPN2_DEVICE static Signal* full(int stage) { return signals() + stage; }
    GSPN2_DEVICE static Signal* done(int stage) { return signals() + MOST_STAGES + stage; }
    GSPN2_DEVICE static Signal* empty(int stage) { return signals() + 2 * MOST_STAGES + stage; }
    GSPN2_DEVICE static Signal* taken(int stage) { return signals() + 3 * MOST_STAGES + stage; }
    GSPN2_DEVICE static Signal* ready(int slot) { return signals() + 4 * MOST_STAGES + slot; }
    GSPN2_DEVICE static Signal* used(int slot) { return signals() + 4 * MOST_STAGES + MOST_SLOTS + slot; }
    GSPN2_DEVICE static Signal* arrived(int exchange, int side, int warp) { return signals() + COUNT + (2 * (exchange & 1) + side) * WARPS + warp; }
    GSPN2_DEVICE static float* inbox(int exchange, int side) {
        return reinterpret_cast<float*>(shared_memory() + SIGNALS) + (2 * (exchange & 1) + side) * INBOX;
    }
    GSPN2_DEVICE static unsigned char* box(int stage, int which) { return shared_memory() + BOXES + stage * STAGE + which * TILE; }
    GSPN2_DEVICE static unsigned char* taps(int stage) { return box(stage, 0) + TAPS_AT; }
    GSPN2_DEVICE static Weight* weights(int slot) { return reinterpret_cast<Weight*>(shared_memory() + HEADER) + slot * SLOT; }
    GSPN2_DEVICE static int weight(int line, int set, int position) { return 2 * ((line * SETS + set) * SPAN + position); }
};

// The line in memory with which the box of a batch begins. Boxes of columns begin at multiples of their lines: what they have beyond
// the map is at its right end, where a scan to the left skips it.
template <typename R>
GSPN2_DEVICE int plane_line(const Place& at, const Params& p, int batch) {
    if (R::VERTICAL || !at.backwards) return first_line(at, p, batch, R::LINES);
    return ((p.width - at.first + R::LINES - 1) / R::LINES - 1 - batch) * R::LINES;
}

template <bool KEEP = false>
GSPN2_DEVICE void plane_box(void* to, const TensorMap& map, bool vertical, int line, int position, int batch, int plane, Signal* signal) {
    load_box<KEEP>(to, map, vertical ? position : line, vertical ? line : position, batch, plane, 0, signal);
}

// KEEP: x, which every direction reads, stays in the second-level cache rather than the rest.
template <bool KEEP, typename R>
GSPN2_DEVICE void load_planes(const PlaneParams& planes, const Place& at, const Reach& reach, int batch, int end) {
    constexpr bool VERTICAL = R::VERTICAL;
    const Params& p = planes.scan;
    const TensorMap* const maps = planes.maps[VERTICAL];
    const int channel = at.slice * R::WIDTH, position = at.start - reach.low, stages = planes.stages[VERTICAL];
    const int logits = planes.logits + 3 * (at.index * p.groups + channel / (p.channels / p.groups));
    const int gate = at.index * planes.gates + channel;
    Turn turn{0, 0};
    for (int n = 0; n < batch; ++n) turn.next(stages);
    for (; batch < end; ++batch, turn.next(stages)) {
        const int stage = turn.stage, line = plane_line<R>(at, p, batch);
        Signal* const full = R::full(stage);
        // y stays where x was until it is stored, and h where u was. A ring of two has no time to lose: it loads all else before that.
        const bool waits = batch >= stages, early = stages < 3;
        if (!VERTICAL && waits && !early) signal_wait(R::empty(stage), turn.parity ^ 1);
        if (waits) signal_wait(R::taken(stage), turn.parity ^ 1);
        signal_expect(full, R::LOADED);
        plane_box(R::taps(stage), maps[PLANES_LOGITS], VERTICAL, line, position, at.batch, logits, full);
        if constexpr (R::LAM) {
            plane_box(R::box(stage, R::LAM_TILE), maps[PLANES_FEATURES], VERTICAL, line, position, at.batch, planes.lam + gate, full);
        }
        const auto load_u = [&] {
            if constexpr (R::U) {
                plane_box(R::box(stage, R::U_TILE), maps[PLANES_U], VERTICAL, line, at.start, at.batch, planes.u + gate, full);
            }
        };
        if constexpr (!R::STATE) load_u();
        if (!VERTICAL && waits && early) signal_wait(R::empty(stage), turn.parity ^ 1);
        if constexpr (R::STATE) load_u();
        plane_box<KEEP>(R::box(stage, 0), maps[PLANES_FEATURES], VERTICAL, line, position, at.batch, channel, full);
    }
}

// Of scans along rows.
template <typename R>
GSPN2_DEVICE void store_planes(const PlaneParams& planes, const Place& at, const Reach& reach) {
    const int batches = (at.last - at.first + R::LINES - 1) / R::LINES, first = at.slice * R::WIDTH, all = planes.scan.channels;
    const int count = all - first < R::WIDTH ? all - first : R::WIDTH;
    Turn turn{0, 0};
    for (int batch = 0; batch < batches; ++batch, turn.next(planes.stages[0])) {
        const int line = plane_line<R>(at, planes.scan, batch);
        signal_wait(R::done(turn.stage), turn.parity);
        engine_fence();
        for (int c = 0; c < count; ++c) {
            const int plane = at.index * all + first + c;
            store_box(planes.maps[0][PLANES_Y], line, at.start, at.batch, plane, 0, R::box(turn.stage, 0) + (c * R::SPAN + reach.low) * R::ROW);
            if constexpr (R::STATE) {
                store_box(planes.maps[0][PLANES_STATE], line, at.start, at.batch, plane, 0, R::box(turn.stage, R::U_TILE) + c * R::SHARE * R::ROW);
            }
        }
        end_group();
        groups_read<0>();  // at once: scanning lanes look a stage ahead, and there may be two
        signal_arrive(R::empty(turn.stage));
    }
}

// Where a scan is: its stage's turn, the chunk of the box, and the turn of the weights.
template <typename R>
struct ChunkTurn {
    Turn stage{0, 0}, slot{0, 0};
    int chunk;
    // A scan to the left begins within its first box.
    GSPN2_DEVICE ChunkTurn(const Place& at, const Params& p)
        : chunk(R::VERTICAL || !at.backwards ? 0 : R::CHUNKS - 1 - ((p.width - at.first) / R::CHUNK + R::CHUNKS - 1) % R::CHUNKS) {}
    GSPN2_DEVICE bool begins() const { return chunk == 0; }
    GSPN2_DEVICE bool ends() const { return chunk == R::CHUNKS - 1; }
    GSPN2_DEVICE void next(int stages) {
        slot.next(R::SLOTS);
        if (++chunk == R::CHUNKS) chunk = 0, stage.next(stages);
    }
    // In the order of memory.
    GSPN2_DEVICE int place(bool backwards) const { return backwards ? R::CHUNKS - 1 - chunk : chunk; }
};

// What a thread does in each chunk is known before the first: which logits, into which weights.
template <bool SOFTMAX, int THREADS, typename R>
GSPN2_DEVICE void normalize_planes(const PlaneParams& planes, const Place& at, const Reach& reach, int thread) {
    using T = typename R::Type;
    constexpr bool VERTICAL = R::VERTICAL;
    constexpr int SETS = R::SETS, UNIT = R::UNIT, TAP = R::LINES * R::SPAN * R::SIZE;
    constexpr int ALONG = VERTICAL ? R::SPAN / UNIT : R::SPAN, ACROSS = VERTICAL ? R::CHUNK : R::CHUNK / UNIT;
    constexpr int UNITS = SETS * ALONG * ACROSS, TURNS = (UNITS + THREADS - 1) / THREADS;
    const Params& p = planes.scan;
    const int chunks = (at.last - at.first + R::CHUNK - 1) / R::CHUNK;
    int source[TURNS], target[TURNS], first_j[TURNS];
    float bias[3] = {};
    const auto read_bias = [&](float (&to)[3], int set) {
        const T* const from = global_memory(static_cast<const T*>(planes.bias));
        // A ragged slice's last sets belong to nobody.
        const int wanted = at.slice * R::WIDTH / (p.channels / p.groups) + set, group = wanted < p.groups ? wanted : p.groups - 1;
#pragma unroll
        for (int t = 0; t < 3; ++t) to[t] = LOG2_E * to_float(from[planes.logits + 3 * (at.index * p.groups + group) + t]);
    };
    if constexpr (R::BIAS && SETS == 1) read_bias(bias, 0);
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        const int unit = thread + i * THREADS, along = unit % ALONG, rest = unit / ALONG, across = rest % ACROSS, set = rest / ACROSS;
        const int position = VERTICAL ? along * UNIT : along;
        first_j[i] = at.start + position - reach.low;
        if constexpr (VERTICAL) {
            source[i] = R::row_part(R::SPAN, 3 * set, at.backwards ? R::CHUNK - 1 - across : across, position);
            target[i] = R::weight(across, set, position);
        } else {
            const int in_memory = across * UNIT, line = at.backwards ? R::CHUNK - 1 - in_memory : in_memory;
            source[i] = R::column_part(R::SPAN, 3 * set, position, 0) + in_memory * R::SIZE;
            target[i] = R::weight(line, set, position);
        }
    }
    const int next_line = R::weight(at.backwards ? -1 : 1, 0, 0);
    ChunkTurn<R> turn(at, p);
    for (int n = 0; n < chunks; ++n, turn.next(planes.stages[VERTICAL])) {
        if (n == 0 || turn.begins()) signal_wait(R::full(turn.stage.stage), turn.stage.parity);
        if (n >= R::SLOTS) signal_wait(R::used(turn.slot.stage), turn.slot.parity ^ 1);
        const unsigned char* const taps = R::taps(turn.stage.stage);
        typename R::Weight* const weights = R::weights(turn.slot.stage);
        const int place = turn.place(at.backwards);
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            if (UNITS % THREADS && i == TURNS - 1 && thread + i * THREADS >= UNITS) break;
            const unsigned char* const from = taps + (VERTICAL ? source[i] + place * R::CHUNK * R::SPAN * R::SIZE : source[i] ^ place * 16);
            float read[3][UNIT], made[3][UNIT];
            if constexpr (R::BIAS && SETS > 1) read_bias(bias, (thread + i * THREADS) / (ALONG * ACROSS));
#pragma unroll
            for (int t = 0; t < 3; ++t) load_vector<T, UNIT>(read[t], reinterpret_cast<const T*>(from + t * TAP));
#pragma unroll
            for (int e = 0; e < UNIT; ++e) {
                const int j = first_j[i] + (VERTICAL ? e : 0);
                float scaled[3], weight[3];
#pragma unroll
                for (int t = 0; t < 3; ++t) scaled[t] = LOG2_E * read[t][e] + (R::BIAS ? bias[t] : 0.f);
                normalize_scaled(weight, scaled, j > 0, j < at.length - 1, SOFTMAX);
#pragma unroll
                for (int t = 0; t < 3; ++t) made[t][e] = weight[t];
            }
            if constexpr (VERTICAL) {
                OuterWeights<T, UNIT>::store(weights + target[i], made);
            } else {
#pragma unroll
                for (int e = 0; e < UNIT; ++e) OuterWeights<T, 1>::store(weights + target[i] + e * next_line, made, e);
            }
        }
        warp_arrives(R::ready(turn.slot.stage));
    }
}

// N elements of type T as words, and one of them as a float.
template <typename T, int N>
struct Words {
    static constexpr int COUNT = (N * sizeof(T) + 3) / 4;
    unsigned words[COUNT];
    GSPN2_DEVICE void load(const void* from) {
        if constexpr (N * sizeof(T) % 4) {
            words[0] = *static_cast<const unsigned short*>(from);
        } else {
            constexpr int EACH = COUNT < 4 ? COUNT : 4;
            using Bits = typename BitsOf<4 * EACH>::type;
#pragma unroll
            for (int first = 0; first < COUNT; first += EACH) {
                alignas(16) unsigned part[EACH];
                *reinterpret_cast<Bits*>(part) = static_cast<const Bits*>(from)[first / EACH];
#pragma unroll
                for (int w = 0; w < EACH; ++w) words[first + w] = part[w];
            }
        }
    }
    // Of 16 bytes.
    GSPN2_DEVICE void store(void* to) const {
        static_assert(COUNT == 4, "one vector");
        alignas(16) const unsigned four[4] = {words[0], words[1], words[2], words[3]};
        *static_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(four);
    }
    // One value to all, in the storage type.
    GSPN2_DEVICE void add(T value) {
#pragma unroll
        for (int w = 0; w < COUNT; ++w) words[w] = add_words(words[w], value);
    }
    GSPN2_DEVICE float get(int e) const { return get<false>(e, T{}); }
    // Plus `added`, in the storage type.
    template <bool ADDS>
    GSPN2_DEVICE float get(int e, T added) const {
        const unsigned read = words[e * sizeof(T) / 4], word = ADDS ? add_words(read, added) : read;
        if constexpr (sizeof(T) == 4) {
            return bits_as_float(word);
        } else {
            float low, high;
            to_floats(word, T{}, low, high);
            return e % 2 ? high : low;
        }
    }
};

template <typename T, int N>
GSPN2_DEVICE void store_if(bool condition, T* to, const float (&values)[N]) {
    if constexpr (N * sizeof(T) % 4) {
        if (condition) store_vector<T, N>(to, values);
    } else {
        constexpr int WORDS = N * sizeof(T) / 4, EACH = WORDS < 4 ? WORDS : 4;
        Packed<T, N> packed;
        packed.pack(values);
        alignas(16) unsigned words[WORDS];
#pragma unroll
        for (int w = 0; w < Packed<T, N>::WORDS; ++w) reinterpret_cast<typename Packed<T, N>::Bits*>(words)[w] = packed.words[w];
#pragma unroll
        for (int first = 0; first < WORDS; first += EACH) {
            unsigned part[EACH];
#pragma unroll
            for (int w = 0; w < EACH; ++w) part[w] = words[first + w];
            store_words_if<EACH>(condition, reinterpret_cast<unsigned*>(to) + first, part);
        }
    }
}

template <bool DECAY, bool BACKWARDS, typename R>
GSPN2_DEVICE void scan_lines(const PlaneParams& planes, const Place& at, const Reach& reach, int thread) {
    using T = typename R::Type;
    constexpr bool VERTICAL = R::VERTICAL;
    constexpr int WIDTH = R::WIDTH, SETS = R::SETS, HALO = R::HALO, CLUSTER = R::CLUSTER;
    constexpr int CHUNK = R::CHUNK, PLACES = R::PLACES, LOOK = 2, VECTORS = VERTICAL ? LOOK : PLACES, LENGTH = VERTICAL ? PLACES : R::PART;
    const Params& p = planes.scan;
    const int lines = at.last - at.first, chunks = (lines + CHUNK - 1) / CHUNK;
    // Beyond its warp's channels a lane does again what the last of them does, but writes nothing.
    const int lane = thread % 32, last = R::PER_WARP * R::PER_CHANNEL - 1, own = lane < last ? lane : last;
    const int wanted = thread / 32 * R::PER_WARP + own / R::PER_CHANNEL, plane = wanted < WIDTH ? wanted : WIDTH - 1;
    const int position = own % R::PER_CHANNEL * PLACES;
    const bool idle = lane > last || wanted >= WIDTH;
    const int channel = at.slice * WIDTH + plane;

    T bias[3] = {};
    if constexpr (R::BIAS) {
        const T* const from = global_memory(static_cast<const T*>(planes.bias));
        const int read = channel < p.channels ? channel : p.channels - 1, gate = at.index * planes.gates + read;
        bias[0] = from[read];
        if constexpr (R::LAM) bias[1] = from[planes.lam + gate];
        if constexpr (R::U) bias[2] = from[planes.u + gate];
    }

    // A warp waits for what the warp of its channels sends in the neighbouring block, and for nobody else.
    const int warp = thread / 32, left_over = WIDTH - warp * R::PER_WARP, channels = left_over < R::PER_WARP ? left_over : R::PER_WARP;
    const auto within = [](int value, int end) { return static_cast<unsigned>(value) < static_cast<unsigned>(end); };
    T* y = nullptr;
    [[maybe_unused]] long long to_state = 0;
    int next_line = 0;
    bool stores = false;
    if constexpr (VERTICAL) {
        const int j = position - reach.low;
        y = global_memory(static_cast<T*>(p.y.data)) + at.batch * p.y.batch + at.index * p.y.direction +
            (BACKWARDS ? p.height - 1 - at.first : at.first) * p.y.row + at.start + j + channel * p.y.group;
        next_line = static_cast<int>(BACKWARDS ? -p.y.row : p.y.row);
        if constexpr (R::STATE) to_state = static_cast<T*>(p.state.data) - static_cast<T*>(p.y.data);
        // Own positions are whole vectors.
        stores = j >= 0 && j < reach.owned && channel < p.channels && !idle;
    }
    constexpr int TOGETHER = PLACES & (PLACES - 1) ? 1 : PLACES < 4 ? PLACES : 4;  // positions that are all at an edge or none
    // Bytes into a box, and into u's: of a halo's positions those of some other, since y is not theirs.
    int part[PLACES], part_of_share[R::U ? PLACES : 1] = {};
    const auto in_share = [&](int j, int end) { return j < 0 ? 0 : j < end ? j : end; };
    const auto part_of = [&](int span, int from, int k) {
        return VERTICAL ? R::row_part(span, plane, 0, from) : R::column_part(span, plane, from + k, 0);
    };
#pragma unroll
    for (int k = 0; k < PLACES; ++k) {
        part[k] = part_of(R::SPAN, position, k);
        if constexpr (R::U) {
            const int j = position - reach.low;
            part_of_share[k] = VERTICAL ? part_of(R::SHARE, in_share(j, R::SHARE - PLACES), 0) : part_of(R::SHARE, in_share(j + k, R::SHARE - 1), 0);
        }
    }

    // x, lam and u: of each position all lines of a chunk or, VERTICAL, all positions of LOOK lines.
    struct Taken {
        Words<T, LENGTH> x[VECTORS], lam[R::LAM ? VECTORS : 1], u[R::U ? VECTORS : 1];
    };
    const auto read = [&](Words<T, LENGTH>& words, int which, int vector, int line, const ChunkTurn<R>& turn) {
        const unsigned char* const box = R::box(turn.stage.stage, which);
        const int place = turn.place(BACKWARDS), vector_of_line = VERTICAL ? 0 : vector;
        const bool of_share = R::U && which == R::U_TILE;
        const int first = of_share ? part_of_share[R::U ? vector_of_line : 0] : part[vector_of_line];
        if constexpr (VERTICAL) {
            words.load(box + first + (place * CHUNK + (BACKWARDS ? CHUNK - 1 - line : line)) * (of_share ? R::SHARE : R::SPAN) * R::SIZE);
        } else {
            words.load(box + (first ^ place * 16));
        }
    };
    Taken taken;
    const auto take_vector = [&](int v, int line, const ChunkTurn<R>& turn) {
        read(taken.x[v], 0, v, line, turn);
        if constexpr (R::LAM) read(taken.lam[v], R::LAM_TILE, v, line, turn);
        if constexpr (R::U) read(taken.u[v], R::U_TILE, v, line, turn);
    };
    // A chunk or, VERTICAL, its first LOOK lines.
    const auto take = [&](const ChunkTurn<R>& turn) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) take_vector(v, v, turn);
    };
    // Of the line that is scanned and, read before that is done, of the next.
    OuterWeights<T, PLACES> weights[2];
    const auto weigh = [&](const ChunkTurn<R>& turn, int s) {
        weights[s % 2].load(R::weights(turn.slot.stage) + R::weight(s, SETS > 1 ? plane : 0, position));
    };

    const auto has_taken = [&](const ChunkTurn<R>& turn) {
        if (!VERTICAL && turn.ends()) warp_arrives(R::taken(turn.stage.stage));
    };

    float h[PLACES] = {};
    const int stages = planes.stages[VERTICAL];
    ChunkTurn<R> turn(at, p);
    signal_wait(R::full(turn.stage.stage), turn.stage.parity);
    signal_wait(R::ready(turn.slot.stage), turn.slot.parity);
    weigh(turn, 0);
    take(turn);
    has_taken(turn);
    for (int n = 0; n < chunks; ++n) {
        const int stage = turn.stage.stage, place = turn.place(BACKWARDS);
        const bool more = n + 1 < chunks;
        ChunkTurn<R> next = turn;
        next.next(stages);
        const auto get = [&](const auto& from, int s, int k, T added) {
            return from[VERTICAL ? s % LOOK : k].template get<R::BIAS>(VERTICAL ? k : BACKWARDS ? CHUNK - 1 - s : s, added);
        };
        if constexpr (CLUSTER > 1) {
            const int exchange = n / (HALO / CHUNK);
            if (n > 0 && n % (HALO / CHUNK) == 0) {
                const int parity = (exchange - 1) / 2 & 1;
                if (reach.from_low) {
                    if (thread % 32 == 0) signal_expect(R::arrived(exchange, 0, warp), channels * HALO * 4);
                    signal_wait(R::arrived(exchange, 0, warp), parity);
                }
                if (reach.from_high) {
                    if (thread % 32 == 0) signal_expect(R::arrived(exchange, 1, warp), channels * reach.from_high * 4);
                    signal_wait(R::arrived(exchange, 1, warp), parity);
                }
                const int first = again(position), beyond = first - reach.low - reach.owned;
                const float* const low = R::inbox(exchange, 0) + plane * HALO + first;
                const float* const high = R::inbox(exchange, 1) + plane * HALO + beyond;
#pragma unroll
                for (int k = 0; k < PLACES; ++k) {
                    if (first + k < reach.from_low) h[k] = low[k];
                    if (within(beyond + k, reach.from_high)) h[k] = high[k];
                }
            }
        }
        const int left = lines - n * CHUNK;
        unsigned result[VERTICAL ? 1 : PLACES][4];
        float before_last[PLACES];
        [[maybe_unused]] unsigned kept[R::STATE && !VERTICAL ? PLACES : 1][4];
        [[maybe_unused]] float kept_last[PLACES];
        // A line of a position that is one of a chunk.
        const auto leave = [](unsigned (&words)[4], float& last, int s, float value) {
            const int e = BACKWARDS ? CHUNK - 1 - s : s;
            if constexpr (sizeof(T) == 4) {
                words[e] = float_as_bits(value);
            } else {
                if (s % 2) words[e / 2] = from_floats(T{}, BACKWARDS ? value : last, BACKWARDS ? last : value);
                last = value;
            }
        };
#pragma unroll
        for (int s = 0; s < CHUNK; ++s) {
            // Keeps the compiler from reading many lines' weights at once, for which there are no registers.
            if (!VERTICAL && PLACES >= 5) warp_barrier();
            float lower = shuffle_up(h[PLACES - 1]);
            const float higher = shuffle_down(h[0]);
            // Behind the shuffles, which take longer than to find that there is nothing to wait for.
            if (more && s == CHUNK - (VERTICAL ? LOOK : 1) && next.begins()) signal_wait(R::full(next.stage.stage), next.stage.parity);
            if (more && s == CHUNK - 1) signal_wait(R::ready(next.slot.stage), next.slot.parity);
            if (s + 1 < CHUNK) {
                weigh(turn, s + 1);
            } else if (more) {
                weigh(next, 0);
            }
            float w[3][PLACES];
            weights[s % 2].get(w);
            float out[PLACES];
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                float value = get(taken.x, s, k, bias[0]), keep = 0.f;
                if constexpr (R::LAM) {
                    keep = get(taken.lam, s, k, bias[1]);
                    value *= keep, keep = 1.f - keep;
                }
                const float before = h[k], high = k + 1 < PLACES ? h[k + 1 < PLACES ? k + 1 : 0] : higher;
                if constexpr (DECAY) {
                    h[k] = value + keep * (w[1][k] * before + w[0][k] * lower + w[2][k] * high);
                } else {
                    h[k] = w[2][k] * high + (w[0][k] * lower + (w[1][k] * before + value));
                }
                lower = before;
                out[k] = h[k];
                if constexpr (R::U) out[k] *= get(taken.u, s, k, bias[2]);
            }
            if constexpr (VERTICAL) {
                if (s + LOOK < CHUNK) {
                    take_vector(s % LOOK, s + LOOK, turn);
                } else if (more) {
                    take_vector(s % LOOK, s + LOOK - CHUNK, next);
                }
                store_if<T, PLACES>(stores && s < left, y, out);  // beyond the last line nothing reads h
                if constexpr (R::STATE) store_if<T, PLACES>(stores && s < left, y + to_state, h);
                y += next_line;
            } else {
#pragma unroll
                for (int k = 0; k < PLACES; ++k) {
                    leave(result[k], before_last[k], s, out[k]);
                    if constexpr (R::STATE) leave(kept[k], kept_last[k], s, h[k]);
                }
            }
        }
        if (!VERTICAL && more) {
            take(next);
            has_taken(next);
        }
        if constexpr (CLUSTER > 1) {
            const int after = n + 1, exchange = after / (HALO / CHUNK);
            if (after % (HALO / CHUNK) == 0 && more) {
                // A lane that is idle sends nothing.
                const int j = again(position) - reach.low, beyond = j - reach.owned, away = idle ? 1 << 20 : 0;
                const int to_low_end = !reach.from_low ? 0 : HALO < reach.owned ? HALO : reach.owned, to_high_end = reach.from_high ? HALO : 0;
                // (Of a neighbour that is not there nothing is asked.)
                const Remote to_low = remote(R::inbox(exchange, 1) + plane * HALO + j, R::arrived(exchange, 1, warp), reach.from_low ? at.rank - 1 : at.rank);
                const Remote to_high = remote(R::inbox(exchange, 0) + (plane + 1) * HALO + j - reach.owned, R::arrived(exchange, 0, warp), reach.from_high ? at.rank + 1 : at.rank);
#pragma unroll
                for (int k = 0; k < PLACES; k += TOGETHER) {
                    float values[TOGETHER];
#pragma unroll
                    for (int e = 0; e < TOGETHER; ++e) values[e] = h[k + e];
                    send_if(within(j + k + away, to_low_end), to_low, k, 0, values);
                    send_if(within(beyond + HALO + k + away, to_high_end), to_high, k, 0, values);
                }
            }
        }
        warp_arrives(R::used(turn.slot.stage));
        if constexpr (!VERTICAL) {
            if (!idle) {
#pragma unroll
                for (int k = 0; k < PLACES; ++k) {
                    alignas(16) const unsigned words[4] = {result[k][0], result[k][1], result[k][2], result[k][3]};
                    *reinterpret_cast<uint4*>(R::box(stage, 0) + (part[k] ^ place * 16)) = *reinterpret_cast<const uint4*>(words);
                    if constexpr (R::STATE) {
                        alignas(16) const unsigned state[4] = {kept[k][0], kept[k][1], kept[k][2], kept[k][3]};
                        const int j = position + k - reach.low;
                        if (j >= 0 && j < R::SHARE) {
                            *reinterpret_cast<uint4*>(R::box(stage, R::U_TILE) + (part_of_share[k] ^ place * 16)) = *reinterpret_cast<const uint4*>(state);
                        }
                    }
                }
            }
            if (turn.ends() || !more) {
                warp_arrives(R::done(stage));
            }
        } else if (turn.ends()) {
            warp_arrives(R::taken(stage));
        }
        turn = next;
    }
}

template <bool DECAY, int THREADS, bool KEEP, typename R>
GSPN2_DEVICE void scan_planes_along(const PlaneParams& planes, const Place& at) {
    constexpr bool VERTICAL = R::VERTICAL;
    constexpr int LINES = R::LINES, HALO = R::HALO, CLUSTER = R::CLUSTER;
    // (A way that no direction goes may leave none.)
    constexpr int REST = THREADS / 32 - BULK_SERVANTS - R::WARPS, NORMALIZERS = REST > 0 ? REST : 1;
    const int warp = warp_index(), stages = planes.stages[VERTICAL];
    const int rest = at.length - at.start - at.owned, batches = (at.last - at.first + LINES - 1) / LINES;
    // Shares and what is handed over are whole eights: what there is beyond the map is worth as much as a halo.
    const int owned = (at.owned + 7) / 8 * 8, higher = (rest + 7) / 8 * 8;
    // Two blocks have one neighbour each, so their spans have one halo.
    const int low = CLUSTER > 2 || (CLUSTER == 2 && at.rank > 0) ? HALO : 0;
    const Reach reach{low, owned, at.rank > 0 ? HALO : 0, higher < HALO ? higher : HALO};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < stages; ++stage) signal_init(R::full(stage));
        signals_ready();
        launch_before_is_done();
        // On its way before the block, or even the cluster, has met.
        if (at.owned) load_planes<KEEP, R>(planes, at, reach, 0, 1);
    }
    if (threadIdx.x >= 32 && threadIdx.x < 32 + MOST_STAGES) {
        const int stage = threadIdx.x - 32;
        signal_init(R::done(stage), R::WARPS * WARP_ARRIVALS);
        signal_init(R::taken(stage), R::WARPS * WARP_ARRIVALS);
        signal_init(R::empty(stage));
        if (stage < MOST_SLOTS) {
            signal_init(R::ready(stage), NORMALIZERS * WARP_ARRIVALS);
            signal_init(R::used(stage), R::WARPS * WARP_ARRIVALS);
        }
    }
    if constexpr (CLUSTER > 1) {
        for (int i = threadIdx.x - 32; i >= 0 && i < 4 * R::WARPS; i += blockDim.x - 32) signal_init(R::arrived(0, 0, 0) + i);
        cluster_ready();
    } else {
        signals_ready();
        block_barrier();
    }
    if (!at.owned) return;
    launch_before_is_done();
    const int thread = threadIdx.x - 32 * BULK_SERVANTS;
    if (warp == 0) {
        if (threadIdx.x == 0) load_planes<KEEP, R>(planes, at, reach, 1, batches);
    } else if (warp == 1) {
        if constexpr (!VERTICAL) {
            if (threadIdx.x == 32) store_planes<R>(planes, at, reach);
        }
    } else if (warp < BULK_SERVANTS + R::WARPS) {
        if (at.backwards) {
            scan_lines<DECAY, true, R>(planes, at, reach, thread);
        } else {
            scan_lines<DECAY, false, R>(planes, at, reach, thread);
        }
    } else if (planes.scan.softmax) {
        normalize_planes<true, 32 * NORMALIZERS, R>(planes, at, reach, thread - 32 * R::WARPS);
    } else {
        normalize_planes<false, 32 * NORMALIZERS, R>(planes, at, reach, thread - 32 * R::WARPS);
    }
}

// Channels of a slice, positions of a block, halos included, and of a lane, lines of a box and what a normalising lane does at once:
// for scans along rows, whose lines are columns, and along columns.
template <typename T, int WIDTH_ROWS, int WIDTH_COLUMNS, int SETS, int SPAN_ROWS, int SPAN_COLUMNS, int PLACES_ROWS, int PLACES_COLUMNS,
          int LINES_ROWS, int LINES_COLUMNS, int UNIT_ROWS, int UNIT_COLUMNS, int SLOTS, int HALO, int CLUSTER, int THREADS, bool MIXED,
          bool KEEP, int HAS, bool DECAY>
GSPN2_DEVICE void scan_planes(const PlaneParams& planes) {
    const Place at = find_place<CLUSTER, HALO, 8, MIXED>(planes.scan);
    // The whole cluster: this direction has fewer segments, or fewer slices.
    if (at.first >= at.last || at.slice * (at.horizontal ? WIDTH_ROWS : WIDTH_COLUMNS) >= planes.scan.channels) return;
    using Rows = PlaneRing<T, WIDTH_ROWS, SETS, SPAN_ROWS, PLACES_ROWS, LINES_ROWS, SLOTS, UNIT_ROWS, HALO, CLUSTER, HAS, false>;
    using Columns = PlaneRing<T, WIDTH_COLUMNS, SETS, SPAN_COLUMNS, PLACES_COLUMNS, LINES_COLUMNS, SLOTS, UNIT_COLUMNS, HALO, CLUSTER, HAS, true>;
    if (at.horizontal) {
        scan_planes_along<DECAY, THREADS, KEEP, Rows>(planes, at);
    } else {
        scan_planes_along<DECAY, THREADS, KEEP, Columns>(planes, at);
    }
}
