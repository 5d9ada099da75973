// Runs CUDA kernels on the CPU, for tests: a block's threads one after the other, each on a stack of its own, which it
// leaves where it waits for the others; blocks too come one after the other. Both come in rising order or in falling order:
// where that makes a difference, threads race. Other races do not show; everything else of a kernel does: its indices, its sums,
// what it leaves unwritten.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <setjmp.h>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

using std::min;
struct uint4 {
    uint32_t x, y, z, w;
};
struct Index {
    uint32_t x = 0, y = 0, z = 0;
};
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
constexpr int MOST_THREADS = 1024;
constexpr size_t STACK = 64 << 10;

enum State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

struct Thread {
    // Where its stack begins; afterwards it goes on by jumps, which ask nothing of the system.
    ucontext_t context;
    jmp_buf place;
    State state;
    unsigned exchanges;
    bool begun = false;
};

// What a lane shows to the others of its warp. Two, so that the next exchange leaves the last one's readers alone.
struct Shown {
    uint64_t words[4];
};

struct Block {
    std::vector<Thread> threads = std::vector<Thread>(MOST_THREADS);
    std::vector<char> stacks = std::vector<char>(MOST_THREADS * STACK);
    std::vector<Shown> shown = std::vector<Shown>(2 * MOST_THREADS);
    std::vector<uint64_t> shared;
    jmp_buf scheduler;
    int current = 0;
    bool backwards = false;
    void (*kernel)(void **) = nullptr;
    void **arguments = nullptr;
};
static thread_local Block block;

// Leaves the thread's stack until the scheduler comes back to it.
inline void wait(State at) {
    Thread &thread = block.threads[block.current];
    thread.state = at;
    if (!_setjmp(thread.place)) _longjmp(block.scheduler, 1);
}

// What a thread's stack runs: one block's kernel after the other.
inline void enter() {
    while (true) {
        block.kernel(block.arguments);
        wait(DONE);
    }
}

inline void resume(int t) {
    Thread &thread = block.threads[t];
    block.current = threadIdx.x = t;
    if (_setjmp(block.scheduler)) return;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = &block.stacks[t * STACK];
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    setcontext(&thread.context);
}

// Shows a value to the warp, and returns where lane 0's lies; each lane's follows.
inline const Shown *exchange(const Shown &value) {
    Shown *all = &block.shown[block.threads[block.current].exchanges++ % 2 * MOST_THREADS];
    all[block.current] = value;
    wait(AT_WARP_BARRIER);
    return all + block.current / 32 * 32;
}

inline void run_block() {
    const int count = blockDim.x;
    for (int t = 0; t < count; t++) block.threads[t].state = READY, block.threads[t].exchanges = 0;
    while (true) {
        for (int i = 0; i < count; i++) {
            const int t = block.backwards ? count - 1 - i : i;
            if (block.threads[t].state == READY) resume(t);
        }
        int alive = 0, at_barrier = 0;
        bool released = false;
        for (int warp = 0; warp < count; warp += 32) {
            int here = 0, waiting = 0;
            const int end = min(warp + 32, count);
            for (int t = warp; t < end; t++) {
                here += block.threads[t].state != DONE;
                waiting += block.threads[t].state == AT_WARP_BARRIER;
                at_barrier += block.threads[t].state == AT_BLOCK_BARRIER;
            }
            alive += here;
            if (here == 0 || waiting < here) continue;
            for (int t = warp; t < end; t++)
                if (block.threads[t].state == AT_WARP_BARRIER) block.threads[t].state = READY;
            released = true;
        }
        if (alive == 0) return;
        if (released) continue;
        if (at_barrier < alive) {
            fprintf(stderr, "the kernel's threads wait for each other at different barriers\n");
            abort();
        }
        for (int t = 0; t < count; t++)
            if (block.threads[t].state == AT_BLOCK_BARRIER) block.threads[t].state = READY;
    }
}

// Calls a kernel with the arguments that an array points to, as CUDA's own launch does.
template <typename... A, size_t... I> void apply(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A *>(arguments[I])...);
}
// What a kernel takes, a letter an argument: p a pointer, c 64 bits, w 32 bits, n float32, d float64.
template <typename T> constexpr char kind() {
    if constexpr (std::is_pointer_v<T>) return 'p';
    else if constexpr (std::is_floating_point_v<T>) return sizeof(T) == 8 ? 'd' : 'n';
    else return sizeof(T) == 8 ? 'c' : 'w';
}
template <typename... A> struct Kinds {
    static constexpr char text[] = {kind<A>()..., 0};
};
template <typename... A> constexpr const char *kinds(void (*)(A...)) { return Kinds<A...>::text; }
template <typename... A> constexpr size_t count(void (*)(A...)) { return sizeof...(A); }
template <auto KERNEL> void call(void **arguments) {
    apply(KERNEL, arguments, std::make_index_sequence<count(KERNEL)>());
}

struct Kernel {
    const char *name;
    void (*call)(void **);
    const char *arguments;
};
} // namespace emulated

// A GPU reads a vector at multiples of its size alone.
#define ALIGNED(PLACE, BYTES) emulated::aligned(PLACE, BYTES)
namespace emulated {
inline void aligned(const void *place, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(place) % bytes == 0) return;
    fprintf(stderr, "the kernel reads or writes %zu bytes at %p, which is no multiple of them\n", bytes, place);
    abort();
}
} // namespace emulated

inline unsigned char *dynamic_shared() { return reinterpret_cast<unsigned char *>(emulated::block.shared.data()); }
inline void __syncthreads() { emulated::wait(emulated::AT_BLOCK_BARRIER); }
template <typename T> T __shfl_xor_sync(uint32_t, T value, int distance) {
    emulated::Shown shown = {};
    memcpy(shown.words, &value, sizeof value);
    memcpy(&value, emulated::exchange(shown)[(threadIdx.x % 32) ^ distance].words, sizeof value);
    return value;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

// Runs one of `kernels`. 1 if there is none of that name, 2 if it takes other arguments than those of the kinds `given`.
static int emulate(const emulated::Kernel *kernels, size_t count, const char *name, const uint32_t *grid, void **arguments, const char *given) {
    for (size_t i = 0; i < count; i++) {
        if (strcmp(kernels[i].name, name)) continue;
        if (strcmp(kernels[i].arguments, given)) return 2;
        emulated::block.backwards = grid[4];
        gridDim.x = grid[0], gridDim.y = grid[1], blockDim.x = grid[2];
        // Shared memory holds what an earlier block left there: here, NaN.
        emulated::block.shared.assign(grid[3] / 8 + 1, ~0ull);
        emulated::block.kernel = kernels[i].call, emulated::block.arguments = arguments;
        const uint64_t blocks = (uint64_t)grid[0] * grid[1];
        for (uint64_t i = 0; i < blocks; i++) {
            const uint64_t b = grid[4] ? blocks - 1 - i : i;
            blockIdx.x = b % grid[0], blockIdx.y = b / grid[0];
            emulated::run_block();
        }
        return 0;
    }
    return 1;
}
