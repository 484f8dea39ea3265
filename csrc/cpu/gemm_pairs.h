// The product of bf16 pairs of gemm_conv in bf16: one or two tiles of rows times a part of a panel, while the rows of y
// of the tiles before are written and what comes next is asked for.
//
// A step multiplies 32 channels: per tile of rows (16 pixels, 1 KB, read where they lie) two tiles of columns, 2 KB of
// the panel. Two tiles of rows: 4 products of 16 cycles for 4 loads of 16 lines.
#pragma once
#include "amx.h"
#include "gelu.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kStep = kGemmPairStep, kColumns = kGemmPairColumns, kTile = kGemmTileRows;
constexpr int64_t kStepBytes = 2 * kStep * kColumns;  // of a panel
constexpr int64_t kLine = kColumns * 4;               // bytes of a row of packed pairs, and of a row of sums
constexpr int64_t kTileSums = kTile * kColumns;
constexpr int64_t kUnit = 4, kUnits = kTile / kUnit;  // rows of y that are written together

DIFUSORES_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of y, of one or two tiles and a panel's columns, that are still to be written from their sums.
struct Pending {
    const float* m;         // [tiles * 16][32]
    const float* terms[2];  // what is added to every row of a tile
    const char* residual;   // like y, or nullptr
    char* y;
    int64_t place[2], apart;  // bytes from y to a tile's first row, from row to row
    int64_t unit, units;      // those written, and all
};

// The next four rows, of y in bf16 or fp32.
template <bool kGeglu, DType kY>
DIFUSORES_INLINE void finish_unit(Pending& p) {
    const int64_t tile = p.unit / kUnits, at = p.place[tile] + p.unit % kUnits * kUnit * p.apart;
    const float* const m = p.m + p.unit * kUnit * kColumns;
    const f32v terms[2] = {load<DType::f32>(p.terms[tile], 0), load<DType::f32>(p.terms[tile], kWidth)};
    ++p.unit;
    f32v low[kUnit], high[kUnit];
    DIFUSORES_UNROLL
    for (int i = 0; i < kUnit; ++i) {
        low[i] = load<DType::f32>(m, i * kColumns) + terms[0];
        high[i] = load<DType::f32>(m, i * kColumns + kWidth) + terms[1];
    }
    if constexpr (kGeglu) gate<false, true>(low, high);
    DIFUSORES_UNROLL
    for (int i = 0; i < kUnit; ++i) {
        char* const y = p.y + at + i * p.apart;
        if (p.residual) {
            const char* const residual = p.residual + at + i * p.apart;
            low[i] += load<kY>(residual, 0);
            if constexpr (!kGeglu) high[i] += load<kY>(residual, kWidth);
        }
        if constexpr (kY == DType::f32) {
            store<kY>(y, 0, low[i]);
            if constexpr (!kGeglu) store<kY>(y, kWidth, high[i]);
        } else if constexpr (kGeglu) _mm256_storeu_si256((__m256i*)y, (__m256i)_mm512_cvtneps_pbh((__m512)low[i]));
        else _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh((__m512)high[i], (__m512)low[i]));
    }
}

template <bool kGeglu, DType kY>
DIFUSORES_INLINE void finish_rest(Pending& p) {
    while (p.unit < p.units) finish_unit<kGeglu, kY>(p);
}

// One or two tiles of rows times a part of a panel.
struct Part {
    const char *a0, *a1;   // the tiles' first pixels; a1 is read of two tiles only
    int64_t row;           // bytes from pixel to pixel
    const int64_t* place;  // [steps] bytes from the first pixel to what a step reads of it
    const char* b;
    const float* before;  // [tiles * 16][32] sums of the chunks before, or nullptr
    float* m;             // sums with this part
    int64_t steps;
    const char* ahead;  // in each step `lines` cache lines from here on are asked for
    int64_t lines;
    const char* next;          // two tiles that come next and may be far away, or nullptr
    const char *y, *residual;  // where the sums will go; nullptr: nowhere yet
    int64_t y_row;             // bytes
};

// Asks, at a step, for weights that come next, into L2.
DIFUSORES_INLINE void ask_weights(const Part& p, int64_t step) {
    const char* ahead = p.ahead + 64 * step * p.lines;
    for (int64_t k = p.lines; k > 0; --k, ahead += 64) __builtin_prefetch(ahead, 0, 2);
}

// For what two tiles will read at this step, into L2.
DIFUSORES_INLINE void ask_rows(const Part& p, int64_t step) {
    const char* a = p.next + p.place[step];
    for (int64_t k = 0; k < 2 * kTile; ++k, a += p.row) __builtin_prefetch(a, 0, 2);
}

