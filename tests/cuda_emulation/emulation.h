// Runs the bodies of CUDA kernels on a CPU: included before the .cuh files, which then compile as C++.
//
// The threads of a block are fibers on one thread of the system. A fiber runs until it waits at __syncthreads, a
// shuffle or a vote; a warp goes on until all of it waits for other warps or has ended. Which warp and which of its
// lanes is next is the schedule's choice: in order, reversed, or at random. A kernel that forgets a barrier gives other
// bits under another schedule. Blocks run one after another, in the schedule's order.
// Shared memory, static and dynamic, is a fresh heap block for every block of threads, filled with NaN (all bits one);
// a sanitizer therefore sees accesses beyond it. The blocks of a cluster run by turns, each until it waits for the
// others; one that has ended may not be read from any more. What hardware leaves undefined ends the launch with a
// message: threads that wait for others which have ended, for each other, at different places of the source, or for
// lanes that do not exist.
//
// Not covered: the memory model (every store is seen at once), the bits of approximate functions, wgmma, TMA.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#error "the fibers of this emulation are written for x86-64"
#endif

#define DIFUSORES_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

// --- the vocabulary of CUDA C++ that the kernels use ---

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

// Conversions of 16-bit floats by their bits, rounded to nearest even, NaN kept.
struct __half_raw {
    unsigned short x;
};
struct __nv_bfloat16_raw {
    unsigned short x;
};
inline float __half2float(__half_raw h) {
    _Float16 v;
    std::memcpy(&v, &h, 2);
    return static_cast<float>(v);
}
inline __half_raw __float2half_rn(float f) {
    const _Float16 v = static_cast<_Float16>(f);
    __half_raw h;
    std::memcpy(&h, &v, 2);
    return h;
}
inline float __uint_as_float(unsigned u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline unsigned __float_as_uint(float f) {
    unsigned u;
    std::memcpy(&u, &f, 4);
    return u;
}
inline __nv_bfloat16_raw __float2bfloat16_rn(float f) {
    const unsigned u = __float_as_uint(f);
    if (f != f) return {0x7FFF};
    return {static_cast<unsigned short>((u + 0x7FFF + ((u >> 16) & 1)) >> 16)};
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float x) { return std::exp2(x * 1.44269504f); }
inline float __fdividef(float a, float b) { return a / b; }
inline void sincospif(float x, float* sine, float* cosine) {
    constexpr double kPi = 3.14159265358979323846;
    *sine = static_cast<float>(std::sin(kPi * x)), *cosine = static_cast<float>(std::cos(kPi * x));
}

// --- fibers ---

// Keeps the callee-saved registers on the stack that it leaves, and takes those of the stack that it enters.
extern "C" void emulation_switch(void** left, void* entered);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

namespace emulation {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024, kMaxCluster = 8;
constexpr size_t kStackBytes = 256 << 10, kPage = 4 << 10;

enum class Wait { nothing, barrier, warp, cluster, end };

// 16 bytes to shared memory, zeros where `from` is nullptr; only asked for as yet (mma.h).
struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    void* stack_pointer = nullptr;
    Wait wait = Wait::nothing;
    std::source_location where;
    unsigned mask = 0;       // of the lanes that take part in the exchange that it waits for
    uint64_t deposit = 0;    // its value there
    uint64_t collected = 0;  // the deposit of this lane when the exchange took place
    std::vector<Copy> open;  // of the group of copies that is not closed
    std::deque<std::vector<Copy>> closed;
};

struct Shared {
    const void* tag;
    size_t bytes;
    std::unique_ptr<unsigned char[]> memory;
};

// What runs now: one launch at a time, of that a cluster. Block r of it has the fibers from r * kMaxThreads on.
inline Fiber fibers[kMaxCluster * kMaxThreads];
inline void* scheduler_stack = nullptr;
inline unsigned running = 0;
inline unsigned cluster_blocks = 1;
inline std::vector<Shared> shared_arrays[kMaxCluster];
inline std::string failure;
inline void (*thread_body)(void*) = nullptr;
inline void* thread_argument = nullptr;

inline unsigned char* stack_of(unsigned fiber) {
    static unsigned char* of_block[kMaxCluster];
    const unsigned thread = fiber % kMaxThreads;
    unsigned char*& all = of_block[fiber / kMaxThreads];
    if (!all) {
        void* p = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) std::abort();
#ifndef DIFUSORES_FAULTY  // of which a process loads dozens, and 65530 mappings are all that it may have
        for (unsigned k = 0; k < kMaxThreads; ++k)  // a page below each stack that may not be touched
            mprotect(static_cast<unsigned char*>(p) + k * kStackBytes, kPage, PROT_NONE);
#endif
        all = static_cast<unsigned char*>(p);
    }
    return all + thread * kStackBytes;
}

