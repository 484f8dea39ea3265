// gemm_conv in fp32 on AMX, each number as two of bf16: for rows, that is 1x1 convolutions and linear layers.
//
// x = h + l with h = bf16(x), l = bf16(x - h), and y = sum of h_x h_w + h_x l_w + l_x h_w in fp32, + bias + residual;
// with GEGLU value * GELU(gate) + residual. What is left out, l_x l_w, and the rounding of l_x and l_w are 4e-6 of a
// product, rms, and 3 2^-16 at most. AMX has 16 times the multiply-adds that AVX-512 has in fp32.
//
// Weights come in panels of 32 columns, for each step of 32 channels the high parts' [16 pairs][32][2] and then the
// low parts'; with GEGLU a panel is 16 values and their 16 gates. A task is a run of rows and some panels. kDepth
// steps of its rows at a time are split into tiles of 16 rows by 32 channels, high parts and low parts, that stay in
// L2 while the panels pass. kChunk steps of a panel stay near while the run's tiles pass, two by two columns' tiles: 12
// products for 8 loads, which are made ahead of them. What comes next of the weights, and y's lines, are asked for
// meanwhile. The sum runs over channels in order and is never divided: an output's bits depend on its inputs alone, not
// on the batch or threads. Least bytes: x, y, residual and the weights once.
#include "amx.h"
#include "gelu.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kStep = kGemmPairStep, kColumns = kGemmPairColumns, kTile = kGemmTileRows;
constexpr int64_t kDepth = kGemmSplitDepth;
constexpr int64_t kChunk = 20;                     // steps whose sums are in registers; 80 KB of a panel
constexpr int64_t kLine = kColumns * 4;            // bytes of a row of packed pairs, and of a row of sums
constexpr int64_t kHalf = 2 * kStep * kColumns;    // of a step of a panel: high or low parts
constexpr int64_t kTileBytes = 2 * kStep * kTile;  // of a tile of high or of low parts

DIFUSORES_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// The high parts of 32 channels, and the low ones. What is infinite or NaN becomes NaN in the sum.
DIFUSORES_INLINE void split(__m512 x0, __m512 x1, char* to) {
    const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
    const __m512i h0 = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16);
    const __m512i h1 = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), 16);
    const __m512i low = (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(x1, (__m512)h1), _mm512_sub_ps(x0, (__m512)h0));
    _mm512_storeu_si512(to, high);
    _mm512_storeu_si512(to + kTileBytes, low);
}

// `steps` steps from `channel` on of `count` rows from x on, to tiles one after the other, in the order in which they
// lie: rows of many channels apart meet in one set of the cache. Zeros up to whole tiles.
void split_rows(const GemmSplitArgs& a, const float* x, int64_t count, int64_t channel, int64_t steps, char* tiles) {
    for (int64_t t = 0; t < count; t += kTile)
        for (int64_t c = channel; c < channel + steps * kStep; c += kStep, tiles += kTileBytes) {
            const __mmask32 there = ~0U >> (kStep - at_most(a.c - c, kStep));
            const float* from = x + t * a.c + c;
            for (int64_t r = 0; r < kTile; ++r, from += a.c, tiles += 2 * kStep) {
                const __mmask32 mask = t + r < count ? there : 0;
                split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from),
                      _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> kWidth), from + kWidth), tiles);
            }
        }
}

// One or two tiles of rows times a part of a panel.
struct Part {
    const char *a0, *a1;  // tiles
    const char* b;
    float* m;  // [tiles * 16][32]
    int64_t steps;
    bool accumulate;
    const char* ahead;  // of each step `lines` cache lines from here on are asked for
    int64_t lines;
    const float* y;  // whose lines are asked for too, of `rows` rows `apart`, `wide` bytes of each
    int64_t rows, apart, wide;
};

