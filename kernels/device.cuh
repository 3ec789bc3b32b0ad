// The few machine operations that the scan uses, behind plain functions: everything above this file is ordinary C++.
// No CUDA header is included, so NVRTC needs no toolkit; a host build supplies the same functions in "emulation.h".
#pragma once

#if defined(__CUDACC__)

#define GSPN2_DEVICE __device__ __forceinline__

extern __shared__ __align__(1024) unsigned char gspn2_shared[];

GSPN2_DEVICE unsigned char* shared_memory() { return gspn2_shared; }

// Says that a pointer is one to global memory, so that the compiler need not find out at every access.
template <typename T>
GSPN2_DEVICE T* global_memory(T* pointer) {
    unsigned long long address;
    asm("cvta.to.global.u64 %0, %1;" : "=l"(address) : "l"(pointer));
    return reinterpret_cast<T*>(__cvta_global_to_generic(address));
}

GSPN2_DEVICE void block_barrier() { __syncthreads(); }
GSPN2_DEVICE void warp_barrier() { __syncwarp(); }

// The same value. What is made of it is made here, each time, and not kept in registers from before a loop.
GSPN2_DEVICE int again(int value) {
    int result;
    asm volatile("mov.u32 %0, %1;" : "=r"(result) : "r"(value));
    return result;
}

// The value of another lane of the warp; all 32 lanes call it.
GSPN2_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
// The warp's index, for branches that a whole warp takes: from a shuffle the compiler knows that it does.
GSPN2_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }
// Of the lane before and after; the first and the last lane get their own.
GSPN2_DEVICE float shuffle_up(float value) { return __shfl_up_sync(0xffffffffu, value, 1); }
GSPN2_DEVICE float shuffle_down(float value) { return __shfl_down_sync(0xffffffffu, value, 1); }
GSPN2_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Of two launches of which the second follows the first (Launch, in gspn2_diffusion/ops/cuda.py): the second's blocks may begin once
// all of the first have called this, or ended; what the first leaves in memory is there after `launch_before_is_done`.
#if __CUDA_ARCH__ >= 900
GSPN2_DEVICE void next_launch_may_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
GSPN2_DEVICE void launch_before_is_done() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
GSPN2_DEVICE void next_launch_may_begin() {}
GSPN2_DEVICE void launch_before_is_done() {}
#endif

// An mbarrier in shared memory: a phase ends when `count` threads have arrived and all bytes that they expect are there. For what
// a line's edge waits for in a cluster (sending says nothing about the sender's other stores, so it does not wait for them, as
// a cluster's barrier would), for what the copy engine brings, and between the warps of a block.
struct Signal {
    unsigned long long bits;
};

// A tensor and the box of it that the copy engine moves at once, encoded by the driver.
struct alignas(64) TensorMap {
    unsigned long long words[16];
};

// For what the second-level cache is to keep longer than other lines.
GSPN2_DEVICE unsigned long long kept() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

