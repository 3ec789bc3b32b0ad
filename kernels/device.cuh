// The few machine operations that the scan uses, behind plain functions: everything above this file is ordinary C++.
// No CUDA header is included, so NVRTC needs no toolkit; a host build supplies the same functions in "emulation.h".
#pragma once

#if defined(__CUDACC__)

#define GSPN2_DEVICE __device__ __forceinline__

extern __shared__ __align__(16) unsigned char gspn2_shared[];

GSPN2_DEVICE unsigned char* shared_memory() { return gspn2_shared; }

// Asynchronous copy of 4, 8 or 16 bytes from global to shared memory, aligned to its size.
template <int BYTES>
GSPN2_DEVICE void copy_async(void* shared, const void* global) {
    unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(BYTES) : "memory");
    }
}

// The first `bytes` (1 ... 4) of an aligned word; the rest of the word in shared memory becomes 0 and is not read.
GSPN2_DEVICE void copy_async_word(void* shared, const void* global, int bytes) {
    unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}

GSPN2_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all but the newest PENDING groups of this thread's copies have landed.
template <int PENDING>
GSPN2_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

GSPN2_DEVICE void block_barrier() { __syncthreads(); }

#if __CUDA_ARCH__ >= 900
GSPN2_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
GSPN2_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The same place in the shared memory of block `rank` of the cluster.
template <typename T>
GSPN2_DEVICE T* cluster_peer(T* shared, int rank) {
    T* peer;
    asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(shared), "r"(rank));
    return peer;
}
#else
GSPN2_DEVICE void cluster_arrive() {}
GSPN2_DEVICE void cluster_wait() {}
template <typename T>
GSPN2_DEVICE T* cluster_peer(T* shared, int) { return shared; }
#endif

GSPN2_DEVICE float shuffle_down(float value, int lanes) { return __shfl_down_sync(0xffffffffu, value, lanes); }

GSPN2_DEVICE float fast_exp(float value) { return __expf(value); }
GSPN2_DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }

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

#else
#include "emulation.h"
#endif
