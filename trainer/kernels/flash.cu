// Causal attention that never writes a score to memory, on tensor cores (Dao 2023), for numbers in 16 bits from sm_80
// on. Blocks have four warps; a warp works on 16 rows of a tile.
//
// q, dy, dq and out are [tokens, heads, D], k, v, dk and dv [tokens, kv_heads, D]. Tiles have three numbers each: their
// document's first token, its length, and the tile's first row in it. blockIdx.x is the tile, blockIdx.y the head.
// A query sees `window` keys at most, itself the last; what no query of a tile sees is passed over.
// lse and delta are [heads, tokens]: a row's log Σ exp of its scaled products, and Σ dy · out.
#include "common.cuh"
#include "tensor_core.cuh"

constexpr int THREADS = 128;

#ifdef TENSOR_CORES

constexpr int ROWS = 64, QUERIES = 32;
constexpr float LOG2_E = 1.4426950408889634f;

// Rows of a tile in shared memory. Eight more elements than a row has put the rows' beginnings in different banks.
template <typename T, int D> struct Row {
    T v[D + 8];
};

// A left operand: rows `row`.. of a tile, columns `column`...
template <typename T, int D>
__device__ __forceinline__ void left(uint32_t *a, const Row<T, D> *tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    load_matrices(a, &tile[row + lane % 16].v[column + lane / 16 * 8]);
}

// Two right operands whose transposes lie in a tile: columns `row`.. and `row + 8`.. of the product.
template <typename T, int D>
__device__ __forceinline__ void right_of_transpose(uint32_t *b, const Row<T, D> *tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    load_matrices(b, &tile[row + lane % 8 + lane / 16 * 8].v[column + lane / 8 % 2 * 8]);
}

// Two right operands that lie in a tile: columns `column`.. and `column + 8`.. of the product.
template <typename T, int D>
__device__ __forceinline__ void right(uint32_t *b, const Row<T, D> *tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    load_matrices_transposed(b, &tile[row + lane % 16].v[column + lane / 16 * 8]);
}

template <typename T> __device__ __forceinline__ uint32_t pack(float x, float y) {
    const Pack<T, 2> two = {{from_float<T>(x), from_float<T>(y)}};
    return *reinterpret_cast<const uint32_t *>(&two);
}

// Two neighbouring 16x8 results as a 16x16 left operand.
template <typename T> __device__ __forceinline__ void as_left(uint32_t *a, const float (*c)[4]) {
    a[0] = pack<T>(c[0][0], c[0][1]), a[1] = pack<T>(c[0][2], c[0][3]);
    a[2] = pack<T>(c[1][0], c[1][1]), a[3] = pack<T>(c[1][2], c[1][3]);
}

// Fills a tile of N rows; those from `valid` on are zeros.
template <int N, typename T, int D>
__device__ __forceinline__ void fill(Row<T, D> *tile, const T *from, uint64_t stride, int valid) {
    ALIGNED(from, sizeof(uint4));
    for (int i = threadIdx.x; i < N * D / 8; i += THREADS) {
        const int row = i / (D / 8), column = i % (D / 8) * 8;
        uint4 x = {0, 0, 0, 0};
        if (row < valid) x = *reinterpret_cast<const uint4 *>(from + row * stride + column);
        *reinterpret_cast<uint4 *>(&tile[row].v[column]) = x;
    }
}

// out[16 rows of this warp] = c · factor, the rows below `valid`; factor by the thread's lower and upper row.
template <typename T, int D>
__device__ __forceinline__ void write(T *out, uint64_t stride, const float (*c)[4], int valid, float low, float high) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (int n = 0; n < D / 8; n++) {
        const int column = n * 8 + lane % 4 * 2;
        if (row < valid) *reinterpret_cast<uint32_t *>(out + row * stride + column) = pack<T>(c[n][0] * low, c[n][1] * low);
        if (row + 8 < valid) *reinterpret_cast<uint32_t *>(out + (row + 8) * stride + column) = pack<T>(c[n][2] * high, c[n][3] * high);
    }
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ bool sees(int query, int key, uint32_t window) { return key <= query && query - key < (int)window; }

// The first tile of keys that the queries from `first` on see.
__device__ __forceinline__ int first_tile(int first, uint32_t window) { return first < (int)window ? 0 : (first + 1 - (int)window) / ROWS * ROWS; }

