// The backward scan from planes, from the last line to the first: g = u dy + (three transposed taps of the line after).
//
// Only g depends on the line after. So scanning lanes make nothing but g, from dy, u and the weights, and leave it, in the storage
// type, where they read u (dy, where there is no u). What follows from it, without any order, other warps do: du = h dy, a product of
// two stored values, rounded once, and so two elements an instruction; and dw[t] = the sum over the slice's channels of
// g[i, j] h[i-1, j+t], channel by channel in the registers of the lane that has these positions, so that no sum leaves a lane
// before it is complete and has been through the normaliser.
//
//     full (the engine's bytes) -> ready (a chunk's weights) -> scanned (its g) -> used (nobody needs the chunk's weights), done
//     (nor the stage's boxes; horizontally: g and du are there) -> empty (they have been read)
//
// A task is 16 bytes, for each of 32 lanes, of each channel: a chunk of lines of a position where a line is a column, positions of a
// line where it is a row. A slice that has only part of its group's channels writes a part of v[t] = w[t] (dw[t] - the sum of w dw),
// which are linear in dw and add up to zero, so two of the three: in the storage type, which loses less than the state has in it.
// The logits' gradients are (1 - w[t] (the sum of the sigmoids)) v[t].
// g goes to memory, and `finish_planes` makes of it dx, the sum over the directions of lam g, and dlam = x g: so neither x nor lam
// is needed here, and a slice has room for more channels. It also adds the parts and, for what directions share, the directions.
// One direction alone has no others to be added to: x and lam come in boxes of the share, and dx and dlam follow from g at once, which
// stays here.
#pragma once

#include "planes.cuh"

enum { HAS_INPUTS = 16, HAS_PARTS = 32 };  // one direction alone; slices have parts of a group's channels
enum { BACK_U, BACK_LOGITS, BACK_DY, BACK_H, BACK_G, BACK_DU, BACK_INPUTS, BACK_MAPS };

struct PlaneBackwardParams {
    TensorMap maps[2][BACK_MAPS];  // for scans along rows and along columns: (column, row, batch, plane, 1)
    Params scan;                   // its views only of g (as grad_lam) and gradients; planes apart by `group`
    const void* bias;              // of every plane
    unsigned* done;                // of every image and channel, who has left all g of it in memory; or none
    int lam, u, logits;            // their first planes; with inputs, g's view and map are of the gradients of x and lam
    int gates, dy;                 // planes from one direction's gates to the next one's; the same of dy
    int workers;                   // warps that make gradients
};

// SHARE: positions of SPAN without halos. KEEP: g, which is soon read again, stays in the second-level cache rather than the rest.
template <typename T, int WIDTH_, int SETS_, int SPAN_, int SHARE_, int PLACES_, int LINES_, int STAGES_, int SLOTS_, int UNIT_, int HALO_,
          int CLUSTER_, int THREADS, bool KEEP_, int HAS, bool VERTICAL_>
struct BackwardPlaneRing : PlaneBox<LINES_, sizeof(T)> {
    using Type = T;
    static constexpr int WIDTH = WIDTH_, SETS = SETS_ > 1 ? WIDTH_ : 1, SPAN = SPAN_, SHARE = SHARE_, PLACES = PLACES_, LINES = LINES_, STAGES = STAGES_;
    static constexpr int SLOTS = SLOTS_, UNIT = UNIT_, HALO = HALO_, CLUSTER = CLUSTER_;
    static constexpr bool VERTICAL = VERTICAL_, U = HAS & HAS_U, BIAS = HAS & HAS_BIAS, INPUTS = HAS & HAS_INPUTS, PARTS = HAS & HAS_PARTS;
    static constexpr bool KEEP = KEEP_ && !INPUTS;
    static constexpr int SIZE = sizeof(T), PART = 16 / SIZE, GRADS = PARTS ? 2 : 3;  // planes of a set
    static constexpr int CHUNK = !VERTICAL ? PART : LINES < 8 ? LINES : 8;
    static constexpr int CHUNKS = LINES / CHUNK, ROW = LINES * SIZE, PER_CHANNEL = SPAN / PLACES;
    static constexpr int PER_WARP = 32 / PER_CHANNEL, WARPS = (WIDTH + PER_WARP - 1) / PER_WARP;
    // Where registers are short, half of a chunk's lines of a position at a time.
    static constexpr bool HALVES = !VERTICAL && PLACES > (THREADS > 512 ? 2 : 4);
    static constexpr int TASK_LANES = CHUNK * SHARE / PART, TASKS = (TASK_LANES + 31) / 32;  // of a chunk
    static_assert(SETS_ == 1 || SETS_ >= WIDTH, "one for all channels or for each of the wider way's");
    static_assert(VERTICAL || (ROW & (ROW - 1)) == 0, "a chunk is some bits of its address");
    static_assert(PER_CHANNEL <= 32 && SPAN % 8 == 0 && SPAN % PLACES == 0, "a channel stays within a warp");
    static_assert(LINES % CHUNK == 0 && HALO % CHUNK == 0 && HALO % 8 == 0, "edges are exchanged between chunks");
    // Positions that a box has before the share.
    static constexpr int LOW = CLUSTER > 1 ? HALO : 0, H_LOW = CLUSTER > 1 ? 8 : 0, H_SPAN = SHARE + 2 * H_LOW;
    static_assert(SPAN == SHARE + 2 * LOW, "halos on both sides");
    using Weight = typename WeightOf<T>::type;
    static constexpr int COUNT = 3 * MOST_STAGES + 3 * MOST_SLOTS;
    static constexpr int SIGNALS = (COUNT + (CLUSTER > 1 ? 4 * WARPS : 0) + 1) / 2 * 16, INBOX = WIDTH * HALO;
    static constexpr int up(int bytes) { return (bytes + 1023) / 1024 * 1024; }
    static constexpr int HEADER = up(SIGNALS + (CLUSTER > 1 ? 4 * INBOX * 4 : 0));
    static constexpr int SLOT = CHUNK * SETS * SPAN, BOXES = HEADER + up(SLOTS * SLOT * (2 * SIZE + (PARTS ? 0 : 4)));
    static constexpr int tile(int span) { return up(WIDTH * LINES * span * SIZE); }
    static constexpr int DY_AT = 0, U_AT = tile(SPAN), H_AT = U_AT + U * tile(SPAN), X_AT = H_AT + tile(H_SPAN);
    static constexpr int LAM_AT = X_AT + INPUTS * tile(SHARE), TAPS_AT = LAM_AT + INPUTS * tile(SHARE);
    static constexpr int STAGE = TAPS_AT + up(3 * SETS * LINES * SPAN * SIZE);
    static constexpr int G_AT = U ? U_AT : DY_AT;
    // Bytes that arrive for a stage.
    static constexpr int LOADED = LINES * SIZE * (SPAN * (WIDTH * (1 + U) + 3 * SETS) + WIDTH * (H_SPAN + 2 * INPUTS * SHARE));

