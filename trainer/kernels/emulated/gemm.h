// cuBLAS's strided batched product by rows, sum by sum.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

struct Matrix {
    uint64_t start, stride, step;
    uint32_t dtype, transposed; // 0 float32, 1 float16, 2 bfloat16.
};

inline float read(const Matrix &m, uint64_t at) {
    switch (m.dtype) {
    case 0: return reinterpret_cast<const float *>(m.start)[at];
    case 1: return __half2float(reinterpret_cast<const __half *>(m.start)[at]);
    default: return __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(m.start)[at]);
    }
}

inline void write(const Matrix &m, uint64_t at, float x) {
    switch (m.dtype) {
    case 0: reinterpret_cast<float *>(m.start)[at] = x; break;
    case 1: reinterpret_cast<__half *>(m.start)[at] = __float2half_rn(x); break;
    default: reinterpret_cast<__nv_bfloat16 *>(m.start)[at] = __float2bfloat16_rn(x);
    }
}

inline uint64_t place(const Matrix &m, uint64_t batch, uint64_t row, uint64_t column) {
    return batch * m.step + (m.transposed ? column * m.stride + row : row * m.stride + column);
}

extern "C" void gemm(const uint64_t *size, const Matrix *a, const Matrix *b, const Matrix *c, float alpha, float beta) {
    for (uint64_t batch = 0; batch < size[3]; batch++)
        for (uint64_t i = 0; i < size[0]; i++)
            for (uint64_t j = 0; j < size[1]; j++) {
                float sum = 0;
                for (uint64_t k = 0; k < size[2]; k++) sum += read(*a, place(*a, batch, i, k)) * read(*b, place(*b, batch, k, j));
                const uint64_t at = place(*c, batch, i, j);
                write(*c, at, alpha * sum + (beta == 0.0f ? 0.0f : beta * read(*c, at)));
            }
}