// For rows of y and the residual, which a unit will write and read.
DIFUSORES_INLINE void ask_unit(const Part& p, int64_t unit) {
    const int64_t at = unit * kUnit * p.y_row;
    DIFUSORES_UNROLL
    for (int64_t k = 0; k < kUnit; ++k) __builtin_prefetch(p.y + at + k * p.y_row, 1);
    if (!p.residual) return;
    DIFUSORES_UNROLL
    for (int64_t k = 0; k < kUnit; ++k) __builtin_prefetch(p.residual + at + k * p.y_row);
}

#if defined(__AMX_BF16__)
template <int kTiles, bool kGeglu, DType kY>
__attribute__((noinline)) void multiply(const Part& p, Pending& pending) {
    settle_memory();
    if (p.before) {
        _tile_loadd(0, p.before, kLine);
        _tile_loadd(1, p.before + 16, kLine);
        if constexpr (kTiles == 2) _tile_loadd(2, p.before + kTileSums, kLine);
        if constexpr (kTiles == 2) _tile_loadd(3, p.before + kTileSums + 16, kLine);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (kTiles == 2) _tile_zero(2);
        if constexpr (kTiles == 2) _tile_zero(3);
    }
    const char *const a0 = p.a0, *const a1 = p.a1, *b = p.b;
    const int64_t row = p.row, steps = p.steps, *const place = p.place;
    int64_t step = 0;
    // All loads before all products: so two threads of a core take turns best (measured: 5 to 15 %).
    const auto product = [&](const auto& meanwhile) {
        _tile_loadd(6, b, kLine);
        _tile_loadd(4, a0 + place[step], row);
        _tile_loadd(7, b + 64, kLine);
        if constexpr (kTiles == 2) _tile_loadd(5, a1 + place[step], row);
        meanwhile();
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        ask_weights(p, step);
        if constexpr (kTiles == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (kTiles == 2) _tile_dpbf16ps(3, 5, 7);
        ++step, b += kStepBytes;
    };
    while (step < 2 * kUnits && step < steps)
        product([&] {
            if (p.y) ask_unit(p, step);
            if (p.next) ask_rows(p, step);
            if (pending.unit < pending.units) finish_unit<kGeglu, kY>(pending);
        });
    if (p.next) {
        while (step < steps) product([&] { ask_rows(p, step); });
    } else {
        while (step < steps) product([] {});
    }
    _tile_stored(0, p.m, kLine);
    _tile_stored(1, p.m + 16, kLine);
    if constexpr (kTiles == 2) _tile_stored(2, p.m + kTileSums, kLine);
    if constexpr (kTiles == 2) _tile_stored(3, p.m + kTileSums + 16, kLine);
    settle_memory();
}
#else
template <int kTiles, bool kGeglu, DType kY>
void multiply(const Part& p, Pending& pending) {
    constexpr int kRows = 8, kVectors = 2;
    float* m = p.m;
    const float* before = p.before;
    for (int64_t r = 0; r < kTiles * kTile; r += kRows, m += kRows * kColumns) {
        const char *const a = (r < kTile ? p.a0 : p.a1) + r % kTile * p.row, *b = p.b;
        __m512 sum[kRows][kVectors];
        for (int i = 0; i < kRows; ++i)
            for (int k = 0; k < kVectors; ++k)
                sum[i][k] = before ? _mm512_loadu_ps(before + (r + i) * kColumns + k * kWidth) : _mm512_setzero_ps();
        for (int64_t step = 0; step < p.steps; ++step) {
            const char* const at = a + p.place[step];
            if (r == 0) ask_weights(p, step);
            for (int64_t pair = 0; pair < 2 * kStep; pair += 4, b += kLine)
                for (int i = 0; i < kRows; ++i) {
                    int32_t both;
                    __builtin_memcpy(&both, at + i * p.row + pair, 4);
                    for (int k = 0; k < kVectors; ++k)
                        sum[i][k] = _mm512_dpbf16_ps(sum[i][k], (__m512bh)_mm512_set1_epi32(both),
                                                     (__m512bh)_mm512_loadu_si512(b + 64 * k));
                }
        }
        for (int i = 0; i < kRows; ++i)
            for (int k = 0; k < kVectors; ++k) _mm512_storeu_ps(m + i * kColumns + k * kWidth, sum[i][k]);
    }
    finish_rest<kGeglu, kY>(pending);
}
#endif

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