    GSPN2_DEVICE static Signal* signals() { return reinterpret_cast<Signal*>(shared_memory()); }
    GSPN2_DEVICE static Signal* full(int stage) { return signals() + stage; }
    GSPN2_DEVICE static Signal* done(int stage) { return signals() + MOST_STAGES + stage; }
    GSPN2_DEVICE static Signal* empty(int stage) { return signals() + 2 * MOST_STAGES + stage; }
    GSPN2_DEVICE static Signal* ready(int slot) { return signals() + 3 * MOST_STAGES + slot; }
    GSPN2_DEVICE static Signal* scanned(int slot) { return signals() + 3 * MOST_STAGES + MOST_SLOTS + slot; }
    GSPN2_DEVICE static Signal* used(int slot) { return signals() + 3 * MOST_STAGES + 2 * MOST_SLOTS + slot; }
    // Each warp waits for the edges of its own channels.
    GSPN2_DEVICE static Signal* arrived(int exchange, int side, int warp) {
        return signals() + COUNT + (2 * (exchange & 1) + side) * WARPS + warp;
    }
    GSPN2_DEVICE static float* inbox(int exchange, int side) {
        return reinterpret_cast<float*>(shared_memory() + SIGNALS) + (2 * (exchange & 1) + side) * INBOX;
    }
    GSPN2_DEVICE static unsigned char* box(int stage) { return shared_memory() + BOXES + stage * STAGE; }
    // Of a position: the weights as the forward's, and, where there are no parts, the sum of the sigmoids.
    GSPN2_DEVICE static Weight* weights(int slot) { return reinterpret_cast<Weight*>(shared_memory() + HEADER) + 2 * slot * SLOT; }
    GSPN2_DEVICE static float* sums(int slot) { return reinterpret_cast<float*>(weights(SLOTS)) + slot * SLOT; }
    GSPN2_DEVICE static int sum(int line, int set, int position) { return (line * SETS + set) * SPAN + position; }
    GSPN2_DEVICE static int weight(int line, int set, int position) { return 2 * sum(line, set, position); }
};

// Lines in memory, from the scan's last to its first: upwards where the scan goes backwards. Boxes begin at `low` and whole boxes
// from there, so that what they have beyond the map is at its end: there dy is 0, and g stays 0.
struct BackwardLines {
    bool ascending;
    int low, high;
    GSPN2_DEVICE BackwardLines(const Place& at, const Params& p) : ascending(at.backwards) {
        const int all = at.horizontal ? p.width : p.height;
        low = ascending ? all - at.last : at.first, high = ascending ? all - at.first : at.last;
    }
    GSPN2_DEVICE int batches(int lines) const { return (high - low + lines - 1) / lines; }
    GSPN2_DEVICE int box(int batch, int lines) const { return low + (ascending ? batch : batches(lines) - 1 - batch) * lines; }
};

template <typename R>
GSPN2_DEVICE void load_backward_planes(const PlaneBackwardParams& planes, const Place& at, int batch, int end) {
    constexpr bool VERTICAL = R::VERTICAL;
    const Params& p = planes.scan;
    const BackwardLines lines(at, p);
    const TensorMap* const maps = planes.maps[VERTICAL];
    const int channel = at.slice * R::WIDTH, position = at.start - R::LOW;
    const int logits = planes.logits + 3 * (at.index * p.groups + channel / (p.channels / p.groups));
    Turn turn{0, 0};
    for (int n = 0; n < batch; ++n) turn.next(R::STAGES);
    for (; batch < end; ++batch, turn.next(R::STAGES)) {
        const int stage = turn.stage, line = lines.box(batch, R::LINES);
        Signal* const full = R::full(stage);
        if (batch >= R::STAGES) {
            signal_wait(VERTICAL ? R::done(stage) : R::empty(stage), turn.parity ^ 1);
            engine_fence();
        }
        signal_expect(full, R::LOADED);
        const auto load = [&](int to, int map, int from, int plane) {
            plane_box(R::box(stage) + to, maps[map], VERTICAL, line, from, at.batch, plane, full);
        };
        load(R::TAPS_AT, BACK_LOGITS, position, logits);
        load(R::DY_AT, BACK_DY, position, at.index * planes.dy + channel);
        if constexpr (R::U) load(R::U_AT, BACK_U, position, planes.u + at.index * planes.gates + channel);
        load(R::H_AT, BACK_H, at.start - R::H_LOW, at.index * p.channels + channel);
        if constexpr (R::INPUTS) {
            load(R::X_AT, BACK_INPUTS, at.start, channel);
            load(R::LAM_AT, BACK_INPUTS, at.start, planes.lam + channel);
        }
    }
}

// All g of the slice that the caller (and who met it) leaves in memory is there: `finish_planes` may wait for that.
template <typename R>
GSPN2_DEVICE void tell_done(const PlaneBackwardParams& planes, const Place& at, int first, int step) {
    if (!planes.done) return;
    const int slice = at.slice * R::WIDTH, all = planes.scan.channels, count = all - slice < R::WIDTH ? all - slice : R::WIDTH;
    for (int c = first; c < count; c += step) release_add(planes.done + at.batch * all + slice + c);
}

// Of scans along rows.
template <typename R>
GSPN2_DEVICE void store_backward_planes(const PlaneBackwardParams& planes, const Place& at) {
    const BackwardLines lines(at, planes.scan);
    const int batches = lines.batches(R::LINES), first = at.slice * R::WIDTH, all = planes.scan.channels;
    const int count = all - first < R::WIDTH ? all - first : R::WIDTH;
    Turn turn{0, 0};
    for (int batch = 0; batch < batches; ++batch, turn.next(R::STAGES)) {
        const int line = lines.box(batch, R::LINES);
        const unsigned char* const box = R::box(turn.stage);
        signal_wait(R::done(turn.stage), turn.parity);
        engine_fence();
        for (int c = 0; c < count; ++c) {
            const int plane = at.index * all + first + c, offset = (c * R::SPAN + R::LOW) * R::ROW;
            const auto store = [&](int to, int from) {
                store_box<R::KEEP>(planes.maps[0][BACK_G], line, at.start, at.batch, to, 0, box + from);
            };
            if constexpr (R::INPUTS) {
                store(plane, R::X_AT + c * R::SHARE * R::ROW);
                store(planes.lam + plane, R::LAM_AT + c * R::SHARE * R::ROW);
            } else {
                store(plane, R::G_AT + offset);
            }
            if constexpr (R::U) store_box(planes.maps[0][BACK_DU], line, at.start, at.batch, plane, 0, box + R::DY_AT + offset);
        }
        end_group();
        groups_read<0>();
        signal_arrive(R::empty(turn.stage));
    }
    groups_written();
    tell_done<R>(planes, at, 0, 1);
}

