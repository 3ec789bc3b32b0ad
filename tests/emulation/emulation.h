// A host's stand-in for one cluster of CUDA blocks, so that the kernels run, unchanged, where there is no GPU.
//
// Every thread is a fiber with its own stack; a barrier or a warp shuffle switches to the next one. The order in which
// fibers run changes at random each round, shared memory starts as NaN, and an asynchronous copy is carried out only when its
// thread waits for it (NaN until then): a missing barrier, a wait that is too short or an unwritten slot shows up as wrong
// values. Misaligned vector accesses and copies, stores beyond shared memory and deadlocks are errors.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define GSPN2_DEVICE inline
#define __global__
#define __launch_bounds__(...)
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

struct Copy {
    void* to;
    const void* from;
    int bytes, filled;
};

struct Warp {
    Barrier meet;
    float values[32];
};

constexpr int GUARD = 1 << 16;

struct Block {
    Index index;
    std::vector<unsigned char> memory;  // shared memory, 16-byte aligned, and a guard
    unsigned char* shared;
    Barrier barrier;
    std::vector<Warp> warps;
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
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
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
    while (barrier.generation == generation) yield();
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

inline void copy(void* shared, const void* global, int bytes, int filled) {
    const auto offset = static_cast<unsigned char*>(shared) - machine->now->block->shared;
    if (offset < 0 || offset + bytes > machine->shared_bytes) fail("asynchronous copy outside shared memory");
    check_aligned(shared, bytes);
    check_aligned(global, bytes);
    std::memset(shared, 0xff, bytes);
    machine->now->open.push_back({shared, global, filled, bytes});
}

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

template <int BYTES>
GSPN2_DEVICE void copy_async(void* shared, const void* global) {
    emulation::copy(shared, global, BYTES, BYTES);
}
GSPN2_DEVICE void copy_async_word(void* shared, const void* global, int bytes) { emulation::copy(shared, global, 4, bytes); }
GSPN2_DEVICE void copy_commit() {
    auto& fiber = *emulation::machine->now;
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int PENDING>
GSPN2_DEVICE void copy_wait() {
    auto& groups = emulation::machine->now->groups;
    while (groups.size() > PENDING) {
        for (const auto& c : groups.front()) {
            std::memcpy(c.to, c.from, c.bytes);
            std::memset(static_cast<unsigned char*>(c.to) + c.bytes, 0, c.filled - c.bytes);
        }
        groups.erase(groups.begin());
    }
}

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

GSPN2_DEVICE float shuffle_down(float value, int lanes) {
    auto& fiber = *emulation::machine->now;
    auto& warp = fiber.block->warps[fiber.linear / 32];
    const int lane = fiber.linear % 32;
    warp.values[lane] = value;
    emulation::meet(warp.meet);
    const float result = lane + lanes < 32 ? warp.values[lane + lanes] : value;
    emulation::meet(warp.meet);
    return result;
}

GSPN2_DEVICE float fast_exp(float value) { return std::exp(value); }
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
            block.shared -= reinterpret_cast<std::uintptr_t>(block.shared) % 16;
            block.barrier = {threads, 0, 0};
            block.warps.assign((threads + 31) / 32, {});
            for (int t = 0; t < threads; ++t) {
                Fiber& fiber = state.fibers[rank * threads + t];
                ++block.warps[t / 32].meet.members;
                if (fiber.stack.empty()) fiber.stack.resize(1 << 15);
                fiber.block = &block;
                fiber.rank = rank;
                fiber.linear = t;
                fiber.thread = {t % block_dim.x, t / block_dim.x % block_dim.y, t / block_dim.x / block_dim.y};
                fiber.done = false;
                fiber.groups.clear();
                fiber.open.clear();
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