template <int kTiles>
void multiply(const Part& p) {
    float* const m1 = p.m + kTile * kColumns;
    settle_memory();
    if (p.accumulate) {
        _tile_loadd(0, p.m, kLine);
        _tile_loadd(1, p.m + 16, kLine);
        if constexpr (kTiles == 2) _tile_loadd(2, m1, kLine);
        if constexpr (kTiles == 2) _tile_loadd(3, m1 + 16, kLine);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (kTiles == 2) _tile_zero(2);
        if constexpr (kTiles == 2) _tile_zero(3);
    }
    const char *a0 = p.a0, *a1 = p.a1, *b = p.b;
    const char* ahead = p.ahead;
    const float* y = p.y;
    int64_t unasked = p.rows;
    const int64_t share = (p.rows + p.steps - 1) / p.steps;
    _tile_loadd(4, a0, 64);
    _tile_loadd(6, b + kHalf, kLine);
    if constexpr (kTiles == 2) _tile_loadd(5, a1, 64);
    _tile_loadd(7, b + kHalf + 64, kLine);
    for (int64_t step = 0; step < p.steps; ++step) {
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kTiles == 2) _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(6, b, kLine);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTiles == 2) _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(7, b + 64, kLine);
        for (int64_t k = 0; k < p.lines; ++k, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kTiles == 2) _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(4, a0 + kTileBytes, 64);
        if constexpr (kTiles == 2) _tile_dpbf16ps(3, 5, 7);
        if constexpr (kTiles == 2) _tile_loadd(5, a1 + kTileBytes, 64);
        for (int64_t k = share; k && unasked; --k, --unasked, y += p.apart)
            for (int64_t byte = 0; byte < p.wide; byte += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(y) + byte, 1);
        const int64_t more = step + 1 < p.steps;  // else the last step's are loaded again, in vain
        a0 += more * 2 * kTileBytes, a1 += more * 2 * kTileBytes, b += more * 2 * kHalf;
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kTiles == 2) _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(6, b + kHalf, kLine);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(4, a0, 64);
        if constexpr (kTiles == 2) _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(7, b + kHalf + 64, kLine);
        if constexpr (kTiles == 2) _tile_loadd(5, a1, 64);
    }
    _tile_stored(0, p.m, kLine);
    _tile_stored(1, p.m + 16, kLine);
    if constexpr (kTiles == 2) _tile_stored(2, m1, kLine);
    if constexpr (kTiles == 2) _tile_stored(3, m1 + 16, kLine);
    settle_memory();
}

// y of `count` rows from `row` on and of a panel, of their sums m.
template <bool kGeglu>
void finish(const GemmSplitArgs& a, const float* m, const float* bias, int64_t row, int64_t count, int64_t panel) {
    constexpr int kEach = 4;  // rows that are under way together
    const int64_t columns = kGeglu ? kColumns / 2 : kColumns, apart = kGeglu ? a.o / 2 : a.o;
    const int64_t o0 = panel * columns, wide = at_most(apart - o0, columns);
    const auto write = [&](int64_t place, int64_t left, f32v y) {
        if (left >= kWidth) {
            if (a.residual) y += load<DType::f32>(a.residual, place);
            store<DType::f32>(a.y, place, y);
        } else if (left > 0) {
            if (a.residual) y += load_tail<DType::f32>(a.residual, place, static_cast<int>(left));
            store_tail<DType::f32>(a.y, place, y, static_cast<int>(left));
        }
    };
    const f32v b0 = load<DType::f32>(bias, 0), b1 = load<DType::f32>(bias, kWidth);
    for (int64_t r = 0; r < count; r += kEach, m += kEach * kColumns) {
        f32v first[kEach], second[kEach];
        for (int k = 0; k < kEach; ++k) {
            first[k] = load<DType::f32>(m, k * kColumns) + b0;
            second[k] = load<DType::f32>(m, k * kColumns + kWidth) + b1;
        }
        if constexpr (kGeglu) gate<false>(first, second);
        for (int k = 0; k < kEach && r + k < count; ++k) {
            const int64_t place = (row + r + k) * apart + o0;
            write(place, wide, first[k]);
            if constexpr (!kGeglu) write(place + kWidth, wide - kWidth, second[k]);
        }
    }
}