// A position's weights and the sum of its sigmoids, from logits times LOG2_E; zeros beyond the map, from where nothing may come
// through an outer tap. (Through the middle one, which is what is left of 1, only g = 0 would.)
template <bool SOFTMAX>
GSPN2_DEVICE void weigh(float (&four)[4], const float (&logit)[3], int j, int length) {
    const bool inside = j >= 0 && j < length;
    float weight[3];
    const float sum = normalize_scaled(weight, logit, j > 0, j < length - 1, SOFTMAX);
#pragma unroll
    for (int t = 0; t < 3; ++t) four[t] = inside ? weight[t] : 0.f;
    four[3] = inside ? sum : 0.f;
}

template <bool SOFTMAX, typename R>
GSPN2_DEVICE void weigh_planes(const PlaneBackwardParams& planes, const Place& at, int thread, int threads) {
    using T = typename R::Type;
    constexpr bool VERTICAL = R::VERTICAL;
    constexpr int SETS = R::SETS, UNIT = R::UNIT, ALONG = VERTICAL ? R::SPAN / UNIT : R::SPAN, ACROSS = VERTICAL ? R::CHUNK : R::CHUNK / UNIT;
    const Params& p = planes.scan;
    const BackwardLines lines(at, p);
    const int chunks = lines.batches(R::LINES) * R::CHUNKS;
    const int first = 3 * (at.index * p.groups + at.slice * R::WIDTH / (p.channels / p.groups));
    const auto bias = [&](int plane) {
        if constexpr (!R::BIAS) return 0.f;
        const int logit = first + plane, all = 3 * p.count * p.groups;  // a ragged slice's last sets belong to nobody
        return LOG2_E * to_float(global_memory(static_cast<const T*>(planes.bias))[planes.logits + (logit < all ? logit : all - 1)]);
    };
    float shared[3];
#pragma unroll
    for (int t = 0; t < 3; ++t) shared[t] = bias(t);
    Turn turn{0, 0}, slot{0, 0};
    int chunk = 0;
    for (int n = 0; n < chunks; ++n) {
        if (chunk == 0) signal_wait(R::full(turn.stage), turn.parity);
        if (n >= R::SLOTS) signal_wait(R::used(slot.stage), slot.parity ^ 1);
        const unsigned char* const taps = R::box(turn.stage) + R::TAPS_AT;
        typename R::Weight* const weights = R::weights(slot.stage);
        float* const sums = R::sums(slot.stage);
        const int place = lines.ascending ? chunk : R::CHUNKS - 1 - chunk;
        for (int unit = thread; unit < SETS * ALONG * ACROSS; unit += threads) {
            const int along = unit % ALONG, rest = unit / ALONG, across = rest % ACROSS, set = rest / ACROSS;
            const int position = VERTICAL ? along * UNIT : along;
            float read[3][UNIT], made[3][UNIT], sum[UNIT];
#pragma unroll
            for (int t = 0; t < 3; ++t) {
                int offset;
                if constexpr (VERTICAL) {
                    offset = R::row_part(R::SPAN, 3 * set + t, place * R::CHUNK + (lines.ascending ? across : R::CHUNK - 1 - across), position);
                } else {
                    offset = R::column_part(R::SPAN, 3 * set + t, position, place) + across * UNIT * R::SIZE;
                }
                load_vector<T, UNIT>(read[t], reinterpret_cast<const T*>(taps + offset));
                const float added = SETS > 1 ? bias(3 * set + t) : shared[t];
#pragma unroll
                for (int e = 0; e < UNIT; ++e) read[t][e] = LOG2_E * read[t][e] + added;
            }
#pragma unroll
            for (int e = 0; e < UNIT; ++e) {
                const float logit[3] = {read[0][e], read[1][e], read[2][e]};
                float four[4];
                weigh<SOFTMAX>(four, logit, at.start + position + (VERTICAL ? e : 0) - R::LOW, at.length);
#pragma unroll
                for (int t = 0; t < 3; ++t) made[t][e] = four[t];
                sum[e] = four[3];
            }
            if constexpr (VERTICAL) {
                OuterWeights<T, UNIT>::store(weights + R::weight(across, set, position), made);
                if constexpr (!R::PARTS) store_vector<float, UNIT>(sums + R::sum(across, set, position), sum);
            } else {
#pragma unroll
                for (int e = 0; e < UNIT; ++e) {
                    const int in_memory = across * UNIT + e, line = lines.ascending ? in_memory : R::CHUNK - 1 - in_memory;
                    OuterWeights<T, 1>::store(weights + R::weight(line, set, position), made, e);
                    if constexpr (!R::PARTS) sums[R::sum(line, set, position)] = sum[e];
                }
            }
        }
        warp_arrives(R::ready(slot.stage));
        slot.next(R::SLOTS);
        if (++chunk == R::CHUNKS) chunk = 0, turn.next(R::STAGES);
    }
}