#if __CUDA_ARCH__ >= 900
GSPN2_DEVICE unsigned shared_address(const void* shared) { return static_cast<unsigned>(__cvta_generic_to_shared(shared)); }
GSPN2_DEVICE unsigned peer_address(const void* shared, int rank) {
    unsigned peer;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(shared_address(shared)), "r"(rank));
    return peer;
}
GSPN2_DEVICE void signal_init(Signal* signal, int count = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(signal)), "r"(count) : "memory");
}
// The block's signals are there for the copy engine too, once the block has met.
GSPN2_DEVICE void signals_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// All blocks of the cluster have initialised their shared memory.
GSPN2_DEVICE void cluster_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
GSPN2_DEVICE void signal_expect(Signal* signal, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(signal)), "r"(bytes) : "memory");
}
GSPN2_DEVICE void signal_arrive(Signal* signal) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(signal)) : "memory");
}
GSPN2_DEVICE void signal_wait(Signal* signal, int parity) {
    unsigned done;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(shared_address(signal)), "r"(parity)
            : "memory");
    } while (!done);
}
// A place in another block's shared memory, and the signal there that counts what is sent to it.
struct Remote {
    unsigned data, signal;
};
GSPN2_DEVICE Remote remote(float* target, Signal* signal, int rank) { return {peer_address(target, rank), peer_address(signal, rank)}; }
// `values` to this many floats behind it, counted by the signal so many behind its own, if `condition`; without a branch.
template <int N>
GSPN2_DEVICE void send_if(bool condition, const Remote& to, int offset, int signal, const float (&values)[N]) {
    static_assert(N == 1 || N == 2 || N == 4, "one vector of words");
    const unsigned data = to.data + 4 * offset, on = to.signal + 8 * signal, sends = condition;
    if constexpr (N == 4) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %6, 0; @p st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5]; }" ::"r"(data),
                     "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(on), "r"(sends)
                     : "memory");
    } else if constexpr (N == 2) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %4, 0; @p st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3]; }" ::"r"(data),
                     "f"(values[0]), "f"(values[1]), "r"(on), "r"(sends)
                     : "memory");
    } else {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2]; }" ::"r"(data),
                     "f"(values[0]), "r"(on), "r"(sends)
                     : "memory");
    }
}
// Write `values` to the same place in the shared memory of block `rank` and count them on its `signal`.
template <int N>
GSPN2_DEVICE void send(float* target, const float (&values)[N], Signal* signal, int rank) {
    send_if(true, remote(target, signal, rank), 0, 0, values);
}
#define GSPN2_LOAD_BOX "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
// A map's box at these coordinates, channels fastest, into shared memory (128-byte aligned); zeros where the tensor has nothing.
// KEEP: the second-level cache keeps it longer than other lines.
template <bool KEEP = false>
GSPN2_DEVICE void load_box(void* to, const TensorMap& map, int channel, int position, int line, int direction, int batch, Signal* signal) {
    const unsigned target = shared_address(to), full = shared_address(signal);
    if constexpr (!KEEP) {
        asm volatile(GSPN2_LOAD_BOX " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(target), "l"(&map), "r"(full), "r"(channel), "r"(position), "r"(line),
                     "r"(direction), "r"(batch)
                     : "memory");
    } else {
        asm volatile(GSPN2_LOAD_BOX ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(target), "l"(&map), "r"(full), "r"(channel),
                     "r"(position), "r"(line), "r"(direction), "r"(batch), "l"(kept())
                     : "memory");
    }
}
#define GSPN2_STORE_BOX "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group"
// The way back, of what the tensor has.
template <bool KEEP = false>
GSPN2_DEVICE void store_box(const TensorMap& map, int channel, int position, int line, int direction, int batch, const void* from) {
    const unsigned source = shared_address(from);
    if constexpr (!KEEP) {
        asm volatile(GSPN2_STORE_BOX " [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map), "r"(source), "r"(channel), "r"(position), "r"(line),
                     "r"(direction), "r"(batch)
                     : "memory");
    } else {
        asm volatile(GSPN2_STORE_BOX ".L2::cache_hint [%0, {%2, %3, %4, %5, %6}], [%1], %7;" ::"l"(&map), "r"(source), "r"(channel), "r"(position),
                     "r"(line), "r"(direction), "r"(batch), "l"(kept())
                     : "memory");
    }
}
// Ends a group of this thread's boxes; until all but the last `LEFT` groups have been read from shared memory.
GSPN2_DEVICE void end_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int LEFT>
GSPN2_DEVICE void groups_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory"); }
// Until all of them are in memory, for whoever this thread tells.
GSPN2_DEVICE void groups_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// What this thread did in shared memory, or waited for, comes before what it has the copy engine do there. It waits for all that the
// thread has under way, so it is for threads that only load or store.
GSPN2_DEVICE void engine_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
GSPN2_DEVICE void signal_init(Signal*, int = 1) {}
GSPN2_DEVICE void signals_ready() {}
GSPN2_DEVICE void cluster_ready() {}
GSPN2_DEVICE void signal_expect(Signal*, int) {}
GSPN2_DEVICE void signal_arrive(Signal*) {}
template <bool KEEP = false>
GSPN2_DEVICE void load_box(void*, const TensorMap&, int, int, int, int, int, Signal*) {}
template <bool KEEP = false>
GSPN2_DEVICE void store_box(const TensorMap&, int, int, int, int, int, const void*) {}
GSPN2_DEVICE void end_group() {}
template <int LEFT>
GSPN2_DEVICE void groups_read() {}
GSPN2_DEVICE void groups_written() {}
GSPN2_DEVICE void engine_fence() {}
GSPN2_DEVICE void signal_wait(Signal*, int) {}
template <int N>
GSPN2_DEVICE void send(float*, const float (&)[N], Signal*, int) {}
struct Remote {
    unsigned data, signal;
};
GSPN2_DEVICE Remote remote(float*, Signal*, int) { return {}; }
template <int N>
GSPN2_DEVICE void send_if(bool, const Remote&, int, int, const float (&)[N]) {}
#endif

