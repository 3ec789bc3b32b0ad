// A host's stand-in for one cluster of CUDA blocks, so that the kernels run, unchanged, where there is no GPU.
//
// Every thread is a fiber with its own stack; a barrier or a warp shuffle switches to the next one. The order in which
// fibers run changes at random each round, shared memory starts as NaN, and what a block sends to another arrives only when
// that one's signal is waited for: a missing barrier, a wait too few or an unwritten slot shows up as wrong values.
// Misaligned vector accesses, stores beyond shared memory and deadlocks are errors.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#define GSPN2_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)

namespace emulation {

inline void fail(const std::string& what) {
    std::fprintf(stderr, "emulation: %s\n", what.c_str());
    throw std::runtime_error(what);
}

struct Index {
    int x, y, z;
};

struct Barrier {
    int members = 0, arrived = 0, generation = 0;
};

// One mbarrier: threads and bytes that its phase still waits for, and what was sent and has not been looked at.
struct Mailbox {
    int count = 0, phase = 0, missing = 0;
    long bytes = 0;
    std::vector<std::function<void()>> sent;
};

struct Warp {
    Barrier meet;
    float values[32];
};

constexpr int GUARD = 1 << 16;

struct Block {
    Index index;
    std::vector<unsigned char> memory;  // shared memory, 1024-byte aligned, and a guard
    unsigned char* shared;
    Barrier barrier;
    std::vector<Warp> warps;
    std::map<std::ptrdiff_t, Mailbox> mailboxes;  // by their place in shared memory
};

struct Fiber {
    ucontext_t context;
    std::vector<unsigned char> stack;
    Block* block;
    int rank;
    Index thread;
    int linear;
    bool done = false;
    int cluster_ticket = 0;
    const Barrier* waits = nullptr;  // for this barrier's generation to pass
    int passed = 0;
    std::vector<std::vector<std::function<void()>>> groups;  // boxes on their way to memory
};

struct Machine {
    Index block_dim, grid_dim;
    std::vector<Block> blocks;
    std::vector<Fiber> fibers;
    Barrier cluster;
    Fiber* now = nullptr;
    ucontext_t scheduler;
    long progress = 0;
    int shared_bytes = 0;
    std::string error;
    std::function<void()> kernel;
};

inline Machine* machine = nullptr;

inline void yield() { swapcontext(&machine->now->context, &machine->scheduler); }

inline int arrive(Barrier& barrier) {
    const int generation = barrier.generation;
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.generation;
        ++machine->progress;
    }
    return generation;
}

inline void meet(Barrier& barrier) {
    const int generation = arrive(barrier);
    if (barrier.generation != generation) return;
    machine->now->waits = &barrier, machine->now->passed = generation;
    yield();
}

inline void check_aligned(const void* at, int bytes) {
    if (reinterpret_cast<std::uintptr_t>(at) % bytes) fail("misaligned access of " + std::to_string(bytes) + " bytes");
}

template <int BYTES>
struct Words {
    unsigned words[BYTES / 4];
    Words& operator=(const Words& other) {
        check_aligned(this, BYTES);
        check_aligned(&other, BYTES);
        std::memcpy(words, other.words, BYTES);
        return *this;
    }
};

inline void fiber_entry() {
    try {
        machine->kernel();
    } catch (const std::exception& error) {
        machine->error = error.what();
    }
    machine->now->done = true;
    ++machine->progress;
    while (true) yield();
}

}  // namespace emulation

#define threadIdx (emulation::machine->now->thread)
#define blockIdx (emulation::machine->now->block->index)
#define blockDim (emulation::machine->block_dim)
#define gridDim (emulation::machine->grid_dim)

using uint4 = emulation::Words<16>;
using uint2 = emulation::Words<8>;

GSPN2_DEVICE unsigned char* shared_memory() { return emulation::machine->now->block->shared; }

template <typename T>
GSPN2_DEVICE T* global_memory(T* pointer) { return pointer; }

GSPN2_DEVICE void block_barrier() { emulation::meet(emulation::machine->now->block->barrier); }
GSPN2_DEVICE void cluster_arrive() {
    auto& fiber = *emulation::machine->now;
    fiber.cluster_ticket = emulation::arrive(emulation::machine->cluster);
    ++emulation::machine->progress;
    emulation::yield();  // the others may go on before this thread does another thing
}
GSPN2_DEVICE void cluster_wait() {
    const int ticket = emulation::machine->now->cluster_ticket;
    while (emulation::machine->cluster.generation == ticket) emulation::yield();
}
template <typename T>
GSPN2_DEVICE T* cluster_peer(T* shared, int rank) {
    auto& fiber = *emulation::machine->now;
    const auto offset = reinterpret_cast<unsigned char*>(shared) - fiber.block->shared;
    return reinterpret_cast<T*>(fiber.block[rank - fiber.rank].shared + offset);
}