template <bool ASCENDING, typename R>
GSPN2_DEVICE void scan_back(const PlaneBackwardParams& planes, const Place& at, const Reach& reach, int thread) {
    using T = typename R::Type;
    constexpr bool VERTICAL = R::VERTICAL;
    constexpr int WIDTH = R::WIDTH, SETS = R::SETS, HALO = R::HALO, CLUSTER = R::CLUSTER;
    constexpr int CHUNK = R::CHUNK, PLACES = R::PLACES, VECTORS = VERTICAL ? CHUNK : PLACES;
    const Params& p = planes.scan;
    const int chunks = BackwardLines(at, p).batches(R::LINES) * R::CHUNKS;
    // Beyond its warp's channels a lane does again what the last of them does, but writes nothing.
    const int lane = thread % 32, warp = thread / 32, last = R::PER_WARP * R::PER_CHANNEL - 1, own = lane < last ? lane : last;
    const int wanted = warp * R::PER_WARP + own / R::PER_CHANNEL, plane = wanted < WIDTH ? wanted : WIDTH - 1;
    const int position = own % R::PER_CHANNEL * PLACES;
    const bool idle = lane > last || wanted >= WIDTH;

    [[maybe_unused]] T bias{};  // of u
    if constexpr (R::BIAS && R::U) {
        const int channel = at.slice * WIDTH + plane, gate = at.index * planes.gates + (channel < p.channels ? channel : p.channels - 1);
        bias = global_memory(static_cast<const T*>(planes.bias))[planes.u + gate];
    }
    constexpr bool HALVES = R::HALVES;
    constexpr int AT_ONCE = HALVES ? CHUNK / 2 : CHUNK;
    // What of a lane's positions comes from the lower and the higher neighbour, and goes to them, a bit for each of PLACES.
    enum { FROM_LOW = 0, FROM_HIGH = 8, TO_LOW = 16, TO_HIGH = 24 };
    unsigned edges = 0;
    Remote to_low{}, to_high{};
    constexpr int OTHER = 2 * R::INBOX;
    constexpr int TOGETHER = PLACES & (PLACES - 1) ? 1 : PLACES < 4 ? PLACES : 4;
    [[maybe_unused]] const int channels = WIDTH - warp * R::PER_WARP < R::PER_WARP ? WIDTH - warp * R::PER_WARP : R::PER_WARP;
    if constexpr (CLUSTER > 1) {
        static_assert(PLACES <= 8, "eight bits for each of four");
#pragma unroll
        for (int k = 0; k < PLACES; ++k) {
            const int j = position + k - HALO, beyond = j - reach.owned;
            edges |= (position + k < reach.from_low) << (FROM_LOW + k);
            edges |= (beyond >= 0 && beyond < reach.from_high) << (FROM_HIGH + k);
            const bool sends = j >= 0 && j < reach.owned && !idle;
            edges |= (sends && reach.from_low && j < HALO) << (TO_LOW + k);
            edges |= (sends && reach.from_high && j >= reach.owned - HALO) << (TO_HIGH + k);
        }
        const int j = position - HALO;
        if (reach.from_low) to_low = remote(R::inbox(0, 1) + plane * HALO + j, R::arrived(0, 1, warp), at.rank - 1);
        if (reach.from_high) to_high = remote(R::inbox(0, 0) + (plane + 1) * HALO + j - reach.owned, R::arrived(0, 0, warp), at.rank + 1);
    }
    // Nothing comes from beyond a channel's ends; a lane there is handed what another channel's has.
    const float from_lower = position > 0, from_higher = position + PLACES < R::SPAN;
    int part[PLACES];  // bytes into the boxes of SPAN positions
#pragma unroll
    for (int k = 0; k < PLACES; ++k) part[k] = VERTICAL ? R::row_part(R::SPAN, plane, 0, position) : R::column_part(R::SPAN, plane, position + k, 0);
    // An idle lane is not to read what another one writes, g. In the place of u it reads dy; without u, it has read before the other
    // one writes. (Its values are finite, where those that it is a copy of are: some are multiplied by zero.)
    [[maybe_unused]] const int away = idle ? R::DY_AT - R::U_AT : 0;
    const auto all_have_read = [] {
        if constexpr (!R::U && (R::PER_WARP * R::PER_CHANNEL < 32 || WIDTH % R::PER_WARP)) warp_barrier();
    };

    float passed[PLACES] = {};  // of the line after, g, and the taps that it goes through
    OuterWeights<T, PLACES> of_passed{};
    Turn turn{0, 0}, slot{0, 0};
    int chunk = 0;
    for (int n = 0; n < chunks; ++n) {
        unsigned char* const box = R::box(turn.stage);
        const int place = ASCENDING ? chunk : R::CHUNKS - 1 - chunk;
        // Where a line's positions, or a position's lines, are: a vector of them for each line, or position.
        const auto at_vector = [&](int v) {
            return VERTICAL ? part[0] + (place * CHUNK + (ASCENDING ? v : CHUNK - 1 - v)) * R::SPAN * R::SIZE : part[VERTICAL ? 0 : v] ^ place * 16;
        };
        const auto get = [&](const auto& from, int s, int k) { return VERTICAL ? from[s].get(k) : from[k].get((ASCENDING ? s : CHUNK - 1 - s) % AT_ONCE); };
        if (chunk == 0) signal_wait(R::full(turn.stage), turn.parity);
        // Lines of their own are read one ahead: what is stored between them could be what is read next, for all that the compiler knows.
        using Taken = Words<T, VERTICAL ? PLACES : AT_ONCE>;
        Taken dy[VECTORS], u[R::U ? VECTORS : 1];
        const auto take = [&](int v, int half = ASCENDING ? 0 : 1) {
            const unsigned char* const from = box + at_vector(v) + (HALVES ? 8 * half : 0);
            dy[v].load(from + R::DY_AT);
            if constexpr (R::U) u[v].load(from + R::U_AT + away);
            if constexpr (R::BIAS && R::U) u[v].add(bias);
        };
#pragma unroll
        for (int v = 0; v < (VERTICAL ? 1 : VECTORS); ++v) take(v);
        signal_wait(R::ready(slot.stage), slot.parity);
        if constexpr (CLUSTER > 1) {
            const int exchange = n / (HALO / CHUNK);
            if (n > 0 && n % (HALO / CHUNK) == 0) {
                if (reach.from_low) {
                    if (lane == 0) signal_expect(R::arrived(exchange, 0, warp), HALO * channels * 4);
                    signal_wait(R::arrived(exchange, 0, warp), (exchange - 1) / 2 & 1);
                }
                if (reach.from_high) {
                    if (lane == 0) signal_expect(R::arrived(exchange, 1, warp), reach.from_high * channels * 4);
                    signal_wait(R::arrived(exchange, 1, warp), (exchange - 1) / 2 & 1);
                }
                const float* const low = R::inbox(exchange, 0) + plane * HALO + position;
                const float* const high = R::inbox(exchange, 1) + plane * HALO + position - HALO - reach.owned;
#pragma unroll
                for (int k = 0; k < PLACES; ++k) {
                    if (edges >> (FROM_LOW + k) & 1) passed[k] = low[k];
                    if (edges >> (FROM_HIGH + k) & 1) passed[k] = high[k];
                }
            }
        }
        const auto* const weights = R::weights(slot.stage) + R::weight(0, SETS > 1 ? plane : 0, position);
        unsigned result[VERTICAL ? 1 : PLACES][4];
        float before_last[PLACES];
#pragma unroll
        for (int s = 0; s < CHUNK; ++s) {
            if (VERTICAL && s + 1 < CHUNK) take(s + 1 < CHUNK ? s + 1 : s);
            if (HALVES && s == AT_ONCE) {
#pragma unroll
                for (int v = 0; v < VECTORS; ++v) take(v, ASCENDING ? 1 : 0);
            }
            float weight[3][PLACES];
            of_passed.get(weight);
            // This line's are not needed before the next one.
            of_passed.load(weights + R::weight(s, 0, 0));
            const float lower = shuffle_up(weight[2][PLACES - 1] * passed[PLACES - 1]), higher = shuffle_down(weight[0][0] * passed[0]);
            float g[PLACES];
#pragma unroll
            for (int k = 0; k < PLACES; ++k) {
                g[k] = get(dy, s, k);
                if constexpr (R::U) g[k] *= get(u, s, k);
                g[k] += weight[1][k] * passed[k];
                if (k > 0) g[k] += weight[2][k > 0 ? k - 1 : 0] * passed[k > 0 ? k - 1 : 0];
                if (k + 1 < PLACES) g[k] += weight[0][k + 1 < PLACES ? k + 1 : 0] * passed[k + 1 < PLACES ? k + 1 : 0];
            }
            g[0] += from_lower * lower;
            g[PLACES - 1] += from_higher * higher;
            if constexpr (VERTICAL) {
                all_have_read();
                if (!idle) store_vector<T, PLACES>(reinterpret_cast<T*>(box + R::G_AT + at_vector(s)), g);
            } else {
                const int e = ASCENDING ? s : CHUNK - 1 - s;
#pragma unroll
                for (int k = 0; k < PLACES; ++k) {
                    if constexpr (sizeof(T) == 4) {
                        result[k][e] = float_as_bits(g[k]);
                    } else {
                        if (s % 2) result[k][e / 2] = from_floats(T{}, ASCENDING ? before_last[k] : g[k], ASCENDING ? g[k] : before_last[k]);
                        before_last[k] = g[k];
                    }
                }
                if (HALVES && s % AT_ONCE == AT_ONCE - 1) {
                    const int half = e / AT_ONCE;
                    all_have_read();
#pragma unroll
                    for (int k = 0; k < PLACES; ++k) {
                        alignas(8) const unsigned words[2] = {result[k][2 * half], result[k][2 * half + 1]};
                        if (!idle) *reinterpret_cast<uint2*>(box + R::G_AT + at_vector(k) + 8 * half) = *reinterpret_cast<const uint2*>(words);
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < PLACES; ++k) passed[k] = g[k];
        }
        if constexpr (CLUSTER > 1) {
            const int after = n + 1, exchange = after / (HALO / CHUNK);
            if (after % (HALO / CHUNK) == 0 && after < chunks) {
                const int odd = exchange & 1;
#pragma unroll
                for (int k = 0; k < PLACES; k += TOGETHER) {
                    float values[TOGETHER];
#pragma unroll
                    for (int e = 0; e < TOGETHER; ++e) values[e] = passed[k + e];
                    send_if(edges >> (TO_LOW + k) & 1, to_low, odd * OTHER + k, 2 * odd * R::WARPS, values);
                    send_if(edges >> (TO_HIGH + k) & 1, to_high, odd * OTHER + k, 2 * odd * R::WARPS, values);
                }
            }
        }
        if constexpr (!VERTICAL && !HALVES) {
            all_have_read();
            if (!idle) {
#pragma unroll
                for (int k = 0; k < PLACES; ++k) {
                    alignas(16) const unsigned words[4] = {result[k][0], result[k][1], result[k][2], result[k][3]};
                    *reinterpret_cast<uint4*>(box + R::G_AT + at_vector(k)) = *reinterpret_cast<const uint4*>(words);
                }
            }
        }
        warp_arrives(R::scanned(slot.stage));
        slot.next(R::SLOTS);
        if (++chunk == R::CHUNKS) chunk = 0, turn.next(R::STAGES);
    }
}

// Sixteen bytes of two tensors, multiplied.
template <typename T, int N>
GSPN2_DEVICE Words<T, N> product(const Words<T, N>& a, const Words<T, N>& b) {
    Words<T, N> result;
#pragma unroll
    for (int w = 0; w < Words<T, N>::COUNT; ++w) result.words[w] = multiply_words(a.words[w], b.words[w], T{});
    return result;
}

// The gradients of u, of the logits and, with inputs, of x and lam where g is there; along columns all of them to memory, and g, where
// there are no inputs. Task by task, shared out among `wanted` warps: no more than there are tasks in all slots, or one could come to a
// slot a whole turn before its time, which a parity does not tell.
template <bool ASCENDING, typename R>
GSPN2_DEVICE void make_gradients(const PlaneBackwardParams& planes, const Place& at, int thread, int wanted) {
    using T = typename R::Type;
    constexpr bool VERTICAL = R::VERTICAL;
    constexpr int CHUNK = R::CHUNK, PART = R::PART, WIDTH = R::WIDTH;
    using Vector = Words<T, PART>;
    const Params& p = planes.scan;
    const BackwardLines lines(at, p);
    const int chunks = lines.batches(R::LINES) * R::CHUNKS, lane = thread % 32, slice = at.slice * R::WIDTH;
    const int count = p.channels - slice < R::WIDTH ? p.channels - slice : R::WIDTH, group = slice / (p.channels / p.groups);
    const int warps = wanted < R::SLOTS * R::TASKS ? wanted : R::SLOTS * R::TASKS;
    if (thread / 32 >= warps) return;
    const auto begin = [&](const View& view, long long plane) {
        const long long first = VERTICAL ? at.start : static_cast<long long>(at.start) * p.width;
        return global_memory(static_cast<T*>(view.data)) + at.batch * view.batch + at.index * view.direction + plane * view.group + first;
    };
    const int parts = R::SETS > 1 ? 1 : (p.channels / p.groups + WIDTH - 1) / WIDTH;  // slices of a group
    T* const grad_logits = begin(p.grad_logits, R::GRADS * group) + at.slice % parts * p.part_stride;
    [[maybe_unused]] T *g_planes = nullptr, *grad_u = nullptr;  // that lanes write
    [[maybe_unused]] const long long to_lam = planes.lam * p.grad_lam.group;  // from a channel's plane for x to that for lam
    if constexpr (VERTICAL) {
        g_planes = begin(p.grad_lam, slice);
        if constexpr (R::U) grad_u = begin(p.grad_u, slice);
    }
    for (int task = thread / 32; task < chunks * R::TASKS; task += warps) {
        const int n = task / R::TASKS, unit = task % R::TASKS * 32 + lane;
        const int slot = n % R::SLOTS, batch = n / R::CHUNKS, stage = batch % R::STAGES, chunk = n % R::CHUNKS;
        // Whose h is the line before's: of the scan's first line nobody's.
        const bool ends = n + 1 == chunks, crosses = chunk == R::CHUNKS - 1;
        const int stage_before = !ends && crosses ? (batch + 1) % R::STAGES : stage, chunk_before = ends ? chunk : crosses ? 0 : chunk + 1;
        const auto place_of = [](int c) { return ASCENDING ? c : R::CHUNKS - 1 - c; };
        const int place = place_of(chunk), box_line = lines.box(batch, R::LINES);
        // A lane's first position of the share, its line of the chunk in the order of the scan, the first line in memory.
        constexpr int VECTORS = R::SHARE / PART;
        const int clipped = unit < R::TASK_LANES ? unit : R::TASK_LANES - 1;
        const int position = VERTICAL ? clipped % VECTORS * PART : clipped, s = VERTICAL ? clipped / VECTORS : 0;
        const auto row_of = [&](int c, int t) { return place_of(c) * CHUNK + (ASCENDING ? t : CHUNK - 1 - t); };
        const int row = VERTICAL ? row_of(chunk, s) : place * CHUNK, line = box_line + row;
        const bool active = unit < R::TASK_LANES && position < at.owned && line < lines.high;
        // Along rows gradients come to where something was read, and a lane without a task has another one's place.
        [[maybe_unused]] const bool reads = VERTICAL || R::TASK_LANES % 32 == 0 || unit < R::TASK_LANES;

        signal_wait(R::scanned(slot), n / R::SLOTS & 1);
        signal_wait(R::full(stage), batch / R::STAGES & 1);  // implied, but for what the engine wrote
        if (stage_before != stage) signal_wait(R::full(stage_before), (batch + 1) / R::STAGES & 1);

        unsigned char* const box = R::box(stage);
        const unsigned char* const box_before = R::box(stage_before);
        // Where this lane's part of a box of SPAN positions begins, and of the others; a channel's follows a whole plane later.
        const auto offset = [&](int span, int position_of_box, int place_of_box) {
            return VERTICAL ? R::row_part(span, 0, row, position_of_box) : R::column_part(span, 0, position_of_box, place_of_box);
        };
        unsigned char* const of_span = box + offset(R::SPAN, R::LOW + position, place);
        [[maybe_unused]] unsigned char* const of_share = box + offset(R::SHARE, position, place);
        const unsigned char* const of_h = box + offset(R::H_SPAN, R::H_LOW + position, place);
        // The line before's: of a row whole vectors and both neighbours; of a column, whose vectors are lines, what the one with the
        // next line has, at each of three positions.
        constexpr int STATES = VERTICAL ? 1 : 3;
        const unsigned char *of_before[STATES], *of_next[STATES];
        [[maybe_unused]] int lower = 0, higher = 0;
        bool none = ends;
        if constexpr (VERTICAL) {
            none = ASCENDING ? line + 1 >= lines.high : line <= lines.low;
            const int at_row = s + 1 < CHUNK ? row_of(chunk, s + 1) : ends ? row : row_of(chunk_before, 0);
            of_before[0] = of_next[0] = (s + 1 < CHUNK ? box : box_before) + R::H_AT + R::row_part(R::H_SPAN, 0, at_row, R::H_LOW + position);
            lower = R::H_LOW + position > 0 ? -R::SIZE : 0, higher = R::H_LOW + position + PART < R::H_SPAN ? 16 : 16 - R::SIZE;
        } else {
#pragma unroll
            for (int t = 0; t < 3; ++t) {
                const int wanted_position = R::H_LOW + position + t - 1, beyond = R::H_SPAN - 1;
                const int taken = wanted_position < 0 ? 0 : wanted_position < beyond ? wanted_position : beyond;
                of_before[t] = box + R::H_AT + offset(R::H_SPAN, taken, place);
                of_next[t] = box_before + R::H_AT + offset(R::H_SPAN, taken, place_of(chunk_before)) + (ASCENDING ? 0 : 16 - R::SIZE);
            }
        }
        // In memory a vector is part of a row; gradients' rows follow one another.
        const int pixel = VERTICAL ? line * p.width + position : position * p.width + line;
        [[maybe_unused]] T *to_g = g_planes + pixel, *to_u = grad_u + pixel;
        T* to_logits = grad_logits + pixel;
        float sum[3][PART] = {};
        // Through the normaliser to memory.
        const auto finish = [&](int set) {
            // A lane's vector is positions of a line or, along rows, lines of a position.
            constexpr int TOGETHER = VERTICAL ? PART : 1;
#pragma unroll
            for (int first = 0; first < PART; first += TOGETHER) {
                const int line = VERTICAL ? s : ASCENDING ? first : CHUNK - 1 - first;
                OuterWeights<T, TOGETHER> outer;
                float weight[3][TOGETHER], sigmoids[TOGETHER];
                outer.load(R::weights(slot) + R::weight(line, set, R::LOW + position));
                outer.get(weight);
                if constexpr (!R::PARTS) load_vector<float, TOGETHER>(sigmoids, R::sums(slot) + R::sum(line, set, R::LOW + position));
#pragma unroll
                for (int e = 0; e < TOGETHER; ++e) {
                    float mean = 0.f;
#pragma unroll
                    for (int t = 0; t < 3; ++t) mean += weight[t][e] * sum[t][first + e];
#pragma unroll
                    for (int t = 0; t < 3; ++t) {
                        const float w = weight[t][e], own = w * (sum[t][first + e] - mean);
                        sum[t][first + e] = VERTICAL && none ? 0.f : R::PARTS ? own : own * (1.f - w * sigmoids[e]);
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < 3; t += R::PARTS ? 2 : 1, to_logits += p.grad_logits.group) store_if<T, PART>(active, to_logits, sum[t]);
        };
#pragma unroll 2
        for (int c = 0; c < WIDTH; ++c) {
            if (c >= count) break;
            // From one channel's plane of a box to another's.
            const auto plane = [&](int span) { return c * R::LINES * span * R::SIZE; };
            Vector g, dy{}, h;
            g.load(of_span + R::G_AT + plane(R::SPAN));
            h.load(of_h + R::H_AT + plane(R::H_SPAN));
            if constexpr (R::U) {
                if (reads) dy.load(of_span + R::DY_AT + plane(R::SPAN));
            }
            [[maybe_unused]] Vector of_x{}, of_lam{};  // x and lam, then their gradients
            if constexpr (R::INPUTS) {
                if (reads) {
                    of_x.load(of_share + R::X_AT + plane(R::SHARE));
                    of_lam.load(of_share + R::LAM_AT + plane(R::SHARE));
                }
                if constexpr (R::BIAS) {
                    const T* const bias = global_memory(static_cast<const T*>(planes.bias)) + slice + c;
                    of_x.add(bias[0]), of_lam.add(bias[planes.lam]);
                }
                const Vector x = of_x;
                of_x = product(of_lam, g), of_lam = product(x, g);
            }
            float before[3][PART];  // h of the line before, at j - 1, j and j + 1
            if constexpr (VERTICAL) {
                const unsigned char* const from = of_before[0] + plane(R::H_SPAN);
                Vector middle;
                middle.load(from);
                const float edge[2] = {to_float(*reinterpret_cast<const T*>(from + lower)), to_float(*reinterpret_cast<const T*>(from + higher))};
#pragma unroll
                for (int e = 0; e < PART; ++e) before[1][e] = middle.get(e);
#pragma unroll
                for (int e = 0; e < PART; ++e) {
                    before[0][e] = e > 0 ? before[1][e > 0 ? e - 1 : 0] : edge[0];
                    before[2][e] = e + 1 < PART ? before[1][e + 1 < PART ? e + 1 : 0] : edge[1];
                }
            } else {
#pragma unroll
                for (int t = 0; t < 3; ++t) {
                    Vector own = h;
                    if (t != 1) own.load(of_before[t] + plane(R::H_SPAN));
                    const T next = *reinterpret_cast<const T*>(of_next[t] + plane(R::H_SPAN));
                    const float following = none ? 0.f : to_float(next);
#pragma unroll
                    for (int e = 0; e < PART; ++e) {
                        const int of = ASCENDING ? e + 1 : e - 1;
                        before[t][e] = of < 0 || of >= PART ? following : own.get(of < 0 || of >= PART ? 0 : of);
                    }
                }
            }
            Vector du;
            if constexpr (R::U) du = product(h, dy);
#pragma unroll
            for (int e = 0; e < PART; ++e) {
                const float passed = g.get(e);
#pragma unroll
                for (int t = 0; t < 3; ++t) sum[t][e] += passed * before[t][e];
            }
            if constexpr (VERTICAL) {
                store_words_if<4, R::KEEP>(active, to_g, R::INPUTS ? of_x.words : g.words);
                if constexpr (R::INPUTS) store_words_if<4>(active, to_g + to_lam, of_lam.words);
                to_g += p.grad_lam.group;
                if constexpr (R::U) store_words_if<4>(active, to_u, du.words), to_u += p.grad_u.group;
            } else if (active) {
                if constexpr (R::U) du.store(of_span + R::DY_AT + plane(R::SPAN));
                if constexpr (R::INPUTS) {
                    of_x.store(of_share + R::X_AT + plane(R::SHARE));
                    of_lam.store(of_share + R::LAM_AT + plane(R::SHARE));
                }
            }
            if constexpr (R::SETS > 1) {
                finish(c);
#pragma unroll
                for (int t = 0; t < 3; ++t) {
#pragma unroll
                    for (int e = 0; e < PART; ++e) sum[t][e] = 0.f;
                }
            }
        }
        if constexpr (R::SETS == 1) finish(0);
        warp_arrives(R::used(slot));
        if (threadIdx.x % 32 < WARP_ARRIVALS) {
            signal_arrive(R::done(stage));
            if (stage_before != stage) signal_arrive(R::done(stage_before));
        }
    }
    if constexpr (VERTICAL) {
        warp_barrier();
        tell_done<R>(planes, at, lane, 32);
    }
}

template <typename R>
GSPN2_DEVICE void scan_planes_back(const PlaneBackwardParams& planes, const Place& at) {
    constexpr bool VERTICAL = R::VERTICAL;
    constexpr int HALO = R::HALO, CLUSTER = R::CLUSTER;
    const int warp = warp_index(), workers = planes.workers, normalizers = blockDim.x / 32 - BULK_SERVANTS - R::WARPS - workers;
    const int rest = at.length - at.start - at.owned, batches = BackwardLines(at, planes.scan).batches(R::LINES);
    const int owned = (at.owned + 7) / 8 * 8, higher = (rest + 7) / 8 * 8;
    const Reach reach{R::LOW, owned, at.rank > 0 ? HALO : 0, higher < HALO ? higher : HALO};
    const int ahead = batches < R::STAGES ? batches : R::STAGES;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < R::STAGES; ++stage) signal_init(R::full(stage));
        signals_ready();
        launch_before_is_done();
        // On its way before the block, or even the cluster, has met.
        if (at.owned) load_backward_planes<R>(planes, at, 0, ahead);
    }
    if (threadIdx.x >= 32 && threadIdx.x < 32 + MOST_STAGES) {
        const int stage = threadIdx.x - 32;
        // The last chunk's tasks of the stage before read its first line of h, too.
        signal_init(R::done(stage), (R::CHUNKS + 1) * R::TASKS * WARP_ARRIVALS);
        signal_init(R::empty(stage));
        if (stage < MOST_SLOTS) {
            signal_init(R::ready(stage), normalizers * WARP_ARRIVALS);
            signal_init(R::scanned(stage), R::WARPS * WARP_ARRIVALS);
            signal_init(R::used(stage), R::TASKS * WARP_ARRIVALS);
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
        if (threadIdx.x == 0) {
            for (int i = 0; i < R::TASKS * WARP_ARRIVALS; ++i) signal_arrive(R::done(0));  // there is no stage before the first
            load_backward_planes<R>(planes, at, ahead, batches);
        }
    } else if (warp == 1) {
        if constexpr (!VERTICAL) {
            if (threadIdx.x == 32) store_backward_planes<R>(planes, at);
        }
    } else if (warp < BULK_SERVANTS + R::WARPS) {
        if (at.backwards) {
            scan_back<true, R>(planes, at, reach, thread);
        } else {
            scan_back<false, R>(planes, at, reach, thread);
        }
    } else if (warp < BULK_SERVANTS + R::WARPS + workers) {
        if (at.backwards) {
            make_gradients<true, R>(planes, at, thread - 32 * R::WARPS, workers);
        } else {
            make_gradients<false, R>(planes, at, thread - 32 * R::WARPS, workers);
        }
    } else if (planes.scan.softmax) {
        weigh_planes<true, R>(planes, at, thread - 32 * (R::WARPS + workers), 32 * normalizers);
    } else {
        weigh_planes<false, R>(planes, at, thread - 32 * (R::WARPS + workers), 32 * normalizers);
    }
}

// The sizes are those of `scan_planes`, and what a block has of a line without halos, and stages, for both ways.
template <typename T, int WIDTH_ROWS, int WIDTH_COLUMNS, int SETS, int SPAN_ROWS, int SPAN_COLUMNS, int SHARE_ROWS, int SHARE_COLUMNS,
          int PLACES_ROWS, int PLACES_COLUMNS, int LINES_ROWS, int LINES_COLUMNS, int UNIT_ROWS, int UNIT_COLUMNS, int STAGES_ROWS,
          int STAGES_COLUMNS, int SLOTS, int HALO, int CLUSTER, int THREADS, bool MIXED, bool KEEP, int HAS>
GSPN2_DEVICE void scan_planes_backward(const PlaneBackwardParams& planes) {
    next_launch_may_begin();
    const Place at = find_place<CLUSTER, HALO, 8, MIXED>(planes.scan);
    // The whole cluster: this direction has fewer segments, or fewer slices.
    if (at.first >= at.last || at.slice * (at.horizontal ? WIDTH_ROWS : WIDTH_COLUMNS) >= planes.scan.channels) return;
    using Rows = BackwardPlaneRing<T, WIDTH_ROWS, SETS, SPAN_ROWS, SHARE_ROWS, PLACES_ROWS, LINES_ROWS, STAGES_ROWS, SLOTS, UNIT_ROWS, HALO, CLUSTER, THREADS, KEEP, HAS, false>;
    using Columns = BackwardPlaneRing<T, WIDTH_COLUMNS, SETS, SPAN_COLUMNS, SHARE_COLUMNS, PLACES_COLUMNS, LINES_COLUMNS, STAGES_COLUMNS, SLOTS, UNIT_COLUMNS, HALO, CLUSTER, THREADS, KEEP, HAS, true>;
    if (at.horizontal) {
        scan_planes_back<Rows>(planes, at);
    } else {
        scan_planes_back<Columns>(planes, at);
    }
}

// Sums of planes that lie `apart` elements from one another; of none of them zeros. Or a direction's logits' gradients, from the
// sums of their parts.
struct PlaneSum {
    const void* from;
    void* to;
    long long vectors, apart;  // of 16 bytes, of three planes together for logits; elements
    int terms, logits;         // the logits' first plane, 0 for a plain sum
    int vertical;              // whether the direction is along columns
};

[[maybe_unused]] constexpr int MOST_SUMS = 6;

// What follows from g, and sums that have to wait for all of the scan.
struct PlaneFinish {
    PlaneSum sums[MOST_SUMS];
    const void* features;
    const void* bias;            // of every plane, or none
    const void* g;               // of every direction and channel, planes apart by `pixels`
    void* grad;                  // of features
    const unsigned* done;        // as PlaneBackwardParams has it: this launch begins before the scan has ended; or none
    long long apart, pixels;     // elements from one plane of features to the next, and of all others
    long long before, summed;    // threads before those for sums, and these
    unsigned expected;           // the count when all g of an image's channel is there
    unsigned vectors, channels;  // of 16 bytes, of an image's channel
    unsigned maps;               // images' channels; none if nothing follows from g
    int lam, shared;             // the first plane of lam; whether directions share it
    int height, width, softmax;
};

template <typename T>
GSPN2_DEVICE void add_planes(const PlaneSum& sum, long long index) {
    constexpr int PART = 16 / sizeof(T);
    const T* from = global_memory(static_cast<const T*>(sum.from)) + index * PART;
    float total[PART] = {};
#pragma unroll 8
    for (int term = 0; term < sum.terms; ++term, from += sum.apart) {
        float value[PART];
        load_vector<T, PART>(value, from);
#pragma unroll
        for (int e = 0; e < PART; ++e) total[e] += value[e];
    }
    store_vector<T, PART>(global_memory(static_cast<T*>(sum.to)) + index * PART, total);
}

template <typename T>
GSPN2_DEVICE void add_logits(const PlaneFinish& p, const PlaneSum& sum, long long index) {
    constexpr int PART = 16 / sizeof(T);
    const long long vectors = p.pixels / PART, set = index / vectors, place = (index - set * vectors) * PART;
    const T* from = global_memory(static_cast<const T*>(sum.from)) + 2 * set * p.pixels + place;
    const T* const features = global_memory(static_cast<const T*>(p.features)) + place;
    float read[3][PART], result[3][PART], outer[2][PART] = {};
#pragma unroll 4
    for (int term = 0; term < sum.terms; ++term, from += sum.apart) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            float value[PART];
            load_vector<T, PART>(value, from + side * p.pixels);
#pragma unroll
            for (int e = 0; e < PART; ++e) outer[side][e] += value[e];
        }
    }
#pragma unroll
    for (int t = 0; t < 3; ++t) {
        const long long plane = sum.logits + 3 * set + t;
        load_vector<T, PART>(read[t], features + plane * p.apart);
        const float bias = p.bias ? LOG2_E * to_float(global_memory(static_cast<const T*>(p.bias))[plane]) : 0.f;
#pragma unroll
        for (int e = 0; e < PART; ++e) read[t][e] = LOG2_E * read[t][e] + bias;
    }
    const unsigned row = static_cast<unsigned>(place / p.width), column = static_cast<unsigned>(place - static_cast<long long>(row) * p.width);
    const int length = sum.vertical ? p.width : p.height;
#pragma unroll
    for (int e = 0; e < PART; ++e) {
        const int j = sum.vertical ? column + e : row % p.height;
        const float logit[3] = {read[0][e], read[1][e], read[2][e]}, parts[3] = {outer[0][e], -outer[0][e] - outer[1][e], outer[1][e]};
        float weight[3];
        const float sigmoids = normalize_scaled(weight, logit, j > 0, j < length - 1, p.softmax);
#pragma unroll
        for (int t = 0; t < 3; ++t) result[t][e] = parts[t] * (1.f - weight[t] * sigmoids);
    }
#pragma unroll
    for (int t = 0; t < 3; ++t) store_vector<T, PART>(global_memory(static_cast<T*>(sum.to)) + (3 * set + t) * p.pixels + place, result[t]);
}

// 16 bytes of a channel: dx = the sum over the K directions of lam g, and dlam = x g (in the place of g, if that is where g is).
template <typename T, int K, bool LAM>
GSPN2_DEVICE void gradients_of_inputs(const PlaneFinish& p, int channel, long long place) {
    constexpr int PART = 16 / sizeof(T);
    using Vector = Words<T, PART>;
    const T* const features = global_memory(static_cast<const T*>(p.features)) + place;
    T* const grad = global_memory(static_cast<T*>(p.grad)) + place;
    Vector g[K], lam[LAM ? K : 1], x;
    const auto feature = [&](Vector& to, int plane) {
        to.load(features + plane * p.apart);
        if (p.bias) to.add(global_memory(static_cast<const T*>(p.bias))[plane]);
    };
    if constexpr (LAM) {
        feature(x, channel);
#pragma unroll
        for (int k = 0; k < K; ++k) feature(lam[k], p.lam + (p.shared ? 0 : k * p.channels) + channel);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) g[k].load(global_memory(static_cast<const T*>(p.g)) + place + (k * p.channels + channel) * p.pixels);
    float dx[PART] = {}, of_all[PART] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int e = 0; e < PART; ++e) {
            of_all[e] += g[k].get(e);
            if constexpr (LAM) dx[e] += lam[k].get(e) * g[k].get(e);
        }
    }
    store_vector<T, PART>(grad + channel * p.pixels, LAM ? dx : of_all);
    if constexpr (LAM) {
        T* const to = grad + (p.lam + channel) * p.pixels;
        if (p.shared) {
#pragma unroll
            for (int e = 0; e < PART; ++e) of_all[e] *= x.get(e);
            store_vector<T, PART>(to, of_all);
        } else {
#pragma unroll
            for (int k = 0; k < K; ++k) product(x, g[k]).store(to + k * p.channels * p.pixels);
        }
    }
}

