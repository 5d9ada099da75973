// The instructions of tensor cores that take bfloat16, from sm_80 on: TENSOR_CORES says whether there are any.
//
// A lane of a warp holds of a 16x16 left operand, of a 16x8 right one and of a 16x8 result what PTX's documentation of
// mma.m16n8k16 says: rows lane / 4 and 8 more, columns lane % 4 · 2 and the next, and 8 more of each.
#pragma once
#include "common.cuh"

#ifdef EMULATED
#define TENSOR_CORES
#include "tensor_core_emulated.h"
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define TENSOR_CORES

// c += a · b for 16x16 by 16x8.
__device__ __forceinline__ void mma(float *c, const uint32_t *a, const uint32_t *b, __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float *c, const uint32_t *a, const uint32_t *b, __half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices from shared memory, of each of which a lane names one row.
__device__ __forceinline__ void load_matrices(uint32_t *r, const void *row) {
    const uint32_t place = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(place) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t *r, const void *row) {
    const uint32_t place = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(place) : "memory");
}

// The shared memory that a launch asks for.
__device__ __forceinline__ unsigned char *dynamic_shared() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

#endif