GSPN2_DEVICE int again(int value) { return value; }
GSPN2_DEVICE float shuffle(float value, int from) {
    auto& fiber = *emulation::machine->now;
    auto& warp = fiber.block->warps[fiber.linear / 32];
    warp.values[fiber.linear % 32] = value;
    emulation::meet(warp.meet);
    const float result = warp.values[from];
    emulation::meet(warp.meet);
    return result;
}
GSPN2_DEVICE float shuffle_up(float value) {
    const int lane = emulation::machine->now->linear % 32;
    return shuffle(value, lane > 0 ? lane - 1 : lane);
}
GSPN2_DEVICE float shuffle_down(float value) {
    const int lane = emulation::machine->now->linear % 32;
    return shuffle(value, lane < 31 ? lane + 1 : lane);
}
GSPN2_DEVICE int warp_index() { return emulation::machine->now->linear / 32; }
GSPN2_DEVICE void warp_barrier() { shuffle(0.f, 0); }
GSPN2_DEVICE float shuffle_xor(float value, int mask) { return shuffle(value, (emulation::machine->now->linear % 32) ^ mask); }

struct Signal {
    unsigned long long bits;
};

GSPN2_DEVICE emulation::Mailbox& mailbox(Signal* signal, int rank) {
    auto& fiber = *emulation::machine->now;
    return fiber.block[rank - fiber.rank].mailboxes[reinterpret_cast<unsigned char*>(signal) - fiber.block->shared];
}
GSPN2_DEVICE void signal_init(Signal* signal, int count = 1) {
    if (count < 1) emulation::fail("a signal that counts nobody");
    signal->bits = 0;
    mailbox(signal, emulation::machine->now->rank) = {count, 0, count};
}
GSPN2_DEVICE void signals_ready() {}
GSPN2_DEVICE void cluster_ready() {
    cluster_arrive();
    cluster_wait();
}
GSPN2_DEVICE void signal_arrive(Signal* signal) {
    auto& box = mailbox(signal, emulation::machine->now->rank);
    if (--box.missing < 0) emulation::fail("more arrived at a signal than it counts");
    ++emulation::machine->progress;
}
GSPN2_DEVICE void signal_expect(Signal* signal, int bytes) {
    mailbox(signal, emulation::machine->now->rank).bytes += bytes;
    signal_arrive(signal);
}
// The phase ends, and what was sent arrives, no earlier than somebody looks.
GSPN2_DEVICE void signal_wait(Signal* signal, int parity) {
    auto& box = mailbox(signal, emulation::machine->now->rank);
    if (!box.count) emulation::fail("a signal that was not initialised");
    while ((box.phase & 1) == parity) {
        if (!box.missing && box.bytes < 0) emulation::fail("more bytes arrived than expected");
        if (!box.missing && !box.bytes) {
            for (const auto& copy : box.sent) copy();
            box.sent.clear();
            box.missing = box.count, ++box.phase;
            ++emulation::machine->progress;
        } else {
            emulation::yield();
        }
    }
}
template <int N>
GSPN2_DEVICE void send(float* target, const float (&values)[N], Signal* signal, int rank) {
    auto& box = mailbox(signal, rank);
    float* const to = cluster_peer(target, rank);
    emulation::check_aligned(to, 4 * N);
    std::vector<float> sent(values, values + N);
    box.sent.push_back([=] { std::copy(sent.begin(), sent.end(), to); });
    box.bytes -= 4 * N;
    ++emulation::machine->progress;
}

struct Remote {
    float* data;
    Signal* signal;
    int rank;
};
GSPN2_DEVICE Remote remote(float* target, Signal* signal, int rank) { return {target, signal, rank}; }
template <int N>
GSPN2_DEVICE void send_if(bool condition, const Remote& to, int offset, int signal, const float (&values)[N]) {
    if (condition) send(to.data + offset, values, to.signal + signal, to.rank);
}
template <int WORDS, bool KEEP = false>
GSPN2_DEVICE void store_words_if(bool condition, void* to, const unsigned (&words)[WORDS]) {
    if (!condition) return;
    emulation::check_aligned(to, 4 * WORDS);
    std::memcpy(to, words, 4 * WORDS);
}

// What the tests put into the place of the driver's encoding: bytes, and elements of a box.
struct alignas(64) TensorMap {
    unsigned char* address;
    long long strides[4];
    int sizes[5], box[5], element, swizzle;
};