// out where there is one; lse and delta where there is a dy.
template <typename T, int D>
__device__ __forceinline__ void forward(const T *q, const T *k, const T *v, const uint32_t *tiles, uint32_t heads, uint32_t kv_heads, float scale, uint32_t tokens, uint32_t window,
                                        T *out, const T *dy, float *lse, float *delta) {
    Row<T, D> *keys = reinterpret_cast<Row<T, D> *>(dynamic_shared()), *values = keys + ROWS;
    const int start = tiles[3 * blockIdx.x], length = tiles[3 * blockIdx.x + 1], first = tiles[3 * blockIdx.x + 2];
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint64_t stride = (uint64_t)heads * D, kv_stride = (uint64_t)kv_heads * D;
    const uint64_t place = (uint64_t)(start + first) * stride + (uint64_t)head * D;
    const uint64_t kv_place = (uint64_t)start * kv_stride + (uint64_t)(head / (heads / kv_heads)) * D;
    k += kv_place, v += kv_place;

    fill<ROWS>(keys, q + place, stride, length - first);
    __syncthreads();
    uint32_t queries[D / 16][4];
    for (int i = 0; i < D / 16; i++) left(queries[i], keys, warp * 16, i * 16);

    float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    const float base2 = scale * LOG2_E;
    for (int from = first_tile(first, window); from <= first; from += ROWS) {
        __syncthreads();
        fill<ROWS>(keys, k + from * kv_stride, kv_stride, length - from);
        fill<ROWS>(values, v + from * kv_stride, kv_stride, length - from);
        __syncthreads();
        float s[ROWS / 8][4] = {};
        for (int i = 0; i < D / 16; i++) {
            for (int j = 0; j < ROWS / 16; j++) {
                uint32_t b[4];
                right_of_transpose(b, keys, j * 16, i * 16);
                mma(s[2 * j], queries[i], b, T());
                mma(s[2 * j + 1], queries[i], b + 2, T());
            }
        }
        float largest[2] = {top[0], top[1]};
        for (int j = 0; j < ROWS / 8; j++) {
            for (int e = 0; e < 4; e++) {
                const int row = first + warp * 16 + lane / 4 + e / 2 * 8, column = from + j * 8 + lane % 4 * 2 + e % 2;
                if (!sees(row, column, window)) s[j][e] = -INFINITY;
                largest[e / 2] = fmaxf(largest[e / 2], s[j][e]);
            }
        }
        for (int h = 0; h < 2; h++) {
            largest[h] = quad_max(largest[h]);
            // Where nothing was seen yet both are −∞, whose difference is no number.
            const float shrink = top[h] == largest[h] ? 1.0f : exp2f((top[h] - largest[h]) * base2);
            top[h] = largest[h];
            sum[h] *= shrink;
            for (int n = 0; n < D / 8; n++) o[n][2 * h] *= shrink, o[n][2 * h + 1] *= shrink;
        }
        for (int j = 0; j < ROWS / 8; j++) {
            for (int e = 0; e < 4; e++) {
                s[j][e] = s[j][e] == -INFINITY ? 0.0f : exp2f((s[j][e] - top[e / 2]) * base2);
                sum[e / 2] += s[j][e];
            }
        }
        for (int i = 0; i < ROWS / 16; i++) {
            uint32_t a[4];
            as_left<T>(a, s + 2 * i);
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                right(b, values, i * 16, n * 16);
                mma(o[2 * n], a, b, T());
                mma(o[2 * n + 1], a, b + 2, T());
            }
        }
    }
    const float all[2] = {quad_sum(sum[0]), quad_sum(sum[1])};
    const int valid = length - first;
    if (out) write<T, D>(out + place, stride, o, valid, 1.0f / all[0], 1.0f / all[1]);
    if (!dy) return;
    for (int h = 0; h < 2; h++) {
        const int row = warp * 16 + lane / 4 + h * 8;
        float product = 0;
        if (row < valid) {
            const T *gradient = dy + place + row * stride + lane % 4 * 2;
            for (int n = 0; n < D / 8; n++)
                product += o[n][2 * h] * to_float(gradient[n * 8]) + o[n][2 * h + 1] * to_float(gradient[n * 8 + 1]);
        }
        product = quad_sum(product) / all[h];
        if (row < valid && lane % 4 == 0) {
            const uint64_t at = (uint64_t)head * tokens + start + first + row;
            lse[at] = top[h] * scale + logf(all[h]);
            delta[at] = product;
        }
    }
}

