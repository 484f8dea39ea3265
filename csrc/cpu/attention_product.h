// The two products of attention, "broadcast an element of a, multiply a row of b", on fp32 or on pairs of bf16.
// Included by attention.cpp and its parts only.
#pragma once
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int kVecs = kWidth == 16 ? 4 : 2;  // vectors of queries, and
constexpr int kRows = 6;                     // rows of a product that stay in registers together
constexpr int kQueries = kVecs * kWidth;     // queries that go through a task together
constexpr int64_t kDepth = 128;              // depth of a product whose part of b stays in L1
constexpr float kLowest = -3.402823466e38f;
constexpr float kLog2E = 1.44269504088896341f;

DIFUSORES_INLINE int64_t parts_of(int64_t depth) { return (depth + kDepth - 1) / kDepth; }
DIFUSORES_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
DIFUSORES_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// --- elements of a product ---

struct Floats {
    typedef float Element;
    static DIFUSORES_INLINE void add(f32v& c, float a, f32v b) { c += splat(a) * b; }
};

#if defined(__AVX512BF16__)
struct Pairs {
    typedef uint32_t Element;  // two bf16
    static DIFUSORES_INLINE void add(f32v& c, uint32_t a, f32v b) {
        c = (f32v)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
    }
};
template <DType D>
constexpr bool kInPairs = D == DType::bf16;
#else
template <DType D>
constexpr bool kInPairs = false;
#endif

#if defined(__AMX_BF16__)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

constexpr int64_t kChunk = 32;  // packed keys of v, and the unit to which packed k and v are padded

// Keys of a block: their scores stay in L1; but in pairs, where a head is wide, the sums' way to L2 and back decides.
constexpr int64_t kKeysOfFloats = 96;
DIFUSORES_INLINE int64_t keys_of_pairs(int64_t dv) { return dv > 160 ? 256 : 128; }

// --- what comes next, brought nearer meanwhile ---

// Rows of memory that will be read or written. A product asks for some lines of them at each of its tiles: the
// multiply-adds leave time for it, while a line from beyond L2 costs more than a tile can look ahead.
struct Ahead {
    struct Region {
        const char* row;
        int64_t stride, bytes, rows;  // from row to row, and of a row
    } regions[4];
    int count = 0;
    int64_t column = 0, lines = 0, step = 0;  // where in the row; in all; at each call of ask

    DIFUSORES_INLINE void add(const void* row, int64_t stride, int64_t bytes, int64_t rows) {
        if (rows <= 0) return;
        regions[count++] = {static_cast<const char*>(row), stride, bytes, rows};
        lines += rows * ((bytes + 63) / 64);
    }
    DIFUSORES_INLINE void spread(int64_t calls) { step = (lines + calls - 1) / calls; }
    DIFUSORES_INLINE void ask() {
        for (int64_t k = step; k > 0 && count > 0; --k) {
            Region& r = regions[count - 1];
            __builtin_prefetch(r.row + column, 0, 2);
            column += 64;
            if (column < r.bytes) continue;
            column = 0, r.row += r.stride;
            if (--r.rows == 0) --count;
        }
    }
};

// --- c[row][query] (+)= sum_t a[row][t] b[t][query]; rows of b and c are kQueries long ---

template <class T>
struct Rows {
    const T* ptr;
    int64_t row, step;  // strides, in elements
};

// What is added to c is summed from zero: rounding errors grow with the depth of one block, not of all of them.
template <class Dot, int kCount, int V>
void product_tile(Rows<typename Dot::Element> a, const float* b, float* c, int64_t depth, bool accumulate) {
    f32v sum[kCount][V] = {};
    for (int64_t t = 0; t < depth; ++t, a.ptr += a.step, b += kQueries) {
        f32v across[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) across[v] = load<DType::f32>(b, v * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) Dot::add(sum[r][v], a.ptr[r * a.row], across[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const int64_t i = r * kQueries + v * kWidth;
            store<DType::f32>(c, i, accumulate ? load<DType::f32>(c, i) + sum[r][v] : sum[r][v]);
        }
}

// The last 0 < rows < kCount rows.
template <class Dot, int kCount, int V>
void product_tail(const Rows<typename Dot::Element>& a, const float* b, float* c, int64_t rows, int64_t depth,
                  bool accumulate) {
    if constexpr (kCount > 1) {
        if (rows == kCount - 1) product_tile<Dot, kCount - 1, V>(a, b, c, depth, accumulate);
        else product_tail<Dot, kCount - 1, V>(a, b, c, rows, depth, accumulate);
    }
}

template <class Dot, int V>
void product(const Rows<typename Dot::Element>& a, const float* b, float* c, int64_t rows, int64_t depth,
             bool accumulate, Ahead& ahead) {
    const int64_t parts = parts_of(depth), part_depth = (depth + parts - 1) / parts;
    for (int64_t t = 0; t < depth; t += part_depth, accumulate = true) {
        const int64_t deep = least(part_depth, depth - t);
        Rows<typename Dot::Element> part{a.ptr + t * a.step, a.row, a.step};
        int64_t r = 0;
        for (; r + kRows <= rows; r += kRows, part.ptr += kRows * a.row) {
            ahead.ask();
            product_tile<Dot, kRows, V>(part, b + t * kQueries, c + r * kQueries, deep, accumulate);
        }
        if (r < rows) product_tail<Dot, kRows, V>(part, b + t * kQueries, c + r * kQueries, rows - r, deep, accumulate);
    }
}

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