// One thread for 16 bytes of a channel or of a sum. While others are still being scanned channels come in the order in which they are
// there, and sums, which wait for all of them, last. Else it is the other way round: of what was written last most is still in the
// second-level cache.
template <typename T, int K, bool LAM>
GSPN2_DEVICE void finish_planes(const PlaneFinish& p) {
    constexpr int PART = 16 / sizeof(T);
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const bool sums = index >= p.before && index < p.before + p.summed;
    // (One thread of those for sums has none: so this launch does not end before the scan.)
    if (!p.done || sums) launch_before_is_done();
    if (sums) {
        long long rest = index - p.before;
#pragma unroll 1
        for (int sum = 0; sum < MOST_SUMS; rest -= p.sums[sum++].vectors) {
            if (rest >= p.sums[sum].vectors) continue;
            return p.sums[sum].logits ? add_logits<T>(p, p.sums[sum], rest) : add_planes<T>(p.sums[sum], rest);
        }
        return;
    }
    const unsigned thread = static_cast<unsigned>(index < p.before ? index : index - p.summed), vectors = p.vectors, turn = thread / vectors;
    if (turn >= p.maps) return;
    const unsigned map = p.done ? turn : p.maps - 1 - turn, image = map / p.channels, vector = vectors - 1 - (thread - turn * vectors);
    if (p.done) wait_for_count(p.done + map, p.expected);
    gradients_of_inputs<T, K, LAM>(p, map - image * p.channels, (static_cast<long long>(image) * vectors + vector) * PART);
}
