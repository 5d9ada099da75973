// Cross-entropy; a block a row of logits.
#include "common.cuh"

// nll = log Σ exp(logits) − logits[target]; the logits become the gradient, softmax − one-hot.
extern "C" __global__ void nll_and_gradient(float *logits, const uint32_t *targets, float *nll, uint32_t vocab) {
    logits += blockIdx.x * (uint64_t)vocab;
    const uint32_t target = targets[blockIdx.x];
    float top = -INFINITY;
    // fmaxf leaves NaN out, but its exponential is NaN and so is the sum.
    for (uint32_t i = threadIdx.x; i < vocab; i += blockDim.x) top = fmaxf(top, logits[i]);
    top = over_block<Largest>(top, -INFINITY);
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < vocab; i += blockDim.x) sum += expf(logits[i] - top);
    sum = over_block<Sum>(sum, 0.0f);
    if (threadIdx.x == 0) nll[blockIdx.x] = logf(sum) + top - logits[target];
    __syncthreads(); // The target's logit has been read.
    const float share = 1.0f / sum;
    for (uint32_t i = threadIdx.x; i < vocab; i += blockDim.x)
        logits[i] = expf(logits[i] - top) * share - (i == target ? 1.0f : 0.0f);
}
