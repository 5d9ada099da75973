// Operations on many tensors in one launch: the optimizer's, and an adapter's copy in the numbers of a pass.
//
// table holds ROW numbers a tensor: where its operands lie, and last how many elements it has. work names for each
// block a tensor (high half) and which of its chunks (low half).
#include "common.cuh"

constexpr uint64_t CHUNK = 16384;

#define CHUNK_OF(ROW)                                                                                                  \
    const uint64_t *row = table + (work[blockIdx.x] >> 32) * (ROW);                                                    \
    const uint64_t begin = (work[blockIdx.x] & 0xffffffff) * CHUNK, all = row[(ROW) - 1];                              \
    const uint64_t end = begin + CHUNK < all ? begin + CHUNK : all;                                                    \
    for (uint64_t i = begin + threadIdx.x; i < end; i += blockDim.x)

// Rows: weight, gradient, first, second, the new weight, which decay and rate (0 to 2), elements. The moments are changed
// where they lie. The gradients' factor comes of the sum of their squares; where that or the sum of the losses' squares is
// not finite, the step is left out: nothing is written.
extern "C" __global__ void adamw(const uint64_t *table, const uint64_t *work, const double *squares, const double *losses, double divisor, double max_norm, float beta1,
                                 float beta2, float keep1, float keep2, float correction2, float epsilon, float decay0, float rate0, float decay1, float rate1, float decay2,
                                 float rate2) {
    const double norm = sqrt(*squares) / divisor;
    if (!(norm < INFINITY && *losses < INFINITY)) return;
    // As torch's clip_grad_norm_ has it.
    const double share = max_norm / (norm + 1e-6), clip = max_norm > 0 && share < 1 ? share : 1;
    const float factor = (float)(clip / divisor);
    CHUNK_OF(7) {
        const float decay = row[5] == 0 ? decay0 : row[5] == 1 ? decay1 : decay2;
        const float rate = row[5] == 0 ? rate0 : row[5] == 1 ? rate1 : rate2;
        float *first = (float *)row[2], *second = (float *)row[3];
        const float g = factor * ((const float *)row[1])[i];
        const float m = beta1 * first[i] + keep1 * g;
        const float v = beta2 * second[i] + keep2 * g * g;
        ((float *)row[4])[i] = decay * ((const float *)row[0])[i] - rate * m / (sqrtf(v) / correction2 + epsilon);
        first[i] = m;
        second[i] = v;
    }
}

// Rows: x, elements. The sum of each block's squares.
extern "C" __global__ void squares(const uint64_t *table, const uint64_t *work, double *sums) {
    double sum = 0;
    CHUNK_OF(2) {
        const double x = ((const float *)row[0])[i];
        sum += x * x;
    }
    sum = over_block<Sum>(sum, 0.0);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The sum of some numbers, by one block.
extern "C" __global__ void sum(const double *numbers, double *out, uint32_t count) {
    double all = 0;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) all += numbers[i];
    all = over_block<Sum>(all, 0.0);
    if (threadIdx.x == 0) *out = all;
}

// Rows: x, the copy, elements.
#define KERNELS(SUFFIX, T)                                                                                             \
    extern "C" __global__ void cast_##SUFFIX(const uint64_t *table, const uint64_t *work) {                            \
        CHUNK_OF(3) ((T *)row[1])[i] = from_float<T>(((const float *)row[0])[i]);                                      \
    }
FOR_NUMBERS_SINGLE(KERNELS)