// One more, in global memory; what this thread, and who met it before, has done there comes before that for whoever finds it counted.
GSPN2_DEVICE void release_add(unsigned* count) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory"); }
GSPN2_DEVICE void wait_for_count(const unsigned* count, unsigned expected) {
    unsigned now;
    while (true) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
        if (now == expected) return;
        asm volatile("nanosleep.u32 200;");
    }
}

// A vector of words to global memory if `condition`; without a branch. KEEP: as above, of 16 bytes.
template <int WORDS, bool KEEP = false>
GSPN2_DEVICE void store_words_if(bool condition, void* to, const unsigned (&words)[WORDS]) {
    static_assert(WORDS == 1 || WORDS == 2 || WORDS == 4, "one vector");
    const unsigned stores = condition;
    if constexpr (KEEP) {
        static_assert(WORDS == 4, "of 16 bytes");
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %6; }" ::"l"(to),
                     "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(stores), "l"(kept())
                     : "memory");
    } else if constexpr (WORDS == 4) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"l"(to), "r"(words[0]), "r"(words[1]),
                     "r"(words[2]), "r"(words[3]), "r"(stores)
                     : "memory");
    } else if constexpr (WORDS == 2) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2}; }" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(stores)
                     : "memory");
    } else {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.b32 [%0], %1; }" ::"l"(to), "r"(words[0]), "r"(stores) : "memory");
    }
}

// 2^value. Two units in the last place; results below 1.2e-38 are 0.
GSPN2_DEVICE float fast_exp2(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}
GSPN2_DEVICE float smaller(float a, float b) { return fminf(a, b); }
GSPN2_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
GSPN2_DEVICE float fast_divide(float a, float b) {
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
    return a * reciprocal;
}

struct Half {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

GSPN2_DEVICE float to_float(float value) { return value; }
GSPN2_DEVICE float to_float(Half value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}
GSPN2_DEVICE float to_float(BFloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

// Both halves of a word.
GSPN2_DEVICE void to_floats(unsigned word, Half, float& low, float& high) {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(low), "=f"(high) : "r"(word));
}
GSPN2_DEVICE void to_floats(unsigned word, BFloat16, float& low, float& high) {
    low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
}

GSPN2_DEVICE float bits_as_float(unsigned bits) { return __uint_as_float(bits); }
GSPN2_DEVICE unsigned float_as_bits(float value) { return __float_as_uint(value); }

// A word's elements, each plus `value`, in their own type.
GSPN2_DEVICE unsigned add_words(unsigned word, float value) { return __float_as_uint(__uint_as_float(word) + value); }
GSPN2_DEVICE unsigned add_words(unsigned word, Half value) {
    unsigned result;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(value.bits * 0x10001u));
    return result;
}
GSPN2_DEVICE unsigned add_words(unsigned word, BFloat16 value) {
#if __CUDA_ARCH__ >= 900
    unsigned result;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(value.bits * 0x10001u));
    return result;
#else
    return word;  // planes are scanned on Hopper only
#endif
}

// The products of two words' elements, in their own type: as float32's, rounded once.
GSPN2_DEVICE unsigned multiply_words(unsigned a, unsigned b, float) { return __float_as_uint(__uint_as_float(a) * __uint_as_float(b)); }
GSPN2_DEVICE unsigned multiply_words(unsigned a, unsigned b, Half) {
    unsigned result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
GSPN2_DEVICE unsigned multiply_words(unsigned a, unsigned b, BFloat16) {
#if __CUDA_ARCH__ >= 900
    unsigned result;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
#else
    return a;  // planes are scanned on Hopper only
#endif
}

template <typename T>
GSPN2_DEVICE T from_float(float value);
template <>
GSPN2_DEVICE float from_float<float>(float value) { return value; }
template <>
GSPN2_DEVICE Half from_float<Half>(float value) {
    Half result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}
template <>
GSPN2_DEVICE BFloat16 from_float<BFloat16>(float value) {
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

// Two in a word.
GSPN2_DEVICE unsigned from_floats(Half, float low, float high) {
    unsigned result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
GSPN2_DEVICE unsigned from_floats(BFloat16, float low, float high) {
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

#else
#include "emulation.h"
#endif
