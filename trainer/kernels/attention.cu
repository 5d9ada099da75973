// The softmax of causal attention, forward and backward, between two matrix products. A block a row; blockIdx.y is
// the head. Scores are [heads, rows, keys]; row i of the block of queries sees `window` keys at
// most, the last of them first + i.
#include "common.cuh"

// probabilities = softmax of the scores that a row may see, zeros beyond.
template <typename T>
__device__ __forceinline__ void causal_softmax(const float *scores, T *probabilities, uint32_t keys, uint32_t first, uint32_t window) {
    const uint64_t row = blockIdx.y * (uint64_t)gridDim.x + blockIdx.x;
    const uint32_t end = min(keys, first + blockIdx.x + 1), begin = end > window ? end - window : 0;
    scores += row * keys, probabilities += row * keys;
    float top = -INFINITY;
    for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) top = fmaxf(top, scores[i]);
    top = over_block<Largest>(top, -INFINITY);
    float sum = 0;
    for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += expf(scores[i] - top);
    const float share = 1.0f / over_block<Sum>(sum, 0.0f);
    for (uint32_t i = threadIdx.x; i < keys; i += blockDim.x)
        probabilities[i] = from_float<T>(i >= begin && i < end ? expf(scores[i] - top) * share : 0.0f);
}

// probabilities become p · (dp − Σ p·dp) · scale, the gradient by the products of queries and keys.
template <typename T>
__device__ __forceinline__ void causal_softmax_backward(T *probabilities, const float *dp, uint32_t keys, uint32_t first, uint32_t window, float scale) {
    const uint64_t row = blockIdx.y * (uint64_t)gridDim.x + blockIdx.x;
    const uint32_t end = min(keys, first + blockIdx.x + 1), begin = end > window ? end - window : 0;
    probabilities += row * keys, dp += row * keys;
    float sum = 0;
    for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += to_float(probabilities[i]) * dp[i];
    const float mean = over_block<Sum>(sum, 0.0f);
    for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x)
        probabilities[i] = from_float<T>(to_float(probabilities[i]) * (dp[i] - mean) * scale);
}

#define KERNELS(SUFFIX, T)                                                                                             \
    extern "C" __global__ void causal_softmax_##SUFFIX(const float *scores, T *probabilities, uint32_t keys,           \
                                                       uint32_t first, uint32_t window) {                              \
        causal_softmax<T>(scores, probabilities, keys, first, window);                                                 \
    }                                                                                                                  \
    extern "C" __global__ void causal_softmax_backward_##SUFFIX(T *probabilities, const float *dp, uint32_t keys,      \
                                                                uint32_t first, uint32_t window, float scale) {        \
        causal_softmax_backward<T>(probabilities, dp, keys, first, window, scale);                                     \
    }
FOR_NUMBERS_SINGLE(KERNELS)
