// What all kernels share: the three kinds of numbers, vector accesses, sums over a block.
//
// Arithmetic is in float32 whatever the numbers are kept in. A kernel's name ends on its numbers (_f32, _f16, _bf16);
// the form that ends on _single besides reads element by element, for widths that do not divide into vectors.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifdef __CUDACC_RTC__ // NVRTC has no headers of the system.
typedef unsigned char uint8_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define INFINITY __int_as_float(0x7f800000)
#else
#include <stdint.h>
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// N numbers that are read or written at once.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

// Where the CPU runs the kernels, a place that a GPU could not read as a vector ends the process.
#ifndef EMULATED
#define ALIGNED(PLACE, BYTES)
#endif

template <int N, typename T> __device__ __forceinline__ Pack<T, N> load(const T *p, uint64_t i) {
    ALIGNED(p, sizeof(T) * N);
    return reinterpret_cast<const Pack<T, N> *>(p)[i];
}

template <int N, typename T> __device__ __forceinline__ void store(T *p, uint64_t i, const Pack<T, N> &x) {
    ALIGNED(p, sizeof(T) * N);
    reinterpret_cast<Pack<T, N> *>(p)[i] = x;
}

struct Sum {
    template <typename F> static __device__ __forceinline__ F join(F a, F b) { return a + b; }
};
struct Largest {
    static __device__ __forceinline__ float join(float a, float b) { return fmaxf(a, b); }
};

// Joins a number of each thread of a block, in a fixed order; all threads get the result.
template <typename Join, typename F> __device__ __forceinline__ F over_block(F x, F neutral) {
    __shared__ F parts[32];
    __shared__ F whole;
    for (int d = 16; d > 0; d /= 2) x = Join::join(x, __shfl_xor_sync(0xffffffff, x, d));
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads(); // The parts of an earlier call have been read.
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    if (warp == 0) {
        x = lane < warps ? parts[lane] : neutral;
        for (int d = 16; d > 0; d /= 2) x = Join::join(x, __shfl_xor_sync(0xffffffff, x, d));
        if (lane == 0) whole = x;
    }
    __syncthreads();
    return whole;
}

// M(suffix, type, vector width): a kernel for each kind of numbers, by vectors of 16 bytes and one by one.
#define FOR_NUMBERS(M)                                                                                                 \
    M(f32, float, 4)                                                                                                   \
    M(f32_single, float, 1)                                                                                            \
    M(f16, __half, 8)                                                                                                  \
    M(f16_single, __half, 1)                                                                                           \
    M(bf16, __nv_bfloat16, 8)                                                                                          \
    M(bf16_single, __nv_bfloat16, 1)

// The same, one by one only.
#define FOR_NUMBERS_SINGLE(M) M(f32, float) M(f16, __half) M(bf16, __nv_bfloat16)