inline void suspend() { emulation_switch(&fibers[running].stack_pointer, scheduler_stack); }

inline void wait_for(Wait what, std::source_location where, unsigned mask = 0) {
    Fiber& self = fibers[running];
    self.wait = what, self.where = where, self.mask = mask;
    suspend();
}

inline void fiber_main() {
    thread_body(thread_argument);
    fibers[running].wait = Wait::end;
    suspend();
    std::abort();  // never resumed
}

inline void prepare(unsigned thread) {
    Fiber& fiber = fibers[thread];
    fiber = {};
    void** top = reinterpret_cast<void**>(stack_of(thread) + kStackBytes) - 2;  // aligned as after a call
    *top = reinterpret_cast<void*>(&fiber_main);
    fiber.stack_pointer = top - 6;
    std::fill_n(static_cast<void**>(fiber.stack_pointer), 6, nullptr);
}

inline unsigned char* shared_array_of(unsigned rank, const void* tag, size_t bytes) {
    for (const Shared& array : shared_arrays[rank])
        if (array.tag == tag) return array.memory.get();
    shared_arrays[rank].push_back({tag, bytes, std::make_unique<unsigned char[]>(bytes)});
    std::memset(shared_arrays[rank].back().memory.get(), 0xFF, bytes);
    return shared_arrays[rank].back().memory.get();
}

inline void* shared_array(const void* tag, size_t bytes) { return shared_array_of(running / kMaxThreads, tag, bytes); }

// The place in the shared memory of the cluster's block `rank` where `own` lies in that of the block that runs.
inline const void* in_block(const void* own, unsigned rank) {
    const unsigned first = rank * kMaxThreads;
    if (rank >= cluster_blocks) failure = "a cluster has no such block";
    else if (std::all_of(fibers + first, fibers + first + blockDim.x, [](auto& f) { return f.wait == Wait::end; }))
        failure = "the shared memory of a block that has ended is read";
    for (const Shared& array : shared_arrays[running / kMaxThreads]) {
        const auto offset = static_cast<const unsigned char*>(own) - array.memory.get();
        if (offset >= 0 && offset < static_cast<std::ptrdiff_t>(array.bytes) && failure.empty())
            return shared_array_of(rank, array.tag, array.bytes) + offset;
    }
    if (failure.empty()) failure = "what a cluster shares lies in shared memory";
    return own;
}

inline const char dynamic_tag = 0;

// --- what threads wait for each other with ---

// Each lane of `mask` leaves its value; afterwards `collected` of every lane of the mask holds what it left.
inline void exchange(unsigned mask, uint64_t value, std::source_location where) {
    fibers[running].deposit = value;
    wait_for(Wait::warp, where, mask);
}

template <class T>
T shuffle(unsigned mask, T value, int lane, std::source_location where) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    exchange(mask, bits, where);
    const unsigned self = running % kWarp;
    const unsigned source = lane < 0 || lane >= kWarp ? self : static_cast<unsigned>(lane);
    if (!(mask >> source & 1)) failure = "a shuffle reads a lane that does not take part";
    std::memcpy(&value, &fibers[running - self + source].collected, sizeof(T));
    return value;
}

inline std::string place(const Fiber& fiber) {
    const std::string file = fiber.where.file_name();
    return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(fiber.where.line());
}