// Of a panel's columns, in the order in which they are packed.
void gather_bias(const GemmSplitArgs& a, int64_t panel, float* bias) {
    for (int64_t k = 0; k < kColumns; ++k) {
        const int64_t gated = k / kWidth * (a.o / 2) + panel * kWidth + k % kWidth;
        const int64_t column = a.geglu ? gated : panel * kColumns + k;
        bias[k] = column < a.o ? param(a.bias, 0, column, 0.0f) : 0.0f;
    }
}

}  // namespace

void gemm_conv_split(const GemmSplitArgs& a, float* scratch, int64_t begin, int64_t end) {
    const Tiles configured;
    const int64_t all = (a.c + kStep - 1) / kStep, total = (a.rows + kTile - 1) / kTile;
    const int64_t panels = (a.o + kColumns - 1) / kColumns, shares = (panels + a.panels - 1) / a.panels;
    const int64_t apart = a.geglu ? a.o / 2 : a.o;
    // Even parts of the depth.
    const int64_t blocks = (all + kDepth - 1) / kDepth, depth = (all + blocks - 1) / blocks;
    const int64_t chunks = (depth + kChunk - 1) / kChunk, chunk = (depth + chunks - 1) / chunks;
    float* const sums = scratch;  // [panels or, of one block, 1][run * 16][32]
    char* const tiles = reinterpret_cast<char*>(sums + (blocks > 1 ? a.panels : 1) * a.run * kTile * kColumns);
    alignas(64) float bias[kColumns];
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / shares * a.run, count = at_most(a.run, total - first);
        const int64_t p0 = task % shares * a.panels, p1 = at_most(p0 + a.panels, panels);
        const int64_t row = first * kTile, rows = at_most(count * kTile, a.rows - row);
        const int64_t pairs = (count + 1) / 2, lines = (2 * kHalf / 64 + pairs - 1) / pairs;
        for (int64_t step = 0; step < all; step += depth) {
            const int64_t steps = at_most(depth, all - step);
            split_rows(a, a.x + row * a.c, rows, step * kStep, steps, tiles);
            for (int64_t p = p0; p < p1; ++p) {
                const char* const b = static_cast<const char*>(a.packed) + (p * all + step) * 2 * kHalf;
                float* const m = sums + (blocks > 1 ? (p - p0) * a.run * kTile * kColumns : 0);
                const bool ends = step + steps == all;
                if (ends) gather_bias(a, p, bias);
                for (int64_t k = 0; k < steps; k += chunk) {
                    const bool last = ends && k + chunk >= steps;
                    Part part{};
                    part.b = b + k * 2 * kHalf;
                    part.steps = at_most(chunk, steps - k);
                    part.accumulate = step + k > 0;
                    part.ahead = part.b + (k + chunk >= steps ? all - k : chunk) * 2 * kHalf;
                    part.lines = lines;
                    part.apart = apart, part.wide = a.geglu ? kLine / 2 : kLine;
                    for (int64_t t = 0; t < count; t += 2) {
                        const int64_t here = at_most(2 * kTile, rows - t * kTile);
                        part.a0 = tiles + (t * steps + k) * 2 * kTileBytes;
                        part.a1 = part.a0 + steps * 2 * kTileBytes;
                        part.m = m + (chunks == 1 && blocks == 1 ? 0 : t * kTile * kColumns);
                        part.y = a.y + (row + t * kTile) * apart + p * part.wide / 4;
                        part.rows = last ? here : 0;
                        if (t + 1 < count) multiply<2>(part);
                        else multiply<1>(part);
                        part.ahead += part.steps * 64 * lines;
                        if (!last) continue;
                        if (a.geglu) finish<true>(a, part.m, bias, row + t * kTile, here, p);
                        else finish<false>(a, part.m, bias, row + t * kTile, here, p);
                    }
                }
            }
        }
    }
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