namespace emulation {

inline int box_bytes(const TensorMap& map) {
    int bytes = map.element;
    for (int extent : map.box) bytes *= extent;
    return bytes;
}

// The engine swaps 16-byte parts by bits of the address in shared memory: one, two or three of them.
inline unsigned char* swizzled(unsigned char* box, int place, int swizzle) {
    const auto at = reinterpret_cast<std::uintptr_t>(box) + place;
    return reinterpret_cast<unsigned char*>(at ^ (at >> 3 & ((1 << swizzle) - 1) << 4));
}

// Calls `each` with the place in the box and in memory (null outside of the tensor) of every row of elements.
template <typename F>
void for_box(const TensorMap& map, const int (&first)[5], const F& each) {
    for (int e = 0; e < box_bytes(map) / map.element; ++e) {
        int rest = e;
        unsigned char* memory = map.address;
        for (int d = 0; d < 5; ++d) {
            const int at = first[d] + rest % map.box[d];
            rest /= map.box[d];
            if (at < 0 || at >= map.sizes[d]) memory = nullptr;
            if (memory) memory += at * (d ? map.strides[d - 1] : map.element);
        }
        each(e * map.element, memory);
    }
}

}  // namespace emulation

template <bool KEEP = false>
GSPN2_DEVICE void load_box(void* to, const TensorMap& map, int channel, int position, int line, int direction, int batch, Signal* signal) {
    auto& box = mailbox(signal, emulation::machine->now->rank);
    emulation::check_aligned(to, 128);
    if (channel * map.element % 16) emulation::fail("a box that begins between 16 bytes");
    auto* const target = static_cast<unsigned char*>(to);
    const TensorMap from = map;
    box.sent.push_back([=] {
        emulation::for_box(from, {channel, position, line, direction, batch}, [&](int place, const unsigned char* memory) {
            for (int b = 0; b < from.element; ++b) *emulation::swizzled(target, place + b, from.swizzle) = memory ? memory[b] : 0;
        });
    });
    box.bytes -= emulation::box_bytes(map);
    ++emulation::machine->progress;
}
// Shared memory is read as late as it may be.
template <bool KEEP = false>
GSPN2_DEVICE void store_box(const TensorMap& map, int channel, int position, int line, int direction, int batch, const void* from) {
    emulation::check_aligned(from, 128);
    if (channel * map.element % 16) emulation::fail("a box that begins between 16 bytes");
    auto* const source = const_cast<unsigned char*>(static_cast<const unsigned char*>(from));
    const TensorMap to = map;
    emulation::machine->now->groups.back().push_back([=] {
        emulation::for_box(to, {channel, position, line, direction, batch}, [&](int place, unsigned char* memory) {
            if (memory) std::memcpy(memory, emulation::swizzled(source, place, to.swizzle), to.element);
        });
    });
}
GSPN2_DEVICE void end_group() { emulation::machine->now->groups.push_back({}); }
template <int LEFT>
GSPN2_DEVICE void groups_read() {
    auto& groups = emulation::machine->now->groups;  // the last one is open
    while (groups.size() > LEFT + 1) {
        for (const auto& copy : groups.front()) copy();
        groups.erase(groups.begin());
    }
}
GSPN2_DEVICE void groups_written() { groups_read<0>(); }
// Launches run one after another here: what one waits for is there, or never is.
GSPN2_DEVICE void release_add(unsigned* count) { ++*count; }
GSPN2_DEVICE void wait_for_count(const unsigned* count, unsigned expected) {
    if (*count != expected) emulation::fail("waiting for what was never counted");
}
GSPN2_DEVICE void engine_fence() {}
GSPN2_DEVICE void next_launch_may_begin() {}
GSPN2_DEVICE void launch_before_is_done() {}

GSPN2_DEVICE float fast_exp2(float value) { return std::exp2(value); }
GSPN2_DEVICE float smaller(float a, float b) { return std::fmin(a, b); }
GSPN2_DEVICE float larger(float a, float b) { return std::fmax(a, b); }
GSPN2_DEVICE float fast_divide(float a, float b) { return a / b; }