// Lets all threads of block `rank` go on if they wait at one barrier, `what`; false if they do not.
inline bool release_barrier(unsigned rank, unsigned threads, Wait what) {
    Fiber* const block = fibers + rank * kMaxThreads;
    if (!std::all_of(block, block + threads, [&](const Fiber& f) { return f.wait == what; })) return false;
    for (unsigned t = 0; t < threads; ++t) {
        if (block[t].where.line() != block[0].where.line()) {
            failure = "threads of a block wait at different barriers: thread 0 at " + place(block[0]) + ", thread " +
                      std::to_string(t) + " at " + place(block[t]);
            return false;
        }
        block[t].wait = Wait::nothing;
    }
    return true;
}

// The same for all threads of the cluster.
inline bool release_cluster(unsigned threads) {
    for (unsigned rank = 0; rank < cluster_blocks; ++rank)
        for (const Fiber* f = fibers + rank * kMaxThreads; f < fibers + rank * kMaxThreads + threads; ++f)
            if (f->wait != Wait::cluster || f->where.line() != fibers[0].where.line()) return false;
    for (unsigned rank = 0; rank < cluster_blocks; ++rank) release_barrier(rank, threads, Wait::cluster);
    return true;
}

// Lets the lanes of a warp go on whose exchange is complete; false if there are none. end: of its block's threads.
inline bool release_warp(unsigned warp, unsigned end) {
    bool any = false;
    for (unsigned t = warp; t < warp + kWarp && t < end; ++t) {
        const Fiber& fiber = fibers[t];
        if (fiber.wait != Wait::warp) continue;
        bool complete = fiber.mask >> (t - warp) & 1;
        for (unsigned lane = 0; lane < kWarp && complete; ++lane) {
            if (!(fiber.mask >> lane & 1)) continue;
            const Fiber& other = fibers[warp + lane];
            complete = warp + lane < end && other.wait == Wait::warp && other.mask == fiber.mask &&
                       other.where.line() == fiber.where.line();
        }
        if (!complete) continue;
        const unsigned mask = fiber.mask;
        for (unsigned lane = 0; lane < kWarp; ++lane)
            if (mask >> lane & 1) {
                fibers[warp + lane].collected = fibers[warp + lane].deposit;
                fibers[warp + lane].wait = Wait::nothing;
            }
        any = true;
    }
    return any;
}

inline void describe_deadlock(unsigned threads) {
    failure = "deadlock in block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + "):";
    std::string last;
    const Fiber* const block = fibers + running / kMaxThreads * kMaxThreads;
    for (unsigned t = 0; t < threads; ++t) {
        const Fiber& fiber = block[t];
        const std::string state = fiber.wait == Wait::end       ? "has ended"
                                  : fiber.wait == Wait::barrier ? "waits at the barrier in " + place(fiber)
                                  : fiber.wait == Wait::cluster ? "waits for its cluster in " + place(fiber)
                                                                : "waits for its warp in " + place(fiber);
        if (state != last) failure += " thread " + std::to_string(t) + " " + state + ";";
        last = state;
    }
}

enum class Schedule { in_order, reversed, random };

struct Order {
    Schedule schedule;
    std::mt19937 generator{12345};
    void arrange(std::vector<unsigned>& items) {
        if (schedule == Schedule::reversed) std::reverse(items.begin(), items.end());
        if (schedule == Schedule::random) std::shuffle(items.begin(), items.end(), generator);
    }
    std::vector<unsigned> of(unsigned count) {
        std::vector<unsigned> items(count);
        std::iota(items.begin(), items.end(), 0u);
        arrange(items);
        return items;
    }
};

// Runs a warp until all of it waits for other warps or has ended; returns how many threads ended.
inline unsigned run_warp(unsigned warp, unsigned end, Order& order, bool& ran) {
    unsigned ended = 0;
    do {
        for (const unsigned lane : order.of(kWarp)) {
            const unsigned t = warp + lane;
            if (t >= end || fibers[t].wait != Wait::nothing) continue;
            running = t, threadIdx = {t % kMaxThreads, 0, 0}, ran = true;
            emulation_switch(&scheduler_stack, fibers[t].stack_pointer);
            ended += fibers[t].wait == Wait::end;
            if (!failure.empty()) return ended;
        }
    } while (release_warp(warp, end));
    return ended;
}

