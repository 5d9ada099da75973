// Operations on rows and elements. Grids: "rows" have a block a row, "elements" a thread a vector.
#include "common.cuh"

#define ROW_VECTORS for (uint32_t i = threadIdx.x; i < width / N; i += blockDim.x)
#define ELEMENT_VECTOR                                                                                                 \
    const uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x;                                                \
    if (i >= count / N) return

// y = x · w / √(mean(x²) + eps); rows.
template <typename T, int N>
__device__ __forceinline__ void rms_norm(const T *x, const float *w, T *y, uint32_t width, float eps) {
    x += blockIdx.x * (uint64_t)width;
    y += blockIdx.x * (uint64_t)width;
    float squares = 0;
    ROW_VECTORS {
        const auto a = load<N>(x, i);
        for (int j = 0; j < N; j++) squares += to_float(a.v[j]) * to_float(a.v[j]);
    }
    const float r = 1.0f / sqrtf(over_block<Sum>(squares, 0.0f) / width + eps);
    ROW_VECTORS {
        auto a = load<N>(x, i);
        for (int j = 0; j < N; j++) a.v[j] = from_float<T>(to_float(a.v[j]) * r * w[i * N + j]);
        store<N>(y, i, a);
    }
}

// into += r·g − x·r³·mean(g·x), g = dy·w; rows.
template <typename T, int N>
__device__ __forceinline__ void rms_norm_backward(T *into, const T *x, const float *w, const T *dy, uint32_t width, float eps) {
    const uint64_t first = blockIdx.x * (uint64_t)width;
    into += first, x += first, dy += first;
    float squares = 0, products = 0;
    ROW_VECTORS {
        const auto a = load<N>(x, i), d = load<N>(dy, i);
        for (int j = 0; j < N; j++) {
            const float value = to_float(a.v[j]);
            squares += value * value;
            products += value * to_float(d.v[j]) * w[i * N + j];
        }
    }
    const float r = 1.0f / sqrtf(over_block<Sum>(squares, 0.0f) / width + eps);
    const float pull = r * r * r * over_block<Sum>(products, 0.0f) / width;
    ROW_VECTORS {
        const auto a = load<N>(x, i), d = load<N>(dy, i);
        auto sum = load<N>(into, i);
        for (int j = 0; j < N; j++) {
            const float g = to_float(d.v[j]) * w[i * N + j];
            sum.v[j] = from_float<T>(to_float(sum.v[j]) + r * g - to_float(a.v[j]) * pull);
        }
        store<N>(into, i, sum);
    }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// y = silu(gate) · up; elements.
template <typename T, int N>
__device__ __forceinline__ void swiglu(const T *gate, const T *up, T *y, uint64_t count) {
    ELEMENT_VECTOR;
    const auto g = load<N>(gate, i), u = load<N>(up, i);
    Pack<T, N> out;
    for (int j = 0; j < N; j++) {
        const float value = to_float(g.v[j]);
        out.v[j] = from_float<T>(value * sigmoid(value) * to_float(u.v[j]));
    }
    store<N>(y, i, out);
}

// d_gate = dy·up·s·(1 + gate·(1−s)); dy becomes d_up = dy·gate·s, s = σ(gate); elements.
template <typename T, int N>
__device__ __forceinline__ void swiglu_backward(const T *gate, const T *up, T *d_gate, T *dy, uint64_t count) {
    ELEMENT_VECTOR;
    const auto g = load<N>(gate, i), u = load<N>(up, i), d = load<N>(dy, i);
    Pack<T, N> by_gate, by_up;
    for (int j = 0; j < N; j++) {
        const float value = to_float(g.v[j]), gradient = to_float(d.v[j]), s = sigmoid(value);
        by_gate.v[j] = from_float<T>(gradient * to_float(u.v[j]) * s * (1.0f + value * (1.0f - s)));
        by_up.v[j] = from_float<T>(gradient * value * s);
    }
    store<N>(d_gate, i, by_gate);
    store<N>(dy, i, by_up);
}

// into += x; elements.
template <typename T, int N> __device__ __forceinline__ void add(T *into, const T *x, uint64_t count) {
    ELEMENT_VECTOR;
    auto a = load<N>(into, i);
    const auto b = load<N>(x, i);
    for (int j = 0; j < N; j++) a.v[j] = from_float<T>(to_float(a.v[j]) + to_float(b.v[j]));
    store<N>(into, i, a);
}

// x *= factor; elements.
template <typename T, int N> __device__ __forceinline__ void scale(T *x, float factor, uint64_t count) {
    ELEMENT_VECTOR;
    auto a = load<N>(x, i);
    for (int j = 0; j < N; j++) a.v[j] = from_float<T>(to_float(a.v[j]) * factor);
    store<N>(x, i, a);
}

// x *= factors, column by column; rows.
template <typename T, int N> __device__ __forceinline__ void scale_columns(T *x, const float *factors, uint32_t width) {
    x += blockIdx.x * (uint64_t)width;
    ROW_VECTORS {
        auto a = load<N>(x, i);
        for (int j = 0; j < N; j++) a.v[j] = from_float<T>(to_float(a.v[j]) * factors[i * N + j]);
        store<N>(x, i, a);
    }
}

// x += bias, column by column; rows.
template <typename T, int N> __device__ __forceinline__ void add_bias(T *x, const float *bias, uint32_t width) {
    x += blockIdx.x * (uint64_t)width;
    ROW_VECTORS {
        auto a = load<N>(x, i);
        for (int j = 0; j < N; j++) a.v[j] = from_float<T>(to_float(a.v[j]) + bias[i * N + j]);
        store<N>(x, i, a);
    }
}

// The counter-based random numbers of domain's rng: SplitMix64's finaliser.
__device__ __forceinline__ uint64_t mix(uint64_t z) {
    z += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// y = x · keep where the element's 53 bits reach the threshold, else 0; elements.
template <typename T, int N>
__device__ __forceinline__ void dropout(const T *x, T *y, uint64_t key, uint64_t first, uint64_t threshold, float keep, uint64_t count) {
    ELEMENT_VECTOR;
    auto a = load<N>(x, i);
    for (int j = 0; j < N; j++) {
        const bool drops = (mix(key ^ mix(first + i * N + j)) >> 11) < threshold;
        a.v[j] = from_float<T>(drops ? 0.0f : to_float(a.v[j]) * keep);
    }
    store<N>(y, i, a);
}

// out[i] = table[ids[i]]; rows of out.
template <typename T, int N>
__device__ __forceinline__ void gather(const T *table, const uint32_t *ids, T *out, uint32_t width) {
    table += ids[blockIdx.x] * (uint64_t)width;
    out += blockIdx.x * (uint64_t)width;
    ROW_VECTORS store<N>(out, i, load<N>(table, i));
}

// out[ids[i]] = x[i]; rows of x.
template <typename T, int N>
__device__ __forceinline__ void scatter(const T *x, const uint32_t *ids, T *out, uint32_t width) {
    x += blockIdx.x * (uint64_t)width;
    out += ids[blockIdx.x] * (uint64_t)width;
    ROW_VECTORS store<N>(out, i, load<N>(x, i));
}

// Cosines and sines of each token's angles; elements of [tokens, half].
extern "C" __global__ void rotary_table(const uint32_t *positions, const float *frequencies, float *cosines, float *sines, uint32_t half, uint64_t count) {
    const uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x;
    if (i >= count) return;
    sincosf((float)positions[i / half] * frequencies[i % half], sines + i, cosines + i);
}

// Rotates each head's first half against its second by sign times the token's angle; elements are pairs.
template <typename T, int N>
__device__ __forceinline__ void rotate(T *x, const float *cosines, const float *sines, uint32_t width, uint32_t half, float sign, uint64_t count) {
    ELEMENT_VECTOR;
    const uint32_t pairs = width / 2;
    const uint64_t token = i * N / pairs;
    const uint32_t place = i * N % pairs, column = place % half;
    T *a = x + token * width + place / half * 2 * half + column;
    cosines += token * half + column, sines += token * half + column;
    auto low = load<N>(a, 0), high = load<N>(a + half, 0);
    for (int j = 0; j < N; j++) {
        const float p = to_float(low.v[j]), q = to_float(high.v[j]), c = cosines[j], s = sign * sines[j];
        low.v[j] = from_float<T>(p * c - q * s);
        high.v[j] = from_float<T>(q * c + p * s);
    }
    store<N>(a, 0, low);
    store<N>(a + half, 0, high);
}

#define KERNELS(SUFFIX, T, N)                                                                                          \
    extern "C" __global__ void rms_norm_##SUFFIX(const T *x, const float *w, T *y, uint32_t width, float eps) {        \
        rms_norm<T, N>(x, w, y, width, eps);                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void rms_norm_backward_##SUFFIX(T *into, const T *x, const float *w, const T *dy,            \
                                                          uint32_t width, float eps) {                                 \
        rms_norm_backward<T, N>(into, x, w, dy, width, eps);                                                           \
    }                                                                                                                  \
    extern "C" __global__ void swiglu_##SUFFIX(const T *gate, const T *up, T *y, uint64_t count) {                     \
        swiglu<T, N>(gate, up, y, count);                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void swiglu_backward_##SUFFIX(const T *gate, const T *up, T *d_gate, T *dy,                  \
                                                        uint64_t count) {                                              \
        swiglu_backward<T, N>(gate, up, d_gate, dy, count);                                                            \
    }                                                                                                                  \
    extern "C" __global__ void add_##SUFFIX(T *into, const T *x, uint64_t count) { add<T, N>(into, x, count); }        \
    extern "C" __global__ void scale_##SUFFIX(T *x, float factor, uint64_t count) { scale<T, N>(x, factor, count); }   \
    extern "C" __global__ void scale_columns_##SUFFIX(T *x, const float *factors, uint32_t width) {                    \
        scale_columns<T, N>(x, factors, width);                                                                        \
    }                                                                                                                  \
    extern "C" __global__ void add_bias_##SUFFIX(T *x, const float *bias, uint32_t width) {                            \
        add_bias<T, N>(x, bias, width);                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void dropout_##SUFFIX(const T *x, T *y, uint64_t key, uint64_t first, uint64_t threshold,    \
                                                float keep, uint64_t count) {                                          \
        dropout<T, N>(x, y, key, first, threshold, keep, count);                                                       \
    }                                                                                                                  \
    extern "C" __global__ void gather_##SUFFIX(const T *table, const uint32_t *ids, T *out, uint32_t width) {          \
        gather<T, N>(table, ids, out, width);                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void scatter_##SUFFIX(const T *x, const uint32_t *ids, T *out, uint32_t width) {             \
        scatter<T, N>(x, ids, out, width);                                                                             \
    }                                                                                                                  \
    extern "C" __global__ void rotate_##SUFFIX(T *x, const float *cosines, const float *sines, uint32_t width,         \
                                               uint32_t half, float sign, uint64_t count) {                            \
        rotate<T, N>(x, cosines, sines, width, half, sign, count);                                                     \
    }
FOR_NUMBERS(KERNELS)

// y = x in other numbers, or in the same; elements one by one.
template <typename A, typename B> __device__ __forceinline__ void convert(const A *x, B *y, uint64_t count) {
    const uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x;
    if (i < count) y[i] = from_float<B>(to_float(x[i]));
}

#define CONVERT(FROM, A, TO, B)                                                                                        \
    extern "C" __global__ void convert_##FROM##_##TO(const A *x, B *y, uint64_t count) { convert(x, y, count); }
#define CONVERT_TO(TO, B) CONVERT(f32, float, TO, B) CONVERT(f16, __half, TO, B) CONVERT(bf16, __nv_bfloat16, TO, B)
FOR_NUMBERS_SINGLE(CONVERT_TO)