struct Half {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};
GSPN2_DEVICE float to_float(float value) { return value; }
GSPN2_DEVICE float to_float(Half value) {
    _Float16 result;
    std::memcpy(&result, &value, 2);
    return result;
}
GSPN2_DEVICE float to_float(BFloat16 value) {
    const unsigned bits = static_cast<unsigned>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
template <typename T>
GSPN2_DEVICE void to_floats(unsigned word, T, float& low, float& high) {
    low = to_float(T{static_cast<unsigned short>(word)}), high = to_float(T{static_cast<unsigned short>(word >> 16)});
}
template <typename T>
GSPN2_DEVICE T from_float(float value);
template <>
GSPN2_DEVICE float from_float<float>(float value) {
    return value;
}
template <>
GSPN2_DEVICE Half from_float<Half>(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    Half result;
    std::memcpy(&result, &half, 2);
    return result;
}
template <>
GSPN2_DEVICE BFloat16 from_float<BFloat16>(float value) {
    if (value != value) return {0x7fc0};
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <typename T>
GSPN2_DEVICE unsigned from_floats(T, float low, float high) {
    return from_float<T>(low).bits | static_cast<unsigned>(from_float<T>(high).bits) << 16;
}

GSPN2_DEVICE float bits_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
GSPN2_DEVICE unsigned float_as_bits(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
GSPN2_DEVICE unsigned add_words(unsigned word, float value) { return float_as_bits(bits_as_float(word) + value); }
template <typename T>
GSPN2_DEVICE unsigned add_words(unsigned word, T value) {
    float low, high;
    to_floats(word, value, low, high);
    return from_floats(value, low + to_float(value), high + to_float(value));
}
GSPN2_DEVICE unsigned multiply_words(unsigned a, unsigned b, float) { return float_as_bits(bits_as_float(a) * bits_as_float(b)); }
template <typename T>
GSPN2_DEVICE unsigned multiply_words(unsigned a, unsigned b, T type) {
    float low[2], high[2];
    to_floats(a, type, low[0], high[0]), to_floats(b, type, low[1], high[1]);
    return from_floats(type, low[0] * low[1], high[0] * high[1]);
}

namespace emulation {

// Run `kernel` for every block of the grid, one cluster after another. Returns "" or what went wrong.
inline std::string launch(std::function<void()> kernel, int grid, Index block_dim, int cluster, int shared_bytes, unsigned seed) {
    Machine state;
    machine = &state;
    state.kernel = std::move(kernel);
    state.block_dim = block_dim;
    state.grid_dim = {grid, 1, 1};
    state.shared_bytes = shared_bytes;
    const int threads = block_dim.x * block_dim.y * block_dim.z;
    state.blocks.resize(cluster);
    state.fibers.resize(cluster * threads);
    std::vector<int> order(cluster * threads);
    std::uint64_t random = seed * 2654435761u + 1;
    for (int first = 0; first < grid; first += cluster) {
        state.cluster = {cluster * threads, 0, 0};
        for (int rank = 0; rank < cluster; ++rank) {
            Block& block = state.blocks[rank];
            block.index = {first + rank, 0, 0};
            block.memory.assign(shared_bytes + 2 * GUARD, 0xff);
            block.shared = block.memory.data() + GUARD;
            block.shared -= reinterpret_cast<std::uintptr_t>(block.shared) % 1024;
            block.barrier = {threads, 0, 0};
            block.warps.assign((threads + 31) / 32, {});
            block.mailboxes.clear();
            for (int t = 0; t < threads; ++t) {
                Fiber& fiber = state.fibers[rank * threads + t];
                ++block.warps[t / 32].meet.members;
                if (fiber.stack.empty()) fiber.stack.resize(1 << 15);
                fiber.block = &block;
                fiber.rank = rank;
                fiber.linear = t;
                fiber.thread = {t % block_dim.x, t / block_dim.x % block_dim.y, t / block_dim.x / block_dim.y};
                fiber.done = false;
                fiber.waits = nullptr;
                fiber.groups.assign(1, {});
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = fiber.stack.size();
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, fiber_entry, 0);
                order[rank * threads + t] = rank * threads + t;
            }
        }
        for (int running = cluster * threads; running > 0 && state.error.empty();) {
            const long before = state.progress;
            running = 0;
            random = random * 6364136223846793005u + 1442695040888963407u;
            const int count = order.size(), offset = (random >> 33) % count;
            const bool reversed = random >> 62 & 1;
            for (int o = 0; o < count; ++o) {
                Fiber& fiber = state.fibers[(reversed ? count - 1 - o : o) + offset < count
                                                ? (reversed ? count - 1 - o : o) + offset
                                                : (reversed ? count - 1 - o : o) + offset - count];
                if (fiber.done) continue;
                ++running;
                if (fiber.waits && fiber.waits->generation == fiber.passed) continue;
                fiber.waits = nullptr;
                state.now = &fiber;
                swapcontext(&state.scheduler, &fiber.context);
            }
            if (running && state.progress == before) state.error = "deadlock: threads wait for one another";
        }
        for (const Block& block : state.blocks) {
            const auto written = [](unsigned char byte) { return byte != 0xff; };
            if (std::any_of(block.memory.data(), static_cast<const unsigned char*>(block.shared), written) ||
                std::any_of(static_cast<const unsigned char*>(block.shared) + shared_bytes,
                            block.memory.data() + block.memory.size(), written)) {
                state.error = "store outside shared memory";
            }
        }
        if (!state.error.empty()) break;
    }
    machine = nullptr;
    return state.error;
}

}  // namespace emulation
