// The instructions of tensor_core.cuh, element by element from what PTX's documentation says that each lane holds.
#pragma once

template <typename T> inline float element(const emulated::Shown *warp, int lane, int place, int half) {
    T two[2];
    memcpy(two, reinterpret_cast<const char *>(warp[lane].words) + 4 * place, 4);
    return to_float(two[half]);
}

template <typename T> inline void mma(float *c, const uint32_t *a, const uint32_t *b, T) {
    emulated::Shown shown = {};
    memcpy(shown.words, a, 16);
    memcpy(shown.words + 2, b, 8);
    const emulated::Shown *warp = emulated::exchange(shown);
    const int lane = threadIdx.x % 32;
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            const float left = element<T>(warp, row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
            sum += left * element<T>(warp, column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        }
        c[e] += sum;
    }
}

// Lanes 8·m.. name the rows of matrix m.
inline void load_each(uint32_t *r, const void *row, bool transposed) {
    emulated::Shown shown = {};
    memcpy(shown.words, &row, sizeof row);
    const emulated::Shown *warp = emulated::exchange(shown);
    const int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; m++) {
        uint16_t two[2];
        for (int e = 0; e < 2; e++) {
            const int across = lane / 4, along = lane % 4 * 2 + e;
            const uint16_t *from;
            memcpy(&from, warp[8 * m + (transposed ? along : across)].words, sizeof from);
            two[e] = from[transposed ? across : along];
        }
        memcpy(r + m, two, 4);
    }
}
inline void load_matrices(uint32_t *r, const void *row) { load_each(r, row, false); }
inline void load_matrices_transposed(uint32_t *r, const void *row) { load_each(r, row, true); }
