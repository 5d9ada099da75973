// NF4, as trainer/src/quant has it: blocks of 64 elements share a magnitude, two codes make a byte, the first in the
// high half.
#include "common.cuh"

constexpr uint32_t BLOCK = 64, NESTED_BLOCK = 256;

// A warp a block of the matrix, a lane two of its elements. `thresholds` are the midpoints between the codes' values.
template <typename T>
__device__ __forceinline__ void nf4_quantize(const T *x, const float *thresholds, uint8_t *codes, float *absmax, uint64_t count) {
    __shared__ float midpoints[15];
    if (threadIdx.x < 15) midpoints[threadIdx.x] = thresholds[threadIdx.x];
    __syncthreads();
    const uint64_t block = (blockIdx.x * (uint64_t)blockDim.x + threadIdx.x) / 32;
    const uint64_t first = block * BLOCK + threadIdx.x % 32 * 2;
    const float a = first < count ? to_float(x[first]) : 0.0f, b = first + 1 < count ? to_float(x[first + 1]) : 0.0f;
    float largest = fmaxf(fabsf(a), fabsf(b));
    for (int d = 16; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, d));
    if (first >= count) return;
    const float scale = largest > 0.0f ? __fdiv_rn(1.0f, largest) : 0.0f;
    const float p = __fmul_rn(a, scale), q = __fmul_rn(b, scale);
    uint32_t high = 0, low = 0;
    for (int i = 0; i < 15; i++) {
        high += p > midpoints[i];
        low += q > midpoints[i];
    }
    // A last element without a partner leaves its low half zero.
    codes[first / 2] = high << 4 | (first + 1 < count ? low : 0);
    if (threadIdx.x % 32 == 0) absmax[block] = largest;
}

// Double quantisation of the magnitudes, with the same bits as on the CPU. First the sum of each of their blocks, one
// magnitude after the other: a thread a block.
extern "C" __global__ void nf4_sums(const float *absmax, double *sums, uint64_t count) {
    const uint64_t block = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x;
    const uint64_t begin = block * NESTED_BLOCK, end = begin + NESTED_BLOCK < count ? begin + NESTED_BLOCK : count;
    if (begin >= count) return;
    double sum = 0;
    for (uint64_t i = begin; i < end; i++) sum += absmax[i];
    sums[block] = sum;
}

// Then their mean, one block's sum after the other: one thread.
extern "C" __global__ void nf4_mean(const double *sums, float *mean, uint64_t blocks, uint64_t count) {
    double sum = 0;
    for (uint64_t i = 0; i < blocks; i++) sum += sums[i];
    *mean = (float)(sum / (double)count);
}

// Then the codes of what they have above the mean, and the largest of it in each block: a block of as many threads. The
// table's 256 values ascend; a code is that of the nearest value, of two as near of the lower.
extern "C" __global__ void nf4_nest(const float *absmax, const float *mean, const float *table, uint8_t *codes, float *nested, uint64_t count) {
    __shared__ float values[NESTED_BLOCK];
    values[threadIdx.x] = table[threadIdx.x];
    const uint64_t i = blockIdx.x * (uint64_t)NESTED_BLOCK + threadIdx.x;
    const float x = i < count ? __fsub_rn(absmax[i], *mean) : 0.0f;
    const float largest = over_block<Largest>(fabsf(x), 0.0f); // All values are there after it.
    if (threadIdx.x == 0) nested[blockIdx.x] = largest;
    if (i >= count) return;
    const float share = __fmul_rn(x, largest > 0.0f ? __fdiv_rn(1.0f, largest) : 0.0f);
    uint32_t above = 0; // The first value that is not below it, the last if all are.
    for (uint32_t d = NESTED_BLOCK / 2; d > 0; d /= 2)
        if (values[above + d - 1] < share) above += d;
    above = above > 0 ? above : 1;
    codes[i] = __fsub_rn(share, values[above - 1]) <= __fsub_rn(values[above], share) ? above - 1 : above;
}

// Elements: 16 a thread where N is 16. With a table, magnitudes are table[scales[b]] · absmax[b / 256] + *offset.
template <typename T, int N>
__device__ __forceinline__ void nf4_dequantize(const uint8_t *codes, const float *values, const float *absmax, const uint8_t *scales, const float *table, const float *offset,
                                               T *out, uint64_t count) {
    __shared__ float code[16];
    if (threadIdx.x < 16) code[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    const uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x;
    if (i * N >= count) return;
    const uint64_t block = i * N / BLOCK;
    const float magnitude = table ? __fadd_rn(__fmul_rn(table[scales[block]], absmax[block / NESTED_BLOCK]), *offset) : absmax[block];
    if (N == 1) {
        const uint8_t byte = codes[i / 2];
        out[i] = from_float<T>(code[i % 2 ? byte & 15 : byte >> 4] * magnitude);
        return;
    }
    const auto bytes = load<8>(codes, i);
    constexpr int V = 16 / sizeof(T);
    Pack<T, V> part;
    for (int j = 0; j < 16; j++) {
        const uint8_t byte = bytes.v[j / 2];
        part.v[j % V] = from_float<T>(code[j % 2 ? byte & 15 : byte >> 4] * magnitude);
        if (j % V == V - 1) store<V>(out, i * (16 / V) + j / V, part);
    }
}

#define KERNELS(SUFFIX, T)                                                                                             \
    extern "C" __global__ void nf4_quantize_##SUFFIX(                                                                  \
        const T *x, const float *thresholds, uint8_t *codes, float *absmax, uint64_t count) {                          \
        nf4_quantize(x, thresholds, codes, absmax, count);                                                             \
    }                                                                                                                  \
    extern "C" __global__ void nf4_dequantize_##SUFFIX(                                                                \
        const uint8_t *codes, const float *values, const float *absmax, const uint8_t *scales, const float *table,     \
        const float *offset, T *out, uint64_t count) {                                                                 \
        nf4_dequantize<T, 16>(codes, values, absmax, scales, table, offset, out, count);                               \
    }                                                                                                                  \
    extern "C" __global__ void nf4_dequantize_##SUFFIX##_single(                                                       \
        const uint8_t *codes, const float *values, const float *absmax, const uint8_t *scales, const float *table,     \
        const float *offset, T *out, uint64_t count) {                                                                 \
        nf4_dequantize<T, 1>(codes, values, absmax, scales, table, offset, out, count);                                \
    }
FOR_NUMBERS_SINGLE(KERNELS)