// dk and dv of a tile of keys: blockIdx.y is the key-value head. Products are made as their transposes, a key a row.
template <typename T, int D>
__device__ __forceinline__ void backward_keys(const T *q, const T *k, const T *v, const uint32_t *tiles, uint32_t heads, uint32_t kv_heads, float scale,
                                              uint32_t tokens, uint32_t window, const T *dy, const float *lse, const float *delta, T *dk, T *dv) {
    Row<T, D> *keys = reinterpret_cast<Row<T, D> *>(dynamic_shared()), *values = keys + ROWS;
    Row<T, D> *queries = values + ROWS, *gradients = queries + QUERIES;
    float *exponents = reinterpret_cast<float *>(gradients + QUERIES), *means = exponents + QUERIES;
    const int start = tiles[3 * blockIdx.x], length = tiles[3 * blockIdx.x + 1], first = tiles[3 * blockIdx.x + 2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = heads / kv_heads;
    const uint64_t stride = (uint64_t)heads * D, kv_stride = (uint64_t)kv_heads * D;
    const uint64_t kv_place = (uint64_t)(start + first) * kv_stride + (uint64_t)blockIdx.y * D;
    fill<ROWS>(keys, k + kv_place, kv_stride, length - first);
    fill<ROWS>(values, v + kv_place, kv_stride, length - first);

    // The last query that sees the last key is window − 1 after it.
    const int end = min(length, first + ROWS - 1 + (int)window);
    float by_key[D / 8][4] = {}, by_value[D / 8][4] = {};
    const float base2 = scale * LOG2_E;
    for (int member = 0; member < group; member++) {
        const int head = blockIdx.y * group + member;
        for (int from = first; from < end; from += QUERIES) {
            __syncthreads();
            const uint64_t place = (uint64_t)(start + from) * stride + (uint64_t)head * D;
            fill<QUERIES>(queries, q + place, stride, length - from);
            fill<QUERIES>(gradients, dy + place, stride, length - from);
            if (threadIdx.x < QUERIES) {
                const bool is = from + (int)threadIdx.x < length;
                const uint64_t at = (uint64_t)head * tokens + start + from + threadIdx.x;
                // A query that is none gives every key nothing.
                exponents[threadIdx.x] = is ? lse[at] * LOG2_E : INFINITY;
                means[threadIdx.x] = is ? delta[at] : 0.0f;
            }
            __syncthreads();
            float p[QUERIES / 8][4] = {}, ds[QUERIES / 8][4] = {};
            for (int i = 0; i < D / 16; i++) {
                uint32_t a[4], c[4], b[4];
                left(a, keys, warp * 16, i * 16);
                left(c, values, warp * 16, i * 16);
                for (int j = 0; j < QUERIES / 16; j++) {
                    right_of_transpose(b, queries, j * 16, i * 16);
                    mma(p[2 * j], a, b, T());
                    mma(p[2 * j + 1], a, b + 2, T());
                    right_of_transpose(b, gradients, j * 16, i * 16);
                    mma(ds[2 * j], c, b, T());
                    mma(ds[2 * j + 1], c, b + 2, T());
                }
            }
            for (int j = 0; j < QUERIES / 8; j++) {
                for (int e = 0; e < 4; e++) {
                    const int key = first + warp * 16 + lane / 4 + e / 2 * 8, query = j * 8 + lane % 4 * 2 + e % 2;
                    p[j][e] = sees(from + query, key, window) ? exp2f(p[j][e] * base2 - exponents[query]) : 0.0f;
                    ds[j][e] = p[j][e] * (ds[j][e] - means[query]) * scale;
                }
            }
            for (int i = 0; i < QUERIES / 16; i++) {
                uint32_t a[4], c[4], b[4];
                as_left<T>(a, p + 2 * i);
                as_left<T>(c, ds + 2 * i);
                for (int n = 0; n < D / 16; n++) {
                    right(b, gradients, i * 16, n * 16);
                    mma(by_value[2 * n], a, b, T());
                    mma(by_value[2 * n + 1], a, b + 2, T());
                    right(b, queries, i * 16, n * 16);
                    mma(by_key[2 * n], c, b, T());
                    mma(by_key[2 * n + 1], c, b + 2, T());
                }
            }
        }
    }
    write<T, D>(dk + kv_place, kv_stride, by_key, length - first, 1, 1);
    write<T, D>(dv + kv_place, kv_stride, by_value, length - first, 1, 1);
}

// dq of a tile of queries.
template <typename T, int D>
__device__ __forceinline__ void backward_queries(const T *q, const T *k, const T *v, const uint32_t *tiles, uint32_t heads, uint32_t kv_heads, float scale,
                                                 uint32_t tokens, uint32_t window, const T *dy, const float *lse, const float *delta, T *dq) {
    Row<T, D> *queries = reinterpret_cast<Row<T, D> *>(dynamic_shared()), *gradients = queries + ROWS;
    Row<T, D> *keys = gradients + ROWS, *values = keys + ROWS;
    const int start = tiles[3 * blockIdx.x], length = tiles[3 * blockIdx.x + 1], first = tiles[3 * blockIdx.x + 2];
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint64_t stride = (uint64_t)heads * D, kv_stride = (uint64_t)kv_heads * D;
    const uint64_t place = (uint64_t)(start + first) * stride + (uint64_t)head * D;
    const uint64_t kv_place = (uint64_t)start * kv_stride + (uint64_t)(head / (heads / kv_heads)) * D;
    k += kv_place, v += kv_place;
    fill<ROWS>(queries, q + place, stride, length - first);
    fill<ROWS>(gradients, dy + place, stride, length - first);
    float exponents[2], means[2];
    for (int h = 0; h < 2; h++) {
        const int row = first + warp * 16 + lane / 4 + h * 8;
        const uint64_t at = (uint64_t)head * tokens + start + row;
        exponents[h] = row < length ? lse[at] * LOG2_E : INFINITY;
        means[h] = row < length ? delta[at] : 0.0f;
    }

    float by_query[D / 8][4] = {};
    const float base2 = scale * LOG2_E;
    for (int from = first_tile(first, window); from <= first; from += ROWS) {
        __syncthreads();
        fill<ROWS>(keys, k + from * kv_stride, kv_stride, length - from);
        fill<ROWS>(values, v + from * kv_stride, kv_stride, length - from);
        __syncthreads();
        float p[ROWS / 8][4] = {}, ds[ROWS / 8][4] = {};
        for (int i = 0; i < D / 16; i++) {
            uint32_t a[4], c[4], b[4];
            left(a, queries, warp * 16, i * 16);
            left(c, gradients, warp * 16, i * 16);
            for (int j = 0; j < ROWS / 16; j++) {
                right_of_transpose(b, keys, j * 16, i * 16);
                mma(p[2 * j], a, b, T());
                mma(p[2 * j + 1], a, b + 2, T());
                right_of_transpose(b, values, j * 16, i * 16);
                mma(ds[2 * j], c, b, T());
                mma(ds[2 * j + 1], c, b + 2, T());
            }
        }
        for (int j = 0; j < ROWS / 8; j++) {
            for (int e = 0; e < 4; e++) {
                const int row = first + warp * 16 + lane / 4 + e / 2 * 8, column = from + j * 8 + lane % 4 * 2 + e % 2;
                p[j][e] = sees(row, column, window) ? exp2f(p[j][e] * base2 - exponents[e / 2]) : 0.0f;
                ds[j][e] = p[j][e] * (ds[j][e] - means[e / 2]) * scale;
            }
        }
        for (int i = 0; i < ROWS / 16; i++) {
            uint32_t a[4], b[4];
            as_left<T>(a, ds + 2 * i);
            for (int n = 0; n < D / 16; n++) {
                right(b, keys, i * 16, n * 16);
                mma(by_query[2 * n], a, b, T());
                mma(by_query[2 * n + 1], a, b + 2, T());
            }
        }
    }
    write<T, D>(dq + place, stride, by_query, length - first, 1, 1);
}

#define BODY(CALL) CALL
#else
#define BODY(CALL)
#endif

#define KERNELS(SUFFIX, T, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        flash_forward_##SUFFIX(const T *q, const T *k, const T *v, const uint32_t *tiles, uint32_t heads,              \
                               uint32_t kv_heads, float scale, uint32_t tokens, uint32_t window, T *out, const T *dy,  \
                               float *lse, float *delta) {                                                             \
        BODY((forward<T, D>(q, k, v, tiles, heads, kv_heads, scale, tokens, window, out, dy, lse, delta));)            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        flash_backward_keys_##SUFFIX(const T *q, const T *k, const T *v, const uint32_t *tiles, uint32_t heads,        \
                                     uint32_t kv_heads, float scale, uint32_t tokens, uint32_t window, const T *dy,    \
                                     const float *lse, const float *delta, T *dk, T *dv) {                             \
        BODY((backward_keys<T, D>(q, k, v, tiles, heads, kv_heads, scale, tokens, window, dy, lse, delta, dk, dv));)   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        flash_backward_queries_##SUFFIX(const T *q, const T *k, const T *v, const uint32_t *tiles, uint32_t heads,     \
                                        uint32_t kv_heads, float scale, uint32_t tokens, uint32_t window,              \
                                        const T *dy, const float *lse, const float *delta, T *dq) {                    \
        BODY((backward_queries<T, D>(q, k, v, tiles, heads, kv_heads, scale, tokens, window, dy, lse, delta, dq));)    \
    }
KERNELS(f16_64, __half, 64)
KERNELS(f16_128, __half, 128)
KERNELS(bf16_64, __nv_bfloat16, 64)
KERNELS(bf16_128, __nv_bfloat16, 128)