// Runs the cluster's blocks, of which the first is `block`.
inline void run_cluster(unsigned block, unsigned threads, Order& order) {
    const unsigned warps = (threads + kWarp - 1) / kWarp;
    for (unsigned rank = 0; rank < cluster_blocks; ++rank)
        for (unsigned t = 0; t < threads; ++t) prepare(rank * kMaxThreads + t);
    unsigned left = threads * cluster_blocks;
    while (left > 0 && failure.empty()) {
        bool ran = false;
        for (const unsigned rank : order.of(cluster_blocks)) {
            const unsigned row = (block + rank) / gridDim.x;
            blockIdx = {(block + rank) % gridDim.x, row % gridDim.y, row / gridDim.y};
            const unsigned first = rank * kMaxThreads;
            do {
                for (const unsigned warp : order.of(warps)) {
                    left -= run_warp(first + warp * kWarp, first + threads, order, ran);
                    if (!failure.empty()) return;
                }
            } while (release_barrier(rank, threads, Wait::barrier));
        }
        if (left > 0 && !release_cluster(threads) && !ran && failure.empty()) describe_deadlock(threads);
    }
}

// Runs `body` as every thread of the grid; the message if that could not be done, else an empty string.
template <class Body>
std::string launch(dim3 grid, unsigned threads, size_t dynamic_shared, Schedule schedule, const Body& body,
                   unsigned cluster = 1) {
    failure.clear();
    if (threads == 0 || threads > kMaxThreads) return "a block has 1 to 1024 threads";
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        return "the grid is empty, or beyond the limits";
    if (cluster == 0 || cluster > kMaxCluster || grid.x % cluster)
        return "a row of the grid is whole clusters of 1 to 8";
    Order order{schedule};
    cluster_blocks = cluster;
    gridDim = grid, blockDim = {threads, 1, 1};
    thread_body = [](void* b) { (*static_cast<const Body*>(b))(); };
    thread_argument = const_cast<Body*>(&body);
    for (const unsigned number : order.of(grid.x * grid.y * grid.z / cluster)) {
        for (unsigned rank = 0; rank < cluster; ++rank) {
            shared_arrays[rank].clear();
            shared_array_of(rank, &dynamic_tag, dynamic_shared);
        }
        run_cluster(number * cluster, threads, order);
        if (!failure.empty()) break;
    }
    return failure;
}

}  // namespace emulation

// A reference to the block's own array; the macro's other meaning stands in csrc/cuda/common.cuh.
#define DIFUSORES_SHARED(type, name, count)   \
    static const char name##_tag_storage = 0; \
    type* const name = static_cast<type*>(emulation::shared_array(&name##_tag_storage, sizeof(type) * (count)))
#define DIFUSORES_DYNAMIC_SHARED(name) \
    unsigned char* const name = static_cast<unsigned char*>(emulation::shared_array(&emulation::dynamic_tag, 0))

inline void __syncthreads(std::source_location where = std::source_location::current()) {
    emulation::wait_for(emulation::Wait::barrier, where);
}
namespace difusores::cuda {

constexpr bool kClusters = true;
inline void cluster_barrier(std::source_location where = std::source_location::current()) {
    emulation::wait_for(emulation::Wait::cluster, where);
}
template <class T>
const T* in_block(const T* own, unsigned rank) {
    return static_cast<const T*>(emulation::in_block(own, rank));
}

}  // namespace difusores::cuda

inline void __syncwarp(unsigned mask = ~0u, std::source_location where = std::source_location::current()) {
    emulation::exchange(mask, 0, where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, std::source_location where = std::source_location::current()) {
    return emulation::shuffle(mask, value, lane & 31, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, std::source_location where = std::source_location::current()) {
    return emulation::shuffle(mask, value, static_cast<int>(emulation::running % 32) ^ other, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, std::source_location where = std::source_location::current()) {
    return emulation::shuffle(mask, value, static_cast<int>(emulation::running % 32) + by, where);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, std::source_location where = std::source_location::current()) {
    emulation::exchange(mask, vote, where);
    unsigned result = 0;
    const unsigned warp = emulation::running / 32 * 32;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) result |= static_cast<unsigned>(emulation::fibers[warp + lane].collected & 1) << lane;
    return result;
}
inline bool __any_sync(unsigned mask, bool vote, std::source_location where = std::source_location::current()) {
    return __ballot_sync(mask, vote, where) != 0;
}
